"""Turns what a training loop tells its `Accelerator` into events, beside or as one of its trackers.

The library has no loop: metrics, steps and epochs are those that the program gives to `log`, and
checkpoints those of `save_state`. A run starts with the first backward pass, `log` or `save_state`
after `init_trackers`, so that a `load_state` before counts as going on with an earlier training.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import wraps
from pathlib import Path
from types import FrameType, ModuleType
from typing import TYPE_CHECKING, Any

from trainbus.errors import AttachError
from trainbus.events import (
    CheckpointSaved,
    ModelDescribed,
    ParamsUpdated,
    Resumed,
    RunStarted,
    TextLogged,
)
from trainbus.hooking import Reporter, guarded, late_class, number, version, wrap
from trainbus.interfaces import Detach, Emit

TESTED = "1.15.0"

NEEDS: tuple[str, ...] = (
    "accelerate.accelerator:Accelerator.init_trackers",
    "accelerate.accelerator:Accelerator.log",
    "accelerate.accelerator:Accelerator.end_training",
    "accelerate.accelerator:Accelerator.backward",
    "accelerate.accelerator:Accelerator.save_state",
    "accelerate.accelerator:Accelerator.load_state",
    "accelerate.accelerator:Accelerator.is_main_process",
    "accelerate.accelerator:Accelerator.process_index",
    "accelerate.accelerator:Accelerator.num_processes",
    "accelerate.accelerator:Accelerator.project_dir",
    "accelerate.tracking:GeneralTracker.start",
    "accelerate.tracking:GeneralTracker.store_init_configuration",
    "accelerate.tracking:GeneralTracker.log",
    "accelerate.tracking:GeneralTracker.finish",
    "accelerate.state:PartialState",
    "accelerate.state:is_initialized",
)

_STATES = ("backward", "save_state", "load_state")
_VALIDATION = re.compile(r"val[/_]|valid|eval[/_]")
_TEST = re.compile(r"test[/_]")


class _Hooks:
    """A tracker for `Accelerator(log_with=BusTracker(bus))`."""

    name = "trainbus"
    requires_logging_directory = False
    main_process_only = True

    pending: dict[str, Any] | None
    """Of the run that is going to start, if one is: what `init_trackers` was told of it."""
    _accelerator: Any
    _unwrap: list[Detach]
    _resumed: Resumed | None
    _paths: set[str]

    def __init__(self, bus: Any = None) -> None:
        self.report = Reporter()
        self._reset()
        super().__init__()
        if bus is not None:
            bus.attach(self)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the accelerator out: another process has its own."""
        return {"report": self.report}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.report = state["report"]
        self._reset()

    @property
    def tracker(self) -> Emit | None:
        """What the events go to; `get_tracker("trainbus", unwrap=True)` returns it."""
        return self.report.emit

    @guarded
    def start(self) -> None:
        accelerator, project = _initializing()
        if accelerator is not None:
            self.join(accelerator, *_STATES)
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
        at, epoch = _counter(step), _counter(kwargs.get("epoch", values.get("epoch")))
        phases: dict[str, dict[str, Any]] = {}
        for name, value in _flat(values):
            repeats = name in ("step", "global_step") and at is not None and number(value) == at
            if isinstance(value, str):
                self.report.tell(TextLogged(key=name, text=value, epoch=epoch, step=at))
            elif name != "epoch" and not repeats:
                phases.setdefault(_phase(name), {})[name] = value
        for phase, measured in phases.items():
            self.report.metrics(measured, phase, epoch=epoch, step=at)

    @guarded
    def finish(self) -> None:
        if self.pending:
            self._begin()
        self.report.end()
        self.pending, self._resumed = None, None

    def join(self, accelerator: Any, *methods: str) -> None:
        """Listen to calls of an accelerator's methods."""
        if accelerator is not self._accelerator:
            self.leave()
            self._accelerator = accelerator
            self._unwrap = [wrap(accelerator, m, getattr(self, f"_on_{m}")) for m in methods]

    def leave(self) -> None:
        """Listen no longer."""
        for unwrap in self._unwrap:
            unwrap()
        self._accelerator, self._unwrap = None, []

    @guarded
    def conclude(self) -> None:
        """Tell what ends the program, if something does, to the run that does not know of it."""
        error = sys.exc_info()[1]  # a bus that an exception leaves detaches while it is handled
        if error is None:
            return
        from accelerate.state import PartialState, is_initialized

        rank = PartialState().process_index if is_initialized() else 0
        if rank and isinstance(error, Exception):
            self.report.fail(error, rank=int(rank))
        elif self.pending:
            self._begin()
            self.report.fail(error)

    def _on_backward(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._begin()
        return method(*args, **kwargs)

    def _on_save_state(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        path = method(*args, **kwargs)
        self._saved(path)
        return path

    def _on_load_state(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        result = method(*args, **kwargs)
        self._loaded(*args, **kwargs)
        return result

    def _on_init_trackers(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        result = method(*args, **kwargs)
        self._initialized(*args, **kwargs)
        return result

    def _on_log(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._logged(*args, **kwargs)
        return method(*args, **kwargs)

    def _on_end_training(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.finish()
        return method(*args, **kwargs)

    @guarded
    def _initialized(self, project_name: Any, config: Any = None, init_kwargs: Any = None) -> None:
        if self._accelerator.is_main_process:
            self.pending = {"project": str(project_name), "params": dict(config or {})}

    @guarded
    def _logged(self, values: Any, step: Any = None, log_kwargs: Any = None) -> None:
        self.log(values, step, **(log_kwargs or {}).get(self.name, {}))

    @guarded
    def _saved(self, path: Any) -> None:
        self._begin()
        if not self.report.is_open:
            return
        path = str(Path(path).absolute())
        self.report.tell(
            CheckpointSaved(path=path, kind="last" if path in self._paths else "periodic")
        )
        self._paths.add(path)

    @guarded
    def _loaded(self, input_dir: Any = None, *args: Any, **kwargs: Any) -> None:
        if self.report.is_open:  # such as the best weights, for the last evaluation
            return
        folder = None
        if input_dir is not None:
            parent = Path(input_dir).expanduser().absolute().parent
            folder = str(parent.parent if parent.name == "checkpoints" else parent)
        self._resumed = Resumed(save_dir=folder)

    @guarded
    def _begin(self) -> None:
        if self.pending is None:
            return
        pending, self.pending = self.pending, None
        resumed, self._resumed = self._resumed, None
        accelerator = self._accelerator
        folder = getattr(accelerator, "project_dir", None)
        self.report.start(
            RunStarted(
                project=pending.get("project"),
                params=pending.get("params", {}) | {"accelerate": _settings(accelerator)},
                framework="accelerate",
                framework_version=version("accelerate"),
                save_dir=None if folder is None else str(folder),
                world_size=getattr(accelerator, "num_processes", 1),
                resumed=resumed,
            )
        )
        self._paths = set()
        weights = [p for model in getattr(accelerator, "_models", ()) for p in model.parameters()]
        # These have a part of the weights in each process.
        if weights and not re.search("FSDP|DEEPSPEED|MEGATRON", accelerator.distributed_type.value):
            self.report.tell(
                ModelDescribed(
                    parameters=sum(p.numel() for p in weights),
                    gradients=sum(p.numel() for p in weights if p.requires_grad),
                )
            )

    def _reset(self) -> None:
        self._accelerator, self._unwrap = None, []
        self.pending, self._resumed, self._paths = None, None, set()


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
        target.report.emit, target.report.active = emit, True
        return _detach(target)
    if not isinstance(target, Accelerator):
        raise AttachError(
            f"expected an Accelerator or a BusTracker, found {type(target).__qualname__}; "
            "attach the accelerator whose log() your loop calls"
        )
    for own in target.log_with:
        if isinstance(own, _Hooks) and own.report.active:
            own.join(target, *_STATES)  # the program's own tracker is told the rest
            return own.leave
    # What is among the accelerator's trackers can be taken for one of those the program knows.
    hooks = _Hooks()
    hooks.report.emit = emit
    hooks.join(target, *_STATES, "init_trackers", "log", "end_training")
    if target.is_main_process:
        hooks.pending = {}  # `init_trackers` may have been called before
    return _detach(hooks)


def hook(module: ModuleType, attach: Callable[[object], object]) -> None:
    """Have every accelerator attached whose `init_trackers` is called.

    Args:
        module: `accelerate.accelerator`.
        attach: attaches an accelerator.
    """
    init_trackers = module.Accelerator.init_trackers
    if hasattr(init_trackers, "is_trainbus"):
        return

    @wraps(init_trackers)
    def hooked(self: Any, *args: Any, **kwargs: Any) -> Any:
        is_attached = "init_trackers" in vars(self)
        if not is_attached and not any(isinstance(own, _Hooks) for own in self.log_with):
            attach(self)
            if "init_trackers" in vars(self):  # it comes back here
                return self.init_trackers(*args, **kwargs)
        return init_trackers(self, *args, **kwargs)

    hooked.is_trainbus = True  # type: ignore[attr-defined]
    module.Accelerator.init_trackers = hooked


def _detach(hooks: _Hooks) -> Detach:
    def detach() -> None:
        if hooks.report.active:
            hooks.conclude()
            hooks.report.active = hooks.report.is_open = False
        hooks.leave()

    return detach


def _initializing() -> tuple[Any, str | None]:
    """Return the accelerator that starts its trackers, and the project: it passes on neither."""
    from accelerate import Accelerator

    frame: FrameType | None = sys._getframe()
    while frame is not None:
        caller = frame.f_locals.get("self") if frame.f_code.co_name == "init_trackers" else None
        if isinstance(caller, Accelerator):
            project = frame.f_locals.get("project_name")
            return caller, None if project is None else str(project)
        frame = frame.f_back
    return None, None


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


def _flat(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}/{key}", inner) for key, inner in value.items())
        else:
            yield str(name), value


def _phase(name: str) -> str:
    return "validation" if _VALIDATION.match(name) else "test" if _TEST.match(name) else "train"


def _counter(value: Any) -> int | None:
    """Return a whole number from 0 as an int, None for anything else."""
    found = number(value)
    return int(found) if found is not None and found.is_integer() and found >= 0 else None


def _general_tracker() -> type:
    from accelerate.tracking import GeneralTracker

    return GeneralTracker  # type: ignore[no-any-return]


_make_tracker = late_class(__name__, "BusTracker", _Hooks, _general_tracker)

if TYPE_CHECKING:
    BusTracker: Any
else:

    def __getattr__(name: str) -> Any:
        if name == "BusTracker":
            return _make_tracker()
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
