"""The benchmark: what it counts, what it refuses, in which order it measures. Nothing timed is asserted."""

import gc
import json
import math
import re
from collections.abc import Mapping
from dataclasses import fields, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from benchmarks import correctness, memory, sections
from benchmarks.__main__ import main
from benchmarks.correctness import Check, Incorrect
from benchmarks.flops import Flops
from benchmarks.record import check_measured, parse_compare, run, write
from benchmarks.routing_workload import RoutingWorkload
from benchmarks.show import show
from benchmarks.timing import Spread, Stopwatch, interleaved, timed
from benchmarks.training_workload import TrainingWorkload
from capsnet import create
from capsnet.config import Config
from capsnet.config import write as write_config
from capsnet.errors import InputError
from capsnet.layers import ClassCapsules, PrimaryCapsules
from capsnet.models import available, options_of
from tiny import SIZES

ROOT = Path(__file__).parent.parent
COMMANDS = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
KEPT = sorted(
    path for path in (ROOT / "results" / "bench").glob("*.json") if path.stem not in ("peers", "gpu-training")
)
CPU = torch.device("cpu")
TINY = Config.of(**SIZES, image_size=16, batch_size=6, precision="32", device="cpu")
PLAN = replace(sections.QUICK, matrices=(32,), copied=2**16, batches=(1, 3), image_sizes=(16, 18))
PLAN = replace(PLAN, capsule_types=(1, 2), output_capsules=(2, 3))


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    """Everything there is to measure, at sizes of a moment; a fresh process is started for one number only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            sections, "peak", lambda workload: memory.peak(workload) if isinstance(workload, TrainingWorkload) else {}
        )
        return run(TINY, sections.SECTIONS, classes=3, plan=PLAN, command="python -m benchmarks ...")


# arithmetic


def test_the_papers_network_by_hand() -> None:
    with torch.device("meta"):
        flops = Flops.of(create("capsnet"))
    layers = {
        "conv": 20 * 20 * 256 * 9 * 9,
        "primary": 6 * 6 * 256 * 9 * 9 * 256,
        "class_capsules": 1152 * 10 * 8 * 16 + 1152 * 10 * 16 * (3 + 2),  # three weighted sums, two agreements
        "decoder": 160 * 512 + 512 * 1024 + 1024 * 784,
    }
    assert {name: flops.forward(name) for name in layers} == {name: 2 * count for name, count in layers.items()}
    forward, training = flops.forward(), flops.forward() + flops.backward()
    assert forward == 2 * sum(layers.values())
    assert training == 3 * forward - 2 * layers["conv"]  # images get no gradient
    assert forward / 1e9 == pytest.approx(0.406, abs=5e-4)
    assert training / 1e9 == pytest.approx(1.203, abs=5e-4)
    assert 128 * training / 1e9 == pytest.approx(154, abs=0.5)


def test_other_sizes_and_the_baseline_by_hand() -> None:
    with torch.device("meta"):
        small = create("capsnet", image_shape=(3, 20, 23), num_classes=7, reconstruction=False, routing_iterations=1)
        plain = create("baseline", image_shape=(1, 8, 9), num_classes=3)
    ins = 32 * 2 * 4
    flops = Flops.of(small)
    assert [flops.forward(name) // 2 for name in ("conv", "primary", "class_capsules")] == [
        12 * 15 * 3 * 81 * 256,
        2 * 4 * 256 * 81 * 256,
        ins * 7 * 8 * 16 + ins * 7 * 16,
    ]
    layers = [72 * 25 * a * b for a, b in ((1, 256), (256, 256), (256, 128))]
    layers += [72 * 128 * 328, 328 * 192, 192 * 3]
    flops = Flops.of(plain)
    assert (flops.forward("layers"), flops.backward("layers")) == (2 * sum(layers), 4 * sum(layers) - 2 * layers[0])
    assert flops.first == "layers.0"


@pytest.mark.parametrize("stem", ["direct", "winograd"])
def test_the_parts_add_up_to_the_whole(stem: Literal["direct", "winograd"]) -> None:
    flops = Flops({"": 12, "first": 5, "second": 7}, "first")
    assert (flops.forward(), flops.backward(), flops.backward("first + second")) == (12, 19, 19)
    assert (flops.backward("first"), flops.backward("second")) == (5, 14)
    workload = TrainingWorkload(TINY.changed(convolution=stem), 3)
    seconds = workload.parts()
    begun = ["conv", "primary"] if stem == "direct" else ["conv + primary"]
    names = [
        f"{name} {way}" for name in (*begun, "class_capsules", "decoder", "loss") for way in ("forward", "backward")
    ]
    assert list(seconds) == ["data", *names, "optimiser", "sum of the parts", "whole step"]
    assert sum(workload.part_flop(name) or 0 for name in names) == workload.part_flop("whole step") == workload.flop
    assert all(seconds[name] > 0 for name in seconds)
    assert seconds["sum of the parts"] == pytest.approx(sum(seconds[name] for name in ("data", *names, "optimiser")))


# time


def test_variants_are_measured_in_turn_with_the_collector_off() -> None:
    calls: list[tuple[str, bool]] = []

    def task(name: str) -> Any:
        def once() -> Mapping[str, float]:
            calls.append((name, gc.isenabled()))
            return {"": float(len(calls))}

        return once

    samples = interleaved([task("a"), task("b")], repeats=3, warm_up=1)
    assert "".join(name for name, _ in calls) == "ab" + "ababab"
    assert not any(collecting for _, collecting in calls)
    assert gc.isenabled()
    assert samples == [{"": [3.0, 5.0, 7.0]}, {"": [4.0, 6.0, 8.0]}]
    assert Spread.of(samples[0][""]) == Spread(5.0, 3.0, 7.0, 3)


def test_a_short_function_is_called_many_times_a_measurement() -> None:
    calls = 0

    def function() -> None:
        nonlocal calls
        calls += 1

    task = timed(function, CPU, at_least=1e-3)
    task()
    before = calls
    task()
    assert calls - before > 10


def test_a_stopwatch_adds_up_what_has_one_name_and_leaves_out_what_is_before_a_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ticks = iter([0.0, 1.0, 3.0, 10.0, 14.0])
    monkeypatch.setattr("benchmarks.timing.time.perf_counter", lambda: next(ticks))
    watch = Stopwatch(CPU)
    watch("a")
    watch("b")
    watch.start()
    watch("a")
    assert watch.seconds == {"a": 5.0, "b": 2.0}


@pytest.mark.parametrize("changes", [{"convolution": "direct"}, {"reconstruction": False}, {"model": "baseline"}])
def test_each_boundary_of_a_step_is_met_once_in_its_order(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = Config.of(batch_size=4, image_size=16, precision="32", device="cpu") if "model" in changes else TINY
    workload, met = TrainingWorkload(base.changed(**changes), 3), list[str]()
    stop = Stopwatch.__call__

    def noted(watch: Stopwatch, name: str) -> None:
        met.append(name)
        stop(watch, name)

    def inside(part: str, gradient: Tensor) -> None:
        met.append(f"in {part}")

    for name, parameter in workload.network.named_parameters():
        parameter.register_hook(partial(inside, name.partition(".")[0]))  # type: ignore[no-untyped-call]
    with monkeypatch.context() as patch:
        patch.setattr(Stopwatch, "__call__", noted)
        workload.parts()
    met = met[: met.index("optimiser") + 1]  # what follows is a step that is not interrupted
    following = {here: later for here, later in pairwise(met) if here[:3] == "in " != later[:3]}
    assert all(here[3:] in later.removesuffix(" backward").split(" + ") for here, later in following.items())
    met = [name for name in met if name[:3] != "in "]
    names = [name.removesuffix(" forward") for name in met if name.endswith(" forward")]
    backwards = [f"{name} backward" for name in reversed(names)]
    assert list(following.values()) == backwards[1:]  # all but the loss, which has no parameters
    assert met == ["data", *(f"{name} forward" for name in names), *backwards, "optimiser"]
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in workload.network.modules())


# correctness before numbers


def test_the_gate_is_green_for_what_is_right() -> None:
    changes = {"convolution": "direct", "precision": "bf16", "routing_kernel": "plain", "detach_routing": True}
    for config in (TINY, *(TINY.changed(**{name: value}) for name, value in changes.items())):
        assert 0 < TrainingWorkload(config, 3).check().error < 0.1
        assert 0 < RoutingWorkload(config, 3).check().error < 1e-5


def test_routing_alone_is_that_of_the_network() -> None:
    config = TINY.changed(squash_epsilon=0.5, leaky=True, routing_bias=True, routing_iterations=2)
    alone, whole = RoutingWorkload(config, 3), TrainingWorkload(config, 3)
    layer = whole.network.class_capsules
    assert isinstance(layer, ClassCapsules)
    assert alone.layer.extra_repr() == layer.extra_repr()
    layer.load_state_dict(alone.layer.state_dict())
    torch.testing.assert_close(alone.layer(alone.u).pose, layer(alone.u).pose)
    assert 0 < alone.check().error < 1e-5


def test_checking_leaves_no_trace() -> None:
    subject = TrainingWorkload(TINY, 3)
    before = {name: tensor.clone() for name, tensor in subject.network.state_dict().items()}
    subject.check()
    assert all(torch.equal(tensor, before[name]) for name, tensor in subject.network.state_dict().items())
    assert all(parameter.grad is None for parameter in subject.network.parameters())
    assert all(module.training for module in subject.network.modules())


@pytest.mark.parametrize("precision", ["32", "bf16"])
def test_the_gate_is_red_for_a_network_with_a_wrong_part(
    precision: Literal["32", "bf16"], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TINY.changed(convolution="direct", precision=precision)
    forward = PrimaryCapsules.forward

    def wrong(self: PrimaryCapsules, x: Tensor) -> Tensor:
        u = forward(self, x)
        return u if u.dtype == torch.float64 else u.flip(1)

    monkeypatch.setattr(PrimaryCapsules, "forward", wrong)
    with pytest.raises(Incorrect, match=r"^capsnet: .* must be within .* of float64 .*, so no speed is reported$"):
        run(config, ["step"], classes=3, plan=PLAN)


def test_another_model_than_that_of_the_file_has_its_own_options(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_config(TINY, tmp_path / "config.yaml")
    assert main(["routing", "--config", str(tmp_path / "config.yaml"), "--model", "baseline"]) == 2
    assert "model must be one with dynamic routing; got baseline" in capsys.readouterr().err


@pytest.mark.parametrize("changes", [{"routing_iterations": 2}, {"detach_routing": True}])
def test_the_gate_is_red_for_another_routing(changes: dict[str, Any]) -> None:
    subject = TrainingWorkload(TINY, 3)
    for name, value in changes.items():
        setattr(subject.network.class_capsules, name.removeprefix("routing_"), value)
    with pytest.raises(Incorrect):
        subject.check()
    alone = RoutingWorkload(TINY, 3)
    for name, value in changes.items():
        setattr(alone.layer, name.removeprefix("routing_"), value)
    with pytest.raises(Incorrect, match="gradient of"):
        alone.check()


def test_what_the_gate_compares() -> None:
    truth = {"a": torch.tensor([3.0, 4.0]).double(), "b": torch.zeros(2).double()}
    found = {"a": torch.tensor([3.0, 4.5]), "b": torch.tensor([0.0, 0.25])}
    assert correctness.check(found, truth, allowed=0.2, images=2, who="x") == Check(0.1, "a", 0.2, 2)
    for wrong in ({**found, "a": torch.tensor([3.0, math.nan])}, {"a": found["a"]}, {**found, "b": torch.ones(2)}):
        with pytest.raises(Incorrect, match=r"^x: "):
            correctness.check(wrong, truth, allowed=0.2, images=2, who="x")
    near_zero = {**truth, "b": torch.tensor([1e-12, 0.0]).double()}  # what float64 leaves of 0
    assert correctness.check(found, near_zero, allowed=0.2, images=2, who="x") == Check(0.1, "a", 0.2, 2)


def test_the_gate_allows_what_the_plain_network_has_of_rounding_result_by_result() -> None:
    truth = {"a": torch.tensor([3.0, 4.0]).double(), "b": torch.tensor([1.0]).double()}
    found = {"a": torch.tensor([3.0, 4.5]), "b": torch.tensor([1.0])}
    check = partial(correctness.check, truth=truth, allowed=1e-4, images=2, who="x", most_rounding=0.2)
    assert check(found, rounding={"a": 0.05}).tolerance == pytest.approx(0.15)
    assert check(found, rounding={"a": 0.5}).tolerance == 0.2
    for rounding in ({"a": 0.03}, {"b": 0.05}):
        with pytest.raises(Incorrect, match=r"^x: a must be within"):
            check(found, rounding=rounding)


def test_networks_whose_scores_are_no_lengths_are_checked_as_they_are() -> None:
    small: dict[str, Any] = {"backbone_channels": [8], "backbone_blocks": [1], "capsule_types": 2, "grid": 8}
    config = Config.of(model="inverted-capsnet", image_size=20, batch_size=4, precision="32", device="cpu", **small)
    assert TrainingWorkload(config, 3).check().error < 1e-3


# variants


def test_compare_is_parsed() -> None:
    variants = parse_compare("convolution=direct,winograd", TINY, ["step"])
    assert variants == [(f"convolution={stem}", TINY.changed(convolution=stem)) for stem in ("direct", "winograd")]
    assert [c.batch_size for _, c in parse_compare("batch-size=1,20", TINY, ["step"])] == [1, 20]
    assert [c.options.detach_routing for _, c in parse_compare("detach_routing=false,true", TINY, ["step"])] == [
        False,
        True,
    ]
    assert [c.precision for _, c in parse_compare("precision=32, bf16", TINY, ["step"])] == ["32", "bf16"]
    several = parse_compare("routing-kernel+batch-size=plain+1,fused+20", TINY, ["step"])
    assert [name for name, _ in several] == [
        "routing_kernel=plain, batch_size=1",
        "routing_kernel=fused, batch_size=20",
    ]
    assert [(c.options.routing_kernel, c.batch_size) for _, c in several] == [("plain", 1), ("fused", 20)]
    rows = dict(parse_compare("successors", TINY.changed(threads=1), ["step"]))
    assert rows["vb"].model == "vb-capsnet"
    assert {(c.threads, c.device, c.train_images) for c in rows.values()} == {(1, "cpu", 10_000)}
    networks = [c for _, c in parse_compare("model+ema=capsnet+0,efficient-capsnet+0.9", TINY, ["step"])]
    assert networks == [TINY.changed(ema=0.0), TINY.changed(model="efficient-capsnet", ema=0.9)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stem", "compare must be OPTION=A,B with an option of a run, or the name of an experiment; got 'stem'"),
        ("convoluton=direct,winograd", "did you mean convolution"),
        ("epochs=1,2", "epochs must be an option that makes a difference to step; it makes none"),
        ("convolution=direct,direct", "compare must name different values; got 'convolution=direct,direct'"),
        ("convolution=direct", "compare must name two values or more, as in routing_kernel=plain,auto; got"),
        ("convolution=direct,", "compare must name two values or more"),
        ("routing_kernel+convolution=plain,fused", "compare must name 2 values for each variant, joined by +"),
        ("routing_kernel+convoluton=plain+direct,fused+winograd", "did you mean convolution"),
        ("convolution=direct,fast", "--compare: convolution must be one of auto, direct, winograd; got 'fast'"),
        ("batch_size=1,x", "--compare: batch_size must be a whole number; got 'x'"),
        ("threads=1,0", "--compare: threads must be at least 1; got 0"),
        ('threads=1,!!int ""', "compare must be YAML; got: string index out of range"),
        ("threads=1,2001-99-99", "compare must be YAML; got: month must be in 1..12"),
    ],
)
def test_compare_refuses(text: str, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        parse_compare(text, TINY, ["step"])


@pytest.mark.parametrize(
    ("what", "name", "blind"),
    [
        ("ceilings step inference parts", "cuda_graph", "inference and parts"),
        ("routing", "convolution", "routing"),
        ("step inference", "batch_size", "inference"),
        ("step scaling", "capsule_types", "scaling"),
        ("ceilings", "routing_kernel", "ceilings"),
        ("step", "routing_kernel", ""),
        ("ceilings step inference parts routing scaling", "routing_kernel", ""),
    ],
)
def test_what_makes_no_difference_is_not_compared(what: str, name: str, blind: str) -> None:
    """It would be one thing, timed twice."""
    if not blind:
        check_measured([name], what.split(), "capsnet", compared=True)
        return
    with pytest.raises(
        InputError, match=rf"^{name} must be an option that makes a difference to {blind}; it makes none$"
    ):
        check_measured([name], what.split(), "capsnet", compared=True)


def test_what_the_sections_depend_on_are_options() -> None:
    for model in available():
        every = {field.name for field in (*fields(Config), *fields(options_of(model)))}
        for section in sections.SECTIONS:
            assert sections.measured(section, model) <= every
        changing_images = {"augment", "crop", "shift", "flip", "rotation", "scale", "shear", "brightness", "contrast"}
        assert {*changing_images, "erase", "weight_decay", "ema"} <= sections.measured("step", model)


def test_variants_have_ratios_to_the_first_and_their_own_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[int] = []
    step = TrainingWorkload.step

    def noted(self: TrainingWorkload) -> float:
        threads.append(torch.get_num_threads())
        return step(self)

    monkeypatch.setattr(TrainingWorkload, "step", noted)
    monkeypatch.setattr(sections, "peak", lambda workload: {})
    before = torch.get_num_threads()
    variants = parse_compare("threads=1,2", TINY, ["step"])
    told = run(TINY, ["step", "ceilings"], classes=3, plan=PLAN, variants=variants)
    assert threads == [1, 2] * 4
    assert torch.get_num_threads() == before
    steps = [row for row in told["rows"] if row["section"] == "step"]
    assert [row["variant"] for row in steps] == ["threads=1", "threads=2"]
    assert [row["ratio"] for row in steps] == [1.0, steps[1]["median"] / steps[0]["median"]]
    assert [row["variant"] for row in told["rows"][:6:3]] == ["cpu, 1 thread", "cpu, 2 threads"]


def test_models_without_capsules() -> None:
    config = Config.of(model="baseline", batch_size=2, image_size=8, precision="32", device="cpu")
    told = run(config, ["inference", "parts"], classes=3, plan=PLAN)
    assert [row["name"] for row in told["rows"][2:5]] == ["data", "layers forward", "layers backward"]
    with pytest.raises(InputError, match="model must be one with dynamic routing; got baseline"):
        run(config, ["routing"], plan=PLAN)


# the record


@pytest.mark.slow
def test_the_record_says_what_was_measured_where_and_how(record: dict[str, Any]) -> None:
    assert {row["section"] for row in record["rows"]} == set(sections.SECTIONS)
    assert {"date", "commit", "torch", "device", "threads", "cores", "load", "config", "plan"} <= record.keys()
    assert (record["command"], record["image_shape"], record["classes"]) == ("python -m benchmarks ...", [1, 16, 16], 3)
    (checked,) = record["variants"]
    assert (checked["precision"], checked["convolution"], checked["images"]) == ("32", "winograd", 8)
    for row in record["rows"]:
        assert 0 < row["min"] <= row["median"] <= row["max"]
        assert row["n"] == 2
        assert row["unit"] in ("ms", "GFLOP/s", "GB/s")
        assert row["section"] in ("ceilings", "parts") or row["error"] < row_tolerance(row)
    (step,) = [row for row in record["rows"] if row["section"] == "step"]
    assert step["images_per_second"] == pytest.approx(6000 / step["median"])
    ceiling = record["rows"][0]["median"]
    assert step["share_of_ceiling"] == pytest.approx(step["gflop_per_second"] / ceiling)
    if memory.STATUS.exists():
        assert 0 < step["added_mib"] < step["total_mib"]


def test_the_memory_of_routing_is_that_of_a_fresh_process() -> None:
    if not memory.STATUS.exists():
        pytest.skip("no /proc")
    config = TINY.changed(capsule_types=1_250)  # at 4 x 4 places
    told = memory.peak(RoutingWorkload(config, 3))
    votes = 6 * 20_000 * 3 * TINY.options.class_dim * 4 / 2**20
    assert votes < told["added_mib"] < told["total_mib"]


def test_a_process_that_dies_is_told_of() -> None:
    workload = RoutingWorkload(TINY, 3)
    workload.classes = -1
    assert list(memory.peak(workload)) == ["memory_error"]


def row_tolerance(row: Mapping[str, Any]) -> float:
    return correctness.TOLERANCES["winograd" if "routing" not in row["name"] else "float32"]


def test_every_size_is_scaled(record: dict[str, Any]) -> None:
    names = [row["name"] for row in record["rows"] if row["section"] == "scaling"]
    assert names == [
        *("step, batch 1", "step, batch 3", "step, image size 16 (4 images)", "step, image size 18 (4 images)"),
        *("routing, primary capsules 16 (6 images)", "routing, primary capsules 32 (6 images)"),
        *("routing, output capsules 2 (4 images)", "routing, output capsules 3 (4 images)"),
        *("routing, iterations 1 (6 images)", "routing, iterations 3 (6 images)"),
    ]
    variants = {row["variant"] for row in record["rows"] if row["section"] == "routing"}
    assert {"plain", "plain, detached"} < variants
    assert "auto" not in variants


def test_the_record_is_json_and_is_not_overwritten(record: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "results" / "bench" / "record.json"
    write(record, path)
    told = json.loads(path.read_text(encoding="utf-8"))
    assert told["rows"] == record["rows"]
    assert told == json.loads(json.dumps(record))
    with pytest.raises(InputError, match=r"^out must be a new file; .*record.json is there \(replace it with --over"):
        write({}, path)
    with pytest.raises(InputError, match=r"^out must be a file; got the directory"):
        write({}, path.parent)
    write({"a": 1}, path, overwrite=True)
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": 1}


def test_the_tables_have_every_number(record: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    show(record, width=200)
    out = capsys.readouterr().out
    assert "capsnet for 1 x 16 x 16 images, 3 classes" in out
    assert record["torch"] in out
    for row in record["rows"]:
        assert row["name"] in out
        assert row["variant"] in out
    assert max(map(len, out.splitlines())) <= 200
    assert out.isascii() or set(re.findall(r"[^\x00-\x7f]", out)) == {"─"}


@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.stem)
def test_records_that_are_kept_can_be_shown(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = json.loads(path.read_text(encoding="utf-8"))
    show(kept, width=250)
    out = capsys.readouterr().out
    assert all(row["name"] in out for row in kept["rows"])


@pytest.mark.parametrize(
    ("what", "changes", "message"),
    [
        (["speed"], {}, "what must be among ceilings, step, inference, parts, routing, scaling; got 'speed'"),
        ([], {"classes": 0}, "classes must be at least 1; got 0"),
        ([], {"plan": replace(PLAN, repeats=0)}, "repeats must be at least 1; got 0"),
    ],
)
def test_run_refuses(what: list[str], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        run(TINY, what, **changes)


# the command line

SIZE = {"image-size": 12, "conv-channels": 8, "conv-kernel-size": 5, "primary-kernel-size": 5}
SMALL = [*(f"--{name}={size}" for name, size in SIZE.items()), "--quick"]


@pytest.mark.usefixtures("workplace")
def test_the_command_prints_tables_or_json_and_keeps_the_record(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sections, "peak", lambda workload: {})
    assert main(["step", "parts", *SMALL, "--out", "bench.json"]) == 0
    out, err = capsys.readouterr()
    assert err.splitlines()[-1] == "record: bench.json"
    assert "training step, 8 images" in out
    kept = json.loads(Path("bench.json").read_text(encoding="utf-8"))
    assert kept["command"].startswith("python -m benchmarks step parts --image-size=12 ")
    assert (kept["config"]["conv_channels"], kept["plan"]["repeats"]) == (8, 2)
    words = ["step", *SMALL, "--compare", "threads=1,2", "--json", "--out", "bench.json", "--overwrite"]
    assert main(words) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(Path("bench.json").read_text(encoding="utf-8"))
    assert [row["variant"] for row in printed["rows"]] == ["threads=1", "threads=2"]


@pytest.mark.usefixtures("workplace")
def test_wrong_results_end_the_command_with_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(correctness, "TOLERANCES", dict.fromkeys(correctness.TOLERANCES, 1e-30))
    monkeypatch.setattr(correctness, "MOST_ROUNDING", dict.fromkeys(correctness.MOST_ROUNDING, 0.0))
    assert main(["step", *SMALL, "--out", "bench.json"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"checking .*\npython -m benchmarks: error: capsnet: .* so no speed is reported\n", err)
    assert not Path("bench.json").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("step --compare convolution=direct", "compare must name two values or more"),
        (
            "step --compare convolution=direct,fast",
            "--compare: convolution must be one of auto, direct, winograd; got 'fast'",
        ),
        ("step --compare convoluton=a,b", "did you mean convolution"),
        ("step --compare successors --batch-size 64", "batch_size cannot be given beside --compare successors, whose"),
        (
            "--compare cuda_graph=false,true",
            "cuda_graph must be an option that makes a difference to inference and parts",
        ),
        ("step --epochs 3", "epochs must be an option that makes a difference to step; it makes none"),
        (
            "routing --convolution winograd",
            "convolution must be an option that makes a difference to routing; it makes none",
        ),
        ("step --repeats 0", "repeats must be at least 1; got 0"),
        ("step --device cuda", "device cuda must have a CUDA GPU"),
        (
            "step --model capsnt",
            "; got 'capsnt' (did you mean capsnet?)",
        ),
        ("step --out .", "out must be a file; got the directory"),
        ("step --out old.json", "out must be a new file; "),
        ("step --convolution winograd --precision bf16", "convolution winograd got images of torch.bfloat16"),
        ("step --config old.json", "epochs must be at least 0; got -1"),
    ],
)
@pytest.mark.usefixtures("workplace")
def test_wrong_input_is_one_line(capsys: pytest.CaptureFixture[str], words: str, message: str) -> None:
    if torch.cuda.is_available() and "cuda" in words.split():
        pytest.skip("there is a GPU")
    Path("old.json").write_text('{"epochs": -1}', encoding="utf-8")
    assert main(words.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(("python -m benchmarks: error: ", "checking "))
    assert message in err.splitlines()[-1]


@pytest.mark.parametrize("words", ["steps", "step --classes x", "step --resume run", "--help"])
def test_usage_is_explained(capsys: pytest.CaptureFixture[str], words: str) -> None:
    with pytest.raises(SystemExit) as stop:
        main(words.split())
    assert stop.value.code == (0 if words == "--help" else 2)
    told = "".join(capsys.readouterr())
    assert words.split()[-1].lstrip("-") in told


@pytest.mark.parametrize("line", [line for line in COMMANDS.splitlines() if line.startswith("python -m benchmarks")])
def test_the_commands_in_the_docs_parse(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Parsed(Exception):
        pass

    def stop(*arguments: object, **options: object) -> None:
        raise Parsed

    monkeypatch.setattr("benchmarks.record.run", stop)
    with pytest.raises(Parsed):
        main(line.split(" #")[0].split()[3:])
