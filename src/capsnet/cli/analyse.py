"""The verb `analyse`: measurements of a trained network beyond its error."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from capsnet.cli.parsing import BatchSize, DataDir, Device, Group, Images, Model, Models, Range, Seed
from capsnet.cli.printing import say, show, show_json, show_table
from capsnet.cli.trained_model import TrainedModel, WritesFile
from capsnet.errors import InputError
from capsnet.files import is_directory

if TYPE_CHECKING:
    from torch import Tensor

    from capsnet.analysis.pose_probe import PoseExplained
    from capsnet.data.preprocessing import Preprocessing

__all__ = ["ANALYSE", "pose_table", "probe_poses"]

NOISE_IMAGES = 10_000
NOISE_SEED = 0


@dataclass(frozen=True)
class _Record(WritesFile):
    """Where the record of a measurement goes."""

    out: str | None = None
    """Write the record to this JSON file."""
    overwrite: bool = False
    """Replace an existing file."""
    json: bool = False
    """Print the record as JSON."""

    def write(self, record: dict[str, Any]) -> None:
        """Print the record as JSON if asked for, and write its file."""
        from capsnet.files import write_atomically

        if self.json:
            show_json(record)
        if self.out:
            text = json.dumps(record, indent=2) + "\n"
            write_atomically(Path(self.out), lambda path: path.write_text(text, encoding="utf-8"))
            if not self.json:
                show(f"record: {self.out}")


@dataclass(frozen=True)
class _OodOptions:
    model: Model
    against: tuple[str, ...] = ("kmnist", "fashion-mnist", "noise")
    """Out-of-distribution images: test images of data sets, folders of images, or noise (every pixel uniform)."""
    data: str | None = None
    """In-distribution images; default: those of the network."""
    data_dir: DataDir = None


@dataclass(frozen=True)
class _Ood(_Record, _OodOptions):
    """Detection of out-of-distribution images by their reconstruction error (DARCCC, Frosst et al. 2018).

    For each set: AUROC against the test images (0.5 is guessing, 1 perfect), and the share above the threshold that is
    stored with the weights, beside the share of test images above it (false alarms).

    Examples:
      capsnet analyse ood capsnet-mnist
      capsnet analyse ood runs/mine --against path/to/images noise --json
    """

    def work(self, line: str) -> int:
        if not self.against:
            raise InputError("--against must be at least one data set, folder or noise; got none")
        import torch

        from capsnet import environment
        from capsnet.analysis.reconstruction import decoder_of
        from capsnet.evaluation.ood import auroc, reconstruction_errors

        trained = TrainedModel(self.model)
        network, _ = decoder_of(trained.network)
        if network.image_shape[0] not in (1, 3):
            raise InputError(
                f"{self.model} must be of images in grey or colour; its own have {network.image_shape[0]} channels"
            )
        dataset = trained.dataset(self.data, self.data_dir)
        reading = network.preprocessing
        sets = {name: _out_of_distribution(name, reading, self.data_dir) for name in self.against}
        known, threshold = trained.predictions(dataset.test).reconstruction_errors, trained.card.threshold
        assert known is not None
        rows: list[dict[str, Any]] = []
        for name, images in sets.items():
            errors = reconstruction_errors(network, images)
            rows.append(
                {
                    "data": name,
                    "images": len(images),
                    "auroc": auroc(known, errors),
                    "mean_error": float(errors.mean()),
                    "flagged": threshold.share_above(errors) if threshold else None,
                }
            )
        record = {
            "command": line,
            "score": "sum of squared differences between image and reconstruction from the winning capsule",
            "known": {
                "data": dataset.name,
                "split": "test",
                "images": len(known),
                "mean_error": float(known.mean()),
                "false_alarms": threshold.share_above(known) if threshold else None,
            },
            "threshold": asdict(threshold) if threshold else None,
            "ood": rows,
            **environment.describe(torch.device("cpu")),
        }
        if not self.json:
            _print_ood(record)
        if not threshold:
            say(f"capsnet analyse ood: {self.model} has no stored threshold, so nothing is flagged")
        self.write(record)
        return 0


def _out_of_distribution(name: str, reading: "Preprocessing", data_dir: str | None) -> "Tensor":
    """A set of images, `uint8`, as the network sees them."""
    import torch

    from capsnet.data import available, load_split
    from capsnet.data.image_folder import image_files

    channels, height, width = reading.image_shape
    if name == "noise":
        generator = torch.Generator().manual_seed(NOISE_SEED)
        return torch.randint(0, 256, (NOISE_IMAGES, channels, height, width), dtype=torch.uint8, generator=generator)
    if name not in available() and not is_directory(name):
        raise InputError(f"--against must be noise, a folder, or among {', '.join(available())}; got {name!r}")
    if name not in available():
        folder = Path(name).expanduser()
        files, notes = image_files(folder)
        if not files:
            raise InputError(f"--against must be a folder of images; got {folder}, which holds none")
        for note in notes:
            say(f"capsnet analyse ood: {folder}: {note}")
        return torch.stack([reading(file).image for file in files])
    return load_split(name, "test", data_dir=data_dir, image_size=f"{height}x{width}", channels=channels).images


def _print_ood(record: dict[str, Any]) -> None:
    known, threshold = record["known"], record["threshold"]
    show(f"in distribution: {known['images']:,} test images of {known['data']}, mean error {known['mean_error']:.2f}")
    if threshold:
        show(f"{_threshold(threshold)}; false alarms on the test images: {100 * known['false_alarms']:.2f} %")
    show_table(
        ("out of distribution", "images", "AUROC", "mean error", "flagged %"),
        [
            (
                row["data"],
                f"{row['images']:,}",
                f"{row['auroc']:.4f}",
                f"{row['mean_error']:.2f}",
                "-" if row["flagged"] is None else f"{100 * row['flagged']:.2f}",
            )
            for row in record["ood"]
        ],
    )


def _threshold(threshold: dict[str, Any]) -> str:
    return (
        f"flagged: reconstruction error above {threshold['value']:.2f}, the threshold for "
        f"{100 * threshold['false_alarm_rate']:g} % false alarms on {threshold['images']:,} {threshold['split']} images"
    )


@dataclass(frozen=True)
class _AttackOptions:
    models: Models
    attacks: tuple[Literal["fgsm", "pgd"], ...] = ("fgsm", "pgd")
    """fgsm: one step; pgd: several steps from a random start."""
    epsilons: Annotated[tuple[float, ...], Range(0, 1)] = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3)
    """Largest change of a pixel, whose intensity is in [0, 1]."""
    steps: Annotated[int, Range(1, 10_000)] = 20
    """Number of PGD steps."""
    step_size: Annotated[float | None, Range(0, 1, above=True)] = None
    """Change of a pixel in one PGD step; default: 2.5 epsilon / steps."""
    margins: Literal["open", "own"] = "open"
    """Margins of the margin loss that is ascended. own: those of training, beyond which its gradient is zero."""
    images: Images = 1000
    """Number of test images, at most: the first ones."""
    data: str | None = None
    """Data set or folder; default: the network's own. It is read as the network's own was."""
    data_dir: DataDir = None
    seed: Seed = 0
    """Seed of the random start."""
    batch_size: BatchSize = 128
    """Images per batch; affects only memory and speed."""
    device: Device = "auto"


@dataclass(frozen=True)
class _Attack(_Record, _AttackOptions):
    """White-box adversarial attacks: success rate, and share detected by the reconstruction error.

    Success: share of the correctly classified images that are misclassified after the attack. Flagged: reconstruction
    error above the threshold that is stored with the weights.

    Examples:
      capsnet analyse attack capsnet-mnist
      capsnet analyse attack runs/mnist runs/baseline --attacks pgd --epsilons 0.05 0.1 --steps 40 --out attack.json
    """

    def work(self, line: str) -> int:
        for name, values in (("MODEL", self.models), ("--attacks", self.attacks), ("--epsilons", self.epsilons)):
            if not values:
                raise InputError(f"{name} must be given at least once; got none")
        from capsnet import devices, environment

        subjects = [TrainedModel(model) for model in self.models]
        device = devices.resolve_device(replace(subjects[0].trained(self.data), device=self.device, devices=1))
        record: dict[str, Any] = {
            "command": line,
            "environment": environment.describe(device),
            "seed": self.seed,
            "epsilons": list(self.epsilons),
            "steps": self.steps,
            "step_size": self.step_size,
            "margins": self.margins,
            "models": [],
        }
        for trained in subjects:
            record["models"].append(self._attack(trained, device))
            if not self.json:
                _print_attack(record["models"][-1])
        self.write(record)
        return 0

    def _attack(self, trained: TrainedModel, device: Any) -> dict[str, Any]:
        """The rates of one network, as they are recorded."""
        from capsnet.data.dataset import to_float
        from capsnet.evaluation import wilson_interval
        from capsnet.evaluation.adversarial import attack_rates

        config = trained.trained(self.data)
        dataset = trained.dataset(self.data, self.data_dir, held_out=False)
        split, threshold = dataset.test, trained.card.threshold
        images = to_float(split.images[: self.images]).to(device)
        labels = split.labels[: self.images].to(device)
        network = trained.network.to(device)
        rows = []
        for attack in self.attacks:
            for epsilon in self.epsilons:
                say(f"{trained.model}: {attack}, epsilon {epsilon:g}, {len(images):,} images")
                rates = attack_rates(
                    network,
                    images,
                    labels,
                    attack=attack,
                    epsilon=epsilon,
                    threshold=threshold,
                    steps=self.steps,
                    step_size=self.step_size,
                    seed=self.seed,
                    margins=self.margins,
                    config=config,
                    batch_size=self.batch_size,
                )
                row = rates.to_dict()
                for name, part, whole in (
                    ("success", rates.fooled, rates.right),
                    ("flagged", rates.flagged, rates.images),
                    ("flagged_fooled", rates.flagged_fooled, rates.fooled),
                ):
                    row[f"{name}_interval"] = list(wilson_interval(part, whole)) if part is not None and whole else None
                rows.append(row)
        return {
            "model": trained.model,
            "name": network.config["name"],
            "data": dataset.name,
            "split": "test",
            "images": len(images),
            "threshold": asdict(threshold) if threshold else None,
            "rates": rows,
        }


def _print_attack(found: dict[str, Any]) -> None:
    show(f"{found['model']}: first {found['images']:,} test images of {found['data']}")
    headings = ("attack", "epsilon", "fooled", "success %", "95 % interval", "wrong %", "flagged %", "of the fooled %")
    show_table(headings, [_cells(row) for row in found["rates"]])
    if found["threshold"] is not None:
        show(_threshold(found["threshold"]))


def _cells(row: dict[str, Any]) -> list[str]:
    interval = row["success_interval"]
    return [
        row["attack"],
        f"{row['epsilon']:g}",
        f"{row['fooled']:,} of {row['right']:,}",
        _percent(row["fooled"], row["right"]),
        "-" if interval is None else f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f}",
        _percent(row["wrong_after"], row["images"]),
        _percent(row["flagged"], row["images"]),
        _percent(row["flagged_fooled"], row["fooled"]),
    ]


def _percent(part: int | None, whole: int) -> str:
    return "-" if part is None or not whole else f"{100 * part / whole:.1f}"


@dataclass(frozen=True)
class _PoseOptions:
    model: Model
    against: tuple[str, ...] | None = None
    """Other networks to measure beside the first."""
    data: str | None = None
    """Data set that knows the pose of its images; default: the network's own."""
    data_dir: DataDir = None
    split: Literal["test", "validation", "train"] = "test"
    """Split on which the regression is judged."""


