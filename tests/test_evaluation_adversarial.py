import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny
from capsnet import cli
from capsnet import functional as F
from capsnet.checkpoints import pretrained
from capsnet.checkpoints.model_card import Card
from capsnet.config import Config
from capsnet.data import Dataset
from capsnet.data.dataset import to_float
from capsnet.data.sets import strokes
from capsnet.errors import InputError
from capsnet.evaluation import wilson_interval
from capsnet.evaluation.adversarial import ATTACKS, attack_rates, fgsm, loss_of, pgd
from capsnet.evaluation.ood import Threshold, reconstruction_errors
from capsnet.models import Network, create
from capsnet.models.baseline import ConvNet
from capsnet.models.capsnet import CapsNet
from capsnet.objective import Objective

SIZES: dict[str, Any] = {**tiny.SIZES, "conv_channels": 16, "conv_kernel_size": 3, "capsule_types": 4, "class_dim": 8}
NAMES = ("capsnet", "plain")


@pytest.fixture(scope="session")
def data() -> Dataset:
    """Two digits of 12 x 12 pixels."""
    whole = strokes.strokes(image_size=12, train=600, validation=0, test=200)

    def only(split: Any) -> Any:
        return split.take((split.labels < 2).nonzero().flatten())

    return Dataset("strokes", ("0", "1"), only(whole.train), only(whole.test))


def untrained(name: str) -> Network:
    """For 12 x 12 pixels and two classes; without capsules a few of the baseline's kinds of layers."""
    torch.manual_seed(0)
    if name == "capsnet":
        return create("capsnet", image_shape=(1, 12, 12), num_classes=2, **SIZES)
    layers = [nn.Conv2d(1, 8, 5), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 8 * 8, 16), nn.ReLU(), nn.Dropout(0.5)]
    network = ConvNet(nn.Sequential(*layers, nn.Linear(16, 2)), (1, 12, 12))
    network.classes = ("0", "1")
    return network


@pytest.fixture(scope="session")
def networks(data: Dataset) -> dict[str, Network]:
    """Trained for a moment: they know a 0 from a 1."""
    found = {}
    for name in NAMES:
        network = untrained(name)
        objective = Objective(network, Config())
        optimizer = torch.optim.Adam(network.parameters(), 5e-3)
        for step in range(60):
            rows = torch.arange(32 * step, 32 * step + 32) % len(data.train)
            batch = data.train.take(rows)
            optimizer.zero_grad()
            objective(to_float(batch.images), batch.labels).total.mean().backward()
            optimizer.step()
        found[name] = network.eval()
        network.zero_grad(set_to_none=True)
    return found


@pytest.fixture
def examples(data: Dataset) -> tuple[Tensor, Tensor]:
    return to_float(data.test.images[:30]), data.test.labels[:30]


def attacked(name: str, network: Network, images: Tensor, labels: Tensor, epsilon: float, **options: Any) -> Tensor:
    if name == "fgsm":
        return fgsm(network, images, labels, epsilon=epsilon, **options)
    return pgd(network, images, labels, epsilon=epsilon, **{"steps": 5, **options})


def test_the_networks_know_their_digits(networks: dict[str, Network], data: Dataset) -> None:
    """Else nothing below says anything."""
    images = to_float(data.test.images)
    for network in networks.values():
        _, predictions = loss_of(network, images, data.test.labels)
        assert float((predictions == data.test.labels).float().mean()) > 0.9


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("epsilon", [0.05, 0.3])
def test_attacked_images_stay_in_reach_and_are_worse(
    attack: str, epsilon: float, name: str, networks: dict[str, Network], examples: tuple[Tensor, Tensor]
) -> None:
    images, labels = examples
    found = attacked(attack, networks[name], images, labels, epsilon)
    assert found.shape == images.shape
    assert found.isfinite().all()
    assert found.min() >= 0
    assert found.max() <= 1
    assert 0.9 * epsilon < (found - images).abs().max() <= epsilon + 1e-6
    clean, _ = loss_of(networks[name], images, labels)
    worse, _ = loss_of(networks[name], found, labels)
    assert worse.mean() > clean.mean()
    assert (worse > clean).float().mean() > 0.9


