import io
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageSequence

from capsnet import plots
from capsnet.analysis.pose_probe import PoseExplained
from capsnet.analysis.reconstruction import Separation, perturb, reconstruct
from capsnet.analysis.routing_trace import evidence
from capsnet.data import Split
from capsnet.errors import InputError
from capsnet.evaluation import Predictions, calibration
from capsnet.evaluation.statistics import wilson_interval
from capsnet.models import create
from capsnet.models.capsnet import CapsNet
from capsnet.plots.style import new, pixels, sheet
from tiny import SIZES

NAMES = ("a $5 $6", "日本語", "a name that is far too long for the little room above an image")


def network(channels: int = 1) -> CapsNet:
    torch.manual_seed(0)
    made = create("capsnet", image_shape=(channels, 12, 13), num_classes=3, classes=NAMES, **SIZES).eval()
    assert isinstance(made, CapsNet)
    return made


def images(count: int, channels: int = 1) -> torch.Tensor:
    return torch.rand(count, channels, 12, 13, generator=torch.Generator().manual_seed(1))


def opened(figure: Figure) -> Image.Image:
    """The figure as a picture, which must hold ink on white."""
    picture = Image.open(io.BytesIO(plots.rendered(figure)))
    low, high = picture.convert("L").getextrema()
    assert isinstance(low, int)
    assert low < 60
    assert high == 255
    return picture


def texts(figure: Figure) -> str:
    """All that is written in the figure."""
    return plots.rendered(figure, format="svg").decode()


def found(wrong: int, count: int = 20) -> Predictions:
    labels = torch.arange(count) % 3
    predictions = (labels + (torch.arange(count) < wrong)) % 3
    scores = torch.full((count, 3), 0.1).scatter(1, predictions[:, None], 0.9)
    return Predictions(scores, labels, predictions, torch.zeros(count, 3), torch.rand(count))


@pytest.mark.parametrize(("channels", "count"), [(1, 1), (3, 23)])
def test_reconstructions_draws_right_and_wrong_apart(channels: int, count: int) -> None:
    one = network(channels)
    predictions = one(images(count, channels)).scores.argmax(-1)
    labels = torch.where(torch.arange(count) % 3 == 1, (predictions + 1) % 3, predictions)
    figure = plots.reconstructions(reconstruct(one, images(count, channels), labels), NAMES)
    opened(figure)
    told = texts(figure)
    wrong = int((torch.arange(count) % 3 == 1).sum())
    assert f"Right ({count - wrong} shown)" in told
    assert (f"Wrong ({wrong} shown)" in told) == ("from true class" in told) == bool(wrong)


def test_the_pictures_in_a_sheet_are_the_images() -> None:
    shown = images(6, 3).reshape(2, 3, 3, 12, 13)
    joined = pixels(sheet(shown))
    assert joined.shape == (2 * 12 + 2, 3 * 13 + 2 * 2, 3)
    np.testing.assert_array_equal(joined[14:, 15:28], shown[1, 1].permute(1, 2, 0).numpy())
    assert (joined[12:14] == 1).all()
    assert pixels(sheet(images(1)[None])).shape == (12, 13)


@pytest.mark.parametrize(("count", "steps"), [(1, 3), (3, 11)])
def test_perturbations_has_a_row_for_each_dimension(count: int, steps: int) -> None:
    result = perturb(network(), images(count), span=0.5, steps=steps)
    figure = plots.perturbations(result, NAMES)
    opened(figure)
    told = texts(figure)
    assert told.count("change of the dimension") == sum(axes.axison for axes in figure.axes) == count
    assert told.count("+0.50") == count


def test_sweep_swings_forth_and_back() -> None:
    result = perturb(network(3), images(2, 3), steps=5)
    with Image.open(io.BytesIO(plots.sweep(result, zoom=1))) as animation:
        frames = [np.asarray(frame.convert("RGB"), dtype=float) / 255 for frame in ImageSequence.Iterator(animation)]
    assert len(frames) == 8  # 0, +, ++, +, 0, -, --, -
    assert frames[0].shape == (2 * 12 + 2, 4 * 13 + 3 * 2, 3)
    middle = pixels(sheet(result.images[:, :, 2]))
    assert np.abs(frames[0] - middle).mean() < 0.03  # a palette of 256 colours
    assert np.abs(frames[2] - pixels(sheet(result.images[:, :, 4]))).mean() < 0.03


