"""What sinks have in common: positions, names, axes and flat parameters."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainbus.events import (
    ArtifactLogged,
    CheckpointSaved,
    EpochStarted,
    MetricsLogged,
    ModelDescribed,
    Record,
    RunStarted,
    TextLogged,
)
from trainbus.interfaces import RunInfo
from trainbus.toolkit.sinks import (
    LatestCheckpoints,
    Names,
    SeenRecords,
    Superseded,
    Timeline,
    Wanted,
    flat,
    folder_of,
    interrupt_training,
    is_wanted,
    metric_name,
    model_values,
    side_by_side,
    x_position,
)


def record(attempt: int, seq: int) -> Record:
    return Record(seq=seq, run="run", time=1.0, attempt=attempt, event=EpochStarted(epoch=0))


@pytest.mark.parametrize("pid", [None, os.getpid()], ids=["none", "own"])
def test_only_the_parent_is_interrupted(pid: int | None) -> None:
    """A sink that runs in the training, or whose training is gone, interrupts nobody."""
    run = RunInfo(id="run", started=RunStarted(), pid=pid)
    assert not interrupt_training(run)


def test_what_comes_again_is_left_out(tmp_path: Path) -> None:
    """Within a batch, in a later one, and after the store was opened anew."""
    path = tmp_path / "position.json"
    taken = SeenRecords(path)
    batch = [record(1, 1), record(1, 2), record(1, 2), record(1, 1)]
    assert [(1, 1), (1, 2)] == [r.position for r in taken.new(batch)]
    taken.save()
    again = SeenRecords(path)
    assert (1, 2) == again.last
    assert [(1, 3), (2, 1)] == [
        r.position for r in again.new([record(1, 2), record(1, 3), record(2, 1)])
    ]


def test_what_could_not_be_stored_comes_again() -> None:
    """A record whose storing raised is given out anew, and those before it are not."""
    taken, batch = SeenRecords(), [record(1, 1), record(1, 2)]

    def store() -> None:
        for each in taken.new(batch):
            if each.seq == 2:
                raise OSError("full")

    with pytest.raises(OSError, match="full"):
        store()
    assert [(1, 2)] == [r.position for r in taken.new(batch)]


def test_what_was_not_saved_comes_again(tmp_path: Path) -> None:
    """A position is kept only once the store has what it stands for."""
    path = tmp_path / "position.json"
    list(SeenRecords(path).new([record(1, 1)]))
    assert (0, 0) == SeenRecords(path).last
    assert (1, 7) == SeenRecords(path, (1, 7)).last


@pytest.mark.parametrize("text", ["", "[]", "[1]", "5", "[1e400, 1]", '["a", 1]', "[" * 100_000])
def test_a_position_that_is_nonsense_is_none(tmp_path: Path, text: str) -> None:
    """Whatever stands in the file, the store begins, at worst with everything anew."""
    path = tmp_path / "position.json"
    path.write_text(text)
    assert (0, 0) == SeenRecords(path).last


@given(st.lists(st.text(max_size=40), unique=True))
def test_names_stay_apart(names: list[str]) -> None:
    """Two names are never made one, and each is always made the same."""

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
def test_an_event_has_a_place_on_the_axis(expected: int, fields: dict[str, Any]) -> None:
    """The step where there is one, else the epochs that are done."""
    assert expected == x_position(MetricsLogged(values={}, phase="train", **fields))


def test_the_final_evaluation_is_set_apart() -> None:
    """It is no further epoch."""
    assert ("final/a/b", "a/b") == tuple(metric_name("a/b", final=f) for f in (True, False))


def test_nested_parameters_get_dotted_names() -> None:
    """An empty dict is a value; lists stay what they are."""
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
def test_which_checkpoints_may_be_kept(wanted: Wanted, expected: list[str]) -> None:
    """The last one may be all there is, where the best is wanted; artifacts are kept anyhow."""
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
def test_what_a_trainer_overwrites_is_stored_at_the_end(
    wanted: Wanted, at_once: list[str], at_end: list[str]
) -> None:
    """Periodic checkpoints are stored as they come, of the others the newest when all is over."""
    overwritten = LatestCheckpoints(wanted)
    events = saved("periodic", "last", "best", "periodic", "best", "last")
    assert at_once == [event.path for event in events if not overwritten.put_off(event)]
    assert at_end == [event.path for event in overwritten.at_end()]


def test_the_last_checkpoint_stands_in_for_the_best() -> None:
    """Where a training names none its best, there is still one to go on with."""
    overwritten = LatestCheckpoints("best")
    (last,) = saved("last")
    assert overwritten.put_off(last)
    assert [last] == overwritten.at_end()


def test_what_is_known_of_a_model() -> None:
    """What is not known is left out."""
    event = ModelDescribed(parameters=5, speed_ms={"inference": 2.5}, extra={"depth": 3.0})
    expected = {"model/parameters": 5, "model/speed_inference(ms)": 2.5, "model/depth": 3.0}
    assert expected == model_values(event)


def test_an_option_names_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the run's id in it, and whole."""
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
def test_files_lie_side_by_side(paths: list[str], expected: list[str]) -> None:
    """By their names, or by their folders too where two have one name."""
    assert dict(zip(paths, expected, strict=True)) == side_by_side(paths)


def test_what_has_no_place_stands_at_the_last_metric() -> None:
    """A value with neither step nor epoch stands where the run is, and moves nothing."""
    timeline = Timeline(3)
    summary = MetricsLogged(values={"a": 1.0}, phase="train")
    final = MetricsLogged(values={"a": 1.0}, phase="test", epoch=1, final=True)
    placed = MetricsLogged(values={"a": 1.0}, phase="train", epoch=8, step=40)
    text = TextLogged(key="t", text="t", epoch=70)
    found = [timeline(each) for each in (summary, final, summary, placed, text, summary)]
    assert [3, 2, 3, 40, 71, 40] == found


def test_a_superseded_checkpoint_is_no_loss() -> None:
    """What was gone is lost only where nothing newer of its kind is stored, and is told once."""
    superseded = Superseded()
    best, last = (CheckpointSaved(path=k, kind=k) for k in ("best", "last"))
    superseded.missed(best)
    superseded.missed(last)
    superseded.stored("last")
    assert [best] == superseded.lost()
    assert [] == superseded.lost()
