"""Shows a run from its journal, also while it is being written: `trainbus show`.

Guarantees: no content of a journal can control the terminal.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from datetime import datetime
from typing import Any

import msgspec
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from trainbus.delivery.cursor import Cursor
from trainbus.events import (
    AlertRaised,
    CheckpointSaved,
    EpochEnded,
    MetricsLogged,
    ParamsUpdated,
    Record,
    RunEnded,
    RunStarted,
    event_name,
)
from trainbus.journal.directory import RunFolder
from trainbus.journal.locks import is_being_written
from trainbus.journal.reader import RunReader
from trainbus.text import printable

POLL_S = 0.5
_VALUE_WIDTH = 12
_LAST_ALERTS = 5
_PARAMS_LENGTH = 400
_PARAM_LENGTH = 60


class Summary:
    """A summary of the records of a run so far."""

    def __init__(self) -> None:
        self.started: RunStarted | None = None
        self.ended: RunEnded | None = None
        self.first: Record | None = None
        self.last: Record | None = None
        self.params: dict[str, Any] = {}
        self.epochs: dict[int, dict[str, float]] = {}
        self.took: dict[int, float | None] = {}
        self.final: dict[str, float] = {}
        self.steps: dict[str, float] = {}
        self.step: int | None = None
        self.checkpoints: dict[str, CheckpointSaved] = {}
        self.alerts: list[AlertRaised] = []
        self.counts: Counter[str] = Counter()
        self.streams: Counter[str] = Counter()

    def add(self, record: Record) -> None:
        """Add a record."""
        self.first = self.first or record
        self.last = record
        self.counts[event_name(record.event)] += 1
        if record.source:
            self.streams[record.source] += 1
        match record.event:
            case RunStarted() as event:
                self.started, self.ended = event, None
                self.params = dict(event.params)
            case ParamsUpdated(params=params):
                self.params |= params
            case MetricsLogged(final=True, values=values):
                self.final |= values
            case MetricsLogged(step=None, epoch=int(epoch), values=values):
                self.epochs.setdefault(epoch, {}).update(values)
            case MetricsLogged(step=step, values=values):
                self.steps |= values
                self.step = self.step if step is None else step
            case EpochEnded(epoch=epoch, duration_s=took):
                self.epochs.setdefault(epoch, {})
                self.took[epoch] = took
            case CheckpointSaved(kind=kind) as event:
                self.checkpoints[kind] = event
            case AlertRaised() as event:
                self.alerts = [*self.alerts, event][-_LAST_ALERTS:]
            case RunEnded() as event:
                self.ended = event


def show(folder: RunFolder, *, follow: bool = False, width: int | None = None) -> None:
    """Print a run; with `follow`, update until it has ended.

    Args:
        folder: the run's directory.
        follow: whether to wait for further records.
        width: number of columns; None for that of the terminal.
    """
    console = Console(width=width, markup=False, emoji=False, highlight=False)
    summary, reader = Summary(), RunReader(folder)
    _read(reader, summary)
    if follow and console.is_terminal:
        with Live(_page(folder, summary, console.width), console=console) as live:
            while _is_running(folder, summary):
                time.sleep(POLL_S)
                _read(reader, summary)
                live.update(_page(folder, summary, console.width))
    else:
        while follow and _is_running(folder, summary):
            time.sleep(POLL_S)
            _read(reader, summary)
        console.print(_page(folder, summary, console.width))
    reader.close()


def _read(reader: RunReader, summary: Summary) -> None:
    while entries := reader.read():
        for entry in entries:
            summary.add(entry.record)


def _is_running(folder: RunFolder, summary: Summary) -> bool:
    return summary.ended is None and is_being_written(folder.records(folder.attempts()[-1]))


def _page(folder: RunFolder, summary: Summary, width: int) -> Group:
    parts: list[Any] = [_about(folder, summary)]
    if summary.epochs:
        parts.append(_epochs(summary, width))
    if summary.final:
        parts.append(_values("final evaluation", summary.final))
    if summary.steps:
        parts.append(_values(f"last step values (step {summary.step})", summary.steps))
    parts.append(_sinks(folder))
    return Group(*parts)


def _about(folder: RunFolder, summary: Summary) -> Table:
    table = Table.grid(padding=(0, 2))
    started, ended, first, last = summary.started, summary.ended, summary.first, summary.last
    rows: list[tuple[str, str | None]] = [("run", last.run if last else folder.run)]
    alive = is_being_written(folder.records(folder.attempts()[-1]))
    state = ended.status if ended else "running" if alive else "not ended (its process is gone)"
    rows.append(("status", f"{state}: {ended.reason}" if ended and ended.reason else state))
    if started is not None:
        framework = " ".join(t for t in (started.framework, started.framework_version) if t)
        rows += [
            ("name", started.name),
            ("project", started.project),
            ("framework", framework),
            ("task", started.task),
            ("save directory", started.save_dir),
        ]
    if first is not None and last is not None:
        begun = datetime.fromtimestamp(first.time).isoformat(" ", "seconds")
        rows.append(("started", f"{begun}, {_duration(last.time - first.time)}"))
        rows.append(("attempts", str(last.attempt) if last.attempt > 1 else None))
    rows.append(("params", _params(summary.params)))
    if ended is not None and ended.best is not None:
        at = "" if ended.best.epoch is None else f" in epoch {ended.best.epoch + 1}"
        rows.append(("best", f"{ended.best.metric} {ended.best.value:.5g}{at}"))
    rows += [(f"{kind}", event.path) for kind, event in summary.checkpoints.items()]
    rows += [(f"! {a.level}", f"{a.title} {a.text}".strip()) for a in summary.alerts]
    counts = ", ".join(f"{n} {name}" for name, n in summary.counts.most_common())
    rows.append(("records", f"{summary.counts.total()}: {counts}"))
    rows.append(("streams", ", ".join(f"{n} {name}" for name, n in summary.streams.items())))
    for name, value in rows:
        if value:
            table.add_row(Text(name, style="bold"), Text(printable(value), overflow="fold"))
    return table


def _params(params: dict[str, Any]) -> str:
    """Return parameters in a few lines, the user's own first.

    Nested ones are mostly settings of the framework or the model, and those that are None were not
    set: both come last.
    """
    flat = list(_flat(params, ""))
    flat.sort(key=lambda item: (item[1] is None, item[0].count("/") > 0))  # a stable sort
    shown: list[str] = []
    length = 0
    for place, (name, value) in enumerate(flat):
        text = f"{name}={_short(value)}"
        length += len(text) + 2
        if shown and length > _PARAMS_LENGTH:
            return f"{', '.join(shown)} … and {len(flat) - place} more"
        shown.append(text)
    return ", ".join(shown)


def _flat(params: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in params.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", value


def _short(value: Any) -> str:
    """Return a value as one line, truncated at the end of a word or item."""
    text = " ".join(str(value).split())
    if len(text) <= _PARAM_LENGTH:
        return text
    cut = re.match(rf".{{1,{_PARAM_LENGTH}}}(?=[\s,;:/])", text)
    return f"{text[:_PARAM_LENGTH] if cut is None else cut[0]}…"


def _epochs(summary: Summary, width: int) -> Table:
    names = list(dict.fromkeys(name for values in summary.epochs.values() for name in values))
    fits = max((width - 20) // (_VALUE_WIDTH + 3), 1)
    # The first metrics are losses, the last ones come from the evaluation: show both.
    shown = names if len(names) <= fits else [*names[: fits // 2], *names[-(fits - fits // 2) :]]
    left_out = len(names) - len(shown)
    table = Table(title=f"epochs ({left_out} more metrics)" if left_out else "epochs")
    table.add_column("epoch", justify="right")
    table.add_column("time", justify="right")
    for name in shown:
        table.add_column(Text(printable(name)), justify="right", overflow="fold")
    for epoch, values in sorted(summary.epochs.items()):
        took = summary.took.get(epoch)
        cells = [f"{values[name]:.5g}" if name in values else "" for name in shown]
        table.add_row(str(epoch + 1), "" if took is None else _duration(took), *cells)
    return table


def _values(title: str, values: dict[str, float]) -> Table:
    table = Table("metric", "value", title=title)
    for name, value in values.items():
        table.add_row(Text(printable(name)), f"{value:.5g}")
    return table


def _sinks(folder: RunFolder) -> Table:
    columns = ("sink", "attempt", "seq", "delivered", "filtered", "rejected", "location")
    table = Table(*columns, title="sinks")
    for path in _cursors(folder):
        try:
            at = msgspec.json.decode(path.read_bytes(), type=Cursor)
        except (OSError, msgspec.DecodeError):
            continue
        numbers = (at.attempt, at.seq, at.taken, at.skipped, at.dead)
        name = path.stem.rpartition("-")[0]
        cells = [name, *map(str, numbers), at.location or ""]
        table.add_row(*(Text(printable(cell), overflow="fold") for cell in cells))
    return table


def _cursors(folder: RunFolder) -> Iterable[Any]:
    return sorted((folder.path / "cursors").glob("*.json"))


def _duration(seconds: float) -> str:
    minutes, rest = divmod(max(seconds, 0.0), 60)
    return f"{minutes:.0f}m{rest:02.0f}s" if minutes else f"{rest:.1f}s"
