"""What an objective costs in training: step time, FLOPs and peak memory, beside a run without it.

``benchmarks.pre_overhead`` and ``benchmarks.laver_overhead`` say which runs are compared. Each side is a process that
builds the product's own trainer (``nemo_pre.train``), and they take turns: while one runs a block of steps the others
wait at a pipe. So every side is what a user runs, and the one without is plain NeVA, with no trace of what switching
off inside one process would leave; drift of the machine falls on all alike, since ratios are taken between
neighbouring blocks; and each side's memory is its own. Further processes count FLOPs (and on a CPU memory): counting
slows a step down, and on a GPU they use Megatron's own layers, because the counter does not see into Transformer
Engine. It does not see into attention kernels either: mixed attention is counted by its unmasked pairs of tokens.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import platform
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
WARM_UP_BLOCKS = 2
COUNTED_STEP, PROFILED_STEP = 2, 3  # the first step allocates the optimizer's state
WALL, CPU = 0, 1

Times = dict[str, list[list[tuple[float, float]]]]  # side -> block -> step -> seconds of wall clock and of CPU


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        name: of the result file.
        sides: the overrides of each run; the first is what the others are compared with.
        text_only: the sides whose samples have no image, of the same length.
        prepared_data: batches are read from the data that the sides name, within the step, instead of made up.
    """

    name: str
    sides: dict[str, list[str]]
    model: str
    layers: int | None  # decoder layers to keep; None: all
    precision: str
    micro_batch_size: int
    num_microbatches: int
    sequence_length: int | None  # None: the recipe's
    blocks: int
    steps_per_block: int
    text_only: tuple[str, ...] = ()
    prepared_data: bool = False

    @property
    def tokens_per_sample(self) -> int:
        """Tokens of a sample's text and image."""
        return self.sequence_length or (96 if self.model == "digits_tiny" else 2048)

    @property
    def timed_steps(self) -> int:
        return (self.blocks + WARM_UP_BLOCKS) * self.steps_per_block


