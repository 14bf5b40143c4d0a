"""The schema: what is in it is pinned, and every record survives JSON."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from trainbus import events
from trainbus.events import (
    EVENT_TYPES,
    CheckpointSaved,
    ConfusionMatrixLogged,
    ConsoleLogged,
    CurveLogged,
    EnvironmentDescribed,
    EpochEnded,
    EpochStarted,
    Event,
    GitState,
    Gpu,
    HistogramLogged,
    ImageLogged,
    MetricsLogged,
    Record,
    RunEnded,
    RunStarted,
    TableLogged,
    TextLogged,
    UnknownEvent,
    decode,
    encode,
    event_name,
    json_schema,
)
from trainbus.testing import sample_records
from trainbus.testing.samples import future_event

SCHEMA = {
    "run.started": "name project group job_type tags notes task params framework "
    "framework_version save_dir world_size resumed goals own_loggers",
    "params.updated": "params",
    "model.described": "parameters gradients layers gflops speed_ms classes extra",
    "epoch.started": "epoch",
    "epoch.ended": "epoch duration_s outcome",
    "metrics.logged": "values phase epoch step final on_request",
    "image.logged": "key path array caption epoch step",
    "curve.logged": "key x y classes title x_label y_label epoch step",
    "confusion_matrix.logged": "key matrix classes normalized epoch step",
    "table.logged": "key columns rows epoch step",
    "histogram.logged": "key counts edges epoch step",
    "text.logged": "key text epoch step",
    "checkpoint.saved": "path kind epoch step metrics metadata final",
    "artifact.logged": "name kind paths aliases metadata",
    "alert.raised": "title text level",
    "environment.described": "command cwd script python executable packages os host user cpu "
    "cpus usable_cpus cores memory gpus gpu_driver cuda git scheduler",
    "console.logged": "stream text first_line time dropped_lines dropped_bytes",
    "run.ended": "status reason error best",
}

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
floats = st.floats()
plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=12,
)
counters = st.none() | st.integers(min_value=0, max_value=2**53)
any_array = arrays.arrays(
    st.sampled_from(["uint8", "int64", "uint64", "float16", "float32", "float64", "bool"]),
    arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
)
any_event: st.SearchStrategy[Event] = st.one_of(
    st.builds(
        RunStarted,
        name=st.none() | texts,
        tags=st.lists(texts, max_size=3),
        params=st.dictionaries(texts, plain, max_size=4),
        goals=st.dictionaries(texts, st.sampled_from(["max", "min"]), max_size=3),
        own_loggers=st.lists(texts, max_size=2),
    ),
    st.builds(
        EpochEnded,
        epoch=st.integers(0, 2**53),
        duration_s=st.none() | floats,
        outcome=st.sampled_from(["completed", "retried", "recovered"]),
    ),
    st.builds(
        MetricsLogged,
        values=st.dictionaries(texts, floats, max_size=4),
        phase=texts,
        epoch=counters,
        step=counters,
        final=st.booleans(),
    ),
    st.builds(ImageLogged, key=texts, array=st.none() | any_array, caption=st.none() | texts),
    st.builds(CurveLogged, key=texts, x=any_array, y=any_array, classes=st.lists(texts)),
    st.builds(ConfusionMatrixLogged, key=texts, matrix=any_array, classes=st.lists(texts)),
    st.builds(HistogramLogged, key=texts, counts=any_array, edges=any_array),
    st.builds(
        TableLogged,
        key=texts,
        columns=st.lists(texts, max_size=3),
        rows=st.lists(st.lists(plain, max_size=3), max_size=3),
    ),
    st.builds(TextLogged, key=texts, text=texts),
    st.builds(
        EnvironmentDescribed,
        command=st.lists(texts, max_size=3),
        memory=counters,
        gpus=st.lists(st.builds(Gpu, name=texts, memory=counters), max_size=2),
        git=st.none() | st.builds(GitState, remote=st.none() | texts, diff=texts),
        scheduler=st.dictionaries(texts, texts, max_size=3),
    ),
    st.builds(
        ConsoleLogged,
        stream=st.sampled_from(["stdout", "stderr"]),
        text=texts,
        first_line=st.integers(1, 2**53),
        time=st.none() | st.floats(0, 2**33),
    ),
    st.builds(
        CheckpointSaved,
        path=texts,
        kind=st.sampled_from(["best", "last", "periodic"]),
        metrics=st.dictionaries(texts, floats, max_size=3),
        metadata=st.dictionaries(texts, plain, max_size=3),
    ),
)
any_record = st.builds(
    Record,
    seq=st.integers(1, 2**53),
    run=texts,
    time=st.floats(allow_nan=False, allow_infinity=False),
    event=any_event,
    attempt=st.integers(1, 1000),
    rank=st.integers(0, 1000),
)


def record(event: Event | UnknownEvent) -> Record:
    return Record(seq=1, run="run", time=0.5, event=event)


def there_and_back(event: Event | UnknownEvent) -> Any:
    return decode(encode(record(event))).event


def same(a: Any, b: Any) -> bool:
    """Compare exactly: types, NaN, the sign of zero, and every bit of an array."""
    if isinstance(a, np.ndarray):
        return (
            a.dtype == b.dtype
            and a.shape == b.shape
            and np.array_equal(a, b, equal_nan=a.dtype.kind == "f")
        )
    if isinstance(a, float) and isinstance(b, float):
        return (math.isnan(a) and math.isnan(b)) or struct.pack("d", a) == struct.pack("d", b)
    if isinstance(a, msgspec.Struct):
        return type(a) is type(b) and same(msgspec.structs.asdict(a), msgspec.structs.asdict(b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and bool(a == b)


def test_the_set_of_events_is_closed_and_pinned() -> None:
    """Names and fields are what journals and sinks out there rely on; a change is a new version."""
    found = {event_name(kind): " ".join(kind.__struct_fields__) for kind in EVENT_TYPES}
    assert SCHEMA == found
    assert 1 == events.SCHEMA_VERSION
    envelope = ("seq", "run", "time", "event", "attempt", "rank", "schema", "stream")
    assert envelope == Record.__struct_fields__


def test_events_are_frozen() -> None:
    """An event can't be changed by one of those it is handed to."""
    for kind in EVENT_TYPES:
        assert kind.__struct_config__.frozen
    with pytest.raises(AttributeError):
        record(EpochStarted(epoch=0)).seq = 2  # type: ignore[misc]