@pytest.mark.parametrize("iterations", [1, 3])
def test_couplings_draws_every_iteration(iterations: int) -> None:
    one = create("capsnet", image_shape=(1, 12, 13), num_classes=3, routing_iterations=iterations, **SIZES).eval()
    assert isinstance(one, CapsNet)
    found, labels = evidence(one, images(4)), torch.tensor([0, 1, 2, 0])
    figure = plots.couplings(found, images(4), labels, NAMES, show=2)
    opened(figure)
    told = texts(figure)
    assert "n = 4 images" in told
    assert ("support, 3" if iterations == 3 else "support") in told
    assert ("coupling, 2" in told) == (iterations > 1)
    assert ("iteration" in told) == (iterations > 1)
    if iterations == 3:
        steps = ("uniform", "b", "c")
        named = plots.couplings(found, images(4), labels, NAMES, show=2, steps=steps)
        titles = [axes.get_title() for axes in named.axes]
        assert [f"support,\n{step}" for step in steps] == [title for title in titles if title.startswith("support")]
        with pytest.raises(InputError, match="steps must be 3, as many as the routing has; got 1"):
            plots.couplings(found, images(4), labels, NAMES, steps=("uniform",))
        assert "iteration" not in texts(named)


def test_factors_names_networks_and_factors() -> None:
    def explained(dim: int) -> PoseExplained:
        r2 = ((0.9, 0.8), (-0.1, 0.2))
        return PoseExplained(("slant_degrees", "x_pixels"), ("0", "1"), r2, (((0.3,) * dim,) * 2,) * 2, dim, 100, 20)

    figure = plots.pose_explained({"capsnet": explained(16), "baseline": explained(192)})
    opened(figure)
    told = texts(figure)
    assert "capsnet: 16 dimensions" in told
    assert "baseline: 192 dimensions" in told
    assert "slant degrees" in told
    assert "n = 20 test images" in told
    assert told.count("R2 of each dimension alone") == 1  # 192 are too many for a heat map


def test_curves_of_training_and_validation() -> None:
    def row(epoch: int, **more: float) -> dict[str, float]:
        columns = ("loss", "classification_loss", "reconstruction_loss", "error_percent")
        return {"epoch": epoch, **{f"train_{name}": 1 / epoch for name in columns}, **more}

    figure = plots.curves([row(1), row(2)])
    opened(figure)
    assert "validation" not in texts(figure)
    held_out = {f"validation_{name}": 0.5 for name in ("loss", "classification_loss", "error_percent")}
    told = texts(plots.curves([row(1, train_reconstruction_loss=0, **held_out)]))
    assert "validation" in told
    assert "Reconstruction loss" not in told  # there was none
    assert "kept" not in told
    marked = plots.curves([row(1), row(2)], kept_epoch=1)
    assert "kept: epoch 1" in texts(marked)
    assert all(np.array_equal(axes.lines[-1].get_xdata(), [1, 1]) for axes in marked.axes)


@pytest.mark.parametrize("wrong", [0, 1, 14])
def test_figures_of_results_tell_n(wrong: int) -> None:
    predictions = found(wrong)
    split = Split((images(20) * 255).to(torch.uint8), predictions.labels)
    figures = {
        "n = 20": plots.class_errors(predictions, NAMES),
        "number of images, n = 20": plots.confusion(predictions, NAMES),
        f"n = {20 - wrong}": plots.lengths(predictions),
        "expected calibration error": plots.reliability(calibration(predictions.winning, ~predictions.wrong)),
        f"All {wrong} wrong images of n = 20" if wrong else "No image of n = 20 is wrong": plots.gallery(
            predictions, split, NAMES
        ),
    }
    for expected, figure in figures.items():
        opened(figure)
        assert expected in texts(figure)


def test_numbers_of_images_are_plain_where_dollars_are_no_formulas() -> None:
    many = found(wrong=3, count=1_200)
    for figure in (plots.lengths(many), plots.reliability(calibration(many.winning, ~many.wrong))):
        told = texts(figure)
        assert "mathdefault" not in told
        assert ">1</text>" in told or ">10</text>" in told  # where the ticks are is for matplotlib to say


def test_a_gallery_shows_the_surest_and_tells_how_many_there_are() -> None:
    predictions = found(9)
    predictions.scores[4] = torch.tensor([0.05, 0.2, 0.99])
    split = Split((images(20) * 255).to(torch.uint8), predictions.labels)
    told = texts(plots.gallery(predictions, split, NAMES, most=1))
    assert "The surest 1 of 9 wrong images" in told
    assert "0.99" in told


