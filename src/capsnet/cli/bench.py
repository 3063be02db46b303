"""The verb `bench`."""

import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import OmitArgPrefixes, Positional

from capsnet.cli.parsing import Range, parse, start
from capsnet.cli.printing import say, show, show_json
from capsnet.config import Config
from capsnet.errors import InputError

__all__ = ["run"]


BENCH_HELP = """usage: capsnet bench [WHAT ...] [OPTIONS]

Measure a network on this machine. Its results are first compared with float64; a wrong one gets no number. Every
number is a median with the smallest, the largest and n; variants are measured in turn, A B A B, in one process.

  WHAT                       of these   [ceilings step inference parts]
    ceilings                 the machine's best matrix products (float32, bf16) and memory copy
    step                     training steps, and their peak memory
    inference                batches of 1, 128 and 512
    parts                    a step's parts: data, convolutions, votes + routing, decoder, loss, optimiser
    routing                  votes + routing alone, with every kernel, detached too, and their memory
    scaling                  in batch, image size, primary and output capsules, iterations (some minutes)
  --compare FIELD=A,B[,C]    measure variants of one option, and their ratios to the first: kernel=plain,auto
                             or of several: kernel+stem=plain+direct,fused+minimal
  --repeats N                measurements of each number   [7]
  --quick                    small sizes and 2 repeats: to try it out
  --preset NAME              or --config FILE, such as a run's: what all other options start from   [paper]
  --model NAME               capsnet or baseline   [capsnet]; --routing-iterations N   [3], and all other sizes
  --image-size N             [28]; --channels 1|3   [1]; --classes N   [10]; --batch-size N of a step   [128]
  --kernel --stem            how routing and convolutions are computed; --detach-routing
  --device auto|cpu|cuda|mps --precision auto|32|bf16; --threads N
  --out FILE.json            keep the record; --overwrite replaces it; --json prints it in place of the tables
  --help-all                 every option

examples:
  capsnet bench
  capsnet bench step parts --compare stem=direct,minimal --threads 1 --out results/bench/stem.json
"""


@dataclass(frozen=True)
class _Bench:
    run: OmitArgPrefixes[Config]
    what: Positional[tuple[Literal["ceilings", "step", "inference", "parts", "routing", "scaling"], ...]] = (
        "ceilings",
        "step",
        "inference",
        "parts",
    )
    """What to measure."""
    config: str | None = None
    """Start from this config.yaml; options given beside it win."""
    classes: Annotated[int, Range(1, 10_000)] = 10
    """Number of classes."""
    repeats: Annotated[int | None, Range(1, 10_000)] = None
    """Measurements of each number; default 7, with --quick 2."""
    compare: str | None = None
    """FIELD=A,B[,C]: measure these variants in turn."""
    quick: bool = False
    """Small sizes and 2 repeats."""
    json: bool = False
    """Print the record as JSON."""


def run(arguments: list[str]) -> int:
    """Measure, print tables or JSON, keep the record; see BENCH_HELP."""
    if {"-h", "--help"} & set(arguments):
        show(*BENCH_HELP.splitlines())
        return 0
    base, _ = start(arguments, "--preset", "--config")
    arguments = ["--help" if argument == "--help-all" else argument for argument in arguments]
    command = parse(_Bench, arguments, prog="capsnet bench", default=_Bench(base))
    config = command.run

    from capsnet import bench

    given = {argument.split("=")[0].replace("--no-", "--") for argument in arguments}
    for name in bench.UNUSED:
        if name not in ("preset", "out", "overwrite") and f"--{name.replace('_', '-')}" in given:
            raise InputError(f"{name} must not be given to capsnet bench, which it does not concern")
    if config.out is not None:
        bench.check_free(Path(config.out), overwrite=config.overwrite)
    plan = bench.QUICK if command.quick else bench.FULL
    if command.repeats is not None:
        plan = replace(plan, repeats=command.repeats)
    if command.quick:
        config = replace(config, batch_size=min(8, config.batch_size))
    try:
        record = bench.run(
            config,
            command.what,
            classes=command.classes,
            variants=bench.parse_compare(command.compare, config) if command.compare else (),
            plan=plan,
            command=shlex.join(["capsnet", "bench", *arguments]),
            tell=say,
        )
    except bench.Incorrect as error:
        say(f"capsnet bench: error: {error}")
        return 1
    if command.json:
        show_json(record)
    else:
        bench.show(record, width=None if sys.stdout.isatty() else 160)
    if config.out is not None:
        bench.write(record, Path(config.out), overwrite=config.overwrite)
        say(f"record: {config.out}")
    return 0