@dataclass(frozen=True)
class _Pose(_Record, _PoseOptions):
    """Pose probe: how much of the true pose (slant, rotation, scale, width, x, y) the last layer explains.

    Linear regression for each class, from the vector of the class capsule or, without capsules, from the last hidden
    layer; fitted on the training images, judged by R2 on the test images. The data set must know the pose of its
    images, as strokes does.

    Examples:
      capsnet analyse pose runs/strokes-capsnet-seed0
      capsnet analyse pose runs/strokes-capsnet-seed0 --against runs/strokes-baseline-seed0 --json
    """

    def work(self, line: str) -> int:
        _, record, found = probe_poses(
            self.model, against=self.against, data=self.data, data_dir=self.data_dir, split=self.split, line=line
        )
        if not self.json:
            show(*pose_table(found))
        self.write(record)
        return 0


def probe_poses(
    model: str, *, against: tuple[str, ...] | None, data: str | None, data_dir: str | None, split: str, line: str
) -> "tuple[TrainedModel, dict[str, Any], dict[str, PoseExplained]]":
    """The first network, the record, and the pose probe of each network by its name."""
    import torch

    from capsnet import environment
    from capsnet.analysis.pose_probe import pose_explained
    from capsnet.checkpoints import pretrained

    if against == ():
        raise InputError("--against must be at least one network; got none")
    trained = TrainedModel(model)
    networks = {model: trained.network, **{other: pretrained.load(other) for other in against or ()}}
    dataset = trained.dataset(data, data_dir)
    for network in networks.values():
        network.check_images(dataset.test.images[:1].float())
    train, test = trained.split(dataset, "train"), trained.split(dataset, split)
    names = [network.config["name"] for network in networks.values()]
    if len(set(names)) < len(names):
        names = [f"{name} ({place})" for name, place in zip(names, networks, strict=True)]
    found = {name: pose_explained(network, train, test) for name, network in zip(names, networks.values(), strict=True)}
    record = {
        "command": line,
        "data": dataset.name,
        "networks": {name: one.to_dict() for name, one in found.items()},
        **environment.describe(torch.device("cpu")),
    }
    return trained, record, found


def pose_table(found: "dict[str, PoseExplained]") -> list[str]:
    """R2 of each factor and network, in lines."""
    first = next(iter(found.values()))
    return [
        f"held-out linear R2, mean over {len(first.classes)} classes +- standard deviation, n = {first.test_images:,}",
        f"{'':22}" + "".join(f"{f'{name} ({one.dim})':>24}" for name, one in found.items()),
        *(
            f"{factor.replace('_', ' '):22}"
            + "".join(f"{one.mean(factor):>15.3f} +- {one.spread(factor):.3f}" for one in found.values())
            for factor in first.factors
        ),
    ]


ANALYSE = Group(
    "Measure a trained network: out-of-distribution detection, adversarial attacks, pose probe.",
    {"ood": _Ood, "attack": _Attack, "pose": _Pose},
)