def test_a_file_tells_the_command_and_is_the_same_every_time(tmp_path: Path) -> None:
    figure = plots.lengths(found(3))
    command = "capsnet plot lengths runs/x"
    path = plots.save(figure, tmp_path / "new" / "a.png", command=command)
    with Image.open(path) as picture:
        assert picture.info["Description"] == command
    assert command in plots.rendered(figure, format="svg", command=command).decode()
    assert command.encode() in plots.rendered(figure, format="pdf", command=command)
    for format in plots.FORMATS:
        again = [plots.rendered(plots.lengths(found(3)), format=format) for _ in range(2)]
        assert again[0] == again[1]
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(("width", "height"), [(541, 2), (2, 541), (101, 101)])
def test_a_figure_that_no_memory_holds_is_refused(width: float, height: float) -> None:
    with pytest.raises(InputError, match=rf"^figure must be .* got {width} x {height} \(draw fewer images\)$"):
        new(width, height)


def of_classes(count: int) -> tuple[Predictions, tuple[str, ...]]:
    """Two images of each class; class k of every seventh is taken for k + 1 twice, of every third for k + 2 once."""
    labels = torch.arange(count).repeat_interleave(2)
    said = labels.clone()
    for k in range(0, count - 2, 3):
        said[2 * k] = k + 2
    for k in range(0, count - 2, 7):
        said[2 * k : 2 * k + 2] = k + 1
    found = Predictions(torch.zeros(2 * count, count), labels, said, torch.zeros(2 * count, 3), None)
    return found, tuple(f"name{k}" for k in range(count))


@pytest.mark.parametrize("draw", [plots.confusion, plots.class_errors])
def test_no_figure_grows_with_the_number_of_classes(draw: Callable[[Predictions, tuple[str, ...]], Figure]) -> None:
    size = [draw(*of_classes(count)).get_size_inches().prod() for count in (30, 31, 300, 3_000)]
    assert size[1] <= 1.1 * max(size[0], 60)
    assert size[2] == size[3]


def test_of_many_classes_the_worst_are_shown_and_the_figure_says_so() -> None:
    told = texts(plots.class_errors(*of_classes(100)))
    assert "Error of the 30 worst of 100 classes, n = 200 images" in told
    assert told.count("2 of 2<") == 14
    assert told.count("1 of 2<") == 16
    told = texts(plots.confusion(*of_classes(100)))
    assert "The 30 most confused of 42 pairs of 100 classes, 56 wrong images of n = 200" in told
    assert "name7, taken for name8" in told
    few = of_classes(30)
    assert "worst" not in texts(plots.class_errors(*few))
    assert "predicted class" in texts(plots.confusion(*few))
    right, names = of_classes(40)
    assert "The 0 most confused of 0 pairs" in texts(plots.confusion(right._replace(predictions=right.labels), names))


def test_confused_pairs_are_those_of_the_matrix() -> None:
    predictions, names = of_classes(50)
    matrix = predictions.confusion.fill_diagonal_(0)
    pairs = plots.confused(predictions)
    assert {(i, j): n for i, j, n in pairs} == {(i, j): int(matrix[i, j]) for i, j in matrix.nonzero().tolist()}
    assert [n for *_, n in pairs] == sorted((n for *_, n in pairs), reverse=True)
    rows = list(plots.class_rows(predictions, names))
    assert rows[:4] == [
        ("name0", 2, 2, "name1 (2)"),
        ("name1", 2, 0, ""),
        ("name2", 2, 0, ""),
        ("name3", 2, 1, "name5 (1)"),
    ]


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(InputError, match=r"^format must be one of png, svg, pdf; got 'gif'$"):
        plots.rendered(plots.lengths(found(3)), format="gif")


def test_the_style_of_the_process_is_left_alone() -> None:
    before = dict(mpl.rcParams)
    plots.rendered(plots.lengths(found(3)))
    assert dict(mpl.rcParams) == before


def separation(count: int, classes: list[list[int]], channels: int = 1) -> Separation:
    generator = torch.Generator().manual_seed(7)
    drawn = torch.rand(count, 2, channels, 12, 13, generator=generator)
    return Separation(images(count, channels), torch.tensor(classes), drawn, torch.rand(count, 2))


