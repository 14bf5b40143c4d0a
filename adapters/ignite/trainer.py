"""What is found out about an ignite engine: settings, rates, numbers, ranks, and why it ended."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from trainbus.distributed import current_rank
from trainbus.events import Resumed, RunStarted
from trainbus.toolkit.adapters import number, version


def trains(engine: Any, *args: Any, **kwargs: Any) -> bool:
    """Return whether an engine is run for epochs or iterations, or goes on with such a run.

    Args:
        engine: the engine.
        *args: what its `run` is called with.
        **kwargs: what its `run` is called with.
    """
    given = (*args[1:], kwargs.get("max_epochs"), kwargs.get("max_iters"))
    state = engine.state
    many = (state.max_epochs or 0) > 1 or getattr(state, "max_iters", None) is not None
    return any(each is not None for each in given) or (state.iteration > 0 and many)


def started(
    trainer: Any,
    *,
    params: dict[str, Any],
    save_dir: str | None,
    before: str | None,
    is_cut: bool,
) -> RunStarted:
    """Return the start of a training, which goes on where its state says.

    Args:
        trainer: the engine that trains.
        params: its configuration.
        save_dir: where its checkpoints go.
        before: id of the run that it may go on with, as far as known.
        is_cut: whether it was interrupted within an epoch.
    """
    from ignite import distributed

    state = trainer.state
    finished = state.epoch - 1 - is_cut
    epoch = finished if finished >= 0 else None
    resumed = Resumed(run=before, epoch=epoch, step=int(state.iteration))
    return RunStarted(
        framework="ignite",
        framework_version=version("ignite"),
        params=params,
        save_dir=save_dir,
        world_size=int(distributed.get_world_size()),
        resumed=resumed if state.iteration else None,
    )


def logging(engine: Any) -> RunStarted:
    """Return the start of a run that handlers log into, of which no trainer is known."""
    from ignite import distributed

    return RunStarted(
        framework="ignite",
        framework_version=version("ignite"),
        params=settings(engine, {}),
        world_size=int(distributed.get_world_size()),
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


def rates(optimizers: Mapping[str, Any]) -> dict[str, Any]:
    """Return the learning rates, with the optimizer's name if there are several."""
    return {
        f"lr/group_{i}" if len(optimizers) == 1 else f"lr/{name}/group_{i}": group.get("lr")
        for name, optimizer in optimizers.items()
        for i, group in enumerate(optimizer.param_groups)
    }


def metrics(state: Any) -> dict[str, Any]:
    """Return the metrics of the trainer's own state as `train/<name>`."""
    return {f"train/{name}": value for name, value in state.metrics.items()}


def numbers(output: Any) -> dict[str, float]:
    """Return the numbers of a training function's output, which may be batches, by their names."""
    if isinstance(output, tuple):
        output = {f"output/{i}": value for i, value in enumerate(output)}
    elif not isinstance(output, Mapping):
        output = {"output": output}
    found = {f"train/{name}": number(value) for name, value in output.items()}
    return {name: value for name, value in found.items() if value is not None}


def why_terminated(trainer: Any, handlers: Iterable[Any]) -> str | None:
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
            return f"early stop: no better {score} in {h.patience} evaluations"
    return "terminated"


def rank() -> int:
    """Return the rank of this process by ignite, which knows of Horovod's and XLA's too."""
    from ignite import distributed

    if distributed.backend() is None:
        # ignite knows of no other process, but a launcher may have begun some.
        return current_rank()
    return int(distributed.get_rank())
