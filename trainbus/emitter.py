"""Turns the events of one trainer into the records of its runs, one run after another.

Guarantees, whatever is called in whatever order: each run has one `run.started` first and one
`run.ended` last, `seq` has no gaps, and nothing raised by a subscriber or a sink reaches training.
"""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from trainbus import normalize
from trainbus.delivery import Delivery, Receipt
from trainbus.events import (
    AlertRaised,
    CheckpointSaved,
    EpochEnded,
    Event,
    Record,
    RunEnded,
    RunStarted,
    ended_by,
    event_name,
)
from trainbus.interfaces import RunInfo

if TYPE_CHECKING:
    from trainbus.bus import Bus

logger = logging.getLogger("trainbus")

MARKER = "trainbus.json"
"""File in a run's save directory that names the run, so that a resumed training finds it again."""

_MAX_NESTING = 3

_CHECKED = (RunStarted, EpochEnded, CheckpointSaved, AlertRaised)
"""Events with fields that a person may mistype: unchecked they would be written and never read."""


class Emitter:
    """What `attach` gives to an adapter, and what a plain loop emits through."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._pid = os.getpid()
        self._lock = threading.RLock()
        self._pending: deque[tuple[Event, int]] = deque()
        self._nesting = 0
        self._busy = False
        self._run: RunInfo | None = None
        self._delivery: Delivery | None = None
        self._seq = 0
        self._ended_once = False
        self._warned: set[str] = set()

    @property
    def services(self) -> frozenset[str]:
        """Import names of the trackers that this bus feeds."""
        return frozenset(r.service for r in self._bus.routes if r.service)

    def every(self, phase: str) -> int | None:
        """Return the smallest interval in steps at which a sink asks for step values."""
        asked = [r.transforms.every[phase] for r in self._bus.routes if phase in r.transforms.every]
        return min(asked, default=None)

    @property
    def run_id(self) -> str | None:
        """Id of the run that is open, None when none is."""
        return self._run.id if self._run else None

    def __call__(self, event: Event, /) -> None:
        """Hand an event to the bus: it becomes the next record of the run.

        Raises:
            SinkError: a sink with `on_error: raise` can't be opened.
        """
        if os.getpid() != self._pid:
            # A forked child shares the parent's files and must not write to them.
            self._warn("fork", "a forked process logs nothing: its parent has the run")
            return
        with self._lock:
            if self._nesting >= _MAX_NESTING:
                self._warn("nested", f"dropped {event_name(event)}: emitted by its own subscribers")
                return
            self._pending.append((event, self._nesting))
            if self._busy:
                return
            self._busy = True
            try:
                while self._pending:
                    following, nesting = self._pending.popleft()
                    self._nesting = nesting + 1
                    self._take(following)
            finally:
                self._busy = False
                self._nesting = 0

    def end(self, error: BaseException | None = None) -> None:
        """End the run that is open, if one is: as failed or stopped by `error`, else finished."""
        if self._run is not None:
            self(ended_by(error))

    def __deepcopy__(self, memo: dict[int, Any]) -> Emitter:
        """Frameworks copy their callbacks; the copy reports to the same run."""
        return self

    def __copy__(self) -> Emitter:
        return self

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """Unpickle, in another process, to an emitter of a bus made from the same configuration."""
        return reopen, (self._bus.rebuild,)

    def _take(self, event: Event) -> None:
        try:
            event_name(event)
            event, refused = normalize.event(event)
            if isinstance(event, _CHECKED):
                event = msgspec.convert(msgspec.to_builtins(event), type(event))
        except Exception as error:
            what = f"dropped a {type(event).__qualname__} that is no event of the schema: {error}"
            self._warn(what, what)
            if self._delivery is not None:
                self._delivery.dropped += 1
            return
        for name in refused:
            self._warn(f"metric {name}", f"left out metric {name!r}: expected a number")
        if isinstance(event, RunStarted):
            self.end_previous()
            self._start(event)
        elif self._run is None and self._ended_once:
            if not isinstance(event, RunEnded):
                self._warn("late", f"dropped {event_name(event)}: its run has ended")
        elif self._run is None:
            if not isinstance(event, RunEnded):
                self._start(RunStarted())
                self._record(event)
        else:
            self._record(event)

    def end_previous(self) -> None:
        """End a run that a new one of the same trainer takes the place of."""
        if self._run is not None:
            self._record(RunEnded(status="stopped", reason="another run started in its place"))

    def _start(self, event: RunStarted) -> None:
        event = self._bus.defaults.apply(event)
        run_id, attempt = _identify(event)
        run = RunInfo(id=run_id, started=event, attempt=attempt)
        try:
            self._delivery = Delivery(self._bus.routes, run)
        except BaseException:
            self._ended_once = True
            raise
        self._seq = 0
        self._run = run
        self._mark(run)
        self._record(event)

    def _record(self, event: Event) -> None:
        assert self._run is not None
        assert self._delivery is not None
        delivery = self._delivery
        self._seq += 1
        record = Record(
            seq=self._seq,
            run=self._run.id,
            time=time.time(),
            event=event,
            attempt=self._run.attempt,
        )
        # Ctrl-C may come in a subscriber or a sink: the sinks get every record, a run gets one end.
        try:
            self._bus.dispatch(record)
        finally:
            try:
                delivery.put(record)
            finally:
                if isinstance(event, RunEnded):
                    self._delivery = self._run = None
                    self._ended_once = True
                    self._bus.close_run(delivery)

    def _mark(self, run: RunInfo) -> None:
        if run.started.save_dir is None:
            return
        try:
            folder = Path(run.started.save_dir)
            folder.mkdir(parents=True, exist_ok=True)
            marker = json.dumps({"run": run.id, "attempt": run.attempt})
            (folder / MARKER).write_text(marker + "\n", encoding="utf-8")
        except (OSError, ValueError) as error:
            self._warn("marker", f"a resumed training will not find this run again: {error}")

    def _warn(self, what: str, text: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            logger.warning("%s", text)


class MutedEmitter:
    """Stands where an emitter was, in a process that has no configuration to make a bus from."""

    services: frozenset[str] = frozenset()

    def __call__(self, event: Event, /) -> None:
        """Do nothing."""

    def every(self, phase: str) -> int | None:
        """Ask for nothing."""
        return None


def reopen(rebuild: Callable[[], Bus] | None) -> Emitter | MutedEmitter:
    """Return an emitter for this process, of a bus made anew from the configuration."""
    if rebuild is None:
        logger.warning(
            "a callback of trainbus reached another process without its sinks: "
            "configure them in a file (`trainbus.load`) to have that process log too"
        )
        return MutedEmitter()
    try:
        return Emitter(rebuild())
    except Exception as error:  # a configuration fault must not end a training that runs elsewhere
        logger.warning("this process logs nothing: %s", error)
        return MutedEmitter()


def _identify(event: RunStarted) -> tuple[str, int]:
    """Return the run's id, and which of its attempts this is, counted from 1."""
    if event.resumed is not None:
        marked, attempt = _marked(event.save_dir)
        if marked is None:
            marked, attempt = _marked(event.resumed.save_dir)
        known = event.resumed.run or marked
        if known:
            return known, attempt + 1 if known == marked else 2
        logger.warning(
            "a resumed training begins a new run: found no %s in %s", MARKER, event.save_dir
        )
    stem = re.sub(r"[^A-Za-z0-9._-]+", "_", event.name or "run").strip("._-")[:64] or "run"
    # `random` is seeded by trainers, and two trainings can start within one second.
    return f"{stem}_{time.strftime('%Y%m%d_%H%M%S')}_{secrets.token_hex(3)}", 1


def _marked(save_dir: str | None) -> tuple[str | None, int]:
    """Return the run that a save directory belongs to, and the number of its attempts so far."""
    if save_dir is None:
        return None, 0
    try:
        found = json.loads((Path(save_dir) / MARKER).read_text(encoding="utf-8"))
        run, attempt = str(found["run"]), int(found["attempt"])
    except (OSError, ValueError, KeyError, TypeError):
        return None, 0
    return (run, attempt) if re.fullmatch(r"[A-Za-z0-9._-]{1,128}", run) else (None, 0)


def print_receipt(receipt: Receipt) -> None:
    """Print what each sink got, on stderr, where trainers print too."""
    print(receipt, file=sys.stderr, flush=True)
