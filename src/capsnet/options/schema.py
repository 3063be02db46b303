"""What a value from a file must be, said by a type annotation: checked in one place, for every file of a run.

Configurations, model cards, results, metrics, records and checkpoints are checked here. Imports no torch.
"""

import dataclasses
import difflib
import math
import reprlib
import sys
from collections.abc import Callable, Iterable, Mapping
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints, is_typeddict

from capsnet.errors import InputError

__all__ = [
    "AT_LEAST_0",
    "AT_LEAST_1",
    "FINITE",
    "FRACTION",
    "LARGEST",
    "POSITIVE",
    "Range",
    "Rule",
    "brief",
    "checked",
    "did_you_mean",
    "joined",
    "out_of_range",
    "shown",
]

LARGEST = 2**31 - 1
_LONGEST = 80
_MOST_FAULTS = 5
_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", NoneType: "nothing"}


class _Short(reprlib.Repr):
    """The `repr` of a value of any size, at a small cost."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = _LONGEST

    def repr_int(self, x: int, level: int) -> str:
        """Python refuses to write more than 4,300 digits."""
        digits = int(x.bit_length() * math.log10(2)) + 1
        return repr(x) if digits < _LONGEST else f"a whole number of about {digits} digits"

    def repr_Tensor(self, x: Any, level: int) -> str:  # noqa: N802 -- reprlib looks for the name of the class
        return f"{x.dtype} {list(x.shape)}"


class Rule:
    """What a value must be beyond its type, in the annotation of an option.

    Args:
        holds: whether a value keeps it.
        words: the rule, for errors: "X must be WORDS".
    """

    def __init__(self, holds: Callable[[Any], bool], words: str) -> None:
        self.holds, self.words = holds, words

    def fault(self, value: Any) -> str | None:
        """What `value` must be and is not; None if it is."""
        return None if self.holds(value) else self.words


class Range(Rule):
    """A number from `low` to `high`, both included but for `above` and `below`; of a tuple, each number.

    Args:
        low: smallest.
        high: largest.
        above: whether `low` itself is outside.
        below: whether `high` itself is outside.
        words: the rule; default: at least, above, or at most.
    """

    def __init__(
        self,
        low: int | float,
        high: int | float = LARGEST,
        *,
        above: bool = False,
        below: bool = False,
        words: str = "",
    ) -> None:
        self.low, self.high, self.above, self.below, self.words = low, high, above, below, words

    def fault(self, value: Any) -> str | None:
        """What `value`, which may be NaN, must be and is not; None if it is in the range."""
        for number in value if isinstance(value, tuple) else (value,):
            if number > self.high or (self.below and number == self.high):
                return self.words or f"at most {self.high:,}"
            if not (number > self.low or (number == self.low and not self.above)):
                return self.words or f"{'above' if self.above else 'at least'} {self.low:,}"
        return None


AT_LEAST_0 = Range(0)
AT_LEAST_1 = Range(1)
FINITE = Range(0, sys.float_info.max, words="at least 0 and finite")
POSITIVE = Range(0, sys.float_info.max, above=True, words="above 0")
SIZES = Range(1, words=f"numbers of 1 to {LARGEST:,}")
FRACTION = Range(0, 1, below=True, words="in [0, 1)")


def out_of_range(values: Mapping[str, Any], *kinds: type) -> list[str]:
    """What is wrong with the values of options: their types, and their ranges.

    Args:
        values: options by name.
        kinds: the dataclasses that they are fields of, whose annotations hold types and rules.
    """
    faults, hints = list[str](), dict[str, Any]()
    for kind in kinds:
        hints |= get_type_hints(kind, include_extras=True)
    for name, value in values.items():
        if name not in hints:
            continue
        try:
            checked(value, hints[name], name=name)
        except InputError as error:
            faults.append(str(error))
            continue
        if isinstance(value, str) and "\0" in value:
            faults.append(f"{name} must be text without a NUL character; got {shown(value)}")
        rules = () if value is None else getattr(hints[name], "__metadata__", ())
        found = (
            rule.fault(tuple(value) if isinstance(value, list) else value) for rule in rules if isinstance(rule, Rule)
        )
        faults += [f"{name} must be {words}; got {shown(value)}" for words in found if words]
    return faults


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """` (did you mean ...?)` with the nearest of `names`; nothing where none is near."""
    near = difflib.get_close_matches(name, list(names), n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def check_known(name: object, names: Iterable[str], rule: str) -> None:
    """Raise InputError, which begins with `rule`, unless `name` is one of `names`; it suggests the nearest."""
    known = list(names)
    if name not in known:
        raise InputError(f"{rule} {', '.join(known)}; got {shown(name)}{did_you_mean(str(name), known)}")


def shown(value: object) -> str:
    """A value as an error shows it: its `repr`, cut to 80 characters."""
    text = _Short().repr(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def brief(name: str) -> str:
    """A name from a file as an error shows it: without quotes, cut as by `shown`."""
    return shown(name)[1:-1]


def joined(faults: Iterable[str]) -> str:
    """Several faults in one line, which names the first five and counts the others."""
    every = list(faults)
    more = len(every) - _MOST_FAULTS
    return "; and ".join(every[:_MOST_FAULTS] + [f"{more} more"] * (more > 0))


def checked(value: object, kind: Any, *, name: str = "", source: str = "") -> Any:
    """`value` as `kind` says, so that what follows can rely on it.

    Args:
        value: what JSON, YAML or a checkpoint holds.
        kind: `bool`, `int`, `float` (finite; a whole number will do), `str`, `X | None`, `Literal`, `list[X]`,
            `tuple[X, ...]`, `tuple[X, Y]`, `dict[K, X]`, a dataclass (which allows no further fields), a TypedDict
            (which does, unchecked), `Any`, or another class, of which `value` must be an instance.
        name: of the value inside `source`, for errors.
        source: the file it is from, for errors.

    Returns:
        The value; in it a list is a tuple where `kind` says so, and a mapping is an instance where it says a dataclass.

    Raises:
        InputError: the value, or one inside it, is of another kind; the message says where it stands.
    """
    try:
        return _checked(value, kind, name)
    except _Misfit as misfit:
        where = ": ".join(part for part in (source, misfit.place) if part)
        raise InputError(f"{where} {misfit.rule}") from None


class _Misfit(Exception):
    """A value that breaks a rule, and where it stands."""

    def __init__(self, place: str, rule: str) -> None:
        self.place, self.rule = place, rule


def _checked(value: Any, kind: Any, place: str) -> Any:
    origin, parts = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin is Annotated:
        return _checked(value, parts[0], place)
    if origin in (Union, UnionType):
        return _one_of(value, kind, place)
    if origin is Literal and isinstance(value, str) and value in parts:
        return value
    if origin in (list, tuple) and isinstance(value, list | tuple):
        kinds = parts[:1] * len(value) if origin is list or parts[-1] is ... else parts
        if len(kinds) == len(value):
            return origin(_checked(item, kinds[k], f"{place}[{k}]") for k, item in enumerate(value))
    elif origin is dict and isinstance(value, dict):
        each = f"each key of {place}" if place else "each key"
        items = value.items()
        return {_checked(key, parts[0], each): _checked(item, parts[1], _inside(place, key)) for key, item in items}
    elif (dataclasses.is_dataclass(kind) or is_typeddict(kind)) and isinstance(value, dict):
        return _with_fields(value, kind, place)
    elif kind is float and type(value) in (int, float):
        if abs(value) <= sys.float_info.max:
            return value
        raise _Misfit(place, f"must be a finite number; got {shown(value)}")
    elif _is_a(value, kind):
        return value
    raise _Misfit(place, _unlike(value, kind))


def _is_a(value: object, kind: Any) -> bool:
    """Whether the value is of a plain class; True is no whole number here."""
    plain = isinstance(kind, type) and not is_typeddict(kind)
    return plain and isinstance(value, kind) and (kind, type(value)) != (int, bool)


def _one_of(value: Any, kind: Any, place: str) -> Any:
    """The value as the first of several kinds that it fits; of a misfit inside it, that is told."""
    told = _Misfit(place, _unlike(value, kind))
    for part in get_args(kind):
        try:
            return _checked(value, part, place)
        except _Misfit as misfit:
            if (misfit.place, misfit.rule) != (place, _unlike(value, part)):
                told = misfit
    raise told


def _with_fields(value: dict[Any, Any], kind: Any, place: str) -> Any:
    """A mapping as a TypedDict, or as an instance of a dataclass."""
    hints = get_type_hints(kind)
    if is_typeddict(kind):
        needed = kind.__required_keys__
    else:
        missing = dataclasses.MISSING
        needed = {one.name for one in dataclasses.fields(kind) if one.default is one.default_factory is missing}
        for key in value:
            if key not in hints:
                raise _Misfit(place, f"must hold {', '.join(hints)} only; got {shown(key)}")
    for key in hints:
        if key in needed and key not in value:
            raise _Misfit(place, f"must hold {key}; it is missing")
    clean = {key: _checked(item, hints[key], _inside(place, key)) for key, item in value.items() if key in hints}
    if is_typeddict(kind):
        return {**value, **clean}
    clean = {key: float(item) if hints[key] is float else item for key, item in clean.items()}  # as it is annotated
    try:
        return kind(**clean)
    except InputError as error:
        raise _Misfit(place, f"must hold values in their range; {error}") from None


def _unlike(value: object, kind: Any) -> str:
    return f"must be {_described(kind)}; got {shown(value)}"


def _inside(place: str, key: object) -> str:
    text = brief(key) if isinstance(key, str) else shown(key)
    return f"{place}.{text}" if place else text


def _described(kind: Any) -> str:
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return " or ".join(map(_described, parts))
    if origin is Literal:
        return f"one of {', '.join(parts)}"
    if origin in (list, tuple):
        count = "" if origin is list or parts[-1] is ... else f"{len(parts)} "
        word = _described(parts[0]).removeprefix("a ")
        return f"a list of {count}{word.replace('number', 'numbers').replace('mapping', 'mappings')}"
    if kind in _WORDS:
        return _WORDS[kind]
    if origin is dict or dataclasses.is_dataclass(kind) or is_typeddict(kind):
        return "a mapping of names to values"
    return f"a {kind.__name__.lower()}"
