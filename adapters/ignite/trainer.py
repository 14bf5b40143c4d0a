"""The trainings of one ignite trainer: start, epochs, evaluations, checkpoints and end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from trainbus.distributed import current_rank
from trainbus.events import Resumed, RunStarted
from trainbus.toolkit.adapters import Reporter, described, early_stop, guarded, numbers, version

from .checkpoints import Checkpoints
from .evaluation import Engines

REMEDY = "leave out either logger"


@dataclass(eq=False)
class Training:
    """Reports the trainings of one trainer, one run at a time.

    Args:
        report: records the runs.
        trainer: the engine that trains.
        named: name → evaluator.
        optimizer: the optimizer whose learning rates are recorded; default: those that are saved.
        params: configuration of the training.
        output_transform: turns the trainer's output into a number, or a dict of numbers.
    """

    report: Reporter
    trainer: Any
    named: Mapping[str, Any] = field(default_factory=dict)
    optimizer: Any = None
    params: dict[str, Any] = field(default_factory=dict)
    output_transform: Callable[[Any], Any] | None = None

    def __post_init__(self) -> None:
        self._run: str | None = None
        self._last_iteration = 0
        self._reset()

    def _reset(self) -> None:
        self._optimizers: dict[str, Any] = {}
        self._rates: dict[str, Any] = {}
        self._engines = Engines(self.trainer, self.named)
        self._checkpoints = Checkpoints(self.report, self._engines.handlers)

    @guarded
    def start(self, epoch: int | None = None) -> None:
        """Start a run.

        Args:
            epoch: the epoch within which an interrupted run continues, None for any other run.
        """
        self._reset()
        if self.report.rank() != 0:
            return
        self._checkpoints.skip()  # those of an earlier run
        self._optimizers = self._checkpoints.saving("param_groups")
        if self.optimizer is not None:
            self._optimizers = {"optimizer": self.optimizer}
        # The user's parameters come first, and override the others.
        params = self.params | settings(self.trainer, self._optimizers) | self.params
        self.report.start(
            started(params, self._checkpoints.folder, self._resumed(is_cut=epoch is not None)),
            loggers=self._engines.loggers(),
            remedy=REMEDY,
        )
        self._run = getattr(self.report.emit, "run_id", None)
        self._describe()
        if epoch is not None:
            self.report.start_epoch(epoch)

    def _resumed(self, *, is_cut: bool) -> Resumed | None:
        """Return where the state of the trainer continues.

        Args:
            is_cut: whether the last epoch was interrupted.
        """
        state = self.trainer.state
        if not state.iteration:
            return None
        epoch = state.epoch - 1 - is_cut
        # It continues its own last run, unless a state was loaded since.
        run = self._run if state.iteration == self._last_iteration else None
        return Resumed(run=run, epoch=epoch if epoch >= 0 else None, step=int(state.iteration))

    @guarded
    def _describe(self) -> None:
        models = self._checkpoints.saving("parameters").values()
        parameters = [p for model in models for p in model.parameters()]
        if parameters:
            layers = sum(1 for model in models for _ in model.modules())
            self.report.record(described(parameters, layers))

    @guarded
    def start_epoch(self) -> None:
        """Record that an epoch starts."""
        self.cut_epoch()  # after `terminate_epoch(skip_epoch_completed=True)`
        self.report.start_epoch(self.trainer.state.epoch - 1)

    @guarded
    def step(self) -> None:
        """Record the values of a step, if a sink asked for them."""
        # Before the handlers: a scheduler among them sets the rates of the next update.
        self._rates = _rates(self._optimizers)
        step = int(self.trainer.state.iteration)
        if self.report.wants_step(step) and (values := self._output()):
            values |= self._rates
            epoch = self.report.epoch
            self.report.metrics(values, "train", epoch=epoch, step=step, on_request=True)

    @guarded
    def _output(self) -> dict[str, float]:
        """Return the numbers in the last output of the trainer's function."""
        output = self.trainer.state.output
        if self.output_transform is not None:
            output = self.output_transform(output)
        if isinstance(output, tuple):
            output = {f"output/{i}": value for i, value in enumerate(output)}
        elif not isinstance(output, Mapping):
            output = {"output": output}
        return {f"train/{name}": value for name, value in numbers(output).items()}

    @guarded
    def end_epoch(self) -> None:
        """Record the metrics and the end of an epoch."""
        self.record_saved()
        metrics = self.trainer.state.metrics
        self._end_epoch({f"train/{name}": value for name, value in metrics.items()})

    @guarded
    def cut_epoch(self) -> None:
        """Record the end of an epoch that was cut short, if one is in progress."""
        self._end_epoch({})  # the metrics are still those of the epoch before

    def _end_epoch(self, values: dict[str, Any]) -> None:
        if self.report.epoch is not None:
            values = {**(values or self._output() or {}), **self._rates}
            self.report.metrics(values, "train", epoch=self.report.epoch)
            self.report.end_epoch()

    @guarded
    def start_evaluation(self, engine: Any, data: Any) -> str:
        """Return the name of an evaluator that is about to run."""
        if engine not in self._engines:
            self.record_saved()
            self._engines.add(engine)
            self._checkpoints.skip()  # those of an earlier run
        is_train = data is not None and data is self.trainer.state.dataloader
        return self._engines.name(engine, is_train=is_train)

    @guarded
    def end_evaluation(self, engine: Any, name: str, during: str | None) -> None:
        """Record the metrics of an evaluator.

        Args:
            engine: the evaluator.
            name: its name.
            during: the event of the trainer whose handler ran it.
        """
        if engine.state.times.get("EPOCH_COMPLETED"):  # else the metrics are of an earlier run
            is_summary = during in ("EPOCH_COMPLETED", "COMPLETED")
            self.report.metrics(
                {f"{name}/{key}": value for key, value in engine.state.metrics.items()},
                next((p for p in ("train", "test") if name.startswith(p)), "validation"),
                epoch=self.report.epoch,
                step=None if is_summary else self.trainer.state.iteration,
                final=during == "COMPLETED",
            )
        self.record_saved()

    @guarded
    def record_saved(self) -> None:
        """Record the files that were saved since the last call."""
        if self.report.is_open:
            self._checkpoints.record(self.trainer.state)

    @guarded
    def end(
        self, error: BaseException | None, *, is_interrupted: bool, is_terminated: bool
    ) -> None:
        """Record that `run` returned.

        Args:
            error: the exception that the user's handler swallowed, which ended the training.
            is_interrupted: whether the training can be continued within its epoch.
            is_terminated: whether `terminate` was called.
        """
        self._last_iteration = self.trainer.state.iteration
        if error is not None:
            self.report.fail(error)
        elif is_interrupted:
            self.report.end("interrupted", status="stopped")
        elif self.report.is_open:
            self.record_saved()
            handlers = self._engines.handlers()
            self.report.end(_why_terminated(self.trainer, handlers) if is_terminated else None)


