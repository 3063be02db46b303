"""Fine-tuning: what is kept, what starts anew, and what stays as it was."""

import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from capsnet import create, load, memory, save_pretrained
from capsnet.config import Config, read
from capsnet.data import Dataset, Split
from capsnet.errors import InputError, Interrupted
from capsnet.models import Network
from capsnet.models.capsnet import CapsNet
from capsnet.objective import Objective
from capsnet.training import finetune, loop, prepare
from capsnet.training.finetune import start_from
from capsnet.training.fit import fit, resume
from capsnet.training.schedule import optimizer_of
from capsnet.training.state import TrainingState
from tiny import SIZES, same_weights, typed, weights

pytestmark = pytest.mark.usefixtures("workplace", "blank_figure")

MATRIX: dict[str, Any] = {
    "conv_channels": 4,
    "conv_kernel_size": 3,
    "capsule_types": (2, 3),
    "capsule_kernel_sizes": (2,),
    "capsule_strides": (1,),
    "reconstruction": True,
    "decoder_sizes": (16,),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "capsnet": SIZES,
    "efficient-capsnet": {
        "conv_channels": (4, 8),
        "conv_kernel_sizes": (3, 3),
        "primary_dim": 4,
        "class_dim": 4,
        "decoder_sizes": (16,),
    },
    "em-capsnet": MATRIX,
    "vb-capsnet": {**MATRIX, "primary_kernel_size": 2, "primary_stride": 1},
    "baseline": {"width": 0.03},
    "capsule-head": {"grid": 3, "capsule_types": 2, "primary_dim": 3, "reconstruction": True, "decoder_sizes": (16,)},
}
BODY: dict[str, tuple[str, ...]] = {"capsnet": ("conv", "primary"), "efficient-capsnet": ("stem", "primary")}
BODY["capsule-head"] = ("backbone", "primary")
BODY["em-capsnet"] = BODY["vb-capsnet"] = ("stem", "primary", "capsules")
BODY["baseline"] = tuple(f"layers.{k}" for k in (0, 2, 4, 7, 9))
MODELS = list(OPTIONS)


def made(
    model: str = "capsnet", classes: str = "abc", shape: tuple[int, int, int] = (3, 12, 13), seed: int = 1
) -> Network:
    """A network whose weights and batch statistics are random."""
    torch.manual_seed(seed)
    network = create(model, image_shape=shape, num_classes=len(classes), classes=tuple(classes), **OPTIONS[model])
    for tensor in network.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.1, 0.3)
    return network


def images(classes: str = "xyzw", shape: tuple[int, int, int] = (3, 12, 13)) -> Dataset:
    """40 training images, and 8 of each other split."""
    draw = torch.Generator().manual_seed(3)

    def split(count: int) -> Split:
        pixels = torch.randint(0, 256, (count, *shape), dtype=torch.uint8, generator=draw)
        return Split(pixels, torch.arange(count) % len(classes))

    return Dataset("some", tuple(classes), split(40), split(8), validation=split(8), shift=1)


def state(network: Network) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def of(parts: Iterable[str], tensors: dict[str, Tensor]) -> set[str]:
    """Names of the tensors in these parts."""
    return {name for name in tensors if any(f"{name}.".startswith(f"{part}.") for part in parts)}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> set[str]:
    """Names of the tensors that both have, bit for bit."""
    return {name for name in one.keys() & other.keys() if torch.equal(one[name], other[name])}


def tuned(source: Network | str, *, out: str = "run", **changes: Any) -> Path:
    """A run of 2 epochs of 3 steps on `images`, from a network."""
    about = {"batch_size": 16, "epochs": 2, "precision": "32", "keep": "last", "lr": 0.01, **changes}
    return fit(dataset=images(), init_from=source, out=out, report=False, **about).directory


@pytest.mark.parametrize("model", MODELS)
def test_of_the_same_classes_all_is_kept(model: str) -> None:
    source, network = made(model), made(model, seed=2)
    theirs = state(source)
    count = network.parameter_count()
    line = start_from(network, source, name="theirs")
    assert equal(state(network), theirs) == equal(state(source), theirs) == theirs.keys()
    parts = ", ".join(network.parts())
    assert line == f"init_from theirs: kept {parts} ({count:,} of {count:,} weights)"


