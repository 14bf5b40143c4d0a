"""Tells people of a run's end, failure and alerts, by any service that Apprise knows.

Guarantees: each message is sent once to each service, after a crash too; what is old is not
announced; a failure or an end is never held back; no address is shown, in no log either.
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
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias

from msgspec import Meta

from trainbus.errors import MissingPackageError, SinkError
from trainbus.events import (
    AlertRaised,
    Best,
    Failure,
    MetricsLogged,
    Record,
    RunEnded,
    RunStarted,
)
from trainbus.interfaces import Options, RunInfo, Sink
from trainbus.storing import Taken, check_folder

logger = logging.getLogger("trainbus.sinks.notify")

TESTED = "2.2.0"
NEEDS = (
    "apprise:Apprise",
    "apprise:AppriseAsset",
    "apprise:NotifyFormat",
    "apprise:NotifyType",
)
"""What the sink relies on; `trainbus doctor` resolves it."""

Kind: TypeAlias = Literal["start", "end", "failure", "alert", "best"]

_FIELDS = ("name", "run", "project", "kind", "what", "details")
_FIELD = re.compile(r"\{(\w+)\}")
_SHOWN = 10
_LONGEST = 500
_LEAKING = ("apprise", "urllib3.connectionpool", "urllib3.connection", "urllib3.util.retry")
"""Loggers that repeat addresses."""

_REFUSED = re.compile(r"\berror=(4\d\d)\b")
_PASSING = frozenset({"408", "425", "429"})


class NotifyOptions(Options, frozen=True, kw_only=True):
    """Options of the `notify` sink."""

    urls: Annotated[
        list[Annotated[str, Meta(min_length=1)]],
        Meta(
            min_length=1,
            description="Apprise URLs of the services; keep them in variables: `${SLACK_URL}`",
        ),
    ]
    when: Annotated[
        Sequence[Kind],
        Meta(min_length=1, description="What is told; `end` is one that is no failure"),
    ] = ("end", "failure", "alert")
    metric: (
        Annotated[
            str,
            Meta(min_length=1, description="Metric of `best`; by default the trainer's"),
        ]
        | None
    ) = None
    goal: (
        Annotated[
            Literal["max", "min"],
            Meta(description="Which value of `metric` is better"),
        ]
        | None
    ) = None
    title: Annotated[
        str, Meta(description="Title; of {name} {run} {project} {kind} {what} {details}")
    ] = "{name}: {what}"
    body: Annotated[str, Meta(min_length=1, description="Text, of the same")] = "{details}"
    min_interval_secs: Annotated[
        float,
        Meta(ge=0, description="Shortest time between two alerts, or two bests"),
    ] = 60.0
    max_age_secs: Annotated[
        float, Meta(ge=0, description="What happened longer ago, as in a replay, is not told")
    ] = 3600.0
    state: Annotated[
        str,
        Meta(min_length=1, description="Folder that keeps which messages of a run were sent"),
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


class _Message(NamedTuple):
    title: str
    body: str
    level: str


class _Service(NamedTuple):
    label: str
    send: Callable[..., Any]


class NotifySink(Sink):
    """Sends a message for what a person wants to know now."""

    Options = NotifyOptions
    service = "apprise"
    volatile = True  # what came before a crash is needed to tell of what comes after it
    reads_files = False
    options: NotifyOptions

    def __init__(self, options: NotifyOptions | None = None) -> None:
        super().__init__(options)
        self._services: list[_Service] = []
        self._where: str | None = None

    def check(self) -> str:
        """Have Apprise read the addresses; nothing is sent.

        Raises:
            MissingPackageError: Apprise is not installed.
            SinkError: Apprise refuses an address, or the state can't be kept.
        """
        self._load()
        check_folder(self.options.state)
        return f"messages to {', '.join(service.label for service in self._services)}"

    def open(self, run: RunInfo) -> None:
        """Load the services, and find out what was sent of this run.

        Raises:
            MissingPackageError: Apprise is not installed.
            SinkError: Apprise refuses an address, or the state can't be kept.
        """
        self._load()
        key = hashlib.sha256(repr([self.options.urls, [*self.options.when]]).encode()).hexdigest()[
            :8
        ]
        folder = Path(self.options.state).expanduser().absolute()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            text = f"can't write {folder}: {error.strerror}; set another `state`"
            raise SinkError(text) from error
        self._sent = Taken(folder / f"{run.id}-{key}.json")
        self._where = ", ".join(service.label for service in self._services)
        self._seen = (0, 0)
        self._message: _Message | None = None
        self._unsent: list[_Service] = []
        self._run, self._started = run.id, run.started
        self._begun: float | None = None
        self._at: dict[str, float] = {}
        self._left_out: dict[str, int] = {}
        self._values: dict[str, float] = {}
        self._best: Best | None = None
        is_ranked = self._goal(self.options.metric) if self.options.metric else run.started.goals
        if "best" in self.options.when and not is_ranked:
            logger.warning("found no goal, so no best value is told; set `metric` and `goal`")

    def _load(self) -> None:
        try:
            import apprise
        except ImportError as error:
            raise MissingPackageError("apprise", extra="notify") from error
        # Nothing is sent in a thread of Apprise's, whose log could not be told from others.
        asset = apprise.AppriseAsset(app_id="trainbus", async_mode=False, service_timeout=0)
        self._services = []
        for number, url in enumerate(self.options.urls, 1):
            one = apprise.Apprise(asset=asset)
            with _quiet():
                is_taken = one.add([url])
            if not is_taken:
                scheme = re.match(r"[a-z0-9]{1,20}://", url)
                text = f"found a URL that Apprise does not take, number {number} of `urls`"
                raise SinkError(
                    f"{text} ({scheme[0] if scheme else 'without ://'}…, the rest is not shown), "
                    "expected one as in https://github.com/caronc/apprise/wiki"
                )
            self._services.append(_Service(str(one[0].service_name), one.notify))

    def write(self, records: Sequence[Record]) -> None:
        """Send what there is to tell of the records that are new.

        Raises:
            SinkError: nothing was opened, or a service could not be reached or refused the message.
        """
        if not self._services:
            raise SinkError("write came before open; call open(run) first")
        for record in records:
            if record.position > self._seen:
                self._seen = record.position
                self._unsent = []  # of a message that was given up
                message = self._told(record)
                is_old = time.time() - record.time > self.options.max_age_secs
                if message is not None and record.position > self._sent.last and not is_old:
                    self._message, self._unsent = message, list(self._services)
            if record.position == self._seen and self._unsent and self._message is not None:
                self._send(self._message)
                self._sent.last = record.position
                self._sent.save()

    def close(self) -> None:
        """Let go of the services."""
        self._services = []

    @property
    def where(self) -> str | None:
        """Names of the services."""
        return self._where

    def _send(self, message: _Message) -> None:
        """Send a message to those that do not have it."""
        import apprise

        about = {
            "title": message.title,
            "body": message.body,
            "notify_type": apprise.NotifyType(message.level),
            "body_format": apprise.NotifyFormat.TEXT,
        }
        failed, said = [], []
        for service in self._unsent:
            with _quiet() as heard:
                if not service.send(**about):
                    failed.append(service)
                    said.append(next(iter(_REFUSED.findall(" ".join(heard))), ""))
        self._unsent = failed
        if failed:
            count = f"{len(failed)} of {len(self._services)} services"
            who = ", ".join(
                f"{service.label} ({f'status {status}' if status else 'no answer, or it failed'})"
                for service, status in zip(failed, said, strict=True)
            )
            raise SinkError(
                f"a message did not reach {count}: {who}; check the network and the URL",
                retry=any(not status or status in _PASSING for status in said),
            )

    def _told(self, record: Record) -> _Message | None:
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
        wanted, goals = self.options.metric, self._started.goals
        if wanted is not None and name != wanted:
            return None
        given = self.options.goal if wanted is not None else None
        fits = (p for p in goals if p == name or (p[-1:] == "*" and name.startswith(p[:-1])))
        return given or goals.get(next(fits, name))

    def _wanted(
        self, kind: Kind, record: Record, what: str, about: Mapping[str, str | None], level: str
    ) -> _Message | None:
        """Return a message, unless nobody wants it or one of the kind was sent just now."""
        if kind not in self.options.when:
            return None
        since = record.time - self._at.get(kind, -math.inf)
        if kind not in ("end", "failure") and 0 <= since < self.options.min_interval_secs:
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
            return _plain(_FIELD.sub(lambda found: fields[found[1]], template))

        title = _cut(" ".join(filled(self.options.title).split()))
        return _Message(title, filled(self.options.body), level)


class _Quiet(logging.Filter):
    """Keeps what one thread logs from everybody, and hears warnings."""

    def __init__(self) -> None:
        super().__init__()
        self._thread = threading.get_ident()
        self.heard: list[str] = []

    def filter(self, record: logging.LogRecord) -> bool:
        if threading.get_ident() != self._thread:
            return True
        if record.levelno >= logging.WARNING:
            self.heard.append(record.getMessage())
        return False


@contextmanager
def _quiet() -> Iterator[list[str]]:
    """Let this thread log no address; give what it was warned of instead."""
    found = _Quiet()
    loggers = [logging.getLogger(name) for name in _LEAKING]
    for each in loggers:
        each.addFilter(found)
    try:
        yield found.heard
    finally:
        for each in loggers:
            each.removeFilter(found)


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
