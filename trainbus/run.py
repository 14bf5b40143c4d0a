"""The plain loop: a run for trainings without a framework, and an example for adapter authors."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal

import numpy as np

from trainbus.emitter import Emitter
from trainbus.events import (
    AlertRaised,
    ArtifactLogged,
    CheckpointSaved,
    ConfusionMatrixLogged,
    CurveLogged,
    EpochEnded,
    EpochStarted,
    Event,
    ImageLogged,
    MetricsLogged,
    RunStarted,
    TableLogged,
    TextLogged,
    ended_by,
)
from trainbus.hooking import current_rank


class Run:
    """One training, logged by hand; made by `bus.run(…)` and used in a `with` statement.

    The run ends with the `with` block: finished, or failed or stopped by the exception that leaves
    it, which passes through unchanged. Nothing else in here raises because a sink fails. In a
    distributed training rank 0 logs; the other ranks tell only what ends them.
    """

    def __init__(self, emit: Emitter, started: RunStarted) -> None:
        self._emitter = emit
        self._started = started
        self._unsaid: RunStarted | None = started
        self._epoch: int | None = None
        self._left: EpochEnded | None = None
        self._rank: int | None = None

    def __enter__(self) -> Run:
        self._unsaid, self._left = self._started, None
        self._rank = current_rank()
        self._emit()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            self._left = None
        if self._rank and error is not None:
            self._emitter.failed_on(self._rank, error)
        self._emit(ended_by(error))

    @property
    def id(self) -> str | None:
        """Id of the run while it is open."""
        return self._emitter.run_id

    def epochs(self, count: int, *, start: int = 0) -> Iterator[int]:
        """Yield the epochs `start` to `count` - 1; what is logged meanwhile belongs to them."""
        for epoch in range(start, count):
            self._epoch = epoch
            self._emit(EpochStarted(epoch=epoch))
            begun = time.monotonic()
            try:
                yield epoch
            finally:
                self._epoch = None
                # An exception leaves the loop like `break` does, and only `__exit__` knows which it
                # was: the epoch's end waits for the next event.
                self._left = EpochEnded(
                    epoch=epoch, duration_s=time.monotonic() - begun, outcome="completed"
                )
            self._emit()

    def log(
        self,
        values: Mapping[str, Any],
        *,
        epoch: int | None = None,
        step: int | None = None,
        phase: str = "train",
        final: bool = False,
    ) -> None:
        """Log numbers: of one optimizer step if `step` is given, else of the epoch.

        Args:
            values: name → number, numpy scalar or tensor of one element. A name without a `/` gets
                the phase before it: `loss` becomes `train/loss`.
            epoch: counts from 0; by default the epoch of `epochs`.
            step: optimizer updates done.
            phase: `train`, `validation`, `test`, `system`, or a name of your own.
            final: the numbers are an evaluation of the chosen weights after training.
        """
        named = {k if "/" in k else f"{phase}/{k}": v for k, v in values.items()}
        self._emit(
            MetricsLogged(values=named, phase=phase, epoch=self._at(epoch), step=step, final=final)
        )

    def image(
        self,
        key: str,
        image: Any,
        *,
        caption: str | None = None,
        epoch: int | None = None,
        step: int | None = None,
    ) -> None:
        """Log a picture: the path of a file, or an array (H, W) or (H, W, C), uint8 or 0…1."""
        is_path = isinstance(image, str | os.PathLike)
        self._emit(
            ImageLogged(
                key=key,
                path=os.fspath(image) if is_path else None,
                array=None if is_path else np.asarray(image),
                caption=caption,
                epoch=self._at(epoch),
                step=step,
            )
        )

    def curve(
        self,
        key: str,
        x: Any,
        y: Any,
        *,
        classes: Sequence[str] | None = None,
        title: str | None = None,
        x_label: str = "x",
        y_label: str = "y",
        epoch: int | None = None,
    ) -> None:
        """Log curves y (C, N), or one curve (N,), over x (N,), with one name a class."""
        rows = np.atleast_2d(np.asarray(y))
        self._emit(
            CurveLogged(
                key=key,
                x=np.asarray(x),
                y=rows,
                classes=list(classes or ([key] if len(rows) == 1 else map(str, range(len(rows))))),
                title=key if title is None else title,
                x_label=x_label,
                y_label=y_label,
                epoch=self._at(epoch),
            )
        )

    def table(
        self,
        key: str,
        columns: Sequence[str],
        rows: Sequence[Sequence[Any]],
        *,
        epoch: int | None = None,
    ) -> None:
        """Log a table: rows of plain values under named columns."""
        self._emit(
            TableLogged(
                key=key,
                columns=list(columns),
                rows=[list(row) for row in rows],
                epoch=self._at(epoch),
            )
        )

    def confusion_matrix(
        self, key: str, matrix: Any, classes: Sequence[str], *, epoch: int | None = None
    ) -> None:
        """Log counts (C, C): row i, column j is true class i predicted as j."""
        self._emit(
            ConfusionMatrixLogged(
                key=key, matrix=np.asarray(matrix), classes=list(classes), epoch=self._at(epoch)
            )
        )

    def text(self, key: str, text: str, *, epoch: int | None = None) -> None:
        """Log a piece of text."""
        self._emit(TextLogged(key=key, text=text, epoch=self._at(epoch)))

    def checkpoint(
        self,
        path: str | os.PathLike[str],
        *,
        kind: Literal["best", "last", "periodic"] = "last",
        epoch: int | None = None,
        metrics: Mapping[str, Any] | None = None,
        metadata: Mapping[str, Any] | None = None,
        final: bool = False,
    ) -> None:
        """Log that a checkpoint was written; `final` says that this path won't be written again."""
        self._emit(
            CheckpointSaved(
                path=os.fspath(path),
                kind=kind,
                epoch=self._at(epoch),
                metrics=dict(metrics or {}),
                metadata=dict(metadata or {}),
                final=final,
            )
        )

    def artifact(
        self,
        name: str,
        *paths: str | os.PathLike[str],
        kind: str = "file",
        aliases: Sequence[str] = (),
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Log files that are to be kept together under a name."""
        self._emit(
            ArtifactLogged(
                name=name,
                kind=kind,
                paths=[os.fspath(p) for p in paths],
                aliases=list(aliases),
                metadata=dict(metadata or {}),
            )
        )

    def alert(
        self, title: str, text: str = "", *, level: Literal["info", "warning", "error"] = "info"
    ) -> None:
        """Log something that a person should see now."""
        self._emit(AlertRaised(title=title, text=text, level=level))

    def _emit(self, *events: Event) -> None:
        if self._rank is None:
            self._rank = current_rank()
        if self._rank:  # rank 0 has the run
            return
        # A run that is used without `with` starts with what is first said of it.
        started, self._unsaid = self._unsaid, None
        left, self._left = self._left, None
        for event in (started, left, *events):
            if event is not None:
                self._emitter(event)

    def _at(self, epoch: int | None) -> int | None:
        return self._epoch if epoch is None else epoch
