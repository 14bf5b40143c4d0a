"""A queue retries what may succeed later, gives up on what won't, and backs off."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from trainbus.delivery.retry import QueuedRecord, RetryQueue, classify, line
from trainbus.errors import SinkError
from trainbus.events import EpochStarted, Record


class HttpError(Exception):
    """What a client library raises for an answer with an error status."""

    def __init__(self, status: int, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(f"HTTP {status}")
        self.response = Answer(status, headers or {})


class Answer:
    """The part of an HTTP response that is used."""

    def __init__(self, status: int, headers: Mapping[str, str]) -> None:
        self.status_code = status
        self.headers = headers


class Rig:
    """A queue, its clock, and a sink that does what `fails` says of the seqs it is given."""

    def __init__(self, count: int = 0, *, jitter: Any = lambda low, high: 1.0) -> None:
        self.now = 100.0
        self.fails: Callable[[list[int]], BaseException | None] = lambda seqs: None
        self.calls: list[list[int]] = []
        self.taken: list[int] = []
        self.dead: list[int] = []
        self.reasons: list[str] = []
        self.reported: list[str] = []
        self.queue = RetryQueue(
            self._taken, self._dead_letter, self.reported.append, clock=self.clock, jitter=jitter
        )
        for seq in range(1, count + 1):
            self.queue.todo.append(item(seq))

    def clock(self) -> float:
        """Return the seconds that this test says."""
        return self.now

    def write(self, records: list[Record]) -> None:
        """Take records, or fail."""
        self.calls.append([record.seq for record in records])
        error = self.fails(self.calls[-1])
        if error is not None:
            raise error

    def push(self) -> float:
        """Make one call at once; return the seconds until the next."""
        self.queue.push(self.write)
        return self.queue.wait()

    def drain(self, calls: int = 1000) -> None:
        """Make calls, each when it may be made, until nothing is left."""
        for _ in range(calls):
            if not self.queue.todo or self.queue.stopped:
                return
            self.now += self.queue.wait()
            self.queue.push(self.write)

    def _taken(self, items: Any) -> None:
        self.taken += [each.record.seq for each in items]

    def _dead_letter(self, record: Record, reason: str) -> None:
        self.dead.append(record.seq)
        self.reasons.append(reason)


def item(seq: int, *, wanted: bool = True) -> QueuedRecord:
    """Return a record on its way."""
    record = Record(seq=seq, run="run", time=float(seq), event=EpochStarted(epoch=seq))
    return QueuedRecord(record, record if wanted else None)


TRANSIENT = [
    ConnectionError("no network"),
    ConnectionResetError("gone"),
    TimeoutError("too late"),
    HttpError(500),
    HttpError(503),
    HttpError(429),
    HttpError(408),
    SinkError("not now", retry=True),
]
FINAL = [HttpError(401), HttpError(403), ImportError("no module"), ModuleNotFoundError("none")]
REFUSALS = [HttpError(400), HttpError(422), TypeError("no"), ValueError("no"), KeyError("x")]


@pytest.mark.parametrize("error", TRANSIENT, ids=repr)
def test_what_may_go_well_later_is_tried_ever_more_rarely(error: Exception) -> None:
    """A network that is down is asked after 1, 2, 4 … and never more than 60 seconds."""
    rig = Rig(3)
    rig.fails = lambda seqs: error
    waits = []
    for _ in range(9):
        waits.append(rig.push())
        rig.now += waits[-1]
    assert [1, 2, 4, 8, 16, 32, 60, 60, 60] == waits
    assert ([], [], False) == (rig.taken, rig.dead, rig.queue.stopped)
    assert 1 == len(rig.reported)


def test_a_success_starts_the_waits_anew() -> None:
    """After a call that went well the next failure is waited for one second again."""
    rig = Rig(2)
    rig.fails = lambda seqs: ConnectionError() if len(rig.calls) in (1, 2, 3, 5) else None
    assert [1, 2, 4] == [rig.push() for _ in range(3)]
    rig.push()
    rig.queue.todo.append(item(3))
    assert 1 == rig.push()
    rig.drain()
    assert [1, 2, 3] == rig.taken


@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_is_honoured(status: int) -> None:
    """A server that says when to come back is asked then, within an hour."""
    rig = Rig(1)
    asked = iter(["17", "0", "86400", "soon", "-5", "nan"])
    rig.fails = lambda seqs: HttpError(status, {"Retry-After": next(asked)})
    assert [17, 0, 3600] == [rig.push() for _ in range(3)]
    assert [8, 16, 32] == [rig.push() for _ in range(3)]


def test_the_jitter_stays_within_a_fifth() -> None:
    """Waits differ from one another, and from what they should be by 20 % at most."""
    waits = []
    for _ in range(1000):
        rig = Rig(1, jitter=None)
        rig.fails = lambda seqs: ConnectionError()
        waits.append(rig.push())
    assert 0.8 <= min(waits) < 0.85
    assert 1.15 < max(waits) <= 1.2


def test_the_shared_random_state_is_untouched() -> None:
    """What a trainer draws after seeding is the same with and without a queue that waits."""
    random.seed(7)
    before = random.getstate()
    rig = Rig(8, jitter=None)
    rig.fails = lambda seqs: ConnectionError() if len(rig.calls) < 20 else None
    rig.drain()
    assert before == random.getstate()


@pytest.mark.parametrize("error", FINAL, ids=repr)
def test_what_never_will_go_well_stops_at_once(error: Exception) -> None:
    """Without a right or a package there is one call, and the records wait."""
    rig = Rig(3)
    rig.fails = lambda seqs: error
    rig.push()
    assert rig.queue.stopped
    assert (1, [], [], 3) == (len(rig.calls), rig.taken, rig.dead, len(rig.queue.todo))


@pytest.mark.parametrize("error", REFUSALS, ids=repr)
def test_one_bad_record_costs_itself_alone(error: Exception) -> None:
    """A rejected batch is split; the bad record is tried three times, the others arrive."""
    rig = Rig(8)
    rig.fails = lambda seqs: error if 5 in seqs else None
    rig.drain()
    assert [1, 2, 3, 4, 6, 7, 8] == rig.taken
    assert [5] == rig.dead
    assert list(range(1, 9)) == rig.calls[0]
    assert [[1], [2]] == rig.calls[1:3]
    assert 3 == rig.calls.count([5])
    assert [line(error)] == rig.reasons
    assert not rig.queue.stopped


def test_a_network_that_fails_between_the_tries_counts_for_none() -> None:
    """Three tries are three refusals of the record itself."""
    rig = Rig(1)
    errors = [TypeError(), ConnectionError(), TypeError(), TimeoutError(), TypeError()]
    rig.fails = lambda seqs: errors[len(rig.calls) - 1]
    rig.drain()
    assert (5, [1]) == (len(rig.calls), rig.dead)


def test_five_dead_in_a_row_open_the_circuit() -> None:
    """A sink that rejects everything gets one record at a time, at increasing intervals."""
    rig = Rig(8)
    rig.fails = lambda seqs: ValueError("no")
    while not rig.queue.wait():
        rig.push()
    assert [1, 2, 3, 4, 5] == rig.dead
    waits = [rig.queue.wait()]
    for _ in range(7):
        rig.now += waits[-1]
        waits.append(rig.push())
        assert [6] == rig.calls[-1]
    assert [1, 2, 4, 8, 16, 32, 60, 60] == waits
    assert [1, 2, 3, 4, 5] == rig.dead
    assert any("5 records in a row" in text for text in rig.reported)
    rig.fails = lambda seqs: None
    rig.drain()
    assert [6, 7, 8] == rig.taken


def test_a_success_closes_the_circuit() -> None:
    """After a probe that went well, a record is again dead only after three tries."""
    rig = Rig(9)
    rig.fails = lambda seqs: None if seqs == [6] else ValueError("no")
    rig.drain()
    assert [6] == rig.taken
    assert [1, 2, 3, 4, 5, 7, 8, 9] == rig.dead
    assert 3 == rig.calls.count([9])


def test_a_success_between_refusals_keeps_the_circuit_closed() -> None:
    """If every second record is rejected, the queue does not wait."""
    rig = Rig(40)
    rig.fails = lambda seqs: ValueError("no") if any(seq % 2 for seq in seqs) else None
    rig.drain()
    assert list(range(2, 41, 2)) == rig.taken
    assert list(range(1, 41, 2)) == rig.dead
    assert 100.0 == rig.now


@pytest.mark.parametrize("error", [OSError(28, "full"), OSError(5, "broken")], ids=repr)
def test_the_end_gives_up_on_what_is_local(error: OSError) -> None:
    """A full disk is waited for during a training, and no longer once it has ended."""
    rig = Rig(2)
    rig.fails = lambda seqs: error
    assert 1 == rig.push()
    assert not rig.queue.stopped
    rig.queue.finish()
    assert 0 == rig.queue.wait()
    rig.push()
    assert rig.queue.stopped
    assert ([], 2) == (rig.dead, len(rig.queue.todo))


def test_the_end_gives_up_on_an_open_circuit() -> None:
    """Once the run has ended, the queue does not wait for a sink that rejects every record."""
    rig = Rig(8)
    rig.fails = lambda seqs: ValueError("no")
    rig.queue.finish()
    rig.drain()
    assert rig.queue.stopped
    assert [1, 2, 3, 4, 5] == rig.dead


@pytest.mark.parametrize("error", TRANSIENT, ids=repr)
def test_the_end_waits_for_the_network(error: Exception) -> None:
    """Also after the end a network that is down is tried again, at once for the first time."""
    rig = Rig(2)
    rig.fails = lambda seqs: error if len(rig.calls) < 5 else None
    rig.push()
    rig.queue.finish()
    assert 0 == rig.queue.wait()
    assert 2 == rig.push()
    rig.drain()
    assert [1, 2] == rig.taken


def test_filtered_records_make_no_call() -> None:
    """What the transforms left out is accounted for without asking the sink."""
    rig = Rig()
    rig.fails = lambda seqs: ConnectionError()
    for seq in (1, 2):
        rig.queue.todo.append(item(seq, wanted=False))
    rig.drain()
    assert ([], [1, 2]) == (rig.calls, rig.taken)


def test_the_cause_of_an_error_is_judged() -> None:
    """A library's own error is judged by what it was raised from."""
    error = ValueError("wrapped")
    error.__cause__ = HttpError(503)
    assert "retry" == classify(error)


