"""Reading requests: every value from outside is checked here, before the network sees it.

A value that is not what it must be is answered with a `Refusal` of status 422.
"""

import base64
import binascii
import json
import math
from collections.abc import Collection, Mapping
from typing import Any, Never

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

__all__ = ["Refusal", "one_of", "picture", "read_json", "vectors", "whole"]

MAX_VECTORS = 64
MAX_COMPONENT = 10.0  # a capsule is shorter than 1, and the page's sliders add at most 0.5


class Refusal(Exception):
    """A request that is answered with a status of 400 to 499, or 503, one line, and further headers."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.headers = status, message, dict(headers or {})


def read_json(body: bytes, names: Collection[str]) -> dict[str, Any]:
    """The JSON object in `body`, which must have exactly the fields `names`.

    Raises:
        Refusal: 400 for what is no JSON object (NaN and infinities are none), 422 for other fields.
    """
    try:
        value = json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:  # also bytes that are no UTF-8, and numbers of thousands of digits
        reason = "too deeply nested" if isinstance(error, RecursionError) else str(error).splitlines()[0]
        raise Refusal(400, f"body must be JSON; got: {reason}") from None
    if not isinstance(value, dict):
        raise Refusal(400, f"body must be a JSON object; got {_kind(value)}")
    if value.keys() != set(names):
        got = _short(", ".join(value)) if value else "none"
        raise Refusal(422, f"body must have the fields {', '.join(names)}; got {got}")
    return value


def whole(value: Any, name: str, below: int) -> int:
    """`value`, a whole number in [0, below)."""
    if type(value) is not int or not 0 <= value < below:
        raise Refusal(422, f"{name} must be a whole number from 0 to {below - 1}; got {_short(value)}")
    return value


def one_of(value: str, name: str, choices: Collection[str]) -> str:
    """`value`, one of `choices`."""
    if value not in choices:
        raise Refusal(422, f"{name} must be one of {', '.join(choices)}; got {_short(value)}")
    return value


def vectors(value: Any, name: str, dim: int) -> Float[Tensor, "n dim"]:
    """`value`, a list of 1 to 64 lists of `dim` finite numbers in [-10, 10]; of what is wrong the first is named."""
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_VECTORS:
        got = f"{len(value)}" if isinstance(value, list) else _kind(value)
        raise Refusal(422, f"{name} must be a list of 1 to {MAX_VECTORS} vectors; got {got}")
    for row, vector in enumerate(value):
        if not isinstance(vector, list) or len(vector) != dim:
            got = f"{len(vector)}" if isinstance(vector, list) else _kind(vector)
            raise Refusal(422, f"{name}[{row}] must be a list of {dim} numbers; got {got}")
        for column, number in enumerate(vector):
            # type() and not isinstance: true and false are no numbers here
            if type(number) not in (int, float) or not abs(number) <= MAX_COMPONENT:
                place, limit = f"{name}[{row}][{column}]", f"{MAX_COMPONENT:g}"
                raise Refusal(422, f"{place} must be a number from -{limit} to {limit}; got {_short(number)}")
    return torch.tensor(value, dtype=torch.float32)


def picture(value: Any, name: str, shape: tuple[int, int, int]) -> UInt8[Tensor, "channels height width"]:
    """`value`, base64 of the bytes of an image of `shape`, row by row and channel by channel."""
    if not isinstance(value, str):
        raise Refusal(422, f"{name} must be a string in base64; got {_kind(value)}")
    try:
        content = base64.b64decode(value.encode("ascii"), validate=True)
    except (UnicodeEncodeError, binascii.Error):
        raise Refusal(422, f"{name} must be a string in base64; got {_short(value)}") from None
    if len(content) != math.prod(shape):
        raise Refusal(422, f"{name} must be {' x '.join(map(str, shape))} bytes; got {len(content)}")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8).view(shape)


def _no_constant(name: str) -> Never:
    raise ValueError(f"{name}, which is not a number of JSON")


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _short(value: Any) -> str:
    if isinstance(value, dict | list) or value is None:
        return _kind(value)
    if isinstance(value, int) and value.bit_length() > 64:
        return "a number of many digits"
    text = str(value)
    return text if len(text) <= 40 else f"{text[:40]}..."
