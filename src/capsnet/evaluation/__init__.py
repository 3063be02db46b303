"""How good a network is: one pass over the images of a split, and the numbers made from what it says of them."""

from capsnet.analysis.significance import wilson_interval
from capsnet.evaluation.metrics import Calibration, Evaluation, calibration, evaluate
from capsnet.evaluation.predictions import Predictions, predict_split

__all__ = [
    "Calibration",
    "Evaluation",
    "Predictions",
    "calibration",
    "evaluate",
    "predict_split",
    "wilson_interval",
]
