"""What sinks have in common: positions, names, axes and flat parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainbus.events import EpochStarted, MetricsLogged, Record
from trainbus.storing import Names, Taken, axis, flat, metric_name


def record(attempt: int, seq: int) -> Record:
    return Record(seq=seq, run="run", time=1.0, attempt=attempt, event=EpochStarted(epoch=0))


def test_what_comes_again_is_left_out(tmp_path: Path) -> None:
    """Within a batch, in a later one, and after the store was opened anew."""
    path = tmp_path / "position.json"
    taken = Taken(path)
    batch = [record(1, 1), record(1, 2), record(1, 2), record(1, 1)]
    assert [(1, 1), (1, 2)] == [r.position for r in taken.new(batch)]
    taken.save()
    again = Taken(path)
    assert (1, 2) == again.last
    assert [(1, 3), (2, 1)] == [
        r.position for r in again.new([record(1, 2), record(1, 3), record(2, 1)])
    ]


def test_what_could_not_be_stored_comes_again() -> None:
    """A record whose storing raised is given out anew, and those before it are not."""
    taken, batch = Taken(), [record(1, 1), record(1, 2)]

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
    list(Taken(path).new([record(1, 1)]))
    assert (0, 0) == Taken(path).last
    assert (1, 7) == Taken(path, (1, 7)).last


@pytest.mark.parametrize("text", ["", "[]", "[1]", "5", "[1e400, 1]", '["a", 1]', "[" * 100_000])
def test_a_position_that_is_nonsense_is_none(tmp_path: Path, text: str) -> None:
    """Whatever stands in the file, the store begins, at worst with everything anew."""
    path = tmp_path / "position.json"
    path.write_text(text)
    assert (0, 0) == Taken(path).last


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
    assert expected == axis(MetricsLogged(values={}, phase="train", **fields))


def test_the_final_evaluation_is_set_apart() -> None:
    """It is no further epoch."""
    assert ("final/a/b", "a/b") == tuple(metric_name("a/b", final=f) for f in (True, False))


def test_nested_parameters_get_dotted_names() -> None:
    """An empty dict is a value; lists stay what they are."""
    nested = {"a": {"b": {"c": 1}, "d": {}}, "e": [{"f": 1}], "g": None}
    assert {"a.b.c": 1, "a.d": {}, "e": [{"f": 1}], "g": None} == flat(nested)
