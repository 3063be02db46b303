"""Networks of the papers: one file each, named as the network is, and the registry that finds them."""

from capsnet.models.network import CapsuleNetwork, Network, Output, RoutingTrace, evaluation_mode, inference_batch
from capsnet.models.registry import (
    alike,
    available,
    check_modules,
    class_name,
    classes_of_modules,
    create,
    module_options,
    options_of,
    summary,
)

__all__ = [
    "CapsuleNetwork",
    "Network",
    "Output",
    "RoutingTrace",
    "alike",
    "available",
    "check_modules",
    "class_name",
    "classes_of_modules",
    "create",
    "evaluation_mode",
    "inference_batch",
    "module_options",
    "options_of",
    "summary",
]
