"""What the verbs that look at a trained network share: the network, the images, and where a figure goes."""

import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, arg

from capsnet.cli.printing import say
from capsnet.config import Config
from capsnet.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from capsnet.card import Card
    from capsnet.data import Dataset, Split
    from capsnet.models import Network
    from capsnet.plots.figure import Figure

__all__ = ["Look", "Model", "Subject", "some"]

Model = Positional[Annotated[str, arg(metavar="MODEL")]]


@dataclass(frozen=True)
class Look:
    """Options of every command that draws a figure of a trained network."""

    model: Model
    """Run directory, folder with weights, or the name of weights that come with the package."""
    data: str | None = None
    """Another data set or folder, read as the network's own was."""
    data_dir: str | None = None
    """Where downloaded files are."""
    split: Literal["test", "validation", "train"] = "test"
    """Which part of the data set."""
    format: Literal["png", "svg", "pdf"] = "png"
    """Of the figure."""
    out: str | None = None
    """Where it goes; default: figures/ of the run directory, else the working directory."""
    overwrite: bool = False
    """Replace the file --out."""
    json: bool = False
    """Print the numbers as JSON."""

    def __post_init__(self) -> None:
        if self.out is not None:  # before anything is computed
            _check_free(Path(self.out), overwrite=self.overwrite)


class Subject:
    """A trained network as a command names it.

    Args:
        model: run directory, folder with weights, or name of weights that come with the package.
        several: whether its images may show several objects each.

    Attributes:
        model: as given.
        folder: where its weights are.
        network: on the CPU, in evaluation mode.
        card: what is told of it; empty where nothing is.
    """

    model: str
    folder: Path
    network: "Network"
    card: "Card"

    def __init__(self, model: str, *, several: bool = False) -> None:
        from capsnet import runs

        self.model, self.folder = model, runs.folder_of(model)
        self.network, self.card = runs.load(model), runs.load_card(model)
        if self.network.objects > 1 and not several:
            raise InputError(f"{model} must be of images that show one object each; it finds {self.network.objects}")
        run = runs.Run(self.folder)
        self._config = run.config() if run.config_path.exists() else self.card.trained() if self.card.config else None

    @property
    def is_run(self) -> bool:
        """Whether it is a run directory, where its figures then go."""
        from capsnet import runs

        return runs.Run(self.folder).config_path.exists()

    def trained(self, data: str | None = None) -> Config:
        """The configuration it was trained with; for other weights, one that reads `data` in their images' shape.

        Raises:
            InputError: it is not known, and `data` is not given.
        """
        if self._config is not None:
            return self._config
        if data is None:
            raise InputError(f"--data must be given for {self.model}, which does not say what it was trained on")
        channels, height, width = self.network.image_shape
        return Config(image_size=height if height == width else None, channels=channels)

    def dataset(
        self, data: str | None = None, data_dir: str | None = None, *, held_out: bool = True, any_will_do: bool = False
    ) -> "Dataset":
        """Its data set, or `data` read as its own was.

        Args:
            data: another data set or folder.
            data_dir: where downloaded files are.
            held_out: with the validation split of the run.
            any_will_do: where its data cannot be had, and it knows digits of 28 x 28: `strokes`, and say so.

        Raises:
            InputError: the data cannot be had, or other classes.
        """
        from capsnet import train
        from capsnet.data import describe

        trained = self.trained(data)
        options = replace(
            trained,
            data=data or trained.data,
            data_dir=data_dir or trained.data_dir,
            validation=trained.validation if held_out else 0,
            devices=1,
        )
        try:
            dataset = train.prepare_data(options)
        except InputError as error:
            strokes = describe("strokes")
            if (
                data
                or not any_will_do
                or (self.network.image_shape, self.network.classes)
                != (
                    strokes.image_shape,
                    strokes.classes,
                )
            ):
                raise
            say(f"capsnet: {trained.data} cannot be read, so strokes are shown ({error})")
            dataset = train.prepare_data(replace(options, data="strokes", validation=None))
        unnamed = self.network.classes == tuple(str(k) for k in range(len(dataset.classes)))
        if dataset.classes != self.network.classes and not unnamed:
            raise InputError(
                f"data set {dataset.name} must have the {len(self.network.classes)} classes of the network, "
                f"{some(self.network.classes)}; got {len(dataset.classes)}, {some(dataset.classes)}"
            )
        self.network.check_images(dataset.test.images[:1].float())
        return dataset

    def split(self, dataset: "Dataset", name: str) -> "Split":
        """The split `test`, `validation` or `train` of a data set.

        Raises:
            InputError: there is no validation split.
        """
        split = dataset.shown(name)
        if split is None:
            raise InputError(f"data set {dataset.name} must have a validation split; the run trained on all images")
        return split

    def images(self, files: tuple[str, ...], *, invert: Literal["auto", "yes", "no"] = "auto") -> "Tensor":
        """One's own image files as the network takes them, `float32 [n, channels, height, width]`.

        Raises:
            InputError: a file that is no image.
        """
        import torch

        from capsnet.data.dataset import to_float
        from capsnet.data.photo import prepare

        shape = self.network.image_shape
        return to_float(
            torch.stack([prepare(Path(file), shape, frame=self.card.frame, invert=invert).image for file in files])
        )

    def place(self, name: str, out: str | None, *, suffix: str, overwrite: bool) -> Path:
        """Where a figure goes: `out`, or `figures/` of the run, or the working directory.

        Only a figure in its run's own directory is replaced unasked, as the same command made it.

        Raises:
            InputError: the file exists.
        """
        if out is None and self.is_run:
            return self.folder / "figures" / f"{name}.{suffix}"
        path = Path(out) if out else Path(f"{self.folder.name}-{name}.{suffix}")
        _check_free(path, overwrite=overwrite)
        return path

    def draw(self, look: Look, name: str, figure: "Figure", arguments: list[str]) -> Path:
        """Write a figure where it belongs, with the command that made it in its metadata."""
        from capsnet import plots

        path = self.place(name, look.out, suffix=look.format, overwrite=look.overwrite)
        return plots.save(figure, path, format=look.format, command=shlex.join(["capsnet", *arguments]))


def _check_free(path: Path, *, overwrite: bool) -> None:
    """Raise InputError where a file must not be written."""
    if path.is_dir() or (path.exists() and not overwrite):
        raise InputError(f"--out must be a new file, or be given with --overwrite; got {path}")


def some(names: tuple[str, ...]) -> str:
    """The first names of many."""
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
