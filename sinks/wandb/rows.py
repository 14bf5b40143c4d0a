"""The rows of one W&B run, whose x axis is the epoch, or the step for values of single steps.

W&B drops rows that are logged behind its own step: no row is, and no row is split in two.
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
"""Names that no metric may have: the axes, and the columns that W&B itself writes."""

_MOST_WAITING = 1_000


class Rows:
    """Collects the numbers of an epoch, and sends them when it is over.

    Args:
        run: the W&B run.
        goal_of: returns the goal of a metric, "max" or "min"; None if it has none.
        is_shared: whether the user's program also logs to the run.
        is_new: whether the run has no rows yet.
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
        """Time of the record in Unix seconds; it may be delivered much later."""
        self._run = run
        self._is_shared = is_shared
        self._best = _Best(run, goal_of, is_new=is_new)
        self._shared_log = _SharedLog(run)
        self._axes: dict[str, str] = {}
        self._epoch: int | None = None
        self._open_epoch: int | None = None
        self._row: dict[str, Any] = {}
        self._row_epoch: int | None = None
        self._row_media: set[str] = set()
        self._row_names: set[str] = set()
        self._row_records = 0
        self._moved: set[str] = set()
        if not is_shared:  # whose program may have a metric `epoch`
            run.define_metric(EPOCH, hidden=True)

    @property
    def are_sent(self) -> bool:
        """Whether W&B has everything that was logged."""
        return not self._row and not self._row_media and not self._shared_log.waiting

    @property
    def held(self) -> int:
        """Number of records that W&B has nothing of yet."""
        return self._row_records + len(self._shared_log.waiting)

    def start_epoch(self, epoch: int) -> None:
        """Begin an epoch; values without an epoch belong to it."""
        self._epoch = self._open_epoch = epoch

    def end_epoch(self, event: EpochEnded) -> None:
        """Send the row of an epoch, or drop it if the epoch is repeated."""
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
        """Add numbers to the row of their epoch, which is sent when it is complete."""
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

    def log_apart(self, values: Mapping[str, Any]) -> None:
        """Send values that belong to no epoch as a row of their own."""
        self._send(self._free(values))

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

        It joins the row of its epoch. In a shared run it gets its own row: the next row of the
        user's program would include or overwrite a row that is left open.
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
        """Send the row of an epoch; if that fails, the row is kept and sent again."""
        at, row, media = self._row_epoch, self._row, self._row_media
        if at is not None and (row or media or self._epoch == at):
            self._send(dict(row) if media and not row else {**row, EPOCH: at + 1}, at)
            self._row_names = set(row) or self._row_names
        self._row_epoch, self._row, self._row_media = None, {}, set()
        self._row_records = 0

    def end(self, *, is_cut_short: bool) -> None:
        """Send the last row; a partial one, which a resumed training repeats, joins the summary."""
        is_partial = self._open_epoch == self._row_epoch and self._row.keys() < self._row_names
        if is_cut_short and is_partial:
            self._run.summary.update(self._row)
            self._row, self._row_epoch, self._row_records = {}, None, 0
        self.commit()
        self._shared_log.finish()

    def _send(self, values: dict[str, Any], epoch: int | None = None) -> None:
        row = {**values, "_timestamp": self.time}
        if self._is_shared:
            self._shared_log.log(row)
        elif epoch is None:
            self._run.log(row, commit=True)
        else:
            self._run.log(row, step=max(epoch + 1, self._run.step), commit=True)
        self._best.update(values)

    def _free(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return values under names that a metric may have."""
        taken = values.keys() & RESERVED
        if new := taken - self._moved:
            self._moved |= new
            names = ", ".join(f"{name!r} as 'logged/{name}'" for name in sorted(new))
            logger.warning("W&B reserves these names; logging %s", names)
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
    """Writes the best value of each metric with a goal to the run's summary, as `<name>.max`.

    W&B's own `define_metric(summary="max")` replaces the metric in the summary with a mapping,
    which neither tables nor sweeps accept as a number.
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


class _SharedLog:
    """Logs rows to a run to which the user's program logs at the same time, in another thread.

    W&B merges values until a row is committed, and drops rows whose step is behind the run's own.
    One call that commits, without a step, is atomic: it neither drops a row nor leaves one open.
    But it increments the run's step, and W&B would then drop rows of a program that logs with
    `step=`; in such a run a row joins that of the program's current step.
    """

    def __init__(self, run: WandbRun) -> None:
        self.waiting: deque[dict[str, Any]] = deque()
        """Rows that wait for the program's next step."""
        self._run = run
        self._open: dict[str, Any] = {}
        self._open_at = 0
        self._has_warned = False

    def log(self, row: dict[str, Any]) -> None:
        if not self._has_steps():
            self._run.log(row, commit=True)
            return
        self.waiting.append(row)
        while self.waiting and (self._is_free() or len(self.waiting) > _MOST_WAITING):
            self._join()

    def finish(self) -> None:
        """Log the waiting rows, and leave no row open that the user's next one could overwrite."""
        while self.waiting:
            self._join()
        if self._open and self._run.step <= self._open_at:
            self._run.log({}, commit=True)
        self._open = {}

    def _join(self) -> None:
        if not self._is_free():
            if not self._has_warned:
                self._has_warned = True
                logger.warning(
                    "records arrive faster than your program logs steps to its W&B run with "
                    "`step=`; W&B may now drop some of your rows; log without `step=`, or give "
                    "this sink its own run with `isolation: process`"
                )
            self._run.log({}, commit=True)
            self._open = {}
        row = self.waiting[0]
        self._run.log(row, commit=False)
        self._open |= row
        self._open_at = self._run.step  # read afterwards: the row is at this step or an earlier one
        self.waiting.popleft()

    def _is_free(self) -> bool:
        """Return whether the next row would overwrite nothing of the last one."""
        if self._open and self._run.step > self._open_at:
            self._open = {}
        both = self.waiting[0].keys() & self._open.keys() - {"_timestamp"}
        return all(k == EPOCH and self.waiting[0][k] == self._open[k] for k in both)

    def _has_steps(self) -> bool:
        if self._run.settings.mode == "shared":  # where W&B ignores them
            return False
        # There is no public attribute for it; if unknown, rows are committed.
        telemetry = getattr(self._run, "_telemetry_obj", None)
        return bool(getattr(getattr(telemetry, "feature", None), "set_step_log", False))
