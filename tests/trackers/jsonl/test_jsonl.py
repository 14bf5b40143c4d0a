"""The `jsonl` sink: the conformance suite, and what is its own."""

from __future__ import annotations

import json
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from trainbus.sinks.jsonl import JsonlOptions, JsonlSink

from support.emitting import emit
from trainbus import Bus, RunInfo, Sink, SinkError, config
from trainbus.events import (
    ImageLogged,
    MetricsLogged,
    Record,
    Resumed,
    RunStarted,
    TextLogged,
    decode,
)
from trainbus.testing import SinkConformance, sample_records


class TestJsonlSink(SinkConformance):
    """The reference sink passes the suite."""

    keeps_unknown = True
    heavy = ("wandb", "yaml", "rich")

    def make(self, folder: Path) -> Sink:
        """Write all runs of a folder to one file."""
        sink: Sink = JsonlSink(JsonlOptions(path=str(folder / "events.jsonl")))
        return sink

    def read(self, folder: Path) -> object:
        """Read the lines as any reader of JSON does."""
        path = folder / "events.jsonl"
        lines = path.read_bytes().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines]


RUN = RunInfo(id="run", started=RunStarted())


def record(seq: int, *, attempt: int = 1, value: float = 1.0) -> Record:
    event = MetricsLogged(values={"loss": value}, phase="train", epoch=0)
    return Record(seq=seq, run="run", time=0.0, event=event, attempt=attempt)


def sink_for(path: Path, run: RunInfo = RUN) -> JsonlSink:
    sink = JsonlSink(JsonlOptions(path=str(path)))
    sink.open(run)
    return sink


def positions(path: Path) -> list[tuple[int, int]]:
    return [decode(line).position for line in path.read_bytes().splitlines()]


def test_reads_back_as_plain_json(tmp_path: Path) -> None:
    """Each line is one record in strict JSON, and decodes to the record that was written."""
    records = sample_records(tmp_path / "samples")
    sink = sink_for(tmp_path / "out.jsonl")
    sink.write(records)
    sink.close()
    lines = (tmp_path / "out.jsonl").read_text(encoding="utf-8").split("\n")

    def refuse(constant: str) -> Any:
        raise AssertionError(f"{constant} is no JSON")

    assert "" == lines.pop()
    assert len(records) == len(lines)
    for line in lines:
        json.loads(line, parse_constant=refuse)
    assert [r.position for r in records] == positions(tmp_path / "out.jsonl")


def test_puts_the_run_id_in_the_path(tmp_path: Path) -> None:
    """`{run}` in the path is the run's id, folders are made, and `where` is absolute."""
    sink = sink_for(tmp_path / "new" / "{run}.jsonl")
    sink.write([record(1)])
    sink.close()
    assert str(tmp_path / "new" / "run.jsonl") == sink.location
    assert [(1, 1)] == positions(tmp_path / "new" / "run.jsonl")


def test_path_must_not_be_empty() -> None:
    """An empty path is rejected when the options are read."""
    with pytest.raises(msgspec.ValidationError, match=r"length >= 1 - at `\$\.path`"):
        msgspec.convert({"path": ""}, JsonlOptions)


def test_keeps_the_runs_of_one_file_apart(tmp_path: Path) -> None:
    """A run that ends behind another's records has none of its own taken for known."""
    path = tmp_path / "out.jsonl"
    sink_for(path, msgspec.structs.replace(RUN, id="other")).close()
    first = sink_for(path)
    first.write([record(1), record(2)])
    first.close()
    other = msgspec.structs.replace(record(1), run="other")
    second = sink_for(path, msgspec.structs.replace(RUN, id="other"))
    second.write([other])
    second.close()
    assert ["run", "run", "other"] == [decode(x).run for x in path.read_bytes().splitlines()]


def test_a_resumed_attempt_is_not_taken_for_known(tmp_path: Path) -> None:
    """The records of a second attempt count from 1 again, and are all written."""
    path = tmp_path / "out.jsonl"
    first = sink_for(path)
    first.write([record(1), record(2)])
    first.close()
    second = sink_for(path, msgspec.structs.replace(RUN, attempt=2))
    second.write([record(1, attempt=2)])
    second.close()
    assert [(1, 1), (1, 2), (2, 1)] == positions(path)


def test_goes_on_behind_a_line_that_a_crash_cut_short(tmp_path: Path) -> None:
    """A torn last line costs itself, and not the first record that comes after it."""
    path = tmp_path / "out.jsonl"
    path.write_bytes(b'{"seq":1,"run":"run","ti')
    sink = sink_for(path)
    sink.write([record(1), record(2)])
    sink.close()
    whole = [line for line in path.read_bytes().splitlines() if line.endswith(b"}")]
    assert [(1, 1), (1, 2)] == [decode(line).position for line in whole]