def compare(settings: Settings, extra: Callable[[dict[str, Any]], dict[str, Any]] = lambda result: {}) -> None:
    """Measure all sides and write the result; ``extra`` adds to it."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="overhead-") as scratch:
        counts = {side: count_in_process(context, settings, side, scratch) for side in settings.sides}
        times, memory, machine = measure_in_turns(context, settings, scratch)
    result = summary(settings, machine, times, memory, counts)
    result |= extra(result)
    RESULTS.mkdir(exist_ok=True)
    out = RESULTS / f"{settings.name}_{settings.model}_{'gpu' if machine['gpu'] else 'cpu'}.json"
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: result[key] for key in ("step_time", "step_cpu_time", "flops", "memory")}, indent=1))
    print(f"written to {out}")


def parse_arguments(description: str) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", default="digits_tiny", help="a config of recipes/model")
    parser.add_argument("--layers", type=int, help="decoder layers to keep, for a real width at truncated depth")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--micro-batch-size", type=int, default=8, help="samples, with one image each")
    parser.add_argument("--num-microbatches", type=int, default=4)
    parser.add_argument("--sequence-length", type=int, help="tokens of text and image; default: 96 or 2048")
    parser.add_argument("--blocks", type=int, default=8, help="measured blocks per side")
    parser.add_argument("--steps-per-block", type=int, default=5)
    return vars(parser.parse_args())


# --- the parent: who runs when ----------------------------------------------------------------------------------


def measure_in_turns(
    context: Any, settings: Settings, scratch: str, runners: Mapping[str, Callable[..., None]] | None = None
) -> tuple[Times, dict[str, Any], dict[str, Any]]:
    """Times by side, block and step (wall, CPU seconds), peak memory by side (bytes, on a GPU) and the machine.

    ``runners`` names the sides that are something else than a run of the product; they speak as :func:`run_timed`.
    """
    pipes, processes = {}, []
    for side in settings.sides:
        pipes[side], child = context.Pipe()
        processes.append(
            context.Process(
                target=(runners or {}).get(side, run_timed), args=(child, settings, side, scratch), daemon=True
            )
        )
        processes[-1].start()
        child.close()
    times: Times = {side: [] for side in settings.sides}
    for pipe in pipes.values():
        assert pipe.recv() == "ready"  # both are set up before the first block
    for block in range(settings.blocks + WARM_UP_BLOCKS):
        for side in settings.sides if block % 2 == 0 else reversed(settings.sides):
            pipes[side].send("go")
            steps = pipes[side].recv()
            if block >= WARM_UP_BLOCKS:
                times[side].append(steps)
                done = f"block {block - WARM_UP_BLOCKS + 1}/{settings.blocks}"
                print(f"{done} {side}: {median_ms(steps, WALL):.1f} ms a step")
    ends = {side: pipes[side].recv() for side in settings.sides}
    for process in processes:
        process.join()
    return times, {side: end["memory"] for side, end in ends.items()}, ends[next(iter(settings.sides))]["machine"]


def count_in_process(context: Any, settings: Settings, side: str, scratch: str) -> dict[str, Any]:
    pipe, child = context.Pipe()
    process = context.Process(target=run_counted, args=(child, settings, side, scratch), daemon=True)
    process.start()
    child.close()
    counts = pipe.recv()
    process.join()
    print(f"{side}: {counts['flops']:.4g} FLOPs a step")
    return counts


# --- a side: the product's own run ------------------------------------------------------------------------------


def run_timed(pipe: Any, settings: Settings, side: str, scratch: str) -> None:
    from lightning.pytorch.callbacks import Callback

    class TakeTurns(Callback):
        """Waits for its turn before each block of steps and reports its times (wall, CPU seconds) after it."""

        def __init__(self) -> None:
            self.steps = 0
            self.times: list[tuple[float, float]] = []

        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            if self.steps == 0:
                pipe.send("ready")
            if self.steps % settings.steps_per_block == 0:
                assert pipe.recv() == "go"
                if self.steps == WARM_UP_BLOCKS * settings.steps_per_block:
                    reset_peak()
            wait_for_device()
            self.started = time.perf_counter(), time.process_time()

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            wait_for_device()
            wall, cpu = self.started
            self.times.append((time.perf_counter() - wall, time.process_time() - cpu))
            self.steps += 1
            if self.steps % settings.steps_per_block == 0:
                pipe.send(self.times)
                self.times = []

    on_gpu = fit(settings, side, scratch, settings.timed_steps, TakeTurns, megatron_layers=False)
    pipe.send({"memory": peak_memory() if on_gpu else None, "machine": describe_machine(on_gpu)})


def run_counted(pipe: Any, settings: Settings, side: str, scratch: str) -> None:
    import torch
    from lightning.pytorch.callbacks import Callback
    from torch.profiler import ProfilerActivity, profile
    from torch.utils.flop_counter import FlopCounterMode

    counts: dict[str, Any] = {}

    class Count(Callback):
        """FLOPs of one step, and on a CPU memory of the next: a GPU's peak is the timed run's."""

        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step + 1 == COUNTED_STEP:
                self.attention = count_attention()
                self.counter = FlopCounterMode(display=False)
                self.counter.__enter__()
            if trainer.global_step + 1 == PROFILED_STEP and not torch.cuda.is_available():
                counts["held_bytes"] = held_memory()
                self.profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
                self.profiler.__enter__()

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == COUNTED_STEP:
                self.counter.__exit__(None, None, None)
                by_operation = {
                    name: n
                    for name, n in self.counter.get_flop_counts()["Global"].items()
                    if "scaled_dot_product" not in str(name)  # every pair, masked or not, or none
                }
                counts["flops"] = sum(by_operation.values())
                counts["attention_flops"] = self.attention()
                counts["flops_by_operation"] = {str(name): int(n) for name, n in by_operation.items()}
            if trainer.global_step == PROFILED_STEP and not torch.cuda.is_available():
                self.profiler.__exit__(None, None, None)
                counts["step_bytes"] = peak_of_profile(self.profiler)

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            counts["parameters"] = sum(
                parameter.numel() for parameter in trainer.strategy.megatron_parallel.parameters()
            )

    fit(settings, side, scratch, PROFILED_STEP, Count, megatron_layers=True)
    pipe.send(counts)


def fit(settings: Settings, side: str, scratch: str, steps: int, measure: type, megatron_layers: bool) -> bool:
    """Train ``steps`` steps on this process's one rank; returns whether on a GPU."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    from nemo_pre.launch.environment import prepare_environment

    prepare_environment()  # as for the product's own ranks, before anything imports Megatron
    from nemo_pre.train import build_model, build_trainer, objective_callbacks, prepare_process

    config = run_config(settings, side, scratch, steps)
    on_gpu = prepare_process(config)
    trainer = build_trainer(config, on_gpu, callbacks=[*objective_callbacks(config), measure()])
    model = build_model(config, on_gpu)
    if megatron_layers and on_gpu:
        from nemo_pre.neva.build import layer_spec

        language = model.config.language_transformer_config
        countable = replace(config, model=replace(config.model, attention_backend="dense"))
        language.transformer_layer_spec = layer_spec(countable, fused=False, on_gpu=True)
        language.gradient_accumulation_fusion = False  # kernels the counter does not see, or that nobody has built
        language.masked_softmax_fusion = language.persist_layer_norm = False
    if settings.prepared_data:
        from nemo_pre.nemo.data import build_data_module

        trainer.fit(model, build_data_module(config))
    else:
        trainer.fit(model, synthetic_data(config, images=side not in settings.text_only))
    return on_gpu


