"""What is emitted reaches the sinks as subscribers saw it, or is counted as dropped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from support.emitting import emit
from support.exact import exact, spelled
from trainbus import Bus, JournalSpec, Record
from trainbus.delivery.receipt import Receipt
from trainbus.events import (
    ArtifactLogged,
    Best,
    CheckpointSaved,
    ConfusionMatrixLogged,
    CurveLogged,
    HistogramLogged,
    ImageLogged,
    MetricsLogged,
    ModelDescribed,
    ParamsUpdated,
    RunEnded,
    RunStarted,
    TableLogged,
    TextLogged,
)
from trainbus.journal import encoding
from trainbus.testing import MemorySink

MODERATE = settings(
    max_examples=150,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
FLOATS = st.one_of(st.floats(), st.sampled_from([np.float32("nan"), np.float64("-inf"), -0.0]))
TEXTS = st.one_of(st.text(max_size=6), st.sampled_from(["\ud800", "a\0b", "\u2028", "null", "nan"]))
CELLS = st.one_of(st.none(), st.booleans(), st.integers(), FLOATS, st.just(2**70))
PLAIN = st.recursive(
    st.one_of(CELLS, TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=8,
)


class RudeError(Exception):
    """An error without a message: its `__str__` raises."""

    def __str__(self) -> str:
        raise RuntimeError("no text")


class Masked:
    """An object that does not even say what it is."""

    @property
    def __class__(self) -> Any:
        raise RudeError

    @__class__.setter
    def __class__(self, other: Any) -> None:
        raise RudeError


def emitted(folder: Path, *events: Any) -> tuple[list[Record], list[Record], Receipt]:
    """Emit events between a start and an end; return what was heard, what arrived, the receipt."""
    sink, heard, receipts = MemorySink(), list[Record](), list[Receipt]()
    bus = Bus(
        {"memory": sink},
        isolation="inline",
        journal=JournalSpec(dir=str(folder)),
        on_receipt=receipts.append,
    )
    bus.subscribe(heard.append)
    with bus:
        for event in (RunStarted(), *events, RunEnded(status="finished")):
            emit(bus, event)
    return heard, sink.records, receipts[0]


# What users mistype: the type checker would say so, but few run one.
MISTYPED: dict[str, Any] = {
    "lists for arrays": CurveLogged(key="k", x=[0.0, 1.0], y=[[0.0, 1.0]], classes=["a"]),  # type: ignore[arg-type]
    "numbered columns": TableLogged(key="k", columns=[0, 1], rows=[[1, 2]]),  # type: ignore[list-item]
    "rows without cells": TableLogged(key="k", columns=["a"], rows=[5]),  # type: ignore[list-item]
    "tuples for rows": TableLogged(key="k", columns=["a"], rows=[(5,)]),  # type: ignore[list-item]
    "numbered classes": ConfusionMatrixLogged(key="k", matrix=np.eye(2), classes=[0, 1]),  # type: ignore[list-item]
    "named classes": ModelDescribed(classes={0: "a"}),  # type: ignore[arg-type]
    "number for text": TextLogged(key="k", text=5),  # type: ignore[arg-type]
    "number for key": TextLogged(key=5, text="a"),  # type: ignore[arg-type]
    "no phase": MetricsLogged(values={"a": 1.0}, phase=None),  # type: ignore[arg-type]
    "half a step": MetricsLogged(values={"a": 1.0}, phase="train", step=1.5),  # type: ignore[arg-type]
    "true for a step": MetricsLogged(values={"a": 1.0}, phase="train", step=True),
    "numpy's step": MetricsLogged(values={"a": 1.0}, phase="train", step=np.int64(3)),  # type: ignore[arg-type]
    "a path": ImageLogged(key="k", path=Path("/x")),  # type: ignore[arg-type]
    "one path for many": ArtifactLogged(name="a", paths="x"),  # type: ignore[arg-type]
    "text for an epoch": CheckpointSaved(path="x", kind="last", epoch="one"),  # type: ignore[arg-type]
    "a kind of its own": CheckpointSaved(path="x", kind="newest"),  # type: ignore[arg-type]
    "no params": ParamsUpdated(params=None),  # type: ignore[arg-type]
}
ODD: dict[str, Any] = {
    "masked integers": HistogramLogged(
        key="k",
        counts=np.ma.array([1, 2], mask=[False, True]),
        edges=np.arange(3.0),
    ),
    "masked floats": ImageLogged(key="k", array=np.ma.array([[1.0, 2.0]], mask=[[False, True]])),
    "a long text alone": ImageLogged(key="k", array=np.array("x" * 9_000)),
    "no pixels": ImageLogged(key="k", array=np.zeros((0, 3))),
    "complex": ImageLogged(key="k", array=np.zeros(3, complex)),
    "fields": ImageLogged(key="k", array=np.zeros(3, "i4,f8")),
    "dates": ImageLogged(key="k", array=np.array(["2024-01-01"], "M8[D]")),
    "objects": ImageLogged(key="k", array=np.array([None, {}, object()], dtype=object)),
    "empty texts": ImageLogged(key="k", array=np.array([""])),
    "read only": ImageLogged(key="k", array=np.broadcast_to(np.float32(0.5), (200, 200))),
}


@pytest.mark.parametrize("name", MISTYPED)
def test_a_mistyped_field_costs_no_record_silently(tmp_path: Path, name: str) -> None:
    """An event with a field of another type reaches the sinks, or is counted and not heard."""
    heard, arrived, receipt = emitted(tmp_path, MISTYPED[name])
    assert (3, 0) == (len(arrived) + receipt.dropped, receipt.pending)
    assert [record.seq for record in heard] == [record.seq for record in arrived]


@pytest.mark.parametrize("name", ODD)
def test_an_odd_array_costs_no_record_silently(tmp_path: Path, name: str) -> None:
    """An event with an array of any kind reaches the sinks, or is counted and not heard."""
    heard, arrived, receipt = emitted(tmp_path, ODD[name])
    assert (3, 0) == (len(arrived) + receipt.dropped, receipt.pending)
    assert [record.seq for record in heard] == [record.seq for record in arrived]


@pytest.mark.parametrize(
    "end",
    [
        RunEnded(status="done"),  # type: ignore[arg-type]
        RunEnded(status="failed", reason=5),  # type: ignore[arg-type]
        RunEnded(status="finished", best=Best(metric="map", value=None)),  # type: ignore[arg-type]
        RunEnded(status="failed", error="oh"),  # type: ignore[arg-type]
    ],
    ids=["status", "reason", "best", "error"],
)
def test_a_mistyped_end_ends_the_run_all_the_same(tmp_path: Path, end: RunEnded) -> None:
    """A run whose end was given a field of another type has an end that sinks can read."""
    heard, arrived, receipt = emitted(tmp_path, end)
    assert [RunStarted, RunEnded] == [type(record.event) for record in arrived]
    assert [RunStarted, RunEnded] == [type(record.event) for record in heard]
    assert 0 == receipt.pending


@pytest.mark.parametrize("field", ["name", "params", "tags", "save_dir"])
def test_an_object_that_says_nothing_of_itself_raises_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: str
) -> None:
    """An object that raises on every access, with an error without a message, stops no training."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    inside: Any = {"params": {"a": Masked()}, "tags": [Masked()]}.get(field, Masked())
    heard, arrived, receipt = emitted(tmp_path, RunStarted(**{field: inside}))
    assert heard
    assert [record.seq for record in heard] == [record.seq for record in arrived]
    assert 0 == receipt.pending
    assert [] == list(Path().iterdir()), "what is no path is no place to write to"


