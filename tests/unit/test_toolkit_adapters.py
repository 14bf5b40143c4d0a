"""What adapters have in common: wrapped methods, guarded hooks, and a run told in a few calls."""

from __future__ import annotations

import copy
import functools
import gc
import inspect
import logging
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from trainbus import SinkError
from trainbus.distributed import current_rank
from trainbus.events import (
    Best,
    EpochEnded,
    EpochStarted,
    Event,
    MetricsLogged,
    ModelDescribed,
    RunEnded,
    RunStarted,
    TableLogged,
    TextLogged,
)
from trainbus.toolkit.adapters import (
    Reporter,
    arounds_of,
    described,
    guarded,
    late_class,
    number,
    patch,
    tracker_of,
    wrap,
)


class Model:
    """Something that trains."""

    def __init__(self) -> None:
        self.trained = 0

    def fit(self, x: int, *, weight: float = 1.0) -> int:
        """Train."""
        self.trained += x
        return self.trained


class Heard:
    """An `emit` that keeps what it is given."""

    services: frozenset[str] = frozenset()
    run_id: str | None = None

    def __init__(self, every: int | None = None) -> None:
        self.events: list[Event] = []
        self.failures: list[tuple[int, BaseException]] = []
        self.left_out: list[str] = []
        self._every = every

    def __call__(self, event: Event, /) -> None:
        self.events.append(event)

    def every(self, phase: str) -> int | None:
        return self._every

    def failed_on(self, rank: int, error: BaseException) -> None:
        self.failures.append((rank, error))

    def leave_out(self, what: str) -> None:
        self.left_out.append(what)


