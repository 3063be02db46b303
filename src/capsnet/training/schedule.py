"""The optimiser, and what follows from the step alone: learning rate and random numbers."""

import hashlib
import math

import torch
from torch import nn

from capsnet.config import Config

__all__ = ["generator", "learning_rate", "optimizer_of", "seed_of", "steps_of"]


def learning_rate(config: Config, step: int, steps_per_epoch: int) -> float:
    """Learning rate of step `step` (from 0) of a run of `config.epochs`.

    It rises linearly over the first `warmup` of all steps. Then it falls: exponentially, by `lr_decay` every
    `lr_decay_steps`; by `lr_decay` at each of `lr_milestones`, which are shares of all steps; or linearly, or as half a
    cosine, to `lr_floor` after the last step.
    """
    total = (config.epochs or 0) * steps_per_epoch
    rising = config.warmup * total
    if step + 1 < rising:
        return config.lr * (step + 1) / rising
    if config.schedule == "exponential":
        decay_steps = config.lr_decay_steps or steps_per_epoch
        return max(config.lr_floor, config.lr * math.pow(config.lr_decay, (step - rising) / decay_steps))
    if config.schedule == "steps":
        passed = sum(step >= round(share * total) for share in config.lr_milestones)
        return max(config.lr_floor, config.lr * math.pow(config.lr_decay, passed))
    assert config.epochs is not None
    done = min(max(0.0, (step - rising) / max(1.0, total - rising)), 1.0)
    left = 1 - done if config.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return config.lr_floor + (config.lr - config.lr_floor) * left


def steps_of(config: Config, train_images: int) -> int:
    """Steps of an epoch; the last one may be smaller."""
    return math.ceil(train_images / config.batch_size)


def optimizer_of(network: nn.Module, config: Config) -> torch.optim.Optimizer:
    """Adam, AdamW where there is weight decay, or SGD, of the parameters that need a gradient."""
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            parameters,
            lr=config.lr,
            momentum=config.momentum,
            nesterov=config.nesterov,
            weight_decay=config.weight_decay,
            fused=True,
        )
    if config.weight_decay:
        return torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay, fused=True)
    return torch.optim.Adam(parameters, lr=config.lr, fused=True)


def seed_of(*numbers: int) -> int:
    """One 63-bit seed from several whole numbers, different for every different list of them."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(*numbers: int) -> torch.Generator:
    """A generator whose seed is `seed_of` the numbers."""
    return torch.Generator().manual_seed(seed_of(*numbers))
