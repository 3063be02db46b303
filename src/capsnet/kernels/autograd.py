"""What every hand-written backward needs around it: full precision, and errors in place of wrong gradients."""

from collections.abc import Callable
from functools import wraps
from typing import Any, Never

import torch
from torch import Tensor

from capsnet import functional as F

__all__ = ["first_derivatives"]

Gradients = tuple[Tensor | None, ...]


def first_derivatives(
    name: str, remedy: str, *, once: bool
) -> Callable[[Callable[..., Gradients]], Callable[..., Gradients]]:
    """Decorate the `backward` of an autograd function that computes first derivatives only.

    It runs without autocast, like the forward, whatever surrounds `loss.backward()`. With `create_graph=True` its
    results can be used, but differentiating them raises; `torch.autograd.function.once_differentiable` returns
    constants where the incoming gradient is one, and second derivatives are then wrong without a word.

    Args:
        name: of the function, for the error.
        remedy: what to use for more than this, for the error.
        once: the backward overwrites what the forward saved, so a second one raises. PyTorch sees this by itself only
            where no saved-tensor hooks (`save_on_cpu`, for instance) stand in between.
    """

    def decorate(backward: Callable[..., Gradients]) -> Callable[..., Gradients]:
        @wraps(backward)
        def guarded(ctx: Any, *incoming: Tensor | None) -> Gradients:
            if once and getattr(ctx, "is_used", False):
                raise RuntimeError(
                    f"backward of {name} can run once, as it overwrites what the forward saved; use {remedy} for "
                    "retain_graph=True or second derivatives"
                )
            ctx.is_used = True
            device = next((x.device for x in incoming if x is not None), torch.device("cpu"))
            create_graph = torch.is_grad_enabled()
            needed = [x for x in (*ctx.saved_tensors, *incoming) if x is not None] if create_graph else []
            with torch.no_grad(), F.full_precision(device):
                gradients = backward(ctx, *incoming)
            if not create_graph:
                return gradients
            message = f"{name} has first derivatives only; use {remedy} for second derivatives"
            final: Callable[..., Tensor] = _Final.apply
            return tuple(None if x is None else final(x, message, *needed) for x in gradients)

        return guarded

    return decorate


class _Final(torch.autograd.Function):
    """The first argument, which depends on the tensors after it in a way that nobody has written down."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, message: str, *_: Tensor) -> Tensor:
        ctx.message = message
        return x.clone()

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Never:
        raise RuntimeError(ctx.message)
