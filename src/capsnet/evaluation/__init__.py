"""How good a network is: one pass over the images of a split, and the numbers made from what it says of them."""

from capsnet.evaluation.metrics import Calibration, Evaluation, calibration, evaluate
from capsnet.evaluation.predictions import Predictions, predict_split
from capsnet.evaluation.statistics import wilson_interval

__all__ = ["Calibration", "Evaluation", "Predictions", "calibration", "evaluate", "predict_split", "wilson_interval"]
