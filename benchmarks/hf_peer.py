"""NeVA's step against the same model's in transformers with PyTorch's FSDP: same shapes, batch and machine, in turns.

    python -m benchmarks.hf_peer                                             # digits_tiny, on what the machine has
    python -m benchmarks.hf_peer --model llava15_7b --layers 4 --precision bf16 --micro-batch-size 4

The peer is ``LlavaForConditionalGeneration`` with random weights, SDPA attention, ``fully_shard`` around every decoder
layer (one rank here; float32 weights, computing in bf16 where asked) and AdamW (fused on a GPU). A third side compiles
its decoder layers (``torch.compile``), on a GPU. Both sides have a step's micro-batches, clip the gradient and step.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import tempfile
import time
from dataclasses import asdict
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import version
from typing import Any

from benchmarks.overhead import (
    RESULTS,
    WALL,
    WARM_UP_BLOCKS,
    Settings,
    compared,
    measure_in_turns,
    parse_arguments,
    peak_memory,
    reset_peak,
    run_config,
    wait_for_device,
)


def main() -> None:
    import torch

    arguments = parse_arguments("NeVA's step time against transformers with FSDP.")
    sides = {"neva": ["objective=none"], "transformers": []}
    runners = {"transformers": partial(run_peer, compiled=False)}
    if torch.cuda.is_available():
        sides["transformers, compiled"] = []
        runners["transformers, compiled"] = partial(run_peer, compiled=True)
    settings = Settings("hf_peer", sides, **arguments)
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="peer-") as scratch:
        times, memory, machine = measure_in_turns(context, settings, scratch, runners)
    result = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "machine": machine,
        "versions": {name: version(name) for name in ("torch", "transformers", "megatron-core", "nemo_toolkit")},
        "settings": asdict(settings),
        "step_time": compared(times, WALL),
        "peak_memory": memory,
    }
    RESULTS.mkdir(exist_ok=True)
    out = RESULTS / f"hf_peer_{settings.model}_{'gpu' if machine['gpu'] else 'cpu'}.json"
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["step_time"], indent=1))
    print(f"written to {out}")


def run_peer(pipe: Any, settings: Settings, side: str, scratch: str, compiled: bool) -> None:
    """The peer's side of :func:`benchmarks.overhead.measure_in_turns`."""
    import torch
    import torch.distributed as dist

    from nemo_pre.launch.environment import prepare_environment

    prepare_environment(local_ranks=1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    network = build(settings, side, scratch, device, compiled)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-5, fused=device.type == "cuda")
    batch = random_batch(settings, side, scratch, network.config, device)

    def step() -> None:
        for _ in range(settings.num_microbatches):
            loss = network(**batch).loss / settings.num_microbatches
            loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    pipe.send("ready")
    for block in range(settings.blocks + WARM_UP_BLOCKS):
        assert pipe.recv() == "go"
        if block == WARM_UP_BLOCKS:
            reset_peak()
        steps = []
        for _ in range(settings.steps_per_block):
            wait_for_device()
            wall, cpu = time.perf_counter(), time.process_time()
            step()
            wait_for_device()
            steps.append((time.perf_counter() - wall, time.process_time() - cpu))
        pipe.send(steps)
    pipe.send({"memory": peak_memory() if device.type == "cuda" else None, "machine": None})


def build(settings: Settings, side: str, scratch: str, device: Any, compiled: bool) -> Any:
    import torch
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    from nemo_pre.huggingface.architecture import hf_config

    config = run_config(settings, side, scratch, 1)
    last_token = config.model.language.vocab_size - 1
    described = hf_config(config.model, last_token, config.data.sequence_length, "float32")
    llava = LlavaConfig(**{key: value for key, value in described.items() if key not in ("architectures", "dtype")})
    with device:
        network = LlavaForConditionalGeneration._from_config(llava, attn_implementation="sdpa")
    network.train()
    network.model.vision_tower.eval()
    policy = MixedPrecisionPolicy()
    if settings.precision == "bf16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    mesh = torch.distributed.init_device_mesh(device.type, (1,))
    for layer in network.model.language_model.layers:
        if compiled:
            layer.compile()
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    return fully_shard(network, mesh=mesh, mp_policy=policy)


def random_batch(settings: Settings, side: str, scratch: str, llava: Any, device: Any) -> dict[str, Any]:
    """A random batch like that of :func:`benchmarks.overhead.synthetic_data`: an image per sample, text to the full
    length, some answers."""
    import torch

    from nemo_pre.config.derived import num_visual_tokens

    config = run_config(settings, side, scratch, 1)
    rows, length, size = settings.micro_batch_size, config.data.sequence_length, config.model.vision.image_size
    visual = num_visual_tokens(config.model)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(llava.image_token_id, (rows, length), generator=generator)
    ids[:, :visual] = llava.image_token_id
    labels = ids.clone()
    labels[:, : length - (length - visual) // 4] = -100
    images = torch.randn(rows, 3, size, size, generator=generator)
    return {
        "input_ids": ids.to(device),
        "attention_mask": torch.ones_like(ids).to(device),
        "labels": labels.to(device),
        "pixel_values": images.to(device, torch.bfloat16 if settings.precision == "bf16" else torch.float32),
    }


if __name__ == "__main__":
    main()
