"""Which ranks a sequence's tokens are cut over, and which of several ranks with the same tokens reports them."""

from __future__ import annotations

import torch.distributed as dist


def sequence_shard_groups(sequence_parallel: bool) -> list[dist.ProcessGroup]:
    """The process groups over which the tokens of a decoder layer's output are spread: tensor parallel with sequence
    parallelism, and context parallel. A sum over an image's tokens is one over all of them."""
    from megatron.core import parallel_state as ps

    candidates = (
        (ps.get_tensor_model_parallel_group(), sequence_parallel),
        (ps.get_context_parallel_group(), True),
    )
    return [group for group, cuts in candidates if cuts and group.size() > 1]


def batch_shard_groups(sequence_parallel: bool) -> list[dist.ProcessGroup]:
    """The process groups over which the tokens of micro-batch i of all replicas are spread: those that cut a sequence,
    and the replicas. A sum over the tokens of a batch is one over all of them."""
    from megatron.core import parallel_state as ps

    replicas = ps.get_data_parallel_group()
    return [*sequence_shard_groups(sequence_parallel), *([replicas] if replicas.size() > 1 else [])]


def counts_local_tokens(sequence_parallel: bool) -> bool:
    """Whether this rank adds what it computed from its tokens to a sum over all ranks: without sequence parallelism
    tensor-parallel ranks hold the same tokens, and one of them reports."""
    from megatron.core import parallel_state as ps

    return sequence_parallel or ps.get_tensor_model_parallel_rank() == 0
