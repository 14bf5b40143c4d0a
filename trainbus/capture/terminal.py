"""Turns the text that a program writes to a terminal into the lines that the terminal shows.

Carriage returns, backspaces, and the sequences that move the cursor and erase are executed, so that
a progress bar becomes its last state. Colors and all other sequences are removed. Only the rows
that a program can still change are kept, so a bar costs the same memory however long it runs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

MAX_ROW = 2**16
"""Length at which a line without a line feed is cut."""

_MAX_ROWS = 100
_STATE_S = 5.0  # between two recorded states of one line
_PAUSE_S = 1.0  # after which the beginning of a line is recorded
_HOLD_S = 2.0  # how long a row above the cursor can still be redrawn

_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f\x9b]")
_SEQUENCE = re.compile(
    r"(?:\x1b\[|\x9b)(?P<numbers>[0-?]{0,99})[ -/]{0,9}(?P<final>[@-~])"
    r"|\x1b[\]P^_X][^\x07\x1b]{0,4000}(?:\x07|\x1b\\)"
    r"|\x1b[ -/]{0,9}[0-OQ-WYZ\\`-~]"
)
_INCOMPLETE = re.compile(
    r"(?:(?:\x1b\[|\x9b)[0-?]{0,99}[ -/]{0,9}"
    r"|\x1b[\]P^_X][^\x07\x1b]{0,4000}\x1b?"
    r"|\x1b[ -/]{0,9})\Z"
)


class Row:
    """A line of the screen; `number` is 0 until a state of it was passed on."""

    __slots__ = ("is_redrawn", "number", "seen", "sent", "sent_at", "text", "time")

    def __init__(self, now: float) -> None:
        self.text = ""
        self.time = self.seen = self.sent_at = now
        self.is_redrawn = False
        self.sent: str | None = None
        self.number = 0

    def shown(self) -> str:
        """Return the text; of a redrawn row without the spaces that bars erase with."""
        return self.text.rstrip() if self.is_redrawn else self.text


class Terminal:
    """The rows of one stream that can still change.

    Lines are complete when their line feed is written. If a program moves the cursor up, as nested
    bars do, redrawn rows wait until the cursor has been below them for two seconds.
    """

    def __init__(self) -> None:
        self._rows: list[Row] = []
        self._y = 0
        self._x = 0
        self._pending = ""
        self._moves_up = False

    def feed(self, text: str, now: float) -> Iterator[Row]:
        """Execute a text; yield the rows to pass on; a row with a `number` was passed on before."""
        if self._rows:
            yield from self._states(now)
        if self._pending:
            text, self._pending = self._pending + text, ""
        start, end = 0, len(text)
        while start < end:
            found = _CONTROL.search(text, start)
            stop = found.start() if found else end
            if stop > start:
                yield from self._put(text[start:stop], now)
            if found is None:
                return
            start = found.end()
            char = found[0]
            if char == "\n":
                yield from self._line_feed(now)
            elif char == "\r":
                self._redraw(now, 0)
            elif char == "\b":
                self._redraw(now, max(self._x - 1, 0))
            elif char in "\x1b\x9b":
                sequence = _SEQUENCE.match(text, stop)
                if sequence is not None:
                    start = sequence.end()
                    if final := sequence["final"]:
                        self._execute(final, sequence["numbers"], now)
                elif _INCOMPLETE.match(text, stop):
                    self._pending = text[stop:]
                    return

    def finish(self) -> Iterator[Row]:
        """Yield all rows that were not passed on, at the end of the capture."""
        rows, self._rows, self._x, self._y, self._pending = self._rows, [], 0, 0, ""
        while rows and not rows[-1].shown():
            rows.pop()
        yield from _unsent(rows)

    def _row(self, now: float) -> Row:
        while len(self._rows) <= self._y:
            self._rows.append(Row(now))
        row = self._rows[self._y]
        row.seen = now
        return row

    def _put(self, text: str, now: float) -> Iterator[Row]:
        row = self._row(now)
        if not row.text:
            row.time = now
        while self._x + len(text) > MAX_ROW:
            room = MAX_ROW - self._x
            row.text = _over(row.text, self._x, text[:room])
            text = text[room:]
            yield from self._line_feed(now)
            row = self._row(now)
        if self._x == len(row.text):
            row.text += text
        else:
            row.text = _over(row.text, self._x, text)
        self._x += len(text)

    def _line_feed(self, now: float) -> Iterator[Row]:
        self._row(now)
        self._x = 0
        if not self._moves_up:  # the only row
            yield from _unsent([self._rows.pop()])
            return
        self._y += 1
        self._row(now)
        is_last = self._y == len(self._rows) - 1
        if is_last and not any(row.is_redrawn for row in self._rows[: self._y]):
            yield from self._leave(self._y)
        elif self._y >= _MAX_ROWS:
            yield from self._leave(1)

    def _leave(self, count: int) -> Iterator[Row]:
        """Yield the first rows, which can't be changed any more."""
        done, self._rows = self._rows[:count], self._rows[count:]
        self._y = max(self._y - count, 0)
        yield from _unsent(done)

    def _states(self, now: float) -> Iterator[Row]:
        """Yield rows that were left, and a state of the current one from time to time."""
        if self._moves_up:
            count = 0
            while count < self._y and now - self._rows[count].seen >= _HOLD_S:
                count += 1
            yield from self._leave(count)
            if self._y == 0 and len(self._rows) == 1 and not self._rows[0].is_redrawn:
                self._moves_up = False
        if self._y >= len(self._rows):
            return
        row = self._rows[self._y]
        since = now - row.sent_at
        is_paused = not row.is_redrawn and now - row.seen >= _PAUSE_S
        if since < (_PAUSE_S if is_paused and row.sent is None else _STATE_S):
            return
        if row.shown() and row.shown() != row.sent:
            row.sent, row.sent_at = row.shown(), now
            yield row

    def _redraw(self, now: float, column: int) -> None:
        self._row(now).is_redrawn = True
        self._x = min(column, MAX_ROW - 1)

    def _execute(self, final: str, numbers: str, now: float) -> None:
        """Execute a control sequence that moves the cursor or erases."""
        if final not in "ABCDEFGJK":  # colors among others
            return
        first = numbers.partition(";")[0]
        number = int(first) if first.isdecimal() and len(first) < 6 else 0
        row, count = self._row(now), max(number, 1)
        match final:
            case "A" | "F":
                self._y = max(self._y - count, 0)
                self._moves_up = True
                self._redraw(now, 0 if final == "F" else self._x)
            case "B" | "E":
                self._y = min(self._y + count, _MAX_ROWS) if self._moves_up else self._y
                self._redraw(now, 0 if final == "E" else self._x)
            case "C":
                self._redraw(now, self._x + count)
            case "D":
                self._redraw(now, max(self._x - count, 0))
            case "G":
                self._redraw(now, count - 1)
            case "K":
                row.is_redrawn = True
                if number == 0:
                    row.text = row.text[: self._x]
                elif number == 1:
                    row.text = _over(row.text, 0, " " * (self._x + 1))
                elif number == 2:
                    row.text = ""
            case "J" if number == 0:
                row.is_redrawn = True
                row.text = row.text[: self._x]
                del self._rows[self._y + 1 :]


def _unsent(rows: list[Row]) -> Iterator[Row]:
    """Yield the rows whose last state was not passed on."""
    return (row for row in rows if row.sent is None or row.sent != row.shown())


def _over(old: str, at: int, text: str) -> str:
    """Return a text with another one written over it from a column on."""
    return old[:at].ljust(at) + text + old[at + len(text) :]
