"""What is found out about a net of skorch: its configuration, its goals, why it stopped."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trainbus.distributed import current_rank
from trainbus.events import Resumed, RunStarted
from trainbus.toolkit.adapters import version


def callbacks_of(net: Any) -> list[Any]:
    """Return the callbacks of an initialized net, in the order in which they are called."""
    return [callback for _, callback in net.callbacks_]


def started(net: Any, step: int, without: type) -> RunStarted:
    """Return the start of a net's training.

    Args:
        net: is initialized.
        step: the batches done in its history.
        without: type of the callbacks that are left out of its parameters.
    """
    accelerator = getattr(net, "accelerator", None)
    return RunStarted(
        params={
            name: _plain(value)
            for name, value in net.get_params().items()
            if name != "callbacks" and not isinstance(value, without)
        },
        framework="skorch",
        framework_version=version("skorch"),
        save_dir=_save_dir(net),
        world_size=int(getattr(accelerator, "num_processes", 1)),
        task=_task(net),
        resumed=_resumed(net, step),
        goals={
            name: "min" if callback.lower_is_better else "max"
            for name, callback in scorings(net)
            if callback.lower_is_better is not None
        },
    )


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, str | int | float | Mapping | list | tuple):
        return value
    name = getattr(value, "__qualname__", None)  # a class or a function
    return name or re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def _task(net: Any) -> str | None:
    tags = getattr(net, "__sklearn_tags__", None)
    kind = None if tags is None else tags().estimator_type
    return None if kind is None else str(kind)


def _save_dir(net: Any) -> str | None:
    folders = (getattr(callback, "dirname", "") for callback in callbacks_of(net))
    return next((absolute(folder) for folder in folders if folder), None)


def _resumed(net: Any, step: int) -> Resumed | None:
    """Return where a net with a history goes on, and from which folder's files."""
    if not net.history:
        return None
    loaded = [cb.checkpoint for cb in callbacks_of(net) if type(cb).__name__ == "LoadInitState"]
    folder = next((absolute(cb.dirname) for cb in loaded if cb.dirname), None)
    return Resumed(epoch=len(net.history) - 1, step=step, save_dir=folder)


def scorings(net: Any) -> Iterator[tuple[str, Any]]:
    """Yield the callbacks that write a score into the history, by its name there."""
    for callback in callbacks_of(net):
        name = getattr(callback, "name_", getattr(callback, "name", None))
        is_scoring = hasattr(callback, "lower_is_better") and hasattr(callback, "on_train")
        if isinstance(name, str) and is_scoring:
            yield name, callback


def rates(net: Any) -> dict[str, Any]:
    """Return the learning rate of each group of parameters."""
    groups: Any = getattr(getattr(net, "optimizer_", None), "param_groups", ())
    if len(groups) == 1:
        return {"lr": groups[0]["lr"]}
    return {f"lr/{index}": group["lr"] for index, group in enumerate(groups)}


def why_stopped(net: Any) -> str | None:
    """Return what stopped a training, if it was skorch's own early stopping."""
    from skorch.callbacks import EarlyStopping

    for callback in callbacks_of(net):
        if isinstance(callback, EarlyStopping) and callback.misses_ == callback.patience:
            return f"early stop: no better {callback.monitor} in {callback.patience} epochs"
    return None


def rank(net: Any) -> int:
    """Return the rank of this process: its accelerator's, else torch's or a launcher's."""
    found = getattr(getattr(net, "accelerator", None), "process_index", None)
    return current_rank() if found is None else int(found)


def absolute(path: str) -> str:
    """Return a path as it is from everywhere; links in it stay."""
    return str(Path(path).absolute())
