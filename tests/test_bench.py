"""The benchmark: what it counts, what it refuses, in which order it measures. Nothing timed is asserted."""

import gc
import json
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from capsnet import bench, create
from capsnet.bench import gate, memory, sections, work
from capsnet.bench.alone import RoutingAlone
from capsnet.bench.clock import Tape, timed
from capsnet.bench.whole import WholeNetwork
from capsnet.cli import bench as bench_verb
from capsnet.config import Config
from capsnet.errors import InputError
from capsnet.layers import PrimaryCapsules
from tiny import SIZES

CPU = torch.device("cpu")
TINY = Config(**SIZES, image_size=16, batch_size=6, precision="32", device="cpu")
PLAN = replace(bench.QUICK, matrices=(32,), copied=2**16, batches=(1, 3), image_sizes=(16, 18))
PLAN = replace(PLAN, primary_capsules=(5, 7), output_capsules=(2, 3))


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    """Everything there is to measure, at sizes of a moment; a fresh process is started for one number only."""
    peak = memory.peak
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "peak", lambda subject: peak(subject) if isinstance(subject, WholeNetwork) else {})
        return bench.run(TINY, bench.SECTIONS, classes=3, plan=PLAN, command="capsnet bench ...")


# arithmetic


def test_the_papers_network_by_hand() -> None:
    with torch.device("meta"):
        network = create("capsnet")
    counts = bench.multiply_adds(network)
    assert counts == {
        "conv1": 20 * 20 * 256 * 9 * 9,
        "primary": 6 * 6 * 256 * 9 * 9 * 256,
        "votes": 1152 * 10 * 8 * 16,
        "routing": 1152 * 10 * 16 * (3 + 2),  # three weighted sums, two agreements
        "decoder": 160 * 512 + 512 * 1024 + 1024 * 784,
    }
    forward, training = bench.forward_flop(counts), bench.forward_flop(counts) + bench.backward_flop(counts)
    assert forward / 1e9 == pytest.approx(0.406, abs=5e-4)
    assert training / 1e9 == pytest.approx(1.203, abs=5e-4)
    assert 128 * training / 1e9 == pytest.approx(154, abs=0.5)


def test_other_sizes_and_the_baseline_by_hand() -> None:
    with torch.device("meta"):
        small = create("capsnet", image_shape=(3, 20, 23), num_classes=7, reconstruction=False, routing_iterations=1)
        plain = create("baseline", image_shape=(1, 8, 9), num_classes=3)
    ins = 32 * 2 * 4
    assert bench.multiply_adds(small) == {
        "conv1": 12 * 15 * 3 * 81 * 256,
        "primary": 2 * 4 * 256 * 81 * 256,
        "votes": ins * 7 * 8 * 16,
        "routing": ins * 7 * 16,
    }
    assert list(bench.multiply_adds(plain).values()) == [
        *(72 * 25 * a * b for a, b in ((1, 256), (256, 256), (256, 128))),
        72 * 128 * 328,
        328 * 192,
        192 * 3,
    ]


def test_the_parts_add_up_to_the_whole() -> None:
    counts = {"first": 5, "second": 7}
    assert (work.forward_flop(counts), work.backward_flop(counts)) == (24, 2 * 24 - 10)
    assert (work.backward_flop(counts, ["first"]), work.backward_flop(counts, ["second"])) == (10, 28)
    for stem in ("direct", "minimal"):
        subject = WholeNetwork(replace(TINY, stem=stem), 3)
        parts = [subject.part_flop(name) for name in subject.cut_step().seconds]
        assert sum(part or 0 for part in parts) == subject.part_flop("whole step") == subject.flop


# time


def test_variants_are_measured_in_turn_with_the_collector_off() -> None:
    calls: list[tuple[str, bool]] = []

    def task(name: str) -> Any:
        def once() -> Mapping[str, float]:
            calls.append((name, gc.isenabled()))
            return {"": float(len(calls))}

        return once

    samples = bench.interleaved([task("a"), task("b")], repeats=3, warm_up=1)
    assert "".join(name for name, _ in calls) == "ab" + "ababab"
    assert not any(collecting for _, collecting in calls)
    assert gc.isenabled()
    assert samples == [{"": [3.0, 5.0, 7.0]}, {"": [4.0, 6.0, 8.0]}]
    assert bench.Spread.of(samples[0][""]) == bench.Spread(5.0, 3.0, 7.0, 3)


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


