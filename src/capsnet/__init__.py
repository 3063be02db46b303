"""capsnet: capsule networks for PyTorch. This file is the table of contents; each name is imported when first used."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from capsnet.config import Config as Config
    from capsnet.config import preset as preset
    from capsnet.errors import InputError as InputError
    from capsnet.evaluation import Evaluation as Evaluation
    from capsnet.evaluation import evaluate as evaluate
    from capsnet.functional import lengths as lengths
    from capsnet.functional import margin_loss as margin_loss
    from capsnet.functional import mask as mask
    from capsnet.functional import reconstruction_loss as reconstruction_loss
    from capsnet.functional import squash as squash
    from capsnet.layers import ClassCapsules as ClassCapsules
    from capsnet.layers import Decoder as Decoder
    from capsnet.layers import PrimaryCapsules as PrimaryCapsules
    from capsnet.models import available as available
    from capsnet.models import create as create
    from capsnet.models.capsnet import CapsNet as CapsNet
    from capsnet.prediction import Prediction as Prediction
    from capsnet.prediction import predict as predict
    from capsnet.routing import RoutingResult as RoutingResult
    from capsnet.routing import dynamic_routing as dynamic_routing
    from capsnet.runs import from_pretrained as from_pretrained
    from capsnet.runs import load as load
    from capsnet.runs import load_card as load_card
    from capsnet.runs import save_pretrained as save_pretrained
    from capsnet.train import fit as fit
    from capsnet.train import resume as resume

__version__ = "0.1.0"

_HOMES = {
    "config": ("Config", "preset"),
    "errors": ("InputError",),
    "evaluation": ("Evaluation", "evaluate"),
    "functional": ("lengths", "margin_loss", "mask", "reconstruction_loss", "squash"),
    "layers": ("ClassCapsules", "Decoder", "PrimaryCapsules"),
    "models": ("available", "create"),
    "models.capsnet": ("CapsNet",),
    "prediction": ("Prediction", "predict"),
    "routing": ("RoutingResult", "dynamic_routing"),
    "runs": ("from_pretrained", "load", "load_card", "save_pretrained"),
    "train": ("fit", "resume"),
}

__all__ = [
    "CapsNet",
    "ClassCapsules",
    "Config",
    "Decoder",
    "Evaluation",
    "InputError",
    "Prediction",
    "PrimaryCapsules",
    "RoutingResult",
    "available",
    "create",
    "dynamic_routing",
    "evaluate",
    "fit",
    "from_pretrained",
    "lengths",
    "load",
    "load_card",
    "margin_loss",
    "mask",
    "predict",
    "preset",
    "reconstruction_loss",
    "resume",
    "save_pretrained",
    "squash",
]


def __getattr__(name: str) -> Any:
    if name in ("data", *_HOMES):  # `capsnet.data.load` without importing capsnet.data by hand
        return import_module(f"capsnet.{name}")
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"capsnet.{home}"), name)
    raise AttributeError(f"module 'capsnet' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
