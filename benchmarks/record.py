"""A benchmark from its options to its record: the variants to compare, the run, and the JSON that keeps it."""

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from itertools import combinations
from pathlib import Path
from typing import Any, Literal, get_origin, get_type_hints

import torch

from benchmarks.flops import Flops
from benchmarks.sections import FULL, SECTIONS, Benchmark, Plan, measured
from benchmarks.training_workload import random_images
from capsnet import devices, environment, experiments
from capsnet.config import Config
from capsnet.errors import InputError
from capsnet.files import parse_yaml, write_atomically
from capsnet.options.schema import did_you_mean
from capsnet.training import prepare

__all__ = ["PLACE", "check_free", "check_measured", "parse_compare", "run", "write"]

PLACE = ("device", "threads", "data_dir")
"""What the rows of an experiment take from the command line."""


def run(
    config: Config,
    what: Sequence[str] = ("ceilings", "step", "inference", "parts"),
    *,
    classes: int = 10,
    variants: Sequence[tuple[str, Config]] = (),
    plan: Plan = FULL,
    command: str = "",
    say: Callable[[str], object] = lambda text: None,
) -> dict[str, Any]:
    """Measure the sections of `what`; every variant (see `parse_compare`) is checked before it is timed.

    Returns:
        The record, as JSON can hold it. `rows` has one row per number: section, name, variant, unit, median, min, max,
        n, and where they apply images_per_second, gflop_per_second, share_of_ceiling, share_of_step, ratio (of the
        median to that of the first variant), error (relative, against float64), added_mib and total_mib.

    Raises:
        InputError: an unknown section, or options that do not fit together or cannot run here.
        Incorrect: a variant's results are wrong.
    """
    for section in what:
        if section not in SECTIONS:
            raise InputError(f"what must be among {', '.join(SECTIONS)}; got {section!r}")
    for name, number in (("classes", classes), ("repeats", plan.repeats)):
        if number < 1:
            raise InputError(f"{name} must be at least 1; got {number}")
    benchmark = Benchmark(config, classes, variants or [("", config)], plan, say, compared=bool(variants))
    device, threads = devices.resolve_device(config), torch.get_num_threads()
    if config.threads:
        torch.set_num_threads(config.threads)
    try:
        about = {**environment.describe(device), "cores": os.cpu_count(), "load": round(os.getloadavg()[0], 2)}
        with torch.random.fork_rng(devices=[]):
            for section in filter(what.__contains__, SECTIONS):
                getattr(benchmark, section)()
    finally:
        torch.set_num_threads(threads)
    network = prepare.layout(config, random_images(config, classes))
    flops = Flops.of(network)
    kept = {"preset"}.union(*(measured(section, config.model) for section in SECTIONS))
    return {
        "command": command,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **about,
        "device_type": device.type,
        "config": {name: value for name, value in config.flat().items() if name in kept},
        "image_shape": list(network.image_shape),
        "classes": classes,
        "parameters": network.parameter_count(),
        "forward_flop_per_image": flops.modules,
        "forward_gflop_per_image": flops.forward() / 1e9,
        "training_gflop_per_image": (flops.forward() + flops.backward()) / 1e9,
        "plan": asdict(plan),
        "variants": benchmark.checked,
        "rows": benchmark.rows,
    }


def check_measured(names: Iterable[str], what: Sequence[str], model: str, *, compared: bool = False) -> None:
    """Raise InputError unless something that is measured depends on each option; all of it, where it is compared.

    The ceilings, which other numbers are shown beside, never have to.
    """
    sections = [section for section in SECTIONS if section in what and (section != "ceilings" or len({*what}) == 1)]
    for name in sorted(names):
        blind = [section for section in sections if name not in measured(section, model)]
        if blind if compared else blind == sections:
            raise InputError(
                f"{name} must be an option that makes a difference to {' and '.join(blind)}; it makes none"
            )


def parse_compare(text: str, config: Config, what: Sequence[str]) -> list[tuple[str, Config]]:
    """`lr=0.1,0.2` as names (`lr=0.1`) and configurations that differ from `config` in that option.

    Several options at once are joined by a plus, and so are their values:
    `routing_kernel+convolution=plain+direct,fused+winograd`. The name of an experiment stands for its rows at the
    budget `cpu`, which take only the place from `config`.

    Raises:
        InputError: another form, an unknown option, one that makes no difference to all of `what`, fewer than two
            values, one that the option cannot have, or two that are the same.
    """
    if text in experiments.available():
        one, place = experiments.experiment(text), {name: getattr(config, name) for name in PLACE}
        return [(row.key, replace(one.config(row, "cpu", config.seed), **place)) for row in one.rows]
    left, equals, right = text.partition("=")
    names = [name.strip().replace("-", "_") for name in left.split("+")]
    kinds: dict[str, Any] = get_type_hints(Config) | get_type_hints(type(config.options))
    unknown = [name for name in names if name not in kinds]
    if not equals or unknown:
        hint = did_you_mean(unknown[0], kinds) if unknown else ""
        rule = "OPTION=A,B with an option of a run, or the name of an experiment"
        raise InputError(f"compare must be {rule}; got {text!r}{hint}")
    written = [[value.strip() for value in variant.split("+")] for variant in right.split(",")]
    if len(written) < 2 or any("" in values for values in written):
        raise InputError(f"compare must name two values or more, as in routing_kernel=plain,auto; got {text!r}")
    if any(len(values) != len(names) for values in written):
        raise InputError(f"compare must name {len(names)} values for each variant, joined by +; got {text!r}")
    variants: list[tuple[str, Config]] = []
    for values in written:
        chosen: dict[str, Any] = dict(zip(names, values, strict=True))
        label = ", ".join(f"{name}={value}" for name, value in chosen.items())
        for name, value in chosen.items():
            if get_origin(kinds[name]) is not Literal and kinds[name] is not str:
                chosen[name] = parse_yaml(value, source="compare")
        try:
            variants.append((label, config.changed(**chosen)))
        except InputError as error:
            raise InputError(f"--compare: {error}") from None
        check_measured(names, what, variants[-1][1].model, compared=True)
    if any(one == other for (_, one), (_, other) in combinations(variants, 2)):
        raise InputError(f"compare must name different values; got {text!r}")
    return variants


def check_free(path: Path, *, overwrite: bool) -> None:
    """Raise InputError unless a record may be written to `path`."""
    if path.is_dir():
        raise InputError(f"out must be a file; got the directory {path}")
    if path.exists() and not overwrite:
        raise InputError(f"out must be a new file; {path} is there (replace it with --overwrite)")


def write(record: Mapping[str, Any], path: Path, *, overwrite: bool = False) -> None:
    """Write a record as JSON, whole or not at all; see `check_free`."""
    check_free(path, overwrite=overwrite)
    text = json.dumps(record, indent=2) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
