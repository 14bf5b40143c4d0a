"""The `console` sink: the conformance suite, and what a person sees."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys
import textwrap
import threading
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest
from trainbus.sinks.console import ConsoleOptions, ConsoleSink

from trainbus import Bus, RunInfo, Sink, config
from trainbus.events import (
    AlertRaised,
    Best,
    CheckpointSaved,
    EpochEnded,
    EpochStarted,
    Event,
    Failure,
    MetricsLogged,
    ParamsUpdated,
    Record,
    RunEnded,
    RunStarted,
)
from trainbus.testing import SinkConformance


class TestConsoleSink(SinkConformance):
    """What is printed does not depend on how the records come."""

    package = "rich"
    extra = "console"
    reopens = False  # what was printed can't be read back
    stores_steps = False  # a line per epoch

    @pytest.fixture(autouse=True)
    def _catch(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self.printed = capsys
        monkeypatch.setenv("COLUMNS", "80")

    def make(self, folder: Path) -> Sink:
        """Print on stderr."""
        sink: Sink = ConsoleSink()
        return sink

    def read(self, folder: Path) -> object:
        """Take what was printed since the last time."""
        return self.printed.readouterr().err


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        """Say so."""
        return True


def show(
    monkeypatch: pytest.MonkeyPatch,
    events: Sequence[Event],
    *,
    stream: io.StringIO | None = None,
    columns: int = 100,
    started: RunStarted | None = None,
    close: bool = True,
) -> str:
    """Return what is printed for the events of one run, which come a second apart."""
    stream = stream or io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    first = started or RunStarted()
    sink = ConsoleSink()
    sink.open(RunInfo(id="run", started=first))
    for seq, event in enumerate([first, *events], 1):
        sink.write([Record(seq=seq, run="run", time=float(seq), event=event)])
    if close:
        sink.close()
    return stream.getvalue()


def metrics(phase: str = "train", epoch: int = 0, **values: float) -> MetricsLogged:
    named = {name.replace("__", "/"): value for name, value in values.items()}
    return MetricsLogged(values=named, phase=phase, epoch=epoch)


def test_the_load_of_the_machine_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line has the metrics of the training, not the samples that are recorded beside it."""
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    sink = ConsoleSink()
    sink.open(RunInfo(id="run", started=RunStarted()))
    training: list[Event] = [RunStarted(), EpochStarted(epoch=0), metrics(loss=1.0)]
    for seq, event in enumerate(training, 1):
        sink.write([Record(seq=seq, run="run", time=float(seq), event=event)])
    sample = MetricsLogged(values={"system/cpu.percent": 50.0}, phase="system")
    sink.write([Record(seq=1, run="run", time=4.0, event=sample, stream="system")])
    sink.write([Record(seq=4, run="run", time=5.0, event=EpochEnded(epoch=0, outcome="completed"))])
    sink.close()
    assert (True, False) == ("loss" in stream.getvalue(), "cpu" in stream.getvalue())


def test_shows_a_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """A training is a line an epoch, and at the end its status, best value and checkpoints."""
    started = RunStarted(
        params={"epochs": 2}, save_dir="/runs/7", goals={"metrics/mAP50-95(B)": "max"}
    )
    accuracy = [
        MetricsLogged(values={"metrics/mAP50-95(B)": v}, phase="validation", epoch=e)
        for e, v in enumerate((0.75, 0.5))
    ]
    shown = show(
        monkeypatch,
        [
            EpochStarted(epoch=0),
            metrics(train__box_loss=1.23456, train__cls_loss=float("nan")),
            accuracy[0],
            EpochEnded(epoch=0, duration_s=12.34, outcome="completed"),
            CheckpointSaved(path="/runs/7/best.pt", kind="best", epoch=0),
            EpochStarted(epoch=1),
            metrics(epoch=1, train__box_loss=1.0),
            accuracy[1],
            EpochEnded(epoch=1, duration_s=71.6, outcome="completed"),
            CheckpointSaved(path="/runs/7/last.pt", kind="last", epoch=1),
            RunEnded(status="finished"),
        ],
        started=started,
    )
    assert (
        textwrap.dedent(
            """\
            epoch 1/2  12.3s  train: box_loss 1.235 cls_loss nan  val: mAP50-95(B) 0.75
            epoch 2/2  1m12s  train: box_loss 1  val: mAP50-95(B) 0.5
            finished
              best value  metrics/mAP50-95(B) 0.75 in epoch 1/2
              best        /runs/7/best.pt
              last        /runs/7/last.pt
              saved in    /runs/7
            """
        )
        == shown
    )


