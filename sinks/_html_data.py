"""What a page shows of a run, gathered from its records: this is what lies in `data.json`.

Guarantees: it depends on the records alone, and not on how they were cut into batches; a value that
JSON has no number for is the text `NaN`, `Infinity` or `-Infinity`; no list grows without bound.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from trainbus.events import Failure

from ._html_ranks import Worst
from ._html_series import Series
from ._html_values import Number


class Picture(msgspec.Struct):
    """A picture in the page's folder."""

    file: str
    caption: str | None = None
    epoch: int | None = None
    step: int | None = None


class Data(msgspec.Struct):
    """All that a page shows of one run."""

    run: str
    position: tuple[int, int] = (0, 0)
    about: dict[str, Any] = {}
    goals: dict[str, Literal["max", "min"]] = {}
    status: str = "running"
    reason: str | None = None
    error: Failure | None = None
    best: dict[str, Any] | None = None
    worst: Worst | None = None
    first: float | None = None
    """Time of the first record of this attempt, in seconds since the Unix epoch."""
    last: float | None = None
    earlier: float = 0.0
    """Seconds that earlier attempts took."""
    attempt: int = 1
    resumes: bool = False
    epoch: int | None = None
    done: int = 0
    """Epochs that are completed."""
    epochs: int | None = None
    step: int | None = None
    steps: int | None = None
    eta: float | None = None
    """Seconds that the rest takes, if its epochs take as long as the last ones did."""
    took: list[float] = []
    ends: Series = msgspec.field(
        default_factory=lambda: Series(name="", phase="", axis="epoch", base="")
    )
    """Steps done at the end of each epoch."""
    params: dict[str, str] = {}
    model: dict[str, str] = {}
    classes: list[str] = []
    series: list[Series] = []
    final: dict[str, Number] = {}
    curves: dict[str, Any] = {}
    matrices: dict[str, Any] = {}
    histograms: dict[str, Any] = {}
    tables: dict[str, Any] = {}
    texts: list[dict[str, Any]] = []
    pictures: dict[str, list[Picture]] = {}
    checkpoints: list[dict[str, Any]] = []
    artifacts: list[dict[str, Any]] = []
    alerts: list[dict[str, Any]] = []
    records: dict[str, int] = {}
