"""A run's report: one HTML file of numbers, figures and how to repeat the run, which loads nothing from elsewhere."""

import base64
import html
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from capsnet import plots
from capsnet.analysis.couplings import evidence
from capsnet.analysis.drawing import Separation, perturb, reconstruct, separate
from capsnet.analysis.factors import pose_explained
from capsnet.card import Card, command_of
from capsnet.config import Config
from capsnet.data import Dataset, Split
from capsnet.data.dataset import to_float
from capsnet.errors import InputError
from capsnet.evaluation import Predictions, calibration, predict_split, wilson_interval
from capsnet.models import CapsuleNetwork, Network
from capsnet.names import visible
from capsnet.plots.classes import MOST
from capsnet.runs import write_atomically

if TYPE_CHECKING:
    from capsnet.plots.figure import Figure

__all__ = ["draw_reconstructions", "drawn_apart", "report", "result_figures", "write"]

REGRESSED = 3_000  # training images for the regression of pose factors: enough for 192 dimensions in each of 10 classes
ROUTED = 48  # images whose routing is followed
ROUTED_BYTES = 2**28  # that this may take; it is linear in the classes, and an image of a thousand takes 40 MiB
SHOWN = 10  # right and wrong images drawn with their reconstructions

STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --dim: #5d6876; --line: #d7dde4; --ground: #ffffff; --tint: #f3f5f8; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6eaf0; --dim: #9aa6b4; --line: #333c48; --ground: #14181e; --tint: #1d232b; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 1.5rem 1rem 4rem; background: var(--ground); color: var(--ink);
  font: 16px/1.55 system-ui, sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.6rem 0 .4rem; padding-top: .8rem; border-top: 1px solid var(--line); }
