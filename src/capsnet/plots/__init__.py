"""Figures from the numbers of `analysis` and from records. The only package that imports matplotlib, when it draws.

Each function returns a figure; `save` writes it, with the command that made it in the file's metadata.
"""

from capsnet.plots.capsules import couplings, factors, perturbations, reconstructions, separations, sweep
from capsnet.plots.figure import FORMATS, picture, rendered, save
from capsnet.plots.results import (
    class_errors,
    confusion,
    curves,
    errors_by_factor,
    gallery,
    lengths,
    reliability,
)

__all__ = [
    "FORMATS",
    "class_errors",
    "confusion",
    "couplings",
    "curves",
    "errors_by_factor",
    "factors",
    "gallery",
    "lengths",
    "perturbations",
    "picture",
    "reconstructions",
    "reliability",
    "rendered",
    "save",
    "separations",
    "sweep",
]
