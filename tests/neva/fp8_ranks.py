"""The rank's side of tests/neva/test_fp8.py."""

from __future__ import annotations

import os


def asks_for_new_copies(precision: str) -> bool:
    """Build the model as NeMo's strategy does and begin a step; whether layers are told to copy their weights anew."""
    import torch.distributed as dist
    from megatron.core import parallel_state as ps
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from nemo.lightning.pytorch.plugins.mixed_precision import (
        MegatronMixedPrecision,
        update_config_with_dtype_overrides,
    )

    from nemo_pre.neva.build import build_neva_config
    from nemo_pre.train import prepare_process
    from tests.parity.shape import tiny_run

    run = tiny_run(os.devnull, {}, pre=None, num_microbatches=1, micro_batch_size=1, max_steps=1, precision=precision)
    prepare_process(run)
    dist.init_process_group("gloo")
    ps.initialize_model_parallel()
    model_parallel_cuda_manual_seed(0)
    dtypes = MegatronMixedPrecision(precision="bf16-mixed").dtype_config
    config = update_config_with_dtype_overrides(dtypes, build_neva_config(run, on_gpu=False))
    chunk = config.configure_model()
    layer = chunk.language_model.decoder.layers[0]
    layer.is_first_microbatch = False  # what a layer of Transformer Engine's says after its first pass
    model = DistributedDataParallel(chunk.config, DistributedDataParallelConfig(), chunk)
    model.set_is_first_microbatch()  # as Megatron's schedule does at a step's first micro-batch
    return bool(layer.is_first_microbatch)
