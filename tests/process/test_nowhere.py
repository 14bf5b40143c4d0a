"""The first event where there is no place for a journal: training goes on, and a line says why."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from support.emitting import emit
from trainbus import Bus, JournalSpec, RunDefaults
from trainbus.delivery.receipt import Receipt
from trainbus.events import Event, MetricsLogged, RunEnded, RunStarted, decode
from trainbus.journal.writer import JournalWriter
from trainbus.recording import peers
from trainbus.testing import MemorySink

# Each scenario has a process of its own that trains twice, and tells what its receipts say.
TRAINING = """
    import json, os, shutil, sys, tempfile
    import trainbus
    from trainbus import Bus, JournalSpec
    from trainbus.testing import MemorySink

    def trained(**options):
        receipts = []
        options.setdefault("on_receipt", receipts.append)
        with Bus({"memory": MemorySink()}, **options) as bus:
            for name in ("one", "two"):
                with bus.run(name=name) as run:
                    run.log({"loss": 1.0}, step=1)
        told = [[r.emitted, r.dropped, r.unsaved, r.sinks and r.sinks[0].taken] for r in receipts]
        print(json.dumps({"told": told, "journals": [r.journal for r in receipts]}))
"""
KEPT = [[3, 0, 0, 3]] * 2
NOT_KEPT = [[3, 0, 3, []]] * 2
NOBODY = textwrap.dedent("""
    for name in ("HOME", "USER", "LOGNAME", "USERNAME", "LNAME"):
        os.environ.pop(name, None)
    os.setgroups([])
    os.setgid(12345)
    os.setuid(12345)
    """)
AS_NOBODY = pytest.mark.skipif(os.name != "posix" or os.getuid() != 0, reason="needs another user")


def trained(folder: Path, scenario: str, **env: str) -> tuple[dict[str, Any], str]:
    """Return what the trainings of a scenario tell, and what they wrote on stderr."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(TRAINING) + textwrap.dedent(scenario)],
        cwd=folder,
        env=os.environ | env,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert 0 == done.returncode, done.stderr
    assert "Traceback" not in done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found, done.stderr


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that other users can enter, which pytest's own ones are not."""
    with tempfile.TemporaryDirectory(prefix="trainbus-test-") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder).resolve()


@AS_NOBODY
def test_a_user_without_a_name_logs(public: Path) -> None:
    """A uid that no passwd entry names writes its journal where it may."""
    (public / "runs").mkdir()
    (public / "runs").chmod(0o777)
    found, errors = trained(public, NOBODY + "trained(journal=JournalSpec(dir='runs'))")
    assert KEPT == found["told"]
    assert [str(public / "runs")] * 2 == [os.path.dirname(j) for j in found["journals"]]
    assert "" == errors


@AS_NOBODY
def test_a_user_without_a_name_has_a_temporary_folder(public: Path) -> None:
    """The spare place of a journal bears the uid, and is private."""
    spare = public / "tmp"
    spare.mkdir()
    spare.chmod(0o1777)
    (public / "file").write_text("no folder")
    found, errors = trained(
        public, NOBODY + "trained(journal=JournalSpec(dir='file/runs'))", TMPDIR=str(spare)
    )
    assert KEPT == found["told"]
    assert {spare / "trainbus-runs-12345"} == {Path(j).parent for j in found["journals"]}
    assert 0o700 == stat.S_IMODE((spare / "trainbus-runs-12345").stat().st_mode)
    assert 2 == errors.count("the journal is in")


