"""Calls a sink until it has taken its records: retries, dead letters, and an end to hammering.

Rules: what may go well later (network, time-outs, 408, 425, 429, 5xx, a full disk) is tried again
for ever, 1 s to 60 s apart or as `Retry-After` says; what never will (401, 403, a missing package)
stops the lane; of anything else each record is tried three times and then is a dead letter. After
five dead letters in a row the lane waits before it tries a further record, once each time. Once the
run has ended only the network is waited for.
"""

from __future__ import annotations

import errno
import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any, Literal, NamedTuple, TypeAlias

from trainbus.errors import MissingPackageError, SinkError, TrainbusError
from trainbus.events import Record
from trainbus.redaction import text as redacted

Verdict: TypeAlias = Literal["retry", "later", "refused", "stop"]

_TRIES = 3
_FIRST_SIZE, _MAX_SIZE, _CALL_S = 8, 512, 0.5
_DEAD_IN_A_ROW = 5
_FIRST_WAIT_S, _LONGEST_WAIT_S, _JITTER = 1.0, 60.0, 0.2
_FAILED = "failed, training goes on"
_RETRIED_STATUS = frozenset({408, 425, 429})
_FATAL_STATUS = frozenset({401, 403})
_NETWORK = frozenset({errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN, errno.EHOSTDOWN})
_FATAL = (ImportError, MissingPackageError, PermissionError)
_NEVER_BETTER = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError)


class QueuedRecord(NamedTuple):
    """A record as it stands in the journal, and as the sink shall see it (None: not at all)."""

    record: Record
    wanted: Record | None
    is_superseded: bool = False
    """Whether it is a checkpoint that the sink need not see, as the trainer has overwritten it."""

    @property
    def is_filtered_out(self) -> bool:
        """Whether the sink was not to have it."""
        return self.wanted is None and not self.is_superseded


class RetryQueue:
    """Records on their way into one method of a sink, in order."""

    def __init__(
        self,
        taken: Callable[[Sequence[QueuedRecord]], None],
        dead: Callable[[Record, str], None],
        say: Callable[[str], None],
        *,
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[float, float], float] | None = None,
        mark: Callable[[bool], None] = lambda is_called: None,
    ) -> None:
        self.todo: deque[QueuedRecord] = deque()
        self.stopped = False
        """Whether no further call can go well."""
        self.error: str | None = None
        self.interrupt: KeyboardInterrupt | None = None
        self.busy_since: float | None = None
        self._taken = taken
        self._dead = dead
        self._say = say
        self._clock = clock
        self._mark = mark
        # Trainers seed the shared generator, and what they draw from it must stay the same.
        self._jitter = jitter or random.Random().uniform
        self._not_before = 0.0
        self._wait = _FIRST_WAIT_S
        self._tries = 0
        self._is_finishing = False
        self._singly = 0
        self._size = _FIRST_SIZE
        self._dead_in_a_row = 0

    def wait(self) -> float:
        """Return the seconds until the next call may be made."""
        return max(self._not_before - self._clock(), 0.0)

    def finish(self) -> None:
        """Let the next call be made at once, and wait for nothing but the network from here on."""
        self._not_before = 0.0
        self._is_finishing = True

    def attempt(self, call: Callable[..., Any], *args: Any, failure_text: str = _FAILED) -> bool:
        """Return whether a call of the sink that is not about single records went well."""
        error = self._call(call, *args, failure_text=failure_text)
        if error is None:
            self._wait = _FIRST_WAIT_S
            return True
        verdict = classify(error)
        if verdict in ("retry", "later"):
            self._back_off(error, verdict)
        else:
            self.stopped = True
        return False

    def push(self, write: Callable[[list[Record]], None]) -> None:
        """Make one call with what is first in the lane."""
        items = list(islice(self.todo, 1 if self._singly else self._size))
        wanted = [item.wanted for item in items if item.wanted is not None]
        begun = self._clock()
        error = self._call(write, wanted) if wanted else None
        took = self._clock() - begun
        # A slow sink gets little at a time, so that what it took is known when time runs out.
        self._size = min(self._size * 2, _MAX_SIZE) if took < _CALL_S else self._size // 2 or 1
        if error is None:
            self._leave(items)
            if wanted:
                self._dead_in_a_row, self._wait = 0, _FIRST_WAIT_S
            self._taken(items)
            return
        verdict = classify(error)
        if verdict in ("retry", "later"):
            self._back_off(error, verdict)
        elif verdict == "stop":
            self.stopped = True
        elif len(items) > 1:  # one of them may be the reason
            self._singly = len(items)
        elif self._dead_in_a_row >= _DEAD_IN_A_ROW:
            self._back_off(error, "later")
        else:
            self._refuse(items[0])

    def _refuse(self, item: QueuedRecord) -> None:
        self._tries += 1
        if self._tries < _TRIES:
            return
        self._leave([item])
        self._dead_in_a_row += 1
        self._dead(item.record, self.error or "")
        if self._dead_in_a_row == _DEAD_IN_A_ROW:
            self._say(f"refused {_DEAD_IN_A_ROW} records in a row; the others wait in the journal")
            self._not_before = self._clock() + self._next_wait()

    def _leave(self, items: Sequence[QueuedRecord]) -> None:
        for _ in items:
            self.todo.popleft()
        self._tries = 0
        self._singly = max(self._singly - len(items), 0)

    def _back_off(self, error: BaseException, verdict: Verdict) -> None:
        if verdict == "later" and self._is_finishing:
            self.stopped = True
        if isinstance(error, KeyboardInterrupt):
            return
        asked = _retry_after(error)
        wait = self._next_wait()
        self._not_before = self._clock() + (wait if asked is None else asked)

    def _next_wait(self) -> float:
        wait, self._wait = self._wait, min(self._wait * 2, _LONGEST_WAIT_S)
        return wait * self._jitter(1 - _JITTER, 1 + _JITTER)

    def _call(
        self, call: Callable[..., Any], *args: Any, failure_text: str = _FAILED
    ) -> BaseException | None:
        self.busy_since = self._clock()
        self._mark(True)
        try:
            call(*args)
        except KeyboardInterrupt as interrupt:
            self.interrupt = interrupt
            self.error = "interrupted by Ctrl-C"
            return interrupt
        except BaseException as error:
            if self.error is None:
                self._say(f"{failure_text}: {line(error)}")
            self.error = line(error)
            return error
        finally:
            self._mark(False)
            self.busy_since = None
        return None


