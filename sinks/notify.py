"""Notifies people of a run's end, failure and alerts through any service that Apprise supports.

Guarantees: each message is sent once to each service, after a crash too; old records send no
message; a failure or an end is never held back; no URL of a service is shown, not in logs either.
"""

from __future__ import annotations

import hashlib
import logging
import math
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias

from msgspec import Meta

from trainbus import events
from trainbus.errors import SinkError
from trainbus.interfaces import FilePath, Options, RunInfo, Sink
from trainbus.toolkit.sinks import (
    SeenRecords,
    check_folder,
    folder_of,
    make_folder,
    required_package,
)

logger = logging.getLogger(__name__)

TESTED_VERSIONS = "2.2.0"
REQUIRED_NAMES = (
    "apprise:Apprise",
    "apprise:AppriseAsset",
    "apprise:NotifyFormat",
    "apprise:NotifyType",
)
"""Names of Apprise that the sink uses; `trainbus doctor` resolves them."""

_Kind: TypeAlias = Literal["start", "end", "failure", "alert", "best"]

_FIELDS = ("name", "run", "project", "kind", "what", "details")
_FIELD = re.compile(r"\{(\w+)\}")


class NotifyOptions(Options, frozen=True, kw_only=True):
    """Options of the `notify` sink."""

    urls: Annotated[
        list[Annotated[str, Meta(min_length=1)]],
        Meta(
            min_length=1,
            description="Apprise URLs of the services; keep them in "
            "environment variables: `${SLACK_URL}`",
        ),
    ]
    when: Annotated[
        Sequence[_Kind],
        Meta(min_length=1, description="When to send a message; `end` is an end without failure"),
    ] = ("end", "failure", "alert")
    metric: (
        Annotated[
            str,
            Meta(
                min_length=1,
                description="Metric of `best`; by default the one that the trainer ranks by",
            ),
        ]
        | None
    ) = None
    goal: (
        Annotated[
            Literal["max", "min"],
            Meta(description="Whether the highest or the lowest value of `metric` is the best"),
        ]
        | None
    ) = None
    title: Annotated[
        str,
        Meta(
            description="Title of a message; may contain {name} {run} "
            "{project} {kind} {what} {details}"
        ),
    ] = "{name}: {what}"
    body: Annotated[
        str, Meta(min_length=1, description="Body of a message; may contain the same fields")
    ] = "{details}"
    min_interval_secs: Annotated[
        float,
        Meta(ge=0, description="Minimum time between two alerts, starts or best values"),
    ] = 60.0
    max_age_secs: Annotated[
        float,
        Meta(
            ge=0,
            description="Maximum age of a record that sends a message; a "
            "replay sends none for older ones",
        ),
    ] = 3600.0
    state: Annotated[
        FilePath,
        Meta(min_length=1, description="Folder for the list of messages that were sent"),
    ] = "trainbus-runs/.notify"

    def __post_init__(self) -> None:
        for text in (self.title, self.body):
            if unknown := [name for name in _FIELD.findall(text) if name not in _FIELDS]:
                known = ", ".join(f"{{{name}}}" for name in _FIELDS)
                raise ValueError(f"found {{{unknown[0]}}} in title or body, expected {known}")

    def __repr__(self) -> str:
        return f"NotifyOptions({len(self.urls)} urls, when={self.when!r})"

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        return [("urls", len(self.urls))]


