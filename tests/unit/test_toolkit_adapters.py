"""The base of adapters: wrapped methods, guarded hooks, and the reporter of runs."""

from __future__ import annotations

import collections
import copy
import functools
import gc
import inspect
import logging
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec import structs

from trainbus import SinkError
from trainbus.distributed import current_rank
from trainbus.events import (
    Best,
    CheckpointSaved,
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
    Hooks,
    Origin,
    Reporter,
    after,
    argument,
    arounds_of,
    before,
    best_of,
    described,
    early_stop,
    guarded,
    late_class,
    lazy,
    number,
    numbers,
    patch,
    phase_of,
    tracker_of,
    users_of,
    variables_of,
    with_argument,
    wrap,
    wrong_target,
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
def test_two_wrappers_come_off_in_any_order(order: str) -> None:
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


class Failing:
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


def test_a_hook_that_raises_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    """Its error never reaches the training."""
    hooks = Failing()
    for _ in range(3):
        assert hooks.on_end(ValueError("no")) is None
    (text,) = (record.getMessage() for record in caplog.records)
    logged = f"hook on_end in {__name__} raised; its events were not recorded: ValueError: no ("
    assert text.startswith(f"{logged}{__file__}:")


@pytest.mark.parametrize("error", [SinkError("no"), KeyboardInterrupt(), SystemExit()])
def test_what_is_to_stop_a_training_stops_it(error: BaseException) -> None:
    """The error of a required sink, Ctrl-C and an exit pass."""
    with pytest.raises(type(error)):
        Failing().on_end(error)


# Reports ------------------------------------------------------------------------------------------


def test_a_run_is_recorded_in_a_few_calls() -> None:
    """Plain numbers and counters, whatever types the framework has; nothing after the end."""
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


def test_values_that_are_no_numbers_are_recorded_as_what_they_are() -> None:
    """Strings, nested values, vectors and matrices; what can't be recorded is reported."""
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
    """An exception passes through unchanged; the epoch it interrupted does not end."""
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
    """It is looked up when the error is raised."""
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
    """Events go to the second bus, no longer to the first."""
    first, second = Heard(), Heard()
    report = Reporter()
    report.connect(first)()
    report.start(RunStarted())
    report.connect(second)
    report.start(RunStarted())
    assert ([], 1) == (first.events, len(second.events))


def test_a_run_of_one_bus_does_not_continue_in_another() -> None:
    """A callback that is connected to a second bus starts a new run there."""
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


def test_another_rank_records_only_its_failure() -> None:
    """Rank 0 has the run."""
    heard, error = Heard(), ValueError("no")

    def train() -> None:
        raise error

    with pytest.raises(ValueError, match="no"):
        Reporter(heard).watch(lambda: 2)(train)
    assert ([], [(2, error)]) == (heard.events, heard.failures)


def test_a_reporter_that_is_detached_is_silent() -> None:
    """Hooks that a framework keeps after a detach emit nothing."""
    heard = Heard()
    report = Reporter(heard)
    report.active = False
    report.start(RunStarted())
    report.fail(ValueError("no"), rank=1)
    assert ([], []) == (heard.events, heard.failures)


@pytest.mark.parametrize(("every", "expected"), [(None, []), (1, [1, 2, 3, 4]), (2, [2, 4])])
def test_steps_are_wanted_by_sinks(every: int | None, expected: list[int]) -> None:
    """A sink asks for step values by `every`; only an open run has any."""
    report = Reporter(Heard(every))
    assert not report.wants_step(2)
    report.start(RunStarted())
    assert expected == [step for step in range(1, 5) if report.wants_step(step)]


def test_what_is_no_number_is_none() -> None:
    """Tensors and numpy scalars are numbers, strings and vectors are not."""
    given = (1, True, np.float32(0.5), np.ones(1), "1", None, np.ones(2))
    assert [1.0, 1.0, 0.5, 1.0, None, None, None] == [number(value) for value in given]


class Mixin:
    """Hooks."""


def test_a_late_class_is_made_once() -> None:
    """Its module and name are set, so that it can be pickled."""
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
    """The warning says how to pass one; training continues."""

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
    """A tensor with a size."""

    def __init__(self, size: int, *, requires_grad: bool) -> None:
        self.size = size
        self.requires_grad = requires_grad

    def numel(self) -> int:
        """Return the number of elements."""
        return self.size


def test_parameters_are_counted_once() -> None:
    """Parameters that two models share count once."""
    free, frozen = Parameter(3, requires_grad=True), Parameter(4, requires_grad=False)
    expected = ModelDescribed(parameters=7, gradients=3, layers=2)
    assert expected == described([free, frozen, free], layers=2)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [({}, 0), ({"RANK": "3", "LOCAL_RANK": "1"}, 3), ({"LOCAL_RANK": "1"}, 1), ({"RANK": "-1"}, 0)],
)
def test_a_launcher_sets_the_rank(
    variables: dict[str, str], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its variables are set before torch is distributed."""
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
        if name in variables:
            monkeypatch.setenv(name, variables[name])
    assert expected == current_rank()


# Objects that are not kept alive -----------------------------------------------------------------


def test_a_wrapper_keeps_no_object_alive() -> None:
    """The function that unwraps does not refer to the object."""
    model = Model()
    found = weakref.ref(model)
    detach = wrap(model, "fit", Reporter().watch())
    del model
    gc.collect()
    assert found() is None
    detach()


def test_all_wrappers_of_a_method_are_found() -> None:
    """The outermost comes first; unwrapped ones are gone."""
    model = Model()
    arounds = [counting([], name) for name in "abc"]
    detach = [wrap(model, "fit", around) for around in arounds]
    assert arounds[::-1] == list(arounds_of(model, "fit"))
    detach[1]()
    assert [arounds[2], arounds[0]] == list(arounds_of(model, "fit"))
    assert [] == list(arounds_of(Model(), "fit"))


def test_what_a_user_wrapped_around_a_wrapped_method_stays() -> None:
    """A decorator that copied the wrapper's attributes is not removed."""
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


# What several adapters share ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("own", "others", "expected"),
    [
        (Origin.ATTACH, [Origin.USER], True),
        (Origin.HOOK, [Origin.ATTACH], True),
        (Origin.USER, [Origin.ATTACH, Origin.USER], False),
        (Origin.ATTACH, [], False),
    ],
)
def test_of_several_callbacks_the_highest_origin_reports(
    own: Origin, others: list[Origin], expected: bool
) -> None:
    """One that is detached counts for nothing; a copy keeps its origin."""
    reports = [Reporter(origin=each) for each in others]
    report = pickle.loads(pickle.dumps(Reporter(origin=own)))
    assert expected is report.yields_to(reports)
    for each in reports:
        each.active = False
    assert not report.yields_to(reports)