p { margin: .4rem 0; max-width: 46rem; } .dim { color: var(--dim); }
.result { font-size: 2.2rem; font-weight: 650; letter-spacing: -.02em; margin: 1rem 0 0; }
figure { margin: 1rem 0; overflow-x: auto; }
figure img { max-width: 100%; height: auto; background: #fff; border-radius: 6px; padding: 6px; }
.pair { display: flex; flex-wrap: wrap; gap: 0 1rem; } .pair figure { flex: 1 1 20rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .6rem 0; }
th, td { text-align: left; padding: .25rem .9rem .25rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 550; color: var(--dim); } td { overflow-wrap: anywhere; }
pre { background: var(--tint); padding: .7rem .9rem; border-radius: 6px; overflow-x: auto; font-size: .87rem; }
summary { cursor: pointer; color: var(--dim); }
@media screen and (max-width: 40rem) { figure img { max-width: max(100%, 36rem); } }
@media print { :root { --ink: #000; --dim: #444; --line: #bbb; --ground: #fff; --tint: #f4f4f4; }
  body { max-width: none; padding: 0; font-size: 11pt; }
  figure, table { break-inside: avoid; } h2 { break-after: avoid; } }
"""


def result_figures(
    found: Predictions, split: Split, classes: tuple[str, ...], rows: Sequence[Mapping[str, Any]] = ()
) -> "dict[str, Callable[[], Figure]]":
    """Figures of how a run went and how good its network is, by name; each is drawn when called.

    Args:
        found: of `split`.
        split: the images.
        classes: names of the classes.
        rows: of `metrics.csv`; without them there are no curves.
    """
    makers: dict[str, Callable[[], Figure]] = {
        "class-errors": lambda: plots.class_errors(found, classes),
        "confusion": lambda: plots.confusion(found, classes),
        "lengths": lambda: plots.lengths(found),
        "reliability": lambda: plots.reliability(calibration(found.winning, ~found.wrong)),
        "gallery": lambda: plots.gallery(found, split, classes),
    }
    return {**({"curves": lambda: plots.curves(rows)} if rows else {}), **makers}


def report(
    network: Network,
    dataset: Dataset,
    *,
    config: Config,
    card: Card,
    title: str,
    rows: Sequence[Mapping[str, Any]] = (),
    result: Mapping[str, Any] | None = None,
) -> str:
    """The report as one HTML page.

    Args:
        network: trained, on the CPU.
        dataset: what it was trained on; its test split is what all is measured on.
        config: of the run.
        card: of the weights.
        title: of the page: the run's name.
        rows: of `metrics.csv`.
        result: of `result.json`, for versions, hardware and times.

    Raises:
        InputError: images of another shape than the network's.
    """
    split, classes = dataset.test, network.classes
    found = predict_split(network, split, config=config)
    wrong, total = int(found.wrong.sum()), len(split)
    low, high = (100 * end for end in wilson_interval(wrong, total))
    makers = result_figures(found, split, classes, rows)
    figures = {name: make() for name, make in makers.items() if network.objects_per_image == 1 or name == "curves"}
    what = f"{dataset.tested} error" if network.objects_per_image == 1 else f"exact-set {dataset.tested} error"
    chosen = "nothing was chosen on the test images" if dataset.tested == "test" else "there are no test images"
    body = [
        f"<h1>{_text(title)}</h1>",
        f'<p class="dim">{_text(network.config["name"])}, {network.parameter_count():,} parameters, '
        f"on {_text(dataset.name)}</p>",
        f'<p class="result">{100 * wrong / total:.2f} % {what}</p>',
        f"<p>{wrong:,} of {total:,} {dataset.tested} images wrong; 95 % interval {low:.2f} to {high:.2f} %. Weights "
        f"after the last epoch; {chosen}.</p>",
        _table(_numbers(found, card, result or {})),
    ]
    if rows:
        body += ["<h2>Training</h2>", _figure(figures["curves"], "Losses and error by epoch", "svg")]
    if isinstance(network, CapsuleNetwork) and network.objects_per_image == 1:
        body += _capsules(network, split, found)
    elif isinstance(network, CapsuleNetwork) and network.decoder is not None:
        figure = plots.separations(drawn_apart(network, split, found), classes)
        body += ["<h2>Overlapping objects</h2>", _figure(figure, "Each of two overlapping objects drawn alone", "png")]
    if split.factors and set(dataset.train.factors) == set(split.factors) and network.objects_per_image == 1:
        body += _pose(network, dataset)
    if network.objects_per_image == 1:
        body += _errors(figures, found, classes)
    body += [
        "<h2>How to repeat it</h2>",
        f"<pre>{_text(command_of(config))}</pre>",
        "<details><summary>All options of the run</summary>",
        _table({name: _shown(value) for name, value in asdict(config).items()}.items()),
        "</details>",
    ]
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{_text(title)}</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n" + "\n".join(body) + "\n</body>\n</html>\n"
    )


def _errors(figures: "Mapping[str, Figure]", found: Predictions, classes: tuple[str, ...]) -> list[str]:
    """Section of where the network errs, and how sure it is."""
    many = len(classes) > MOST
    note = (
        f"<p>There are {len(classes):,} classes: the figures show the {MOST} with the largest error and the {MOST} "
        "pairs that are confused most often; the table has all classes.</p>"
    )
    return [
        "<h2>Errors</h2>",
        *([note] if many else []),
        '<div class="pair">',
        _figure(figures["class-errors"], "Error of the worst classes" if many else "Error of each class", "svg"),
        _figure(figures["confusion"], "Most confused pairs" if many else "Confusion matrix", "svg"),
        "</div>",
        *([_class_table(found, classes)] if many else []),
        '<div class="pair">',
        _figure(figures["reliability"], "Reliability diagram", "svg"),
        _figure(figures["lengths"], "Histogram of winning scores", "svg"),
        "</div>",
        _figure(figures["gallery"], "Wrong test images", "png"),
    ]


def write(path: Path, network: Network, dataset: Dataset, *, config: Config, card: Card, **about: Any) -> None:
    """Write the report of a run, whose name is that of the page's folder; arguments as for `report`.

    Raises:
        InputError: the file cannot be written.
    """
    title = path.parent.resolve().name
    content = report(network, dataset, config=config, card=card, title=title, **about)
    write_atomically(path, lambda place: place.write_text(content, encoding="utf-8"))


def draw_reconstructions(network: Network, split: Split, path: Path, *, count: int = 20) -> None:
    """Draw the first images of a split with their reconstructions as a PNG file.

    Raises:
        InputError: no decoder, or the file cannot be written.
    """
    some = split.take(torch.arange(min(count, len(split))))
    if network.objects_per_image > 1:
        parts = drawn_apart(network, some, predict_split(network, some), count=count)
        plots.save(plots.separations(parts, network.classes), path)
        return
    plots.save(plots.reconstructions(reconstruct(network, to_float(some.images), some.labels), network.classes), path)


def drawn_apart(
    network: Network, split: Split, found: Predictions, *, count: int = SHOWN
) -> dict[str, tuple[Separation, torch.Tensor]]:
    """Overlapping objects drawn apart: right images, wrong ones, and some told of a class that is not there.

    Args:
        network: with a decoder.
        split: images of two objects.
        found: predictions for these images.
        count: images of each kind, at most: the first ones.

    Returns:
        For `plots.separations`.
    """
    wrong, right = found.wrong.nonzero().flatten()[:count], (~found.wrong).nonzero().flatten()[:count]
    true, said = split.labels, found.predictions
    absent = (true[right] + 1) % len(network.classes)  # the next class, or the one after where that is there
    absent = torch.where(absent[:, 1] == true[right, 0], (absent[:, 1] + 1) % len(network.classes), absent[:, 1])
    asked = {
        "Right": (right, true[right]),
        "Wrong, drawn as predicted": (wrong, said[wrong]),
        "Wrong, drawn as what is there": (wrong, true[wrong]),
    }
    if len(network.classes) > 2:
        asked["Told of an object that is not there"] = (right, torch.stack([true[right, 0], absent], dim=1))
    return {
        heading: (separate(network, to_float(split.images[index]), classes), true[index])
        for heading, (index, classes) in asked.items()
        if len(index)
    }


def _numbers(found: Predictions, card: Card, result: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    validation = result.get("validation")
    if validation:
        yield "validation error", f"{validation['error_percent']:.2f} % of {validation['total']:,} images"
    errors, limit = found.reconstruction_errors, card.threshold
    if errors is not None:
        yield "reconstruction", f"{float(errors.mean()):.2f} summed squared error a test image, mean"
    if limit and errors is not None:
        share = 100 * float((errors > limit.value).double().mean())
        yield (
            "flagged as strangers",
            f"{share:.2f} % of the test images: reconstruction error above {limit.value:.2f}, which "
            f"{100 * limit.false_alarm_rate:g} % of {limit.images:,} {limit.split} images exceed",
        )
    for key, name in (("epochs", "epochs"), ("train_images", "training images")):
        if result.get(key) or getattr(card, key):
            yield name, f"{result.get(key) or getattr(card, key):,}"
    if result.get("seconds"):
        yield "training time", f"{result['seconds'] / 60:.1f} minutes"
    for key in ("seed", "precision", "device", "threads", "torch", "capsnet", "commit"):
        if result.get(key) is not None:
            yield key, str(result[key])


def _capsules(network: CapsuleNetwork, split: Split, found: Predictions) -> list[str]:
    """Sections of what the capsules hold."""
    body: list[str] = []
    wrong, right = found.wrong.nonzero().flatten(), (~found.wrong).nonzero().flatten()
    if network.decoder is not None:
        index = torch.cat([right[:SHOWN], wrong[:SHOWN]])
        drawn = reconstruct(network, to_float(split.images[index]), split.labels[index])
        body += [
            "<h2>Reconstructions</h2>",
            "<p>What the decoder makes of the longest class capsule; for wrong images also of the capsule of the true "
            "class.</p>",
            _figure(plots.reconstructions(drawn, network.classes), "Inputs above their reconstructions", "png"),
            "<h2>What each dimension means</h2>",
            "<p>Each dimension of the longest capsule's vector changed by itself, and drawn.</p>",
        ]
        one = (right if len(right) else wrong)[:1]
        changed = perturb(network, to_float(split.images[one]))
        body.append(_figure(plots.perturbations(changed, network.classes), "Perturbations", "png"))
    inputs = to_float(split.images[: _routed(network, to_float(split.images[:1]))])
    routed = evidence(network, inputs)
    figure = plots.couplings(routed, inputs, split.labels[: len(inputs)], network.classes, show=4)
    return [
        *body,
        "<h2>Routing</h2>",
        "<p>Where the winning capsule's evidence comes from: the couplings of the primary capsules beside uniform "
        "ones, and what their votes add to the winner's length.</p>",
        _figure(figure, "Couplings and support by routing iteration", "png"),
    ]


def _routed(network: CapsuleNetwork, image: torch.Tensor) -> int:
    """Images whose routing is followed: `ROUTED`, but no more than `ROUTED_BYTES` hold, and at least one."""
    with torch.inference_mode():
        trace, (_, height, width) = network.trace_routing(image), network.image_shape
    votes = 3 * trace.votes.nbytes  # and what is made of them on the way
    maps = 16 * len(trace.couplings) * len(network.classes) * height * width  # couplings and support, also stacked
    return max(1, min(ROUTED, ROUTED_BYTES // (votes + maps)))


def _pose(network: Network, dataset: Dataset) -> list[str]:
    train = dataset.shown("train")
    assert train is not None
    fitted = train.take(torch.arange(min(REGRESSED, len(train))))
    try:
        explained = pose_explained(network, fitted, dataset.test)
    except InputError as error:  # too few images of a class: the rest of the report is as good without
        return ["<h2>Pose</h2>", f"<p>Not measured: {_text(error)}.</p>"]
    return [
        "<h2>Pose</h2>",
        f"<p>How much of the true pose the last layer explains: linear regression for each class on "
        f"{explained.train_images:,} training images, judged on {explained.test_images:,} test images.</p>",
        _figure(plots.factors({network.config["name"]: explained}), "R2 of each pose factor", "svg"),
    ]


def _figure(figure: "Figure", alt: str, format: str) -> str:
    kind = {"svg": "image/svg+xml", "png": "image/png"}[format]
    content = base64.b64encode(plots.rendered(figure, format=format)).decode("ascii")
    width = round(96 * figure.get_size_inches()[0])
    return f'<figure><img src="data:{kind};base64,{content}" alt="{_text(alt)}" width="{width}"></figure>'


def _class_table(found: Predictions, classes: tuple[str, ...]) -> str:
    """A line for each class."""
    heads = ("class", "images", "wrong", "error, %", "most often taken for")
    rows = [
        (name, f"{images:,}", f"{wrong:,}", f"{100 * wrong / images:.2f}" if images else "-", taken or "-")
        for name, images, wrong, taken in plots.class_rows(found, classes)
    ]
    lines = "".join(f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in row)}</tr>" for row in rows)
    head = "".join(f"<th>{cell}</th>" for cell in heads)
    return (
        f'<details><summary>All {len(classes):,} classes</summary><div class="wide"><table><tr>{head}</tr>{lines}'
        "</table></div></details>"
    )


def _table(rows: Iterable[tuple[str, str]]) -> str:
    cells = "".join(f"<tr><th>{_text(name)}</th><td>{_text(value)}</td></tr>" for name, value in rows)
    return f'<div class="wide"><table>{cells}</table></div>'


def _shown(value: object) -> str:
    return json.dumps(value) if isinstance(value, bool | list | tuple) or value is None else str(value)


def _text(value: object) -> str:
    return html.escape(visible(str(value)))
