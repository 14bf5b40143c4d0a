"""The services that messages go to, by Apprise: no address of theirs is shown, in no log either."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from trainbus.errors import MissingPackageError, SinkError

_LEAKING = ("apprise", "urllib3.connectionpool", "urllib3.connection", "urllib3.util.retry")
"""Loggers that repeat addresses."""

_REFUSED = re.compile(r"\berror=(4\d\d)\b")
_PASSING = frozenset({"408", "425", "429"})


class Message(NamedTuple):
    """What is told; `level` is one of Apprise's types."""

    title: str
    body: str
    level: str


class Service(NamedTuple):
    """Where it is told."""

    label: str
    send: Callable[..., Any]


def load(urls: Sequence[str]) -> list[Service]:
    """Have Apprise read the addresses.

    Raises:
        MissingPackageError: Apprise is not installed.
        SinkError: Apprise refuses an address.
    """
    try:
        import apprise
    except ImportError as error:
        raise MissingPackageError("apprise", extra="notify") from error
    # Nothing is sent in a thread of Apprise's, whose log could not be told from others.
    asset = apprise.AppriseAsset(app_id="trainbus", async_mode=False, service_timeout=0)
    found = []
    for number, url in enumerate(urls, 1):
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
        found.append(Service(str(one[0].service_name), one.notify))
    return found


def send(message: Message, services: Sequence[Service]) -> list[tuple[Service, str]]:
    """Send a message; return who does not have it, with the status where there was an answer."""
    import apprise

    about = {
        "title": message.title,
        "body": message.body,
        "notify_type": apprise.NotifyType(message.level),
        "body_format": apprise.NotifyFormat.TEXT,
    }
    failed = []
    for service in services:
        with _quiet() as heard:
            if not service.send(**about):
                failed.append((service, next(iter(_REFUSED.findall(" ".join(heard))), "")))
    return failed


def not_sent(failed: Sequence[tuple[Service, str]], count: int) -> SinkError:
    """Return what says who of so many services does not have a message."""
    who = ", ".join(
        f"{service.label} ({f'status {status}' if status else 'no answer, or it failed'})"
        for service, status in failed
    )
    return SinkError(
        f"a message did not reach {len(failed)} of {count} services: {who}; "
        "check the network and the URL",
        retry=any(not status or status in _PASSING for _, status in failed),
    )


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
