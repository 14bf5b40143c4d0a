"""Calls a sink until it has accepted its records: retries, back-off and dead letters.

An error that may go away (network, timeout, 408, 425, 429, 5xx, full disk) is retried without
limit, after 1 s to 60 s or as `Retry-After` says. An error that won't (401, 403, missing package)
stops the queue. For any other error, a record is tried three times and then becomes a dead letter.
After five dead letters in a row, the queue waits before each further record and tries it once.
Once the run has ended, only network errors are retried.
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

Verdict: TypeAlias = Literal["retry", "later", "rejected", "stop"]

_TRIES = 3
_FIRST_SIZE, _MAX_SIZE, _CALL_S = 8, 512, 0.5
_DEAD_IN_A_ROW = 5
_FIRST_WAIT_S, _LONGEST_WAIT_S, _JITTER = 1.0, 60.0, 0.2
_FAILED = "failed, training continues"
_RETRIED_STATUS = frozenset({408, 425, 429})
_FATAL_STATUS = frozenset({401, 403})
_NETWORK = frozenset({errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN, errno.EHOSTDOWN})
_FATAL = (ImportError, MissingPackageError, PermissionError)
_NEVER_BETTER = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError)


class QueuedRecord(NamedTuple):
    """A record of the journal, and the record for the sink (None if it is filtered out)."""

    record: Record
    wanted: Record | None
    is_superseded: bool = False
    """Whether it is a checkpoint that is skipped because the trainer has overwritten it."""

    @property
    def is_filtered_out(self) -> bool:
        """Whether the transforms of the sink removed it."""
        return self.wanted is None and not self.is_superseded


class RetryQueue:
    """Passes records to one method of a sink, in order.

    Args:
        taken: called with records that the sink has accepted, or that were filtered out.
        dead: called with a record that the sink has rejected, and the error.
        report: called with a message for the log.
        clock: monotonic time in seconds.
        jitter: random number between two numbers.
        mark: called with True before and with False after each call of the sink.
    """

    def __init__(
        self,
        taken: Callable[[Sequence[QueuedRecord]], None],
        dead: Callable[[Record, str], None],
        report: Callable[[str], None],
        *,
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[float, float], float] | None = None,
        mark: Callable[[bool], None] = lambda is_called: None,
    ) -> None:
        self.todo: deque[QueuedRecord] = deque()
        self.stopped = False
        """Whether no further call can succeed."""
        self.error: str | None = None
        self.interrupt: KeyboardInterrupt | None = None
        self.busy_since: float | None = None
        self._taken = taken
        self._dead = dead
        self._report = report
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
        """Return the seconds until the next call."""
        return max(self._not_before - self._clock(), 0.0)

    def finish(self) -> None:
        """Make the next call at once, and from now on retry only network errors."""
        self._not_before = 0.0
        self._is_finishing = True

    def attempt(self, call: Callable[..., Any], *args: Any, failure_text: str = _FAILED) -> bool:
        """Return whether a call of the sink that takes no records, such as `open`, succeeded."""
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
        """Make one call with the next batch of records."""
        items = list(islice(self.todo, 1 if self._singly else self._size))
        wanted = [item.wanted for item in items if item.wanted is not None]
        begun = self._clock()
        error = self._call(write, wanted) if wanted else None
        took = self._clock() - begun
        # A slow sink gets small batches, so that little is uncertain when time runs out.
        self._size = min(self._size * 2, _MAX_SIZE) if took < _CALL_S else self._size // 2 or 1
        if error is None:
            self._remove(items)
            if wanted:
                self._dead_in_a_row, self._wait = 0, _FIRST_WAIT_S
            self._taken(items)
            return
        verdict = classify(error)
        if verdict in ("retry", "later"):
            self._back_off(error, verdict)
        elif verdict == "stop":
            self.stopped = True
        elif len(items) > 1:  # find out which record causes the error
            self._singly = len(items)
        elif self._dead_in_a_row >= _DEAD_IN_A_ROW:
            self._back_off(error, "later")
        else:
            self._reject(items[0])

    def _reject(self, item: QueuedRecord) -> None:
        self._tries += 1
        if self._tries < _TRIES:
            return
        self._remove([item])
        self._dead_in_a_row += 1
        self._dead(item.record, self.error or "")
        if self._dead_in_a_row == _DEAD_IN_A_ROW:
            self._report(
                f"rejected {_DEAD_IN_A_ROW} records in a row; the others wait in the journal"
            )
            self._not_before = self._clock() + self._next_wait()

    def _remove(self, items: Sequence[QueuedRecord]) -> None:
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
                self._report(f"{failure_text}: {line(error)}")
            self.error = line(error)
            return error
        finally:
            self._mark(False)
            self.busy_since = None
        return None


def classify(error: BaseException) -> Verdict:
    """Return what to do with the records after an error of a sink: its verdict.

    `retry`: try again without limit; `later`: try again until the run ends; `rejected`: the sink
    does not accept these records; `stop`: no call can succeed.
    """
    for each in _causes(error):
        if isinstance(each, SinkError) and each.retry:
            return "retry"
        status = _status(each)
        if status in _FATAL_STATUS:
            return "stop"
        if status is not None:
            return "retry" if status in _RETRIED_STATUS or status >= 500 else "rejected"
        if isinstance(each, KeyboardInterrupt | TimeoutError | ConnectionError):
            return "retry"
        if isinstance(each, _FATAL):
            return "stop"
        if isinstance(each, OSError) and not isinstance(each, _NEVER_BETTER):
            is_of_network = type(each).__module__ != "builtins" or each.errno in _NETWORK
            return "retry" if is_of_network else "later"
    return "rejected"


def line(error: BaseException) -> str:
    """Return an error as one line, with secrets redacted."""
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
    """Return the HTTP status of an error of requests, httpx, urllib and others, None if unknown."""
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
