"""A Megatron GPT of about 40,000 parameters on CPU ranks, in any layout; its loss and gradients do not depend on it.

Everything here runs on a rank. The loss is a sum over tokens and the gradient is divided by the global number of
tokens (``calculate_per_token_loss``), so that neither micro-batches nor data or context ranks enter the result.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from nemo_pre.compat import cpu_backend

SEQUENCE, BATCH, MICRO_BATCHES = 32, 2, 4  # the global batch: 4 micro-batches of 2 sequences
VOCABULARY, LAYERS = 96, 4


@dataclass(frozen=True)
class Layout:
    tensor: int = 1
    pipeline: int = 1
    virtual: int | None = None
    context: int = 1
    sequence: bool = False
    data: int = 1
    distributed_optimizer: bool = False
    overlap: bool = False
    precision: str = "fp32"  # fp32 | bf16 | fp64
    model: dict[str, Any] = field(default_factory=dict)  # further options of TransformerConfig

    @property
    def ranks(self) -> int:
        return self.tensor * self.pipeline * self.context * self.data


@dataclass
class Run:
    """What a rank holds between steps."""

    layout: Layout
    config: Any
    chunks: list[Any]  # model chunks inside their DDP wrappers
    optimizer: Any


def start(layout: Layout, scale_lr_cond: Any = None, use_optimizer: bool = True) -> Run:
    """Initialise the process groups, build the model's chunks of this rank, wrap them, and make the optimizer."""
    cpu_backend.apply()
    import torch
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer.module import Float16Module
    from megatron.core.transformer.transformer_config import TransformerConfig

    from nemo_pre.compat.context_attention import with_gathered_attention

    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel(
        layout.tensor,
        layout.pipeline,
        layout.virtual,
        context_parallel_size=layout.context,
    )
    torch.manual_seed(7)
    tensor_parallel.model_parallel_cuda_manual_seed(7)

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}[layout.precision]
    options = {
        **cpu_backend.TRANSFORMER_CONFIG,
        "num_layers": LAYERS,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "ffn_hidden_size": 48,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "normalization": "RMSNorm",
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "tensor_model_parallel_size": layout.tensor,
        "pipeline_model_parallel_size": layout.pipeline,
        "virtual_pipeline_model_parallel_size": layout.virtual,
        "context_parallel_size": layout.context,
        "sequence_parallel": layout.sequence,
        "bf16": layout.precision == "bf16",
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "calculate_per_token_loss": True,
        **(cpu_backend.INTERLEAVED_CONFIG if layout.virtual else {}),
        **layout.model,
    }
    config = TransformerConfig(**options)
    config.finalize_model_grads_func = finalize_model_grads
    spec = get_gpt_layer_local_spec(normalization=config.normalization)
    if layout.context > 1:
        spec = with_gathered_attention(spec)
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=layout.precision != "fp64",
        use_distributed_optimizer=layout.distributed_optimizer,
        overlap_grad_reduce=layout.overlap,
        overlap_param_gather=layout.overlap and layout.distributed_optimizer,
        bucket_size=5000 if layout.overlap else None,
        check_for_nan_in_grad=True,
    )
    chunks = []
    for stage in range(layout.virtual or 1):
        vp_stage = stage if layout.virtual else None
        model = GPTModel(
            config,
            spec,
            vocab_size=VOCABULARY,
            max_sequence_length=SEQUENCE,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
            position_embedding_type="rope",
            share_embeddings_and_output_weights=False,
            vp_stage=vp_stage,
        )
        model.vp_stage = vp_stage
        if layout.precision == "bf16":
            model = Float16Module(config, model)
        chunks.append(DistributedDataParallel(config, ddp_config, model, disable_bucketing=stage > 0))
    if layout.overlap:
        config.no_sync_func = [chunk.no_sync for chunk in chunks]
        config.grad_sync_func = [chunk.start_grad_sync for chunk in chunks]
        if len(chunks) == 1:
            config.no_sync_func, config.grad_sync_func = config.no_sync_func[0], config.grad_sync_func[0]
    optimizer = None
    if use_optimizer:
        optimizer_config = OptimizerConfig(
            lr=1e-2,
            weight_decay=0.1,
            use_distributed_optimizer=layout.distributed_optimizer,
            overlap_param_gather=ddp_config.overlap_param_gather,
            bf16=layout.precision == "bf16",
            params_dtype=dtype,
        )
        optimizer = get_megatron_optimizer(optimizer_config, chunks, scale_lr_cond=scale_lr_cond)
    return Run(layout, config, chunks, optimizer)


def stop() -> None:
    """Forget the model-parallel groups, so that the same ranks can start another layout."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()


def modules(run: Run) -> list[Any]:
    """The chunks without their wrappers."""
    from megatron.core.utils import unwrap_model

    return unwrap_model(run.chunks)


def forward_backward(run: Run, step: int = 0) -> float:
    """Gradients of global batch number ``step`` in every chunk; returns the mean loss, the same on every rank."""
    import torch
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.utils import get_batch_on_this_cp_rank

    data_rank, data_size = parallel_state.get_data_parallel_rank(), run.layout.data
    generator = torch.Generator().manual_seed(1000 + step)
    tokens = torch.randint(0, VOCABULARY, (MICRO_BATCHES, BATCH, SEQUENCE + 1), generator=generator)
    # Unequal numbers of targets, so that averaging per micro-batch or rank would be seen.
    mask = (torch.rand(MICRO_BATCHES, BATCH, SEQUENCE, generator=generator) < 0.7).float()
    mine = range(data_rank, MICRO_BATCHES, data_size)
    totals = torch.zeros(2, dtype=torch.float64)

    def batches():
        for i in mine:
            batch = {
                "input_ids": tokens[i, :, :-1],
                "labels": tokens[i, :, 1:],
                "loss_mask": mask[i],
                "position_ids": torch.arange(SEQUENCE).expand(BATCH, -1),
            }
            yield get_batch_on_this_cp_rank(batch)

    def forward_step(iterator, model):
        batch = next(iterator)
        loss_mask = batch.pop("loss_mask")
        losses = model(**batch, attention_mask=None)

        def loss_function(output):
            loss_sum = (output * loss_mask).sum()
            totals.add_(torch.tensor([loss_sum.item(), loss_mask.sum().item()], dtype=torch.float64))
            return loss_sum, loss_mask.sum().to(torch.int), {}

        return losses, loss_function

    for chunk in run.chunks:
        chunk.zero_grad_buffer()
    if run.optimizer is not None:
        run.optimizer.zero_grad()
    iterators = [batches() for _ in run.chunks]
    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(iterators) > 1 else iterators[0],
        model=run.chunks if len(run.chunks) > 1 else run.chunks[0],
        num_microbatches=len(mine),
        seq_length=SEQUENCE,
        micro_batch_size=BATCH,
        forward_only=False,
    )
    if parallel_state.get_tensor_model_parallel_rank() != 0:
        totals.zero_()  # the other tensor ranks computed the same loss
    torch.distributed.all_reduce(totals)
    return (totals[0] / totals[1]).item()


def train(run: Run, steps: int, first_step: int = 0) -> list[float]:
    """Optimizer steps; returns the loss of each, taken before its update."""
    losses = []
    for step in range(first_step, first_step + steps):
        losses.append(forward_backward(run, step))
        successful, _, _ = run.optimizer.step()
        assert successful
    return losses