def test_leaves_out_what_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line fits the width: what the trainer ranks by stays, and other values go first."""
    values = {f"lr/pg{i}": 0.1 for i in range(2000)}
    shown = show(
        monkeypatch,
        [
            EpochStarted(epoch=0),
            MetricsLogged(values={**values, "train/loss": 0.5}, phase="train", epoch=0),
            metrics("validation", accuracy=0.25, recall=0.5),
            EpochEnded(epoch=0, duration_s=1, outcome="completed"),
        ],
        columns=70,
        started=RunStarted(goals={"acc*": "max"}),
    )
    assert "epoch 1  1.0s  train: loss 0.5" in shown
    assert "val: accuracy 0.25 recall 0.5" in shown
    assert all(len(line) < 70 for line in shown.splitlines())


def test_takes_the_epochs_from_params_that_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of epochs follows `params.updated`, and only an int counts."""
    ended = EpochEnded(epoch=0, duration_s=1, outcome="completed")
    started = RunStarted(params={"epochs": 9})
    assert "epoch 1/9 " in show(monkeypatch, [ended], started=started)
    updated: list[Event] = [
        ParamsUpdated(params={"epochs": 3}),
        ParamsUpdated(params={"batch": 2}),
        ended,
    ]
    assert "epoch 1/3 " in show(monkeypatch, updated, started=started)
    for unknown in ("many", 2.0, True, None):
        started = RunStarted(params={"epochs": unknown})
        assert "epoch 1 " in show(monkeypatch, [ended], started=started)


