"""Shows a training on the terminal: a line per epoch, alerts at once, a summary at the end.

Guarantees: the output depends on the records alone; the terminal is left as it was found, as the
live line hides no cursor and captures no output; no control character of a name is printed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

from msgspec import Meta

from trainbus import events
from trainbus.interfaces import Options, RunInfo, Sink
from trainbus.toolkit.sinks import SeenRecords, required_package

if TYPE_CHECKING:
    from rich.console import Console

Values: TypeAlias = Mapping[str, Mapping[str, float]]  # phase → name → value

_STYLES = {"warning": "yellow", "error": "red", "stopped": "yellow", "failed": "red"}

_STEP_LINE_S = 10.0
"""Seconds between two lines of a training without epochs."""


class ConsoleOptions(Options, frozen=True, kw_only=True):
    """Options of the `console` sink."""

    stream: Annotated[Literal["stderr", "stdout"], Meta(description="Stream to print to")] = (
        "stderr"
    )


class ConsoleSink(Sink):
    """Prints a line per epoch and a summary at the end."""

    Options = ConsoleOptions
    reads_files = False
    options: ConsoleOptions

    _console: Console
    _is_live = False

    def open(self, run: RunInfo) -> None:
        """Detect what the stream can show.

        Raises:
            MissingPackageError: rich is not installed.
        """
        with required_package("rich", extra="console"):
            from rich.console import Console
        self._console = Console(
            stderr=self.options.stream == "stderr", markup=False, emoji=False, highlight=False
        )
        self._seen = SeenRecords()
        self._begun, self._epochs = 0.0, 0
        self._has_epochs = False
        self._goal_of = run.started.goal_of
        self._values: dict[str, dict[str, float]] = {}
        self._best: events.Best | None = None
        self._paths = {"saved in": run.started.save_dir} if run.started.save_dir else {}

    def write(self, records: Sequence[events.Record]) -> None:
        """Print the records that are new."""
        for record in records:
            if not self._seen.has(record):
                self._seen.add(record)  # first: a closed stream fails at each attempt
                self._take(record)

    def close(self) -> None:
        """Remove the live line."""
        self._clear()

    @property
    def in_process(self) -> bool:
        """Always: another process has no terminal."""
        return True

    def _take(self, record: events.Record) -> None:
        match record.event:
            case events.RunStarted() | events.ParamsUpdated() as event:
                epochs = event.params.get("epochs")
                self._epochs = epochs if type(epochs) is int else self._epochs
            case events.EpochStarted() as event:
                self._has_epochs = True
                self._values, self._begun = {}, record.time
                self._live(event.epoch, record.time, {})
            case events.MetricsLogged(final=True) as event:
                self._line(["final"], {event.phase: event.values})
            case events.MetricsLogged(on_request=True) as event:
                self._live(event.epoch, record.time, {event.phase: event.values})
            case events.MetricsLogged() if record.stream:  # of the machine
                pass
            case events.MetricsLogged() as event:
                self._values.setdefault(event.phase, {}).update(event.values)
                self._rank(event)
                self._live(event.epoch, record.time, self._values)
                # Trainings without epochs, such as reinforcement learning, get lines by time.
                if not self._has_epochs and record.time - self._begun >= _STEP_LINE_S:
                    self._begun = record.time
                    self._line([f"step {event.step or 0}"], self._values)
            case events.EpochEnded() as event:
                took = record.time - self._begun if event.duration_s is None else event.duration_s
                outcome = [] if event.outcome == "completed" else [event.outcome]
                head = [self._label(event.epoch), _duration(took), *outcome]
                self._line(head, self._values)
            case events.CheckpointSaved(kind="best" | "last") as event:
                self._paths[event.kind] = event.path
            case events.AlertRaised() as event:
                text = f"{event.title}: {event.text}" if event.text else event.title
                self._print(event.level, f"  {text}")
            case events.RunEnded() as event:
                self._end(event)

    def _rank(self, event: events.MetricsLogged) -> None:
        """Keep the best value so far of the first metric that has a goal."""
        for name, value in event.values.items():
            goal, best = self._goal_of(name), self._best
            if goal is not None and (best is None or best.metric == name):
                old = math.nan if best is None else best.value
                if math.isnan(old) or (value > old if goal == "max" else value < old):
                    self._best = events.Best(metric=name, value=value, epoch=event.epoch)

    def _end(self, event: events.RunEnded) -> None:
        reason = event.reason or (event.error and f"{event.error.type}: {event.error.message}")
        self._print(event.status, f"  {reason}" if reason else "")
        best = event.best or self._best
        if best is not None:
            at = "" if best.epoch is None else f" in {self._label(best.epoch)}"
            self._print("  best value", f"  {best.metric} {best.value:.5g}{at}")
        for name in ("best", "last", "saved in"):
            if name in self._paths:
                self._print(f"  {name:<10}", f"  {self._paths[name]}")

    def _label(self, epoch: int) -> str:
        return f"epoch {epoch + 1}" + (f"/{self._epochs}" if epoch < self._epochs else "")

    def _live(self, epoch: int | None, time: float, values: Values) -> None:
        console = self._console
        if epoch is not None and console.is_terminal and not console.is_dumb_terminal:
            self._line([self._label(epoch), _duration(time - self._begun)], values, True)

    def _line(self, head: list[str], values: Values, live: bool = False) -> None:
        room = self._console.width - 1 - sum(len(part) + 2 for part in head)
        first, *rest = [*head, *_fit(values, self._goal_of, room)]
        self._print(first, "".join(f"  {part}" for part in rest), live=live)

    def _print(self, head: str, rest: str, live: bool = False) -> None:
        self._clear()
        console, self._is_live = self._console, live
        head, rest = (_printable(text, console.encoding) for text in (head, rest))
        console.print(head, style=_STYLES.get(head, "bold"), end="", soft_wrap=True)
        console.print(rest, end="" if live else "\n", soft_wrap=True)

    def _clear(self) -> None:
        if self._is_live:
            self._is_live = False
            self._console.file.write("\r\x1b[2K")  # to the line's beginning, and erase it
            self._console.file.flush()


def _fit(values: Values, goal_of: Callable[[str], object], room: int) -> list[str]:
    """Return the values as one string per phase, without the least important that don't fit."""

    def weight(item: tuple[str, str]) -> int:
        phase, name = item
        important = goal_of(name) is not None or (phase == "train" and "loss" in name)
        return 0 if important else 1 if phase == "validation" else 2

    kept = sorted(((phase, name) for phase in values for name in values[phase]), key=weight)
    kept = kept[: max(room, 0) // 4]  # characters that a value takes at least
    while kept:
        texts = []
        for phase, named in values.items():
            # The last part of a name is usually clear, and leaves room for more values.
            short = [f"{name.split('/')[-1]} {named[name]:.4g}" for p, name in kept if p == phase]
            label = "val" if phase == "validation" else phase
            texts += [f"{label}: {' '.join(short)}"] if short else []
        if len("  ".join(texts)) <= room:
            return texts
        kept.pop()
    return []


def _duration(seconds: float) -> str:
    if not 60 <= seconds < math.inf:
        return f"{seconds:.1f}s"
    return "{}m{:02}s".format(*divmod(round(seconds), 60))


def _printable(text: str, encoding: str) -> str:
    plain = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return plain.encode(encoding, "backslashreplace").decode(encoding)