@pytest.mark.parametrize("how", ["another user's", "a link", "written by others", "a file"])
def test_a_spare_folder_of_somebody_else_is_not_used(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever made it could read the journal, or put one there: a fresh folder takes its place."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    spare = tmp_path / f"trainbus-runs-{os.getuid()}"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    match how:
        case "another user's":
            spare.mkdir(mode=0o700)
            try:
                os.chown(spare, 12345, 12345)
            except PermissionError:
                pytest.skip("only root can give a folder away")
        case "a link":
            spare.symlink_to(elsewhere)
        case "written by others":
            spare.mkdir()
            spare.chmod(0o777)
        case "a file":
            spare.write_text("")
    (tmp_path / "file").write_text("no folder")
    (receipt,) = logged(Bus({"m": MemorySink()}, journal=JournalSpec(dir=f"{tmp_path}/file/runs")))
    place = Path(receipt.journal or "").parent
    assert (tmp_path, 0o700) == (place.parent, stat.S_IMODE(place.stat().st_mode))
    assert place not in (spare, elsewhere)
    assert [] == list(elsewhere.iterdir())
    assert not spare.is_dir() or [] == list(spare.iterdir())


def test_a_spare_folder_is_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Journals that can't be where they should be are together, in the user's own folder."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "file").write_text("no folder")
    spec = JournalSpec(dir=f"{tmp_path}/file/runs")
    receipts = [logged(Bus({"m": MemorySink()}, journal=spec))[0] for _ in range(2)]
    expected = tmp_path / f"trainbus-runs-{os.getuid()}"
    assert [expected] * 2 == [Path(r.journal or "").parent for r in receipts]


def test_another_rank_trusts_no_spare_folder_of_somebody_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A note of a job that others can write decides nothing."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("MASTER_PORT", "1234")
    spare = tmp_path / f"trainbus-runs-{os.getuid()}"
    spare.mkdir()
    from trainbus.journal.directory import RunFolder

    folder = RunFolder.create([spare], "run")
    peers.announce(folder, 1)
    journal = JournalWriter(folder)
    bus = Bus(journal=JournalSpec(dir=str(tmp_path / "none")))
    spare.chmod(0o777)
    bus.emitter().failed_on(1, ValueError("no"))
    assert [0] == folder.ranks(1)
    spare.chmod(0o700)
    bus.emitter().failed_on(1, ValueError("no"))
    assert [0, 1] == folder.ranks(1)
    journal.close()


SCENARIOS = {
    "no temporary folder": (
        """
        open("file", "w").close()
        def none(): raise FileNotFoundError(2, "No usable temporary directory found")
        tempfile.gettempdir = none
        trained(journal=JournalSpec(dir="file/runs"))
        """,
        NOT_KEPT,
    ),
    "a working directory that was deleted": (
        """
        os.mkdir("gone"); os.chdir("gone"); os.rmdir("../gone")
        trained()
        """,
        KEPT,
    ),
    "no working directory and no temporary one": (
        """
        os.mkdir("gone"); os.chdir("gone"); os.rmdir("../gone")
        def none(): raise FileNotFoundError(2, "No usable temporary directory found")
        tempfile.gettempdir = none
        trained()
        """,
        NOT_KEPT,
    ),
    "a home that nobody knows": ("trained(journal=JournalSpec(dir='~nobody-knows/runs'))", KEPT),
}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_no_place_ends_no_training(scenario: str, tmp_path: Path) -> None:
    """Whatever is wrong with the place of the journal, training goes on and one line a run says."""
    code, expected = SCENARIOS[scenario]
    spare = tmp_path / "tmp"
    spare.mkdir()
    found, errors = trained(tmp_path, textwrap.dedent(code), TMPDIR=str(spare))
    assert expected == found["told"]
    said = "this run is not logged" if expected is NOT_KEPT else "the journal is in"
    assert 2 == errors.count(said)
    assert 2 == len(errors.splitlines()) - errors.count("file or directory:")


def logged(bus: Bus, *events: Event) -> list[Receipt]:
    """Return the receipts of a bus that events went through, by default a short training."""
    with bus:
        for event in events or (RunStarted(), MetricsLogged(values={"loss": 1.0}, phase="train")):
            emit(bus, event)
    return bus.receipts


def _no(*args: object, **named: object) -> Any:
    raise RuntimeError("no")


@pytest.mark.parametrize(
    "broken",
    [
        "trainbus.recording.emitter.identify",
        "trainbus.recording.emitter.mark",
        "trainbus.recording.emitter.process_hooks.watch",
        "trainbus.recording.emitter.process_hooks.unwatch",
        "trainbus.recording.emitter.peers.announce",
        "trainbus.recording.emitter.peers.withdraw",
        "trainbus.recording.emitter.end_with_cause",
        "trainbus.recording.emitter.normalize.event",
        "trainbus.recording.emitter.RunDispatcher",
        "trainbus.recording.settings.RunFolder.create",
        "trainbus.recording.settings.JournalWriter",
    ],
)
def test_no_part_of_it_ends_a_training(
    broken: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """An error in any step of the first event, or of the last, is said and leaves the training."""
    monkeypatch.setattr(broken, _no)
    bus = Bus({"memory": MemorySink()})
    with bus, bus.run(save_dir=str(tmp_path)) as run:
        run.log({"loss": 1.0})
    said = [record.message for record in caplog.records]
    assert said
    assert len(said) == len(set(said))
    assert len(said) == sum("no" in text.split() or "no')" in text for text in said)


def test_what_goes_wrong_is_counted(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An event that could not become a record is counted as dropped, and the first one is said."""
    memory = MemorySink()
    bus = Bus({"memory": memory})
    with bus, bus.run() as run:
        with monkeypatch.context() as patched:
            patched.setattr(JournalWriter, "append", _no)
            run.log({"loss": 1.0}, step=1)
            run.log({"loss": 2.0}, step=2)
        run.log({"loss": 3.0}, step=3)
    (receipt,) = bus.receipts
    assert (3, 2) == (receipt.emitted, receipt.dropped)
    assert [1, 2, 3] == [record.seq for record in memory.records]
    assert 1 == sum("could not be recorded" in record.message for record in caplog.records)


def test_defaults_of_the_wrong_type_cost_themselves(caplog: pytest.LogCaptureFixture) -> None:
    """A name that is no text is left out with a line; the run has all else."""
    memory = MemorySink()
    defaults = RunDefaults(name=7, project="p")  # type: ignore[arg-type]
    logged(Bus({"memory": memory}, defaults=defaults))
    assert [RunStarted, MetricsLogged, RunEnded] == [type(r.event) for r in memory.records]
    assert ["p"] == [r.event.project for r in memory.records if isinstance(r.event, RunStarted)]
    assert 1 == caplog.text.count("not recorded: run.started: name")


def test_an_exception_without_words_ends_its_run(journals: Path) -> None:
    """An exception whose text can't be made passes unchanged, and its run has failed with it."""

    class SilentError(Exception):
        def __str__(self) -> str:
            raise ValueError("no words")

    raised = SilentError()
    bus = Bus()
    with pytest.raises(SilentError) as caught, bus, bus.run():
        raise raised
    assert raised is caught.value
    (path,) = journals.glob("*/r0-a1.jsonl")
    end = decode(path.read_bytes().splitlines()[-1]).event
    assert isinstance(end, RunEnded)
    assert "failed" == end.status
    assert ((end.error and end.error.type) or "").endswith("SilentError")


@pytest.mark.parametrize("call", ["function", "method", "object"])
def test_an_error_of_the_users_signal_handler_passes(
    call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a handler raises while an event is recorded is the user's, and reaches the training."""

    class OverdueError(Exception):
        pass

    class Handler:
        def __call__(self, number: int, frame: object) -> None:
            raise OverdueError

        def handle(self, number: int, frame: object) -> None:
            raise OverdueError

    def handle(number: int, frame: object) -> None:
        raise OverdueError

    handlers: dict[str, Callable[[int, Any], None]] = {
        "function": handle,
        "method": Handler().handle,
        "object": Handler(),
    }
    before = signal.signal(signal.SIGALRM, handlers[call])
    real = JournalWriter.append

    def interrupted(self: JournalWriter, *args: Any) -> Any:
        record = real(self, *args)
        signal.raise_signal(signal.SIGALRM)
        return record

    try:
        bus = Bus()
        with bus, bus.run() as run:
            monkeypatch.setattr(JournalWriter, "append", interrupted)
            with pytest.raises(OverdueError):
                run.log({"loss": 1.0})
            monkeypatch.setattr(JournalWriter, "append", real)
            run.log({"loss": 2.0})
    finally:
        signal.signal(signal.SIGALRM, before)
    assert [(4, 0)] == [(r.emitted, r.dropped) for r in bus.receipts]
