"""The values of one metric, as many as a chart shows."""

from __future__ import annotations

from bisect import bisect_left
from typing import Literal

import msgspec

from ._html_values import Number, number


class Series(msgspec.Struct):
    """Values of one metric, over epochs done or steps; `t` is seconds since the run began."""

    name: str
    phase: str
    axis: Literal["epoch", "step"]
    base: str
    x: list[int] = []
    y: list[Number] = []
    t: list[float] = []
    low: tuple[float, int] | None = None
    """Smallest value, and where it was: of all values, the thinned ones too."""
    high: tuple[float, int] | None = None
    odd: int = 0
    """Values that are no finite number."""
    attempt: int = 1
    stride: int = 1
    seen: int = 0
    loose: bool = False
    """Whether the last point is there only until the next one comes."""

    def add(self, x: int, value: float, t: float, attempt: int, points: int) -> None:
        """Take a value; every second one is let go when there are `points`."""
        if attempt > self.attempt:
            self.cut(x - 1)  # a resumed training went back, and does again what follows
            self.attempt = attempt
        is_last = not self.x or x > self.x[-1]
        if is_last and self.loose:
            del self.x[-1], self.y[-1], self.t[-1]
        if is_last:
            self.loose = self.seen % self.stride != 0
            self.seen += 1
        self._put(x, number(value), t)
        if len(self.x) > points:
            self._thin()

    def cut(self, last: int) -> None:
        """Drop what stands behind `last`."""
        end = bisect_left(self.x, last + 1)
        if end < len(self.x):
            del self.x[end:], self.y[end:], self.t[end:]
            self.loose = False
            self._measure()

    def _thin(self) -> None:
        """Let go of every second value, but never of the last one."""
        last = len(self.x) - 1
        kept = list(range(0, last + (not self.loose), 2))
        self.loose = kept[-1] != last
        kept += [last] * self.loose
        self.x = [self.x[i] for i in kept]
        self.y = [self.y[i] for i in kept]
        self.t = [self.t[i] for i in kept]
        self.stride *= 2

    def _put(self, x: int, value: Number, t: float) -> None:
        at = bisect_left(self.x, x)
        is_known = at < len(self.x) and self.x[at] == x
        self.x[at : at + is_known] = [x]
        self.y[at : at + is_known] = [value]
        self.t[at : at + is_known] = [t]
        if is_known:
            self._measure()
        else:
            self._extend(value, x)

    def _measure(self) -> None:
        self.low = self.high = None
        self.odd = 0
        for value, x in zip(self.y, self.x, strict=True):
            self._extend(value, x)

    def _extend(self, value: Number, x: int) -> None:
        if isinstance(value, str):
            self.odd += 1
            return
        if self.low is None or value < self.low[0]:
            self.low = (value, x)
        if self.high is None or value > self.high[0]:
            self.high = (value, x)
