"""Figures from the numbers of `analysis` and from records. The only package that imports matplotlib, when it draws.

Each function returns a figure; `save` writes it, with the command that made it in the file's metadata.
"""

from capsnet.plots.capsules import couplings, perturbations, pose_explained, reconstructions, separations, sweep
from capsnet.plots.classes import class_errors, class_rows, confused, confusion
from capsnet.plots.results import curves, errors_by_factor, gallery, labelled, lengths, reliability
from capsnet.plots.style import FORMATS, picture, rendered, save

__all__ = [
    "FORMATS",
    "class_errors",
    "class_rows",
    "confused",
    "confusion",
    "couplings",
    "curves",
    "errors_by_factor",
    "gallery",
    "labelled",
    "lengths",
    "perturbations",
    "picture",
    "pose_explained",
    "reconstructions",
    "reliability",
    "rendered",
    "save",
    "separations",
    "sweep",
]
