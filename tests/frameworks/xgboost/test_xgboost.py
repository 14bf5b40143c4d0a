"""The XGBoost adapter in real trainings: the suite, rounds, checkpoints, early stops, processes."""

from __future__ import annotations

import copy
import inspect
import json
import math
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import wandb
import xgboost as xgb
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV
from trainbus.adapters.xgboost import BusCallback
from xgboost import collective
from xgboost.callback import EarlyStopping, LearningRateScheduler, TrainingCheckPoint
from xgboost.tracker import RabitTracker

import trainbus
from support.feeding import feeding
from support.heard import Heard
from trainbus.events import (
    CheckpointSaved,
    EpochEnded,
    EpochStarted,
    Event,
    MetricsLogged,
    RunEnded,
    RunStarted,
    event_name,
)
from trainbus.testing import AdapterConformance, Training, check_grammar
from trainbus.testing.child import run_in_child
from trainbus.toolkit.adapters import variables_of

RNG = np.random.default_rng(0)
X = RNG.normal(size=(200, 4))
Y = (X[:, 0] + RNG.normal(size=200) > 0).astype(int)
X_TRAIN, Y_TRAIN, X_VALID, Y_VALID = X[:120], Y[:120], X[120:], Y[120:]
SETS = [(X_TRAIN, Y_TRAIN), (X_VALID, Y_VALID)]
PARAMS = {"max_depth": 2, "objective": "binary:logistic", "nthread": 1, "learning_rate": 0.3}
TASK = "XGBOOST_TASK"


class Stop(xgb.callback.TrainingCallback):  # type: ignore[misc]
    """A callback of the user's that raises, or stops the training, in a round."""

    def __init__(self, epoch: int, error: BaseException | None = None, when: str = "after") -> None:
        super().__init__()
        self.epoch, self.error, self.when = epoch, error, when

    def before_iteration(self, model: Any, epoch: int, evals_log: Any) -> bool:
        return self.when == "before" and self.in_round(epoch)

    def after_iteration(self, model: Any, epoch: int, evals_log: Any) -> bool:
        return self.when == "after" and self.in_round(epoch)

    def in_round(self, epoch: int) -> bool:
        if epoch == self.epoch and self.error is not None:
            raise self.error
        return epoch == self.epoch


class Count(xgb.callback.TrainingCallback):  # type: ignore[misc]
    """Counts the rounds that were trained."""

    trained = 0

    def after_iteration(self, model: Any, epoch: int, evals_log: Any) -> bool:
        self.trained += 1
        return False


def set_up(folder: Path, rounds: int, model: str | None = None) -> Training:
    """Return a training of a classifier that saves each round but the first."""
    folder.mkdir(parents=True, exist_ok=True)
    saver, count = TrainingCheckPoint(folder, interval=1), Count()
    classifier = xgb.XGBClassifier(
        n_estimators=rounds, max_depth=2, subsample=0.5, n_jobs=1, callbacks=[saver, count]
    )
    train = partial(classifier.fit, X_TRAIN, Y_TRAIN, eval_set=SETS, verbose=False, xgb_model=model)

    def fit() -> None:
        # Asked for when it trains: `attach` comes before it.
        classifier.fit(*train.args, **train.keywords)

    return Training(
        target=classifier,
        run=partial(in_two_processes, fit) if TASK in os.environ else fit,
        result=lambda: bytes(classifier.get_booster().save_raw()),
        fail_at=lambda error: classifier.callbacks.append(Stop(1, error)),
        epochs_trained=lambda: count.trained,
        resume=lambda: set_up(folder, 1, str(folder / "model_1.ubj")),
        stop_early=lambda: classifier.set_params(learning_rate=0.0, early_stopping_rounds=1),
    )


def in_two_processes(fit: Callable[[], None]) -> None:
    """Train as the worker of this task, beside the other one, which is a process of its own."""
    tracker = RabitTracker(n_workers=2, host_ip="127.0.0.1", sortby="task", timeout=60)
    tracker.start()
    job = json.dumps(dict(tracker.worker_args()))
    code = f"import runpy; runpy.run_path({__file__!r})['work']({job!r})"
    with subprocess.Popen([sys.executable, "-c", code]) as other:
        with collective.CommunicatorContext(**json.loads(job), dmlc_task_id=os.environ[TASK]):
            assert os.environ[TASK] == str(collective.get_rank())
            fit()
        assert 0 == other.wait()


