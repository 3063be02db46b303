"""A run's report: one HTML file of numbers, figures and how to repeat the run, which loads nothing from elsewhere."""

import base64
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from capsnet import plots
from capsnet.analysis.pose_probe import pose_explained
from capsnet.analysis.reconstruction import Separation, perturb, reconstruct, separate
from capsnet.analysis.routing_trace import evidence
from capsnet.checkpoints.model_card import Card, command_of
from capsnet.config import Config
from capsnet.data import Dataset, Split
from capsnet.data.augment import Augmentation, augment
from capsnet.data.dataset import to_float
from capsnet.errors import InputError
from capsnet.evaluation import Predictions, calibration, predict_split, wilson_interval
from capsnet.files import visible, write_atomically
from capsnet.models import CapsuleNetwork, Network, evaluation_mode
from capsnet.plots.classes import MOST

if TYPE_CHECKING:
    from capsnet.plots.style import Figure

__all__ = ["draw_reconstructions", "drawn_apart", "reconstruction_figure", "render", "result_figures", "write"]

REGRESSED = 3_000  # training images for the regression of pose factors: enough for 192 dimensions in each of 10 classes
ROUTED = 48  # images whose routing is followed
ROUTED_BYTES = 2**28  # that this may take; it is linear in the classes, and an image of a thousand takes 40 MiB
SHEET = 40  # training images drawn as the network gets them
PAIRS = 10  # of classes most often confused
SHOWN = 10  # right and wrong images drawn with their reconstructions


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        heading: its title.
        text: a paragraph below the title, or nothing.
        pictures: rows of pictures, each `source` (a data URI), `alt` and `width` in pixels.
        classes: name, images, wrong images and most frequent wrong prediction of each class, where they are too many
            for the pictures.
        wrong: file, true and predicted class and presence of wrong images, the surest first.
        confused: true class, predicted class, how often, and of how many images, the most frequent first.
    """

    heading: str
    text: str = ""
    pictures: Sequence[Sequence[dict[str, Any]]] = ()
    classes: Sequence[tuple[str, int, int, str]] = ()
    wrong: Sequence[tuple[str, str, str, float]] = ()
    confused: Sequence[tuple[str, str, int, int]] = ()


def result_figures(
    found: Predictions,
    split: Split,
    classes: tuple[str, ...],
    rows: Sequence[Mapping[str, Any]] = (),
    *,
    kept_epoch: int | None = None,
) -> "dict[str, Callable[[], Figure]]":
    """Figures of how a run went and how good its network is, by name; each is drawn when called.

    Without `rows`, those of `metrics.csv`, there are no curves; `kept_epoch` is marked in them.
    """
    makers: dict[str, Callable[[], Figure]] = {
        "class-errors": lambda: plots.class_errors(found, classes),
        "confusion": lambda: plots.confusion(found, classes),
        "lengths": lambda: plots.lengths(found),
        "reliability": lambda: plots.reliability(calibration(found.winning, ~found.wrong)),
        "gallery": lambda: plots.gallery(found, split, classes),
    }
    return {**({"curves": lambda: plots.curves(rows, kept_epoch=kept_epoch)} if rows else {}), **makers}


def render(
    network: Network,
    dataset: Dataset,
    found: Predictions,
    *,
    config: Config,
    card: Card,
    title: str,
    rows: Sequence[Mapping[str, Any]] = (),
    result: Mapping[str, Any] | None = None,
) -> str:
    """The report as one HTML page, titled with the name of the run.

    All is measured on the test split of `dataset`, which `found` are the predictions for, by the network on the CPU.
    `rows` are those of `metrics.csv`; versions, hardware and times are those of `result`, from `result.json`.

    Raises:
        InputError: images of another shape than the network's.
    """
    import jinja2

    split, about = dataset.test, result or {}
    wrong, total = int(found.wrong.sum()), len(split)
    template = files("capsnet.report").joinpath("report.html.j2").read_text(encoding="utf-8")
    page = jinja2.Environment(
        autoescape=True,
        finalize=lambda value: visible(value) if type(value) is str else value,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return page.from_string(template).render(
        title=title,
        network=network,
        dataset=dataset,
        wrong=wrong,
        total=total,
        interval=[100 * end for end in wilson_interval(wrong, total)],
        selection=_sentence(about.get("selection", "").removeprefix("none: ")),
        numbers=list(_numbers(found, card, about)),
        sections=list(_sections(network, dataset, found, rows, config, about.get("kept_epoch"))),
        most=MOST,
        command=command_of(config),
        options=[(name, _shown(value)) for name, value in config.flat().items()],
    )


def _sections(
    network: Network,
    dataset: Dataset,
    found: Predictions,
    rows: Sequence[Mapping[str, Any]],
    config: Config,
    kept_epoch: int | None,
) -> Iterator[Section]:
    split, classes, single = dataset.test, network.classes, network.objects_per_image == 1
    figures = result_figures(found, split, classes, rows, kept_epoch=kept_epoch)
    if single:
        yield _training_images(dataset, config)
    if rows:
        yield Section("Training", pictures=[[_picture(figures["curves"](), "Losses and error by epoch", "svg")]])
    if isinstance(network, CapsuleNetwork) and single:
        yield from _capsules(network, split, found)
    elif isinstance(network, CapsuleNetwork) and network.decoder is not None:
        figure = plots.separations(drawn_apart(network, split, found), classes)
        picture = _picture(figure, "Each of two overlapping objects drawn alone", "png")
        yield Section("Overlapping objects", pictures=[[picture]])
    if split.factors and set(dataset.train.factors) == set(split.factors) and single:
        yield _pose(network, dataset)
    if single:
        yield _errors(figures, found, classes, dataset.names("test") if dataset.files else ())


def _training_images(dataset: Dataset, config: Config) -> Section:
    """Some training images as the network gets them."""
    how = Augmentation.of(config, shift=dataset.shift, crop=dataset.crop, image_shape=dataset.image_shape)
    draw = torch.Generator().manual_seed(config.seed)
    some = dataset.train.take(torch.randperm(len(dataset.train), generator=draw)[:SHEET])
    images = augment(to_float(some.images), how.draw(len(some), generator=draw))
    figure = plots.labelled(images, [dataset.classes[label] for label in some.labels.tolist()])
    text = f"As the network gets them, augmentation included: {how}."
    return Section("Training images", text, [[_picture(figure, "Training images with their classes", "png")]])


def _errors(
    figures: "Mapping[str, Callable[[], Figure]]", found: Predictions, classes: tuple[str, ...], names: Sequence[str]
) -> Section:
    """Where the network errs, and how sure it is; `names` are those of the images, if they have any."""
    wrong = found.wrong.nonzero().flatten()
    surest = wrong[found.winning[wrong].argsort(descending=True)][:MOST].tolist() if names else []
    counts = found.confusion
    off = counts.clone().fill_diagonal_(0).flatten().sort(descending=True, stable=True)
    pairs = [(divmod(place, len(classes)), n) for n, place in zip(*map(Tensor.tolist, off), strict=True) if n]
    many = len(classes) > MOST
    alts = {
        "class-errors": "Error of the worst classes" if many else "Error of each class",
        "confusion": "Most confused pairs" if many else "Confusion matrix",
        "reliability": "Reliability diagram",
        "lengths": "Histogram of winning scores",
    }
    drawn = [_picture(figures[name](), alt, "svg") for name, alt in alts.items()]
    return Section(
        "Errors",
        pictures=[drawn[:2], drawn[2:], [_picture(figures["gallery"](), "Wrong test images", "png")]],
        classes=list(plots.class_rows(found, classes)) if many else (),
        wrong=[
            (names[k], classes[int(found.labels[k])], classes[int(found.predictions[k])], float(found.winning[k]))
            for k in surest
        ],
        confused=[(classes[i], classes[j], n, int(counts[i].sum())) for (i, j), n in pairs[:PAIRS]],
    )


def write(path: Path, network: Network, dataset: Dataset, found: Predictions, **about: Any) -> None:
    """Write the report of a run, whose name is that of the page's folder; arguments as for `render`.

    Raises:
        InputError: the file cannot be written.
    """
    title = path.parent.resolve().name
    content = render(network, dataset, found, title=title, **about)
    write_atomically(path, lambda place: place.write_text(content, encoding="utf-8"))


def draw_reconstructions(network: Network, split: Split, path: Path, *, count: int = 20) -> None:
    """Draw the first images of a split with their reconstructions as a PNG file.

    Raises:
        InputError: no decoder, or the file cannot be written.
    """
    some = split.take(torch.arange(min(count, len(split))))
    plots.save(reconstruction_figure(network, some, count=count), path)


def reconstruction_figure(network: Network, split: Split, *, count: int = SHOWN) -> "Figure":
    """Images with their reconstructions; of several objects, at most `count` of each kind, drawn apart.

    Raises:
        InputError: no decoder.
    """
    if network.objects_per_image > 1:
        parts = drawn_apart(network, split, predict_split(network, split), count=count)
        return plots.separations(parts, network.classes)
    return plots.reconstructions(reconstruct(network, to_float(split.images), split.labels), network.classes)


def drawn_apart(
    network: Network, split: Split, found: Predictions, *, count: int = SHOWN
) -> dict[str, tuple[Separation, torch.Tensor]]:
    """Overlapping objects drawn apart: right images, wrong ones, and some told of a class that is not there.

    Of each kind the first `count` at most, for `plots.separations`. The images show two objects each.
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


