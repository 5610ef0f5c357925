"""Loss terms as pure torch: tensors in, unweighted ``(loss_sum, count)`` out.

Weights, schedules and the division by global counts are applied in :mod:`nemo_pre.objectives.scale`.
"""

from nemo_pre.losses.gram_anchoring import gram_anchoring_loss
from nemo_pre.losses.masked_prediction import masked_prediction_loss
from nemo_pre.losses.predictive import predictive_loss

__all__ = ["gram_anchoring_loss", "masked_prediction_loss", "predictive_loss"]