@pytest.mark.parametrize("changes", [{"stem": "direct"}, {"stem": "minimal"}, {"model": "baseline", "dropout": 0.0}])
def test_a_step_cut_into_parts_has_the_gradients_of_the_whole(changes: dict[str, Any]) -> None:
    base = Config(batch_size=4, image_size=16, precision="32") if "model" in changes else TINY
    subject = WholeNetwork(replace(base, **changes), 3)
    images, labels, _ = batch = subject.data()
    subject.data = lambda: batch  # type: ignore[method-assign]
    subject.cut_step()
    cut = [p.grad for p in subject.network.parameters()]
    subject.network.zero_grad()
    subject.objective(images, labels).total.mean().backward()
    for ours, parameter in zip(cut, subject.network.parameters(), strict=True):
        torch.testing.assert_close(ours, parameter.grad)


def test_a_tape_hands_gradients_on() -> None:
    x = torch.tensor([2.0, 3.0], requires_grad=True)
    tape = Tape(CPU, torch.enable_grad)
    (y,) = tape.forward("square", lambda: (x * x,))
    (z,) = tape.forward("sum", lambda: (y.sum(),))
    tape.backward(torch.tensor(5.0))
    assert x.grad is not None
    assert (z.item(), x.grad.tolist()) == (13.0, [20.0, 30.0])
    assert list(tape.seconds) == ["square forward", "square backward", "sum forward", "sum backward"]


# correctness before numbers


def test_the_gate_is_green_for_what_is_right() -> None:
    for changes in ({}, {"stem": "direct"}, {"precision": "bf16"}, {"kernel": "plain"}, {"detach_routing": True}):
        config = replace(TINY, **changes)
        assert 0 < WholeNetwork(config, 3).check().error < 0.1
        assert 0 < RoutingAlone(config, 3, in_capsules=11).check().error < 1e-5


def test_checking_leaves_no_trace() -> None:
    subject = WholeNetwork(TINY, 3)
    before = {name: tensor.clone() for name, tensor in subject.network.state_dict().items()}
    subject.check()
    assert all(torch.equal(tensor, before[name]) for name, tensor in subject.network.state_dict().items())
    assert all(parameter.grad is None for parameter in subject.network.parameters())
    assert all(module.training for module in subject.network.modules())


