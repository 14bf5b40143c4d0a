"""What there is to tell of a run: its records, as messages for people."""

from __future__ import annotations

import math
from collections.abc import Mapping

from trainbus.events import (
    AlertRaised,
    Best,
    Failure,
    MetricsLogged,
    Record,
    RunEnded,
    RunStarted,
)
from trainbus.interfaces import RunInfo

from ._notify_options import FIELD, Kind, NotifyOptions
from ._notify_services import Message

_SHOWN = 10
_LONGEST = 500


class Story:
    """Takes the records of one run in, and says what is worth a message."""

    def __init__(self, run: RunInfo, options: NotifyOptions) -> None:
        self._options = options
        self._run, self._started = run.id, run.started
        self._begun: float | None = None
        self._at: dict[str, float] = {}
        self._left_out: dict[str, int] = {}
        self._values: dict[str, float] = {}
        self._best: Best | None = None

    @property
    def is_ranked(self) -> bool:
        """Whether it is known of a metric which of its values is better."""
        metric = self._options.metric
        return bool(self._goal(metric) if metric else self._started.goals)

    def told(self, record: Record) -> Message | None:
        """Take a record in, and return what is to be told of it."""
        match record.event:
            case RunStarted() as event:
                self._begun = record.time
                about = {
                    "task": event.task,
                    "framework": event.framework,
                    "saved in": event.save_dir,
                    "goes on from": "an earlier training" if event.resumed else None,
                }
                return self._wanted("start", record, "started", about, "info")
            case MetricsLogged(final=False) as event:
                found = self._improved(event)
                for name, value in event.values.items():
                    if event.phase != "system":
                        self._values.pop(name, None)  # the newest is last
                        self._values[name] = value
                return None if found is None else self._wanted("best", record, *found, "success")
            case AlertRaised() as event:
                level = {"error": "failure"}.get(event.level, event.level)
                return self._wanted("alert", record, event.title, {"": event.text}, level)
            case RunEnded() as event:
                kind: Kind = "failure" if event.status == "failed" else "end"
                level = {"failed": "failure", "stopped": "warning"}.get(event.status, "success")
                return self._wanted(kind, record, event.status, self._end(event, record), level)
        return None

    def _end(self, event: RunEnded, record: Record) -> dict[str, str | None]:
        best, reason, error = event.best or self._best, event.reason, None
        if event.error is not None:
            error = _error(event.error)
            if reason in (event.error.type, event.error.message) or (
                reason == f"{event.error.type}: {event.error.message}"
            ):
                reason = None  # it repeats the error
        took = None if self._begun is None else _duration(record.time - self._begun)
        goals = [name for name in self._values if self._goal(name) is not None]
        names = [*goals, *(name for name in reversed(self._values) if name not in goals)][:_SHOWN]
        return {
            "reason": reason,
            "error": error,
            "best": f"{best.metric} {best.value:.5g}{_epoch(best.epoch)}" if best else None,
            "duration": took,
            "last": ", ".join(f"{name} {self._values[name]:.5g}" for name in names),
        }

    def _improved(self, event: MetricsLogged) -> tuple[str, dict[str, str | None]] | None:
        """Keep the best value of the metric that counts; return what to say of a better one."""
        for name, value in event.values.items():
            goal, best = self._goal(name), self._best
            if goal is None or math.isnan(value) or (best is not None and best.metric != name):
                continue
            if best is None or (value > best.value if goal == "max" else value < best.value):
                self._best = Best(metric=name, value=value, epoch=event.epoch)
                if best is not None:
                    text = f"{value:.5g}{_epoch(event.epoch)}, was {best.value:.5g}"
                    return f"new best {name} {value:.5g}", {name: text}
        return None

    def _goal(self, name: str) -> str | None:
        wanted = self._options.metric
        if wanted is not None and name != wanted:
            return None
        given = self._options.goal if wanted is not None else None
        return given or self._started.goal_of(name)

    def _wanted(
        self, kind: Kind, record: Record, what: str, about: Mapping[str, str | None], level: str
    ) -> Message | None:
        """Return a message, unless nobody wants it or one of the kind was sent just now."""
        if kind not in self._options.when:
            return None
        since = record.time - self._at.get(kind, -math.inf)
        if kind not in ("end", "failure") and 0 <= since < self._options.min_interval_secs:
            self._left_out[kind] = self._left_out.get(kind, 0) + 1
            return None
        self._at[kind] = record.time
        lines = [_cut(f"{key}: {text}" if key else text) for key, text in about.items() if text]
        lines.append(f"run: {self._run}")
        if self._left_out:
            counts = ", ".join(f"{count} of {name}" for name, count in self._left_out.items())
            lines.append(f"left out before this: {counts}")
            self._left_out = {}
        fields = {
            "name": self._started.name or self._run,
            "run": self._run,
            "project": self._started.project or "",
            "kind": kind,
            "what": what,
            "details": "\n".join(lines),
        }

        def filled(template: str) -> str:
            return _plain(FIELD.sub(lambda found: fields[found[1]], template))

        title = _cut(" ".join(filled(self._options.title).split()))
        return Message(title, filled(self._options.body), level)


def _error(error: Failure) -> str:
    """Return type and message; of a traceback in the message only its last line."""
    lines = [line for line in error.message.splitlines() if line.strip()]
    traces = [at for at, line in enumerate(lines) if "Traceback (most recent call last)" in line]
    if traces:
        lines = [*lines[: traces[0]], lines[-1]]
    message = "\n".join(lines)
    return f"{error.type}: {message}" if message else error.type


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def _epoch(epoch: int | None) -> str:
    return "" if epoch is None else f" in epoch {epoch + 1}"


def _duration(seconds: float) -> str:
    hours, rest = divmod(max(round(seconds), 0), 3600)
    return "{} h {:02} min {:02} s".format(hours, *divmod(rest, 60))


def _plain(text: str) -> str:
    """Return a text without control characters, and as UTF-8 can hold it."""
    kept = "".join(c if c.isprintable() or c == "\n" else " " for c in text)
    return kept.encode("utf-8", "replace").decode()
