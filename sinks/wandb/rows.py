"""The rows of one W&B run, whose x axis is the epoch, or the step for values of single steps.

W&B drops what is logged behind its own step: no row is, and none is left in two parts.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from trainbus.events import EpochEnded, MetricsLogged

if TYPE_CHECKING:
    from wandb import Run as WandbRun

logger = logging.getLogger("trainbus.sinks.wandb")

EPOCH, STEP = "epoch", "trainer/step"
"""The x axes: epochs counted from 1, and optimizer steps."""

RESERVED = frozenset({EPOCH, STEP, "_step", "_timestamp", "_runtime", "_wandb"})
"""Names in a row that are not free for a metric: the axes, and what W&B itself writes."""

_MOST_WAITING = 1_000


class Rows:
    """Gathers the numbers of an epoch, and sends them when it is over.

    Args:
        run: the W&B run.
        goal_of: returns whether the "max" or the "min" of a metric is best, if either is.
        is_shared: whether somebody else logs to the run as well.
        is_new: whether nothing was logged to the run before.
    """

    def __init__(
        self,
        run: WandbRun,
        goal_of: Callable[[str], str | None],
        *,
        is_shared: bool = False,
        is_new: bool = True,
    ) -> None:
        self.time = time.time()
        """Of the record, as it may be much later when it comes; Unix seconds."""
        self._run = run
        self._is_shared = is_shared
        self._best = _Best(run, goal_of, is_new=is_new)
        self._beside = _Beside(run)
        self._axes: dict[str, str] = {}
        self._epoch: int | None = None
        self._open_epoch: int | None = None
        self._row: dict[str, Any] = {}
        self._row_epoch: int | None = None
        self._row_media: set[str] = set()
        self._row_names: set[str] = set()
        self._row_records = 0
        self._moved: set[str] = set()
        if not is_shared:  # where `epoch` may be a metric of theirs, too
            run.define_metric(EPOCH, hidden=True)

    @property
    def are_sent(self) -> bool:
        """Whether W&B has all that was logged."""
        return not self._row and not self._row_media and not self._beside.waiting

    @property
    def held(self) -> int:
        """How many records W&B has nothing of yet."""
        return self._row_records + len(self._beside.waiting)

    def start_epoch(self, epoch: int) -> None:
        """Begin an epoch, which what comes without one belongs to."""
        self._epoch = self._open_epoch = epoch

    def end_epoch(self, event: EpochEnded) -> None:
        """Send the row of an epoch, or drop it where the epoch comes again."""
        if event.outcome != "completed":
            self._row.clear()
            self._row_records = 0
            return
        self._open_epoch = None
        if self._row_epoch != event.epoch:
            self.commit()
        self._row_epoch = event.epoch
        self.commit()

    def log(self, values: Mapping[str, Any], epoch: int | None) -> None:
        """Put numbers into the row of their epoch, which is sent when it is complete."""
        values = self._free(values)
        at = self._epoch if epoch is None else epoch
        if at is None:  # a training without epochs
            self._send(values)
            return
        self._define(values, EPOCH)
        if at != self._row_epoch or values.keys() & self._row.keys():
            self.commit()
        self._row_epoch = at
        self._row |= values
        self._row_records += 1

    def log_step(self, event: MetricsLogged) -> None:
        """Send the values of one step."""
        values: dict[str, Any] = {
            (f"{k}_step" if self._axes.get(k, STEP) != STEP else k): v
            for k, v in self._free(event.values).items()
        }
        self._define(values, STEP)
        values[STEP] = event.step
        if event.epoch is not None:
            values[EPOCH] = event.epoch + 1
        self._send(values)

    def show(self, key: str, epoch: int | None, value: Any) -> None:
        """Log a picture, chart or table at once, as its file may change.

        In a run of its own it joins the row of its epoch. In a shared run it has a row of its own:
        the next row of somebody else would take along what is left open, or overwrite it.
        """
        (key,) = self._free({key: value})
        at = self._epoch if epoch is None else epoch
        if at is None:
            self._send({key: value})
        elif self._is_shared:
            self._send({key: value, EPOCH: at + 1})
        else:
            if at != self._row_epoch or key in self._row_media:
                self.commit()
            self._row_epoch = at
            self._row_media.add(key)
            self._run.log({key: value}, step=max(at + 1, self._run.step), commit=False)

    def commit(self) -> None:
        """Send the row of an epoch; if that fails it is kept, to be sent again."""
        at, row, media = self._row_epoch, self._row, self._row_media
        if at is not None and (row or media or self._epoch == at):
            self._send(dict(row) if media and not row else {**row, EPOCH: at + 1}, at)
            self._row_names = set(row) or self._row_names
        self._row_epoch, self._row, self._row_media = None, {}, set()
        self._row_records = 0

    def end(self, *, is_cut_short: bool) -> None:
        """Send the last row; that of an epoch which a resumed training redoes goes elsewhere."""
        is_partial = self._open_epoch == self._row_epoch and self._row.keys() < self._row_names
        if is_cut_short and is_partial:
            self._run.summary.update(self._row)
            self._row, self._row_epoch, self._row_records = {}, None, 0
        self.commit()
        self._beside.finish()

    def _send(self, values: dict[str, Any], epoch: int | None = None) -> None:
        row = {**values, "_timestamp": self.time}
        if self._is_shared:
            self._beside.log(row)
        elif epoch is None:
            self._run.log(row, commit=True)
        else:
            self._run.log(row, step=max(epoch + 1, self._run.step), commit=True)
        self._best.update(values)

    def _free(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return values under names that are free in a row."""
        taken = values.keys() & RESERVED
        if new := taken - self._moved:
            self._moved |= new
            names = ", ".join(f"{name!r} as 'logged/{name}'" for name in sorted(new))
            logger.warning("W&B rows have a column of that name already: %s", names)
        return {f"logged/{k}" if k in taken else k: v for k, v in values.items()}

    def _define(self, values: Mapping[str, Any], axis: str) -> None:
        for name in values:
            if name not in self._axes:
                self._axes[name] = axis
                # W&B reads `*` in a name as a pattern, and a `.` as nesting.
                if "*" not in name:
                    escaped = name.replace(".", "\\.")
                    self._run.define_metric(escaped, step_metric=axis, step_sync=True)