@pytest.mark.parametrize("classes", ["abx", "abcd"])
@pytest.mark.parametrize("model", MODELS)
def test_for_other_classes_the_head_and_the_decoder_start_anew(model: str, classes: str) -> None:
    source, network = made(model), made(model, classes, seed=2)
    theirs, before = state(source), state(network)
    line = start_from(network, source, name="theirs")
    body = of(BODY[model], before)
    assert equal(state(network), theirs) - body <= {name for name in theirs if theirs[name].ndim == 0}
    assert body <= equal(state(network), theirs)
    assert equal(state(network), before) >= before.keys() - body
    count = sum(tensor.numel() for name, tensor in network.named_parameters() if name in body)
    anew = "layers.12" if model == "baseline" else "class_capsules, decoder"
    kept = f"kept {', '.join(BODY[model])} ({count:,} of {network.parameter_count():,} weights)"
    assert line == f"init_from theirs: {kept}; anew: {anew}"


@pytest.mark.parametrize("model", MODELS)
def test_the_same_classes_in_another_order_are_matched_by_name(model: str) -> None:
    source, network = made(model, "abc").eval(), made(model, "cab", seed=2).eval()
    line = start_from(network, source, name="theirs")
    assert ", classes reordered by name" in line
    assert "anew" not in line
    pixels, labels = torch.rand(5, 3, 12, 13), torch.tensor([0, 1, 2, 0, 1])
    with torch.no_grad():
        ours, theirs = network(pixels, (labels + 1) % 3), source(pixels, labels)
    torch.testing.assert_close(ours.scores, theirs.scores[:, [2, 0, 1]])
    assert not torch.allclose(ours.scores, theirs.scores)
    if theirs.reconstruction is not None:
        torch.testing.assert_close(ours.reconstruction, theirs.reconstruction)


def test_of_images_of_another_shape_the_layers_that_fit_are_kept() -> None:
    network = made(shape=(1, 12, 13), seed=2)
    line = start_from(network, made(), name="theirs")
    assert "kept primary, class_capsules, decoder.layers.0 " in line
    assert line.endswith("; anew: conv, decoder.layers.2 (images of 1 x 12 x 13, its own 3 x 12 x 13)")
    network = made(shape=(3, 14, 13), seed=2)
    assert "anew: class_capsules, decoder.layers.2" in start_from(network, made(), name="theirs")
    network = made("efficient-capsnet", shape=(1, 12, 13), seed=2)
    source = made("efficient-capsnet")
    assert "kept stem.2, stem.3, stem.5, primary" in start_from(network, source, name="theirs")
    assert torch.equal(network.get_buffer("stem.2.running_var"), source.get_buffer("stem.2.running_var"))


def test_what_cannot_be_started_from_is_refused() -> None:
    with pytest.raises(InputError, match=r"^init_from must be weights of model baseline; x is of model capsnet$"):
        start_from(made("baseline"), made(), name="x")
    wide = create("capsnet", image_shape=(1, 28, 28), num_classes=3)
    told = r"^init_from must be weights of which a layer fits; of x none does: conv.weight must be of shape .*; got .*$"
    with pytest.raises(InputError, match=told):
        start_from(made(), wide, name="x")
    network = made(classes="xyz")
    network.freeze("conv", "decoder")
    with pytest.raises(InputError, match=r"^freeze must name parts that are kept of x; decoder starts anew$"):
        start_from(network, made(), name="x")
    with pytest.raises(
        InputError, match=r"which are conv, primary, class_capsules, decoder; got 'cov' \(did you mean c"
    ):
        network.freeze("cov")
    with pytest.raises(InputError, match=r"^freeze must leave a part to train; got all of conv, primary, "):
        network.freeze(*network.parts())
    source = made()
    del source.config
    with pytest.raises(InputError, match=r"^init_from x must be one that capsnet.create made; got CapsNet without a"):
        start_from(made(), source, name="x")