@pytest.mark.parametrize("precision", ["32", "bf16"])
def test_the_gate_is_red_for_a_network_with_a_wrong_part(
    precision: Literal["32", "bf16"], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(TINY, stem="direct", precision=precision)
    forward = PrimaryCapsules.forward

    def wrong(self: PrimaryCapsules, x: Tensor) -> Tensor:
        u = forward(self, x)
        return u if u.dtype == torch.float64 else u.flip(1)

    monkeypatch.setattr(PrimaryCapsules, "forward", wrong)
    with pytest.raises(bench.Incorrect, match=r"^capsnet: .* must be within .* of float64 .*, so no speed is told$"):
        bench.run(config, ["step"], classes=3, plan=PLAN)


@pytest.mark.parametrize("changes", [{"routing_iterations": 2}, {"detach_routing": True}])
def test_the_gate_is_red_for_another_routing(changes: dict[str, Any]) -> None:
    subject = WholeNetwork(TINY, 3)
    for name, value in changes.items():
        setattr(subject.network.class_capsules, name.removeprefix("routing_"), value)
    with pytest.raises(bench.Incorrect):
        subject.check()
    alone = RoutingAlone(TINY, 3, in_capsules=11)
    for name, value in changes.items():
        setattr(alone.layer, name.removeprefix("routing_"), value)
    with pytest.raises(bench.Incorrect, match="gradient of"):
        alone.check()


def test_what_the_gate_compares() -> None:
    truth = {"a": torch.tensor([3.0, 4.0]).double(), "b": torch.zeros(2).double()}
    found = {"a": torch.tensor([3.0, 4.5]), "b": torch.tensor([0.0, 0.25])}
    assert gate.check(found, truth, allowed=0.2, images=2, who="x") == bench.Check(0.1, "a", 0.2, 2)
    for wrong in ({**found, "a": torch.tensor([3.0, math.nan])}, {"a": found["a"]}, {**found, "b": torch.ones(2)}):
        with pytest.raises(bench.Incorrect, match=r"^x: "):
            gate.check(wrong, truth, allowed=0.2, images=2, who="x")


# variants


def test_compare_is_parsed() -> None:
    variants = bench.parse_compare("stem=direct,minimal", TINY)
    assert variants == [(f"stem={stem}", replace(TINY, stem=stem)) for stem in ("direct", "minimal")]
    assert [c.batch_size for _, c in bench.parse_compare("batch-size=1,20", TINY)] == [1, 20]
    assert [c.detach_routing for _, c in bench.parse_compare("detach_routing=false,true", TINY)] == [False, True]
    assert [c.precision for _, c in bench.parse_compare("precision=32, bf16", TINY)] == ["32", "bf16"]
    several = bench.parse_compare("kernel+batch-size=plain+1,fused+20", TINY)
    assert [name for name, _ in several] == ["kernel=plain, batch_size=1", "kernel=fused, batch_size=20"]
    assert [(c.kernel, c.batch_size) for _, c in several] == [("plain", 1), ("fused", 20)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stem", "compare must be FIELD=A,B with an option of the network or machine; got 'stem'"),
        ("stme=direct,minimal", "did you mean stem"),
        ("epochs=1,2", "compare must be FIELD=A,B"),
        ("stem=direct", "compare must name two values or more, as in kernel=plain,auto; got 'stem=direct'"),
        ("stem=direct,", "compare must name two values or more"),
        ("kernel+stem=plain,fused", "compare must name 2 values for each variant, joined by +"),
        ("kernel+stme=plain+direct,fused+minimal", "did you mean stem"),
        ("stem=direct,fast", "--compare: stem must be one of auto, direct, minimal; got 'fast'"),
        ("batch_size=1,x", "--compare: batch_size must be a whole number; got 'x'"),
        ("threads=1,0", "--compare: threads must be at least 1; got 0"),
        ('threads=1,!!int ""', "compare must be YAML; got: string index out of range"),
        ("threads=1,2001-99-99", "compare must be YAML; got: month must be in 1..12"),
    ],
)
def test_compare_refuses(text: str, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        bench.parse_compare(text, TINY)


def test_variants_have_ratios_to_the_first_and_their_own_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[int] = []
    step = WholeNetwork.step

    def noted(self: WholeNetwork) -> float:
        threads.append(torch.get_num_threads())
        return step(self)

    monkeypatch.setattr(WholeNetwork, "step", noted)
    monkeypatch.setattr(memory, "peak", lambda subject: {})
    before = torch.get_num_threads()
    variants = bench.parse_compare("threads=1,2", TINY)
    told = bench.run(TINY, ["step", "ceilings"], classes=3, plan=PLAN, variants=variants)
    assert threads == [1, 2] * 4
    assert torch.get_num_threads() == before
    steps = [row for row in told["rows"] if row["section"] == "step"]
    assert [row["variant"] for row in steps] == ["threads=1", "threads=2"]
    assert [row["ratio"] for row in steps] == [1.0, steps[1]["median"] / steps[0]["median"]]
    assert [row["variant"] for row in told["rows"][:6:3]] == ["cpu, 1 thread", "cpu, 2 threads"]


def test_models_without_capsules() -> None:
    config = Config(model="baseline", batch_size=2, image_size=8, precision="32", device="cpu")
    told = bench.run(config, ["inference", "parts"], classes=3, plan=PLAN)
    assert [row["name"] for row in told["rows"][2:5]] == ["data", "network forward", "network backward"]
    with pytest.raises(InputError, match="model must be one with capsules to route; got baseline"):
        bench.run(config, ["routing"], plan=PLAN)


# the record


def test_the_record_says_what_was_measured_where_and_how(record: dict[str, Any]) -> None:
    assert {row["section"] for row in record["rows"]} == set(bench.SECTIONS)
    assert {"date", "commit", "torch", "device", "threads", "cores", "load", "config", "plan"} <= record.keys()
    assert (record["command"], record["image_shape"], record["classes"]) == ("capsnet bench ...", [1, 16, 16], 3)
    (checked,) = record["variants"]
    assert (checked["precision"], checked["stem"], checked["images"]) == ("32", "minimal", 8)
    for row in record["rows"]:
        assert 0 < row["min"] <= row["median"] <= row["max"]
        assert row["n"] == 2
        assert row["unit"] in ("ms", "GFLOP/s", "GB/s")
        assert row["section"] in ("ceilings", "parts") or row["error"] < row_tolerance(row)
    (step,) = [row for row in record["rows"] if row["section"] == "step"]
    assert step["images_per_second"] == pytest.approx(6000 / step["median"])
    ceiling = record["rows"][0]["median"]
    assert step["share_of_ceiling"] == pytest.approx(step["gflop_per_second"] / ceiling)
    if memory._STATUS.exists():
        assert 0 < step["added_mib"] < step["total_mib"]


def test_the_memory_of_routing_is_that_of_a_fresh_process() -> None:
    if not memory._STATUS.exists():
        pytest.skip("no /proc")
    told = memory.peak(RoutingAlone(TINY, 3, in_capsules=20_000))
    votes = 6 * 20_000 * 3 * TINY.class_dim * 4 / 2**20
    assert votes < told["added_mib"] < told["total_mib"]


def test_a_process_that_dies_is_told_of() -> None:
    subject = RoutingAlone(TINY, 3, in_capsules=5)
    subject.sizes["in_capsules"] = -1
    assert list(memory.peak(subject)) == ["memory_error"]


def row_tolerance(row: Mapping[str, Any]) -> float:
    return gate.TOLERANCES["minimal stem" if "routing" not in row["name"] else "float32"]


def test_every_size_is_scaled(record: dict[str, Any]) -> None:
    names = [row["name"] for row in record["rows"] if row["section"] == "scaling"]
    assert names == [
        *("step, batch 1", "step, batch 3", "step, image size 16 (4 images)", "step, image size 18 (4 images)"),
        *("routing, primary capsules 5 (6 images)", "routing, primary capsules 7 (6 images)"),
        *("routing, output capsules 2 (4 images)", "routing, output capsules 3 (4 images)"),
        *("routing, iterations 1 (6 images)", "routing, iterations 3 (6 images)"),
    ]
    variants = {row["variant"] for row in record["rows"] if row["section"] == "routing"}
    assert {"plain", "plain, detached"} < variants
    assert "auto" not in variants


def test_the_record_is_json_and_is_not_overwritten(record: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "results" / "bench" / "record.json"
    bench.write(record, path)
    told = json.loads(path.read_text(encoding="utf-8"))
    assert told["rows"] == record["rows"]
    assert told == json.loads(json.dumps(record))
    with pytest.raises(InputError, match=r"^out must be a new file; .*record.json is there \(replace it with --over"):
        bench.write({}, path)
    with pytest.raises(InputError, match=r"^out must be a file; got the directory"):
        bench.write({}, path.parent)
    bench.write({"a": 1}, path, overwrite=True)
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": 1}


def test_the_tables_have_every_number(record: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    bench.show(record, width=200)
    out = capsys.readouterr().out
    assert "capsnet for 1 x 16 x 16 images, 3 classes" in out
    assert record["torch"] in out
    for row in record["rows"]:
        assert row["name"] in out
        assert row["variant"] in out
    assert max(map(len, out.splitlines())) <= 200
    assert out.isascii() or set(re.findall(r"[^\x00-\x7f]", out)) == {"─"}


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
        bench.run(TINY, what, **changes)


def test_the_command_line_knows_the_sections() -> None:
    assert all(section in bench_verb.BENCH_HELP for section in sections.SECTIONS)
