"""A run that is on disk can be sent again, checked and shown."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
import threading
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
from typer.testing import CliRunner

import trainbus
from support.emitting import emit
from support.journals import SAMPLE, folder_in, write_journal
from support.wandb_file import WandbArtifact, WandbRun, find_runs, read_finished
from trainbus import Bus, JournalSpec, Record, Sink
from trainbus.cli import app
from trainbus.cli import show as shows
from trainbus.delivery import replay as replays
from trainbus.events import (
    AlertRaised,
    ArtifactLogged,
    CheckpointSaved,
    EpochEnded,
    EpochStarted,
    Event,
    MetricsLogged,
    ParamsUpdated,
    RunEnded,
    RunStarted,
    TextLogged,
    decode,
)
from trainbus.journal import locks
from trainbus.journal.directory import RunFolder
from trainbus.journal.writer import JournalWriter
from trainbus.testing.samples import sample_events

_DEADLINE_S = 240.0


class Live(NamedTuple):
    """The sample run as it was when its training had ended."""

    root: Path
    folder: Path
    lines: bytes
    wandb: WandbRun


def run(*args: object) -> tuple[int, str, str]:
    """Run the command in this process; return exit code, stdout and stderr."""
    result = CliRunner().invoke(app.app, [str(arg) for arg in args], prog_name="trainbus")
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.exit_code, result.stdout, result.stderr


def run_process(*args: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own, where W&B may do what it likes."""
    return subprocess.run(
        [sys.executable, "-m", "trainbus", *map(str, args)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def config_of(folder: Path, sinks: str, more: str = "") -> Path:
    """Write a configuration file, and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.yaml"
    path.write_text(f"journal: {{dir: {folder}/trainbus-runs}}\n{more}\nsinks: {{{sinks}}}\n")
    return path


def jsonl_config(folder: Path) -> tuple[Path, Path]:
    """Return a configuration file with one `jsonl` sink, and the path of that sink's file."""
    kept = folder / "kept.jsonl"
    return config_of(folder, f"kept: {{type: jsonl, path: {kept}}}"), kept


def run_live(config: Path, events: Sequence[Event]) -> Path:
    """Emit events through the bus of a file; return the run's directory."""
    with trainbus.load(config) as bus:
        for event in events:
            emit(bus, event)
    (receipt,) = bus.receipts
    assert receipt.journal is not None
    assert [0, 0] == [receipt.pending, receipt.dropped]
    return Path(receipt.journal)


def snapshot(root: Path) -> dict[str, tuple[int, bytes]]:
    """Return every file and folder below a folder, with when and what was written."""
    return {
        str(path): (path.lstat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in root.rglob("*")
    }


def seqs(path: Path) -> list[int]:
    """Return the numbers of the records in a file of JSON lines."""
    return [decode(line).seq for line in path.read_bytes().splitlines()]


def shown(values: dict[str, Any]) -> str:
    """Return what a user logged, as text in which NaN equals NaN."""
    text = json.dumps({k: v for k, v in values.items() if not k.startswith("_")}, sort_keys=True)
    return re.sub(r"wandb-client-artifact://\w+", "<artifact>", text)  # drawn anew each time


def artifacts_of(found: WandbRun) -> list[Any]:
    """Return what there is to know of artifacts, but for where their files lie."""

    def about(artifact: WandbArtifact) -> Any:
        files = {name: (file.size, file.digest) for name, file in artifact.files.items()}
        name = artifact.name.replace(found.run_id, "<id>")
        return name, artifact.type, artifact.aliases, repr(artifact.metadata), sorted(files.items())

    return sorted(map(about, found.artifacts))


def only_run(folder: Path) -> WandbRun:
    """Return the one offline run in a folder."""
    (path,) = find_runs(folder)
    return read_finished(path)


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Live:
    """The sample run, made live through a bus into a file and W&B, by a process of their own."""
    root = tmp_path_factory.mktemp("live")
    kept, tracker = root / "kept.jsonl", root / "tracker"
    sinks = (
        f"kept: {{type: jsonl, path: {kept}}}, "
        f"tracker: {{type: wandb, mode: offline, dir: {tracker}}}"
    )
    folder = run_live(
        config_of(root, sinks, "isolation: process"), sample_events(root / "training")
    )
    return Live(root, folder, kept.read_bytes(), only_run(tracker))


@pytest.fixture
def sample(tmp_path: Path) -> RunFolder:
    """The directory of a run of ten records that no sink has got."""
    folder = folder_in(tmp_path / "runs", "sample_run")
    write_journal(folder)
    return folder


def test_a_replayed_file_is_the_live_one(live: Live, tmp_path: Path) -> None:
    """Every event type comes out of the journal byte for byte as it came out of the training."""
    config, kept = jsonl_config(tmp_path)
    code, out, err = run("replay", live.folder, "-c", config)
    assert (0, "") == (code, err.strip())
    assert live.lines == kept.read_bytes()
    assert f"{len(live.lines.splitlines())} delivered" in out


@pytest.mark.parametrize("isolation", ["inline", "thread"])
def test_inline_and_thread_replay_to_the_same(isolation: str, tmp_path: Path) -> None:
    """However the sinks were fed, the replayed file is the live one."""
    kept = tmp_path / "live" / "kept.jsonl"
    sinks = f"kept: {{type: jsonl, path: {kept}}}"
    config = config_of(tmp_path / "live", sinks, f"isolation: {isolation}")
    folder = run_live(config, sample_events(tmp_path / "training"))
    other, again = jsonl_config(tmp_path / "other")
    assert 0 == run("replay", folder, "-c", other)[0]
    assert kept.read_bytes() == again.read_bytes()


def test_replaying_twice_adds_nothing(live: Live, tmp_path: Path) -> None:
    """A second replay leaves the file as it is, says that nothing waits, and exits with 0."""
    config, kept = jsonl_config(tmp_path)
    assert 0 == run("replay", live.folder, "-c", config)[0]
    before = snapshot(tmp_path)
    code, out, err = run("replay", live.folder, "-c", config)
    assert (0, "") == (code, err.strip())
    assert "PENDING" not in out
    assert before == snapshot(tmp_path)
    assert live.lines == kept.read_bytes()


def test_a_replayed_wandb_run_is_the_live_one(live: Live, tmp_path: Path) -> None:
    """History, config, summary and artifacts in W&B are those of the training, and only once."""
    config = config_of(tmp_path, f"tracker: {{type: wandb, mode: offline, dir: {tmp_path}/w}}")
    trusted = ["--files-from", live.root / "training"]
    command = ["replay", live.folder, "-c", config, *trusted]
    first = run_process(*command, cwd=tmp_path)
    assert 0 == first.returncode, first.stderr
    found = only_run(tmp_path / "w")
    assert list(map(shown, live.wandb.history)) == list(map(shown, found.history))
    assert shown(live.wandb.config) == shown(found.config)
    assert shown(live.wandb.summary) == shown(found.summary)
    assert artifacts_of(live.wandb) == artifacts_of(found)
    assert live.wandb.run_id == found.run_id
    assert live.wandb.exit_code == found.exit_code

    again = run_process(*command, cwd=tmp_path)
    assert 0 == again.returncode, again.stderr
    assert 1 == len(find_runs(tmp_path / "w"))


def test_files_outside_are_sent_only_if_they_are_trusted(tmp_path: Path) -> None:
    """A copy is sent from the journal, a path outside of it only with `--files-from`."""
    training = tmp_path / "training"
    training.mkdir()
    for name in ("best.pt", "last.pt"):
        (training / name).write_text(name)
    best = CheckpointSaved(path=str(training / "best.pt"), kind="best", epoch=0, final=True)
    last = CheckpointSaved(path=str(training / "last.pt"), kind="last", epoch=0)
    # W&B is among the sinks, so the journal keeps a copy of what is final.
    off = f"tracker: {{type: wandb, mode: disabled, dir: {tmp_path}, save_checkpoints: all}}"
    config = config_of(tmp_path / "live", off, "isolation: process")
    folder = run_live(config, [RunStarted(name="x"), best, last, RunEnded(status="finished")])
    (training / "best.pt").unlink()

    found = {}
    for name, more in (("without", []), ("with", ["--files-from", training])):
        sinks = f"t: {{type: wandb, mode: offline, dir: {tmp_path / name}, save_checkpoints: all}}"
        config = config_of(tmp_path / name, sinks)
        done = run_process("replay", folder, "-c", config, *more, cwd=tmp_path)
        assert 0 == done.returncode, done.stderr
        assert (name == "without") == (f"--files-from {training}" in done.stderr)
        artifacts = only_run(tmp_path / name).artifacts
        found[name] = sorted(file for artifact in artifacts for file in artifact.files)
    assert {"without": ["best.pt"], "with": ["best.pt", "last.pt"]} == found


def test_dry_run_says_and_writes_nothing(sample: RunFolder, tmp_path: Path) -> None:
    """`--dry-run` says how many records each sink would get, and touches no file."""
    config, kept = jsonl_config(tmp_path)
    before = snapshot(tmp_path)
    assert (0, "kept (jsonl): 10 records would be sent\n", "") == run(
        "replay", sample.path, "-c", config, "--dry-run"
    )
    assert (
        "kept (jsonl): 1 record would be sent\n"
        == (run("replay", sample.path, "-c", config, "--dry-run", "--from", "10")[1])
    )
    assert before == snapshot(tmp_path)
    assert 0 == run("replay", sample.path, "-c", config)[0]
    before = snapshot(tmp_path)
    assert (
        "kept (jsonl): 0 records would be sent\n"
        == (run("replay", sample.path, "-c", config, "--dry-run")[1])
    )
    assert before == snapshot(tmp_path)
    assert kept.exists()


@pytest.mark.parametrize("first", ["4", "1:4"])
def test_from_sends_what_comes_after(first: str, sample: RunFolder, tmp_path: Path) -> None:
    """`--from` sends that record and what comes after it, and nothing before."""
    config, kept = jsonl_config(tmp_path)
    assert 0 == run("replay", sample.path, "-c", config, "--from", first)[0]
    assert [4, 5, 6, 7, 8, 9, 10] == seqs(kept)


def test_from_sends_again_what_was_sent(sample: RunFolder, tmp_path: Path) -> None:
    """A file that was removed is filled again from the record that is asked for."""
    config, kept = jsonl_config(tmp_path)
    assert 0 == run("replay", sample.path, "-c", config)[0]
    kept.unlink()
    assert 0 == run("replay", sample.path, "-c", config)[0]
    assert not kept.exists()
    assert 0 == run("replay", sample.path, "-c", config, "--from", "1")[0]
    assert list(range(1, 11)) == seqs(kept)


def test_from_the_second_attempt(sample: RunFolder, tmp_path: Path) -> None:
    """`--from 2:1` leaves the first attempt out, `--from 9` begins in it."""
    write_journal(
        sample, RunStarted(), EpochStarted(epoch=1), RunEnded(status="finished"), attempt=2
    )
    for first, expected in (("2:1", [1, 2, 3]), ("9", [9, 10, 1, 2, 3])):
        config, kept = jsonl_config(tmp_path / first.replace(":", "-"))
        assert 0 == run("replay", sample.path, "-c", config, "--from", first)[0]
        assert expected == seqs(kept)


def test_from_beyond_the_end_accounts_for_what_is_there(sample: RunFolder, tmp_path: Path) -> None:
    """What a receipt counts of a sink adds up to what was emitted, whatever was asked for."""
    config, _ = jsonl_config(tmp_path)
    run("replay", sample.path, "-c", config, "--from", "99")
    receipt = msgspec.json.decode(sample.receipt.read_bytes(), type=trainbus.Receipt)
    (report,) = receipt.sinks
    assert receipt.emitted == report.taken + report.skipped + report.dead + report.pending


@pytest.mark.parametrize(
    "first", ["0", "x", "", "-1", "1:", ":1", "1:0", "7:1", "1.5", "1:2:3", "9" * 16, "1\n2"]
)
def test_a_bad_from_is_one_line(first: str, sample: RunFolder, tmp_path: Path) -> None:
    """An invalid position is an error of one line."""
    config, kept = jsonl_config(tmp_path)
    code, out, err = run("replay", sample.path, "-c", config, "--from", first)
    assert (2, "", 1) == (code, out, len(err.splitlines()))
    assert "--from: found" in err
    assert "expected" in err
    assert not kept.exists()


KILLED = """
    import os, signal, sys
    import trainbus

    with trainbus.load(sys.argv[1]) as bus, bus.run(name="killed") as run:
        for epoch in run.epochs(3):
            run.log({"loss": 1 / (epoch + 1)})
        print(bus.open_runs[-1]._journal.folder.path, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_run_gets_its_end(tmp_path: Path) -> None:
    """A run whose process was killed ends as failed in the sink that has its other records."""
    kept = tmp_path / "kept.jsonl"
    config = config_of(tmp_path, f"kept: {{type: jsonl, path: {kept}}}", "isolation: inline")
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLED), str(config)],
        capture_output=True,
        text=True,
        timeout=_DEADLINE_S,
        check=False,
    )
    assert -9 == done.returncode, done.stderr
    folder, before = done.stdout.strip(), kept.read_bytes()
    assert b"run.ended" not in before
    for _ in range(2):
        code, out, err = run("replay", folder, "-c", config)
        assert (0, "") == (code, err.strip())
    assert "failed" in out
    assert kept.read_bytes().startswith(before)
    (end,) = map(decode, kept.read_bytes()[len(before) :].splitlines())
    assert isinstance(end.event, RunEnded)
    assert ("failed", len(before.splitlines()) + 1) == (end.event.status, end.seq)
    assert 0 == run("verify", folder)[0]


def test_a_live_journal_is_refused(tmp_path: Path) -> None:
    """While a training writes the journal a replay says so, and sends nothing."""
    config, kept = jsonl_config(tmp_path)
    journal = JournalWriter(folder_in(tmp_path / "runs"))
    journal.append(RunStarted(), 1.0)
    code, out, err = run("replay", journal.folder.path, "-c", config)
    journal.close()
    assert (2, "") == (code, out)
    assert "still running" in err
    assert not err.startswith("\n")
    assert 1 == len(err.splitlines())
    assert not kept.exists()


class FlakySink(Sink):
    """Takes so many records, then has no network."""

    def __init__(self) -> None:
        super().__init__()
        self.left = 4
        self.seqs: list[int] = []

    def write(self, records: Sequence[Record]) -> None:
        """Take the records while it can."""
        for record in records:
            if not self.left:
                raise ConnectionError("no network")
            self.left -= 1
            self.seqs.append(record.seq)


def test_a_replay_sends_only_the_rest(tmp_path: Path) -> None:
    """A sink that lost its network gets what it has not got, each record once."""
    sink = FlakySink()
    spec = JournalSpec(dir=str(tmp_path / "runs"))
    with Bus({"flaky": sink}, isolation="inline", journal=spec, flush_secs=0.1) as bus:
        for event in SAMPLE:
            emit(bus, event)
    (receipt,) = bus.receipts
    assert [1, 2, 3, 4] == sink.seqs
    assert 6 == receipt.pending
    folder = RunFolder.existing(str(receipt.journal))
    assert [6] == [plan.missing for plan in replays.plan(folder, bus.settings.sinks)]
    sink.left = 100
    for _ in range(2):
        after, _files = replays.replay(folder, bus.settings.sinks, flush_secs=1.0)
        assert (10, 0) == (after.sinks[0].taken, after.pending)
        assert list(range(1, 11)) == sink.seqs


def test_a_replay_that_fails_says_so(sample: RunFolder, tmp_path: Path) -> None:
    """A sink that can't be written leaves the records pending and the exit code 1."""
    (tmp_path / "file").write_text("")
    config = config_of(tmp_path, f"kept: {{type: jsonl, path: {tmp_path}/file/kept.jsonl}}")
    code, out, _ = run("replay", sample.path, "-c", config)
    assert 1 == code
    assert "10 PENDING" in out


def test_verify_finds_a_sound_run_sound(live: Live) -> None:
    """A run as it was written has nothing damaged, and exit code 0."""
    code, out, err = run("verify", live.folder)
    assert (0, "") == (code, err.strip())
    count = len(live.folder.joinpath("r0-a1.jsonl").read_bytes().splitlines())
    assert [f"r0-a1.jsonl: {count} records, finished"] == out.splitlines()


def test_a_progress_that_nobody_sees_leaves_nothing(sample: RunFolder) -> None:
    """If stderr is no terminal, a successful command writes nothing to it."""
    code, out, err = run("verify", sample.path)
    assert (0, "r0-a1.jsonl: 10 records, finished\n", "") == (code, out, err)


def test_verify_counts_a_flipped_byte(sample: RunFolder) -> None:
    """One flipped byte is one damaged record, reported with its file, and exit code 1."""
    data = bytearray(sample.records(1).read_bytes())
    data[len(data) // 2] ^= 1
    sample.records(1).write_bytes(data)
    code, out, _ = run("verify", sample.path)
    assert (1, ["r0-a1.jsonl: 9 records, 1 damaged, finished"]) == (code, out.splitlines())


@pytest.mark.parametrize("how", ["missing", "damaged"])
def test_verify_names_a_blob_that_is_not_whole(how: str, tmp_path: Path) -> None:
    """A blob that is gone or altered is named, with exit code 1."""
    (tmp_path / "data.bin").write_bytes(b"content")
    folder = folder_in(tmp_path / "runs")
    journal = JournalWriter(folder, wants_files=lambda event: True)
    paths = [str(tmp_path / "data.bin")]
    for event in (RunStarted(), ArtifactLogged(name="a", paths=paths), RunEnded(status="finished")):
        journal.append(event, 1.0)
    journal.close()
    assert 0 == run("verify", folder.path)[0]
    (blob,) = folder.blobs.glob("*/*")
    if how == "missing":
        blob.unlink()
    else:
        blob.write_bytes(b"CONTENT")
    code, _, err = run("verify", folder.path)
    assert 1 == code
    assert blob.parent.name in err
    assert "artifact.logged" in err


def test_show_tells_what_a_run_is(tmp_path: Path) -> None:
    """The page has the run's id, its end, its parameters, metrics and sinks."""
    config, kept = jsonl_config(tmp_path)
    events: list[Event] = [
        RunStarted(name="seen", params={"lr": 0.125}),
        EpochStarted(epoch=0),
        MetricsLogged(values={"train/loss": 0.375}, phase="train", epoch=0),
        EpochEnded(epoch=0, outcome="completed"),
        MetricsLogged(values={"best/map": 0.625}, phase="validation", final=True),
        RunEnded(status="finished"),
    ]
    folder = run_live(config, events)
    code, out, err = run("show", folder)
    assert (0, "") == (code, err.strip())
    for expected in (folder.name, "finished", "lr=0.125", "train/loss", "0.375", "best/map"):
        assert expected in out
    for expected in ("0.625", "kept", str(kept)):
        assert expected in out


def test_show_has_the_users_parameters_first(tmp_path: Path) -> None:
    """The user's parameters come before the framework's, and none is truncated within a word."""
    own = {"lr": 0.1, "unset": None, "note": "several words " * 9, "optimizer": {"type": "SGD"}}
    params = {"framework": {f"setting_{n:02}": "value" for n in range(50)}, **own}
    bus = Bus({}, journal=JournalSpec(dir=str(tmp_path)), on_receipt=lambda receipt: None)
    with bus.run(params=params):
        pass
    (folder,) = tmp_path.iterdir()
    code, out, _ = run("show", folder)
    assert 0 == code
    shown = " ".join(out.split("params", 1)[1].split("records")[0].split())
    assert shown.startswith("lr=0.1, note=several words several words")
    assert re.match(r".*(several|words)…, framework/setting_00=value, ", shown)
    whole, _, rest = shown.partition(" … and ")
    assert "value" == whole.rpartition("=")[2]
    assert 54 == len(whole.split(", ")) + int(rest.removesuffix(" more"))


def test_show_prints_no_control_characters(tmp_path: Path) -> None:
    """No text of a journal or cursor moves the cursor of the terminal or colours it."""
    evil = "\x1b[31m\x1b]0;title\x07\x9b2J\r\x00\x08end"
    folder = folder_in(tmp_path)
    write_journal(
        folder,
        RunStarted(
            name=evil, project=evil, framework=evil, task=evil, save_dir=evil, params={evil: evil}
        ),
        ParamsUpdated(params={"more": evil}),
        MetricsLogged(values={evil: 1.0}, phase=evil, epoch=0),
        MetricsLogged(values={evil: 1.0}, phase=evil, step=3),
        MetricsLogged(values={evil: 1.0}, phase=evil, final=True),
        CheckpointSaved(path=evil, kind="best"),
        AlertRaised(title=evil, text=evil, level="error"),
        RunEnded(status="failed", reason=evil),
    )
    cursors = folder.path / "cursors"
    cursors.mkdir()
    (cursors / "\x1b[31mred-00000000.json").write_text('{"where": "\\u001b[2J\\u009b2J"}')
    code, out, _ = run("show", folder.path)
    assert 0 == code
    assert "end" in out
    assert set() == {char for char in out if unicodedata.category(char) == "Cc"} - {"\n"}


def test_show_follows_to_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`show -f` waits while the run continues, and ends with it."""
    journal = JournalWriter(folder_in(tmp_path))
    journal.append(RunStarted(name="followed"), 1.0)
    waits, is_being_written = threading.Event(), locks.is_being_written

    def watched(path: Path) -> bool:
        found = is_being_written(path)
        waits.set()
        return found

    def end() -> None:
        assert waits.wait(_DEADLINE_S)
        journal.append(RunEnded(status="stopped", reason="over now"), 2.0)

    monkeypatch.setattr(shows, "is_being_written", watched)
    monkeypatch.setattr(shows, "POLL_S", 0.01)
    thread = threading.Thread(target=end)
    thread.start()
    code, out, _ = run("show", "-f", journal.folder.path)
    thread.join()
    journal.close()
    assert 0 == code
    assert "stopped: over now" in out


def test_show_follows_no_process_that_is_gone(tmp_path: Path) -> None:
    """`show -f` ends at once where a run has no end and nobody writes it."""
    folder = folder_in(tmp_path)
    write_journal(folder, RunStarted(name="gone"))
    code, out, _ = run("show", "-f", folder.path)
    assert 0 == code
    assert "its process is gone" in out


@pytest.mark.parametrize("command", ["replay", "verify", "show"])
@pytest.mark.parametrize("kind", ["none", "empty", "above", "file"])
def test_what_is_no_run_is_one_line(command: str, kind: str, tmp_path: Path) -> None:
    """A path that is not a run's directory is an error, which names the runs inside it."""
    config, _ = jsonl_config(tmp_path / "config")
    for name in ("first", "second"):
        write_journal(folder_in(tmp_path / "above", name))
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    more: list[object] = ["-c", config] if command == "replay" else []
    code, out, err = run(command, tmp_path / kind, *more)
    assert (2, "", 1) == (code, out, len(err.splitlines()))
    assert "expected the directory of a run" in err
    assert (kind == "above") == ("runs in it: first, second" in err)


def test_a_folder_that_can_not_be_written_is_one_line(sample: RunFolder, tmp_path: Path) -> None:
    """If an end can't be written, the error has a reason and no traceback."""
    config, _ = jsonl_config(tmp_path)
    other = folder_in(tmp_path / "runs", "open_run")
    write_journal(other, RunStarted())
    os.chmod(other.path, 0o500)
    try:
        if os.access(other.path, os.W_OK):
            pytest.skip("this user may write everywhere")
        code, out, err = run("replay", other.path, "-c", config)
    finally:
        os.chmod(other.path, 0o700)
    assert (2, "", 1) == (code, out, len(err.splitlines()))


# Runs with streams


def with_streams(tmp_path: Path) -> RunFolder:
    """Write a run of three records and, in two streams, of another 30."""
    folder = folder_in(tmp_path / "runs")
    journal = JournalWriter(folder)
    journal.append(RunStarted(name="streamed"), 1.0)
    journal.append(MetricsLogged(values={"loss": 0.5}, phase="train", step=7), 2.0)
    journal.append(RunEnded(status="finished"), 3.0)
    journal.close()
    for stream, count in (("console", 10), ("system", 20)):
        journal = JournalWriter(folder, stream=stream)
        for n in range(count):
            journal.append(TextLogged(key=stream, text=f"{n}"), 2.0)
        journal.close()
    return folder


def test_a_run_with_streams_is_replayed_and_shown(tmp_path: Path) -> None:
    """A replay sends every stream, and its counts are right; `show` and `verify` know them."""
    folder = with_streams(tmp_path)
    config, kept = jsonl_config(tmp_path)
    code, out, _ = run("replay", folder.path, "-c", config, "--dry-run")
    assert (0, True) == (code, "33" in out)
    code, out, _ = run("replay", folder.path, "-c", config)
    assert (0, True, True) == (code, "finished, 33 records" in out, "33 delivered" in out)
    records = [decode(line) for line in kept.read_bytes().splitlines()]
    for stream, count in (("", 3), ("console", 10), ("system", 20)):
        assert [*range(1, count + 1)] == [r.seq for r in records if r.stream == stream]
    assert (RunStarted, RunEnded) == (type(records[0].event), type(records[-1].event))
    code, out, _ = run("replay", folder.path, "-c", config)
    assert (0, 33) == (code, len(kept.read_bytes().splitlines()))
    code, out, _ = run("show", folder.path)
    for expected in ("33: 30 text.logged", "10 console-r0, 20 system-r0", "(step 7)"):
        assert expected in out
    code, out, _ = run("verify", folder.path)
    assert (0, [
        "r0-a1.jsonl: 3 records, finished",
        "console-r0-a1.jsonl: 10 records, complete",
        "system-r0-a1.jsonl: 20 records, complete",
    ]) == (code, out.splitlines())  # fmt: skip


def test_a_cursor_in_the_middle_of_streams_is_continued(tmp_path: Path) -> None:
    """What a sink has of each stream is not sent again, and the rest is."""
    folder = with_streams(tmp_path)
    config, kept = jsonl_config(tmp_path)
    assert 0 == run("replay", folder.path, "-c", config)[0]
    (cursor,) = folder.path.glob("cursors/*.json")
    found = json.loads(cursor.read_bytes())
    found |= {"seq": 2, "offset": 0, "taken": 9, "streams": {"system-r0": {"seq": 7}}}
    cursor.write_text(json.dumps(found))
    kept.unlink()
    code, out, _ = run("replay", folder.path, "-c", config)
    records = [decode(line) for line in kept.read_bytes().splitlines()]
    assert (0, True) == (code, "33 delivered" in out)
    for stream, first, last in (("", 3, 3), ("console", 1, 10), ("system", 8, 20)):
        assert [*range(first, last + 1)] == [r.seq for r in records if r.stream == stream]
    assert isinstance(records[-1].event, RunEnded)