def _numbers(found: Predictions, card: Card, result: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    validation = result.get("validation")
    if validation:
        chose = "" if result.get("selection", "none").startswith("none") else ", which chose the epoch"
        yield "validation error", f"{validation['error_percent']:.2f} % of {validation['total']:,} images{chose}"
    errors, limit = found.reconstruction_errors, card.threshold
    if errors is not None:
        yield "reconstruction", f"{float(errors.mean()):.2f}, mean summed squared error per test image"
    if limit and errors is not None:
        share = 100 * limit.share_above(errors)
        yield (
            "flagged as out of distribution",
            f"{share:.2f} % of the test images: reconstruction error above {limit.value:.2f}, which "
            f"{100 * limit.false_alarm_rate:g} % of {limit.images:,} {limit.split} images exceed",
        )
    for key, name in (("epochs", "epochs"), ("train_images", "training images")):
        if count := result.get(key) or getattr(card, key):
            yield name, f"{count:,}"
    if result.get("seconds"):
        yield "training time", f"{result['seconds'] / 60:.1f} minutes"
    for key in ("seed", "precision", "device", "threads", "torch", "capsnet", "commit"):
        if result.get(key) is not None:
            yield key, str(result[key])


def _capsules(network: CapsuleNetwork, split: Split, found: Predictions) -> Iterator[Section]:
    """What the capsules hold."""
    wrong, right = found.wrong.nonzero().flatten(), (~found.wrong).nonzero().flatten()
    if network.decoder is not None:
        figure = reconstruction_figure(network, split.take(torch.cat([right[:SHOWN], wrong[:SHOWN]])))
        yield Section(
            "Reconstructions",
            "What the decoder makes of the longest class capsule, and for wrong images also of that of the true class.",
            [[_picture(figure, "Inputs above their reconstructions", "png")]],
        )
        changed = perturb(network, to_float(split.images[(right if len(right) else wrong)[:1]]))
        yield Section(
            "What each dimension means",
            "Each dimension of the longest capsule's vector changed by itself, and drawn.",
            [[_picture(plots.perturbations(changed, network.classes), "Perturbations", "png")]],
        )
    inputs = to_float(split.images[: _routed(network, to_float(split.images[:1]))])
    routed = evidence(network, inputs)
    figure = plots.couplings(
        routed, inputs, split.labels[: len(inputs)], network.classes, steps=network.routing_steps, show=4
    )
    yield Section(
        "Routing",
        "Where the winning capsule's evidence comes from: the couplings of the primary capsules beside uniform ones, "
        "and what their votes add to the winner's length.",
        [[_picture(figure, "Couplings and support", "png")]],
    )


def _routed(network: CapsuleNetwork, image: torch.Tensor) -> int:
    """Images whose routing is followed: `ROUTED`, but no more than `ROUTED_BYTES` hold, and at least one."""
    with torch.inference_mode(), evaluation_mode(network):
        trace, (_, height, width) = network.trace_routing(image), network.image_shape
    votes = 3 * trace.votes.nbytes  # and what is made of them on the way
    maps = 16 * len(trace.couplings) * len(network.classes) * height * width  # couplings and support, also stacked
    return max(1, min(ROUTED, ROUTED_BYTES // (votes + maps)))


def _pose(network: Network, dataset: Dataset) -> Section:
    train = dataset.shown("train")
    assert train is not None
    fitted = train.take(torch.arange(min(REGRESSED, len(train))))
    try:
        explained = pose_explained(network, fitted, dataset.test)
    except InputError as error:  # too few images of a class: the rest of the report is as good without
        return Section("Pose", f"Not measured: {error}.")
    return Section(
        "Pose",
        f"How much of the true pose the last layer explains: linear regression for each class on "
        f"{explained.train_images:,} training images, judged on {explained.test_images:,} test images.",
        [[_picture(plots.pose_explained({network.config["name"]: explained}), "R2 of each pose factor", "svg")]],
    )


def _picture(figure: "Figure", alt: str, format: str) -> dict[str, Any]:
    kind = {"svg": "image/svg+xml", "png": "image/png"}[format]
    content = base64.b64encode(plots.rendered(figure, format=format)).decode("ascii")
    return {"source": f"data:{kind};base64,{content}", "alt": alt, "width": round(96 * figure.get_size_inches()[0])}


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}." if text else ""


def _shown(value: object) -> str:
    return json.dumps(value) if isinstance(value, bool | list | tuple) or value is None else str(value)