def work(job: str) -> None:
    """Train as the other worker."""
    os.environ[TASK] = str(1 - int(os.environ[TASK]))
    with collective.CommunicatorContext(**json.loads(job), dmlc_task_id=os.environ.pop(TASK)):
        set_up(Path.cwd() / "other", 1).run()


class TestConformance(AdapterConformance):
    other_rank_env = {TASK: "1"}  # noqa: RUF012

    def start(self, folder: Path, epochs: int) -> Training:
        return set_up(folder, epochs)

    def trace(self, target: Any) -> object:
        return vars(target).keys(), list(target.callbacks), target.get_params()


def test_the_main_process_of_two_reports(tmp_path: Path) -> None:
    """Of two processes that train one model together, the first reports."""
    given = {"folder": str(tmp_path)}
    heard = run_in_child("emitted_in", TestConformance, given, cwd=tmp_path, env={TASK: "0"})
    assert ["run.started", "epoch.started"] == heard[:2]
    assert "run.ended" == heard[-1]


class TestCallbackConformance(AdapterConformance):
    """The same for the framework's own idiom; without `with`, no exception is seen."""

    test_is_silent_on_other_ranks = None  # type: ignore[assignment]  # as above

    def start(self, folder: Path, epochs: int) -> Training:
        training = set_up(folder, epochs)
        callback = BusCallback()
        training.target.callbacks.insert(0, callback)
        return Training(
            target=callback,
            run=training.run,
            result=training.result,
            fail_at=training.fail_at,
            epochs_trained=training.epochs_trained,
            stop_early=training.stop_early,
        )

    def handles(self, target: Any) -> object:
        return target


def data(valid: bool = False) -> Any:
    return xgb.DMatrix(*SETS[valid])


def record(train: Callable[[trainbus.Bus], Any]) -> list[Any]:
    """Return the events of what is trained with a bus."""
    heard = Heard()
    with heard.bus as bus:
        train(bus)
    assert not heard.records or [] == check_grammar(heard.records)
    return [record.event for record in heard.records]


def of(events: list[Any], kind: type[Any]) -> list[Any]:
    return [event for event in events if isinstance(event, kind)]


def train(bus: trainbus.Bus, rounds: int = 3, *first: Any, **options: Any) -> Any:
    """Train with the native API; `first` are callbacks before the one of the bus."""
    matrix = data()
    callbacks = [*first, BusCallback(bus), *options.pop("callbacks", ())]
    evals = [(matrix, "fitted"), (data(valid=True), "held_out"), (data(valid=True), "test")]
    return xgb.train(
        {**PARAMS, "eval_metric": ["error", "logloss"], **options.pop("params", {})},
        matrix,
        rounds,
        evals=evals,
        verbose_eval=False,
        callbacks=callbacks,
        **options,
    )


def test_metrics_are_the_frameworks_own() -> None:
    """Each round has what XGBoost itself recorded: every data set and metric, under its names."""
    history: dict[str, Any] = {}
    events = record(lambda bus: train(bus, evals_result=history))
    logged = of(events, MetricsLogged)
    phases = {"fitted": "train", "held_out": "validation", "test": "test"}
    expected = [
        (epoch, phase, {f"{name}-{m}": history[name][m][epoch] for m in ("error", "logloss")})
        for epoch in range(3)
        for name, phase in phases.items()
    ]
    assert expected == [(e.epoch, e.phase, e.values) for e in logged]
    assert {(None, False)} == {(e.step, e.final) for e in logged}


def test_a_training_without_evaluation_has_rounds() -> None:
    """Without data sets to evaluate on there are epochs, and no metrics."""
    events = record(lambda bus: xgb.train(PARAMS, data(), 2, callbacks=[BusCallback(bus)]))
    names = ["run.started", *["epoch.started", "epoch.ended"] * 2, "run.ended"]
    assert names == [event_name(event) for event in events]