@pytest.mark.parametrize(
    ("goal", "values", "best"),
    [
        ("max", [0.25, 0.75, 0.5], "loss 0.75 in epoch 2"),
        ("min", [0.75, 0.25, 0.5], "loss 0.25 in epoch 2"),
        ("max", [float("nan"), 0.25, float("nan")], "loss 0.25 in epoch 2"),
    ],
)
def test_finds_the_best_value(
    goal: str, values: list[float], best: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best value is the best in the direction that the trainer gives, and never NaN."""
    started = msgspec.convert({"type": "run.started", "goals": {"loss": goal}}, RunStarted)
    events = [metrics(epoch=epoch, loss=value) for epoch, value in enumerate(values)]
    shown = show(monkeypatch, [*events, RunEnded(status="finished")], started=started)
    assert f"best value  {best}\n" in shown


def test_a_goal_of_a_name_counts_more_than_that_of_a_prefix(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`prefix*` is the only pattern in a goal; the exact name decides, brackets and all."""
    started = RunStarted(goals={"val/*": "min", "val/head[0]/acc": "max"})
    events = [
        MetricsLogged(values={"val/head[0]/acc": value}, phase="validation", epoch=epoch)
        for epoch, value in enumerate((0.25, 0.75, 0.5))
    ]
    shown = show(monkeypatch, [*events, RunEnded(status="finished")], started=started)
    assert "best value  val/head[0]/acc 0.75 in epoch 2\n" in shown


def test_believes_the_trainers_best(monkeypatch: pytest.MonkeyPatch) -> None:
    """A best value that the run's end brings is shown instead of the sink's own."""
    ended = RunEnded(status="finished", best=Best(metric="fitness", value=0.5, epoch=4))
    shown = show(monkeypatch, [metrics(loss=1.0), ended], started=RunStarted(goals={"loss": "max"}))
    assert "best value  fitness 0.5 in epoch 5\n" in shown


def test_shows_why_a_run_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """The status is followed by the reason, or else by the error."""
    error = Failure(type="MemoryError", message="out of memory")
    assert "failed  MemoryError: out of memory\n" == show(
        monkeypatch, [RunEnded(status="failed", error=error)]
    )
    assert "stopped  early stopping\n" == show(
        monkeypatch, [RunEnded(status="stopped", reason="early stopping")]
    )


def test_shows_alerts_and_final_values_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Alerts and final evaluations are lines of their own, and epochs that are redone say so."""
    shown = show(
        monkeypatch,
        [
            EpochStarted(epoch=0),
            AlertRaised(title="GPU is hot", text="91 °C", level="warning"),
            EpochEnded(epoch=0, outcome="retried"),
            MetricsLogged(values={"acc": 0.5}, phase="validation", final=True),
        ],
    )
    assert "warning  GPU is hot: 91 °C\nepoch 1  2.0s  retried\nfinal  val: acc 0.5\n" == shown


def test_names_bring_no_markup_and_no_control_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Markup, emoji codes and escape sequences in names are shown as they are written."""
    nasty = "[red]x[/red] :smile: \x1b[2J\x07\r\n\u202e\u2028\t"
    shown = show(
        monkeypatch,
        [
            MetricsLogged(values={nasty: 0.5}, phase="validation", epoch=0),
            EpochEnded(epoch=0, duration_s=1, outcome="completed"),
            AlertRaised(title=nasty, level="error"),
            CheckpointSaved(path=nasty, kind="last"),
            RunEnded(status="failed", reason=nasty),
        ],
        started=RunStarted(save_dir=nasty),
        columns=200,
    )
    assert 4 == shown.count("[red]x[/red] :smile:")  # of a metric's name the last part is shown
    assert 5 == shown.count("red] :smile: \\x1b[2J\\x07\\r\\n\\u202e\\u2028\\t")
    assert 5 == len(shown.splitlines())
    assert "\x1b" not in shown


def test_a_stream_without_unicode_gets_escapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a stream that can't show a character, its escape is printed instead of an error."""
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii", errors="strict")
    monkeypatch.setattr(sys, "stdout", stream)
    sink = ConsoleSink(ConsoleOptions(stream="stdout"))
    sink.open(RunInfo(id="run", started=RunStarted()))
    alert = AlertRaised(title="µ", level="info")
    sink.write([Record(seq=1, run="run", time=0.0, event=alert)])
    sink.close()
    stream.flush()
    assert b"info  \\xb5\n" == raw.getvalue()


def test_the_live_line_replaces_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal a line grows with the epoch, and is erased before anything else is printed."""
    alert = AlertRaised(title="hot", level="info")
    events: list[Event] = [EpochStarted(epoch=0), metrics(loss=0.5), alert]
    shown = show(monkeypatch, events, stream=Terminal(), close=False)
    first, second, third = shown.split("\r\x1b[2K")
    assert first.endswith("  0.0s")
    assert second.endswith("  1.0s  train: loss 0.5")
    assert third.endswith("  hot\n")


def test_the_live_line_is_erased_at_close(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever ends a training, the live line is gone, the cursor was never hidden."""
    shown = show(monkeypatch, [EpochStarted(epoch=0)], stream=Terminal())
    assert shown.endswith("\r\x1b[2K")
    assert "\x1b[?25l" not in shown


def test_a_dumb_terminal_has_no_live_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal that can't erase a line gets plain lines."""
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "dumb")
    sink = ConsoleSink()
    sink.open(RunInfo(id="run", started=RunStarted()))
    sink.write([Record(seq=1, run="run", time=0.0, event=EpochStarted(epoch=0))])
    sink.close()
    assert "" == stream.getvalue()


TRAINING = """
from trainbus import Bus
from trainbus.sinks.console import ConsoleSink
bus = Bus({"console": ConsoleSink()}, on_receipt=lambda receipt: None)
with bus.run(params={"epochs": 5}) as run:
    for epoch in run.epochs(5):
        run.log({"loss": 0.5})
        if epoch == 1:
            raise ValueError("diverged")
"""


