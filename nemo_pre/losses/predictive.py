"""The predictive loss of PRe (Predictive Regularization, arXiv 2603.20808, eq. 1)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def predictive_loss(prediction: Tensor, anchor: Tensor) -> tuple[Tensor, int]:
    """Negative cosine similarity between predicted and stop-gradient visual tokens, summed.

    ``L_PRe = -(1/n) sum_i cos(f_pred(h_i^l), stopgrad(h_i^0))``; this returns the sum and ``n``.

    Args:
        prediction: ``[n, d]``, the head's output ``f_pred(h^l)`` for ``n`` visual tokens.
        anchor: ``[n, d]``, the visual tokens ``h^0`` that entered the language model. It is detached here.

    Returns:
        ``loss_sum``, a scalar in float32 (float64 if an input is), in ``[-n, n]``, and ``count = n``. With
        ``n = 0`` the sum is zero and still connected to ``prediction``'s graph.

    Raises:
        ValueError: if the shapes differ or are not ``[n, d]``.
    """
    if prediction.ndim != 2 or prediction.shape != anchor.shape:
        raise ValueError(
            f"prediction and anchor must have the same shape [n, d], got {list(prediction.shape)} and "
            f"{list(anchor.shape)}."
        )
    # A bf16 cosine has three significant digits: too coarse to sum over thousands of tokens.
    dtype = torch.promote_types(torch.promote_types(prediction.dtype, anchor.dtype), torch.float32)
    cosine = F.cosine_similarity(prediction.to(dtype), anchor.detach().to(dtype), dim=-1)
    return -cosine.sum(), prediction.shape[0]
