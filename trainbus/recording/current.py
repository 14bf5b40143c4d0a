"""The runs that are open in this process, for code that has no bus: `trainbus.current_run()`.

Guarantees: an emitter is listed while its run is open, and never in a forked child.
"""

from __future__ import annotations

import logging
import threading
from typing import Protocol

from trainbus.events import Event, event_name

logger = logging.getLogger("trainbus")


class UserEmitter(Protocol):
    """What a handle on a run logs to."""

    @property
    def run_id(self) -> str | None:
        """Id of the open run, None if no run is open."""

    @property
    def run_name(self) -> str | None:
        """Name of the open run."""

    @property
    def epoch(self) -> int | None:
        """The epoch that values without one belong to."""

    def links(self) -> dict[str, str]:
        """Return where each open sink shows the run."""

    def log(self, event: Event, /) -> None:
        """Record an event of the user's own."""

    def leave_out(self, what: str, /) -> None:
        """Warn once that something can't be recorded, and count it."""


_open: list[tuple[int, UserEmitter]] = []
"""Each open run: the thread that started it, and its emitter."""


def add(emitter: UserEmitter) -> None:
    """Note that an emitter has opened a run, in this thread."""
    _open.append((threading.get_ident(), emitter))


def remove(emitter: UserEmitter) -> None:
    """Note that its run is no longer open."""
    _open[:] = [each for each in _open if each[1] is not emitter]


def find() -> UserEmitter | None:
    """Return the emitter of the newest open run, preferring those that this thread started."""
    runs = _open.copy()
    here = threading.get_ident()
    own = [emitter for thread, emitter in runs if thread == here]
    return own[-1] if own else runs[-1][1] if runs else None


class CurrentEmitter:
    """Passes on to the run that is open at the time; while none is open, it drops events."""

    has_warned = False
    """Whether this process has said that it drops what is logged outside of a run."""

    @property
    def run_id(self) -> str | None:
        """Id of the run that is open now."""
        found = find()
        return None if found is None else found.run_id

    @property
    def run_name(self) -> str | None:
        """Name of the run that is open now."""
        found = find()
        return None if found is None else found.run_name

    @property
    def epoch(self) -> int | None:
        """Epoch of the run that is open now."""
        found = find()
        return None if found is None else found.epoch

    def links(self) -> dict[str, str]:
        """Return where each sink shows the run that is open now."""
        found = find()
        return {} if found is None else found.links()

    def log(self, event: Event, /) -> None:
        """Record an event in the run that is open now; without one, warn once in this process."""
        found = find()
        if found is None:
            self._drop(event_name(event))
        else:
            found.log(event)

    def leave_out(self, what: str, /) -> None:
        """Warn once that something can't be recorded."""
        found = find()
        if found is None:
            self._drop(what)
        else:
            found.leave_out(what)

    def _drop(self, what: str) -> None:
        if not CurrentEmitter.has_warned:
            CurrentEmitter.has_warned = True
            logger.warning(
                "dropped %s: `trainbus.current_run()` was used while no run was open; "
                "further values are dropped without a warning",
                what,
            )
