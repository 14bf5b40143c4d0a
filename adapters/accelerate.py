"""Emits the events of a training loop that uses an `Accelerator`, beside or as one of its trackers.

accelerate has no loop of its own: metrics, steps and epochs are those that the program passes to
`log`, and checkpoints those of `save_state`. A run starts with the first backward pass, `log` or
`save_state` after `init_trackers`, so that a `load_state` before it resumes an earlier training.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np

from trainbus import events
from trainbus.interfaces import Detach, Emit
from trainbus.toolkit.adapters import (
    Hooks,
    after,
    around_of,
    before,
    described,
    guarded,
    late_class,
    lazy,
    number,
    patch,
    variables_of,
    version,
    wrap,
    wrong_target,
)

logger = logging.getLogger("trainbus")

TESTED_VERSIONS = "1.15.0"

_CALLS = ("backward", "save_state", "load_state", "init_trackers", "log", "end_training")
_FACTS = ("is_main_process", "process_index", "num_processes", "project_dir")
_TRACKING = ("start", "store_init_configuration", "log", "finish")

REQUIRED_NAMES: tuple[str, ...] = (
    *(f"accelerate.accelerator:Accelerator.{name}" for name in (*_CALLS, *_FACTS)),
    *(f"accelerate.tracking:GeneralTracker.{name}" for name in _TRACKING),
    "accelerate.state:PartialState",
    "accelerate.state:is_initialized",
)
"""Names that the adapter uses; `trainbus doctor` checks that they exist."""

_VALIDATION = re.compile(r"val[/_]|valid|eval[/_]")
_TEST = re.compile(r"test[/_]")


def attach(target: Any, emit: Emit) -> Detach:
    """Report what a loop logs with an `Accelerator`, before or after its `init_trackers`.

    Args:
        target: the accelerator whose `log` the loop calls, or a `BusTracker` for one.
        emit: where the events go.

    Returns:
        A function that unwraps the accelerator.

    Raises:
        AttachError: the object is neither.
    """
    from accelerate import Accelerator

    if isinstance(target, _Hooks):
        return target.report.connect(emit, target.detach)
    if not isinstance(target, Accelerator):
        advice = "attach the accelerator whose log() your loop calls"
        raise wrong_target(target, "an Accelerator or a BusTracker", advice)
    for own in target.log_with:
        if isinstance(own, _Hooks) and own.report.active:
            own.wrap(target)  # the program's own tracker reports
            own.attached_emit = emit  # the attachment lasts as long as the tracker
            return own.unwrap
    # Not added to the accelerator's trackers, which the program may go through.
    hooks = _Hooks()
    hooks.report.connect(emit)
    hooks.wrap(target, is_tracker=False)
    if target.is_main_process:
        hooks.pending = {}  # `init_trackers` may have been called before
    return hooks.detach


def hook(module: ModuleType, attach: Callable[[object], object]) -> None:
    """Attach every accelerator whose `init_trackers` is called.

    Args:
        module: `accelerate.accelerator`.
        attach: attaches an accelerator.
    """

    def around(init_trackers: Callable[..., Any], own: Any, *args: Any, **kwargs: Any) -> Any:
        is_attached = "init_trackers" in vars(own)
        if not is_attached and not any(isinstance(each, _Hooks) for each in own.log_with):
            attach(own)
            if "init_trackers" in vars(own):  # the wrapped one, which calls this again
                return own.init_trackers(*args, **kwargs)
        return init_trackers(own, *args, **kwargs)

    patch(module.Accelerator, "init_trackers", around)


class _Hooks(Hooks):
    """A tracker for `Accelerator(log_with=BusTracker(bus))`."""

    name = "trainbus"
    requires_logging_directory = False
    main_process_only = True

    def __init__(self, bus_or_name: Any = None, /, *, bus: Any = None) -> None:
        # accelerate passes the name of the project to a class that is registered.
        is_name = isinstance(bus_or_name, str)
        self._bus = bus if is_name or bus_or_name is None else bus_or_name
        super().__init__(self._bus)

    def reset(self) -> None:
        self.pending: dict[str, Any] | None = None
        """Project and parameters of the run that starts next, None if `init_trackers` is due."""
        self.resumed: events.Resumed | None = None
        """What the next run resumes."""
        self.accelerator: Any = None
        """The accelerator whose methods are wrapped."""
        self.attached_emit: Emit | None = None
        self._unwraps: list[Detach] = []
        self._paths: set[str] = set()

    @property
    def tracker(self) -> Emit | None:
        """Where the events go; `get_tracker("trainbus", unwrap=True)` returns it."""
        return self.report.emit

    @guarded
    def start(self) -> None:
        call = variables_of("accelerate.accelerator", "init_trackers")
        accelerator, project = call.get("self"), call.get("project_name")
        is_busy = self.pending is not None or self.report.is_open
        if is_busy and self._bus is not None and accelerator not in (None, self.accelerator):
            twin = _bus_tracker()(self._bus)  # each accelerator has its own run
            trackers = accelerator.trackers
            trackers[:] = [twin if each is self else each for each in trackers]
            twin.start()
            return
        if self.report.emit is None and not _is_attached(accelerator):
            logger.warning(
                "the tracker 'trainbus' logs nothing, it has no bus: call "
                "init_trackers(…, init_kwargs={'trainbus': {'bus': bus}}), or "
                "bus.attach(accelerator) before it"
            )
        if self.report.emit is None:
            return
        if accelerator is not None:
            self.wrap(accelerator)
            # `init_trackers` adds this tracker once more if it is there already.
            places = [i for i, t in enumerate(accelerator.trackers) if t is self]
            for place in reversed(places[1:]):
                del accelerator.trackers[place]
        self.pending = {"project": None if project is None else str(project), "params": {}}

    @guarded
    def store_init_configuration(self, values: Mapping[str, Any]) -> None:
        if self.pending is None:
            self.report.record(events.ParamsUpdated(params=dict(values)))
        else:
            self.pending["params"] = dict(values)

    @guarded
    def log(self, values: Mapping[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self._begin()
        at, epoch = _counter(step), _counter(kwargs.get("epoch", values.get("epoch")))
        for name, text in _strings(values):
            self.report.record(events.TextLogged(key=name, text=text, epoch=epoch, step=at))
        for phase, measured in _phases(values, at).items():
            self.report.metrics(measured, phase, epoch=epoch, step=at)

    @guarded
    def log_images(self, values: Mapping[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Log images; each value is a list of them, or an array (N, H, W, C)."""
        self._begin()
        at, epoch = _counter(step), _counter(kwargs.get("epoch"))
        is_chw = kwargs.get("dataformats") == "NCHW"
        for key, array in _images(values, is_chw=is_chw):
            self.report.record(events.ImageLogged(key=key, array=array, epoch=epoch, step=at))

    @guarded
    def log_table(
        self,
        table_name: str,
        columns: Any = None,
        data: Any = None,
        dataframe: Any = None,
        step: int | None = None,
        **kwargs: Any,
    ) -> None:
        """Log a table, given as columns and rows or as a data frame."""
        self._begin()
        names, rows = _table(columns, data, dataframe)
        at, epoch = _counter(step), _counter(kwargs.get("epoch"))
        self.report.record(
            events.TableLogged(key=table_name, columns=names, rows=rows, epoch=epoch, step=at)
        )

    @guarded
    def finish(self) -> None:
        if self.pending:
            self._begin()
        self.report.end()
        self.pending, self.resumed = None, None

    def wrap(self, accelerator: Any, *, is_tracker: bool = True) -> None:
        """Wrap the methods of an accelerator that it does not report to its trackers.

        Args:
            accelerator: the accelerator; another one is unwrapped.
            is_tracker: whether this is one of its trackers; else those methods are wrapped too.
        """
        if accelerator is self.accelerator:
            return
        self.unwrap()
        self.accelerator = accelerator
        arounds = {
            "backward": before(self._begin),
            "save_state": after(self._saved),
            "load_state": after(self._loaded),
        }
        if not is_tracker:
            arounds["log"] = before(self._logged)
            arounds["end_training"] = before(self.finish)
            arounds["init_trackers"] = after(self._initialized)
        self._unwraps = [wrap(accelerator, name, around) for name, around in arounds.items()]

    def unwrap(self) -> None:
        """Unwrap the accelerator."""
        for unwrap in self._unwraps:
            unwrap()
        self.accelerator, self._unwraps = None, []

    def detach(self) -> None:
        """Record what ends the run, if something does, and stop reporting."""
        if self.report.active:
            self._conclude()
            self.report.active = self.report.is_open = False
        self.unwrap()

    @guarded
    def _conclude(self) -> None:
        """Record the exception that ends the program in a run that has no end yet."""
        error = sys.exc_info()[1]  # set if the bus is closed by an exception
        if error is None:
            return
        rank = _process_index()
        if rank and isinstance(error, Exception):
            self.report.fail(error, rank=rank)
        elif self.pending:
            self._begin()
            self.report.fail(error, rank=0)

    @guarded
    def _initialized(
        self, _: None, /, project_name: Any, config: Any = None, init_kwargs: Any = None
    ) -> None:
        accelerator = self.accelerator
        for own in accelerator.trackers:
            if isinstance(own, _Hooks) and own.report.active and own.report.emit is not None:
                own.resumed = self.resumed or own.resumed
                self.pending = None  # the tracker was added since, and gets everything
                return
        if accelerator.is_main_process:
            self.pending = {"project": str(project_name), "params": dict(config or {})}

    @guarded
    def _logged(self, values: Any, step: Any = None, log_kwargs: Any = None) -> None:
        self.log(values, step, **(log_kwargs or {}).get(self.name, {}))

    @guarded
    def _saved(self, path: Any, /, *args: Any, **kwargs: Any) -> None:
        self._begin()
        if not self.report.is_open:
            return
        path = str(Path(path).absolute())
        kind: Literal["last", "periodic"] = "last" if path in self._paths else "periodic"
        self.report.record(events.CheckpointSaved(path=path, kind=kind))
        self._paths.add(path)

    @guarded
    def _loaded(self, _: None, /, input_dir: Any = None, *args: Any, **kwargs: Any) -> None:
        if not self.report.is_open:  # else it loads weights, such as the best for an evaluation
            self.resumed = events.Resumed(save_dir=_save_dir(input_dir))

    @guarded
    def _begin(self, *args: Any, **kwargs: Any) -> None:
        if self.pending is None:
            return
        pending, self.pending = self.pending, None
        resumed, self.resumed = self.resumed, None
        accelerator = self.accelerator
        folder = getattr(accelerator, "project_dir", None)
        self.report.start(
            events.RunStarted(
                project=pending.get("project"),
                params=pending.get("params", {}) | {"accelerate": _settings(accelerator)},
                framework="accelerate",
                framework_version=version("accelerate"),
                save_dir=None if folder is None else str(folder),
                world_size=getattr(accelerator, "num_processes", 1),
                resumed=resumed,
            ),
            loggers=getattr(accelerator, "trackers", ()),
            remedy="leave its name out of log_with",
        )
        self._paths = set()
        if parameters := _weights(accelerator):
            self.report.record(described(parameters))


