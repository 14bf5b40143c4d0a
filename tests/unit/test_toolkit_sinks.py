"""What sinks have in common: the base class, positions, names, axes, folders, plain values."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainbus.errors import MissingPackageError, SinkError
from trainbus.events import (
    ArtifactLogged,
    Best,
    CheckpointSaved,
    EpochStarted,
    MetricsLogged,
    ModelDescribed,
    Record,
    RunEnded,
    RunStarted,
    TextLogged,
)
from trainbus.interfaces import Options, RunInfo
from trainbus.toolkit.sinks import (
    LatestCheckpoints,
    Names,
    SaveCheckpoints,
    SeenRecords,
    Superseded,
    Timeline,
    TrackerSink,
    Wanted,
    append,
    best_values,
    check_package,
    epochs_done,
    flat,
    folder_of,
    interrupt_training,
    is_wanted,
    make_folder,
    metric_name,
    model_values,
    required_package,
    set_fields,
    side_by_side,
    to_json,
    utf8,
    writing_to,
    x_position,
)


class ExampleOptions(Options, frozen=True, kw_only=True):
    """Options of `ExampleSink`."""

    save_checkpoints: SaveCheckpoints = "best"


class ExampleSink(TrackerSink):
    """Stores nothing."""

    Options = ExampleOptions
    tracker = "Example"

    def open(self, run: RunInfo) -> None:
        super().open(run)
        self._location = f"example/{run.id}"

    def write(self, records: Sequence[Record]) -> None:
        pass


RUN = RunInfo(id="run", started=RunStarted())


def record(attempt: int, seq: int, stream: str = "", rank: int = 0) -> Record:
    place = {"seq": seq, "attempt": attempt, "stream": stream, "rank": rank}
    return Record(run="run", time=1.0, event=EpochStarted(epoch=0), **place)  # type: ignore[arg-type]


@pytest.mark.parametrize("pid", [None, os.getpid()], ids=["none", "own"])
def test_only_the_parent_is_interrupted(pid: int | None) -> None:
    """A sink in the training process, or whose training has ended, interrupts nothing."""
    run = RunInfo(id="run", started=RunStarted(), pid=pid)
    assert not interrupt_training(run)


def test_repeated_records_are_skipped(tmp_path: Path) -> None:
    """Within a batch, in a later one, and after the store was reopened."""
    path = tmp_path / "position.json"
    seen = SeenRecords(path)
    batch = [record(1, 1), record(1, 2), record(1, 2), record(1, 1)]
    assert [(1, 1), (1, 2)] == [r.position for r in seen.new(batch)]
    seen.save()
    again = SeenRecords(path)
    assert {"": (1, 2)} == again.last
    assert [(1, 3), (2, 1)] == [
        r.position for r in again.new([record(1, 2), record(1, 3), record(2, 1)])
    ]


def test_a_record_whose_storing_failed_is_yielded_again() -> None:
    """Only that record and those after it."""
    seen, batch = SeenRecords(), [record(1, 1), record(1, 2)]

    def store() -> None:
        for each in seen.new(batch):
            if each.seq == 2:
                raise OSError("full")

    with pytest.raises(OSError, match="full"):
        store()
    assert [(1, 2)] == [r.position for r in seen.new(batch)]


def test_an_unsaved_position_is_lost(tmp_path: Path) -> None:
    """A position is saved only once the store has everything up to it."""
    path = tmp_path / "position.json"
    list(SeenRecords(path).new([record(1, 1)]))
    assert {"": (0, 0)} == SeenRecords(path).last
    assert {"": (1, 7)} == SeenRecords(path, {"": (1, 7)}).last


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "[1]",
        "5",
        "[1e400, 1]",
        '["a", 1]',
        "[" * 100_000,
        "[1, 2, 3]",
        '[1, 2, {"a-r0": 1}]',
    ],
)
def test_an_invalid_position_is_ignored(tmp_path: Path, text: str) -> None:
    """Whatever the file contains, the store opens, at worst as an empty one."""
    path = tmp_path / "position.json"
    path.write_text(text)
    assert {"": (0, 0)} == SeenRecords(path).last


def test_each_stream_has_a_position_of_its_own(tmp_path: Path) -> None:
    """A number that one stream has reached says nothing about another stream or rank."""
    path = tmp_path / "position.json"
    path.write_text("[1, 5]")  # of a version without streams
    seen = SeenRecords(path)
    first, other = record(1, 1, stream="console"), record(1, 1, stream="console", rank=1)
    batch = [record(1, 5), first, record(1, 6), other, first, record(1, 2, stream="console")]
    assert ["console-r0", "", "console-r1", "console-r0"] == [r.source for r in seen.new(batch)]
    seen.save()
    expected = {"": (1, 6), "console-r0": (1, 2), "console-r1": (1, 1)}
    assert expected == seen.last == SeenRecords(path).last
    assert [] == list(SeenRecords(path).new(batch))


def test_a_file_of_the_main_stream_alone_stays_as_it_was(tmp_path: Path) -> None:
    """Without other streams, the file has the form that older versions read."""
    path = tmp_path / "position.json"
    seen = SeenRecords(path)
    list(seen.new([record(1, 1), record(1, 2)]))
    seen.save()
    assert "[1, 2]" == path.read_text()


@given(st.lists(st.text(max_size=40), unique=True))
def test_names_stay_apart(names: list[str]) -> None:
    """Different names never become equal, and each name always gets the same result."""

    def clean(name: str) -> str:
        return "".join(c if c.isascii() and c.isalnum() else "_" for c in name)

    first, second = Names(clean, 20), Names(clean, 20)
    found = {name: first(name) for name in names}
    assert len(names) == len(set(found.values()))
    assert found == {name: second(name) for name in reversed(names)}
    for name in found.values():
        assert 0 < len(name) <= 20
        assert clean(name) == name


@pytest.mark.parametrize(
    ("expected", "fields"),
    [(7, {"step": 7, "epoch": 1}), (0, {"step": 0, "epoch": 1}), (2, {"epoch": 1}), (0, {})],
)
def test_an_event_has_a_position_on_the_x_axis(expected: int, fields: dict[str, Any]) -> None:
    """The step if there is one, else the number of epochs done."""
    assert expected == x_position(MetricsLogged(values={}, phase="train", **fields))


def test_the_final_evaluation_has_a_prefix() -> None:
    """It is not another epoch."""
    assert ("final/a/b", "a/b") == tuple(metric_name("a/b", final=f) for f in (True, False))


def test_nested_parameters_get_dotted_names() -> None:
    """An empty dict is a value; lists are unchanged."""
    nested = {"a": {"b": {"c": 1}, "d": {}}, "e": [{"f": 1}], "g": None}
    assert {"a.b.c": 1, "a.d": {}, "e": [{"f": 1}], "g": None} == flat(nested)


def saved(*kinds: Any) -> list[CheckpointSaved]:
    return [CheckpointSaved(path=f"{i}.pt", kind=kind) for i, kind in enumerate(kinds)]


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ("best", ["last", "best"]),
        ("last", ["last"]),
        ("all", ["periodic", "last", "best"]),
        ("none", []),
    ],
)
def test_which_checkpoints_are_wanted(wanted: Wanted, expected: list[str]) -> None:
    """If the best is wanted, the last one may be the only one; artifacts are always wanted."""
    events = saved("periodic", "last", "best")
    assert expected == [event.kind for event in events if is_wanted(wanted, event)]
    assert is_wanted(wanted, ArtifactLogged(name="a", kind="data", paths=[]))


@pytest.mark.parametrize(
    ("wanted", "at_once", "at_end"),
    [
        ("best", [], ["4.pt"]),
        ("last", [], ["5.pt"]),
        ("all", ["0.pt", "3.pt"], ["5.pt", "4.pt"]),
        ("none", [], []),
    ],
)
def test_overwritten_checkpoints_are_stored_at_the_end(
    wanted: Wanted, at_once: list[str], at_end: list[str]
) -> None:
    """Periodic checkpoints are stored as they come, the newest of the others at the end."""
    latest = LatestCheckpoints(wanted)
    events = saved("periodic", "last", "best", "periodic", "best", "last")
    assert at_once == [event.path for event in events if not latest.put_off(event)]
    assert at_end == [event.path for event in latest.at_end()]


def test_the_last_checkpoint_replaces_a_missing_best_one() -> None:
    """If a training names no best checkpoint, the last one is stored."""
    latest = LatestCheckpoints("best")
    (last,) = saved("last")
    assert latest.put_off(last)
    assert [last] == latest.at_end()


def test_the_values_of_a_model() -> None:
    """Unknown values are omitted."""
    event = ModelDescribed(parameters=5, speed_ms={"inference": 2.5}, extra={"depth": 3.0})
    expected = {"model/parameters": 5, "model/speed_inference(ms)": 2.5, "model/depth": 3.0}
    assert expected == model_values(event)


def test_an_option_names_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Absolute, and with the run's id."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/user")
    assert tmp_path / "runs" / "run_1" == folder_of("runs/{run}", "run_1")
    assert Path("/home/user/runs") == folder_of("~/runs", "run_1")


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (["/a/x.txt", "/b/c/y.txt"], ["x.txt", "y.txt"]),
        (["/a/b/x.txt", "/a/c/x.txt", "/a/y.txt"], ["b/x.txt", "c/x.txt", "y.txt"]),
        (["/a/x.txt", "/a/x.txt"], ["x.txt", "x.txt"]),
        ([], []),
    ],
)
def test_files_get_unique_names(paths: list[str], expected: list[str]) -> None:
    """Their own names, or with their folders if two have the same name."""
    assert dict(zip(paths, expected, strict=True)) == side_by_side(paths)


def test_an_event_without_a_step_is_at_the_last_metric() -> None:
    """A value with neither step nor epoch has the current position and doesn't change it."""
    timeline = Timeline(3)
    summary = MetricsLogged(values={"a": 1.0}, phase="train")
    final = MetricsLogged(values={"a": 1.0}, phase="test", epoch=1, final=True)
    placed = MetricsLogged(values={"a": 1.0}, phase="train", epoch=8, step=40)
    text = TextLogged(key="t", text="t", epoch=70)
    found = [timeline(each) for each in (summary, final, summary, placed, text, summary)]
    assert [3, 2, 3, 40, 71, 40] == found


