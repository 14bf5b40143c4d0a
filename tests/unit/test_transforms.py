"""What a sink's configuration filters, renames and thins out."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainbus.delivery.transforms import Transform, TransformSpec
from trainbus.events import (
    AlertRaised,
    CheckpointSaved,
    Event,
    ImageLogged,
    MetricsLogged,
    Record,
    RunEnded,
    RunStarted,
    TextLogged,
    UnknownEvent,
    encode,
)
from trainbus.testing import sample_records

VALUES = {"train/loss": 1.0, "val/loss": 2.0, "metrics/mAP50(B)": 3.0}


def record(event: Event | UnknownEvent) -> Record:
    return Record(seq=1, run="run", time=0.0, event=event)


def names(spec: TransformSpec, values: dict[str, float] = VALUES) -> list[str]:
    """Return the metric names that a sink with these transforms gets."""
    found = Transform(spec)(record(MetricsLogged(values=values, phase="train", epoch=0)))
    return list(found.event.values) if found and isinstance(found.event, MetricsLogged) else []


def passes(spec: TransformSpec, event: Any) -> bool:
    return Transform(spec)(record(event)) is not None


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        (["*"], [], [*VALUES]),
        (["train/*"], [], ["train/loss"]),
        (["*/loss"], ["val/*"], ["train/loss"]),
        (["*"], ["*"], []),
        ([], [], []),
        (["metrics/mAP50(B)"], [], ["metrics/mAP50(B)"]),
        (["METRICS/*"], [], []),
        (["t*", "v*"], ["*/l?ss"], []),
    ],
)
def test_include_and_exclude(include: list[str], exclude: list[str], expected: list[str]) -> None:
    """A name must match a pattern of `include` and none of `exclude`."""
    assert expected == names(TransformSpec(include=include, exclude=exclude))


def test_brackets_are_letters() -> None:
    """Only `*` and `?` are special: a name with brackets matches itself."""
    values = {"head[0]/loss": 1.0, "head0/loss": 2.0}
    assert ["head[0]/loss"] == names(TransformSpec(include=["head[0]/*"]), values)
    assert ["head0/loss"] == names(TransformSpec(exclude=["head[[]0]/*", "head[0]*"]), values)
    assert ["x/loss", "head0/loss"] == names(TransformSpec(rename={"head[0]/*": "x/*"}), values)


@pytest.mark.parametrize(
    ("rename", "expected"),
    [
        ({"train/loss": "loss"}, ["loss", "val/loss", "metrics/mAP50(B)"]),
        ({"train/*": "t/*"}, ["t/loss", "val/loss", "metrics/mAP50(B)"]),
        ({"*/loss": "loss/*"}, ["loss/train", "loss/val", "metrics/mAP50(B)"]),
        ({"*/loss": "x", "train/*": "y"}, ["x", "metrics/mAP50(B)"]),
        ({"train/lo?s": "one"}, ["one", "val/loss", "metrics/mAP50(B)"]),
        ({"*/mAP*": "*"}, ["train/loss", "val/loss", "metrics"]),
        ({"loss": "nothing"}, [*VALUES]),
        ({"metrics/mAP50(B)": "a\\1*"}, ["train/loss", "val/loss", "a\\1*"]),
    ],
)
def test_rename(rename: dict[str, str], expected: list[str]) -> None:
    """The first pattern that matches gives the new name, with the text of its first `*`."""
    assert expected == names(TransformSpec(rename=rename))


def test_names_are_filtered_before_they_are_renamed() -> None:
    """`include` and `exclude` speak of the names that the trainer gives."""
    spec = TransformSpec(include=["train/*"], rename={"train/loss": "other"})
    assert ["other"] == names(spec)


def test_keys_are_treated_like_names() -> None:
    """Images, curves and the like are filtered and renamed by their keys."""
    spec = TransformSpec(include=["plots/*"], rename={"plots/*": "p/*"})
    found = Transform(spec)(record(ImageLogged(key="plots/PR", path="x.png")))
    assert found is not None
    assert ImageLogged(key="p/PR", path="x.png") == found.event
    assert not passes(spec, TextLogged(key="other", text=""))


def test_goals_are_renamed_with_their_metrics() -> None:
    """What the trainer ranks by is called in the sink what the metric is called there."""
    spec = TransformSpec(include=["nothing"], rename={"metrics/*": "*"})
    found = Transform(spec)(record(RunStarted(goals={"metrics/mAP50(B)": "max"})))
    assert found is not None
    assert RunStarted(goals={"mAP50(B)": "max"}) == found.event


@pytest.mark.parametrize(
    ("rename", "metric", "expected"),
    [
        ({"metrics/mAP50": "val/mAP50"}, "metrics/mAP50", "max"),
        ({"metrics/m*": "val/*"}, "metrics/mAP50", "max"),
        ({"metrics/*": "val/*"}, "metrics/mAP50", "max"),
        ({"metrics/loss": "val/loss"}, "metrics/loss", "min"),
        ({"*/loss": "loss"}, "metrics/loss", "min"),
        ({"m*": "n*"}, "m/other", None),
    ],
)
def test_a_goal_of_a_prefix_goes_with_the_metric(
    rename: dict[str, str], metric: str, expected: str | None
) -> None:
    """A metric keeps its goal under its new name, whether it has it by name or by prefix."""
    started = RunStarted(goals={"metrics/*": "max", "metrics/loss": "min", "m": "max"})
    transform = Transform(TransformSpec(rename=rename))
    found = transform(record(started))
    assert found is not None
    assert isinstance(found.event, RunStarted)
    assert expected == found.event.goal_of(transform.name(metric))


@pytest.mark.parametrize(
    "event",
    [
        RunStarted(),
        RunEnded(status="finished"),
        CheckpointSaved(path="p", kind="last"),
        AlertRaised(title="t", level="info"),
        UnknownEvent("new.thing", {"type": "new.thing", "key": "k"}),
    ],
)
def test_what_has_no_name_passes(event: Event | UnknownEvent) -> None:
    """Starts, ends, checkpoints, alerts and unknown events go through every filter."""
    assert passes(TransformSpec(include=[], exclude=["*"]), event)


def thinned(spec: TransformSpec, steps: list[int | None], **fields: Any) -> list[int | None]:
    """Return the steps that a sink gets of these."""
    transform = Transform(spec)
    found = []
    for step in steps:
        event = MetricsLogged(values={"loss": 1.0}, step=step, **{"phase": "train", **fields})
        if transform(record(event)) is not None:
            found.append(step)
    return found


def test_every_thins_out_steps() -> None:
    """Of each phase's step values one in so many steps passes, the first one among them."""
    spec = TransformSpec(every={"train": 50})
    assert [1, 51, 101] == thinned(spec, [*range(1, 140)])
    assert [7, 57] == thinned(spec, [*range(7, 90, 10)])
    assert [*range(5)] == thinned(spec, [*range(5)], phase="validation")


