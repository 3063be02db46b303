import re
from dataclasses import dataclass, field
from typing import Any, Literal, NotRequired, TypedDict

import pytest
import torch

from capsnet.errors import InputError
from capsnet.options import schema
from capsnet.options.schema import brief, checked, joined, shown


@dataclass(frozen=True)
class Point:
    x: float
    y: float = 0.0
    tags: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.x < 0:
            raise InputError(f"x must be at least 0; got {self.x}")


class Named(TypedDict):
    name: str
    points: NotRequired[tuple[Point, ...]]


FITTING: list[tuple[Any, Any, Any]] = [
    (True, bool, True),
    (3, int, 3),
    (3, float, 3),
    (2.5, float, 2.5),
    ("a", str, "a"),
    ("a", Literal["a", "b"], "a"),
    (None, int | None, None),
    (3, int | None, 3),
    ([1, 2], list[int], [1, 2]),
    ([1, 2], tuple[int, ...], (1, 2)),
    ((1, "a"), tuple[int, str], (1, "a")),
    ([], tuple[int, ...], ()),
    ({3: [1]}, dict[int, list[int]], {3: [1]}),
    ({"x": 1}, Point, Point(1)),
    ({"x": 1, "tags": ["a"]}, Point, Point(1, tags=["a"])),
    ({"name": "a", "more": []}, Named, {"name": "a", "more": []}),
    ({"name": "a", "points": [{"x": 2}]}, Named, {"name": "a", "points": (Point(2),)}),
    ([object], Any, [object]),
]
OTHERS: list[tuple[Any, Any, str]] = [
    (1, bool, "f must be true or false; got 1"),
    (True, int, "f must be a whole number; got True"),
    (True, float, "f must be a number; got True"),
    (1.0, int, "f must be a whole number; got 1.0"),
    ("1", float, "f must be a number; got '1'"),
    (float("nan"), float, "f must be a finite number; got nan"),
    (10**400, float, "f must be a finite number; got a whole number of about 401 digits"),
    (3, str, "f must be text; got 3"),
    ("c", Literal["a", "b"], "f must be one of a, b; got 'c'"),
    ([], Literal["a", "b"], "f must be one of a, b; got []"),
    ("1", int | None, "f must be a whole number or nothing; got '1'"),
    (float("inf"), float | None, "f must be a finite number; got inf"),
    ("ab", list[str], "f must be a list of text; got 'ab'"),
    ([1], tuple[int, int], "f must be a list of 2 whole numbers; got [1]"),
    ([1, "x"], list[int], "f: [1] must be a whole number; got 'x'"),
    ([[1], [2.5]], tuple[tuple[int, ...], ...], "f: [1][0] must be a whole number; got 2.5"),
    ({"a": {"b": "x"}}, dict[str, dict[str, int]], "f: a.b must be a whole number; got 'x'"),
    ({3: 1}, dict[str, int], "f: each key must be text; got 3"),
    ([], dict[str, int], "f must be a mapping of names to values; got []"),
    ({}, Point, "f must hold x; it is missing"),
    ({"x": 1, "z": 1}, Point, "f must hold x, y, tags only; got 'z'"),
    ({"x": -1}, Point, "f must hold values in their range; x must be at least 0; got -1.0"),
    ({"name": "a", "points": [{"x": "b"}]}, Named, "f: points[0].x must be a number; got 'b'"),
    ({"points": []}, Named, "f must hold name; it is missing"),
    (3, torch.Tensor, "f must be a tensor; got 3"),
    (torch.zeros(2, 3), int, "f must be a whole number; got torch.float32 [2, 3]"),
]


@pytest.mark.parametrize(("value", "kind", "result"), FITTING, ids=range(len(FITTING)))
def test_a_value_that_fits_comes_back_as_its_kind_says(value: Any, kind: Any, result: Any) -> None:
    found = checked(value, kind, source="f")
    assert found == result
    assert type(found) is type(result)


@pytest.mark.parametrize(("value", "kind", "message"), OTHERS, ids=range(len(OTHERS)))
def test_a_value_of_another_kind_is_told_with_its_place(value: Any, kind: Any, message: str) -> None:
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        checked(value, kind, source="f")


def test_the_name_of_a_value_leads_to_what_is_inside() -> None:
    with pytest.raises(InputError, match=r"^sizes\[1\] must be a whole number; got None$"):
        checked([1, None], list[int], name="sizes")
    with pytest.raises(InputError, match=r"^file f: at\.x must be a number; got None$"):
        checked({"x": None}, Point, name="at", source="file f")


def nested(depth: int) -> list[Any]:
    inside: list[Any] = []
    for _ in range(depth):
        inside = [inside] * 10  # each level stands for ten times the one below
    return inside


@pytest.mark.parametrize(
    "value",
    ["x" * 10**7, 10**5000, -(10**5000), nested(50), {"a" * 10**6: nested(9)}, [nested(3)] * 10**5, b"x" * 10**6],
    ids=["text", "number", "negative", "nested", "mapping", "list", "bytes"],
)
def test_what_is_shown_is_short_whatever_it_is(value: Any) -> None:
    assert 5 < len(shown(value)) <= 80
    assert len(brief("x" * 10**7)) <= 80


def test_many_faults_are_counted() -> None:
    assert joined("abc") == "a; and b; and c"
    assert joined("abcdefgh") == "a; and b; and c; and d; and e; and 3 more"


def test_public_names() -> None:
    assert all(hasattr(schema, name) for name in schema.__all__)