def classify(error: BaseException) -> Verdict:
    """Return what an error of a sink means for the records it was given."""
    for each in _causes(error):
        if isinstance(each, SinkError) and each.retry:
            return "retry"
        status = _status(each)
        if status in _FATAL_STATUS:
            return "stop"
        if status is not None:
            return "retry" if status in _RETRIED_STATUS or status >= 500 else "refused"
        if isinstance(each, KeyboardInterrupt | TimeoutError | ConnectionError):
            return "retry"
        if isinstance(each, _FATAL):
            return "stop"
        if isinstance(each, OSError) and not isinstance(each, _NEVER_BETTER):
            is_of_network = type(each).__module__ != "builtins" or each.errno in _NETWORK
            return "retry" if is_of_network else "later"
    return "refused"


def line(error: BaseException) -> str:
    """Return an error as one line, without what looks like a secret."""
    text = redacted(" ".join(str(error).split())) or "no message"
    return text if isinstance(error, TrainbusError) else f"{type(error).__name__}: {text}"


def _causes(error: BaseException) -> list[BaseException]:
    found: list[BaseException] = []
    following: BaseException | None = error
    while following is not None and following not in found:
        found.append(following)
        following = following.__cause__
    return found


def _status(error: BaseException) -> int | None:
    """Return the status of an HTTP answer, as requests, httpx, urllib and others carry it."""
    for holder in (getattr(error, "response", None), error):
        for name in ("status_code", "status", "code"):
            found = getattr(holder, name, None)
            if isinstance(found, int) and 400 <= found <= 599:
                return found
    return None


def _retry_after(error: BaseException) -> float | None:
    for each in _causes(error):
        headers = getattr(getattr(each, "response", each), "headers", None)
        try:
            asked = float(headers["Retry-After"]) if headers else None
        except (KeyError, TypeError, ValueError):
            continue
        if asked is not None and asked >= 0:
            return min(asked, 3600.0)
    return None