def started(
    params: dict[str, Any], save_dir: str | None = None, resumed: Resumed | None = None
) -> RunStarted:
    """Return the start of a run.

    Args:
        params: configuration of the training.
        save_dir: folder of its checkpoints.
        resumed: where it continues.
    """
    from ignite import distributed

    return RunStarted(
        framework="ignite",
        framework_version=version("ignite"),
        params=params,
        save_dir=save_dir,
        world_size=int(distributed.get_world_size()),
        resumed=resumed,
    )


def settings(trainer: Any, optimizers: Mapping[str, Any]) -> dict[str, Any]:
    """Return what ignite knows of a training's configuration."""
    state = trainer.state
    names = ("max_epochs", "max_iters", "epoch_length")
    found = {name: getattr(state, name, None) for name in names}
    found["batch_size"] = getattr(state.dataloader, "batch_size", None)
    for name, optimizer in optimizers.items():
        kind = type(optimizer).__qualname__
        found[name] = {"type": kind, **getattr(optimizer, "defaults", {})}
    return {name: value for name, value in found.items() if value is not None}


def rank() -> int:
    """Return the rank of this process by ignite, which also knows Horovod and XLA."""
    from ignite import distributed

    if distributed.backend() is None:
        # ignite is not distributed, but a launcher may have started several processes.
        return current_rank()
    return int(distributed.get_rank())


def _rates(optimizers: Mapping[str, Any]) -> dict[str, Any]:
    """Return the learning rates, with the optimizer's name if there are several."""
    return {
        f"lr/group_{i}" if len(optimizers) == 1 else f"lr/{name}/group_{i}": group.get("lr")
        for name, optimizer in optimizers.items()
        for i, group in enumerate(optimizer.param_groups)
    }


def _why_terminated(trainer: Any, handlers: Iterable[Any]) -> str | None:
    """Return why a trainer was terminated, None if it had done all that was planned.

    Args:
        trainer: the engine that was terminated.
        handlers: its own, and those of its evaluators.
    """
    from ignite.handlers import EarlyStopping

    state = trainer.state
    planned = (state.max_epochs or 0) * (state.epoch_length or 0)
    planned = getattr(state, "max_iters", None) or planned
    if 0 < planned <= state.iteration:
        return None
    for h in handlers:
        if isinstance(h, EarlyStopping) and h.trainer is trainer and h.counter >= h.patience:
            score = getattr(h.score_function, "__name__", "")
            score = score if score.isidentifier() and score != "wrapper" else "score"
            return early_stop(score, h.patience, "evaluations")
    return "terminated"
