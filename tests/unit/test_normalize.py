"""Whatever frameworks and users hand over becomes something that encodes, and nothing raises."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import datetime
import decimal
import enum
import fractions
import itertools
import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from trainbus import normalize
from trainbus.events import (
    EVENT_TYPES,
    CheckpointSaved,
    CurveLogged,
    Failure,
    ImageLogged,
    MetricsLogged,
    ModelDescribed,
    Record,
    RunEnded,
    RunStarted,
    TableLogged,
    decode,
    encode,
)
from trainbus.normalize import plain, to_number


class Raises:
    """An object that raises on every access."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(name)

    def __repr__(self) -> str:
        raise RuntimeError("repr")


class RaisingItem:
    def item(self) -> float:
        raise ValueError("on the GPU")


class RaisingPath:
    def __fspath__(self) -> str:
        return "path"

    def __str__(self) -> str:
        raise RuntimeError("str")


class RaisingMapping(Mapping[str, int]):
    def __getitem__(self, key: str) -> int:
        raise RuntimeError("item")

    def __iter__(self) -> Iterator[str]:
        raise RuntimeError("iter")

    def __len__(self) -> int:
        return 1


class RaisingText(str):
    def __getitem__(self, key: Any) -> str:
        raise RuntimeError("slice")


class Colour(enum.Enum):
    RED = "red"


class Level(enum.IntEnum):
    HIGH = 3


class Kind(enum.Enum):
    ADAM = enum.auto()


@dataclasses.dataclass
class Point:
    x: int
    y: Any = None


class Pair(NamedTuple):
    x: int
    y: int


class Big(int):
    pass


class Tensor:
    """As much of a tensor as matters: a number in it if it has one element."""

    def __init__(self, *values: float) -> None:
        self.values = values

    def item(self) -> float:
        (value,) = self.values
        return value

    def __repr__(self) -> str:
        return f"tensor{self.values}"


HOSTILE: list[Any] = [
    Raises(),
    RaisingItem(),
    RaisingPath(),
    RaisingMapping(),
    RaisingText("text"),
    Colour.RED,
    Level.HIGH,
    Big(10**400),
    10**5000,
    "\ud800",
    b"\xff",
    object(),
    object,
    math.nan,
    -math.inf,
    3 + 4j,
    decimal.Decimal("1.5"),
    datetime.datetime(2024, 1, 2),
    np.float32(0.5),
    np.datetime64("2024-01-02"),
    np.str_("\ud800"),
    np.bytes_(b"\xff"),
    np.longdouble("1e4000"),
    np.array(["a", None], dtype=object),
    np.ma.masked,
    Tensor(1.0),
    Tensor(1.0, 2.0),
    Path("a/b"),
    range(3),
    iter([1]),
    {1: 2, None: 3, (1, 2): 4, Raises(): 5, "\ud800": 6},
    {1, 2},
]
# By index, because Hypothesis looks at the values that it samples from, which some don't bear.
hostile = st.integers(0, len(HOSTILE) - 1).map(lambda index: HOSTILE[index])
anything = st.recursive(
    hostile | st.none() | st.integers() | st.floats() | st.text() | st.binary() | st.booleans(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=4)
        | st.tuples(inner, inner)
    ),
    max_leaves=10,
)
any_array = arrays.arrays(
    arrays.scalar_dtypes() | arrays.byte_string_dtypes() | arrays.unicode_string_dtypes(),
    arrays.array_shapes(min_dims=0, max_dims=2, max_side=3),
)


def encodes(event: Any) -> bytes:
    return encode(Record(seq=1, run="run", time=0.0, event=event))


def is_plain(value: Any) -> bool:
    if type(value) is list:
        return all(map(is_plain, value))
    if type(value) is dict:
        return all(type(key) is str and is_plain(item) for key, item in value.items())
    return type(value) in (bool, int, float, str, type(None))


@given(anything)
def test_any_value_becomes_plain(value: Any) -> None:
    """Nothing raises, all the way down there are plain types only, and the result encodes."""
    found = plain(value)
    assert is_plain(found)
    decode(encodes(RunStarted(params={"value": found})))


@given(any_array)
def test_any_array_becomes_plain(array: Any) -> None:
    """Arrays of any dtype become lists in params."""
    found = plain({"array": array})
    assert is_plain(found)
    decode(encodes(RunStarted(params=found)))


@given(st.sampled_from(EVENT_TYPES), st.data())
def test_any_event_can_be_read_back_or_is_refused(kind: type[Any], data: st.DataObject) -> None:
    """Whatever is in the fields of an event, what is let through is read as it was written."""
    values = data.draw(st.fixed_dictionaries(dict.fromkeys(kind.__struct_fields__, anything)))
    try:
        event, left_out = normalize.event(kind(**values))
    except msgspec.ValidationError:
        assert kind not in (RunStarted, RunEnded)
        return
    assert kind is type(event)
    assert kind is type(decode(encodes(event)).event)
    assert all(type(text) is str for text in left_out)