class _Best:
    """Keeps the best value of a metric that has a goal in the run's summary, as `<name>.max`.

    With W&B's own `define_metric(summary="max")` the metric itself is gone from the summary: its
    name then holds a mapping, which neither tables nor sweeps take for a number.
    """

    def __init__(
        self, run: WandbRun, goal_of: Callable[[str], str | None], *, is_new: bool
    ) -> None:
        self._run = run
        self._goal_of = goal_of
        self._is_new = is_new
        self._found: dict[str, float] = {}

    def update(self, values: Mapping[str, Any]) -> None:
        better = {}
        for name, value in values.items():
            goal = self._goal_of(name)
            if goal is None or not isinstance(value, int | float) or math.isnan(value):
                continue
            key = f"{name}.{goal}"
            best = self._known(key)
            if best is None or (value > best if goal == "max" else value < best):
                better[key] = self._found[key] = value
        if better:
            self._run.summary.update(better)

    def _known(self, key: str) -> float | None:
        if key not in self._found and not self._is_new:
            summary: Any = self._run.summary
            found = summary.get(key)
            if isinstance(found, int | float):
                self._found[key] = found
        return self._found.get(key)


class _Beside:
    """Logs rows to a run that the user's program logs to at the same time, from another thread.

    W&B merges what is logged until a row is committed, and a step that is behind the run's own
    drops the row. One call that commits, without a step, is atomic in W&B: it neither drops a row
    nor leaves anything open. But it moves the run's step on, and W&B would drop the rows of a
    program that logs with `step=`; there a row joins the one of the program's current step.
    """

    def __init__(self, run: WandbRun) -> None:
        self.waiting: deque[dict[str, Any]] = deque()
        """Rows that wait until the program has gone on to its next step."""
        self._run = run
        self._open: dict[str, Any] = {}
        self._open_at = 0
        self._has_said = False

    def log(self, row: dict[str, Any]) -> None:
        if not self._has_steps():
            self._run.log(row, commit=True)
            return
        self.waiting.append(row)
        while self.waiting and (self._is_free() or len(self.waiting) > _MOST_WAITING):
            self._join()

    def finish(self) -> None:
        """Log what waits, and leave no row open that the user's next one could overwrite."""
        while self.waiting:
            self._join()
        if self._open and self._run.step <= self._open_at:
            self._run.log({}, commit=True)
        self._open = {}

    def _join(self) -> None:
        if not self._is_free():
            if not self._has_said:
                self._has_said = True
                logger.warning(
                    "rows come faster than the steps that your program logs to its W&B run with "
                    "`step=`, which W&B may drop now; log without `step=`, or give this sink a run "
                    "of its own with `isolation: process`"
                )
            self._run.log({}, commit=True)
            self._open = {}
        row = self.waiting[0]
        self._run.log(row, commit=False)
        self._open |= row
        self._open_at = self._run.step  # read afterwards: the row is at this step or before
        self.waiting.popleft()

    def _is_free(self) -> bool:
        """Return whether the next row overwrites nothing of the one that was logged last."""
        if self._open and self._run.step > self._open_at:
            self._open = {}
        both = self.waiting[0].keys() & self._open.keys() - {"_timestamp"}
        return all(k == EPOCH and self.waiting[0][k] == self._open[k] for k in both)

    def _has_steps(self) -> bool:
        if self._run.settings.mode == "shared":  # where W&B ignores them
            return False
        # Nothing public says it; a row is committed where it is not known.
        telemetry = getattr(self._run, "_telemetry_obj", None)
        return bool(getattr(getattr(telemetry, "feature", None), "set_step_log", False))