def counting(calls: list[str], name: str) -> Callable[..., Any]:
    def around(method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        return method(*args, **kwargs)

    return around


# Wrapped methods ----------------------------------------------------------------------------------


def test_a_wrapped_method_is_the_method() -> None:
    """It does and returns the same, and says the same of itself; other objects are let be."""
    calls: list[str] = []
    model = Model()
    detach = wrap(model, "fit", counting(calls, "a"))
    assert 3 == model.fit(3, weight=2.0)
    assert ["a"] == calls
    assert inspect.signature(Model().fit) == inspect.signature(model.fit)
    assert (Model.fit.__doc__, "fit") == (model.fit.__doc__, model.fit.__name__)
    Model().fit(1)
    assert ["a"] == calls
    detach()
    detach()
    assert {"trained": 3} == vars(model)


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_two_wrappings_come_off_in_any_order(order: str) -> None:
    """Whichever is taken off first, the other one works on, and nothing is left in the end."""
    calls: list[str] = []
    model = Model()
    detach = {name: wrap(model, "fit", counting(calls, name)) for name in "ab"}
    model.fit(1)
    assert ["b", "a"] == calls
    detach[order[0]]()
    model.fit(1)
    assert ["b", "a", order[1]] == calls
    detach[order[1]]()
    assert ["trained"] == list(vars(model))


def test_a_method_of_the_users_own_comes_back() -> None:
    """What somebody put on the object before is called, and there again afterwards."""
    model = Model()

    def own(x: int) -> int:
        return -x

    model.fit = own  # type: ignore[method-assign,assignment]
    detach = wrap(model, "fit", counting([], "a"))
    assert -2 == model.fit(2)
    detach()
    assert own is model.fit


def test_a_wrapped_function_of_the_users_own_takes_what_it_took() -> None:
    """Its signature has no object in it, and any name for an argument."""
    model: Any = Model()

    def fit(x: int, method: int = 0, *, target: int = 0) -> int:
        return x + method + target

    model.fit = fit
    wrap(model, "fit", Reporter().watch())
    assert inspect.signature(fit) == inspect.signature(model.fit)
    assert 6 == model.fit(1, method=2, target=3)


def test_a_copy_trains_itself() -> None:
    """A deep copy is wrapped too, and does not train the object it was made of."""
    calls: list[str] = []
    model = Model()
    wrap(model, "fit", counting(calls, "a"))
    copied = copy.deepcopy(model)
    copied.fit(5)
    assert (["a"], 0, 5) == (calls, model.trained, copied.trained)


def own(x: int) -> int:
    return -x


def test_a_pickle_of_an_object_with_a_function_of_the_users_own() -> None:
    """A wrapped function is pickled by the name of the method that it stands for."""
    model = Model()
    model.fit = own  # type: ignore[method-assign,assignment]
    wrap(model, "fit", counting([], "a"))
    assert 3 == pickle.loads(pickle.dumps(model)).fit(3)


def test_a_pickle_has_nothing_of_ours() -> None:
    """What is loaded from a pickle is the plain object."""
    model = Model()
    wrap(model, "fit", Reporter(Heard()).watch())
    data = pickle.dumps(model)
    assert b"trainbus" not in data
    assert 4 == pickle.loads(data).fit(4)


# Hooks --------------------------------------------------------------------------------------------


class Hooks:
    @guarded
    def on_end(self, error: BaseException) -> str:
        raise error


def test_a_class_is_patched_once() -> None:
    """For all objects, those of a class below too, and with the method's own signature."""

    class Patched(Model):
        pass

    class Below(Patched):
        def fit(self, x: int, *, weight: float = 1.0) -> int:
            return super().fit(2 * x)

    calls: list[str] = []
    patch(Patched, "fit", counting(calls, "first"))
    patch(Patched, "fit", counting(calls, "second"))
    patch(Below, "fit", counting(calls, "below"))
    assert (3, ["first"]) == (Patched().fit(3), calls)
    assert (6, ["first", "below", "first"]) == (Below().fit(3), calls)
    assert inspect.signature(Model.fit) == inspect.signature(Patched.fit)
    assert 1 == Model().fit(1)
    assert 3 == len(calls)


def test_a_function_below_a_patched_one_is_patched_too() -> None:
    """A class that has its method from the class above gets a layer of its own."""

    class Above(Model):
        pass

    class Below(Above):
        pass

    calls: list[str] = []
    patch(Above, "fit", counting(calls, "above"))
    patch(Below, "fit", counting(calls, "below"))
    Below().fit(1)
    assert ["below", "above"] == calls


def test_what_goes_wrong_in_a_hook_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    """The training sees nothing of it."""
    hooks = Hooks()
    for _ in range(3):
        assert hooks.on_end(ValueError("no")) is None
    (text,) = (record.getMessage() for record in caplog.records)
    said = f"on_end of {__name__} went wrong, its events are missing: ValueError: no ({__file__}:"
    assert text.startswith(said)


@pytest.mark.parametrize("error", [SinkError("no"), KeyboardInterrupt(), SystemExit()])
def test_what_is_to_stop_a_training_stops_it(error: BaseException) -> None:
    """A sink that is demanded, Ctrl-C and an exit are not kept back."""
    with pytest.raises(type(error)):
        Hooks().on_end(error)


# Reports ------------------------------------------------------------------------------------------


def test_a_run_is_told_in_a_few_calls() -> None:
    """Plain numbers and counters, whatever the framework hands over; nothing after the end."""
    heard = Heard()
    report = Reporter(heard)
    report.metrics({"early": 1.0}, "train")
    report.start(RunStarted(name="a"))
    report.start_epoch(np.int64(0))  # type: ignore[arg-type]
    report.metrics({"loss": np.float32(0.5), "none": None}, "train", epoch=0, step=np.int64(3))  # type: ignore[arg-type]
    report.metrics({"none": None}, "train", epoch=0)
    report.end("early stop: it was enough")
    report.end()
    started, begun, metrics, over, ended = heard.events
    assert isinstance(over, EpochEnded)
    assert [RunStarted(name="a"), EpochStarted(epoch=0)] == [started, begun]
    assert MetricsLogged(values={"loss": 0.5}, phase="train", epoch=0, step=3) == metrics
    assert (int, int) == (type(metrics.epoch), type(metrics.step))
    assert RunEnded(status="finished", reason="early stop: it was enough") == ended
    assert (None, 0) == (report.epoch, report.last_epoch)


def test_what_is_no_number_is_told_as_what_it_is() -> None:
    """Texts, deeper values, vectors and matrices reach the bus; what can't be recorded is named."""
    heard = Heard()
    report = Reporter(heard)
    report.start(RunStarted())
    values = {
        "f1": 0.5,
        "per class": {"cat": 0.1, "dog": {"small": np.float32(0.5)}},
        "prec": np.array([0.25, 0.75]),
        "confusion": [[1, 2], [3, 4]],
        "label": "good",
        "nothing": None,
        "raw": b"x",
    }
    report.metrics(values, "validation", epoch=np.int64(1))  # type: ignore[arg-type]
    numbers = {"f1": 0.5, "per class/cat": 0.1, "per class/dog/small": 0.5}
    numbers |= {"prec/0": 0.25, "prec/1": 0.75}
    assert [
        MetricsLogged(values=numbers, phase="validation", epoch=1),
        TableLogged(key="confusion", columns=["0", "1"], rows=[[1, 2], [3, 4]], epoch=1),
        TextLogged(key="label", text="good", epoch=1),
    ] == heard.events[1:]
    hint = "bytes is no value: log a picture by its path or array, a file as an artifact"
    assert [f"'raw': {hint}"] == heard.left_out


@pytest.mark.parametrize(
    ("error", "status"), [(ValueError("no"), "failed"), (KeyboardInterrupt(), "stopped")]
)
def test_a_watched_call_ends_the_run(error: BaseException, status: str) -> None:
    """An exception passes through unchanged, and the epoch that it broke off does not end."""
    heard = Heard()
    report = Reporter(heard)

    def train() -> None:
        report.start(RunStarted())
        report.start_epoch(0)
        raise error

    with pytest.raises(type(error)) as raised:
        report.watch()(train)
    assert error is raised.value
    *_, ended = heard.events
    assert isinstance(ended, RunEnded)
    assert status == ended.status
    assert [RunStarted, EpochStarted, RunEnded] == [type(event) for event in heard.events]


def test_a_watched_call_that_fails_has_its_best() -> None:
    """It is asked for when the error comes."""
    heard, best = Heard(), Best(metric="loss", value=0.5)
    report = Reporter(heard)

    def train() -> None:
        report.start(RunStarted())
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        report.watch(best=lambda: best)(train)
    *_, ended = heard.events
    assert isinstance(ended, RunEnded)
    assert best == ended.best


def test_a_callback_is_connected_again_after_a_detach() -> None:
    """A second bus hears what the first one does no longer."""
    first, second = Heard(), Heard()
    report = Reporter()
    report.connect(first)()
    report.start(RunStarted())
    report.connect(second)
    report.start(RunStarted())
    assert ([], 1) == (first.events, len(second.events))


def test_a_run_of_one_bus_does_not_go_on_in_another() -> None:
    """A callback that is given to a second bus begins there anew; the first has let go of it."""
    first, second = Heard(), Heard()
    report = Reporter()
    released: list[str] = []
    detach = report.connect(first, lambda: released.append("first"))
    report.start(RunStarted())
    again = report.connect(second, lambda: released.append("second"))
    report.metrics({"loss": 1.0}, "train")
    assert [] == second.events
    detach()
    report.start(RunStarted())
    assert [RunStarted()] == second.events
    again()
    assert ["second"] == released
    assert not report.active


def test_another_rank_tells_its_failure_alone() -> None:
    """Rank 0 has the run."""
    heard, error = Heard(), ValueError("no")

    def train() -> None:
        raise error

    with pytest.raises(ValueError, match="no"):
        Reporter(heard).watch(lambda: 2)(train)
    assert ([], [(2, error)]) == (heard.events, heard.failures)


def test_a_reporter_that_is_detached_is_silent() -> None:
    """Hooks that a framework keeps after a detach say nothing."""
    heard = Heard()
    report = Reporter(heard)
    report.active = False
    report.start(RunStarted())
    report.fail(ValueError("no"), rank=1)
    assert ([], []) == (heard.events, heard.failures)


@pytest.mark.parametrize(("every", "expected"), [(None, []), (1, [1, 2, 3, 4]), (2, [2, 4])])
def test_steps_are_wanted_by_sinks(every: int | None, expected: list[int]) -> None:
    """Step values are asked for by `every`, and while a run is open."""
    report = Reporter(Heard(every))
    assert not report.wants_step(2)
    report.start(RunStarted())
    assert expected == [step for step in range(1, 5) if report.wants_step(step)]


def test_what_is_no_number_is_none() -> None:
    """Tensors and numpy scalars are numbers, texts and vectors are not."""
    given = (1, True, np.float32(0.5), np.ones(1), "1", None, np.ones(2))
    assert [1.0, 1.0, 0.5, 1.0, None, None, None] == [number(value) for value in given]


class Mixin:
    """Hooks."""


def test_a_late_class_is_made_once() -> None:
    """It bears its module's name, so that it can be pickled by it."""
    asked = []

    def base() -> type:
        asked.append(1)
        return Model

    make = late_class(__name__, "BusCallback", Mixin, base)
    assert [] == asked
    made = make()
    assert made is make()
    assert (1, "Hooks.") == (len(asked), made.__doc__)
    assert (Mixin, Model) == made.__bases__
    assert (__name__, "BusCallback") == (made.__module__, made.__qualname__)


def test_a_callback_without_a_bus_says_so(caplog: pytest.LogCaptureFixture) -> None:
    """Who forgot the bus is told how to give it, and training goes on."""

    class Lonely:
        def __init__(self) -> None:
            self.report = Reporter()

        @guarded
        def on_start(self) -> None:
            self.report.start(RunStarted())

    with caplog.at_level(logging.WARNING):
        Lonely().on_start()
    assert "this callback has no bus: make it with one" in caplog.text


class Parameter:
    """A tensor, as far as it is counted."""

    def __init__(self, size: int, *, requires_grad: bool) -> None:
        self.size = size
        self.requires_grad = requires_grad

    def numel(self) -> int:
        """Return the number of elements."""
        return self.size


def test_parameters_are_counted_once() -> None:
    """Weights that two models share are one."""
    free, frozen = Parameter(3, requires_grad=True), Parameter(4, requires_grad=False)
    expected = ModelDescribed(parameters=7, gradients=3, layers=2)
    assert expected == described([free, frozen, free], layers=2)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [({}, 0), ({"RANK": "3", "LOCAL_RANK": "1"}, 3), ({"LOCAL_RANK": "1"}, 1), ({"RANK": "-1"}, 0)],
)
def test_a_launcher_tells_the_rank(
    variables: dict[str, str], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where torch is not distributed yet, its variables are there."""
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
        if name in variables:
            monkeypatch.setenv(name, variables[name])
    assert expected == current_rank()


# Objects that nobody keeps alive -----------------------------------------------------------------


def test_a_wrapping_keeps_no_object_alive() -> None:
    """Who holds the way out of a wrapped method does not hold the object."""
    model = Model()
    found = weakref.ref(model)
    detach = wrap(model, "fit", Reporter().watch())
    del model
    gc.collect()
    assert found() is None
    detach()


def test_all_that_stands_around_a_method_is_found() -> None:
    """The last wrapping comes first, and what was taken off is not among them."""
    model = Model()
    arounds = [counting([], name) for name in "abc"]
    detach = [wrap(model, "fit", around) for around in arounds]
    assert arounds[::-1] == list(arounds_of(model, "fit"))
    detach[1]()
    assert [arounds[2], arounds[0]] == list(arounds_of(model, "fit"))
    assert [] == list(arounds_of(Model(), "fit"))


def test_what_a_user_wrapped_around_a_wrapped_method_stays() -> None:
    """A decorator of theirs, which has taken on what the method has, is not taken off."""
    model: Any = Model()
    detach = wrap(model, "fit", counting([], "a"))
    inner = model.fit

    @functools.wraps(inner)
    def theirs(x: int) -> int:
        return -int(inner(x))

    model.fit = theirs
    detach()
    assert theirs is model.fit
    assert -2 == model.fit(2)


# Loggers of the frameworks ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "name", "service"),
    [
        ("wandb.integration.keras.callbacks.metrics_logger", "WandbMetricsLogger", "wandb"),
        ("wandb.integration.lightgbm", "_WandbCallback", "wandb"),
        ("swanlab.integration.pytorch_lightning", "SwanLabLogger", "swanlab"),
        ("transformers.integrations.integration_utils", "DVCLiveCallback", "dvclive"),
        ("accelerate.tracking", "CometMLTracker", "comet_ml"),
        ("keras.src.callbacks.tensorboard", "TensorBoard", "tensorboard"),
        ("lightning.pytorch.loggers.csv_logs", "CSVLogger", None),
        ("users_code", "WandbLogger", None),
    ],
)
def test_a_logger_is_known_by_its_class(module: str, name: str, service: str | None) -> None:
    """Of the tracker's own package, or a framework's with the tracker's name; subclasses too."""
    kind = type(name, (), {"__module__": module})
    users = type("Users", (kind,), {"__module__": "__main__"})
    assert [service, service] == [tracker_of(kind), tracker_of(users)]
