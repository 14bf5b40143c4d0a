"""Tells people of a run's end, failure and alerts, by any service that Apprise knows.

Guarantees: each message is sent once to each service, after a crash too; what is old is not
announced; a failure or an end is never held back; no address is shown, in no log either.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Sequence

from trainbus.errors import SinkError
from trainbus.events import Record
from trainbus.interfaces import RunInfo, Sink
from trainbus.toolkit.sinks import SeenRecords, check_folder, folder_of

from ._notify_options import NotifyOptions
from ._notify_services import Message, Service, load, not_sent, send
from ._notify_story import Story

logger = logging.getLogger("trainbus.sinks.notify")

TESTED_VERSIONS = "2.2.0"
REQUIRED_NAMES = (
    "apprise:Apprise",
    "apprise:AppriseAsset",
    "apprise:NotifyFormat",
    "apprise:NotifyType",
)
"""What the sink relies on; `trainbus doctor` resolves it."""


class NotifySink(Sink):
    """Sends a message for what a person wants to know now."""

    Options = NotifyOptions
    service = "apprise"
    durable_only_after_close = (
        True  # what came before a crash is needed to tell of what comes after it
    )
    reads_files = False
    options: NotifyOptions

    def __init__(self, options: NotifyOptions | None = None) -> None:
        super().__init__(options)
        self._services: list[Service] = []
        self._location: str | None = None

    def check(self) -> str:
        """Have Apprise read the addresses; nothing is sent.

        Raises:
            MissingPackageError: Apprise is not installed.
            SinkError: Apprise refuses an address, or the state can't be kept.
        """
        services = load(self.options.urls)
        check_folder(self.options.state)
        return f"messages to {', '.join(service.label for service in services)}"

    def open(self, run: RunInfo) -> None:
        """Load the services, and find out what was sent of this run.

        Raises:
            MissingPackageError: Apprise is not installed.
            SinkError: Apprise refuses an address, or the state can't be kept.
        """
        options, self._services = self.options, load(self.options.urls)
        key = hashlib.sha256(repr([options.urls, [*options.when]]).encode()).hexdigest()[:8]
        folder = folder_of(options.state, run.id)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            text = f"can't write {folder}: {error.strerror}; set another `state`"
            raise SinkError(text) from error
        self._sent = SeenRecords(folder / f"{run.id}-{key}.json")
        self._location = ", ".join(service.label for service in self._services)
        self._seen = (0, 0)
        self._message: Message | None = None
        self._unsent: list[Service] = []
        self._story = Story(run, options)
        if "best" in options.when and not self._story.is_ranked:
            logger.warning("found no goal, so no best value is told; set `metric` and `goal`")

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
                message = self._story.told(record)
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
    def location(self) -> str | None:
        """Names of the services."""
        return self._location

    def _send(self, message: Message) -> None:
        """Send a message to those that do not have it."""
        failed = send(message, self._unsent)
        self._unsent = [service for service, _ in failed]
        if failed:
            raise not_sent(failed, len(self._services))