class Callback(Hooks):
    """Hooks that keep something of a run."""

    def reset(self) -> None:
        self.batches = 0


def test_hooks_are_copied_without_their_run() -> None:
    """A copy reports to the same bus, with the same origin."""
    hooks = Callback(origin=Origin.ATTACH)
    hooks.batches = 3
    hooks.report.connect(Heard())
    hooks.report.start(RunStarted())
    copied = pickle.loads(pickle.dumps(hooks))
    assert (0, Origin.ATTACH) == (copied.batches, copied.report.origin)
    assert (True, False) == (hooks.report.is_open, copied.report.is_open)


def test_hooks_attach_themselves_to_a_bus() -> None:
    """`BusCallback(bus)` is `bus.attach(BusCallback())`."""

    attached: list[object] = []

    class Bus:
        def attach(self, target: object) -> None:
            attached.append(target)

    hooks = Callback(Bus())
    assert [hooks] == attached


def test_callbacks_of_the_user_are_found() -> None:
    """By class and origin."""
    own, added = Callback(), Callback(origin=Origin.ATTACH)
    assert [own] == users_of([added, object(), own, Hooks()], Callback)


def test_saved_files_become_final_at_the_end(tmp_path: Path) -> None:
    """The newest file of each slot, if it is still there; what was final is not repeated."""
    heard = Heard()
    report = Reporter(heard)
    report.start(RunStarted())
    names = ("one", "two", "last", "gone", "kept", "again")
    one, two, last, gone, kept, again = (
        CheckpointSaved(path=str(tmp_path / name), kind="best") for name in names
    )
    for saved in (one, two, last, kept, again):
        Path(saved.path).touch()
    report.checkpoint(one, slot="best")
    report.checkpoint(two, slot="best")
    for saved in (last, gone, structs.replace(kept, kind="periodic"), again):
        report.checkpoint(saved)
    report.checkpoint(structs.replace(again, final=True))
    report.end()
    *before_end, _ = heard.events
    finals = [e.path for e in before_end[-2:] if isinstance(e, CheckpointSaved) and e.final]
    assert [two.path, last.path] == finals
    assert 1 + 7 + 2 == len(before_end)


