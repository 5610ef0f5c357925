"""PRe on the Qwen2.5-VL of Megatron-Bridge 0.6.2: what is given to its ``pretrain``. Written against its sources.

    config = ...                                        # a ConfigContainer of Megatron-Bridge, of its Qwen2.5-VL
    pre = AttachedPRe(config, ["objective=pre", "objective.pre.layers=[14]"])
    pretrain(config, pre.forward_step, callbacks=[pre.callback()])

docs/megatron-bridge.md says which of its hooks this uses, what was exercised and what was not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from nemo_pre.config.compose import compose_config
from nemo_pre.core.foreign import ForeignChunk, ForeignConfig
from nemo_pre.core.objectives import Objectives
from nemo_pre.parallel.sequence_layout import IGNORE_INDEX, IMAGE_TOKEN_INDEX, Grid

MERGE = 2  # patches along each side of a visual token


class Unknown:
    """What this file does not hear of the model; whoever asks is refused."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise ValueError(
            f"An objective asks for {name} of the encoder, the projector or the pixels of {QwenChunk.kind}, which are "
            f"not known here: compare with what enters the language model (objective.pre.anchor=pre_llm)."
        )


class QwenChunk(ForeignChunk):
    """One chunk of Megatron-Bridge's ``Qwen25VLModel``. The anchor is what enters the language model."""

    kind = "Megatron-Bridge's Qwen25VLModel"

    def __init__(self, model: Any) -> None:
        decoder = model.config
        if decoder.context_parallel_size > 1:
            raise ValueError(f"{self.kind} is not cut over context-parallel ranks here: set context_parallel_size=1.")
        config = ForeignConfig(decoder, Unknown(), Unknown(), decoder.num_layers)
        super().__init__(model, config, model.pre_process, decoder.sequence_parallel)
        self.handles = [
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            model.register_forward_hook(self._end),
        ]
        if model.pre_process:
            self._right = model.get_image_features
            model.get_image_features = self._image_features

    def release(self) -> None:
        super().release()
        if self.pre_process:
            self.model.get_image_features = self._right

    def image_tiles(self, tiles_per_image: Sequence[int], grids: Sequence[Grid] | None) -> list[list[Grid]]:
        return [[grid] for grid in grids or []]

    def padded_length(self, longest: int) -> int:
        return longest

    def _begin(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.observed:
            return
        if kwargs.get("packed_seq_params") is not None:
            raise ValueError(f"{self.kind} packs rows, which this file does not know: switch its packing off.")
        batch = self.next_planned()
        self.enter(batch, kwargs["input_ids"].shape[1])
        if self.pre_process and kwargs.get("pixel_values") is None:
            none = next(self.model.visual.parameters()).new_zeros(0, self.config.hidden_size)
            self.receive(none, none, None)

    def _end(self, _: Any, args: tuple[Any, ...], losses: Any) -> Any:
        return self.weighted(losses) if self.observed and self.model.post_process else losses

    def _image_features(self, *args: Any, **kwargs: Any) -> Any:
        found = self._right(*args, **kwargs)
        if self.observed:
            tokens = torch.cat(list(found.pooler_output))
            self.receive(tokens, tokens, None)
        return found


def planned_form(batch: dict[str, Any], image_token: int) -> dict[str, Any]:
    """A batch of Megatron-Bridge as a step is planned: one -200 for the run of placeholders that an image has.

    Laid out again, every image takes the places of its placeholders, so positions are the model's own.

    Raises:
        ValueError: it holds videos, placeholders and grids disagree, or the loss counts a placeholder.
    """
    tokens = batch.get("tokens") if batch.get("tokens") is not None else batch["input_ids"]
    visual = batch.get("visual_inputs")
    if getattr(visual, "video_grid_thw", None) is not None:
        raise ValueError("A batch holds videos, whose tokens objectives do not know: leave them out of the data.")
    grid_thw = None if visual is None else visual.image_grid_thw
    grids = (
        [] if grid_thw is None else [(int(h) // MERGE, int(w) // MERGE) for _, h, w in grid_thw.view(-1, 3).tolist()]
    )
    sizes, rows = iter([height * width for height, width in grids]), []
    for row in tokens.tolist():
        kept, place = [], 0
        while place < len(row):
            kept.append(place)
            place += 1 if row[place] != image_token else next(sizes, len(row))
        rows.append(kept)
    runs = sum(int((tokens[number, torch.tensor(kept)] == image_token).sum()) for number, kept in enumerate(rows))
    taken = sum(height * width for height, width in grids)
    if runs != len(grids) or taken != int((tokens == image_token).sum()):
        raise ValueError("A batch has other image placeholders than its image_grid_thw says: prepare it anew.")
    if ((tokens == image_token) & (batch["loss_mask"] > 0)).any():
        raise ValueError("A batch counts the loss behind an image's last token: put a token of text behind the image.")
    width = max(map(len, rows))
    planned = torch.zeros(len(rows), width, dtype=torch.int64)
    labels, mask = torch.full_like(planned, IGNORE_INDEX), torch.zeros(len(rows), width)
    for number, kept in enumerate(rows):
        here = torch.tensor(kept)
        text = tokens[number, here].cpu()
        planned[number, : len(kept)] = torch.where(text == image_token, IMAGE_TOKEN_INDEX, text)
        labels[number, : len(kept)] = batch["labels"][number, here].cpu()
        mask[number, : len(kept)] = batch["loss_mask"][number, here].float().cpu()
    tiles = {"num_media_tiles": [1] * len(grids), "media_grids": grids}
    return {"tokens": planned, "labels": labels, "loss_mask": mask, **tiles}


class AttachedPRe:
    """The objectives in Megatron-Bridge's hooks: heads before DDP, a step read ahead, metrics at its end."""

    def __init__(self, config: Any, words: list[str], seed: int = 0) -> None:
        from omegaconf import OmegaConf

        options = OmegaConf.to_object(compose_config(words).objective)
        self.objectives = Objectives(options, seed, config.train.train_iters)
        self._image_token = config.model.image_token_id
        self._waiting: dict[int, list[Any]] = {}  # by chunk, what it has not run yet
        config.model.register_pre_wrap_hook(self._attach)

    def _attach(self, model: list[Any]) -> list[Any]:
        self.objectives.attach([QwenChunk(chunk) for chunk in model])
        return model

    def forward_step(self, state: Any, data_iterator: Any, model: Any, return_schedule_plan: bool = False) -> Any:
        """Megatron-Bridge's step of a vision-language model, on micro-batches of a step that was read ahead."""
        from megatron.bridge.training.vlm_step import forward_step
        from megatron.core.num_microbatches_calculator import get_num_microbatches

        if not model.training:
            return forward_step(state, data_iterator, model, return_schedule_plan)
        chunk = id(model)
        if not self._waiting.get(chunk):  # its first micro-batch of a step
            if chunk in self._waiting:  # once more: rerun_state_machine runs the step again
                self._waiting.clear()
            items = [next(data_iterator) for _ in range(get_num_microbatches())]
            if not self._waiting:  # the rank's first
                if self.objectives.plan is not None:
                    self.objectives.forget_step()
                self.objectives.start_step([planned_form(item, self._image_token) for item in items])
            self._waiting[chunk] = items
        item = self._waiting[chunk].pop(0)
        return forward_step(state, iter([item]), model, return_schedule_plan)

    def callback(self) -> Any:
        from megatron.bridge.training.callbacks import Callback

        attached = self

        class Steps(Callback):
            def on_train_start(self, context: Any) -> None:
                attached.objectives.steps_done = context.state.train_state.step
                attached.objectives.install()

            def on_train_step_end(self, context: Any) -> None:
                attached._waiting.clear()
                metrics = attached.objectives.end_step()  # the same on every rank: its own all-reduce
                if not context.skipped_iter:
                    attached.objectives.after_update()
                if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
                    print("  ".join(f"{name} {value:.4f}" for name, value in metrics.items()), flush=True)

        return Steps()