@pytest.mark.slow
@pytest.mark.parametrize("ema", [0.0, 0.9])
@pytest.mark.parametrize("model", MODELS)
def test_frozen_parts_end_as_they_began_and_the_others_move(model: str, ema: float) -> None:
    source = made(model)
    theirs = state(source)
    run = tuned(source, freeze=BODY[model], ema=ema, weight_decay=0.1)
    found, frozen = weights(run), of(BODY[model], theirs)
    assert frozen <= equal(found, theirs)
    trained = {name for name, _ in source.named_parameters()} - frozen
    assert trained
    assert not equal(found, theirs) & trained
    assert equal(state(source), theirs) == theirs.keys()
    free = weights(tuned(source, out="free", ema=ema))
    moving = {name for name in theirs if theirs[name].is_floating_point()}  # batch statistics too
    assert not equal(free, theirs) & moving
    network = load(run)
    assert network.frozen == ()
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_a_run_begins_with_the_weights_that_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[dict[str, Tensor]] = []

    def optimizer(network: Network, config: Config) -> torch.optim.Optimizer:
        begun.append(state(network))
        return optimizer_of(network, config)

    monkeypatch.setattr(loop, "optimizer_of", optimizer)
    source = made()
    save_pretrained(source, "theirs")
    tuned("theirs", epochs=0)
    assert equal(begun[0], state(source)) == of(BODY["capsnet"], begun[0])


@pytest.mark.parametrize("model", MODELS)
def test_other_parts_get_the_same_gradients_as_without_frozen_ones(model: str) -> None:
    network = made(model)
    pixels, labels = torch.rand(9, 3, 12, 13), torch.arange(9) % 3

    def gradients(*frozen: str, convolution: str = "direct") -> dict[str, Tensor]:
        network.freeze(*frozen)
        network.eval()  # without dropout and batch statistics
        if isinstance(network, CapsNet):
            network.convolution, network.class_capsules.routing_kernel = convolution, "fused"
        network.zero_grad()
        Objective(network, Config(model=model))(pixels, labels).total.mean().backward()
        return {name: each.grad.clone() for name, each in network.named_parameters() if each.grad is not None}

    for convolution in ("direct", "winograd") if model == "capsnet" else ("direct",):
        every = gradients(convolution=convolution)
        assert every.keys() == dict(network.named_parameters()).keys()
        for part in network.parts():
            found = gradients(part, convolution=convolution)
            assert found.keys() == every.keys() - of([part], every)
            assert equal(found, every) == found.keys()


def test_frozen_parts_stay_in_evaluation_mode() -> None:
    network = made("efficient-capsnet")
    network.freeze("stem")
    objective = Objective(network, Config(model="efficient-capsnet"))
    objective.train()
    assert objective.training
    assert network.get_submodule("class_capsules").training
    assert not any(module.training for module in network.get_submodule("stem").modules())
    network.freeze()
    assert all(module.training for module in network.modules())


def test_a_stopped_run_goes_on_frozen_with_the_same_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    save_pretrained(made("efficient-capsnet"), "theirs")
    about = {"freeze": BODY["efficient-capsnet"], "ema": 0.9, "checkpoint_steps": 1}
    whole = tuned("theirs", out="whole", **about)
    check, seen = TrainingState.check, []

    def stopping(self: TrainingState) -> None:
        seen.append(self.at.step)
        if len(seen) == 4:
            self.received.append(15)
        check(self)

    with monkeypatch.context() as patched:
        patched.setattr(TrainingState, "check", stopping)
        with pytest.raises(Interrupted):
            tuned("theirs", out="stopped", **about)
    shutil.rmtree("theirs")
    result = resume("stopped", images())
    assert result.epochs == 2
    assert same_weights(whole, "stopped")
    config = read("stopped/config.yaml")
    assert (config.init_from, config.freeze) == ("theirs", about["freeze"])
    with pytest.raises(InputError, match=r"^freeze of a resumed run must stay \('stem', 'primary'\); got \(\)"):
        resume("stopped", images(), freeze=())
    moments = torch.load("stopped/last.ckpt", weights_only=True)["optimizer"]["state"]
    assert len(moments) == len(of(("class_capsules", "decoder"), dict(made("efficient-capsnet").named_parameters())))


