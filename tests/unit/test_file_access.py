"""The files that events name: found from anywhere, and sent only while they are the same files."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from support.emitting import emit
from support.journals import folder_in, read_file
from support.wandb_file import find_runs, read_finished
from trainbus import Bus, JournalSpec, Record, Sink
from trainbus.cli import app
from trainbus.delivery import replay as replays
from trainbus.delivery.receipt import SinkReport
from trainbus.delivery.spec import SinkSpec
from trainbus.events import (
    ArtifactLogged,
    CheckpointSaved,
    Event,
    ImageLogged,
    Resumed,
    RunEnded,
    RunStarted,
)
from trainbus.journal.directory import RunFolder
from trainbus.journal.encoding import Entry
from trainbus.journal.file_access import FileResolver
from trainbus.journal.writer import JournalWriter


class Kept(Sink):
    """Reads the files of records as they come."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, str | None]] = []

    def wants_files(self, event: CheckpointSaved | ArtifactLogged) -> bool:
        return True

    def write(self, records: Sequence[Record]) -> None:
        for record in records:
            event: Any = record.event
            for path in getattr(event, "paths", [getattr(event, "path", None)]):
                if path is not None:
                    self.found.append((Path(path).name, content(path)))


def content(path: str) -> str | None:
    """Return what a file holds, or all files of a folder; None where nothing is."""
    if os.path.isdir(path):
        return "".join(sorted(each.read_text() for each in Path(path).iterdir()))
    return Path(path).read_text() if os.path.exists(path) else None


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory, beside which there is room for journals."""
    folder = tmp_path / "my work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def log(root: Path, *steps: Event | Callable[[], object], wants_files: bool = False) -> RunFolder:
    """Log a run of these events, and do in between what is to be done."""
    sinks = {"keeper": Kept()} if wants_files else {}
    with Bus(sinks, journal=JournalSpec(dir=str(root / "runs"))) as bus:
        for step in (RunStarted(), *steps, RunEnded(status="finished")):
            if callable(step):
                step()
            else:
                emit(bus, step)
    return RunFolder.existing(str(bus.receipts[0].journal))


def forget(folder: RunFolder) -> None:
    """Have the next replay send everything again."""
    shutil.rmtree(folder.path / "cursors")


def replayed(folder: RunFolder, *trusted: Path) -> tuple[Kept, SinkReport, FileResolver]:
    """Return what a sink got of a run, what the receipt says of it, and of the files."""
    sink = Kept()
    routes = [SinkSpec(name="kept", kind="kept", make=lambda: sink, sink=sink)]
    receipt, files = replays.replay(folder, routes, trusted=[str(each) for each in trusted])
    return sink, receipt.sinks[0], files


# Paths --------------------------------------------------------------------------------------------


def test_paths_are_absolute_once_they_are_logged(work: Path, tmp_path: Path) -> None:
    """Subscribers and the journal get paths that do not depend on the working directory."""
    heard: list[Any] = []
    bus = Bus(journal=JournalSpec(dir=str(tmp_path / "runs")))
    bus.subscribe(lambda record: heard.append(record.event))
    with bus:
        emit(bus, RunStarted(save_dir="out", resumed=Resumed(save_dir="./before")))
        emit(bus, ImageLogged(key="k", path="a.png"))
        emit(bus, CheckpointSaved(path=os.path.join("..", "m.pt"), kind="best"))
        emit(bus, ArtifactLogged(name="a", paths=["x", "/y", "s3://bucket/z"]))
    started, image, saved, kept, _ = heard
    assert (f"{work}/out", f"{work}/before") == (started.save_dir, started.resumed.save_dir)
    assert (f"{work}/a.png", f"{work}/../m.pt") == (image.path, saved.path)
    assert [f"{work}/x", "/y", "s3://bucket/z"] == kept.paths
    folder = RunFolder.existing(str(bus.receipts[0].journal))
    assert heard == [entry.record.event for entry in read_file(folder)[0]]


def test_a_deleted_working_directory_raises_nothing(tmp_path: Path, work: Path) -> None:
    """A path that can't be made absolute is logged as it is, and its file is not available."""
    work.rmdir()
    sink = Kept()
    with Bus({"kept": sink}, journal=JournalSpec(dir=str(tmp_path / "runs"))) as bus:
        emit(bus, CheckpointSaved(path="m.pt", kind="best"))
        os.chdir(tmp_path)
        (tmp_path / "m.pt").write_text("of another run")
    assert [("m.pt", None)] == sink.found
    (found,) = read_file(RunFolder.existing(str(bus.receipts[0].journal)))[0][1:-1]
    assert CheckpointSaved(path="m.pt", kind="best") == found.record.event


# States -------------------------------------------------------------------------------------------


