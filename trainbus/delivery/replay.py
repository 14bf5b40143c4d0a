"""Sends a run that is on disk to sinks: `trainbus replay`.

The journal may come from anywhere: only the operator's configuration decides where records go, and
files outside of the run's directory are sent only from folders that the operator names.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import msgspec

from trainbus.delivery.receipt import Receipt, SinkReport, write_receipt
from trainbus.delivery.sidecar import Sidecar, SidecarRun
from trainbus.delivery.sidecar_protocol import ReplayTask
from trainbus.delivery.spec import SinkSpec, isolation_of
from trainbus.delivery.worker import POLL_S, SinkWorker, count, drive
from trainbus.errors import JournalError
from trainbus.events import RunEnded
from trainbus.journal.counts import count_streams
from trainbus.journal.directory import RunFolder
from trainbus.journal.file_access import FileResolver
from trainbus.journal.locks import is_being_written
from trainbus.journal.recovery import last_record, recover

_HALT_S = 2.0


class Progress(msgspec.Struct, frozen=True):
    """How far a replay is: records that one sink has, of all there are."""

    sink: str
    done: int
    total: int


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What a replay would send to one sink."""

    sink: str
    kind: str
    missing: int


def replay(
    folder: RunFolder,
    specs: Sequence[SinkSpec],
    *,
    after: tuple[int, int] | None = None,
    trusted: Sequence[str] = (),
    flush_secs: float = 60.0,
    config: str | None = None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> tuple[Receipt, FileResolver]:
    """Send to each sink the records that it has not received, and return the receipt.

    Args:
        folder: the run's directory.
        specs: the sinks.
        after: send what comes after this (attempt, seq) of the main stream and all records of the
            other streams, whatever was sent before.
        trusted: folders outside of the run's directory whose files may be sent.
        flush_secs: how long to wait for a network that is down, counted from the last progress.
        config: file that the sinks are configured in.
        on_progress: called with the progress of each sink.

    Returns:
        The receipt of the last attempt, and the files that records named.

    Raises:
        JournalError: a training is writing this journal, or it can't be read.
    """
    attempts = folder.attempts()
    if is_being_written(folder.records(attempts[-1])):
        raise JournalError(
            f"the training that writes {folder.path} is still running; its own sinks are fed "
            "by it, and a replay has to wait for its end"
        )
    try:
        recover(folder, now=time.time())
    except OSError as error:
        raise JournalError(f"{folder.path} can't be written: {error.strerror}") from error
    last = last_record(folder, attempts[-1])
    if last is None:
        raise JournalError(f"found no whole record in {folder.path}")
    files = FileResolver(folder, trusted)
    expected = last.seq + count_streams(folder, attempts[-1])
    task = _Task(folder, attempts[-1], after, files, trusted, flush_secs, on_progress, expected)
    sidecar = Sidecar()
    try:
        found = [task.send(spec, sidecar) for spec in specs]
    finally:
        sidecar.close()
    total = max((n for _, n in found if n is not None), default=None)
    if total is None:
        total = count(folder, attempts[-1])
    receipt = write_receipt(
        folder,
        status=last.event.status if isinstance(last.event, RunEnded) else "open",
        attempt=attempts[-1],
        emitted=total,
        reports=[report for report, _ in found],
        config=config,
    )
    return receipt, files


def plan(
    folder: RunFolder, specs: Sequence[SinkSpec], *, after: tuple[int, int] | None = None
) -> list[Plan]:
    """Return what a replay would send, without sending or writing anything."""
    found = []
    for spec in specs:
        worker = SinkWorker(
            spec,
            folder,
            FileResolver(folder, []),
            attempt=folder.attempts()[-1],
            after=after,
            is_replay=True,
        )
        found.append(Plan(sink=spec.name, kind=spec.kind, missing=worker.missing()))
    return found


class _Task(NamedTuple):
    """What a replay sends, and who hears of its progress."""

    folder: RunFolder
    attempt: int
    after: tuple[int, int] | None
    files: FileResolver
    trusted: Sequence[str]
    flush_secs: float
    on_progress: Callable[[Progress], None]
    expected: int

    def send(self, spec: SinkSpec, sidecar: Sidecar) -> tuple[SinkReport, int | None]:
        """Send to one sink; return what it got, and of how many records if that is known.

        A sink may end the process that it runs in, so that another one has it where that can be.
        """
        if isolation_of(spec, "auto") == "process":
            replay = ReplayTask(after=self.after, trusted=[str(path) for path in self.trusted])
            run = sidecar.open(self.folder, self.attempt, [spec], self.flush_secs, replay=replay)
            if not run.refused:
                return self._watch(run, spec)
        return self._drain(spec)

    def _watch(self, run: SidecarRun, spec: SinkSpec) -> tuple[SinkReport, int | None]:
        patience, known = time.monotonic() + self.flush_secs, 0
        while not run.is_finished() and time.monotonic() < patience:
            count = run.progress.get(spec.name, 0)
            if count != known or run.is_calling():
                known, patience = count, time.monotonic() + self.flush_secs
            self.on_progress(Progress(spec.name, count, self.expected))
            time.sleep(POLL_S / 5)
        run.stop(_HALT_S)
        self.files.damaged += run.damaged
        self.files.refused += run.refused_files
        self.files.add_changed(run.changed_files)
        emitted = run.emitted
        (report,) = run.reports(self.expected if emitted is None else emitted)
        self.on_progress(
            Progress(spec.name, report.taken + report.skipped + report.dead, self.expected)
        )
        return report, emitted

    def _drain(self, spec: SinkSpec) -> tuple[SinkReport, int | None]:
        """Step until everything is sent, or nothing more can be."""
        worker = SinkWorker(
            spec,
            self.folder,
            self.files,
            attempt=self.attempt,
            after=self.after,
            is_replay=True,
        )
        patience, known = time.monotonic() + self.flush_secs, 0

        def is_over() -> bool:
            nonlocal patience, known
            if worker.count != known:
                known, patience = worker.count, time.monotonic() + self.flush_secs
            self.on_progress(Progress(spec.name, known, self.expected))
            return time.monotonic() >= patience

        worker.finish(stream_wait_s=self.flush_secs / 2)
        drive(worker, is_over=is_over)
        worker.close()
        self.on_progress(Progress(spec.name, worker.count, self.expected))
        total = worker.total()
        return worker.report(total), total
