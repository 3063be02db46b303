"""What the verbs share: their options, a base configuration, errors of one line."""

import argparse
import contextlib
import difflib
import io
import re
import textwrap
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, TypeVar, get_type_hints

import tyro

from capsnet import config
from capsnet.cli.printing import show
from capsnet.config import LARGEST_SEED, Config
from capsnet.errors import InputError

__all__ = ["BatchSize", "Images", "Range", "Seed", "as_options", "parse", "start"]


@dataclass(frozen=True)
class Range:
    """What a number on the command line must be: `low` to `high`, or above `low` if `above`; checked by `parse`."""

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


def start(arguments: list[str], *starts: str) -> tuple[Config, str | None]:
    """The configuration that the other options change, and the run directory to go on with, if any."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for option in ("--preset", "--config", "--resume"):
        if option in starts:
            parser.add_argument(option, default=None)
    parser.set_defaults(preset=None, config=None, resume=None)
    try:
        known, _ = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise InputError(str(error)) from None
    given = [f"--{name}" for name, value in vars(known).items() if value is not None]
    if len(given) > 1:
        raise InputError(f"only one of --preset, --config and --resume can be the start; got {' and '.join(given)}")
    if known.resume is not None:
        path = Path(known.resume) / "config.yaml"
        if not path.exists():
            raise InputError(f"--resume must be a run directory with a config.yaml; got {known.resume}")
        return config.read(path), known.resume
    if known.config is not None:
        return config.read(known.config), None
    return config.preset(known.preset or "paper"), None


T = TypeVar("T")


def parse(kind: type[T], arguments: list[str], *, prog: str, default: T | None = None) -> T:
    """Parse with tyro; a fault, or a number outside its `Range`, is raised as an InputError of one line."""
    faults, told = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stderr(faults), contextlib.redirect_stdout(told):
            found = tyro.cli(
                kind, args=arguments, prog=prog, default=tyro.MISSING_NONPROP if default is None else default
            )
    except SystemExit as stop:
        if not stop.code:  # --help: tyro leaves a paragraph of the description on one line
            for line in told.getvalue().splitlines():
                show(*(textwrap.wrap(line, 100) if len(line) > 100 else [line]))
            raise
        raise InputError(_one_line(faults.getvalue(), kind, prog)) from None
    _check_ranges(found)
    return found


def _check_ranges(command: object) -> None:
    for name, hint in get_type_hints(type(command), include_extras=True).items():
        value = getattr(command, name)
        if value is None:
            continue
        for within in filter(lambda one: isinstance(one, Range), getattr(hint, "__metadata__", ())):
            for number in value if isinstance(value, tuple) else (value,):
                if rule := within.rule(number):
                    raise InputError(f"--{name.replace('_', '-')} must be {rule}; got {number}")


def _one_line(box: str, kind: type, prog: str) -> str:
    """What tyro says in a box of several lines, in our own grammar; what is not known here is passed on as it is."""
    lines = [line.strip("│ ") for line in box.splitlines()[1:]]
    parts = "\n".join("" if re.fullmatch("[-─╰╯]+", line) else line for line in lines).strip().split("\n\n")
    told = " ".join(parts[0].splitlines())
    if found := re.fullmatch(r"Unrecognized options: (.*)", told):
        options = [f"--{field.name.replace('_', '-')}" for part in (kind, Config) for field in fields(part)]
        given = found[1].replace(",", "")
        near = difflib.get_close_matches(given.split()[0].split("=")[0], options, n=1, cutoff=0.7)
        hint = f" (did you mean {near[0]}?)" if near else ""
        return f"{given} must be among the options of {prog}{hint}"
    if told.startswith("Missing from"):
        return f"{fields(kind)[0].name.upper()} must be given; got none"
    if found := re.fullmatch(r"Missing value for argument '(\S+)'.*", told):
        return f"{found[1]} must be followed by a value; got none"
    if found := re.fullmatch(r"invalid choice (.*) for argument '(\S+)'\. Expected one of \((.*)\)\.", told):
        choices = found[3].replace("'", "").split(", ")
        if "None" in choices:  # the default, in no order
            choices = sorted(set(choices) - {"None"})
        return f"{found[2]} must be one of {', '.join(choices)}; got {found[1]}"
    if found := re.fullmatch(r"Error parsing (--\S+): (?:invalid literal for int|could not convert).*: (.*)", told):
        return f"{found[1]} must be a {'whole ' if 'literal for int' in told else ''}number; got {found[2]}"
    if found := re.fullmatch(r"Error parsing (--\S+): no type matching \{None\}\|(INT|FLOAT) .* from \[(.*)\]\.", told):
        return f"{found[1]} must be a {'whole ' if found[2] == 'INT' else ''}number; got {found[3]}"
    if found := re.fullmatch(r"Error parsing (--\S+): Could not find valid parse for arguments: \[(.*)\]", told):
        return f"{found[1]} must be whole numbers; got {found[2]}"
    return told.removeprefix("Error parsing run: ")


def as_options(text: str) -> str:
    """Fields of the configuration as they are typed: `batch_size must ...` is told as `--batch-size must ...`."""
    names = "|".join(
        [*(field.name for field in fields(Config)), "classes", "compare", "repeats", "seeds", "shifts", "span", "steps"]
    )
    pattern = rf"(^|; and )({names})(?= must | of (?!model))"
    return re.sub(pattern, lambda found: f"{found[1]}--{found[2].replace('_', '-')}", text)
