"""The verb `list`."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal

from tyro.conf import Positional

from capsnet import config
from capsnet.cli.parsing import DataDir
from capsnet.cli.printing import show, show_json, show_table
from capsnet.errors import InputError

if TYPE_CHECKING:
    from capsnet.data.image_cache import Entry

__all__ = ["List"]


@dataclass(frozen=True)
class List:
    """List models, weights, data sets, presets, experiments, or the cache of decoded images.

    Examples:
      capsnet list data
      capsnet list models --json
      capsnet list cache --clear
    """

    what: Positional[Literal["models", "weights", "data", "presets", "experiments", "cache"]]
    """What to list. cache: decoded images of folders (see CAPSNET_CACHE and CAPSNET_CACHE_LIMIT)."""
    data_dir: DataDir = None
    clear: bool = False
    """Remove every cache file that no process uses, and list those."""
    json: bool = False
    """Print as JSON."""

    def run(self, line: str) -> int:
        """Print what there is."""
        makers = {
            "models": _models,
            "weights": _weights,
            "data": lambda: _data(self.data_dir),
            "presets": _presets,
            "experiments": _experiments,
            "cache": _cleared if self.clear else _cache,
        }
        if self.clear and self.what != "cache":
            raise InputError(f"--clear must be given with cache; got it with {self.what}")
        rows = makers[self.what]()
        if self.json:
            show_json(rows)
        elif self.what == "data":
            _show_data(rows)
        else:
            for row in rows:
                (key, name), *rest = row.items()
                show(f"{key}: {name}" if key in ("total", "removed") else name)
                show(*(f"  {key}: {value}" for key, value in rest))
        return 0


def _models() -> list[dict[str, Any]]:
    import torch

    from capsnet import models

    rows: list[dict[str, Any]] = []
    for name in models.available():
        with torch.device("meta"):
            count = models.create(name).parameter_count()
        rows.append({"name": name, "what": models.summary(name), "parameters on MNIST": f"{count:,}"})
    return rows


def _weights() -> list[dict[str, Any]]:
    from capsnet.checkpoints import pretrained

    rows: list[dict[str, Any]] = []
    for name in pretrained.shipped():
        card, folder = pretrained.load_card(name), pretrained.folder_of(name)
        low, high = card.test["interval"]
        rows.append(
            {
                "name": name,
                "trained on": f"{card.train_images:,} images of {card.data}, {card.epochs} epochs",
                "command": card.command,
                "test error": f"{card.test['error_percent']:.2f} % ({card.test['wrong']} of {card.test['total']:,} "
                f"wrong; 95 % interval {low:.2f} to {high:.2f} %)",
                "size": f"{(folder / 'model.safetensors').stat().st_size / 1e6:.1f} MB",
                "folder": str(folder),
            }
        )
    return rows


def _data(data_dir: str | None) -> list[dict[str, Any]]:
    from capsnet import data

    rows: list[dict[str, Any]] = []
    for name in data.available():
        about = data.describe(name, data_dir=data_dir)
        rows.append(
            {
                "name": name,
                "train": about.train,
                "test": about.test,
                "image_shape": list(about.image_shape),
                "classes": list(about.classes),
                "licence": about.licence,
                "source": about.source,
                "missing": list(about.missing),
                "folders": sorted({str(path.parent) for path in about.where}),
            }
        )
    return rows


def _show_data(rows: list[dict[str, Any]]) -> None:
    show_table(
        ("data set", "train", "test", "image", "classes", "on this machine"),
        [
            (
                row["name"],
                f"{row['train']:,}",
                f"{row['test']:,}",
                " x ".join(map(str, row["image_shape"])),
                str(len(row["classes"])),
                "no" if row["missing"] else "yes",
            )
            for row in rows
        ],
    )


def _cache() -> list[dict[str, Any]]:
    from capsnet.data import image_cache

    found = image_cache.entries()
    return [*map(_entry, found), {"total": _size(found), "limit": f"{image_cache.limit() / 2**30:,.1f} GiB"}]


def _cleared() -> list[dict[str, Any]]:
    from capsnet.data import image_cache

    removed, kept = image_cache.clear()
    return [*map(_entry, removed), {"removed": _size(removed), "in use": _size(kept)}]


def _entry(entry: "Entry") -> dict[str, Any]:
    count, *shape = entry.shape
    return {
        "file": str(entry.path),
        "images": f"{count:,} of {' x '.join(map(str, shape))}",
        "size": f"{entry.size / 2**20:,.0f} MiB",
        "last used": datetime.fromtimestamp(entry.used).astimezone().isoformat(" ", "seconds"),
    }


def _size(found: "list[Entry]") -> str:
    return f"{sum(entry.size for entry in found) / 2**20:,.0f} MiB in {len(found)} file{'s' * (len(found) != 1)}"


def _experiments() -> list[dict[str, Any]]:
    from capsnet import experiments

    found = [experiments.experiment(name) for name in experiments.available()]
    return [{"name": one.name, "what": one.title, "rows": ", ".join(row.key for row in one.rows)} for one in found]


def _presets() -> list[dict[str, Any]]:
    about = {
        "paper": "the text of Sabour, Frosst, Hinton 2017; all defaults",
        "fast": "ours: a low error in little time",
        "authors": "the first author's published code, https://github.com/Sarasra/models",
    }
    return [
        {"name": name, "what": about[name], "options": _words(changes), **_of_models(name)}
        for name, changes in config.PRESETS.items()
    ]


def _of_models(preset: str) -> dict[str, str]:
    """What a preset means to single networks beside its options."""
    from capsnet.models import registry

    own = {model: registry.presets(model).get(preset) for model in registry.available()}
    return {f"with --model {model}": _words(changes) for model, changes in own.items() if changes}


def _words(changes: Mapping[str, Any]) -> str:
    """Options as they are typed."""
    words = list[str]()
    for name, value in changes.items():
        values = () if value is True else value if isinstance(value, tuple) else (value,)
        words.append(f"--{name.replace('_', '-')}")
        words += [f"{each:g}" if isinstance(each, float) else str(each) for each in values]
    return " ".join(words)