@pytest.mark.parametrize("name", NAMES)
def test_fgsm_is_one_step_along_the_sign_of_the_gradient(
    name: str, networks: dict[str, Network], examples: tuple[Tensor, Tensor]
) -> None:
    """Against finite differences of the loss, written out: pixels with a clear slope go its way."""
    images, labels = examples[0][:2].double(), examples[1][:2]
    network = untrained(name).double().eval()
    network.load_state_dict({key: value.double() for key, value in networks[name].state_dict().items()})

    def loss(x: Tensor) -> Tensor:
        scores = network(x).scores
        if name == "plain":
            return torch.nn.functional.cross_entropy(scores, labels, reduction="none")
        presence = torch.nn.functional.one_hot(labels, 2).double()
        return F.margin_loss(scores, presence, m_pos=1.0, m_neg=0.0)

    found = fgsm(network, images, labels, epsilon=0.1)
    h = 1e-6
    for row, column in ((5, 5), (6, 6), (3, 7), (8, 4)):
        step = torch.zeros_like(images)
        step[..., row, column] = h
        slope = (loss(images + step) - loss(images - step)) / (2 * h)
        wanted = (images[:, 0, row, column] + 0.1 * slope.sign()).clamp(0, 1)
        clear = slope.abs() > 1e-6
        assert torch.allclose(found[:, 0, row, column][clear], wanted[clear])
        assert clear.any()


def test_own_margins_are_flat_where_open_ones_are_not(
    networks: dict[str, Network], examples: tuple[Tensor, Tensor]
) -> None:
    images, labels = examples
    easy = Config.of(m_pos=0.01, m_neg=0.99)  # all that is recognised is beyond such margins
    own = fgsm(networks["capsnet"], images, labels, epsilon=0.1, margins="own", config=easy)
    assert torch.equal(own, images)
    opened = fgsm(networks["capsnet"], images, labels, epsilon=0.1, config=easy)
    assert not torch.equal(opened, images)
    own_of_paper = fgsm(networks["capsnet"], images, labels, epsilon=0.1, margins="own")
    assert not torch.equal(own_of_paper, own), "the margins are those of the config"


@pytest.mark.parametrize("name", NAMES)
def test_pgd_is_at_least_as_strong_as_fgsm(
    name: str, networks: dict[str, Network], data: Dataset, examples: tuple[Tensor, Tensor]
) -> None:
    images, labels = examples
    network = networks[name]
    for epsilon in (0.1, 0.2):
        one = attack_rates(network, images, labels, attack="fgsm", epsilon=epsilon)
        many = attack_rates(network, images, labels, attack="pgd", epsilon=epsilon, steps=10)
        assert many.fooled >= one.fooled
        assert many.attacked_loss >= one.attacked_loss
    assert many.fooled > 0


def test_more_steps_never_end_at_a_smaller_loss(networks: dict[str, Network], examples: tuple[Tensor, Tensor]) -> None:
    """The best place on the way is kept, even where steps are so large that they jump about."""
    images, labels = examples
    losses = [
        loss_of(
            networks["capsnet"],
            pgd(networks["capsnet"], images, labels, epsilon=0.2, steps=steps, step_size=0.5),
            labels,
        )[0]
        for steps in (1, 2, 6)
    ]
    assert (losses[1] >= losses[0] - 1e-6).all()
    assert (losses[2] >= losses[1] - 1e-6).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("attack", ATTACKS)
def test_nothing_changes_at_epsilon_0(
    attack: str, name: str, networks: dict[str, Network], examples: tuple[Tensor, Tensor]
) -> None:
    assert torch.equal(attacked(attack, networks[name], *examples, 0.0), examples[0])
    rates = attack_rates(networks[name], *examples, attack=attack, epsilon=0.0, steps=2)
    assert rates.fooled == 0
    assert rates.success == 0
    assert rates.right + rates.wrong_after == rates.images == 30
    assert rates.attacked_loss == rates.loss


