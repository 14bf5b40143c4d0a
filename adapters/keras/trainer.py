"""One training of Keras, told from its first epoch to its end."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from trainbus.distributed import current_rank
from trainbus.events import Best, Resumed, RunStarted
from trainbus.toolkit.adapters import Reporter, guarded, number, version, wrap

from ._keras_checkpoints import Checkpoints
from ._keras_facts import Facts, of_kind, world_size


class Training:
    """Tells a training that has come to its first epoch.

    Args:
        report: tells the run.
        facts: reads what is known.
        model: trains.
        callbacks: all that Keras calls.
        arguments: what `fit` was given.
    """

    def __init__(
        self,
        report: Reporter,
        facts: Facts,
        model: Any,
        callbacks: Sequence[Any],
        arguments: Mapping[str, Any],
    ) -> None:
        self._report = report
        self._facts = facts
        self._model = model
        self._callbacks = callbacks
        self._arguments = arguments
        self._checkpoints = Checkpoints()
        self._epoch = self._step = 0
        self._loss: float | None = None
        self._undo: list[Callable[[], object]] = []

    @property
    def best(self) -> Best | None:
        """The best value so far, by what callbacks have seen."""
        return self._checkpoints.best or self._facts.best(self._callbacks)

    def begin(self, epoch: int) -> None:
        """Open the run with an epoch, and see what is saved from now on."""
        if current_rank():
            return
        facts, model = self._facts, self._model
        folder, updates = facts.save_dir(self._callbacks), facts.updates(model)
        self._step = updates or 0
        self._report.start(
            RunStarted(
                name=model.name,
                params=facts.params(model, self._arguments) or {},
                framework="keras",
                framework_version=version("keras"),
                save_dir=folder,
                world_size=world_size(),
                resumed=Resumed(epoch=epoch - 1, step=updates, save_dir=folder) if epoch else None,
                goals=facts.goals(model, self._callbacks) or {},
            ),
            loggers=self._callbacks,
            remedy="leave it out of the callbacks of fit()",
        )
        described = facts.described(model)
        if described is not None:
            self._report.tell(described)
        for callback in of_kind(self._callbacks, "BackupAndRestore", "ModelCheckpoint"):
            saving = partial(self._checkpoints.saving, callback)
            self._undo.append(wrap(callback, "_save_model", saving))
        for name in ("save", "save_weights"):
            self._undo.append(wrap(model, name, self._saves))

    def release(self) -> None:
        """See no more of what is saved."""
        while self._undo:
            self._undo.pop()()

    def start_epoch(self, epoch: int) -> None:
        """Say that an epoch begins."""
        self._epoch = epoch
        self._report.start_epoch(epoch)

    def end_batch(self, logs: Mapping[str, Any]) -> None:
        """Tell the values after a batch, if a sink asked for them."""
        # A call stands for many updates, or for none: steps_per_execution, accumulation.
        before, self._step = self._step, self._facts.updates(self._model) or 0
        if any(self._report.wants_step(step) for step in range(before + 1, self._step + 1)):
            values = {f"batch_{name}": value for name, value in logs.items()}
            self._report.metrics(
                values, "train", epoch=self._epoch, step=self._step, on_request=True
            )

    def end_epoch(self, epoch: int, logs: Mapping[str, Any]) -> None:
        """Tell the values of an epoch that is over."""
        self._loss = number(logs.get("loss"))
        validation = {k: v for k, v in logs.items() if k.startswith("val_")}
        train = {k: v for k, v in logs.items() if k not in validation}
        rate = self._facts.rate(self._model)
        if rate is not None:  # callbacks that change it have put in the one that was used
            train.setdefault("learning_rate", rate)
        self._report.metrics(train, "train", epoch=epoch)
        self._report.metrics(validation, "validation", epoch=epoch)
        self._report.end_epoch()

    def end(self) -> None:
        """Say that the training is over and went well, and why it was early."""
        for event in self._checkpoints.finals():
            self._report.tell(event)
        is_early = self._epoch + 1 < self._arguments.get("epochs", 0)
        why = self._facts.reason(self._model, self._callbacks, self._loss, is_early=is_early)
        self._report.end(why, self.best)
        self.release()

    def _saves(self, method: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        result = method(*args, **kwargs)
        self._tell_saved(str(args[0] if args else kwargs["filepath"]))
        return result

    @guarded
    def _tell_saved(self, path: str) -> None:
        step = self._facts.updates(self._model)
        self._report.tell(self._checkpoints.written(path, self._epoch, step))
