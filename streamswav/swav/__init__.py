"""The objective: Sinkhorn codes, swapped prediction, the feature queue."""

from streamswav.swav.loss import LossResult, SwAVLoss, swapped_prediction_loss
from streamswav.swav.queue import FeatureQueue, usable_length
from streamswav.swav.sinkhorn import sinkhorn

__all__ = [
    "FeatureQueue",
    "LossResult",
    "SwAVLoss",
    "sinkhorn",
    "swapped_prediction_loss",
    "usable_length",
]
