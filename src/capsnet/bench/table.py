"""A record as tables for people."""

from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["show"]

TITLES = {
    "ceilings": "ceilings of this machine",
    "step": "training step: data, forward, backward, Adam",
    "inference": "inference: evaluation mode, no gradients",
    "parts": "parts of a training step",
    "routing": "votes + routing alone, forward and backward",
    "scaling": "scaling: one size at a time",
}
COLUMNS: dict[str, tuple[str, Callable[[float], str]]] = {
    "median": ("median", lambda x: _digits(x)),
    "min": ("min", lambda x: _digits(x)),
    "max": ("max", lambda x: _digits(x)),
    "n": ("n", lambda x: f"{x}"),
    "ratio": ("ratio", lambda x: f"{x:.3f}"),
    "images_per_second": ("images/s", lambda x: f"{x:,.0f}" if x >= 10 else f"{x:.2f}"),
    "gflop_per_second": ("GFLOP/s", lambda x: f"{x:,.1f}"),
    "share_of_ceiling": ("of ceiling", lambda x: f"{100 * x:.0f} %"),
    "share_of_step": ("of step", lambda x: f"{100 * x:.1f} %"),
    "added_mib": ("MiB added", lambda x: f"{x:,.0f}"),
    "total_mib": ("MiB in all", lambda x: f"{x:,.0f}"),
    "error": ("error", lambda x: f"{x:.1e}"),
}
"""By key of a row: heading and form. A column without any value in a section is left out."""


def show(record: Mapping[str, Any], *, width: int | None = None) -> None:
    """Print a record on stdout.

    Args:
        record: of `run`.
        width: in characters; that of the terminal if not given.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(width=width, highlight=False, markup=False)
    for line in _heading(record):
        console.print(line, soft_wrap=True)
    for section, title in TITLES.items():
        rows = [row for row in record["rows"] if row["section"] == section]
        if not rows:
            continue
        units = list(dict.fromkeys(row["unit"] for row in rows))
        keys = [key for key in COLUMNS if any(row.get(key) is not None for row in rows)]
        console.print(f"\n{title}" + (f" [{units[0]}]" if len(units) == 1 else ""), style="bold")
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
        table.add_column("")
        named = any(row["variant"] for row in rows)
        if named:
            table.add_column("variant", no_wrap=True)
        if len(units) > 1:
            table.add_column("unit")
        for key in keys:
            table.add_column(COLUMNS[key][0], justify="right", no_wrap=True)
        before = ""
        for row in rows:
            cells = ["" if row["name"] == before else row["name"]]
            cells += [row["variant"]] if named else []
            cells += [row["unit"]] if len(units) > 1 else []
            table.add_row(*cells, *(COLUMNS[key][1](row[key]) if row.get(key) is not None else "" for key in keys))
            before = row["name"]
        console.print(table)
    console.print()
    for line in _notes(record):
        console.print(line, soft_wrap=True)


def _heading(record: Mapping[str, Any]) -> list[str]:
    shape = " x ".join(map(str, record["image_shape"]))
    forward, training = record["forward_gflop_per_image"], record["training_gflop_per_image"]
    lines = [
        f"{record['config']['model']} for {shape} images, {record['classes']} classes: {record['parameters']:,} "
        f"parameters; an image takes {forward:.3f} GFLOP forward, {training:.3f} in training",
        f"{record['device']}, {_count(record['threads'], 'thread')} of {_count(record['cores'], 'core')}, "
        f"load {record['load']:.1f} at the start; torch {record['torch']}, capsnet {record['capsnet']} "
        f"({record['commit'] or 'installed'})"
        + (f"; computed by {record['kernels']}" if record.get("kernels") else ""),
    ]
    for found in record["variants"]:
        resolved = [f"{name} {found[name]}" for name in ("precision", "kernel", "stem") if name in found]
        resolved.append(_count(found["threads"], "thread"))
        lines.append(
            f"{found['variant'] + ': ' if found['variant'] else ''}{', '.join(resolved)}; checked on {found['images']} "
            f"images: {found['result']} is {found['error']:.1e} from float64, {found['tolerance']:g} allowed"
        )
    return lines


def _notes(record: Mapping[str, Any]) -> list[str]:
    keys = {key for row in record["rows"] for key, value in row.items() if value is not None}
    notes = []
    if "gflop_per_second" in keys:
        notes.append(
            "GFLOP/s: direct arithmetic, 2 FLOP a multiply-add; stem minimal does less than it is credited with, so it "
            "can seem to exceed the ceiling."
        )
    if "ratio" in keys:
        notes.append("ratio: of the median to that of the first variant; all were measured in turn.")
    if "added_mib" in keys:
        where = "as PyTorch allocates it on the GPU" if record["device_type"] == "cuda" else "resident"
        notes.append(f"MiB: peak memory of a fresh process, {where}: added to network and images, and in all.")
    notes += [f"No memory for {row['name']}: {row['memory_error']}" for row in record["rows"] if "memory_error" in row]
    if "error" in keys:
        notes.append("error: largest relative error (RMS) of losses, scores and gradients against float64.")
    if any(row["max"] > 2 * row["min"] for row in record["rows"] if row["unit"] != "ms" or row["median"] > 5):
        notes.append("Some measurements are twice as long as others of the same: was the machine busy with other work?")
    return notes


def _digits(value: float) -> str:
    return (
        f"{value:,.0f}"
        if value >= 1000
        else f"{value:.1f}"
        if value >= 100
        else f"{value:.2f}"
        if value >= 10
        else f"{value:.3f}"
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