def test_files_of_a_failed_run_are_not_final(tmp_path: Path) -> None:
    """Nor are those of one run recorded again in the next one."""
    heard = Heard()
    report = Reporter(heard)
    saved = CheckpointSaved(path=str(tmp_path), kind="last")
    report.start(RunStarted())
    report.checkpoint(saved)
    report.fail(ValueError("no"))
    report.start(RunStarted())
    report.end()
    assert [saved] == [event for event in heard.events if isinstance(event, CheckpointSaved)]


@pytest.mark.parametrize("is_failed", [False, True])
def test_the_best_value_is_recorded_at_the_end(is_failed: bool) -> None:
    """It is that of the run; one that is given wins."""
    heard = Heard()
    report = Reporter(heard)
    given = Best(metric="f1", value=1.0)
    bests: list[Best | None] = []
    for best in (None, given, None):
        report.start(RunStarted())
        report.best = best_of("loss", np.float32(0.5), 3) if len(bests) < 2 else None
        if is_failed:
            report.fail(ValueError("no"), best=best)
        else:
            report.end(best=best)
        (ended,) = (event for event in heard.events if isinstance(event, RunEnded))
        bests.append(ended.best)
        heard.events.clear()
    assert [Best(metric="loss", value=0.5, epoch=3), given, None] == bests
    assert best_of("loss", None) is None


def test_a_run_is_stopped() -> None:
    """The epoch in progress does not end."""
    heard = Heard()
    report = Reporter(heard)
    report.start(RunStarted())
    report.start_epoch(0)
    report.end("interrupted", status="stopped")
    assert RunEnded(status="stopped", reason="interrupted") == heard.events[-1]
    assert [RunStarted, EpochStarted, RunEnded] == [type(event) for event in heard.events]


def test_a_reporter_knows_its_rank() -> None:
    """By the function that the adapter gave, else by the launcher."""
    heard, error = Heard(), ValueError("no")
    Reporter(heard, rank=lambda: 3).fail(error)
    assert [(3, error)] == heard.failures


def test_calls_before_and_after_a_method() -> None:
    """Both get its arguments, the one after it its result first."""
    calls: list[str] = []
    model = Model()
    wrap(model, "fit", before(lambda x, **_: calls.append(f"before {x}, {model.trained}")))
    wrap(model, "fit", after(lambda done, x, **_: calls.append(f"after {x}, {done}")))
    assert 2 == model.fit(2, weight=1.0)
    assert ["before 2, 0", "after 2, 2"] == calls


def test_arguments_of_a_call() -> None:
    """By position, by name, or not given; a function may lack the parameter."""

    def train(data: int, callbacks: Any = None) -> None:
        """Train."""

    for args, kwargs in [((1, [2]), {}), ((1,), {"callbacks": [2]})]:
        assert [2] == argument(train, "callbacks", args, kwargs)
        args, kwargs = with_argument(train, "callbacks", [3], args, kwargs)
        assert [3] == argument(train, "callbacks", args, kwargs)
        assert 1 == args[0]
    assert argument(train, "callbacks", (1,), {}) is None
    assert ((1,), {"callbacks": []}) == with_argument(train, "callbacks", [], (1,), {})
    assert argument(len, "callbacks", (1,), {}) is None


def test_variables_of_a_running_function() -> None:
    """Of the innermost call; nothing if it is not running."""

    def outer_frame(depth: int) -> dict[str, Any]:
        return variables_of(__name__, "outer_frame") if depth == 2 else outer_frame(depth + 1)

    assert 2 == outer_frame(0)["depth"]
    assert {} == variables_of(__name__, "no_such_function")
    assert {} == variables_of("no.such.module", "outer_frame")


def test_a_module_makes_its_attributes_late() -> None:
    """The base class may be named by a string; other attributes are missing as usual."""
    make = late_class(__name__, "BusCallback", Mixin, "collections:OrderedDict")
    get = lazy(__name__, BusCallback=make)
    assert (Mixin, collections.OrderedDict) == get("BusCallback").__bases__
    with pytest.raises(AttributeError, match=f"module '{__name__}' has no attribute 'other'"):
        get("other")


def test_texts_of_adapters() -> None:
    """Reasons, errors, phases and numbers read the same in all of them."""
    assert "early stop: no better loss in 3 rounds" == early_stop("loss", 3, "rounds")
    error = wrong_target(1, "a model", "attach what you call `fit()` on")
    assert "expected a model, found int; attach what you call `fit()` on" == str(error)
    phases = [phase_of(name) for name in ("Training", "learn", "test_1", "valid_0", "eval")]
    assert ["train", "train", "test", "validation", "validation"] == phases
    assert {"a": 1.0, "b": 0.5} == numbers({"a": True, "b": np.float32(0.5), "c": "1", "d": None})


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
