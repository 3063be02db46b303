"""Measure a network on this machine: speed, memory and exactness.

Its results are first compared with float64; a wrong one gets no number. Every number is a median with the smallest, the
largest and n; variants are measured in turn, A B A B, in one process.

    python -m benchmarks
    python -m benchmarks step parts --compare convolution=direct,winograd --threads 1 --out convolution.json
"""

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import tyro
from tyro.conf import Positional

from benchmarks import record, sections
from benchmarks.correctness import Incorrect
from benchmarks.show import show
from capsnet import config, experiments
from capsnet.cli.parsing import config_of, spelled_out, with_options
from capsnet.errors import InputError

__all__ = ["main"]

PROG = "python -m benchmarks"
Section = Literal["ceilings", "step", "inference", "parts", "routing", "scaling"]


@dataclass(frozen=True)
class Command:
    """Arguments of the command line."""

    preset: str = "paper"
    """Recipe that the other options start from: paper, authors or fast."""
    model: str = "capsnet"
    """Name of the network."""
    what: Positional[tuple[Section, ...]] = ("ceilings", "step", "inference", "parts")
    """ceilings: the best matrix products and memory copy of the machine. step: training steps, and their peak memory.
    inference: batches of 1, 128 and 512. parts: data, each layer of the network forward and backward, loss, optimiser.
    routing: votes and routing alone, with every kernel. scaling: in batch, image size, primary and output capsules,
    routing iterations (some minutes)."""
    config: str | None = None
    """Start from this config.yaml; options given beside it win."""
    classes: int = 10
    """Number of classes."""
    repeats: int | None = None
    """Measurements of each number; default 7, with --quick 2."""
    compare: str | None = None
    """Measure variants of one option, and their ratios to the first: routing_kernel=plain,auto; or of several options:
    routing_kernel+convolution=plain+direct,fused+winograd; or the rows of an experiment, at its budget cpu:
    successors."""
    quick: bool = False
    """Small sizes and 2 repeats."""
    json: bool = False
    """Print the record as JSON."""


def main(arguments: Sequence[str]) -> int:
    """Measure, print tables or JSON, write the record to --out; returns the exit code."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as the command capsnet does
    try:
        return _run(list(arguments))
    except (InputError, Incorrect) as error:
        print(f"{PROG}: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1


def _run(arguments: list[str]) -> int:
    starts = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("preset", "config", "model"):
        starts.add_argument(f"--{name}", nargs="?")
    start, _ = starts.parse_known_args(arguments)
    if start.config is not None and start.preset is not None:
        raise InputError("only one of --preset and --config can be given; got both")
    model = start.model or "capsnet"
    base = config.preset(start.preset or "paper", model=model) if start.config is None else config.read(start.config)
    base = base if start.model in (None, base.model) else base.changed(model=start.model)
    default = with_options(Command, base, preset=base.preset, model=base.model)
    command = tyro.cli(type(default), args=spelled_out(arguments), prog=PROG, description=__doc__, default=default)
    options, plan = config_of(command), sections.QUICK if command.quick else sections.FULL
    given = [name for name, value in options.flat().items() if value != base.flat().get(name)]
    record.check_measured({*given} - {"out", "overwrite"}, command.what, options.model)
    if command.compare in experiments.available() and (others := {*given} - {"out", "overwrite", *record.PLACE}):
        raise InputError(f"{min(others)} cannot be given beside --compare {command.compare}, whose rows say what it is")
    if options.out is not None:
        record.check_free(Path(options.out), overwrite=options.overwrite)
    if command.quick:
        options = replace(options, batch_size=min(8, options.batch_size))
    variants = record.parse_compare(command.compare, options, command.what) if command.compare else []
    found = record.run(
        options,
        command.what,
        classes=command.classes,
        variants=variants,
        plan=plan if command.repeats is None else replace(plan, repeats=command.repeats),
        command=shlex.join([*PROG.split(), *arguments]),
        say=lambda text: print(text, file=sys.stderr, flush=True),
    )
    if command.json:
        print(json.dumps(found, indent=2))
    else:
        show(found, width=None if sys.stdout.isatty() else 160)
    if options.out is not None:
        record.write(found, Path(options.out), overwrite=options.overwrite)
        print(f"record: {options.out}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