def test_a_damaged_line_hides_nothing(tmp_path: Path) -> None:
    """Lines that are not ours, or not text at all, are left alone and skipped."""
    path = tmp_path / "out.jsonl"
    first = sink_for(path)
    first.write([record(1)])
    first.close()
    foreign = b'\xff\xfe\x00\n[]\n{"seq":"x"}\n\n{"seq":9,"run":"run","time":0,"event":{}}\n'
    path.write_bytes(path.read_bytes() + foreign)
    second = sink_for(path)
    second.write([record(1), record(2)])
    second.close()
    lines = path.read_bytes().splitlines()
    assert [(1, 1), (1, 2)] == [decode(lines[i]).position for i in (0, -1)]
    assert foreign in path.read_bytes()


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Make files of more than `size` bytes impossible, as on a full disk: writes come up short."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


def test_a_full_disk_leaves_only_whole_lines(tmp_path: Path) -> None:
    """A batch that does not fit is rejected as a whole, and fits once there is room again."""
    path = tmp_path / "out.jsonl"
    sink = sink_for(path)
    sink.write([record(1)])
    with file_size_limit(path.stat().st_size + 20), pytest.raises(OSError, match="No space left"):
        sink.write([record(2), record(3)])
    assert [(1, 1)] == positions(path)
    sink.write([record(2), record(3)])
    sink.close()
    assert [(1, 1), (1, 2), (1, 3)] == positions(path)


def test_says_what_can_not_be_written(tmp_path: Path) -> None:
    """The error names a path that can't be written, the reason, and what to change."""
    (tmp_path / "file").write_text("")
    with pytest.raises(SinkError, match=r"can't write .*/file/out\.jsonl: .*; set another `path`"):
        sink_for(tmp_path / "file" / "out.jsonl")


@pytest.mark.parametrize("isolation", ["inline", "thread", "process"])
def test_a_resumed_training_is_in_the_file_as_a_whole(isolation: str, tmp_path: Path) -> None:
    """What a bus emits before and after a resume is all there, in order, whoever writes it."""
    path = tmp_path / "out.jsonl"
    for attempt in range(3):
        file = {"type": "jsonl", "path": str(path), "isolation": isolation}
        with config.loads(json.dumps({"sinks": {"file": file}})) as bus:
            resumed = Resumed(epoch=attempt) if attempt else None
            emit(bus, RunStarted(save_dir=str(tmp_path / "run"), resumed=resumed))
            emit(bus, TextLogged(key="attempt", text=str(attempt)))
    expected = [(attempt, seq) for attempt in (1, 2, 3) for seq in (1, 2, 3)]
    assert expected == positions(path)


def test_files_keep_the_names_that_the_trainer_gave_them(tmp_path: Path) -> None:
    """A line names the files of the training, and not the copies that the journal keeps of them."""
    picture = tmp_path / "picture.png"
    picture.write_bytes(b"png")
    path = tmp_path / "out.jsonl"
    sink = JsonlSink(JsonlOptions(path=str(path)))
    with Bus({"file": sink}, on_receipt=lambda receipt: None).run() as run:
        run.image("picture", picture)
    events = [decode(line).event for line in path.read_bytes().splitlines()]
    assert [str(picture)] == [event.path for event in events if isinstance(event, ImageLogged)]


def test_a_path_may_begin_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`~` is the home folder, as everywhere."""
    monkeypatch.setenv("HOME", str(tmp_path))
    sink = JsonlSink(JsonlOptions(path="~/records.jsonl"))
    sink.open(RunInfo(id="r", started=RunStarted()))
    sink.close()
    assert str(tmp_path / "records.jsonl") == sink.location


@pytest.mark.parametrize(
    "line",
    [
        b'{"seq":1,"run":"\xff","time":1,"event":{"type":"epoch.started","epoch":0}}',
        b'{"seq":1,"run":"r","time":1,"event":{"type":"histogram.logged","key":"h",'
        b'"counts":{},"edges":{}}}',
    ],
)
def test_lines_that_are_no_records_are_skipped(tmp_path: Path, line: bytes) -> None:
    """The sink opens a file that has lines of other programs, and leaves them as they are."""
    path = tmp_path / "records.jsonl"
    path.write_bytes(line + b"\n")
    sink = JsonlSink(JsonlOptions(path=str(path)))
    sink.open(RunInfo(id="r", started=RunStarted()))
    sink.close()
    assert line + b"\n" == path.read_bytes()
