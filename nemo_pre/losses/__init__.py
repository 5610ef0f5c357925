"""Loss terms as pure torch: tensors in, unweighted ``(loss_sum, count)`` out.

Weights, schedules and the division by global counts are applied in :mod:`nemo_pre.objective`.
"""

from nemo_pre.losses.predictive import predictive_loss

__all__ = ["predictive_loss"]