def test_every_event_type_survives_json(tmp_path: Path) -> None:
    """Each record of the sample run decodes to a record that encodes to the same line."""
    for each in sample_records(tmp_path):
        line = encode(each)
        found = decode(line)
        assert type(each.event) is type(found.event)
        assert line == encode(found)
        assert b"\n" not in line


def test_a_record_of_the_main_stream_has_no_stream_in_its_line() -> None:
    """Only records of other streams have the field, so that older readers see no difference."""
    main = Record(seq=1, run="r", time=1.5, event=EpochStarted(epoch=0))
    line = (
        b'{"seq":1,"run":"r","time":1.5,"event":{"type":"epoch.started","epoch":0},'
        b'"attempt":1,"rank":0,"schema":1}'
    )
    assert line == encode(main)
    values = MetricsLogged(values={"x": math.nan}, phase="system")
    assert encode(msgspec.structs.replace(main, event=values)).endswith(b'"rank":0,"schema":1}')
    other = msgspec.structs.replace(main, stream="console", rank=2)
    assert line.replace(b'"rank":0,"schema":1', b'"rank":2,"schema":1,"stream":"console"') == (
        encode(other)
    )
    assert [main, other] == [decode(encode(main)), decode(encode(other))]
    assert ["", "console-r2"] == [main.source, other.source]


@given(any_record)
def test_any_record_survives_json(each: Record) -> None:
    """Whatever plain values are in a record, they come back exactly."""
    line = encode(each)
    assert same(each, decode(line))
    json.loads(line, parse_constant=pytest.fail)


@given(plain)
def test_any_plain_value_survives_in_params(value: Any) -> None:
    """Parameters keep their types: 1 is not 1.0, True is not 1, and big integers are exact."""
    assert same({"p": value}, there_and_back(RunStarted(params={"p": value})).params)


def test_non_finite_numbers_are_spelled() -> None:
    """NaN and infinity are encoded as strings, which any JSON parser reads, and decoded again."""
    values = {"a": math.nan, "b": math.inf, "c": -math.inf, "d": -0.0, "e": 5e-324}
    event = MetricsLogged(values=values, phase="train")
    spelled = json.loads(encode(record(event)))["event"]["values"]
    assert {"a": "NaN", "b": "Infinity", "c": "-Infinity", "d": -0.0, "e": 5e-324} == spelled
    assert same(values, there_and_back(event).values)


def test_non_finite_numbers_in_params_stay_text() -> None:
    """In a field of any type, a spelled-out number looks like text, and stays text."""
    found = there_and_back(RunStarted(params={"a": math.nan, "b": "NaN", "c": [math.inf]}))
    assert {"a": "NaN", "b": "NaN", "c": ["Infinity"]} == found.params


def test_non_finite_numbers_in_tables_come_back_in_columns_of_numbers() -> None:
    """Spelled-out numbers become numbers in a column without text; in others they stay text."""
    rows = [[math.nan, "NaN", None, 1], [0.5, "x", -math.inf, math.inf]]
    columns = ["loss", "word", "gap", "count"]
    found = there_and_back(TableLogged(key="t", columns=columns, rows=rows)).rows
    assert same(rows, found)
    mixed = there_and_back(TableLogged(key="t", columns=["m"], rows=[[math.nan], ["x"], [[]]]))
    assert [["NaN"], ["x"], [[]]] == mixed.rows


