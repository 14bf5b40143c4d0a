"""The handlers that a `BusLogger` has in common with ignite's own loggers.

They take the arguments of ignite's, give the same names, and log the same values. Where the
position is that of an epoch, the event carries the epoch, counted from 0; else it is the step.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from trainbus.events import Event, MetricsLogged, TextLogged
from trainbus.toolkit.adapters import late_class, number

_PHASES = {"train": "train", "test": "test", "val": "validation", "eval": "validation"}
_ADAPTER = "trainbus.adapters.ignite"


class _Output:
    """Logs metrics, outputs and attributes of an engine: `OutputHandler("training", "all")`."""

    tag: str
    global_step_transform: Callable[..., int]
    _setup_output_metrics_state_attrs: Callable[..., Mapping[str, Any]]

    def __call__(self, engine: Any, logger: Any, event_name: Any) -> None:
        found = self._setup_output_metrics_state_attrs(engine, log_text=True, key_tuple=False)
        at, transform = self.global_step_transform(engine, event_name), self.global_step_transform
        logger.log(engine, _events(found, _phase(self.tag), at, event_name, transform))


class _Params:
    """Logs a parameter of an optimizer's groups: `OptimizerParamsHandler(optimizer)`."""

    tag: str | None
    optimizer: Any
    param_name: str

    def __call__(self, engine: Any, logger: Any, event_name: Any) -> None:
        name = f"{self.tag}/{self.param_name}" if self.tag else self.param_name
        found = {
            f"{name}/group_{i}": group[self.param_name]
            for i, group in enumerate(self.optimizer.param_groups)
        }
        at = engine.state.get_event_attrib_value(event_name)
        logger.log(engine, _events(found, "train", at, event_name))


def _events(
    found: Mapping[str, Any],
    phase: str,
    at: int,
    event: Any,
    transform: Callable[..., int] | None = None,
) -> Iterator[Event]:
    """Yield what was found, at the epoch or step that ignite's loggers would place it at."""
    is_epoch = _counts_epochs(event, transform)
    epoch, step = (int(at) - 1 if at > 0 else None, None) if is_epoch else (None, int(at))
    values = {name: number(value) for name, value in found.items()}
    numbers = {name: value for name, value in values.items() if value is not None}
    if numbers:
        yield MetricsLogged(values=numbers, phase=phase, epoch=epoch, step=step)
    for name, value in found.items():
        if isinstance(value, str):
            yield TextLogged(key=name, text=value, epoch=epoch, step=step)


def _phase(tag: str | None) -> str:
    return next((p for start, p in _PHASES.items() if str(tag).startswith(start)), "train")


def _counts_epochs(event: Any, transform: Callable[..., int] | None) -> bool:
    """Return whether a position is an epoch; of a user's transform it is not known."""
    from ignite.engine import State

    name = getattr(transform, "__qualname__", "")
    if transform is not None and name.startswith("global_step_from_engine"):
        event = inspect.getclosurevars(transform).nonlocals.get("custom_event_name") or event
    elif transform is not None and not name.startswith("BaseOutputHandler."):
        return False
    return bool(State.event_to_attr.get(event) == "epoch")


def _base(name: str) -> type:
    from ignite.handlers import base_logger

    return getattr(base_logger, name)  # type: ignore[no-any-return]


output_handler = late_class(_ADAPTER, "OutputHandler", _Output, lambda: _base("BaseOutputHandler"))
params_handler = late_class(
    _ADAPTER, "OptimizerParamsHandler", _Params, lambda: _base("BaseOptimizerParamsHandler")
)