def test_every_keeps_the_values_of_one_step_together() -> None:
    """Several events of the step that is due all pass."""
    assert [1, 1, 3, 3] == thinned(TransformSpec(every={"train": 2}), [1, 1, 2, 2, 3, 3])


def test_every_leaves_epochs_alone() -> None:
    """Values that sum up an epoch are not step values."""
    assert [None, None] == thinned(TransformSpec(every={"train": 50}), [None, None])


def test_every_starts_again_where_steps_do() -> None:
    """After an epoch is redone the steps fall, and the next one passes."""
    assert [10, 4, 9] == thinned(TransformSpec(every={"train": 5}), [10, 12, 4, 5, 9])


def test_step_values_on_request_need_a_request() -> None:
    """What was measured for one sink does not reach another that did not ask for it."""
    assert [] == thinned(TransformSpec(), [1, 2], on_request=True)
    assert [1, 3] == thinned(TransformSpec(every={"train": 2}), [1, 2, 3], on_request=True)


def test_records_are_not_changed(tmp_path: Any) -> None:
    """The record for other sinks is unchanged, and a record without changes is not copied."""
    event = MetricsLogged(values=dict(VALUES), phase="train")
    Transform(TransformSpec(include=["train/*"], rename={"*": "x"}))(record(event))
    assert VALUES == event.values
    transform = Transform(TransformSpec(every={"train": 1}))
    for each in sample_records(tmp_path):
        if not isinstance(each.event, MetricsLogged) or each.event.values:
            assert each is transform(each)


@pytest.mark.parametrize(
    "spec",
    [
        TransformSpec(),
        TransformSpec(include=("*",), exclude=(), every={"train": 2}),
        TransformSpec(include=("train/*",), rename={"train/*": "*"}, every={"validation": 1}),
    ],
    ids=["nothing", "all", "some"],
)
def test_a_spec_does_the_same_in_another_process(spec: TransformSpec, tmp_path: Any) -> None:
    """What a spec lets through is the same after it was sent as JSON, which knows no tuples."""
    there = msgspec.json.decode(msgspec.json.encode(spec), type=TransformSpec)
    records = sample_records(tmp_path)
    assert any(isinstance(r.event, MetricsLogged) and not r.event.values for r in records)
    here, other = Transform(spec), Transform(there)
    for each in records:
        found, expected = other(each), here(each)
        assert (expected is None) == (found is None)
        if found is not None and expected is not None:
            assert encode(expected) == encode(found)


def test_keys_of_the_configuration_are_checked() -> None:
    """A transform that does not exist is an error, and not ignored."""
    with pytest.raises(msgspec.ValidationError, match="unknown field `includes`"):
        msgspec.convert({"includes": ["*"]}, TransformSpec)


@given(
    st.lists(st.text("a/*?[]!\\(", max_size=6), max_size=3),
    st.dictionaries(st.text("a/*?[]!\\(", max_size=6), st.text("a/*\\1", max_size=4), max_size=3),
    st.text("a/[]!\\(\n", max_size=6),
)
def test_any_pattern_is_good(patterns: list[str], rename: dict[str, str], name: str) -> None:
    """No pattern raises, and every name without wildcards matches itself."""
    names(TransformSpec(include=patterns, exclude=patterns, rename=rename), {name: 1.0})
    assert [name] == names(TransformSpec(include=[name]), {name: 1.0})
    assert ["new"] == names(TransformSpec(rename={name: "new"}), {name: 1.0})


@pytest.mark.parametrize(
    ("phases", "expected"),
    [
        (["*"], ["train", "validation", "test"]),
        (["validation"], ["validation"]),
        (["t*"], ["train", "test"]),
    ],
)
def test_phase_lets_metrics_of_some_phases_through(phases: list[str], expected: list[str]) -> None:
    """Metrics of other phases are left out, and events that have no phase pass."""
    transform = Transform(TransformSpec(phase=phases))
    found = []
    for phase in ("train", "validation", "test"):
        seen = transform(record(MetricsLogged(values={"loss": 1.0}, phase=phase, epoch=0)))
        found += [] if seen is None else [phase]
    assert expected == found
    assert transform(record(TextLogged(key="k", text="t"))) is not None