class NotifySink(Sink):
    """Sends messages about what a person wants to know at once."""

    Options = NotifyOptions
    service = "apprise"
    durable_only_after_close = True  # messages after a crash need the records before it
    reads_files = False
    options: NotifyOptions

    _location: str | None = None

    def check(self) -> str:
        """Have Apprise parse the URLs; nothing is sent.

        Raises:
            MissingPackageError: Apprise is not installed.
            SinkError: Apprise rejects a URL, or the folder of the state can't be written.
        """
        services = _load(self.options.urls)
        check_folder(self.options.state)
        return f"messages to {', '.join(service.label for service in services)}"

    def open(self, run: RunInfo) -> None:
        """Load the services, and read which messages of this run were sent.

        Raises:
            MissingPackageError: Apprise is not installed.
            SinkError: Apprise rejects a URL, or the folder of the state can't be written.
        """
        options, self._services = self.options, _load(self.options.urls)
        key = hashlib.sha256(repr([options.urls, [*options.when]]).encode()).hexdigest()[:8]
        folder = make_folder(folder_of(options.state, run.id), option="state")
        self._sent = SeenRecords(folder / f"{run.id}-{key}.json")
        self._location = ", ".join(service.label for service in self._services)
        self._seen = SeenRecords()
        self._current: tuple[str, tuple[int, int]] | None = None
        self._message: _Message | None = None
        self._unsent: list[_Service] = []
        self._messages = _Messages(run, options)
        if "best" in options.when and not self._messages.has_goal:
            logger.warning(
                "no metric has a goal, so best values are not sent; set `metric`, `goal`"
            )

    def write(self, records: Sequence[events.Record]) -> None:
        """Send the messages about the records that are new.

        Raises:
            SinkError: a service could not be reached, or rejected the message.
        """
        for record in records:
            identity = record.source, record.position
            if not self._seen.has(record):
                self._seen.add(record)
                self._current = identity
                self._unsent = []  # of a message that was given up
                message = self._messages.about(record)
                is_old = time.time() - record.time > self.options.max_age_secs
                if message is not None and not self._sent.has(record) and not is_old:
                    self._message, self._unsent = message, list(self._services)
            if identity == self._current and self._unsent and self._message is not None:
                failed = _send(self._message, self._unsent)
                self._unsent = [service for service, _ in failed]
                if failed:
                    raise _not_sent(failed, len(self._services))
                self._sent.add(record)
                self._sent.save()

    @property
    def location(self) -> str | None:
        """Names of the services."""
        return self._location


_SHOWN = 10
"""Most values in a message."""

_LONGEST = 500
"""Most characters of a line."""


class _Message(NamedTuple):
    """A message; `level` is one of Apprise's types."""

    title: str
    body: str
    level: str


class _Messages:
    """Turns the records of one run into messages."""

    def __init__(self, run: RunInfo, options: NotifyOptions) -> None:
        self._options = options
        self._run, self._started = run.id, run.started
        self._begun: float | None = None
        self._at: dict[str, float] = {}
        self._skipped: dict[str, int] = {}
        self._values: dict[str, float] = {}
        self._best: events.Best | None = None

    @property
    def has_goal(self) -> bool:
        """Whether a metric is known whose higher or lower values are better."""
        metric = self._options.metric
        return bool(self._goal(metric) if metric else self._started.goals)

    def about(self, record: events.Record) -> _Message | None:
        """Return the message about the next record, if there is one."""
        match record.event:
            case events.RunStarted() as event:
                self._begun = record.time
                about = {
                    "task": event.task,
                    "framework": event.framework,
                    "saved in": event.save_dir,
                    "resumes": "an earlier training" if event.resumed else None,
                }
                return self._wanted("start", record, "started", about, "info")
            case events.MetricsLogged(final=False) as event:
                found = self._improved(event)
                for name, value in event.values.items():
                    if event.phase != "system":
                        self._values.pop(name, None)  # the newest is last
                        self._values[name] = value
                return None if found is None else self._wanted("best", record, *found, "success")
            case events.AlertRaised() as event:
                level = {"error": "failure"}.get(event.level, event.level)
                return self._wanted("alert", record, event.title, {"": event.text}, level)
            case events.RunEnded() as event:
                kind: _Kind = "failure" if event.status == "failed" else "end"
                level = {"failed": "failure", "stopped": "warning"}.get(event.status, "success")
                return self._wanted(kind, record, event.status, self._end(event, record), level)
        return None

    def _end(self, event: events.RunEnded, record: events.Record) -> dict[str, str | None]:
        best, reason, error = event.best or self._best, event.reason, None
        if event.error is not None:
            error, kind, message = _error(event.error), event.error.type, event.error.message
            reason = None if reason in (kind, message, f"{kind}: {message}") else reason
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

    def _improved(self, event: events.MetricsLogged) -> tuple[str, dict[str, str | None]] | None:
        """Keep the best value of the metric; return the title and text about a better one."""
        for name, value in event.values.items():
            goal, best = self._goal(name), self._best
            if goal is None or math.isnan(value) or (best is not None and best.metric != name):
                continue
            if best is None or (value > best.value if goal == "max" else value < best.value):
                self._best = events.Best(metric=name, value=value, epoch=event.epoch)
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
        self,
        kind: _Kind,
        record: events.Record,
        what: str,
        about: Mapping[str, str | None],
        level: str,
    ) -> _Message | None:
        """Return a message, unless it is not wanted or comes too soon after one of its kind."""
        if kind not in self._options.when:
            return None
        since = record.time - self._at.get(kind, -math.inf)
        if kind not in ("end", "failure") and 0 <= since < self._options.min_interval_secs:
            self._skipped[kind] = self._skipped.get(kind, 0) + 1
            return None
        self._at[kind] = record.time
        lines = [_cut(f"{key}: {text}" if key else text) for key, text in about.items() if text]
        lines.append(f"run: {self._run}")
        if self._skipped:
            counts = ", ".join(f"{count} × {name}" for name, count in self._skipped.items())
            lines.append(f"skipped since the last message: {counts}")
            self._skipped = {}
        fields = {
            "name": self._started.name or self._run,
            "run": self._run,
            "project": self._started.project or "",
            "kind": kind,
            "what": what,
            "details": "\n".join(lines),
        }

        def filled(template: str) -> str:
            return _printable(_FIELD.sub(lambda found: fields[found[1]], template))

        title = _cut(" ".join(filled(self._options.title).split()))
        return _Message(title, filled(self._options.body), level)


