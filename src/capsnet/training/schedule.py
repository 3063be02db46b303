"""What follows from the step alone: learning rate and random numbers."""

import hashlib
import math

import torch

from capsnet.config import Config

__all__ = ["generator", "learning_rate", "seed_of"]


def learning_rate(config: Config, step: int, steps_per_epoch: int) -> float:
    """Learning rate of step `step` (from 0): `max(floor, lr * decay ** (step / decay_steps))`."""
    decay_steps = config.lr_decay_steps or steps_per_epoch
    return max(config.lr_floor, config.lr * math.pow(config.lr_decay, step / decay_steps))


def seed_of(*numbers: int) -> int:
    """One 63-bit seed from several whole numbers, different for every different list of them."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(*numbers: int) -> torch.Generator:
    """A generator whose seed is `seed_of` the numbers."""
    return torch.Generator().manual_seed(seed_of(*numbers))