def test_a_superseded_checkpoint_is_not_lost() -> None:
    """A missing file is lost only if nothing newer of its kind is stored; it is counted once."""
    superseded = Superseded()
    best, last = (CheckpointSaved(path=k, kind=k) for k in ("best", "last"))
    superseded.missed(best)
    superseded.missed(last)
    superseded.stored("last")
    assert [best] == superseded.lost()
    assert [] == superseded.lost()


def test_a_tracker_sink_has_a_location_once_it_is_open() -> None:
    """None before, and the one of the run that was opened last."""
    sink = ExampleSink()
    assert sink.location is None
    sink.open(RUN)
    assert "example/run" == sink.location


def test_a_tracker_sink_counts_and_logs_losses(caplog: pytest.LogCaptureFixture) -> None:
    """Each is logged with its name, tracker and reason; `open` resets the count."""
    sink = ExampleSink()
    sink.open(RUN)
    with sink.showing("a/curve"):
        raise ValueError("no points")
    with sink.showing("a/matrix"):
        pass
    sink.lose("b", "too large")
    superseded = Superseded()
    superseded.missed(CheckpointSaved(path="x.pt", kind="best"))
    sink.lose_superseded(superseded)
    assert [
        "'a/curve' can't be shown in Example: no points",
        "'b' can't be stored in Example: too large",
        "'checkpoint best' can't be stored in Example: no file at x.pt",
    ] == caplog.messages
    assert {ExampleSink.__module__} == {record.name for record in caplog.records}
    assert 3 == sink.lost
    sink.open(RUN)
    assert 0 == sink.lost