def _error(error: events.Failure) -> str:
    """Return type and message; a traceback in the message is cut to its last line."""
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


def _printable(text: str) -> str:
    """Return text without control characters that can be encoded as UTF-8."""
    kept = "".join(c if c.isprintable() or c == "\n" else " " for c in text)
    return kept.encode("utf-8", "replace").decode()


_LEAKING = ("apprise", "urllib3.connectionpool", "urllib3.connection", "urllib3.util.retry")
"""Loggers that print URLs."""

_REJECTED = re.compile(r"\berror=(4\d\d)\b")
_TEMPORARY = frozenset({"408", "425", "429"})


class _Service(NamedTuple):
    """Where messages go."""

    label: str
    send: Callable[..., Any]


def _load(urls: Sequence[str]) -> list[_Service]:
    """Have Apprise parse the URLs.

    Raises:
        MissingPackageError: Apprise is not installed.
        SinkError: Apprise rejects a URL.
    """
    with required_package("apprise", extra="notify"):
        import apprise
    # Apprise sends in this thread: log lines of one of its own could not be recognized.
    asset = apprise.AppriseAsset(app_id="trainbus", async_mode=False, service_timeout=0)
    found = []
    for number, url in enumerate(urls, 1):
        one = apprise.Apprise(asset=asset)
        with _quiet():
            is_accepted = one.add([url])
        if not is_accepted:
            scheme = re.match(r"[a-z0-9]{1,20}://", url)
            text = f"found a URL that Apprise does not accept, number {number} of `urls`"
            raise SinkError(
                f"{text} ({scheme[0] if scheme else 'without ://'}…, the rest is not shown), "
                "expected one as in https://github.com/caronc/apprise/wiki"
            )
        found.append(_Service(str(one[0].service_name), one.notify))
    return found


def _send(message: _Message, services: Sequence[_Service]) -> list[tuple[_Service, str]]:
    """Send a message; return the services that failed, each with its HTTP status if it answered."""
    import apprise

    about = {
        "title": message.title,
        "body": message.body,
        "notify_type": apprise.NotifyType(message.level),
        "body_format": apprise.NotifyFormat.TEXT,
    }
    failed = []
    for service in services:
        with _quiet() as warnings:
            if not service.send(**about):
                failed.append((service, next(iter(_REJECTED.findall(" ".join(warnings))), "")))
    return failed


def _not_sent(failed: Sequence[tuple[_Service, str]], count: int) -> SinkError:
    """Return the error about services that failed, out of a number of them."""
    who = ", ".join(
        f"{service.label} ({f'status {status}' if status else 'no answer or an error'})"
        for service, status in failed
    )
    return SinkError(
        f"a message did not reach {len(failed)} of {count} services: {who}; "
        "check the network and the URL",
        retry=any(not status or status in _TEMPORARY for _, status in failed),
    )


class _Quiet(logging.Filter):
    """Drops what one thread logs, and keeps its warnings."""

    def __init__(self) -> None:
        super().__init__()
        self._thread = threading.get_ident()
        self.warnings: list[str] = []

    def filter(self, record: logging.LogRecord) -> bool:
        if threading.get_ident() != self._thread:
            return True
        if record.levelno >= logging.WARNING:
            self.warnings.append(record.getMessage())
        return False


@contextmanager
def _quiet() -> Iterator[list[str]]:
    """Drop what this thread logs about URLs; yield its warnings instead."""
    found = _Quiet()
    loggers = [logging.getLogger(name) for name in _LEAKING]
    for each in loggers:
        each.addFilter(found)
    try:
        yield found.warnings
    finally:
        for each in loggers:
            each.removeFilter(found)
