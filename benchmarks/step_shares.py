"""Where a step's time goes: part by part, forward and backward.

    python -m benchmarks.step_shares                                          # digits_tiny, on what the machine has
    python -m benchmarks.step_shares --model llava15_7b --layers 2 --precision bf16 --micro-batch-size 4

The sides are those of ``benchmarks.step_anatomy parts`` and ``spatial``, one after another. Clocks (events on a GPU)
stand before and after every module of a part; what lies between them is the part's, with the gaps in which a GPU waits
for its host. The rest is what no clock saw: losses, residuals, embeddings, masks, clipping, data, and norms that are
no part of Transformer Engine's matrices. The masked branch runs through the decoder and is counted there. Clocks slow
a step down a little: how long one takes is ``benchmarks.step_anatomy``'s to say.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import asdict
from datetime import datetime, timezone
from typing import Any

from benchmarks.overhead import (
    RESULTS,
    WARM_UP_BLOCKS,
    Settings,
    describe_machine,
    fit,
    parse_arguments,
    versions,
    wait_for_device,
)
from benchmarks.step_anatomy import part_sides

FORWARD, BACKWARD, STEP = "forward", "backward", "step"


def modules_of_parts(chunk: Any) -> dict[str, list[Any]]:
    """The modules of each part of a model on one rank; none runs within another."""
    tower = getattr(chunk.vision_model, "vision_model", chunk.vision_model)
    encoder = getattr(tower, "encoder", None)
    blocks = tower.children() if encoder is None else getattr(encoder, "layer", None) or encoder.layers
    layers = chunk.language_model.decoder.layers
    teacher = getattr(chunk, "laver_teacher", None)
    parts = {
        "encoder": [*([tower.embeddings] if encoder is not None else []), *blocks],
        "projector": [chunk.vision_projection],
        "attention": [layer.self_attention for layer in layers],
        "MLP": [layer.mlp for layer in layers],
        "output layer": [chunk.language_model.output_layer],
        "PRe's head": list(getattr(chunk, "pre_heads", {}).values()),
        "LaVer's head": [chunk.laver_head] if hasattr(chunk, "laver_head") else [],
        "LaVer's teacher": [] if teacher is None else [teacher, teacher.head],
    }
    return {name: modules for name, modules in parts.items() if modules}


def needing_gradient(values: Iterable[Any]) -> Any:
    """The first tensor that does, or None."""
    return next((value for value in values if getattr(value, "requires_grad", False)), None)


class Clocks:
    """Spans of time by part and pass, of one step at a time."""

    def __init__(self, on_gpu: bool) -> None:
        self._on_gpu = on_gpu
        self._spans: dict[tuple[str, str], list[tuple[Any, Any]]] = defaultdict(list)

    def now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def watch(self, part: str, modules: Iterable[Any]) -> None:
        """Backward, from the gradient of a module's output to that of its input: a module whose input needs none is
        not seen. (Backward hooks of modules would forbid Megatron's changes in place.)"""
        for module in modules:
            calls: list[dict[str, Any]] = []
            module.register_forward_pre_hook(self._entering(part, calls), with_kwargs=True)
            module.register_forward_hook(self._leaving(part, calls))

    def _entering(self, part: str, calls: list[dict[str, Any]]) -> Callable[..., None]:
        def entering(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            call: dict[str, Any] = {}

            def end_backward(_: Any) -> None:
                if "backward" in call:
                    self._spans[part, BACKWARD].append((call.pop("backward"), self.now()))

            if (given := needing_gradient([*args, *kwargs.values()])) is not None:
                given.register_hook(end_backward)
            call["forward"] = self.now()
            calls.append(call)

        return entering

    def _leaving(self, part: str, calls: list[dict[str, Any]]) -> Callable[..., None]:
        def leaving(_: Any, args: tuple[Any, ...], output: Any) -> None:
            call = calls.pop()
            self._spans[part, FORWARD].append((call["forward"], self.now()))

            def begin_backward(_: Any) -> None:
                call["backward"] = self.now()

            if (result := needing_gradient(output if isinstance(output, tuple) else [output])) is not None:
                result.register_hook(begin_backward)

        return leaving

    def wrap(self, part: str, owner: Any, method: str) -> None:
        """Count a method's time as ``part``'s."""
        right = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = self.now()
            result = right(*args, **kwargs)
            self._spans[part, STEP].append((begin, self.now()))
            return result

        setattr(owner, method, timed)

    def take(self) -> dict[str, dict[str, float]]:
        """Milliseconds by part and pass since the last call; the device has done all its work."""
        taken: dict[str, dict[str, float]] = defaultdict(dict)
        for (part, phase), spans in self._spans.items():
            taken[part][phase] = sum(self._milliseconds(*span) for span in spans)
            spans.clear()
        return dict(taken)

    def _milliseconds(self, begin: Any, end: Any) -> float:
        return float(begin.elapsed_time(end)) if self._on_gpu else 1000 * (end - begin)


def run_with_clocks(pipe: Any, settings: Settings, side: str, scratch: str) -> None:
    from lightning.pytorch.callbacks import Callback

    steps: list[tuple[float, dict[str, dict[str, float]]]] = []

    class Shares(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            from nemo_pre.neva.model import model_chunks

            (chunk,) = model_chunks(trainer)
            self.clocks = Clocks(next(chunk.parameters()).is_cuda)
            for part, modules in modules_of_parts(chunk).items():
                self.clocks.watch(part, modules)
            for optimizer in trainer.optimizers:
                self.clocks.wrap("optimizer", optimizer.mcore_optimizer, "step")
            if hasattr(chunk, "laver_teacher"):
                chunk.laver_teacher.update = updated_and_gathered(chunk.laver_teacher)
                self.clocks.wrap("teacher's update", chunk.laver_teacher, "update")

        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            wait_for_device()
            self.clocks.take()
            self.started = time.perf_counter()

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            wait_for_device()
            steps.append((1000 * (time.perf_counter() - self.started), self.clocks.take()))

    on_gpu = fit(settings, side, scratch, settings.timed_steps, Shares, megatron_layers=False)
    pipe.send((describe_machine(on_gpu), steps[WARM_UP_BLOCKS * settings.steps_per_block :]))


def updated_and_gathered(teacher: Any) -> Any:
    """The gather belongs to the update, whose clock stops before it is done."""
    update = teacher.update

    def whole(momentum: float) -> None:
        update(momentum)
        teacher.wait()

    return whole


def shares(steps: list[tuple[float, dict[str, dict[str, float]]]]) -> dict[str, Any]:
    """Medians over steps, and shares of the median step; what is not a part's is the rest."""
    step = statistics.median(whole for whole, _ in steps)
    parts: dict[str, Any] = {}
    for part, phases in steps[0][1].items():
        medians = {phase: statistics.median(found[part][phase] for _, found in steps) for phase in phases}
        parts[part] = {f"{phase}_ms": round(median, 3) for phase, median in medians.items()}
        parts[part]["share"] = round(sum(medians.values()) / step, 4)
    parts["rest"] = {"share": round(1 - sum(part["share"] for part in parts.values()), 4)}
    return {"step_ms": round(step, 3), "parts": parts}


def main() -> None:
    arguments = parse_arguments("Share of a step's time by part of the model.")
    settings = Settings("step_shares", part_sides(arguments["model"]), **arguments, text_only=("text",))
    context = multiprocessing.get_context("spawn")
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="shares-") as scratch:
        for side in settings.sides:
            pipe, child = context.Pipe()
            process = context.Process(target=run_with_clocks, args=(child, settings, side, scratch), daemon=True)
            process.start()
            child.close()
            machine, steps = pipe.recv()
            process.join()
            found[side] = shares(steps)
            told = ", ".join(f"{part} {100 * of['share']:.1f}%" for part, of in found[side]["parts"].items())
            print(f"{side}: {found[side]['step_ms']:.1f} ms a step: {told}", flush=True)
    result = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "machine": machine,
        "versions": versions(),
        "settings": asdict(settings),
        "sides": found,
    }
    RESULTS.mkdir(exist_ok=True)
    out = RESULTS / f"{settings.name}_{settings.model}_{'gpu' if machine['gpu'] else 'cpu'}.json"
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {out}")


if __name__ == "__main__":
    main()