# What accelerate knows of a training --------------------------------------------------------------


def _is_attached(accelerator: Any) -> bool:
    """Return whether hooks that are not one of its trackers report an accelerator."""
    return accelerator is not None and around_of(accelerator, "init_trackers") is not None


def _settings(accelerator: Any) -> dict[str, Any]:
    if accelerator is None:
        return {}
    return {
        "mixed_precision": accelerator.mixed_precision,
        "gradient_accumulation_steps": accelerator.gradient_accumulation_steps,
        "distributed_type": str(accelerator.distributed_type.value),
        "num_processes": accelerator.num_processes,
        "device": str(accelerator.device),
    }


def _save_dir(state: Any) -> str | None:
    """Return the folder of the training that saved a state, None for a state without a path."""
    if state is None:
        return None
    parent = Path(state).expanduser().absolute().parent
    return str(parent.parent if parent.name == "checkpoints" else parent)


def _weights(accelerator: Any) -> list[Any]:
    """Return the weights of all models; none if they are sharded over processes."""
    models = getattr(accelerator, "_models", ())
    if not models or re.search("FSDP|DEEPSPEED|MEGATRON", accelerator.distributed_type.value):
        return []
    return [weight for model in models for weight in model.parameters()]


def _process_index() -> int:
    """Return the rank of this process, 0 if accelerate has not set it yet."""
    from accelerate.state import PartialState, is_initialized

    return int(PartialState().process_index) if is_initialized() else 0


