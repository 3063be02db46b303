"""The card of trained weights, `card.json` beside them: how they were made, how good they are, what they expect."""

import json
import shlex
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

from capsnet import config as config_file
from capsnet.config import Config, preset_differences, roles
from capsnet.data import available, describe
from capsnet.data.photo import Frame
from capsnet.data.preprocessing import Preprocessing
from capsnet.errors import InputError
from capsnet.evaluation.metrics import error_line
from capsnet.evaluation.ood import Threshold
from capsnet.files import read_json, read_text
from capsnet.models import Network
from capsnet.options import LOCAL, size_of
from capsnet.options.schema import checked

__all__ = ["README", "Card", "Tested", "command_of", "is_ours"]

FILE = "card.json"
README = "README.md"
OURS = "library_name: capsnet"
"""Line of a README by which it is known as made here."""
USE = """## Use

```python
import capsnet

network = capsnet.load("this/folder"MODULES)  # or capsnet.from_pretrained("you/name"MODULES)
for found in capsnet.predict(network, [("a photo", "photo.jpg")]):
    print(found.label, found.presence)
```
"""
COMMAND = """
or `capsnet predict this/folder photo.jpg`.
"""


class Tested(TypedDict):
    """What a network was measured to do on all test images."""

    error_percent: float
    wrong: int
    total: int
    interval: tuple[float, float]
    selection: NotRequired[str]


@dataclass(frozen=True)
class Card:
    """What is known of trained weights beside the weights; every part may be missing.

    Attributes:
        config: of the run that made them, see `capsnet.Config`.
        epochs: passes over the training images.
        train_images: number of them.
        test: `error_percent`, `wrong`, `total` and 95 % `interval` on all test images.
        preprocessing: how image files become what the network sees, of cards from before `config.json` told it.
        frame: how the ink lies in the training images, of cards from before `preprocessing`.
        classes: number of training images of each class, by name.
        threshold: above which reconstruction error an input is no object of the known classes; None without a decoder.
    """

    config: dict[str, Any] = field(default_factory=dict)
    epochs: int | None = None
    train_images: int | None = None
    test: Tested = field(default_factory=lambda: cast(Tested, {}))
    preprocessing: Preprocessing | None = None
    frame: Frame | None = None
    classes: dict[str, int] = field(default_factory=dict)
    threshold: Threshold | None = None

    @property
    def data(self) -> str | None:
        """Data set that the weights were trained on."""
        return self.config.get("data")

    def reading(self, image_shape: tuple[int, int, int]) -> Preprocessing:
        """How image files become what a network of this `image_shape` sees.

        That is what the card says, or what one of an earlier version means.
        """
        if self.preprocessing is not None:
            return self.preprocessing
        channels, height, width = image_shape
        name, crop = self.data, self.config.get("crop")
        known = describe(str(name)) if name in available() else None
        if crop is not None:
            whole = known.image_shape[1:] if known else (height, width)
            height, width = size_of(self.config.get("image_size")) or whole
        frame = self.frame if known and known.framing == "digits" else None
        return Preprocessing(height, width, channels, crop, framing="digits" if frame else "off", frame=frame)

    @property
    def command(self) -> str | None:
        """The command that trains such weights again."""
        return command_of(self.trained()) if self.config else None

    def readme(self, network: Network) -> str:
        """The card as people read it, Markdown with the header of the Hugging Face Hub; it names no folder."""
        known = self.data in available()
        data = str(self.data) if known else Path(str(self.data)).name
        parts = [
            f"model {network.config['name']}, {network.parameter_count():,} parameters",
            f"fine-tuned from {name}" if (name := self.config.get("init_from")) else "",
            f"preprocessing: {network.preprocessing}" if network.preprocessing else "",
            f"classes, with their training images: {', '.join(f'{name} ({n:,})' for name, n in self.classes.items())}"
            if self.classes
            else f"classes: {', '.join(network.classes)}",
        ]
        if self.test:
            parts.append(f"test {error_line(self.test['wrong'], self.test['total'])}")
            if selection := self.test.get("selection"):
                parts.append(f"selection of the weights: {selection}")
        if self.config:
            trained = self.trained()
            command = command_of(trained if known else replace(trained, data=data))
            long = "" if self.epochs is None else f"for {self.epochs} epochs "
            many = "" if self.train_images is None else f"on {self.train_images:,} images "
            parts.append(f"trained {long}{many}by `{command}`")
        if self.threshold:
            limit = self.threshold
            parts.append(
                f"out of distribution is an image with a reconstruction error above {limit.value:.4g}, as "
                f"{100 * limit.false_alarm_rate:g} % of {limit.images:,} {limit.split} images had"
            )
        parts.append("limits: it knows these classes only, in images like those it was trained on; one training")
        header = ["---", OURS, "pipeline_tag: image-classification", "tags: [capsule-network, image-classification]"]
        header += [f"datasets: [{data}]"] * known + ["---"]
        lines = [f"- {part[0].upper()}{part[1:]}." for part in parts if part]
        use = USE.replace("MODULES", "".join(f", {name}={name}" for name in network.given))
        use += "" if network.given else COMMAND
        return "\n".join([*header, f"# {network.config['name']}, trained on {data}", "", *lines, "", use])

    def trained(self) -> Config:
        """The configuration of the run.

        Raises:
            InputError: it does not say it, or holds a field that does not exist.
        """
        if not self.config:
            raise InputError("card must tell the configuration of the run; it does not")
        return config_file.from_dict(self.config, source=FILE)

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON can hold it."""
        return asdict(self)

    def to_json(self) -> str:
        """As text for the file."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def read(cls, path: Path) -> "Card":
        """Read a card; an empty one where there is no file.

        Raises:
            InputError: the file is not such a card, or its configuration not one.
        """
        if not path.is_file():
            return cls()
        source, known = f"file {path}", {each.name for each in fields(cls)}
        values = checked(read_json(path), dict[str, Any], source=source)
        parts = {name: value for name, value in values.items() if name in known and value != {}}  # of newer cards too
        card = checked(parts, cls, source=source)
        if card.config:
            config_file.from_dict(card.config, source=source)
        return cast(Card, card)


def is_ours(readme: Path) -> bool:
    """Whether a README may be replaced: there is none, or it was made by `Card.readme`."""
    return not readme.exists() or OURS in read_text(readme).splitlines()[:5]


def command_of(config: Config) -> str:
    """The shortest `capsnet train` command with this configuration, without places and what is only told or written.

    With modules of one's own, which no command can have, it is the call of `capsnet.fit`.
    """
    changes = {} if config.preset == "paper" else {"preset": config.preset}
    changes |= {name: value for name, value in preset_differences(config).items() if name not in roles(LOCAL)}
    if config.modules:
        given = (f"{name}={name if name in config.modules else repr(value)}" for name, value in changes.items())
        return f"capsnet.fit({', '.join(given)})"
    words = ["capsnet", "train"]
    for name, value in changes.items():
        option = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            words.append(option if value else f"--no-{option[2:]}")
        else:
            words += [option, *(map(str, value) if isinstance(value, tuple | list) else [str(value)])]
    return shlex.join(words)