def test_other_errors_are_not_losses() -> None:
    """An error that a retry may solve reaches the worker, which keeps the record."""
    sink = ExampleSink()
    sink.open(RUN)
    with pytest.raises(SinkError, match="down"), sink.showing("a"):
        raise SinkError("down", retry=True)
    assert 0 == sink.lost


def test_a_tracker_sink_wants_what_its_option_says() -> None:
    """A sink without the option wants only artifacts."""
    periodic, _, best = saved("periodic", "last", "best")
    assert [False, True] == [ExampleSink().wants_files(event) for event in (periodic, best)]
    plain = ExampleSink(Options())
    assert not plain.wants_files(best)
    assert plain.wants_files(ArtifactLogged(name="a", kind="data", paths=[]))


def test_the_last_checkpoint_is_not_wanted_beside_the_best() -> None:
    """It only replaces a missing one."""
    (last,) = saved("last")
    assert [True, False] == [is_wanted("best", last, has_best=found) for found in (False, True)]
    assert is_wanted("all", last, has_best=True)


def test_a_missing_package_is_named_with_its_extra() -> None:
    """By an import and by a check; an installed package is no error."""
    with required_package("json"):
        import json  # noqa: F401
    check_package("json")
    command = r"'no_such_package' is not installed; run `pip install 'trainbus\[such\]'`"
    with pytest.raises(MissingPackageError, match=command):
        check_package("no_such_package", extra="such")
    with (
        pytest.raises(MissingPackageError, match=command),
        required_package("no_such_package", extra="such"),
    ):
        import no_such_package  # type: ignore[import-not-found]  # noqa: F401
    with pytest.raises(MissingPackageError, match=r"trainbus\[no_such_package\]"):
        check_package("no_such_package")