# Values that a program logs -----------------------------------------------------------------------


def _phases(values: Mapping[str, Any], step: int | None) -> dict[str, dict[str, Any]]:
    """Return the values that are no strings or counters, by phase, which their names determine.

    Args:
        values: what was passed to `log`.
        step: the step passed to `log`, which the values may repeat.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, value in _flat(values):
        repeats = name in ("step", "global_step") and step is not None and number(value) == step
        if name != "epoch" and not repeats and not isinstance(value, str):
            found.setdefault(_phase(name), {})[name] = value
    return found


def _strings(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the names and values of strings."""
    return ((name, value) for name, value in _flat(values) if isinstance(value, str))


def _counter(value: Any) -> int | None:
    """Return a whole number >= 0 as an int, None for anything else."""
    found = number(value)
    return int(found) if found is not None and found.is_integer() and found >= 0 else None


def _images(values: Mapping[str, Any], *, is_chw: bool) -> Iterator[tuple[str, Any]]:
    """Yield names and arrays (H, W) or (H, W, C) of images that are passed to `log_images`.

    Args:
        values: name → list of arrays or PIL images, or one array of several images.
        is_chw: whether channels come before height and width.
    """
    for name, found in values.items():
        several = found if isinstance(found, list | tuple) else _array(found)
        if isinstance(several, np.ndarray) and several.ndim < 4:
            several = [several]
        arrays = [_array(each) for each in several]
        for i, array in enumerate(arrays):
            array = np.moveaxis(array, 0, -1) if is_chw and array.ndim == 3 else array
            yield (f"{name}/{i}" if len(arrays) > 1 else str(name)), array


def _table(columns: Any, data: Any, dataframe: Any) -> tuple[list[str], list[list[Any]]]:
    """Return the columns and rows of a table that is passed to `log_table`."""
    if dataframe is not None:
        columns = list(dataframe.columns)
        data = zip(*(list(dataframe[name]) for name in columns), strict=True)
    rows = [list(row) for row in (() if data is None else data)]
    if columns is None:
        columns = range(max(map(len, rows), default=0))
    return [str(name) for name in columns], rows


def _array(image: Any) -> Any:
    if hasattr(image, "detach"):  # a tensor on any device
        return image.detach().cpu().numpy()
    if hasattr(image, "convert"):  # a PIL image; its values may be indices of a palette
        image = image if image.mode in ("L", "RGB", "RGBA") else image.convert("RGB")
    return np.asarray(image)


def _flat(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}/{key}", inner) for key, inner in value.items())
        else:
            yield str(name), value


def _phase(name: str) -> str:
    return "validation" if _VALIDATION.match(name) else "test" if _TEST.match(name) else "train"


_bus_tracker = late_class(__name__, "BusTracker", _Hooks, "accelerate.tracking:GeneralTracker")
__getattr__ = lazy(__name__, BusTracker=_bus_tracker)