@MODERATE
@given(
    st.dictionaries(TEXTS, PLAIN, max_size=3),
    st.dictionaries(TEXTS, FLOATS, max_size=3),
    st.lists(st.lists(CELLS, max_size=3), max_size=3),
)
def test_plain_values_arrive_in_every_detail(
    tmp_path: Path, params: Any, values: Any, rows: Any
) -> None:
    """1, 1.0 and True, 0.0 and -0.0, NaN and None are as different in the journal as before it."""
    heard, arrived, receipt = emitted(
        tmp_path,
        ParamsUpdated(params=params),
        MetricsLogged(values=values, phase="train"),
        TableLogged(key="k", columns=["a", "b", "c"], rows=rows),
    )
    assert (0, 0) == (receipt.dropped, receipt.pending)
    seen: Any = heard[1].event
    heard[1] = msgspec.structs.replace(heard[1], event=ParamsUpdated(params=spelled(seen.params)))
    assert [exact(record) for record in heard] == [exact(record) for record in arrived]


@pytest.mark.parametrize("least", [1, 2**40], ids=["blobs", "lines"])
@MODERATE
@given(
    arrays.arrays(
        st.one_of(arrays.scalar_dtypes(), arrays.unicode_string_dtypes()),
        arrays.array_shapes(min_dims=1, max_dims=3, max_side=3),
    ),
    st.sampled_from(["as it is", "transposed", "every other", "backwards"]),
)
def test_any_array_arrives_in_every_detail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, least: int, array: Any, view: str
) -> None:
    """Dtype, byte order, shape and every value of an array are kept, in a line and in a blob."""
    monkeypatch.setattr(encoding, "ARRAY_IN_LINE", least)
    views = {"transposed": array.T, "every other": array[::2], "backwards": array[::-1]}
    heard, arrived, receipt = emitted(tmp_path, ImageLogged(key="k", array=views.get(view, array)))
    assert (0, 0) == (receipt.dropped, receipt.pending)
    seen, found = (records[1].event for records in (heard, arrived))
    assert isinstance(seen, ImageLogged)
    assert isinstance(found, ImageLogged)
    assert seen.array is not None
    assert found.array is not None
    assert (seen.array.dtype, seen.array.shape) == (found.array.dtype, found.array.shape)
    # The bits of NaN are not told apart: JSON has one NaN.
    np.testing.assert_array_equal(seen.array, found.array)
    if seen.array.dtype.kind == "f":
        np.testing.assert_array_equal(
            np.signbit(seen.array)[~np.isnan(seen.array)],
            np.signbit(found.array)[~np.isnan(found.array)],
        )