def test_the_seed_decides_the_start(networks: dict[str, Network], examples: tuple[Tensor, Tensor]) -> None:
    one, again, other = (pgd(networks["capsnet"], *examples, epsilon=0.2, steps=1, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("attack", ATTACKS)
def test_batches_do_not_matter(attack: str, networks: dict[str, Network], examples: tuple[Tensor, Tensor]) -> None:
    whole = attacked(attack, networks["capsnet"], *examples, 0.2)
    parts = attacked(attack, networks["capsnet"], *examples, 0.2, batch_size=7)
    assert ((whole - parts).abs() > 1e-5).float().mean() < 0.01, "but where a slope is 0 to rounding"


@pytest.mark.parametrize("name", NAMES)
def test_the_network_is_left_as_it_was(
    name: str, networks: dict[str, Network], examples: tuple[Tensor, Tensor]
) -> None:
    network = networks[name]
    frozen = next(network.parameters()).requires_grad_(False)
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    network.train()
    network.get_submodule("conv" if name == "capsnet" else "layers.0").eval()
    modes = [module.training for module in network.modules()]
    wanted = attack_rates(network, *examples, attack="pgd", epsilon=0.1, steps=2)
    assert [module.training for module in network.modules()] == modes
    assert all(parameter.grad is None for parameter in network.parameters())
    assert [parameter.requires_grad for parameter in network.parameters()].count(False) == 1
    assert not frozen.requires_grad
    assert all(torch.equal(tensor, before[key]) for key, tensor in network.state_dict().items())
    frozen.requires_grad_(True)
    network.eval()
    assert attack_rates(network, *examples, attack="pgd", epsilon=0.1, steps=2) == wanted, "dropout took no part"


def test_what_is_flagged_is_what_is_badly_reconstructed(
    networks: dict[str, Network], examples: tuple[Tensor, Tensor]
) -> None:
    images, labels = examples
    network = networks["capsnet"]
    adversarial = fgsm(network, images, labels, epsilon=0.3)
    errors = reconstruction_errors(network, adversarial)
    threshold = Threshold(float(errors.median()), 0.05, 100, "validation")
    rates = attack_rates(network, images, labels, attack="fgsm", epsilon=0.3, threshold=threshold)
    with torch.no_grad():
        before, after = (network(x).scores.argmax(-1) for x in (images, adversarial))
    fooled = (before == labels) & (after != labels)
    flagged = errors > threshold.value
    assert rates.right == int((before == labels).sum())
    assert rates.fooled == int(fooled.sum()) > 0
    assert rates.wrong_after == int((after != labels).sum())
    assert rates.flagged == int(flagged.sum()) > 0
    assert rates.flagged_fooled == int((flagged & fooled).sum())
    assert rates.success == rates.fooled / rates.right
    assert attack_rates(network, images, labels, attack="fgsm", epsilon=0.3).flagged is None
    of_plain = attack_rates(networks["plain"], images, labels, attack="fgsm", epsilon=0.3, threshold=threshold)
    assert of_plain.flagged is None


def test_none_right_is_no_success(networks: dict[str, Network], examples: tuple[Tensor, Tensor]) -> None:
    network, images = networks["capsnet"], examples[0]
    _, predictions = loss_of(network, images, examples[1])
    rates = attack_rates(network, images, 1 - predictions, attack="fgsm", epsilon=0.0)
    assert (rates.right, rates.fooled, rates.wrong_after) == (0, 0, 30)
    assert rates.success is None


@pytest.mark.usefixtures("unchecked")
def test_wrong_arguments_are_refused(networks: dict[str, Network], examples: tuple[Tensor, Tensor]) -> None:
    network, (images, labels) = networks["capsnet"], examples
    for epsilon in (-0.1, 1.5, float("nan")):
        with pytest.raises(InputError, match=r"^epsilon must be in \[0, 1\]"):
            fgsm(network, images, labels, epsilon=epsilon)
    with pytest.raises(InputError, match=r"^steps must be at least 1 and step_size above 0; got 0 and None$"):
        pgd(network, images, labels, epsilon=0.1, steps=0)
    with pytest.raises(InputError, match=r"got 2 and 0\.0$"):
        pgd(network, images, labels, epsilon=0.1, steps=2, step_size=0.0)
    with pytest.raises(InputError, match=r"^margins must be one of open, own; got 'closed'$"):
        fgsm(network, images, labels, epsilon=0.1, margins="closed")
    with pytest.raises(InputError, match=r"^attack must be one of fgsm, pgd; got 'cw'$"):
        attack_rates(network, images, labels, attack="cw", epsilon=0.1)
    with pytest.raises(InputError, match=r"^images must be at least one; got none$"):
        attack_rates(network, images[:0], labels[:0], attack="pgd", epsilon=0.1)
    with pytest.raises(InputError, match=r"^batch_size must be at least 1; got 0$"):
        fgsm(network, images, labels, epsilon=0.1, batch_size=0)
    with pytest.raises(InputError, match=r"^images must be \[batch"):
        fgsm(network, images[:, :, :9], labels, epsilon=0.1)


# the verb


@pytest.fixture
def models(workplace: Path, networks: dict[str, Network], data: Dataset, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Both networks in the working directory, with their cards."""
    monkeypatch.setattr("capsnet.training.prepare.load", lambda *_, **__: data)
    threshold = Threshold(3.0, 0.05, 100, "validation")
    baseline = create("baseline", image_shape=(1, 12, 12), num_classes=2)
    for name, network in {"capsnet": networks["capsnet"], "baseline": baseline}.items():
        pretrained.save_pretrained(network, name)
        pretrained.save_card(Card(config={"data": "strokes"}, threshold=threshold if name == "capsnet" else None), name)
    return ["capsnet", "baseline"]


SHORT = ["--images", "30", "--epsilons", "0", "0.2", "--steps", "2", "--device", "cpu"]


def test_the_verb_prints_a_table_and_writes_a_record(models: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["analyse", "attack", *models, *SHORT, "--seed", "5", "--out", "x.json"]) == 0
    text = capsys.readouterr().out
    assert "capsnet: first 30 test images of strokes" in text
    assert "baseline: first 30 test images of strokes" in text
    assert "above 3.00, the threshold for 5 % false alarms on 100 validation images" in text
    record = json.loads(Path("x.json").read_text(encoding="utf-8"))
    assert record["command"].startswith("capsnet analyse attack capsnet baseline --images 30")
    assert (record["seed"], record["epsilons"], record["steps"], record["margins"]) == (5, [0, 0.2], 2, "open")
    assert record["environment"]["torch"] == torch.__version__
    capsule, plain = record["models"]
    assert (capsule["name"], plain["name"]) == ("capsnet", "baseline")
    assert capsule["images"] == 30
    assert [(row["attack"], row["epsilon"]) for row in capsule["rates"]] == [
        ("fgsm", 0),
        ("fgsm", 0.2),
        ("pgd", 0),
        ("pgd", 0.2),
    ]
    for row in capsule["rates"]:
        assert row["success_interval"] == list(wilson_interval(row["fooled"], row["right"]))
        assert row["flagged_interval"] == list(wilson_interval(row["flagged"], 30))
        wanted = list(wilson_interval(row["flagged_fooled"], row["fooled"])) if row["fooled"] else None
        assert row["flagged_fooled_interval"] == wanted
        assert f"{row['fooled']} of {row['right']}" in text
    assert all(row["flagged"] is row["flagged_interval"] is None for row in plain["rates"])
    assert capsule["rates"][3]["fooled"] > 0


def test_the_numbers_are_those_of_the_library(
    models: list[str], networks: dict[str, Network], examples: tuple[Tensor, Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        cli.main(
            ["analyse", "attack", "capsnet", *SHORT, "--attacks", "pgd", "--margins", "own", "--seed", "2", "--json"]
        )
        == 0
    )
    row = json.loads(capsys.readouterr().out)["models"][0]["rates"][1]
    config, threshold = Config.of(data="strokes"), Threshold(3.0, 0.05, 100, "validation")
    wanted = attack_rates(
        networks["capsnet"],
        *examples,
        attack="pgd",
        epsilon=0.2,
        threshold=threshold,
        steps=2,
        seed=2,
        margins="own",
        config=config,
    )
    assert {key: value for key, value in row.items() if not key.endswith("_interval")} == wanted.to_dict()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "MODEL must be given"),
        (["capsnet", "--epsilons", "0.1", "2"], "--epsilons must be at most 1; got 2.0"),
        (["capsnet", "--images", "0"], "--images must be at least 1; got 0"),
        (["capsnet", "--steps", "0"], "--steps must be at least 1; got 0"),
        (["capsnet", "--step-size", "0"], "--step-size must be above 0; got 0"),
        (["capsnet", "--attacks", "cw"], "cw"),
        (["capsnet", "--out", "taken.json"], "--out must be a new file, or be given with --overwrite; got taken.json"),
        (["nothing"], "model folder nothing must hold config.json"),
    ],
)
def test_wrong_options_are_told_in_one_line(
    options: list[str], message: str, models: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("taken.json").write_text("mine")
    assert cli.main(["analyse", "attack", *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1 or "Invalid choice" in error
    assert Path("taken.json").read_text() == "mine"


@pytest.mark.slow
@pytest.mark.skipif(not (tiny.REAL / "mnist").is_dir(), reason=f"no MNIST in {tiny.REAL}")
def test_the_weights_that_come_with_the_package(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CAPSNET_DATA", str(tiny.REAL))
    short = ["--images", "100", "--epsilons", "0", "0.1", "--attacks", "fgsm", "--json"]
    assert cli.main(["analyse", "attack", "capsnet-mnist", "--data", "mnist", *short]) == 0
    none, some = json.loads(capsys.readouterr().out)["models"][0]["rates"]
    assert none["fooled"] == 0
    assert none["right"] >= 98
    assert 0 < some["fooled"] < 100
    assert isinstance(pretrained.load("capsnet-mnist"), CapsNet)