def test_the_run_says_where_it_started(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    far = tmp_path / "secret"
    save_pretrained(made(), far / "theirs")
    run = tuned(str(far / "theirs"), freeze=("conv",))
    assert "init_from theirs: kept conv, primary (" in capsys.readouterr().err
    assert yaml.safe_load((run / "config.yaml").read_text())["optimisation"]["init_from"] == str(far / "theirs")
    result = json.loads((run / "result.json").read_text())
    assert result["fine_tuned_from"] == result["differs_from_preset"]["init_from"] == "theirs"
    assert json.loads((run / "card.json").read_text())["config"]["init_from"] == "theirs"
    assert "- Fine-tuned from theirs.\n" in (run / "README.md").read_text()
    assert "secret" not in "".join((run / name).read_text() for name in ("README.md", "card.json", "result.json"))
    run = tuned(made(), out="other")
    assert json.loads((run / "result.json").read_text())["fine_tuned_from"] == finetune.IN_MEMORY
    assert "fine" not in (fit(dataset=images(), epochs=0, **SIZES).directory / "README.md").read_text().lower()


def test_in_python_the_options_are_those_of_the_weights_unless_others_are_given() -> None:
    config = read(tuned(made(), epochs=0) / "config.yaml")
    assert {name: getattr(config.options, name) for name in SIZES} == SIZES
    config = read(tuned(made(), out="other", epochs=0, class_dim=5) / "config.yaml")
    assert {name: getattr(config.options, name) for name in SIZES} == {**SIZES, "class_dim": 5}
    with pytest.raises(InputError, match="must be weights of model baseline"):
        tuned(made(), out="third", model="baseline")


def test_on_the_command_line(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_pretrained(made(classes="xyz"), "theirs")
    words = f"train --data {photos} --epochs 1 --batch-size 32 --precision 32 --no-report"
    code, _, err = typed(capsys, f"{words} --init-from theirs --freeze conv,primary --out run")
    assert code == 0
    assert err.startswith(
        "init_from theirs: kept conv, primary (2,216 of 10,956 weights); anew: class_capsules, decoder\n"
    )
    assert equal(weights("run"), state(load("theirs"))) == of(BODY["capsnet"], weights("run"))
    assert read("run/config.yaml").freeze == ("conv", "primary")
    code, out, _ = typed(capsys, f"{words} --init-from=theirs --freeze conv primary --class-dim 5 --dry-run")
    assert code == 0
    for line in ("freeze: ('conv', 'primary')", "conv_channels: 8", "class_dim: 5"):
        assert line in out.splitlines()
    assert "init_from theirs: kept conv, primary (2,216 of " in out
    assert re.search(r"^trained: [\d,]+ of [\d,]+ parameters; frozen: conv, primary$", out, re.MULTILINE)
    for more, message in (
        ("--init-from thiers", "model folder thiers must hold config.json; there is none"),
        ("--init-from theirs --freeze con,primary", "--freeze must name parts of capsnet, which are conv, primary, "),
        (
            "--init-from theirs --model baseline",
            "--init-from must be weights of model baseline; theirs is of model capsnet",
        ),
        ("--init-from theirs --conv-channels 4 --capsule-types 3", "--init-from must be weights of which a layer fits"),
        ("--padding same --freeze conv,primary,class_capsules,decoder", "--freeze must leave a part to train"),
    ):
        code, out, err = typed(capsys, f"{words} {more} --out none")
        assert (code, out) == (2, "")
        assert message in err.splitlines()[-1]
    assert not Path("none").exists()


def test_frozen_parts_take_no_gradients_and_no_moments() -> None:
    config = Config.of(**{**SIZES, "decoder_sizes": (2000, 2000)}, batch_size=8)
    dataset = images()
    network = prepare.layout(config, dataset)
    needed = []
    for frozen in ((), ("decoder",)):
        network.freeze(*frozen)
        needed.append(memory.training(network, config, torch.device("cpu"), dataset, precision="32", batch_size=8))
    decoder = sum(4 * parameter.numel() for parameter in network.parts()["decoder"].parameters())
    assert needed[0] - needed[1] > 3 * decoder
