"""Turns what a training loop tells its `Accelerator` into events, beside or as one of its trackers.

The library has no loop: metrics, steps and epochs are those that the program gives to `log`, and
checkpoints those of `save_state`. A run starts with the first backward pass, `log` or `save_state`
after `init_trackers`, so that a `load_state` before counts as going on with an earlier training.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from trainbus.errors import AttachError
from trainbus.events import (
    CheckpointSaved,
    ImageLogged,
    ParamsUpdated,
    Resumed,
    RunStarted,
    TableLogged,
    TextLogged,
)
from trainbus.interfaces import Detach, Emit
from trainbus.toolkit.adapters import Reporter, described, guarded, late_class, patch, version

from ._accelerate_calls import Calls, Told, is_attached
from ._accelerate_facts import initializing, process_index, save_dir_of, settings, weights
from ._accelerate_values import counter, phases, pictures, table, texts

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


class _Hooks:
    """A tracker for `Accelerator(log_with=BusTracker(bus))`."""

    name = "trainbus"
    requires_logging_directory = False
    main_process_only = True

    def __init__(self, bus_or_name: Any = None, /, *, bus: Any = None) -> None:
        self.report = Reporter()
        self.pending: dict[str, Any] | None = None
        """Of the run that is going to start, if one is: what `init_trackers` was told of it."""
        self.calls = Calls()
        self.joined_by: Emit | None = None
        self.resumed: Resumed | None = None
        """Where the run that is going to start goes on."""
        self._paths: set[str] = set()
        super().__init__()
        # accelerate gives the name of the project to a class that is registered.
        is_name = isinstance(bus_or_name, str)
        self._bus = bus if is_name or bus_or_name is None else bus_or_name
        if self._bus is not None:
            self._bus.attach(self)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the accelerator out: another process has its own."""
        return {"report": self.report}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]
        self.report = state["report"]

    @property
    def tracker(self) -> Emit | None:
        """What the events go to; `get_tracker("trainbus", unwrap=True)` returns it."""
        return self.report.emit

    @guarded
    def start(self) -> None:
        accelerator, project = initializing()
        is_busy = self.pending is not None or self.report.is_open
        if is_busy and self._bus is not None and accelerator not in (None, self.calls.accelerator):
            twin = _make_tracker()(self._bus)  # each accelerator has a run of its own
            trackers = accelerator.trackers
            trackers[:] = [twin if each is self else each for each in trackers]
            twin.start()
            return
        if self.report.emit is None and not is_attached(accelerator):
            logger.warning(
                "the tracker 'trainbus' logs nothing, it has no bus: call "
                "init_trackers(…, init_kwargs={'trainbus': {'bus': bus}}), or "
                "bus.attach(accelerator) before it"
            )
        if self.report.emit is None:
            return
        if accelerator is not None:
            self.join(accelerator)
            # `init_trackers` adds what is there already, and each would be told of everything.
            places = [i for i, t in enumerate(accelerator.trackers) if t is self]
            for place in reversed(places[1:]):
                del accelerator.trackers[place]
        self.pending = {"project": project, "params": {}}

    @guarded
    def store_init_configuration(self, values: Mapping[str, Any]) -> None:
        if self.pending is None:
            self.report.tell(ParamsUpdated(params=dict(values)))
        else:
            self.pending["params"] = dict(values)

    @guarded
    def log(self, values: Mapping[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self._begin()
        at, epoch = counter(step), counter(kwargs.get("epoch", values.get("epoch")))
        for name, text in texts(values):
            self.report.tell(TextLogged(key=name, text=text, epoch=epoch, step=at))
        for phase, measured in phases(values, at).items():
            self.report.metrics(measured, phase, epoch=epoch, step=at)

    @guarded
    def log_images(self, values: Mapping[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Log pictures, each value of which is a list of them or an array (N, H, W, C)."""
        self._begin()
        at, epoch = counter(step), counter(kwargs.get("epoch"))
        is_chw = kwargs.get("dataformats") == "NCHW"
        for key, array in pictures(values, is_chw=is_chw):
            self.report.tell(ImageLogged(key=key, array=array, epoch=epoch, step=at))

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
        names, rows = table(columns, data, dataframe)
        at, epoch = counter(step), counter(kwargs.get("epoch"))
        self.report.tell(
            TableLogged(key=table_name, columns=names, rows=rows, epoch=epoch, step=at)
        )

    @guarded
    def finish(self) -> None:
        if self.pending:
            self._begin()
        self.report.end()
        self.pending, self.resumed = None, None

    def join(self, accelerator: Any, *, is_tracker: bool = True) -> None:
        """Listen to what accelerate does not tell its trackers, and to the rest if this is none."""
        before: dict[str, Told] = {"backward": self._begin}
        after: dict[str, Told] = {"save_state": self._saved, "load_state": self._loaded}
        if not is_tracker:
            before |= {"log": self._logged, "end_training": self.finish}
            after |= {"init_trackers": self._initialized}
        self.calls.join(accelerator, before, after)

    def detach(self) -> None:
        """Tell what ends the run, if something does, and nothing more."""
        if self.report.active:
            self._conclude()
            self.report.active = self.report.is_open = False
        self.calls.leave()

    @guarded
    def _conclude(self) -> None:
        """Tell what ends the program, if something does, to the run that does not know of it."""
        error = sys.exc_info()[1]  # a bus that an exception leaves detaches while it is handled
        if error is None:
            return
        rank = process_index()
        if rank and isinstance(error, Exception):
            self.report.fail(error, rank=rank)
        elif self.pending:
            self._begin()
            self.report.fail(error)

    @guarded
    def _initialized(
        self, _: None, /, project_name: Any, config: Any = None, init_kwargs: Any = None
    ) -> None:
        accelerator = self.calls.accelerator
        for own in accelerator.trackers:
            if isinstance(own, _Hooks) and own.report.active and own.report.emit is not None:
                own.resumed = self.resumed or own.resumed
                self.pending = None  # the tracker, which came after this, is told all
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
        self.report.tell(CheckpointSaved(path=path, kind=kind))
        self._paths.add(path)

    @guarded
    def _loaded(self, _: None, /, input_dir: Any = None, *args: Any, **kwargs: Any) -> None:
        if not self.report.is_open:  # else it is such as the best weights, for the last evaluation
            self.resumed = Resumed(save_dir=save_dir_of(input_dir))

    @guarded
    def _begin(self, *args: Any, **kwargs: Any) -> None:
        if self.pending is None:
            return
        pending, self.pending = self.pending, None
        resumed, self.resumed = self.resumed, None
        accelerator = self.calls.accelerator
        folder = getattr(accelerator, "project_dir", None)
        self.report.start(
            RunStarted(
                project=pending.get("project"),
                params=pending.get("params", {}) | {"accelerate": settings(accelerator)},
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
        if parameters := weights(accelerator):
            self.report.tell(described(parameters))


def attach(target: Any, emit: Emit) -> Detach:
    """Listen to an `Accelerator`, before or after its `init_trackers`.

    Args:
        target: the accelerator whose `log` the loop calls, or a `BusTracker` for one.
        emit: where the events go.

    Returns:
        A function that ends it.

    Raises:
        AttachError: the object is neither.
    """
    from accelerate import Accelerator

    if isinstance(target, _Hooks):
        return target.report.connect(emit, target.detach)
    if not isinstance(target, Accelerator):
        raise AttachError(
            f"expected an Accelerator or a BusTracker, found {type(target).__qualname__}; "
            "attach the accelerator whose log() your loop calls"
        )
    for own in target.log_with:
        if isinstance(own, _Hooks) and own.report.active:
            own.join(target)  # the program's own tracker is told the rest
            own.joined_by = emit  # has the way out, as long as the tracker lives
            return own.calls.leave
    # What is among the accelerator's trackers can be taken for one of those the program knows.
    hooks = _Hooks()
    hooks.report.connect(emit)
    hooks.join(target, is_tracker=False)
    if target.is_main_process:
        hooks.pending = {}  # `init_trackers` may have been called before
    return hooks.detach


def hook(module: ModuleType, attach: Callable[[object], object]) -> None:
    """Have every accelerator attached whose `init_trackers` is called.

    Args:
        module: `accelerate.accelerator`.
        attach: attaches an accelerator.
    """

    def around(init_trackers: Callable[..., Any], own: Any, *args: Any, **kwargs: Any) -> Any:
        is_attached = "init_trackers" in vars(own)
        if not is_attached and not any(isinstance(each, _Hooks) for each in own.log_with):
            attach(own)
            if "init_trackers" in vars(own):  # it comes back here
                return own.init_trackers(*args, **kwargs)
        return init_trackers(own, *args, **kwargs)

    patch(module.Accelerator, "init_trackers", around)


def _general_tracker() -> type:
    from accelerate.tracking import GeneralTracker

    return GeneralTracker  # type: ignore[no-any-return]


_make_tracker = late_class(__name__, "BusTracker", _Hooks, _general_tracker)


def __getattr__(name: str) -> Any:
    if name == "BusTracker":
        return _make_tracker()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
