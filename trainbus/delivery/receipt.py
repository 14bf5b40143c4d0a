"""What became of a run's records: for a person at the end of a training, and as a file."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from contextlib import suppress

import msgspec

from trainbus.journal.directory import RunFolder, write_atomically
from trainbus.text import printable


class SinkReport(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one run's records in one sink.

    taken + skipped + dead + pending + unsaved = emitted.
    """

    name: str
    kind: str
    taken: int = 0
    skipped: int = 0
    """What the sink's transforms filtered out."""
    dead: int = 0
    """What the sink refused three times; kept in `dead/`."""
    pending: int = 0
    """What waits in the journal."""
    unsaved: int = 0
    """What it has not got and no replay can send, as the disk had no room for it."""
    lost: int = 0
    """Of what was taken: records that the tracker has no way to show, such as a broken picture."""
    superseded: int = 0
    """Of what was taken: checkpoints that the trainer had overwritten before they were sent."""
    location: str | None = None
    error: str | None = None


class Receipt(msgspec.Struct, frozen=True, kw_only=True):
    """What each sink got of one attempt of a run."""

    run: str
    status: str
    emitted: int
    """Records of all streams of the attempt."""
    sinks: list[SinkReport]
    attempt: int = 1
    dropped: int = 0
    """What was emitted and could not be kept: no event of the schema, or no room for it."""
    unsaved: int = 0
    """Of what was emitted: records that are not on disk, which had no room for them or is gone, and
    that no replay can send."""
    unrecorded: int = 0
    """Values that were logged and are nothing that can be recorded."""
    journal: str | None = None
    """The run's directory; None where there is none, or it was deleted meanwhile."""
    config: str | None = None

    @property
    def lost(self) -> int:
        """The records that are neither on disk nor in any sink."""
        return min((sink.unsaved for sink in self.sinks), default=self.unsaved)

    @property
    def pending(self) -> int:
        """The records that at least one sink has not got and may still get."""
        return max((sink.pending for sink in self.sinks), default=0)

    def __str__(self) -> str:
        """Return the receipt as the lines that a person reads at the end of a training."""
        attempt = f", attempt {self.attempt}" if self.attempt > 1 else ""
        lines = [f"trainbus: run {self.run} {self.status}{attempt}, {self.emitted} records"]
        if self.dropped:
            lines[0] += f", {self.dropped} DROPPED"
        if self.unsaved:
            lines[0] += f", {self.unsaved} NOT ON DISK"
        if self.lost:
            lines[0] += f", {self.lost} LOST"
        if self.unrecorded:
            values = "value" if self.unrecorded == 1 else "values"
            lines[0] += f", {self.unrecorded} {values} not recorded"
        width = max([*(len(s.name) for s in self.sinks), len("journal")])
        for sink in self.sinks:
            lines.append(f"  {sink.name:<{width}}  {sink.kind}: {_counts(sink)}")
            lines += [f"  {'':<{width}}  {text}" for text in (sink.error, sink.location) if text]
        if self.journal:
            lines.append(f"  {'journal':<{width}}  {self.journal}")
        if self.pending and self.journal:
            config = shlex.quote(self.config or "trainbus.yaml")
            command = f"trainbus replay {shlex.quote(self.journal)} -c {config}"
            lines.append(f"  {'':<{width}}  to send the rest: {command}")
        return "\n".join(printable(line) for line in lines)


def write_receipt(
    folder: RunFolder,
    *,
    status: str,
    attempt: int,
    emitted: int,
    reports: Sequence[SinkReport],
    unsaved: int = 0,
    dropped: int = 0,
    unrecorded: int = 0,
    is_gone: bool = False,
    config: str | None = None,
) -> Receipt:
    """Make the receipt of an attempt and write it beside the journal, if the disk has room.

    Args:
        folder: the run's directory.
        status: status of the run, `open` if it has not ended.
        attempt: the attempt that the receipt is about.
        emitted: how many records it has, in all its streams.
        reports: what each sink received; what it has not received is counted here.
        unsaved: how many records the disk had no room for. They are the last ones of the run, and
            sinks receive records in order.
        dropped: events that could not be recorded.
        unrecorded: values that could not be recorded.
        is_gone: whether the directory was deleted meanwhile.
        config: file that the sinks were configured in.
    """
    receipt = Receipt(
        run=folder.run,
        status=status,
        attempt=attempt,
        emitted=emitted,
        sinks=[_with_rest(report, emitted, unsaved) for report in reports],
        dropped=dropped,
        unsaved=unsaved,
        unrecorded=unrecorded,
        journal=None if is_gone else str(folder.path),
        config=config,
    )
    with suppress(OSError):
        write_atomically(folder.receipt, msgspec.json.format(msgspec.json.encode(receipt)) + b"\n")
    return receipt


def _with_rest(report: SinkReport, emitted: int, unsaved: int) -> SinkReport:
    """Return a report that counts apart what is on no disk and what waits in the journal."""
    rest = max(emitted - report.taken - report.skipped - report.dead, 0)
    lost = min(rest, unsaved)
    return msgspec.structs.replace(report, pending=rest - lost, unsaved=lost)


def _counts(sink: SinkReport) -> str:
    counts = f"{sink.taken} delivered"
    if sink.lost:
        counts += f" ({sink.lost} not supported by this tracker)"
    if sink.skipped:
        counts += f", {sink.skipped} filtered out"
    if sink.pending:
        counts += f", {sink.pending} PENDING"
    if sink.unsaved:
        counts += f", {sink.unsaved} LOST"
    if sink.dead:
        counts += f", {sink.dead} rejected"
    return counts
