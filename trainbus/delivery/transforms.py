"""Filters, renames and samples records before a sink receives them, as its configuration says.

Patterns match the names that a tracker shows: metric names, and the keys of images, curves,
confusion matrices, tables, histograms and texts. All other events (starts, ends, checkpoints,
artifacts, alerts) always pass. `*` matches any text, `?` one character; the text that the first
`*` of a `rename` pattern matches replaces the `*` in the new name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from trainbus.events import MetricsLogged, Record, RunStarted


class TransformSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The transforms of one sink, the same keys for every sink."""

    include: Annotated[
        Sequence[str],
        Meta(
            min_length=1,
            description="Names to send to the sink; `*` matches any text, `?` one character",
            extra={"expected": "a list of one pattern or more (else nothing is sent)"},
        ),
    ] = ("*",)
    exclude: Annotated[Sequence[str], Meta(description="Names not to send to the sink")] = ()
    phase: Annotated[
        Sequence[str],
        Meta(
            min_length=1,
            description="Phases, such as `validation`, whose metrics are sent to the sink",
            extra={"expected": "a list of one phase or more (else no metric is sent)"},
        ),
    ] = ("*",)
    rename: Annotated[
        Mapping[str, Annotated[str, Meta(min_length=1)]],
        Meta(description="Name → name in this sink; a `*` in both stands for the same text"),
    ] = {}
    every: Annotated[
        Mapping[str, Annotated[int, Meta(ge=1)]],
        Meta(description="Phase, such as `train` → minimum number of steps between two values"),
    ] = {}


class Transform:
    """Applies the transforms of one sink to one run; remembers the last step of each phase."""

    def __init__(self, spec: TransformSpec) -> None:
        self._spec = spec
        self._include = [_pattern(glob) for glob in spec.include]
        self._exclude = [_pattern(glob) for glob in spec.exclude]
        self._phases = [_pattern(glob) for glob in spec.phase]
        self._takes_all_phases = list(spec.phase) == ["*"]
        self._renames = [(_pattern(old), new) for old, new in spec.rename.items()]
        self._last_step: dict[str, int] = {}
        self._changes_names = bool(list(spec.include) != ["*"] or spec.exclude or spec.rename)

    def __call__(self, record: Record) -> Record | None:
        """Return the record for the sink, or None if it is filtered out."""
        event: Any = record.event
        if not self._changes_names and type(event) is not MetricsLogged:
            return record
        if isinstance(event, MetricsLogged):
            if not self._is_phase(event.phase) or not self._due(event):
                return None
            if not self._changes_names:
                return record
            values = {self.name(k): v for k, v in event.values.items() if self._wanted(k)}
            if not values:
                return None
            if values == event.values:
                return record
            return msgspec.structs.replace(
                record, event=msgspec.structs.replace(event, values=values)
            )
        if isinstance(event, RunStarted) and self._renames:
            return msgspec.structs.replace(
                record, event=msgspec.structs.replace(event, goals=self._goals(event))
            )
        key = getattr(event, "key", None)
        if key is None:
            return record
        if not self._wanted(key):
            return None
        new = self.name(key)
        if new == key:
            return record
        return msgspec.structs.replace(record, event=msgspec.structs.replace(event, key=new))

    def name(self, key: str) -> str:
        """Return the name of a metric or key in this sink."""
        for pattern, new in self._renames:
            found = pattern.fullmatch(key)
            if found:
                return new.replace("*", found[1], 1) if found.groups() else new
        return key

    def _goals(self, started: RunStarted) -> dict[str, Literal["max", "min"]]:
        """Return the goals with the names that the metrics have in this sink."""
        goals = {self.name(k): v for k, v in started.goals.items()}
        prefixes = {k: v for k, v in started.goals.items() if k.endswith("*")}
        by_prefix = msgspec.structs.replace(started, goals=prefixes)
        for old, new in self._spec.rename.items():
            # A renamed metric keeps the goal that a shorter prefix gave to its old name.
            is_part = old.endswith("*") and new.endswith("*")
            stem = old[:-1] if is_part else old
            goal = by_prefix.goal_of(stem)
            if goal is not None and "*" not in stem and "?" not in stem:
                goals.setdefault(new, goal)
        return goals

    def _wanted(self, key: str) -> bool:
        return any(pattern.fullmatch(key) for pattern in self._include) and not any(
            pattern.fullmatch(key) for pattern in self._exclude
        )

    def _is_phase(self, phase: str) -> bool:
        return self._takes_all_phases or any(p.fullmatch(phase) for p in self._phases)

    def _due(self, event: MetricsLogged) -> bool:
        if event.step is None:
            return True
        interval = self._spec.every.get(event.phase)
        if interval is None:
            return not event.on_request
        last = self._last_step.get(event.phase)
        if last is not None and event.step != last and last <= event.step < last + interval:
            return False
        self._last_step[event.phase] = event.step
        return True


def _pattern(glob: str) -> re.Pattern[str]:
    """Return a pattern as a regular expression that captures the text of each `*`.

    fnmatch is no option: it treats brackets as special, and names such as `head[0]/loss` have them.
    """
    special = {"*": "(.*)", "?": "."}
    return re.compile("".join(special.get(c) or re.escape(c) for c in glob), re.DOTALL)
