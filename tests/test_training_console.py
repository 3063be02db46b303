import io

import pytest

from capsnet.training import console
from capsnet.training.console import Progress

ROW = {"epoch": 1, "train_loss": 0.5, "train_error_percent": 12.0, "images_per_second": 1234.5, "seconds": 6.7}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_plain_lines_where_there_is_no_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "PLAIN_INTERVAL", -1.0)
    with Progress(epochs=3, steps=10, quiet=False) as shown:
        shown.update(0, 5, [0.5, 0.4, 12.0, 0.25], 1000.0)
        shown.update(0, 10, [0.5, 0.4, 12.0, 0.25], 1000.0)
        shown.epoch(ROW)
        shown.epoch({**ROW, "validation_error_percent": 3.456})
        shown.epoch({**ROW, "validation_error_percent": 3.456}, best=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "epoch 1/3 step 5/10: loss 0.5000 (classification 0.4000, reconstruction 12.0), error 25.00 %, 1,000 images/s",
        "epoch 1/3: loss 0.5000, train error 12.00 %, 1,234 images/s, 7 s",
        "epoch 1/3: loss 0.5000, train error 12.00 %, validation error 3.46 %, 1,234 images/s, 7 s",
        "epoch 1/3: loss 0.5000, train error 12.00 %, validation error 3.46 % (best so far), 1,234 images/s, 7 s",
    ]


def test_not_more_often_than_the_interval(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(epochs=3, steps=10, quiet=False) as shown:
        for step in range(1, 10):
            shown.update(0, step, [0.5, 0.4, 12.0, 0.25], 1000.0)
    assert capsys.readouterr().err == ""


def test_other_processes_say_nothing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "PLAIN_INTERVAL", -1.0)
    with Progress(epochs=3, steps=10, quiet=True) as shown:
        shown.update(0, 5, [0.5, 0.4, 12.0, 0.25], 1000.0)
        shown.epoch(ROW)
    assert capsys.readouterr() == ("", "")


def test_a_live_line_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "xterm")
    with Progress(epochs=3, steps=10, quiet=False) as shown:
        shown.update(1, 5, [0.5, 0.4, 12.0, 0.25], 1000.0)
        shown.bar.refresh()
        shown.epoch(ROW)
    said = terminal.getvalue()
    assert "epoch 2/3" in said
    assert "15/30 steps" in said
    assert "epoch 1/3: loss 0.5000" in said