@given(any_array)
def test_an_event_with_any_array_can_be_read_back(array: Any) -> None:
    """Arrays that JSON has no numbers for become text instead of an error."""
    event, _ = normalize.event(ImageLogged(key="k", array=array))
    found = decode(encodes(event)).event
    assert isinstance(found, ImageLogged)
    assert found.array is not None
    assert array.shape == found.array.shape


@pytest.mark.parametrize(
    ("expected", "value"),
    [
        (0.5, np.float32(0.5)),
        (3, np.int64(3)),
        (True, np.bool_(True)),
        (1.0, Tensor(1.0)),
        (2, np.array(2)),
        (3, Level.HIGH),
        (10**400, Big(10**400)),
        ([1, 2], np.array([1, 2])),
        ([1, 2], (1, 2)),
        ({"a": [1]}, OrderedDict(a=[1])),
        ({"1": 2, "None": 3}, {1: 2, None: 3}),
        ("a/b", Path("a/b")),
        ("red", Colour.RED),
        ("ADAM", Kind.ADAM),
        (0.1, decimal.Decimal("0.10")),
        ("0.1000000000000000000001", decimal.Decimal("0.1000000000000000000001")),
        (0.25, fractions.Fraction(1, 4)),
        ("2024-01-02T00:00:00", datetime.datetime(2024, 1, 2)),
        ("2024-01-02", np.datetime64("2024-01-02")),
        ("1 day, 0:00:00", datetime.timedelta(days=1)),
        ("collections.OrderedDict", OrderedDict),
        ({"x": 1, "y": {"x": 2, "y": None}}, Point(1, Point(2))),
        ({"x": 1, "y": 2}, Pair(1, 2)),
        ({"a": {"b": 1}}, argparse.Namespace(a=SimpleNamespace(b=1))),
        ([1, 2], collections.deque([1, 2])),
        ("<object object>", object()),
        ("\\ud800", "\ud800"),
        ("tensor(1.0, 2.0)", Tensor(1.0, 2.0)),
        ("<Raises: RuntimeError in repr>", Raises()),
    ],
    ids=itertools.count(),
)
def test_values_keep_what_can_be_kept(expected: Any, value: Any) -> None:
    """Numbers stay numbers of their type, containers stay containers, all else becomes text."""
    found = plain(value)
    assert expected == found
    assert type(expected) is type(found)


@pytest.mark.needs("attrs", "omegaconf", "pydantic", "transformers")
def test_configurations_of_other_packages_are_plain() -> None:
    """What attrs, pydantic, OmegaConf and transformers make of settings is names and values."""
    import attrs
    import pydantic
    from omegaconf import DictConfig, OmegaConf
    from transformers import BertConfig

    @attrs.define
    class Part:
        rate: float = 0.1

    class Whole(pydantic.BaseModel, extra="allow"):
        part: Any
        token: pydantic.SecretStr = pydantic.SecretStr("hunter22")

    config = OmegaConf.create({"a": [{"b": "${c}"}, "???"], "c": 1, "d": "${nowhere}", "e": "???"})
    assert isinstance(config, DictConfig)
    assert {"a": [{"b": 1}, "???"], "c": 1, "d": "${nowhere}", "e": "???"} == plain(config)
    whole = Whole.model_validate({"part": Part(), "more": [Path("p")]})
    assert {"part": {"rate": 0.1}, "token": "**********", "more": ["p"]} == plain(whole)
    assert 7 == plain({"model": BertConfig(hidden_size=7)})["model"]["hidden_size"]


@pytest.mark.needs("torch")
def test_an_optimizer_is_its_type_and_settings() -> None:
    """Settings shared by all groups are listed once, those of one group under its number."""
    import torch

    first, second = torch.nn.Linear(1, 1).parameters()
    groups = [{"params": [first]}, {"params": [second], "lr": 0.5}]
    found = plain({"optimizer": torch.optim.SGD(groups, lr=0.1, momentum=0.9)})["optimizer"]
    expected = {"type": "SGD", "momentum": 0.9, "group_0": {"lr": 0.1}, "group_1": {"lr": 0.5}}
    assert expected == {name: found[name] for name in expected}
    assert not {"params", "foreach"} & found.keys()
    dtype = {"dtype": torch.bfloat16, "device": torch.device("cpu"), "weights": torch.ones(2)}
    assert {"dtype": "torch.bfloat16", "device": "cpu", "weights": [1.0, 1.0]} == plain(dtype)


@pytest.mark.needs("torch")
def test_tensors_in_events_are_arrays() -> None:
    """An adapter may hand over a tensor of any dtype where an event has an array."""
    import torch

    half = torch.full((1, 2), 0.5, dtype=torch.bfloat16, requires_grad=True)
    event, left_out = normalize.event(CurveLogged(key="k", x=half[0], y=half, classes=["a"]))
    assert [] == left_out
    np.testing.assert_array_equal([[0.5, 0.5]], decode(encodes(event)).event.y)  # type: ignore[union-attr]