def test_the_parameters_are_those_given_and_the_defaults() -> None:
    """The run names what the user gave, as it was given, and what XGBoost filled in."""
    options: dict[str, Any] = {"params": {"eta": 0.1}, "early_stopping_rounds": 7}
    (started,) = of(record(lambda bus: train(bus, **options)), RunStarted)
    assert ("xgboost", xgb.__version__) == (started.framework, started.framework_version)
    given = {"eta": 0.1, "num_boost_round": 3, "eval_metric": ["error", "logloss"]}
    given |= {"early_stopping_rounds": 7, "reg_lambda": 1, "booster": "gbtree", "max_depth": 2}
    assert given == {name: started.params.get(name) for name in given}


def test_the_callback_reports_what_attach_does(tmp_path: Path) -> None:
    """The framework's own idiom gives the same records as an attached estimator."""

    def attached(bus: trainbus.Bus) -> None:
        training = set_up(tmp_path, 3)
        bus.attach(training.target)
        training.run()

    def idiom(bus: trainbus.Bus) -> None:
        training = set_up(tmp_path, 3)
        training.target.callbacks.insert(0, BusCallback(bus))
        training.run()

    assert timeless(record(attached)) == timeless(record(idiom))


def timeless(events: list[Event]) -> list[Any]:
    """Return events without what differs from one training to the next."""
    return [e.epoch if isinstance(e, EpochEnded) else e for e in events]


def test_checkpoints_are_recorded_when_they_are_there(tmp_path: Path) -> None:
    """Each file of `TrainingCheckPoint` is recorded once written, with the metrics of its round;
    a file that an earlier training left behind is not."""
    (tmp_path / "model_0.ubj").write_text("old")
    seen: list[int] = []

    def look(record: trainbus.Record) -> None:
        assert isinstance(record.event, CheckpointSaved)
        seen.append(Path(record.event.path).stat().st_size)

    def run(bus: trainbus.Bus) -> None:
        bus.subscribe(look, CheckpointSaved)
        train(bus, callbacks=[TrainingCheckPoint(tmp_path, interval=1)])

    events = record(run)
    saved = of(events, CheckpointSaved)
    paths = [str(tmp_path / f"model_{n}.ubj") for n in (1, 2)]
    assert paths == [e.path for e in saved]
    assert [("periodic", n, n + 1, True) for n in (1, 2)] == [
        (e.kind, e.epoch, e.step, e.final) for e in saved
    ]
    assert all(size > 100 for size in seen)
    logged = [e for e in of(events, MetricsLogged) if e.epoch == 2]
    assert {k: v for e in logged for k, v in e.values.items()} == saved[-1].metrics
    assert str(tmp_path) == of(events, RunStarted)[0].save_dir


