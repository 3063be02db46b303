"""An exported network in a folder that serves it: `serve.py`, which needs numpy, Pillow and onnxruntime only.

The folder gets copies of the files of this package that read and prepare images, so that the same code prepares them
there; only their imports of one another are renamed, from `capsnet...` to `capsnet_serve`.
"""

import re
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from capsnet.checkpoints import export
from capsnet.checkpoints.model_card import Card
from capsnet.errors import InputError
from capsnet.files import visible, write_atomically
from capsnet.models import Network

__all__ = ["COPIED", "check_folder", "write_folder"]

COPIED = (
    "errors.py",
    "data/image_file.py",
    "data/photo.py",
    "data/image_preparation.py",
    "checkpoints/serving/hosts.py",
    "checkpoints/serving/predictor.py",
)
"""Files of this package that go along, as `capsnet_serve`."""
REQUIREMENTS = "numpy>=1.26\npillow>=10.3\nonnxruntime>=1.20\n"
INIT = '"""Files of capsnet {version} (Apache License 2.0) that serve a network."""\n'
README = """\
# {model}, served by itself

Written by capsnet {version}; needs Python 3.11 or later, and no capsnet and no PyTorch:

    pip install -r requirements.txt
    python serve.py photo.jpg scan.png      # prints a JSON list
    python serve.py                         # a page on http://127.0.0.1:8000/
    curl --data-binary @photo.jpg http://127.0.0.1:8000/predict

Answers are those of `capsnet predict --json --scores` for `model.onnx`.

Classes: {classes}. Images: {preparation}.

`presence` is that of the class, `ood` says whether the reconstruction error is above the threshold that was set in
training, `notes` what reading the image changed. HEIC files need `pip install pillow-heif`. The server is for this
machine; `--host` serves others, without encryption or passwords: put it behind a server that has them.
"""


def check_folder(folder: Path, *, overwrite: bool) -> None:
    """Raise InputError unless `folder` can be written: it is new or empty, or `overwrite` is given."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"serve must be a folder; got the file {folder}")
    try:
        taken = folder.is_dir() and any(folder.iterdir())
    except OSError as error:
        raise InputError(f"serve must be a folder that can be read; got {folder}: {error.strerror}") from None
    if taken and not overwrite:
        raise InputError(f"serve must be a new or empty folder, or be replaced with --overwrite; got {folder}")


def write_folder(
    network: Network,
    folder: Path,
    *,
    images: Float[Tensor, "n channels height width"],
    batch_size: int = 256,
    card: Card | None = None,
    overwrite: bool = False,
) -> export.Export:
    """Write `network` as ONNX with what serves it: `python FOLDER/serve.py`.

    Args:
        network: trained, which knows its preprocessing; see `export.export`.
        folder: a new or empty one. Files of others in it are kept.
        images: intensities in [0, 1] to compare on, see `export.export`.
        batch_size: images at a time.
        card: of the network; its threshold goes along.
        overwrite: replace the files of the same names in a folder that is not empty.

    Returns:
        How the ONNX file compares with the network.

    Raises:
        InputError: a folder that is taken or cannot be written, a network of several objects per image or without
            preprocessing, or what `export.export` raises. Nothing is written then but for a full disk.
    """
    check_folder(folder, overwrite=overwrite)
    if network.objects_per_image > 1:
        raise InputError(f"model to serve must be of one object per image; got one of {network.objects_per_image}")
    if network.preprocessing is None:
        raise InputError("model to serve must know how its images are read; got one without preprocessing")
    if network.image_shape[0] not in (1, 3):
        raise InputError(f"model to serve must take images of 1 or 3 channels; got {network.image_shape[0]}")
    result = export.export(
        network,
        folder / "model.onnx",
        format="onnx",
        images=images,
        batch_size=batch_size,
        card=card,
        overwrite=overwrite,
    )
    classes = ", ".join(map(visible, network.classes[:20])) + ", ..." * (len(network.classes) > 20)
    readme = README.format(
        model=network.config["name"],
        version=version("capsnet"),
        classes=classes,
        preparation=network.preprocessing,
    )
    package = files("capsnet")
    texts = {
        "capsnet_serve/__init__.py": INIT.format(version=version("capsnet")),
        **{f"capsnet_serve/{Path(name).name}": _renamed(package.joinpath(name).read_text("utf-8")) for name in COPIED},
        "requirements.txt": REQUIREMENTS,
        "README.md": readme,
        "page.html": package.joinpath("checkpoints/serving/page.html").read_text("utf-8"),
        "serve.py": _renamed(package.joinpath("checkpoints/serving/serve.py").read_text("utf-8")),
    }
    for name, text in texts.items():
        _write(folder / name, text)
    return result


def _renamed(code: str) -> str:
    """The same code that imports its neighbours from `capsnet_serve`."""
    return re.sub(
        r"^( *)from capsnet(?:\.\w+)*\.(\w+) import", r"\1from capsnet_serve.\2 import", code, flags=re.MULTILINE
    )


def _write(path: Path, text: str) -> None:
    write_atomically(path, lambda place: place.write_text(text, encoding="utf-8", newline="\n"))
