"""The visual tokens of a Hugging Face vision-language model, taken with hooks on its decoder layers.

Works for models whose picture is a run of one token id in ``input_ids`` and whose text part is a decoder with
``layers``: LLaVA and our exported models, LLaVA-NeXT, Qwen2.5-VL, InternVL. Of a picture in tiles all tokens are
measured, and those of the tile that shows the whole picture are compared with the mask.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nemo_pre.diagnostics.replicas import Replicas
from nemo_pre.diagnostics.samples import DiagnosticSample
from nemo_pre.diagnostics.states import (
    Grid,
    VisualStates,
    asking_tokens,
    attention_mass,
    instance_patches,
    square_patches,
    token_classes,
)
from nemo_pre.evaluation.prompts import chat_message

if TYPE_CHECKING:
    from PIL.Image import Image


class HuggingFaceModel:
    """A local directory that ``AutoModelForImageTextToText`` loads, with eager attention, which has probabilities.

    Args:
        background: see :class:`nemo_pre.diagnostics.samples.DiagnosticData`.
        trust_remote_code: run Python files of the directory that are not nemo-pre's too.

    Raises:
        ValueError: the directory holds no such model, or the model is not built as described above.
    """

    def __init__(self, directory: str | Path, background: int | None, trust_remote_code: bool = False) -> None:
        self.directory = Path(directory)
        self.processor, self.network = _load(self.directory, trust_remote_code)
        self._background = background
        config = self.network.config
        image_token = getattr(config, "image_token_id", None)
        self._image_token = getattr(config, "image_token_index", None) if image_token is None else image_token
        self._decoder = _decoder(self.network)
        if self._image_token is None or self._decoder is None:
            raise ValueError(
                f"model={directory} is a {type(self.network).__name__}, whose image token or decoder layers are not "
                f"where LLaVA, LLaVA-NeXT, Qwen2.5-VL and InternVL have them: export it as one of these."
            )
        self.num_layers = len(self._decoder.layers)
        self.replicas = Replicas()
        self.vocabulary = min(len(self.processor.tokenizer), config.get_text_config().vocab_size)

    def shown(self, sample: DiagnosticSample) -> Image:
        from PIL import Image

        found = self._plain_pixels(sample.picture)
        if "image_grid_thw" in found:  # the whole picture, in patches
            return sample.picture
        pixels = self._whole_tile(found).round().clamp(0, 255).byte()
        return Image.fromarray(pixels.permute(1, 2, 0).numpy())

    def word(self, token: int) -> str:
        return str(self.processor.tokenizer.decode([token]))

    def describe(self) -> dict[str, Any]:
        return {"source": "Hugging Face", "class": type(self.network).__name__, "path": str(self.directory)}

    @torch.inference_mode()
    def states(self, samples: Sequence[DiagnosticSample], everything: bool) -> VisualStates:
        inputs = self._inputs(samples)
        is_visual = inputs["input_ids"] == self._image_token
        is_text = inputs["attention_mask"].bool() & ~is_visual
        tokens: dict[int, Tensor] = {}
        attention: dict[int, Tensor] = {}

        def keep(layer: int, hidden_states: Tensor) -> None:
            tokens[layer] = hidden_states[is_visual.to(hidden_states.device)]

        def keep_mass(layer: int, weights: Tensor) -> None:
            attention[layer] = attention_mass(weights, is_visual, asking_tokens(is_visual, is_text))

        with _hooks(self._decoder, keep, keep_mass if everything else None):
            output = self.network(**inputs, use_cache=False, **({} if everything else {"logits_to_keep": 1}))
        grids, masks = self._patches(samples, inputs, is_visual.sum(1).tolist())
        words = None
        if everything:
            scores = output.logits[is_visual][:, : self.vocabulary].float()
            if self._image_token < self.vocabulary:
                scores[:, self._image_token] = float("-inf")  # it is never said
            words = scores.argmax(1)
        return VisualStates(
            image=is_visual.nonzero()[:, 0],
            grids=grids,
            classes=token_classes(masks, grids, is_visual.sum(1).tolist(), self._background),
            entering=tokens[0],
            layers=tokens,
            attention=attention,
            words=words,
            instances=instance_patches(masks),
        )

    @torch.inference_mode()
    def scores(self, tokens: Tensor) -> Tensor:
        decoder: Any = self._decoder
        states = decoder.norm(tokens.to(self.network.dtype))
        scores: Tensor = self.network.get_output_embeddings()(states)[:, : self.vocabulary].float()
        return scores

    @torch.inference_mode()
    def text_loss(self, passages: Sequence[Tensor]) -> tuple[float, int]:
        total, count = 0.0, 0
        for passage in passages:
            scores = (
                self.network(input_ids=passage[None].to(self.network.device)).logits[0, :-1, : self.vocabulary].float()
            )
            total += float(torch.nn.functional.cross_entropy(scores.cpu(), passage[1:], reduction="sum"))
            count += len(passage) - 1
        return total, count

    def token_ids(self, words: str) -> list[int]:
        return list(self.processor.tokenizer(words, add_special_tokens=False)["input_ids"])

    def _inputs(self, samples: Sequence[DiagnosticSample]) -> Any:
        texts = [
            self.processor.apply_chat_template([chat_message(sample.question, 1)], add_generation_prompt=True)
            for sample in samples
        ]
        pictures = [[sample.picture] for sample in samples]
        inputs = self.processor(images=pictures, text=texts, padding=True, return_tensors="pt")
        return inputs.to(self.network.device, dtype=self.network.dtype)

    def _patches(
        self, samples: Sequence[DiagnosticSample], inputs: Any, sizes: list[int]
    ) -> tuple[list[Grid], list[Tensor | None]]:
        """Where each picture's patches are among its tokens, and the masks' pixels, patch by patch."""
        grids: list[Grid] = []
        masks: list[Tensor | None] = []
        for number, (sample, size) in enumerate(zip(samples, sizes, strict=True)):
            grid = self._grid(inputs, number, size)
            grids.append(grid)
            masks.append(None if sample.marked_mask is None else self._mask_patches(sample.marked_mask, grid))
        return grids, masks

    def _grid(self, inputs: Any, number: int, size: int) -> Grid:
        config = self.network.config
        if "image_grid_thw" in inputs:
            merge = config.vision_config.spatial_merge_size
            _, height, width = inputs["image_grid_thw"][number].tolist()
            return Grid(0, height // merge, width // merge)
        patch = config.vision_config.patch_size
        patch = patch if isinstance(patch, int) else patch[0]
        shrunk = round(1 / getattr(config, "downsample_ratio", 1.0))
        side = inputs["pixel_values"].shape[-1] // patch // shrunk
        # InternVL's thumbnail comes last, LLaVA-NeXT's first.
        return Grid(size - side * side if config.model_type == "internvl" else 0, side, side)

    def _mask_patches(self, mask: Image, grid: Grid) -> Tensor:
        from PIL import Image

        found = self._plain_pixels(mask, resample=Image.Resampling.NEAREST)
        if "image_grid_thw" in found:  # patches come in the order of merging, frames and pixels in each
            pixels = found["pixel_values"].float()
            merged = pixels.reshape(grid.size, -1, 3, pixels.shape[1] // 3)
            return merged.transpose(2, 3).reshape(grid.size, -1, 3)
        return square_patches(self._whole_tile(found), grid.rows, grid.columns)

    def _plain_pixels(self, picture: Image, **how: Any) -> Any:
        """What the processor makes of a picture, its values as they are."""
        plain = {"do_rescale": False, "do_normalize": False, **how}
        return self.processor.image_processor(images=[picture], return_tensors="pt", **plain)

    def _whole_tile(self, found: Any) -> Tensor:
        """``[3, H, W]``: the tile that shows the whole picture."""
        tiles = found["pixel_values"].float()
        tiles = tiles.reshape(-1, *tiles.shape[-3:])
        return tiles[-1 if self.network.config.model_type == "internvl" else 0]


@contextmanager
def _hooks(decoder: nn.Module, keep: Any, keep_mass: Any) -> Iterator[None]:
    """``keep(layer, hidden states)``, also of what enters the first layer, and ``keep_mass(layer, weights)``."""

    def first(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        keep(0, args[0] if args else kwargs["hidden_states"])

    def output_of(layer: int) -> Any:
        return lambda _, __, output: keep(layer, output[0] if isinstance(output, tuple) else output)

    def weights_of(layer: int) -> Any:
        return lambda _, __, output: keep_mass(layer, output[1])

    layers: Any = decoder.layers
    handles = [layers[0].register_forward_pre_hook(first, with_kwargs=True)]
    for number, layer in enumerate(layers, start=1):
        handles.append(layer.register_forward_hook(output_of(number)))
        if keep_mass is not None:
            handles.append(layer.self_attn.register_forward_hook(weights_of(number)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _decoder(network: Any) -> Any:
    """The text part's module with ``layers``."""
    inner = getattr(network, "model", network)
    language = getattr(inner, "language_model", None)
    found = language if hasattr(language, "layers") else getattr(language, "model", None)
    return found if hasattr(found, "layers") else None


def _load(directory: Path, trust_remote_code: bool) -> tuple[Any, Any]:
    from nemo_pre.huggingface.loading import load_network, load_processor, needs_own_code

    try:
        own_code = needs_own_code(directory, trust_remote_code)
    except (OSError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"model={directory} cannot be loaded: {str(error).splitlines()[0]}.") from error
    how: dict[str, Any] = {"local_files_only": True, "trust_remote_code": own_code}
    try:
        processor = load_processor(directory, **how)
        network = load_network(directory, dtype="auto", attn_implementation="eager", **how)
    except (OSError, ValueError, KeyError, ImportError, AttributeError) as error:
        first = (str(error).strip() or repr(error)).splitlines()[0]
        raise ValueError(f"model={directory} cannot be loaded as an image-text-to-text model: {first}") from error
    if getattr(processor, "chat_template", None) is None:
        raise ValueError(f"model={directory} has no chat template to ask with: export the model with its processor.")
    processor.tokenizer.padding_side = "right"  # positions count from the first token
    return processor, network.eval().to("cuda" if torch.cuda.is_available() else "cpu")