def test_an_attempt_backs_off_or_stops() -> None:
    """Opening a sink is tried again where the network is down, and not where a package lacks."""
    rig = Rig()
    errors: list[BaseException] = [ConnectionError(), TimeoutError(), ImportError("none")]

    def open_it() -> None:
        raise errors.pop(0)

    waits = []
    for _ in range(2):
        assert not rig.queue.attempt(open_it, failure_text="can't be opened")
        waits.append(rig.queue.wait())
    assert ([1, 2], False) == (waits, rig.queue.stopped)
    assert not rig.queue.attempt(open_it)
    assert rig.queue.stopped
    assert ["can't be opened: ConnectionError: no message"] == rig.reported


def test_ctrl_c_is_kept_and_loses_nothing() -> None:
    """Ctrl-C in a sink is kept for the training, and the records come again at once."""
    rig = Rig(2)
    rig.fails = lambda seqs: KeyboardInterrupt() if len(rig.calls) == 1 else None
    assert 0 == rig.push()
    assert isinstance(rig.queue.interrupt, KeyboardInterrupt)
    rig.drain()
    assert [1, 2] == rig.taken


def test_error_texts_carry_no_secret() -> None:
    """What looks like a token is neither logged, nor in the receipt, nor in a dead letter."""
    secret = "eyJhbGciOiJIUzI1NiJ9.c2VjcmV0LXBheWxvYWQ.c2lnbmF0dXJlLTEyMw"
    rig = Rig(1)
    rig.fails = lambda seqs: ValueError(f"401 with header\n Authorization: Bearer {secret}")
    rig.drain()
    assert [1] == rig.dead
    for text in [*rig.reported, *rig.reasons, rig.queue.error or ""]:
        assert secret not in text
        assert "ValueError: 401 with header" in text
        assert "\n" not in text
