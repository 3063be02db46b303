"""Parse the command line with tyro, which prints its own help and its own usage errors."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from inspect import cleandoc, getdoc
from io import StringIO
from typing import Annotated, Any, Protocol, Union, get_type_hints, runtime_checkable

import tyro
from tyro.conf import Positional, arg, subcommand

from capsnet.cli.printing import say, show
from capsnet.config import LARGEST_SEED
from capsnet.errors import InputError

__all__ = ["BatchSize", "Command", "Group", "Images", "Model", "Models", "Range", "Seed", "parse"]


@runtime_checkable
class Command(Protocol):
    """The options of one verb, a dataclass whose docstring is its help."""

    def run(self, line: str) -> int:
        """Run it; `line` is the command as it was typed, for records. Returns the exit code."""


@dataclass(frozen=True)
class Group:
    """Verbs of which the next word chooses one: `capsnet`, `capsnet plot`, `capsnet analyse`."""

    help: str
    verbs: Mapping[str, "type[Command] | Group"]

    def named(self, arguments: Sequence[str]) -> Sequence[str]:
        """The leading arguments that name a verb."""
        verb = self.verbs.get(arguments[0]) if arguments else None
        if verb is None:
            return []
        return [arguments[0], *(verb.named(arguments[1:]) if isinstance(verb, Group) else [])]


@dataclass(frozen=True)
class Range:
    """Range of a number on the command line: `low` to `high`, or above `low` if `above`."""

    low: int | float
    high: int | float
    above: bool = False

    def rule(self, number: int | float) -> str | None:
        """What `number`, which may be NaN, must be and is not; None if it is in the range."""
        if number > self.high:
            return f"at most {self.high:,}"
        if self.above:
            return None if number > self.low else f"above {self.low:,}"
        return None if number >= self.low else f"at least {self.low:,}"


BatchSize = Annotated[int, Range(1, 10**6)]
Images = Annotated[int, Range(1, 10**9)]
Seed = Annotated[int, Range(0, LARGEST_SEED)]
Model = Positional[Annotated[str, arg(metavar="MODEL")]]
Models = Positional[Annotated[tuple[str, ...], arg(metavar="MODEL [MODEL ...]")]]


def parse(group: Group, arguments: Sequence[str], *, prog: str) -> Command:
    """The command that `arguments` stand for.

    Raises:
        InputError: a number outside its range.
        SystemExit: tyro printed help (code 0) or a usage error (code 2).
    """
    kind: Any = group.verbs.get(arguments[0]) if arguments else None
    if kind is None:
        every = tuple(
            Annotated[_Verb, subcommand(name, description=_summary(kind))] for name, kind in group.verbs.items()
        )
        with _printed(code=None if arguments else 2):
            tyro.cli(Union[every], args=arguments or ["--help"], prog=prog, description=cleandoc(group.help))  # type: ignore[call-overload]  # noqa: UP007
    prog = f"{prog} {arguments[0]}"
    if isinstance(kind, Group):
        return parse(kind, arguments[1:], prog=prog)
    default = getattr(kind, "starting_from", lambda arguments: tyro.MISSING_NONPROP)(arguments[1:])
    with _printed():
        command: Command = tyro.cli(kind, args=arguments[1:], prog=prog, default=default, description=getdoc(kind))
    for name, hint in get_type_hints(kind, include_extras=True).items():
        value = getattr(command, name)
        for within in filter(lambda one: isinstance(one, Range), getattr(hint, "__metadata__", ())):
            for number in value if isinstance(value, tuple) else () if value is None else (value,):
                if rule := within.rule(number):
                    raise InputError(f"--{name.replace('_', '-')} must be {rule}; got {number}")
    return command


@contextmanager
def _printed(code: int | None = None) -> Iterator[None]:
    """Print what tyro prints through `printing`, because stdout and stderr may be closed or full; `code` replaces 0."""
    out, err = StringIO(), StringIO()
    try:
        with redirect_stdout(out), redirect_stderr(err):
            yield
    except SystemExit as stop:
        show(*out.getvalue().splitlines())
        for line in err.getvalue().splitlines():
            say(line)
        raise SystemExit(code or stop.code) from None


@dataclass(frozen=True)
class _Verb:
    """Stands for a verb where only the list of verbs is shown."""


def _summary(kind: "type[Command] | Group") -> str:
    return (kind.help if isinstance(kind, Group) else str(kind.__doc__)).split("\n")[0]
