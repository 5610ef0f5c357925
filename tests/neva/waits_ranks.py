"""The rank's side of test_waits: forward and backward passes of whole models on a device without values."""

from __future__ import annotations

import os
import traceback
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from tests.reference import tiny
from tests.waits import DEVICE, no_waits

IMAGES = (2, 1)  # per sample


@dataclass
class Steps:
    """What terms ask of whatever trains."""

    chunks: list[Any]
    steps_done: int = 0
    max_steps: int = 2


def waits_of(cases: dict[str, dict[str, Any]]) -> dict[str, str | None]:
    """For every case the traceback of the first wait in its step, or None."""
    found: dict[str, str | None] = {}
    for name, case in cases.items():
        try:
            run_passes(**case)
            found[name] = None
        except Exception:
            found[name] = traceback.format_exc()
    return found


def prepare_pass(
    changes: dict[str, Any] | None = None, similarity: bool = False, **options: Any
) -> tuple[Any, dict[str, Any]]:
    """A chunk with its terms, on the host, and the planned micro-batch of its first step."""
    import torch.distributed as dist
    from megatron.core import parallel_state as ps
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from nemo_pre.neva.build import build_neva_config
    from nemo_pre.objectives.registry import enabled
    from nemo_pre.terms.step_planner import StepPlanner
    from nemo_pre.train import prepare_process
    from tests.parity.shape import tiny_run

    given = {"pre": None, **options}
    run = tiny_run(os.devnull, {}, num_microbatches=1, micro_batch_size=len(IMAGES), max_steps=2, **given)
    for name, value in (changes or {}).items():
        section, field = name.split(".")
        setattr(getattr(run, section), field, value)
    prepare_process(run)
    if not dist.is_initialized():
        dist.init_process_group("gloo")
        ps.initialize_model_parallel()
    model_parallel_cuda_manual_seed(0)
    config = build_neva_config(run, on_gpu=False)
    terms = [objective.build_term() for objective in enabled(run)]
    for term in terms:
        term.prepare(config)
    chunk = config.configure_model()
    training, planner = Steps([chunk]), StepPlanner()
    for term in terms:
        planner.add(term)
        term.install(training)
    if similarity:
        _watch_similarity(chunk)
    batch = _batch(run)
    planner.plan(training, [batch])
    for term in terms:
        term.start_step()
    return chunk, batch


def strided_gradients_of(cases: dict[str, dict[str, Any]]) -> dict[str, tuple[int, list[str]]]:
    """For every case the number of gradients that reached the decoder's matrix products in a step, and the names of
    those that came strided."""
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

    found: dict[str, tuple[int, list[str]]] = {}
    for name, case in cases.items():
        chunk, batch = prepare_pass(**case)
        seen: list[str] = []
        strided: list[str] = []
        for place, module in chunk.language_model.decoder.named_modules():
            if isinstance(module, ColumnParallelLinear | RowParallelLinear):
                module.register_forward_hook(_listener(place, seen, strided))
        losses, loss_mask = _run(chunk, batch, batch)
        (losses * loss_mask).sum().backward()
        found[name] = len(seen), strided
    return found


def _listener(place: str, seen: list[str], strided: list[str]) -> Any:
    def look(gradient: torch.Tensor) -> None:
        seen.append(place)
        if not gradient.is_contiguous():
            strided.append(place)

    def listen(_module: Any, _given: Any, output: Any) -> None:
        if output[0].requires_grad:
            output[0].register_hook(look)

    return listen


def run_passes(changes: dict[str, Any] | None = None, similarity: bool = False, **options: Any) -> None:
    """Plan a step of one micro-batch on the host and run its passes where waiting is an error."""
    import torch.distributed as dist

    from nemo_pre.compat import cpu_device
    from nemo_pre.device_copies import to_device
    from nemo_pre.neva import split_attention

    chunk, batch = prepare_pass(changes, similarity, **options)
    _move(chunk)
    with no_waits(), pytest.MonkeyPatch.context() as patched:
        patched.setattr(dist, "all_reduce", lambda *_, **__: None)  # Megatron's cross entropy asks one rank too
        patched.setattr(cpu_device, "_CPU", DEVICE)  # what Megatron makes on "cuda"
        # torch's own is a tensor of another class, which cannot be made while calls are looked at.
        patched.setattr(split_attention, "causal_lower_right", _seen)
        pinned = {
            key: to_device(batch[key], DEVICE) for key in ("tokens", "position_ids", "media", "labels", "loss_mask")
        }
        losses, loss_mask = _run(chunk, batch, pinned)
        (losses * loss_mask).sum().backward()
    trained = [name for name, each in chunk.named_parameters() if each.requires_grad and each.grad is None]
    assert not trained, f"no gradient reached {trained}"


def _run(chunk: Any, batch: dict[str, Any], tensors: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    losses, loss_mask = chunk(
        input_ids=tensors["tokens"],
        position_ids=tensors["position_ids"],
        images=tensors["media"],
        labels=tensors["labels"],
        loss_mask=tensors["loss_mask"],
        num_image_tiles=batch["num_media_tiles"],
        image_grids=batch.get("media_grids"),
        micro_batch=batch["micro_batch"],
    )
    return losses, loss_mask


def _seen(queries: int, keys: int) -> torch.Tensor:
    return torch.ones(queries, keys, dtype=torch.bool, device=DEVICE).tril(keys - queries)


def _move(chunk: Any) -> None:
    """Put the chunk on the device, with what it would take there when it first runs."""
    chunk.to(DEVICE)
    for place, name in (
        (chunk.language_model.rotary_pos_emb, "inv_freq"),
        (getattr(chunk, "laver_teacher", None), "center"),
    ):
        value = getattr(place, name, None)
        if value is not None:
            setattr(place, name, value.to(DEVICE))


def _batch(run: Any) -> dict[str, Any]:
    batch = tiny.random_batch(IMAGES, seed=3)
    if run.data.packing:
        batch["segments"] = (torch.arange(batch["tokens"].shape[1]) > 3).long().expand_as(batch["tokens"]).contiguous()
    if run.model.vision.family == "qwen25_vl":
        grids = [(2, 2), (1, 3), (2, 1)]
        tokens = sum(rows * columns for rows, columns in grids)
        batch["media"] = torch.zeros(tokens, 4, 3 * run.model.vision.patch_size**2)
        batch["num_media_tiles"], batch["media_grids"] = [1] * len(grids), grids
    return batch


def _watch_similarity(chunk: Any) -> None:
    from types import SimpleNamespace

    from nemo_pre.callbacks.similarity import VisualSimilarityCallback

    callback = VisualSimilarityCallback(every=1)
    callback.on_fit_start(SimpleNamespace(strategy=SimpleNamespace(megatron_parallel=[chunk])), None)  # type: ignore[arg-type]
    callback._active = True
