"""A record as tables for people."""

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

__all__ = ["show"]

TITLES = {
    "ceilings": "ceilings of this machine",
    "step": "training step: data, forward, backward, Adam",
    "inference": "inference: evaluation mode, no gradients",
    "parts": "parts of a training step",
    "routing": "votes + routing alone, forward and backward",
    "scaling": "scaling: one size at a time",
}
COLUMNS = {
    "median": ("median", "{:,.4g}"),
    "min": ("min", "{:,.4g}"),
    "max": ("max", "{:,.4g}"),
    "n": ("n", "{}"),
    "ratio": ("ratio", "{:.3f}"),
    "images_per_second": ("images/s", "{:,.4g}"),
    "gflop_per_second": ("GFLOP/s", "{:,.1f}"),
    "share_of_ceiling": ("of ceiling", "{:.0%}"),
    "share_of_step": ("of step", "{:.1%}"),
    "added_mib": ("MiB added", "{:,.0f}"),
    "total_mib": ("MiB in all", "{:,.0f}"),
    "error": ("error", "{:.1e}"),
}
"""Heading and format by key of a row. A column without any value in a section is left out."""
NOTES = {
    "gflop_per_second": "GFLOP/s: plain, direct arithmetic, 2 FLOP per multiply-add; Winograd convolutions need less, "
    "and so can seem to exceed the ceiling.",
    "ratio": "ratio: of the median to that of the first variant; all were measured in turn.",
    "added_mib": "MiB: peak memory of a fresh process (on a GPU, as PyTorch allocates it): added to network and "
    "images, and in all.",
    "error": "error: largest relative error (RMS) of losses, scores and gradients against float64.",
}


def show(record: Mapping[str, Any], *, width: int | None = None) -> None:
    """Print a record on stdout, in a width of characters that is the terminal's if not given."""
    console = Console(width=width, highlight=False, markup=False)
    for line in _heading(record):
        console.print(line, soft_wrap=True)
    for section, title in TITLES.items():
        rows = [row for row in record["rows"] if row["section"] == section]
        keys = [key for key in COLUMNS if any(key in row for row in rows)]
        table = Table(title=f"\n{title}", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
        for heading in ("", "variant", "unit"):
            table.add_column(heading, no_wrap=bool(heading))
        for key in keys:
            table.add_column(COLUMNS[key][0], justify="right", no_wrap=True)
        before = ""
        for row in rows:
            name = "" if row["name"] == before else row["name"]
            numbers = [COLUMNS[key][1].format(row[key]) if key in row else "" for key in keys]
            table.add_row(name, row["variant"], row["unit"], *numbers)
            before = row["name"]
        if rows:
            console.print(table)
    console.print()
    notes = [note for key, note in NOTES.items() if any(key in row for row in record["rows"])]
    notes += [f"No memory for {row['name']}: {row['memory_error']}" for row in record["rows"] if "memory_error" in row]
    if any(row["max"] > 2 * row["min"] for row in record["rows"] if row["unit"] != "ms" or row["median"] > 5):
        notes.append(
            "Some measurements took twice as long as others of the same: was the machine busy with other work?"
        )
    for line in notes:
        console.print(line, soft_wrap=True)


def _heading(record: Mapping[str, Any]) -> list[str]:
    shape = " x ".join(map(str, record["image_shape"]))
    lines = [
        f"{record['config']['model']} for {shape} images, {record['classes']} classes: {record['parameters']:,} "
        f"parameters; {record['forward_gflop_per_image']:.3f} GFLOP per image forward, "
        f"{record['training_gflop_per_image']:.3f} in training",
        f"{record['device']}, threads: {record['threads']} of {record['cores']} cores, load {record['load']:.1f} at "
        f"the start; torch {record['torch']}, capsnet {record['capsnet']} ({record['commit'] or 'installed'})"
        + (f"; computed by {record['kernels']}" if record.get("kernels") else ""),
    ]
    for found in record["variants"]:
        ways = [
            f"{name} {found[name]}"
            for name in ("precision", "routing_kernel", "kernel", "convolution", "stem", "threads")
            if name in found
        ]
        label = f"{found['variant']}: " if found["variant"] else ""
        lines.append(
            f"{label}{', '.join(ways)}; checked on {found['images']} images: {found['result']} is {found['error']:.1e} "
            f"from float64, {found['tolerance']:g} allowed"
        )
    return lines
