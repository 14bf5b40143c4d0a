"""The rows of one W&B run, whose x axis is the epoch, or the step for values of single steps.

W&B drops what is logged behind its own step: no row is, and none is left in two parts.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from trainbus.events import EpochEnded, MetricsLogged

if TYPE_CHECKING:
    from wandb import Run as WandbRun


class Rows:
    """Gathers the numbers of an epoch, and sends them when it is over.

    Args:
        run: the W&B run.
        goals: metric, or a pattern of some → whether "max" or "min" is best.
    """

    def __init__(self, run: WandbRun, goals: Mapping[str, str]) -> None:
        self.time = time.time()
        """Of the record, as it may be much later when it comes; Unix seconds."""
        self._run = run
        self._goals = goals
        self._axes: dict[str, str] = {}
        self._epoch: int | None = None
        self._open_epoch: int | None = None
        self._row: dict[str, Any] = {}
        self._row_epoch: int | None = None
        self._row_media: set[str] = set()
        self._row_names: set[str] = set()
        run.define_metric("epoch", hidden=True)

    @property
    def are_sent(self) -> bool:
        """Whether W&B has all that was logged."""
        return not self._row and not self._row_media

    def start_epoch(self, epoch: int) -> None:
        """Begin an epoch, which what comes without one belongs to."""
        self._epoch = self._open_epoch = epoch

    def end_epoch(self, event: EpochEnded) -> None:
        """Send the row of an epoch, or drop it where the epoch comes again."""
        if event.outcome != "completed":
            self._row.clear()
            return
        self._open_epoch = None
        if self._row_epoch != event.epoch:
            self.commit()
        self._row_epoch = event.epoch
        self.commit()

    def log(self, values: Mapping[str, Any], epoch: int | None) -> None:
        """Put numbers into the row of their epoch, which is sent when it is complete."""
        at = self._epoch if epoch is None else epoch
        if at is None:  # a training without epochs
            self._run.log({**values, "_timestamp": self.time}, commit=True)
            return
        self._define(values, "epoch")
        if at != self._row_epoch or values.keys() & self._row.keys():
            self.commit()
        self._row_epoch = at
        self._row |= values

    def log_step(self, event: MetricsLogged) -> None:
        """Send the values of one step."""
        values: dict[str, Any] = {
            (f"{k}_step" if self._axes.get(k, "step") != "step" else k): v
            for k, v in event.values.items()
        }
        self._define(values, "step")
        values |= {"step": event.step, "_timestamp": self.time}
        if event.epoch is not None:
            values["epoch"] = event.epoch + 1
        self._run.log(values, commit=True)

    def show(self, key: str, epoch: int | None, value: Any) -> None:
        """Log a picture, chart or table into the row of its epoch at once: its file may change."""
        at = self._epoch if epoch is None else epoch
        if at is None:
            self._run.log({key: value}, commit=True)
            return
        if at != self._row_epoch or key in self._row_media:
            self.commit()
        self._row_epoch = at
        self._row_media.add(key)
        self._run.log({key: value}, step=max(at + 1, self._run.step), commit=False)

    def commit(self) -> None:
        """Send the row of an epoch."""
        at, row, media = self._row_epoch, self._row, self._row_media
        self._row_epoch, self._row, self._row_media = None, {}, set()
        if at is not None and (row or media or self._epoch == at):
            values = row if media and not row else {**row, "epoch": at + 1}
            self._row_names = set(row) or self._row_names
            values = {**values, "_timestamp": self.time}
            self._run.log(values, step=max(at + 1, self._run.step), commit=True)

    def end(self, *, is_cut_short: bool) -> None:
        """Send the last row; that of an epoch which a resumed training redoes goes elsewhere."""
        is_partial = self._open_epoch == self._row_epoch and self._row.keys() < self._row_names
        if is_cut_short and is_partial:
            self._run.summary.update(self._row)
            self._row, self._row_epoch = {}, None
        self.commit()

    def _define(self, values: Mapping[str, Any], axis: str) -> None:
        for name in values:
            if name not in self._axes:
                self._axes[name] = axis
                goal = next((g for p, g in self._goals.items() if fnmatchcase(name, p)), None)
                # W&B reads `*` in a name as a pattern, and a `.` as nesting.
                if "*" not in name:
                    self._run.define_metric(
                        name.replace(".", "\\."),
                        step_metric=axis,
                        step_sync=True,
                        summary=f"last,{goal}" if goal else None,
                    )