def test_a_folder_is_created_or_its_option_named(tmp_path: Path) -> None:
    """An existing folder is unchanged."""
    folder = tmp_path / "a" / "b"
    assert folder == make_folder(folder) == make_folder(folder)
    assert folder.is_dir()
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(SinkError, match=r"can't write .*file.*: .+; set another `logdir`"):
        make_folder(file / "below", option="logdir")
    expected = pytest.raises(SinkError, match="can't write a: full; set another `dir`")
    with expected, writing_to(Path("a")):
        raise OSError("full")


def test_data_is_appended_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk writes only a part, without an error; that part is removed."""
    path = tmp_path / "file"
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        append(fd, b"first", path)
        append(fd, b"", path)
        write = os.write
        monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:3]))
        with pytest.raises(OSError, match="No space left on device"):
            append(fd, b"second", path)
    finally:
        os.close(fd)
    assert b"first" == path.read_bytes()


def test_the_best_value_of_a_run() -> None:
    """With its epoch counted from 1, if it has one."""
    best = Best(metric="a/b", value=0.5, epoch=2)
    expected = {"best/a/b": 0.5, "best/epoch": 3}
    assert expected == best_values(RunEnded(status="finished", best=best))
    best = Best(metric="a/b", value=0.5)
    assert {"best/a/b": 0.5} == best_values(RunEnded(status="finished", best=best))
    assert {} == best_values(RunEnded(status="finished"))


def test_fields_that_are_set() -> None:
    """All or those named, nested structs as mappings; zero and False are values."""
    event = RunEnded(status="finished", reason="", best=Best(metric="m", value=0.0))
    expected = {"status": "finished", "best": {"metric": "m", "value": 0.0}}
    assert expected == set_fields(event)
    assert {"status": "finished"} == set_fields(event, "reason", "status")


def test_epochs_are_counted_from_one() -> None:
    """As people count them."""
    assert [1, 5, None] == [epochs_done(epoch) for epoch in (0, 4, None)]


def test_a_lone_surrogate_is_escaped() -> None:
    """Other characters are unchanged."""
    assert "métrique/µ漢\\ud800" == utf8("métrique/µ漢\ud800")


def test_values_become_json() -> None:
    """Whatever a training logs, strict JSON can represent it."""
    value = {
        1: (True, None, 2, 2**63, -(2**63)),
        "floats": [0.5, np.nan, np.inf, -np.inf, np.longdouble(1.5)],
        "arrays": [np.arange(2), np.float32(0.5), np.array(3)],
        "other": [Path("a"), "\udc00", b"x"],
        "set": {1},
    }
    expected = {
        "1": [True, None, 2, "9223372036854775808", "-9223372036854775808"],
        "floats": [0.5, "NaN", "Infinity", "-Infinity", "1.5"],
        "arrays": [[0, 1], 0.5, 3],
        "other": ["a", "\\udc00", "b'x'"],
        "set": [1],
    }
    found = to_json(value)
    assert expected == found
    json.dumps(found, allow_nan=False).encode()
    assert ["9007199254740992", 2**53 - 1] == to_json([2**53, 2**53 - 1], largest=2**53)