def test_a_line_says_what_the_files_were(work: Path, tmp_path: Path) -> None:
    """Size and time of a file stand in the journal where it is not copied, a digest where it is."""
    for name in ("last.pt", "best.pt"):
        (work / name).write_text(name)
    folder = log(
        tmp_path,
        CheckpointSaved(path="last.pt", kind="last"),
        CheckpointSaved(path="best.pt", kind="best", final=True),
        CheckpointSaved(path="gone.pt", kind="last"),
        wants_files=True,
    )
    last, best, gone = map(json.loads, folder.records(1).read_bytes().splitlines()[1:-1])
    stat = (work / "last.pt").stat()
    state = {"path": f"{work}/last.pt", "size": 7, "mtime_ns": stat.st_mtime_ns}
    assert [state] == last["files"]
    assert [f"{work}/best.pt"] == [blob["path"] for blob in best["blobs"]]
    assert (True, True) == ("blobs" not in last, "files" not in best)
    assert set() == {"blobs", "files"} & gone.keys()


CHANGES: dict[str, Callable[[Path], object]] = {
    "another size": lambda path: path.write_text("of another run"),
    "another time": lambda path: os.utime(path, ns=(1, 1)),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(
    "event",
    [
        CheckpointSaved(path="m.pt", kind="best", final=True),
        CheckpointSaved(path="m.pt", kind="periodic"),
        ArtifactLogged(name="a", paths=["m.pt"]),
    ],
    ids=["final", "periodic", "artifact"],
)
def test_another_file_is_refused(event: Event, change: str, work: Path, tmp_path: Path) -> None:
    """A trusted folder does not make another file the one that was logged: a line says so."""
    (work / "m.pt").write_text("of this run")
    folder = log(tmp_path, event)
    assert [("m.pt", "of this run")] == replayed(folder, work)[0].found
    CHANGES[change](work / "m.pt")
    forget(folder)
    sink, _, files = replayed(folder, work)
    assert [("m.pt", None)] == sink.found
    (line,) = files.changed
    assert line.startswith(f"{work}/m.pt: expected 11 bytes, written at 20")
    size = (work / "m.pt").stat().st_size
    assert f", found {size} bytes, written at " in line
    assert line.endswith("the file has changed since it was logged, and is not sent")


def test_another_picture_is_refused_while_a_training_runs(
    work: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Where the journal has no room for a copy, a picture that was drawn anew is not sent."""
    (work / "p.png").write_text("old")
    folder = folder_in(tmp_path)
    journal = JournalWriter(folder, max_bytes=1)
    journal.append(ImageLogged(key="k", path=f"{work}/p.png"), 1.0)
    journal.close()
    (work / "p.png").write_text("new one")
    (entry,) = read_file(folder)[0]
    files = FileResolver(folder, None)
    found: Any = [files.resolve(entry).event for _ in range(3)]
    assert [None] * 3 == [content(event.path) for event in found]
    assert files.changed == [record.getMessage() for record in caplog.records]
    assert 1 == len(files.changed)


def test_a_folder_may_have_further_files_but_no_other(work: Path, tmp_path: Path) -> None:
    """A checkpoint folder is not sent if one of its files has changed."""
    for name in ("weights", "optimizer"):
        (work / "checkpoint-1" / name).parent.mkdir(exist_ok=True)
        (work / "checkpoint-1" / name).write_text(name)
    folder = log(tmp_path, CheckpointSaved(path="checkpoint-1", kind="last", final=True))
    (work / "checkpoint-1" / "state").write_text("state")
    assert "optimizerstateweights" == replayed(folder, work)[0].found[0][1]
    (work / "checkpoint-1" / "weights").write_text("of another run")
    forget(folder)
    sink, _, files = replayed(folder, work)
    assert [("checkpoint-1", None)] == sink.found
    assert [f"{work}/checkpoint-1/weights"] == [t.partition(":")[0] for t in files.changed]


def test_an_artifact_of_many_files_is_still_one_line(work: Path, tmp_path: Path) -> None:
    """However many files an event names, its line can be read."""
    for number in range(1100):
        (work / f"{number}.txt").touch()
    folder = log(tmp_path, ArtifactLogged(name="a", paths=["."]))
    (entry,) = read_file(folder)[0][1:-1]
    assert 1000 == len(entry.files)


def test_a_journal_of_before_is_read(work: Path, tmp_path: Path) -> None:
    """Where nothing was noted of a file it is sent, if its path is absolute and trusted."""
    (work / "m.pt").write_text("of this run")
    files = FileResolver(folder_in(tmp_path), [work])
    for path, expected in ((f"{work}/m.pt", "of this run"), ("m.pt", None)):
        event = CheckpointSaved(path=path, kind="best", final=True)
        entry = Entry(Record(seq=1, run="run", time=1.0, event=event), ())
        found: Any = files.resolve(entry).event
        assert expected == content(found.path)
    (line,) = files.changed
    assert line.startswith("'m.pt' is not sent: found a relative path, expected an absolute one")


# Checkpoints that are overwritten -----------------------------------------------------------------


def save(work: Path, epoch: int, *, final: bool = False) -> tuple[Callable[[], object], Event]:
    """Return a function that writes the last checkpoint of an epoch and returns its event."""
    event = CheckpointSaved(path="last.pt", kind="last", epoch=epoch, final=final)
    return lambda: (work / "last.pt").write_text("x" * epoch), event


def test_an_overwritten_checkpoint_is_superseded_and_no_loss(work: Path, tmp_path: Path) -> None:
    """Only the last state of a file that the trainer writes again arrives, and nothing is lost."""
    saves = [step for epoch in (1, 2, 3) for step in save(work, epoch)]
    folder = log(tmp_path, *saves, save(work, 3, final=True)[1])
    sink, report, files = replayed(folder, work)
    assert [("last.pt", "xxx"), ("last.pt", "xxx")] == sink.found
    assert (6, 2, 0, 0) == (report.taken, report.superseded, report.lost, report.skipped)
    assert [] == files.changed


def test_a_checkpoint_that_another_training_overwrote_is_told(work: Path, tmp_path: Path) -> None:
    """A checkpoint that no later one of its run took the place of is not superseded silently."""
    folder = log(tmp_path, *save(work, 1), *save(work, 2))
    (work / "last.pt").write_text("of another run")
    sink, report, files = replayed(folder, work)
    assert ([], 2) == (sink.found, report.superseded)
    (line,) = files.changed
    assert line.startswith(f"{work}/last.pt: expected 2 bytes")


def test_sinks_that_send_no_checkpoint_see_each(work: Path, tmp_path: Path) -> None:
    """While a training runs, a sink that only shows checkpoints has all, with their true paths."""
    folder = log(tmp_path, *save(work, 1), *save(work, 2))
    files = FileResolver(folder, None)
    entries = read_file(folder)[0][1:-1]
    found: list[Any] = [files.take(entry) for entry in entries]
    assert [(f"{work}/last.pt", False)] * 2 == [
        (each.record.event.path, each.is_superseded) for each in found
    ]
    assert [] == files.changed


# The command --------------------------------------------------------------------------------------


def replay(folder: RunFolder, into: Path, *more: object) -> subprocess.CompletedProcess[str]:
    """Replay a run into W&B, from a folder where another run's model has the same name."""
    into.mkdir()
    (into / "m.pt").write_text("of the wrong run")
    (into / "w.yaml").write_text("sinks: {w: {type: wandb, mode: offline, dir: .}}")
    command = ["-m", "trainbus", "replay", folder.path, "-c", "w.yaml", *more]
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=into,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def models(folder: Path) -> list[tuple[int, str]]:
    """Return size and digest of the files that W&B has of a run."""
    (path,) = find_runs(folder)
    artifacts = read_finished(path).artifacts
    return [(file.size, file.digest) for each in artifacts for file in each.files.values()]


def test_following_the_advice_sends_the_right_model(work: Path, tmp_path: Path) -> None:
    """W&B gets the model that was logged, by the printed advice, and never one of its name."""
    (work / "m.pt").write_text("of this run")
    folder = log(tmp_path, CheckpointSaved(path="m.pt", kind="best", epoch=0))
    first = replay(folder, tmp_path / "first")
    assert (0, []) == (first.returncode, models(tmp_path / "first"))
    (advice,) = [line for line in first.stderr.splitlines() if "--files-from" in line]
    option = shlex.split(advice[advice.index("--files-from") :])
    assert ["--files-from", str(work)] == option
    forget(folder)
    second = replay(folder, tmp_path / "second", *option)
    assert (0, [11]) == (second.returncode, [size for size, _ in models(tmp_path / "second")])


def run(*args: object) -> tuple[int, list[str]]:
    """Run the command in this process; return exit code and the lines on stderr."""
    done = CliRunner().invoke(app.app, [str(arg) for arg in args])
    return done.exit_code, done.stderr.splitlines()


@pytest.mark.needs("dvclive")
def test_a_changed_file_is_told_and_the_exit_code_is_1(work: Path, tmp_path: Path) -> None:
    """`trainbus replay` names the file that it did not send, even from a trusted folder."""
    (work / "m.pt").write_text("of this run")
    folder = log(tmp_path, CheckpointSaved(path="m.pt", kind="best", final=True))
    (work / "m.pt").write_text("of a later run")
    (work / "c.yaml").write_text("sinks: {a: {type: dvclive, dir: live}}")
    code, lines = run("replay", folder.path, "-c", "c.yaml", "--files-from", ".")
    assert (1, [f"{work}/m.pt: expected 11 bytes"]) == (
        code,
        [line.partition(", written at")[0] for line in lines if "is not sent" in line],
    )


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ("", "--files-from: found an empty name, expected a folder"),
        ("nowhere", "--files-from: found no folder 'nowhere', expected one that exists"),
    ],
)
@pytest.mark.parametrize("command", ["replay", "compare"])
def test_what_is_no_folder_is_refused(
    command: str, given: str, line: str, work: Path, tmp_path: Path
) -> None:
    """`--files-from` accepts only folders; an empty name is not the current folder."""
    folder = log(tmp_path, CheckpointSaved(path="m.pt", kind="best"))
    (work / "c.yaml").write_text("sinks: {a: {type: jsonl, path: a.jsonl}}")
    more = ["-c", "c.yaml"] if command == "replay" else []
    assert (2, [line]) == run(command, folder.path, *more, "--files-from", given)
