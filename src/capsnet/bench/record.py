"""A benchmark from its options to its record: the variants to compare, the run, and the JSON that keeps it."""

import difflib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_origin

import torch

from capsnet import machine, runs
from capsnet.bench import work
from capsnet.bench.sections import FULL, SECTIONS, Bench, Plan
from capsnet.bench.whole import image_shape, layout
from capsnet.config import Config, from_dict
from capsnet.errors import InputError
from capsnet.files import parse_yaml

__all__ = ["UNUSED", "check_free", "parse_compare", "run", "write"]

UNUSED = (
    "preset", "data", "data_dir", "validation", "data_seed", "epochs", "lr_decay", "lr_decay_steps", "lr_floor",
    "devices", "out", "overwrite", "log_every", "checkpoint_steps", "tensorboard",
)  # fmt: skip
"""Options of a run that change nothing in what is measured here."""


def run(
    config: Config,
    what: Sequence[str] = ("ceilings", "step", "inference", "parts"),
    *,
    classes: int = 10,
    variants: Sequence[tuple[str, Config]] = (),
    plan: Plan = FULL,
    command: str = "",
    tell: Callable[[str], object] = lambda text: None,
) -> dict[str, Any]:
    """Measure; every variant is checked before it is timed.

    Args:
        config: network, loss, batch size, device, precision and threads; what is about data and epochs is ignored.
        what: of `SECTIONS`.
        classes: number of classes.
        variants: names and configurations to measure in turn, see `parse_compare`; `config` alone if there are none.
        plan: repeats and sizes.
        command: what was typed, for the record.
        tell: is given a line before each section.

    Returns:
        The record, as JSON can hold it. `rows` has a row a number: section, name, variant, unit, median, min, max, n,
        and where they apply images_per_second, gflop_per_second, share_of_ceiling, share_of_step, ratio (of the median
        to that of the first variant), error (relative, against float64), added_mib and total_mib.

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
    bench = Bench(config, classes, variants or [("", config)], plan, tell, compared=bool(variants))
    threads = torch.get_num_threads()
    device = machine.resolve_device(config)
    if config.threads:
        torch.set_num_threads(config.threads)
    try:
        environment = {**runs.environment(device), "cores": os.cpu_count(), "load": round(os.getloadavg()[0], 2)}
        with torch.random.fork_rng(devices=[]):
            for section in SECTIONS:
                if section in what:
                    getattr(bench, section)()
    finally:
        torch.set_num_threads(threads)
    network = layout(config, classes)
    counts = work.multiply_adds(network)
    return {
        "command": command,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **environment,
        "device_type": device.type,
        "config": {name: value for name, value in asdict(config).items() if name not in UNUSED or name == "preset"},
        "image_shape": list(image_shape(config)),
        "classes": classes,
        "parameters": network.parameter_count(),
        "multiply_adds": counts,
        "forward_gflop_per_image": work.forward_flop(counts) / 1e9,
        "training_gflop_per_image": (work.forward_flop(counts) + work.backward_flop(counts)) / 1e9,
        "plan": asdict(plan),
        "variants": bench.checked,
        "rows": bench.rows,
    }


def parse_compare(text: str, config: Config) -> list[tuple[str, Config]]:
    """`kernel=plain,auto` as names (`kernel=plain`) and configurations that differ from `config` in that field.

    Several fields at once are joined by a plus, and so are their values: `kernel+stem=plain+direct,fused+minimal`.

    Raises:
        InputError: another form, an unknown field, fewer than two values, or one that the field cannot have.
    """
    left, equals, right = text.partition("=")
    names = [name.strip().replace("-", "_") for name in left.split("+")]
    kinds: dict[str, Any] = {field.name: field.type for field in fields(Config) if field.name not in UNUSED}
    unknown = [name for name in names if name not in kinds]
    if not equals or unknown:
        near = difflib.get_close_matches(unknown[0], kinds, n=1) if unknown else []
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise InputError(f"compare must be FIELD=A,B with an option of the network or machine; got {text!r}{hint}")
    written = [[value.strip() for value in variant.split("+")] for variant in right.split(",")]
    if len(written) < 2 or any("" in values for values in written):
        raise InputError(f"compare must name two values or more, as in kernel=plain,auto; got {text!r}")
    if any(len(values) != len(names) for values in written):
        raise InputError(f"compare must name {len(names)} values for each variant, joined by +; got {text!r}")
    variants = []
    for values in written:
        chosen: dict[str, Any] = dict(zip(names, values, strict=True))
        for name, value in chosen.items():
            if get_origin(kinds[name]) is not Literal and kinds[name] is not str:
                chosen[name] = parse_yaml(value, source="compare")
        label = ", ".join(f"{name}={value}" for name, value in zip(names, values, strict=True))
        variants.append((label, from_dict({**asdict(config), **chosen}, source="--compare")))
    return variants


def check_free(path: Path, *, overwrite: bool) -> None:
    """Raise InputError unless a record may be written to `path`."""
    if path.is_dir():
        raise InputError(f"out must be a file; got the directory {path}")
    if path.exists() and not overwrite:
        raise InputError(f"out must be a new file; {path} is there (replace it with --overwrite)")


def write(record: Mapping[str, Any], path: Path, *, overwrite: bool = False) -> None:
    """Write a record as JSON, whole or not at all.

    Raises:
        InputError: see `check_free`; or it cannot be written.
    """
    check_free(path, overwrite=overwrite)
    text = json.dumps(record, indent=2) + "\n"
    runs.write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