@pytest.mark.parametrize("number", [2**53 + 1, 2**63, 2**64, -(2**63) - 1, 10**400])
def test_big_integers_are_exact(number: int) -> None:
    """Integers of any size survive."""
    assert number == there_and_back(RunStarted(params={"n": number})).params["n"]


@pytest.mark.parametrize("text", ["null", "NaN", "true", "1", "", "µ", "\x00\x7f\u2028😀", '"\\'])
def test_text_stays_text(text: str) -> None:
    """A string that looks like another type stays a string."""
    assert text == there_and_back(RunStarted(name=text)).name
    assert [text] == there_and_back(RunStarted(tags=[text])).tags
    assert text == there_and_back(TextLogged(key=text, text="")).key


@given(any_array)
def test_arrays_keep_dtype_shape_and_values(array: Any) -> None:
    """An array comes back with its dtype and shape, empty and 0-d ones too."""
    assert same(array, there_and_back(ImageLogged(key="k", array=array)).array)


def test_a_value_that_is_not_plain_is_refused() -> None:
    """The error for a value that can't be encoded names its type."""
    with pytest.raises(TypeError, match="expected plain Python or numpy values, found object"):
        encode(record(RunStarted(params={"x": object()})))


def test_an_unknown_type_is_kept_whole() -> None:
    """An event of a newer schema is passed on with all its data, and nothing is added."""
    line = encode(record(future_event()))
    found = decode(line)
    assert isinstance(found.event, UnknownEvent)
    assert "weights.pruned" == found.event.name == event_name(found.event)
    assert future_event() == found.event
    assert line == encode(found)
    assert "UnknownEvent('weights.pruned')" == repr(found.event)


def test_unknown_fields_are_ignored() -> None:
    """A newer writer may add fields to the envelope and to events that there are."""
    line = (
        b'{"seq":1,"run":"r","time":0,"new":1,"event":{"type":"epoch.started","epoch":3,"new":2}}'
    )
    found = decode(line)
    assert EpochStarted(epoch=3) == found.event
    assert (1, 1, 0) == (found.attempt, found.schema, found.rank)


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"seq":1}',
        b'{"seq":"x","run":"r","time":0,"event":{"type":"epoch.started","epoch":3}}',
        b'{"seq":1,"run":"r","time":0,"event":{}}',
        b'{"seq":1,"run":"r","time":0,"event":{"type":1}}',
        b'{"seq":1,"run":"r","time":0,"event":{"type":"epoch.started"}}',
        b'{"seq":1,"run":"r","time":0,"event":{"type":"epoch.started","epoch":"x"}}',
        b'{"seq":1,"run":"r","time":0,"event":{"type":"histogram.logged","key":"k",'
        b'"counts":{"dtype":"float64","shape":[2],"data":["x"]},"edges":{}}}',
        b'{"seq":1,"run":"r","time":0,"event":{"type":"image.logged","key":"k","array":[1]}}',
        b'\xff{"seq":1}',
    ],
)
def test_a_damaged_line_is_a_decode_error(line: bytes) -> None:
    """Whatever is wrong with a line, readers have one exception to catch."""
    with pytest.raises(msgspec.DecodeError):
        decode(line)


def test_position_orders_the_records_of_a_run() -> None:
    """Attempt, then seq: a later attempt comes after every record of an earlier one."""
    first = msgspec.structs.replace(record(EpochStarted(epoch=0)), seq=99)
    second = msgspec.structs.replace(record(EpochStarted(epoch=0)), seq=1, attempt=2)
    assert first.position < second.position


def test_event_name_knows_types_and_values() -> None:
    """The name is the same for a type and its values; anything else is rejected."""
    assert "metrics.logged" == event_name(MetricsLogged)
    assert "run.ended" == event_name(RunEnded(status="finished"))
    for other in (None, 1, "metrics.logged", object(), Record, UnknownEvent):
        with pytest.raises(TypeError, match=r"expected an event of trainbus\.events, found"):
            event_name(other)


def test_json_schema_describes_every_event() -> None:
    """The JSON Schema has every event type, and the envelope's fields by their JSON names."""
    schema = json_schema()
    json.dumps(schema)
    envelope = schema["$defs"]["RecordSchema"]["properties"]
    names = {"seq", "run", "time", "event", "attempt", "rank", "schema", "stream"}
    assert names == set(envelope)
    tags = envelope["event"]["discriminator"]["mapping"]
    assert set(SCHEMA) == set(tags)
    for reference in tags.values():
        assert reference.rsplit("/", 1)[-1] in schema["$defs"]


def test_a_goal_is_an_exact_name_or_a_prefix() -> None:
    """Brackets are no pattern, and the most particular entry decides."""
    started = RunStarted(goals={"head[0]/acc": "max", "val/*": "min", "val/acc*": "max"})
    assert "max" == started.goal_of("head[0]/acc")
    assert started.goal_of("head0/acc") is None
    assert "min" == started.goal_of("val/loss")
    assert "max" == started.goal_of("val/acc_top5")
