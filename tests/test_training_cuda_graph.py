"""CUDA graphs of training steps: which batches are graphed, with the graph replaced by a recorder, and on a GPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from capsnet.models import Output
from capsnet.objective import Batch, Losses
from capsnet.training.cuda_graph import WARM_UP, GraphedStep


class Recorder:
    """In place of `torch.cuda`: a graph whose replay runs what was recorded."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.recording = False
        self.steps: list[tuple[int, bool]] = []  # images, and whether it was recorded
        self.replays = 0
        self.streams: list[Any] = []  # of each step
        recorder = self

        class Stream:
            def wait_stream(self, other: Any) -> None:
                """Nothing runs beside anything here."""

        class Graph:
            def replay(self) -> None:
                recorder.replays += 1

        @contextmanager
        def on(stream: Stream) -> Iterator[None]:
            recorder.streams.append(stream)
            yield

        @contextmanager
        def capture(_: Graph, stream: Stream) -> Iterator[None]:
            recorder.recording = True
            with on(stream):
                yield
            recorder.recording = False

        fakes = {"Stream": Stream, "CUDAGraph": Graph, "graph": capture}
        fakes |= {"current_stream": Stream, "stream": on}
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)

    def step(self, batch: Batch) -> Losses:
        self.steps.append((len(batch.images), self.recording))
        return losses(batch.images.sum().view(1))


def losses(total: Tensor) -> Losses:
    return Losses(total, total, total, Output(total))


def batch(size: int) -> Batch:
    return Batch(torch.rand(size, 1, 2, 2), torch.arange(size))


def test_a_run_that_goes_on_at_a_smaller_batch_graphs_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch)
    step = GraphedStep(recorder.step, batch_size=8)
    for size in (3, *[8] * (WARM_UP + 2), 3, 8):
        step(batch(size))
    assert recorder.steps == [(3, False), *[(8, False)] * WARM_UP, (8, True), (3, False)]
    assert recorder.replays == 3
    assert recorder.streams == [step.stream] * len(recorder.steps)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_too() -> None:
    """Every step adds the sum of its images: eagerly, recorded and replayed, whichever size comes first."""
    total = torch.zeros(1, device="cuda")

    def add(batch: Batch) -> Losses:
        total.add_(batch.images.sum())
        return losses(total)

    step, wanted = GraphedStep(add, batch_size=8), Tensor([0.0])
    for size in (3, *[8] * (WARM_UP + 3), 3, 8):
        images, labels, _ = batch(size)
        step(Batch(images.cuda(), labels.cuda()))
        wanted += images.sum()
    assert step.graph is not None
    torch.testing.assert_close(total.cpu(), wanted)