def run_config(settings: Settings, side: str, scratch: str, steps: int) -> Any:
    from nemo_pre.config.compose import compose_run

    precision = f"precision={settings.precision}"
    data = "digits" if settings.model == "digits_tiny" else "llava_instruct"
    overrides = [
        f"name={settings.name}_{side}",
        f"model={settings.model}",
        f"data={data}",
        f"data.sequence_length={settings.tokens_per_sample}",
        *settings.sides[side],
        *([] if any(word.startswith("precision=") for word in settings.sides[side]) else [precision]),
        f"trainer.max_steps={steps}",
        f"trainer.micro_batch_size={settings.micro_batch_size}",
        f"trainer.global_batch_size={settings.micro_batch_size * settings.num_microbatches}",
        f"output_dir={scratch}/{side}",
        "resume=false",
    ]
    if settings.layers is not None:
        overrides.append(f"model.language.num_layers={settings.layers}")
    return compose_run(overrides)


def synthetic_data(config: Any, images: bool) -> Any:
    """One random micro-batch again and again: an image per sample or none, text up to the full length, a quarter of it
    answers. What the data holds does not change what a step costs; loading it is not what is measured."""
    import lightning.pytorch as pl
    import torch
    from nemo.lightning.pytorch.plugins import MegatronDataSampler
    from torch.utils.data import DataLoader

    from nemo_pre.data.conversation import IGNORE_INDEX, IMAGE_TOKEN_INDEX
    from nemo_pre.data.preprocessing import num_text_tokens

    rows, size = config.trainer.micro_batch_size, config.model.vision.image_size
    text = num_text_tokens(config) if images else config.data.sequence_length
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.model.language.vocab_size, (rows, text + 1), generator=generator)
    tokens, labels = ids[:, :-1].clone(), ids[:, 1:].clone()
    if images:
        tokens[:, 0] = IMAGE_TOKEN_INDEX
    labels[:, : text - text // 4] = IGNORE_INDEX
    batch = {
        "tokens": tokens,
        "labels": labels,
        "loss_mask": (labels != IGNORE_INDEX).float(),
        "position_ids": torch.arange(text).repeat(rows, 1),
        "attention_mask": None,
        "media": torch.randn(rows, 3, size, size, generator=generator) if images else None,
        "num_media_tiles": [1] * rows if images else [],
    }

    class Repeated(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return config.trainer.max_steps * config.trainer.global_batch_size // rows

        def __getitem__(self, number: int) -> dict[str, Any]:
            return dict(batch)

    class Sampler(MegatronDataSampler):
        def transform_dataloader(self, dataloader: DataLoader, consumed_samples: int = 0) -> DataLoader:
            return DataLoader(Repeated(), batch_size=None)

    class Data(pl.LightningDataModule):
        def __init__(self) -> None:
            super().__init__()
            self.data_sampler = Sampler(
                seq_len=config.data.sequence_length,
                micro_batch_size=rows,
                global_batch_size=config.trainer.global_batch_size,
                output_log=False,
            )

        def train_dataloader(self) -> DataLoader:
            return DataLoader(Repeated(), batch_size=None)

    return Data()


def count_attention() -> Callable[[], int]:
    """Start counting the unmasked pairs of mixed attention; the returned function ends it and gives FLOPs.

    A pair of tokens costs 4 x head width per head forward, for the score and for the sum of values, and twice that
    backward.
    """
    from nemo_pre.neva import mixed_attention
    from nemo_pre.parallel.token_streams import may_attend

    total = 0
    right = mixed_attention.attend_dense

    def counting(query: Any, key: Any, value: Any, structure: Any, first_query: int, scale: float) -> Any:
        nonlocal total
        pairs = int(may_attend(structure[:, first_query : first_query + query.shape[2]], structure).sum())
        total += pairs * query.shape[1] * query.shape[3] * 4 * (3 if query.requires_grad else 1)
        return right(query, key, value, structure, first_query, scale)

    def end() -> int:
        mixed_attention.attend_dense = right
        return total

    mixed_attention.attend_dense = counting
    return end


# --- instruments ------------------------------------------------------------------------------------------------


def wait_for_device() -> None:
    import torch

    if torch.version.cuda and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def reset_peak() -> None:
    import torch

    if torch.version.cuda and torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()


def peak_memory() -> int:
    import torch

    return torch.cuda.max_memory_allocated()


def held_memory() -> int:
    """Bytes of all tensors alive between two steps: weights, gradient buffers, optimizer state."""
    import torch

    gc.collect()
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in gc.get_objects()
        if issubclass(type(tensor), torch.Tensor) and not tensor.is_meta  # isinstance wakes lazy import proxies
    }
    return sum(storages.values())


def peak_of_profile(profiler: Any) -> int:
    """Highest sum of CPU allocations minus releases since the profile began, in bytes."""
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def describe_machine(on_gpu: bool) -> dict[str, Any]:
    import torch

    if on_gpu:
        return {"gpu": torch.cuda.get_device_name(), "cores": os.cpu_count()}
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.split(":")[1].strip() for line in cpuinfo if line.startswith("model name")]
    return {"gpu": None, "cpu": models[0] if models else platform.machine(), "cores": os.cpu_count()}


def versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for name in ("torch", "megatron-core", "nemo_toolkit", "lightning", "transformer-engine"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


# --- the result -------------------------------------------------------------------------------------------------


def median_ms(steps: list[tuple[float, float]], clock: int) -> float:
    return 1000 * statistics.median(step[clock] for step in steps)


def compared(times: Times, clock: int) -> dict[str, Any]:
    """Medians of all sides, and ratios to the first: the median over pairs of neighbouring blocks."""
    first, *others = times
    result: dict[str, Any] = {
        f"{side}_median_ms": round(median_ms(sum(blocks, []), clock), 3) for side, blocks in times.items()
    }
    for side in others:
        pairs = zip(times[side], times[first], strict=True)
        ratios = [median_ms(with_it, clock) / median_ms(without, clock) for with_it, without in pairs]
        low, _, high = statistics.quantiles(ratios, n=4)
        result[side] = {
            "ratio": round(statistics.median(ratios), 4),
            "ratio_quartiles": [round(low, 4), round(high, 4)],
        }
    return result


def summary(
    settings: Settings,
    machine: dict[str, Any],
    times: Times,
    gpu_memory: dict[str, Any],
    counts: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    """The JSON result; every ratio is to the first side."""
    first = next(iter(settings.sides))
    flops = {side: counts[side]["flops"] + counts[side]["attention_flops"] for side in settings.sides}
    if machine["gpu"]:
        memory: dict[str, Any] = {"what": "torch.cuda.max_memory_allocated", **gpu_memory}
    else:
        peaks = {side: counts[side]["held_bytes"] + counts[side]["step_bytes"] for side in settings.sides}
        memory = {
            # An upper bound: releases of what an earlier step had allocated are not seen.
            "what": "tensors held between steps + highest sum of allocations within a step (torch.profiler)",
            **peaks,
            "held_between_steps": {side: counts[side]["held_bytes"] for side in settings.sides},
        }
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "machine": machine,
        "versions": versions(),
        "settings": asdict(settings),
        "tokens_per_sample": settings.tokens_per_sample,
        "steps_per_side": settings.blocks * settings.steps_per_block,
        "step_time": compared(times, WALL),
        # On a busy machine the steadier of the two; on a GPU it says little.
        "step_cpu_time": compared(times, CPU),
        "flops": {
            "what": "one forward and backward pass of the global batch (torch.utils.flop_counter; mixed attention by "
            "its unmasked pairs)",
            **flops,
            "ratio": {side: round(flops[side] / flops[first], 5) for side in settings.sides},
            "of_mixed_attention": {side: counts[side]["attention_flops"] for side in settings.sides},
            "by_operation": {side: counts[side]["flops_by_operation"] for side in settings.sides},
        },
        "parameters": {side: counts[side]["parameters"] for side in settings.sides},
        "memory": memory | {"ratio": {side: round(memory[side] / memory[first], 5) for side in settings.sides}},
        "step_times_ms": {
            side: [[round(1000 * step[WALL], 2) for step in block] for block in blocks]
            for side, blocks in times.items()
        },
    }
