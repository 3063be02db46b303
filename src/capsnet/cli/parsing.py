"""Parse the command line with tyro, which prints its own help and its own usage errors."""

import ast
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, make_dataclass
from inspect import cleandoc, getdoc, getsource
from io import StringIO
from itertools import pairwise
from textwrap import dedent
from typing import Annotated, Any, Protocol, TypeVar, Union, cast, get_type_hints, runtime_checkable

import tyro
from tyro.conf import OmitArgPrefixes, Positional, arg, subcommand

from capsnet.cli.printing import say, show
from capsnet.config import Config, from_dict
from capsnet.errors import InputError
from capsnet.options import GROUPS, LARGEST_SEED
from capsnet.options import Device as _Device
from capsnet.options.schema import Range

__all__ = [
    "BatchSize",
    "Command",
    "DataDir",
    "Device",
    "Group",
    "Images",
    "Model",
    "Models",
    "Range",
    "Seed",
    "config_of",
    "flagged",
    "helped",
    "parse",
    "spelled_out",
    "with_options",
]


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


C = TypeVar("C")
BatchSize = Annotated[int, Range(1, 10**6)]
Images = Annotated[int, Range(1, 10**9)]
Seed = Annotated[int, Range(0, LARGEST_SEED)]
_MODEL = "Run directory, folder with weights, or the name of weights that ship with the package."
_MODELS = "Run directories, folders with weights, or names of weights that ship with the package."
Model = Positional[Annotated[str, arg(metavar="MODEL", help=_MODEL)]]
Models = Positional[Annotated[tuple[str, ...], arg(metavar="MODEL [MODEL ...]", help=_MODELS)]]
DataDir = Annotated[str | None, arg(help="Directory of downloaded files.")]
Device = Annotated[_Device, arg(help="auto: a CUDA GPU if there is one; mps (untested) on a Mac.")]


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
    prog, rest = f"{prog} {arguments[0]}", arguments[1:]
    if isinstance(kind, Group):
        return parse(kind, rest, prog=prog)
    description, default = getdoc(kind), tyro.MISSING_NONPROP
    if hasattr(kind, "starting_from"):  # whose options depend on some of its arguments
        default, rest = kind.starting_from(rest), spelled_out(rest)
        kind = type(default)
    else:
        kind = helped(kind)
    with _printed():
        command: Command = tyro.cli(kind, args=rest, prog=prog, default=default, description=description)
    for name, hint in get_type_hints(kind, include_extras=True).items():
        value = getattr(command, name)
        for within in filter(lambda one: isinstance(one, Range), getattr(hint, "__metadata__", ())):
            for number in value if isinstance(value, tuple) else () if value is None else (value,):
                if words := within.fault(number):
                    raise InputError(f"--{name.replace('_', '-')} must be {words}; got {number}")
    return command


def with_options(kind: type[C], base: Config, **values: Any) -> C:
    """A command with the options of a run beside its own: a group for each of `GROUPS`, and one for the model.

    The defaults of the options are those of `base`; `values` are of the command's own fields.
    """
    groups = {"images": GROUPS["data"], "network": type(base.options)}  # as headings of the help
    groups |= {name: group for name, group in GROUPS.items() if name != "data"}
    groups, kind = {name: helped(group) for name, group in groups.items()}, helped(kind)
    named = [(name, OmitArgPrefixes[group]) for name, group in groups.items()]  # type: ignore[misc, valid-type]
    whole = make_dataclass(kind.__name__, named, bases=(kind,), frozen=True, kw_only=True)
    flat = base.flat()
    defaults = {name: group(**{each.name: flat[each.name] for each in fields(group)}) for name, group in groups.items()}
    command: C = whole(**values, **defaults)
    return command


def helped(kind: Any) -> Any:
    """A dataclass like `kind` whose fields have their docstrings as help in one line; tyro keeps their line breaks."""
    texts = dict[str, str]()
    for one in reversed(kind.__mro__[:-1]):
        with suppress(OSError):  # of a class that was made there is no source
            body = cast(ast.ClassDef, ast.parse(dedent(getsource(one))).body[0]).body
            for field_, text in pairwise(body):
                if isinstance(field_, ast.AnnAssign) and isinstance(text, ast.Expr):
                    texts[ast.unparse(field_.target)] = " ".join(ast.literal_eval(text.value).split())
    hints, named = get_type_hints(kind, include_extras=True), list[Any]()
    for each in fields(kind):
        hint = hints[each.name]
        hint = Annotated[hint, arg(help=texts[each.name])] if each.name in texts else hint
        named.append((each.name, hint) if each.default is MISSING else (each.name, hint, field(default=each.default)))
    return make_dataclass(kind.__name__, named, bases=(kind,), frozen=True, kw_only=True)


def flagged(message: str) -> str:
    """An error with the options of a run that it begins with as they are typed: `--weight-decay must`."""
    from capsnet.models.registry import available, options_of

    names = {"preset", "model"}
    names |= {each.name for one in (*GROUPS.values(), *map(options_of, available())) for each in fields(one)}

    def flag(found: re.Match[str]) -> str:
        return f"--{found[0].replace('_', '-')}" if found[0] in names else found[0]

    first = re.sub(r"^[a-z_]+(?= must )", flag, message)
    return message if first == message else re.sub(r"(?<=; and )[a-z_]+(?= must )", flag, first)


def spelled_out(arguments: Sequence[str]) -> list[str]:
    """The options of a run that may be yes, no or left open, as tyro takes them: `--flip` is `--flip True`."""
    hints = {name: hint for group in GROUPS.values() for name, hint in get_type_hints(group).items()}
    open_flags = [name.replace("_", "-") for name, hint in hints.items() if hint == bool | None]
    words = {f"--{name}": ["True"] for name in open_flags} | {f"--no-{name}": ["False"] for name in open_flags}
    spelled = list[str]()
    for word, following in zip(arguments, [*arguments[1:], ""], strict=False):
        value = [] if following in ("True", "False", "None") else words.get(word, [])
        spelled += [word.replace("--no-", "--", 1) if word in words else word, *value]
    return spelled


def config_of(command: Any) -> Config:
    """The configuration of a command made by `with_options`.

    Raises:
        InputError: options out of their range.
    """
    options = {"preset": command.preset, "model": command.model}
    for each in fields(command):
        if is_dataclass(group := getattr(command, each.name)):
            options |= vars(group)
    options["freeze"] = tuple(name for word in options["freeze"] for name in word.split(",") if name)
    return from_dict(options)


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