@pytest.mark.parametrize("as_pickle", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_checkpoints_of_any_kind_and_place(tmp_path: Path, as_pickle: bool, first: bool) -> None:
    """Pickles are recorded too, and the place of the callback in the list makes no difference."""
    saver = TrainingCheckPoint(tmp_path, name="m", as_pickle=as_pickle, interval=2)
    before, after = ([saver], []) if first else ([], [saver])
    events = record(lambda bus: train(bus, 5, *before, callbacks=after))
    end = "pkl" if as_pickle else "ubj"
    names = [f"m_{epoch}.{end}" for epoch in (2, 4)]
    assert names == [Path(e.path).name for e in of(events, CheckpointSaved)]


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("save_best", [False, True])
def test_an_early_stop_is_recorded(first: bool, save_best: bool) -> None:
    """The end names metric and patience, the best round is XGBoost's own, and no round is missing,
    wherever the callback is in the list."""
    stopper = EarlyStopping(
        rounds=2, metric_name="error", data_name="held_out", save_best=save_best
    )
    before, after = ([stopper], []) if first else ([], [stopper])
    boosters: list[Any] = []
    params = {"learning_rate": 1.0}
    events = record(
        lambda bus: boosters.append(train(bus, 50, *before, callbacks=after, params=params))
    )
    (end,) = of(events, RunEnded)
    assert "early stop: no better held_out-error in 2 rounds" == end.reason
    assert ("finished", "held_out-error") == (end.status, end.best.metric)
    (booster,) = boosters
    assert (booster.best_iteration, booster.best_score) == (end.best.epoch, end.best.value)
    epochs = list(range(booster.best_iteration + 3))
    assert epochs == [e.epoch for e in of(events, EpochEnded) if e.outcome == "completed"]
    assert epochs == [e.epoch for e in of(events, MetricsLogged) if e.phase == "validation"]


def test_patience_that_lasts_is_no_early_stop() -> None:
    """A training that comes to its last round ended as planned, and still has a best round."""
    (end,) = of(record(lambda bus: train(bus, 3, early_stopping_rounds=50)), RunEnded)
    assert None is end.reason
    assert "test-logloss" == end.best.metric


def test_a_stop_by_a_callback_is_recorded() -> None:
    """A callback of the user's that stops the training after a round is named as the reason."""
    events = record(lambda bus: train(bus, 9, callbacks=[Stop(1)]))
    assert "stopped by a callback" == of(events, RunEnded)[0].reason
    assert [(0, "completed"), (1, "completed")] == outcomes(events)


def test_a_round_that_never_was_is_not_completed() -> None:
    """A stop before a round leaves it without metrics, and not completed."""
    events = record(lambda bus: train(bus, 9, callbacks=[Stop(1, when="before")]))
    assert [(0, "completed"), (1, "retried")] == outcomes(events)
    assert {0} == {e.epoch for e in of(events, MetricsLogged)}


def outcomes(events: list[Any]) -> list[tuple[int, str]]:
    return [(e.epoch, e.outcome) for e in of(events, EpochEnded)]


@pytest.mark.parametrize("kind", ["path", "booster"])
def test_a_continued_training_goes_on_with_its_rounds(tmp_path: Path, kind: str) -> None:
    """XGBoost counts from 0 again; the events count on, and so do best rounds."""
    first = xgb.train(PARAMS, data(), 4)
    first.save_model(tmp_path / "model.ubj")
    model = {"path": tmp_path / "model.ubj", "booster": first}[kind]
    events = record(lambda bus: train(bus, 3, xgb_model=model, early_stopping_rounds=9))
    (started,) = of(events, RunStarted)
    folder = str(tmp_path) if kind == "path" else None
    resumed = started.resumed
    assert (3, 4, folder) == (resumed.epoch, resumed.step, resumed.save_dir)
    assert [4, 5, 6] == [e.epoch for e in of(events, EpochStarted)]
    best = of(events, RunEnded)[0].best
    assert best.epoch in (4, 5, 6)


def test_a_stale_best_round_is_none() -> None:
    """The best round of an earlier training, which its model still has, is not this one's."""
    first = xgb.train(PARAMS, data(), 4, evals=[(data(), "d")], early_stopping_rounds=2)
    assert first.attr("best_iteration") is not None
    assert None is of(record(lambda bus: train(bus, xgb_model=first)), RunEnded)[0].best


def test_learning_rates_come_with_a_schedule() -> None:
    """Where a schedule changes the rate, each round has the one that it was trained with."""
    schedule = LearningRateScheduler([0.5, 0.25, 0.125])
    logged = of(record(lambda bus: train(bus, callbacks=[schedule])), MetricsLogged)
    rates = [e.values["learning_rate"] for e in logged if "learning_rate" in e.values]
    assert [0.3, 0.5, 0.25] == rates  # the schedule sets them after a round


def test_the_same_with_and_without(tmp_path: Path) -> None:
    """Reading the configuration of a continued training with a schedule changes no tree."""

    def trained(callbacks: list[Any]) -> bytes:
        first = xgb.train(PARAMS, data(), 2)
        schedule = LearningRateScheduler(lambda epoch: 0.5**epoch)
        params = {**PARAMS, "subsample": 0.5, "seed": 3}
        callbacks = [*callbacks, schedule]
        return bytes(xgb.train(params, data(), 4, xgb_model=first, callbacks=callbacks).save_raw())

    assert trained([]) == trained([BusCallback(trainbus.Bus())])


@pytest.mark.parametrize("booster", ["gblinear", "dart"])
def test_other_boosters(booster: str) -> None:
    """Rounds of linear models and of DART are counted too."""
    events = record(lambda bus: train(bus, params={"booster": booster, "max_depth": None}))
    assert [(0, "completed"), (1, "completed"), (2, "completed")] == outcomes(events)


def test_nan_arrives() -> None:
    """A metric that is not a number is recorded as NaN."""

    def broken(predicted: Any, matrix: Any) -> tuple[str, float]:
        return "broken", math.nan

    logged = of(record(lambda bus: train(bus, 1, custom_metric=broken)), MetricsLogged)
    assert {True} == {math.isnan(e.values[k]) for e in logged for k in e.values if "broken" in k}


def test_cross_validation_is_left_alone() -> None:
    """`cv` trains several models at once: it is no run, and its result is its own."""
    result: list[Any] = []

    def run(bus: trainbus.Bus) -> None:
        callback = BusCallback(bus)
        result.append(xgb.cv(PARAMS, data(), 2, nfold=2, seed=0, callbacks=[callback]))

    assert [] == record(run)
    assert xgb.cv(PARAMS, data(), 2, nfold=2, seed=0).equals(result[0])


def test_two_trainings_of_one_object_are_two_runs() -> None:
    """Each `fit` of an estimator is a run of its own; what comes between them is not."""
    records: list[Any] = []
    bus = trainbus.Bus()
    bus.subscribe(records.append)
    with bus:
        classifier = xgb.XGBClassifier(n_estimators=2, n_jobs=1)
        bus.attach(classifier)
        classifier.fit(X_TRAIN, Y_TRAIN, eval_set=SETS, verbose=False)
        count = len(records)
        classifier.predict(X_VALID)
        classifier.score(X_VALID, Y_VALID)
        classifier.get_booster().eval(data())
        assert count == len(records)
        classifier.fit(X_TRAIN, Y_TRAIN, eval_set=SETS, verbose=False)
    first, second = records[:count], records[count:]
    assert [event_name(r.event) for r in first] == [event_name(r.event) for r in second]
    assert 2 == len({r.run for r in records})


@pytest.mark.parametrize(
    ("error", "status"), [(ValueError("mine"), "failed"), (KeyboardInterrupt(), "stopped")]
)
def test_a_failure_is_seen_by_the_bus(error: BaseException, status: str) -> None:
    """The callback alone notices no exception; `with bus` does, and lets it through."""
    events: list[Any] = []
    bus = trainbus.Bus()
    bus.subscribe(lambda r: events.append(r.event))
    with pytest.raises(type(error)) as caught, bus:
        train(bus, callbacks=[Stop(1, error)])
    assert error is caught.value
    assert status == of(events, RunEnded)[0].status


def test_clones_are_silent_and_searches_work() -> None:
    """A search over an attached estimator trains clones, which report nothing, and finds what it
    finds without; its refit is a clone too."""
    grid = {"max_depth": [1, 2]}

    def search(estimator: Any) -> Any:
        return GridSearchCV(estimator, grid, cv=2, n_jobs=1).fit(X_TRAIN, Y_TRAIN)

    def run(bus: trainbus.Bus) -> None:
        classifier = xgb.XGBClassifier(n_estimators=2, n_jobs=1)
        bus.attach(classifier)
        found.append(search(classifier))
        clone(classifier).fit(X_TRAIN, Y_TRAIN)

    found: list[Any] = []
    assert [] == record(run)
    plain = search(xgb.XGBClassifier(n_estimators=2, n_jobs=1))
    assert plain.best_params_ == found[0].best_params_
    assert list(plain.cv_results_["mean_test_score"]) == list(
        found[0].cv_results_["mean_test_score"]
    )


def test_a_search_over_the_callback_reports_each_training() -> None:
    """A `BusCallback` among the parameters is cloned with them: each fit is a run."""

    def run(bus: trainbus.Bus) -> None:
        callback = BusCallback(bus)
        classifier = xgb.XGBClassifier(n_estimators=2, n_jobs=1, callbacks=[callback])
        GridSearchCV(classifier, {"max_depth": [1, 2]}, cv=2).fit(X_TRAIN, Y_TRAIN)

    started: list[Any] = []
    bus = trainbus.Bus()
    bus.subscribe(lambda r: started.append(r.run), RunStarted)
    with bus:
        run(bus)
    assert 5 == len(set(started))


def test_parameters_and_signature_stay() -> None:
    """What scikit-learn reads of an estimator is the same while it is attached and afterwards."""
    classifier = xgb.XGBClassifier(n_estimators=1, n_jobs=1, random_state=np.random.RandomState(0))
    state = classifier.random_state.get_state()[1].tolist()
    signature, document = inspect.signature(classifier.fit), classifier.fit.__doc__
    before = dict(vars(classifier))
    detach = trainbus.Bus().attach(classifier).detach
    assert signature == inspect.signature(classifier.fit)
    assert document == classifier.fit.__doc__
    assert before == {k: v for k, v in vars(classifier).items() if k != "fit"}
    assert state == classifier.random_state.get_state()[1].tolist()
    detach()
    assert before == vars(classifier)


def test_a_saved_estimator_needs_no_trainbus() -> None:
    """The pickle of an attached estimator names nothing of trainbus, and what is read trains."""

    def run(bus: trainbus.Bus) -> None:
        classifier = xgb.XGBClassifier(n_estimators=1, n_jobs=1)
        bus.attach(classifier)
        saved = pickle.dumps(classifier)
        assert b"trainbus" not in saved
        read = pickle.loads(saved)
        read.fit(X_TRAIN, Y_TRAIN)
        assert not hasattr(classifier, "classes_")

    assert [] == record(run)


def test_a_deep_copy_reports_its_own_training() -> None:
    """A deep copy trains itself and not the original, and falls silent with it."""

    def run(bus: trainbus.Bus) -> None:
        classifier = xgb.XGBClassifier(n_estimators=1, n_jobs=1)
        detach = bus.attach(classifier).detach
        copied = copy.deepcopy(classifier).fit(X_TRAIN, Y_TRAIN)
        assert copied.get_booster().num_boosted_rounds() == 1
        detach()
        copied.fit(X_TRAIN, Y_TRAIN)

    assert 1 == len(of(record(run), RunStarted))


def test_two_buses_detach_in_any_order() -> None:
    """Two buses get the same training, and the second one to detach leaves no trace."""
    classifier = xgb.XGBClassifier(n_estimators=1, n_jobs=1)
    buses, heard = [trainbus.Bus(), trainbus.Bus()], [list[Any](), list[Any]()]
    for bus, records in zip(buses, heard, strict=True):
        bus.subscribe(records.append)
    first, second = (bus.attach(classifier) for bus in buses)
    classifier.fit(X_TRAIN, Y_TRAIN)
    names = [[event_name(record.event) for record in records] for records in heard]
    assert names[0] == names[1] != []
    first.detach()
    second.detach()
    assert "fit" not in vars(classifier)
    assert None is classifier.callbacks


def test_what_does_not_boost_is_refused() -> None:
    """Errors say what was found, and what to do."""
    bus = trainbus.Bus()
    booster = xgb.train(PARAMS, data(), 1)
    with pytest.raises(trainbus.AttachError, match=r"found Booster; for xgboost\.train add BusC"):
        bus.attach(booster)
    with pytest.raises(trainbus.AttachError, match="found XGBRFClassifier: XGBoost takes no call"):
        bus.attach(xgb.XGBRFClassifier())


def test_an_unattached_callback_hurts_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """A callback without a bus logs that, and the training continues."""
    assert 1 == xgb.train(PARAMS, data(), 1, callbacks=[BusCallback()]).num_boosted_rounds()
    assert "this callback has no bus" in caplog.text


def test_train_has_the_variables_that_are_read() -> None:
    """They are no part of XGBoost's API."""
    seen: dict[str, Any] = {}

    class Look(xgb.callback.TrainingCallback):  # type: ignore[misc]
        def before_training(self, model: Any) -> Any:
            seen.update(variables_of("xgboost.training", "train"))
            return model

    xgb.train(PARAMS, data(), 1, callbacks=[Look()])
    needed = {"params", "dtrain", "evals", "num_boost_round", "xgb_model", "cb_container"}
    assert needed <= seen.keys()
    saver = vars(TrainingCheckPoint("."))
    assert {"_path", "_name", "_as_pickle"} <= saver.keys()


HOOKED = """
import json, sys
import numpy as np
import trainbus, xgboost
from trainbus.adapters import xgboost as adapter
from trainbus.events import event_name

bus, heard = trainbus.Bus(), []
bus.subscribe(lambda r: heard.append((r.run, event_name(r.event), getattr(r.event, "status", ""))))
for _ in range(2):
    adapter.hook(xgboost, bus.attach)
x = np.arange(40.0).reshape(20, 2)
y = np.arange(20) % 2
results = {}

def observe(name, train):
    del heard[:]
    try:
        train()
    except Exception as error:
        assert "mine" == str(error)
    ended = [status for _, kind, status in heard if kind == "run.ended"]
    results[name] = [len({run for run, *_ in heard}), ended]

def fail(*_):
    raise ValueError("mine")

matrix = xgboost.DMatrix(x, y)
xgboost.set_config(verbosity=0, nthread=1)
classifier = xgboost.XGBClassifier(n_estimators=1)
attached = xgboost.XGBClassifier(n_estimators=1)
bus.attach(attached)
own = adapter.BusCallback(bus)
observe("train", lambda: xgboost.train({}, matrix, 1))
observe("fails", lambda: xgboost.train({}, matrix, 1, obj=fail))
observe("own", lambda: xgboost.train({}, matrix, 1, callbacks=[own]))
observe("own fails", lambda: xgboost.train({}, matrix, 1, obj=fail, callbacks=[own]))
observe("fit", lambda: classifier.fit(x, y))
observe("attached", lambda: attached.fit(x, y))
observe("forest", lambda: xgboost.XGBRFClassifier(n_estimators=2).fit(x, y))
observe("cv", lambda: xgboost.cv({}, matrix, 1, nfold=2))
observe("predict", lambda: classifier.predict(x))
results["name"] = xgboost.train.__name__
print(json.dumps(results))
"""


def test_hooked_trainings_report_once(tmp_path: Path) -> None:
    """Every training of a hooked program is one run that ends as it went, and nothing else is."""
    done = subprocess.run(
        [sys.executable, "-c", HOOKED], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    one = [1, ["finished"]]
    failed = [1, ["failed"]]
    assert {
        "train": one,
        "fails": failed,
        "own": one,
        "own fails": failed,
        "fit": one,
        "attached": one,
        "forest": one,
        "cv": [0, []],
        "predict": [0, []],
        "name": "train",
    } == json.loads(done.stdout)


def test_a_logger_beside_ours_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Where a sink feeds the same tracker, one line says so; the run names what is fed twice."""
    from wandb.integration.xgboost import WandbCallback

    heard = feeding("wandb")
    with wandb.init(mode="offline", dir=tmp_path):
        data = xgb.DMatrix(X_TRAIN, Y_TRAIN)
        xgb.train(PARAMS, data, 1, callbacks=[WandbCallback(), BusCallback(heard.bus)])
    assert [["wandb"]] == [started.own_loggers for started in heard.of(RunStarted)]
    assert [
        "xgboost's own WandbCallback and a sink of trainbus both log to Weights & Biases; "
        "remove one of them (leave it out of the callbacks)"
    ] == [line for line in caplog.messages if "both log" in line]


def test_a_callback_in_an_attached_estimator_records_everything() -> None:
    """A run comes once."""
    heard = Heard()
    classifier = xgb.XGBClassifier(n_estimators=1, callbacks=[BusCallback(heard.bus)])
    heard.bus.attach(classifier)
    classifier.fit(X_TRAIN, Y_TRAIN)
    assert ["run.started", "run.ended"] == [n for n in heard.names if n.startswith("run.")]


def test_a_trial_that_is_pruned_is_stopped() -> None:
    """Optuna's exception, raised in a callback of the user's, is no failure."""
    import optuna

    heard = Heard()
    classifier = xgb.XGBClassifier(n_estimators=3, callbacks=[Stop(1, optuna.TrialPruned())])
    heard.bus.attach(classifier)
    with pytest.raises(optuna.TrialPruned):
        classifier.fit(X_TRAIN, Y_TRAIN)
    assert [("stopped", "pruned")] == [(e.status, e.reason) for e in heard.of(RunEnded)]