@pytest.mark.parametrize("channels", [1, 3])
def test_separations_shows_input_both_and_each_object_in_its_colour(channels: int) -> None:
    found = separation(2, [[0, 1], [1, 2]], channels)
    figure = plots.separations({"Some": (found, found.classes)}, NAMES)
    opened(figure)
    (axes,) = figure.axes
    shown = np.asarray(axes.images[0].get_array())
    assert shown.shape == (4 * 12 + 3 * 2, 2 * 13 + 2, 3)
    rows = [slice(14 * k, 14 * k + 12) for k in range(4)]
    orange, blue = np.array([1.0, 0.62, 0.10]), np.array([0.12, 0.47, 1.0])
    for n, columns in enumerate((slice(0, 13), slice(15, 28))):
        grey = found.images[n].mean(0).numpy()[..., None]
        one, two = (found.drawn[n, k].mean(0).numpy()[..., None] for k in (0, 1))
        expected = (grey * np.ones(3), np.minimum(one * orange + two * blue, 1), one * orange, two * blue)
        for row, picture in zip(rows, expected, strict=True):
            np.testing.assert_allclose(shown[row, columns], picture, atol=1e-6)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["input", "both drawn", "first", "second"]


def test_separations_stars_the_classes_that_are_not_there() -> None:
    right, wrong = separation(1, [[1, 0]]), separation(3, [[0, 2], [2, 1], [1, 2]])
    there = torch.tensor([[0, 1], [1, 2], [0, 2]])
    none = (separation(1, [[0, 1]]), torch.zeros(0, 2, dtype=torch.int64))
    names = ("a $5", "b", "a very long name")
    figure = plots.separations({"Right": (right, torch.tensor([[0, 1]])), "None": none, "Wrong": (wrong, there)}, names)
    opened(figure)
    one, other = figure.axes
    assert (one.get_title(loc="left"), other.get_title(loc="left")) == ("Right", "Wrong")
    assert [label.get_text() for label in one.get_xticklabels()] == ["T a $5, b\nD b, a $5"]
    assert [label.get_text() for label in other.get_xticklabels()] == [
        "T a $5, b\nD a $5, a very l…*",
        "T b, a very l…\nD a very l…, b",
        "T a $5, a very l…\nD b*, a very l…",
    ]
    blank = np.asarray(one.images[0].get_array())[:, 15:]
    assert (blank == 1).all(), "fewer images than in the widest part leave white"


def test_errors_by_factor_are_those_of_each_bin_with_their_intervals() -> None:
    shift = torch.tensor([-4.0, -4.0, -3.5, -1.0, -0.5, 3.0, 4.0, 4.0])
    wrong = {
        "capsnet": torch.tensor([True, False, False, False, False, True, True, True]),
        "baseline": torch.tensor([True, True, True, True, True, False, False, False]),
    }
    factors = {"shift_pixels": shift, "constant": torch.ones(8), "scale": torch.arange(8.0)}
    figure = plots.errors_by_factor(wrong, factors, bins=4)
    opened(figure)
    drawn = [axes for axes in figure.axes if axes.axison]
    assert [axes.get_xlabel() for axes in drawn] == ["shift pixels", "scale"]
    for (line, _, (bars,)), (right, percent) in zip(
        drawn[0].containers,
        (([(1, 3), (0, 2), (3, 3)], [100 / 3, 0, 100]), ([(3, 3), (2, 2), (0, 3)], [100, 100, 0])),
        strict=True,
    ):  # no image is in the third bin, from 0 to 2
        assert line.get_xdata().tolist() == [-3.0, -1.0, 3.0]
        assert line.get_ydata().tolist() == pytest.approx(percent)
        ends = [(low[1], high[1]) for low, high in bars.get_segments()]
        assert ends == [pytest.approx([100 * end for end in wilson_interval(*counts)]) for counts in right]
    told = texts(figure)
    assert "Error by true pose factor, 8 images" in told
    assert told.count("capsnet</text>") == told.count("baseline</text>") == 1
    assert "constant" not in told


def test_errors_by_factor_share_an_axis_that_holds_them_all() -> None:
    ramp = torch.linspace(0, 1, 1000)
    wrong = ramp > 0.9  # by the second factor all or nothing, by the first a tenth everywhere
    factors = {"noise": torch.rand(1000, generator=torch.Generator().manual_seed(0)), "ramp": ramp}
    figure = plots.errors_by_factor({"one": wrong}, factors, bins=10)
    opened(figure)
    limits = {axes.get_ylim() for axes in figure.axes}
    assert len(limits) == 1
    assert min(limits)[0] == 0
    assert min(limits)[1] > 100


def test_errors_by_factor_fill_rows_of_three() -> None:
    factors = {f"factor_{k}": torch.rand(9) for k in range(4)}
    figure = plots.errors_by_factor({"one": torch.arange(9) > 4}, factors)
    opened(figure)
    assert [axes.get_xlabel() for axes in figure.axes if axes.axison] == [f"factor {k}" for k in range(4)]
    assert [axes.get_ylabel() for axes in figure.axes if axes.axison] == ["wrong images, %", "", "", "wrong images, %"]