def test_size_and_depth_are_bounded() -> None:
    """Long strings, long lists and deep nesting are truncated."""
    assert 64 * 1024 == len(plain("x" * 10**6))
    assert 10_000 == len(plain(list(range(20_000))))
    deep: Any = []
    for _ in range(1000):
        deep = [deep]
    encodes(RunStarted(params={"deep": plain(deep)}))


def test_cycles_end() -> None:
    """A value that holds itself, many times over, is cut and not followed for ever."""
    wide: list[Any] = []
    wide += [wide] * 10
    named: dict[str, Any] = {}
    named["self"] = {"back": named}
    encodes(RunStarted(params={"wide": plain(wide), "named": plain(named)}))


def test_what_branches_without_end_is_cut() -> None:
    """A few lists that hold each other many times stand for more values than any memory holds."""
    value: Any = 1
    for _ in range(15):
        value = [value] * 10
    assert len(encodes(RunStarted(params={"value": plain(value)}))) < 10**8


def test_metrics_are_floats_or_refused() -> None:
    """Numbers of any type become floats; other values are removed and reported."""
    values: dict[Any, Any] = {
        "int": 1,
        "bool": True,
        "numpy": np.float32(0.5),
        "tensor": Tensor(0.25),
        "huge": 10**400,
        "text": "1.0",
        "none": None,
        "vector": np.zeros(2),
        7: 1.0,
        "\ud800": 1.0,
    }
    event, refused = normalize.event(MetricsLogged(values=values, phase="train"))
    expected = {"int": 1.0, "bool": 1.0, "numpy": 0.5, "tensor": 0.25, "huge": math.inf}
    assert {**expected, "7": 1.0, "\\ud800": 1.0} == event.values
    assert all(type(value) is float for value in event.values.values())
    names = ("text", "none", "vector")
    assert [f"metric {name!r}: expected a number" for name in names] == refused


@pytest.mark.parametrize(
    ("event", "field"),
    [
        (CheckpointSaved(path="p", kind="best", metrics={"a": None, "b": 1}), "metrics"),  # type: ignore[dict-item]
        (ModelDescribed(speed_ms={"a": "fast", "b": 1}), "speed_ms"),  # type: ignore[dict-item]
        (ModelDescribed(extra={"a": [], "b": np.int64(1)}), "extra"),  # type: ignore[dict-item]
    ],
)
def test_other_named_numbers_are_treated_as_metrics(event: Any, field: str) -> None:
    """A value that is not a number would make a record with float fields unreadable."""
    found, refused = normalize.event(event)
    assert {"b": 1.0} == getattr(decode(encodes(found)).event, field)
    assert ["metric 'a': expected a number"] == refused


def test_text_inside_errors_encodes() -> None:
    """An exception's message may hold bytes that are no Unicode, such as a file's name."""
    error = Failure(type="OSError", message="no such file: \udcff")
    event, _ = normalize.event(RunEnded(status="failed", error=error))
    assert "no such file: \\udcff" == decode(encodes(event)).event.error.message  # type: ignore[union-attr]


def test_a_plain_event_is_passed_on_as_it_is() -> None:
    """Nothing is copied where nothing has to be changed: this runs at every step of a training."""
    curve = CurveLogged(key="k", x=np.zeros(2), y=np.zeros((1, 2)), classes=[])
    metrics = MetricsLogged(values={"loss": 0.5}, phase="train", epoch=0, step=1)
    found, refused = normalize.event(metrics)
    assert metrics is found
    assert [] == refused
    found, _ = normalize.event(curve)
    assert curve.x is found.x


def test_what_is_normalized_is_not_changed() -> None:
    """The caller's containers stay as they are."""
    params = {"a": (1, np.float32(2)), "b": {"c": Path("p")}}
    rows = [[np.float32(1)]]
    normalize.event(RunStarted(params=params))
    normalize.event(TableLogged(key="k", columns=["a"], rows=rows))
    assert {"a": (1, np.float32(2)), "b": {"c": Path("p")}} == params
    assert np.float32 is type(rows[0][0])


def test_to_number_knows_numbers() -> None:
    """One number, however it is wrapped, is a number; anything else is not."""
    assert 1 == to_number(1)
    assert to_number(np.array([[0.5]])) == 0.5
    for other in ("1", None, [1.0], np.zeros(2), Tensor(1.0, 2.0), RaisingItem(), Raises(), 3j):
        assert to_number(other) is None


def test_nothing_is_lost_of_struct_fields() -> None:
    """Structures inside events, such as where a training resumed, stay what they are."""
    event = msgspec.convert(
        {"type": "run.started", "resumed": {"run": "r", "epoch": 1}, "name": "ünder"}, RunStarted
    )
    found, _ = normalize.event(event)
    assert event == found


def test_as_many_rows_and_classes_as_there_were() -> None:
    """Tables and class lists are never cut, however long."""
    table = TableLogged(key="t", columns=["a"], rows=[[i] for i in range(20_000)])
    kept, _ = normalize.event(table)
    assert 20_000 == len(kept.rows)