def test_a_real_terminal_is_left_as_it_was(tmp_path: Path) -> None:
    """A training that fails on a real terminal leaves whole lines and a visible cursor."""
    main, side = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", TRAINING],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=side,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "80"},
        cwd=tmp_path,
    )
    os.close(side)
    parts: list[bytes] = []

    def read() -> None:
        while True:
            try:
                part = os.read(main, 4096)
            except OSError:  # on Linux the end of a terminal is an input/output error
                return
            if not part:
                return
            parts.append(part)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    assert 1 == process.wait(timeout=60)
    reader.join(timeout=60)
    os.close(main)
    shown = b"".join(parts).decode()
    assert "\x1b[?25l" not in shown
    left = [line.rpartition("\x1b[2K")[2].rstrip("\r") for line in shown.split("\n")]
    failed = next(i for i, line in enumerate(left) if "ValueError: diverged" in line)
    assert "failed" in left[failed]
    assert "train: loss 0.5" in left[0]
    assert "\x1b[2K" not in "".join(left)


def test_options_are_checked() -> None:
    """Only the two existing streams are accepted."""
    with pytest.raises(msgspec.ValidationError, match="Invalid enum value 'stdin'"):
        msgspec.convert({"stream": "stdin"}, ConsoleOptions)
    with pytest.raises(msgspec.ValidationError, match="unknown field `colour`"):
        msgspec.convert({"colour": True}, ConsoleOptions)


def test_serves_two_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second run of a bus begins afresh: no epochs, values or checkpoints of the first."""
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    bus = Bus({"console": ConsoleSink()}, on_receipt=lambda receipt: None)
    with bus.run(params={"epochs": 1}, save_dir=None) as run:
        for _ in run.epochs(1):
            run.log({"loss": 0.5})
        run.checkpoint("last.pt")
    before = len(stream.getvalue())
    with bus.run() as run:
        for _ in run.epochs(1):
            pass
    epoch, status = stream.getvalue()[before:].splitlines()
    assert epoch.startswith("epoch 1  ")
    assert "loss" not in epoch
    assert "finished" == status


def test_a_configured_console_prints_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process has no terminal: the sink stays in this one, and ends before the receipt."""
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with config.loads("sinks: {screen: {type: console}}") as bus, bus.run() as run:
        for _ in run.epochs(2):
            run.log({"loss": 0.5})
    epoch, _, status, receipt, *_ = stream.getvalue().splitlines()
    assert epoch.startswith("epoch 1  ")
    assert "finished" == status
    assert receipt.startswith("trainbus: run ")
    assert "  screen   console: 8 delivered" in stream.getvalue().splitlines()


def test_an_epoch_shows_the_latest_of_its_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainers that log by steps show in each epoch what they logged last, and their best."""

    def logged(phase: str, step: int, **values: float) -> MetricsLogged:
        return MetricsLogged(values=values, phase=phase, epoch=0, step=step)

    events: list[Event] = [
        EpochStarted(epoch=0),
        logged("train", 1, loss=2.0),
        logged("train", 2, loss=1.0),
        MetricsLogged(values={"batch": 9.0}, phase="train", epoch=0, step=2, on_request=True),
        logged("validation", 2, eval_loss=3.0),
        EpochEnded(epoch=0, duration_s=1.0, outcome="completed"),
        RunEnded(status="finished"),
    ]
    lines = show(monkeypatch, events, started=RunStarted(goals={"eval_loss": "min"})).splitlines()
    assert "epoch 1  1.0s  train: loss 1  val: eval_loss 3" == lines[0]
    assert "  best value  eval_loss 3 in epoch 1" == lines[2]


def test_a_training_without_epochs_shows_its_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing has epochs, a line comes every ten seconds of the training."""
    rewards = range(25)
    events: list[Event] = [
        MetricsLogged(values={"reward": n}, phase="train", step=n * 100) for n in rewards
    ]
    shown = show(monkeypatch, [*events, RunEnded(status="finished")])
    assert [
        "step 800  train: reward 8",
        "step 1800  train: reward 18",
        "finished",
    ] == shown.splitlines()
