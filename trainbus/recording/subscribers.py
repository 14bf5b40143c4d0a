"""The receivers of a bus's records: blinker signals, one for each event type and one for all.

Whatever in this process consumes records is a receiver of these signals: the subscribers of the
user, and the dispatcher of each open run, which runs its inline sinks.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from typing import Any

from blinker import Namespace, Signal

from trainbus.errors import SubscribeError
from trainbus.events import Record, event_name

logger = logging.getLogger("trainbus")

_FAILURES_TO_MUTE = 5


class Subscribers:
    """Sends records to the receivers that are connected."""

    def __init__(self) -> None:
        self._signals = Namespace()
        self._written = Signal("a record is in the journal of its run")

    def subscribe(
        self, receiver: Callable[[Record], object], *events: type[Any]
    ) -> Callable[[], None]:
        """Connect a receiver of the user, which can't harm the training.

        Args:
            receiver: called with every record, or with those of the given event types.
            events: event types.

        Returns:
            A function that ends the subscription.

        Raises:
            SubscribeError: the receiver is a coroutine function or can't be called, or one of
                `events` is not an event type.
        """
        call = getattr(receiver, "__call__", None)  # noqa: B004  an object may have an async __call__
        if call is None:
            raise SubscribeError(f"expected a function that takes a record, found {receiver!r}")
        if inspect.iscoroutinefunction(receiver) or inspect.iscoroutinefunction(call):
            raise SubscribeError(
                f"{receiver!r} is a coroutine function and would never run; pass a plain function "
                "that hands the record to your event loop"
            )
        guarded = _Guarded(receiver)
        try:
            names = [event_name(event) for event in events] or ["*"]
        except TypeError as error:
            raise SubscribeError(str(error)) from error
        signals = [self._signals.signal(name) for name in names]
        for signal in signals:
            signal.connect(guarded, weak=False)

        def unsubscribe() -> None:
            for signal in signals:
                signal.disconnect(guarded)

        return unsubscribe

    def connect(self, run: str, receiver: Callable[..., object]) -> None:
        """Connect what is called after every record of one run, until `disconnect`.

        What it raises reaches `emit`; it is called last, also if a subscriber raises a Ctrl-C.
        """
        self._written.connect(receiver, sender=run, weak=False)

    def disconnect(self, receiver: Callable[..., object]) -> None:
        """Undo `connect`."""
        self._written.disconnect(receiver)

    def send(self, record: Record) -> None:
        """Send a record that is in the journal to all its receivers."""
        try:
            if self._signals:
                for name in (event_name(record.event), "*"):
                    signal = self._signals.get(name)
                    if signal is not None and signal.receivers:
                        signal.send(record)
        finally:
            self._written.send(record.run, record=record)


class _Guarded:
    """A subscriber whose exceptions are reported instead of raised."""

    def __init__(self, receiver: Callable[[Record], object]) -> None:
        self._receiver = receiver
        self._failures = 0

    def __call__(self, record: Record) -> None:
        if self._failures >= _FAILURES_TO_MUTE:
            return
        try:
            self._receiver(record)
        except Exception:
            self._failures += 1
            last = " and is muted now" if self._failures == _FAILURES_TO_MUTE else ""
            logger.warning("subscriber %r failed%s", self._receiver, last, exc_info=True)
        else:
            self._failures = 0
