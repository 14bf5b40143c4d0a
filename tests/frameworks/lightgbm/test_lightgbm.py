"""The LightGBM adapter in real trainings: the suite, rounds, early stops, ends, machines."""

from __future__ import annotations

import copy
import inspect
import json
import math
import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightgbm as lgb
import numpy as np
import pytest
import wandb
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV
from trainbus.adapters.lightgbm import BusCallback, rank

import trainbus
from support.feeding import feeding
from support.heard import Heard
from trainbus.events import (
    EpochEnded,
    EpochStarted,
    Event,
    MetricsLogged,
    RunEnded,
    RunStarted,
    ended_by,
    event_name,
)
from trainbus.testing import AdapterConformance, Training, check_grammar
from trainbus.testing.child import run_in_child

RNG = np.random.default_rng(0)
X = RNG.normal(size=(200, 4))
Y = (X[:, 0] + RNG.normal(size=200) > 0).astype(int)
X_TRAIN, Y_TRAIN, X_VALID, Y_VALID = X[:120], Y[:120], X[120:], Y[120:]
SETS = {"eval_X": (X_TRAIN, X_VALID), "eval_y": (Y_TRAIN, Y_VALID)}
PARAMS = {
    "objective": "binary",
    "metric": ["binary_error", "binary_logloss"],
    "num_leaves": 3,
    "num_threads": 1,
    "verbose": -1,
    "deterministic": True,
    "seed": 0,
}
RANK = "LIGHTGBM_RANK"


def stop(iteration: int, error: BaseException, order: int | None = None) -> Callable[[Any], None]:
    """Return a callback of the user's that raises in a round."""

    def callback(env: Any) -> None:
        if env.iteration == iteration:
            raise error

    if order is not None:
        callback.order = order  # type: ignore[attr-defined]
    return callback


def set_up(rounds: int, model: Any = None) -> Training:
    """Return a training of a classifier."""
    classifier = lgb.LGBMClassifier(
        n_estimators=rounds, num_leaves=3, n_jobs=1, random_state=0, verbose=-1, subsample=0.5
    )
    classifier.set_params(subsample_freq=1, deterministic=True)
    callbacks: list[Any] = []
    saved: list[Any] = []
    trained: list[int] = []

    def fit() -> None:
        first, last = (
            (lambda env: trained.append(env.iteration)),
            lambda env: saved.append(env.model),
        )
        given = {"callbacks": [first, *callbacks, last]}
        classifier.fit(X_TRAIN, Y_TRAIN, **SETS, init_model=model, **given)

    def stop_early() -> None:
        callbacks.append(lgb.early_stopping(1, verbose=False, min_delta=1.0))

    return Training(
        target=classifier,
        run=partial(in_two_processes, classifier, fit) if RANK in os.environ else fit,
        result=lambda: str(classifier.booster_.model_to_string()),
        fail_at=lambda error: callbacks.append(stop(1, error)),
        epochs_trained=lambda: len(trained),
        resume=lambda: set_up(3 - saved[-1].current_iteration(), saved[-1]),
        stop_early=stop_early,
    )


def in_two_processes(classifier: Any, fit: Callable[[], None]) -> None:
    """Train as the machine of this rank, beside the other one, which is a process of its own."""
    ports = [free_port(), free_port()]
    code = f"import runpy; runpy.run_path({__file__!r})['work']({ports})"
    with subprocess.Popen([sys.executable, "-c", code]) as other:
        classifier.set_params(**network(ports, int(os.environ[RANK])))
        fit()
        assert 0 == other.wait()


def work(ports: list[int]) -> None:
    """Train as the other machine."""
    rank = 1 - int(os.environ.pop(RANK))
    other = set_up(1)
    other.target.set_params(**network(ports, rank))
    other.run()


def network(ports: list[int], rank: int) -> dict[str, Any]:
    machines = ",".join(f"127.0.0.1:{port}" for port in ports)
    return {
        "machines": machines,
        "local_listen_port": ports[rank],
        "num_machines": 2,
        "tree_learner": "data",
        "time_out": 1,
        "pre_partition": True,
    }


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class TestConformance(AdapterConformance):
    other_rank_env = {RANK: "1"}  # noqa: RUF012
    knows_its_run = False

    def start(self, folder: Path, epochs: int) -> Training:
        return set_up(epochs)

    def trace(self, target: Any) -> object:
        return vars(target).keys(), target.get_params()


def test_the_main_process_of_two_reports(tmp_path: Path) -> None:
    """Of two processes that train one model together, the first reports."""
    given = {"folder": str(tmp_path)}
    heard = run_in_child("emitted_in", TestConformance, given, cwd=tmp_path, env={RANK: "0"})
    assert ["run.started", "epoch.started"] == heard[:2]
    assert "run.ended" == heard[-1]


class TestCallbackConformance(AdapterConformance):
    """The same for the framework's own idiom, which passes on no exception or early stop."""

    test_is_silent_on_other_ranks = None  # type: ignore[assignment]  # as above
    knows_its_run = False

    def start(self, folder: Path, epochs: int) -> Training:
        callback = BusCallback()
        training = set_up(epochs)
        fit = training.target.fit

        def with_callback(*args: Any, callbacks: list[Any], **kwargs: Any) -> Any:
            return fit(*args, callbacks=[callback, *callbacks], **kwargs)

        training.target.fit = with_callback
        return Training(
            target=callback,
            run=training.run,
            result=training.result,
            fail_at=training.fail_at,
            epochs_trained=training.epochs_trained,
        )

    def handles(self, target: Any) -> object:
        return target


def sets() -> tuple[Any, Any]:
    matrix = lgb.Dataset(X_TRAIN, Y_TRAIN)
    return matrix, lgb.Dataset(X_VALID, Y_VALID, reference=matrix)


def record(train: Callable[[trainbus.Bus], Any]) -> list[Any]:
    """Return the events of what is trained with a bus."""
    heard = Heard()
    with heard.bus as bus:
        train(bus)
    assert not heard.records or [] == check_grammar(heard.records)
    return [record.event for record in heard.records]


def of(events: list[Any], kind: type[Any]) -> list[Any]:
    return [event for event in events if isinstance(event, kind)]


def train(bus: trainbus.Bus, rounds: int = 3, **options: Any) -> Any:
    """Train with the native API and the callback of the bus."""
    matrix, valid = sets()
    callbacks = [*options.pop("callbacks", ()), BusCallback(bus)]
    return lgb.train(
        {**PARAMS, **options.pop("params", {})},
        matrix,
        rounds,
        valid_sets=[matrix, valid, valid],
        valid_names=["fitted", "held_out", "test"],
        callbacks=callbacks,
        **options,
    )


def fit(bus: trainbus.Bus, rounds: int = 50, *callbacks: Any, **params: Any) -> Any:
    """Train an attached estimator."""
    classifier = lgb.LGBMClassifier(n_estimators=rounds, verbose=-1, n_jobs=1, **params)
    bus.attach(classifier)
    return classifier.fit(X_TRAIN, Y_TRAIN, **SETS, callbacks=list(callbacks))


def test_metrics_are_the_frameworks_own() -> None:
    """Each round has what LightGBM itself recorded, in the phase of each data set."""
    history: dict[str, Any] = {}
    events = record(lambda bus: train(bus, callbacks=[lgb.record_evaluation(history)]))
    logged = of(events, MetricsLogged)
    phases = {"train": "fitted", "validation": "held_out", "test": "test"}
    names = ("binary_error", "binary_logloss")
    expected = [
        (epoch, phase, {f"{data}/{name}": history[data][name][epoch] for name in names})
        for epoch in range(3)
        for phase, data in phases.items()
    ]
    assert expected == [(e.epoch, e.phase, e.values) for e in logged]
    assert {(None, False)} == {(e.step, e.final) for e in logged}


def test_the_training_set_is_recorded_as_such() -> None:
    """What LightGBM takes for the training set has its phase, whatever it is called."""

    def run(bus: trainbus.Bus) -> None:
        regressor = lgb.LGBMRegressor(n_estimators=1, verbose=-1, n_jobs=1)
        bus.attach(regressor)
        regressor.fit(X_TRAIN, Y_TRAIN, **SETS, eval_names=["mine", "other"])

    found = {name: e.phase for e in of(record(run), MetricsLogged) for name in e.values}
    expected = {"learning_rate": "train", "mine/l2": "train", "other/l2": "validation"}
    assert expected == found


def test_a_training_without_evaluation_has_rounds() -> None:
    """Without data sets to evaluate on there are epochs, and no metrics."""
    events = record(lambda bus: lgb.train(PARAMS, sets()[0], 2, callbacks=[BusCallback(bus)]))
    names = ["run.started", *["epoch.started", "epoch.ended"] * 2, "run.ended"]
    assert names == [event_name(event) for event in events]


def test_the_parameters_are_those_of_the_training() -> None:
    """The run names what the user gave, and how many rounds were asked for."""
    (started,) = of(record(train), RunStarted)
    assert ("lightgbm", lgb.__version__) == (started.framework, started.framework_version)
    assert PARAMS == {name: started.params.get(name) for name in PARAMS}
    assert 3 == started.params["num_iterations"]


def test_the_callback_reports_what_attach_does() -> None:
    """The framework's own idiom gives the same records as an attached estimator."""

    def attached(bus: trainbus.Bus) -> None:
        training = set_up(3)
        bus.attach(training.target)
        training.run()

    def idiom(bus: trainbus.Bus, *, pair: bool) -> None:
        classifier = set_up(3).target
        callback = BusCallback(bus)
        callbacks = [callback, *([callback.before] if pair else [])]
        classifier.fit(X_TRAIN, Y_TRAIN, **SETS, callbacks=callbacks)

    expected = timeless(record(attached))
    assert expected == timeless(record(partial(idiom, pair=False)))
    assert expected == timeless(record(partial(idiom, pair=True)))


def timeless(events: list[Event]) -> list[Any]:
    """Return events without what differs from one training to the next."""
    return [e.epoch if isinstance(e, EpochEnded) else e for e in events]


@pytest.mark.parametrize(
    ("pair", "expected"), [(False, []), (True, ["run.started", "epoch.started"])]
)
def test_the_pair_records_the_start_at_once(pair: bool, expected: list[str]) -> None:
    """With `before`, the run and its rounds start when they do; without, when a round is over."""
    records: list[trainbus.Record] = []
    seen: list[str] = []

    def measure(*_: Any) -> tuple[str, float, bool]:
        seen.extend(event_name(record.event) for record in records)
        return "zero", 0.0, False

    bus = trainbus.Bus()
    bus.subscribe(records.append)
    callback = BusCallback(bus)
    matrix, valid = sets()
    callbacks = [callback, *([callback.before] if pair else [])]
    with bus:
        lgb.train(PARAMS, matrix, 1, valid_sets=[valid], feval=measure, callbacks=callbacks)
    assert expected == seen


def test_an_early_stop_is_recorded() -> None:
    """The end names metric and patience, and the best round is LightGBM's own, from 0."""
    models: list[Any] = []
    stopper = lgb.early_stopping(2, verbose=False)
    events = record(lambda bus: models.append(fit(bus, 50, stopper, learning_rate=0.9)))
    (end,) = of(events, RunEnded)
    assert "early stop: no better valid_1/binary_logloss in 2 rounds" == end.reason
    (model,) = models
    best = model.best_iteration_ - 1
    assert ("finished", "valid_1/binary_logloss", best) == (
        *(end.status, end.best.metric, end.best.epoch),
    )
    assert model.best_score_["valid_1"]["binary_logloss"] == end.best.value
    rounds = list(range(best + 3))
    assert rounds == [e.epoch for e in of(events, EpochEnded)]
    assert rounds == [e.epoch for e in of(events, MetricsLogged) if e.phase == "validation"]


def test_early_stopping_by_a_parameter_is_recorded() -> None:
    """`early_stopping_round` among the parameters is the same."""
    (end,) = of(record(lambda bus: fit(bus, 50, early_stopping_round=2)), RunEnded)
    assert end.reason.startswith("early stop: no better valid_1/binary_logloss in 2 rounds")


def test_patience_that_lasts_is_no_early_stop() -> None:
    """A training that comes to its last round ended as planned, and still has a best round."""
    (end,) = of(record(lambda bus: fit(bus, 2, lgb.early_stopping(9, verbose=False))), RunEnded)
    assert (None, 1) == (end.reason, end.best.epoch)


def test_a_stop_by_a_callback_hides_no_round() -> None:
    """A callback of the user's that stops the training comes after ours, whatever its order."""
    error = lgb.EarlyStopException(1, [])
    events = record(lambda bus: fit(bus, 9, stop(1, error, order=-100)))
    assert "early stop by a callback" == of(events, RunEnded)[0].reason
    assert [0, 1] == [e.epoch for e in of(events, EpochEnded)]
    logged = of(events, MetricsLogged)
    assert [0, 1] == [e.epoch for e in logged if e.phase == "validation"]


def test_an_early_stop_of_the_callback_alone() -> None:
    """The callback does not notice an early stop: its run ends with the next training that it is
    given to, and then says why, or with the bus."""

    def run(bus: trainbus.Bus) -> None:
        callback = BusCallback(bus)
        for _ in range(2):
            matrix, valid = sets()
            stopper = lgb.early_stopping(2, first_metric_only=True, verbose=False)
            models.append(
                lgb.train(PARAMS, matrix, 50, valid_sets=[valid], callbacks=[callback, stopper])
            )

    models: list[Any] = []
    bus, events = trainbus.Bus(), []
    bus.subscribe(lambda r: events.append(r.event))
    with bus:
        run(bus)
    first, second = of(events, RunEnded)
    assert "early stop: no better valid_0/binary_error in 2 rounds" == first.reason
    assert models[0].best_iteration - 1 == first.best.epoch
    assert ("finished", None) == (second.status, second.reason)


def test_a_continued_training_goes_on_with_its_rounds() -> None:
    """Rounds are counted from those of the earlier model on."""
    first = lgb.train(PARAMS, sets()[0], 4)
    events = record(lambda bus: fit_more(bus, first))
    resumed = of(events, RunStarted)[0].resumed
    assert (3, 4) == (resumed.epoch, resumed.step)
    assert [4, 5, 6] == [e.epoch for e in of(events, EpochStarted)]
    assert of(events, RunEnded)[0].best.epoch in (4, 5, 6)


def fit_more(bus: trainbus.Bus, model: Any) -> None:
    classifier = lgb.LGBMClassifier(n_estimators=3, verbose=-1, n_jobs=1)
    bus.attach(classifier)
    callbacks = [lgb.early_stopping(9, verbose=False)]
    classifier.fit(X_TRAIN, Y_TRAIN, **SETS, init_model=model, callbacks=callbacks)


def test_learning_rates_follow_their_schedule() -> None:
    """Each round has the rate that it was trained with, under LightGBM's own name."""
    rates = [0.5, 0.25, 0.125]
    schedule = lgb.reset_parameter(learning_rate=rates)
    logged = of(record(lambda bus: train(bus, callbacks=[schedule])), MetricsLogged)
    assert rates == [e.values["learning_rate"] for e in logged if e.phase == "train"]


def test_nan_arrives() -> None:
    """A metric that is not a number is recorded as NaN."""

    def broken(*_: Any) -> tuple[str, float, bool]:
        return "broken", math.nan, False

    logged = of(record(lambda bus: train(bus, 1, feval=broken)), MetricsLogged)
    assert [True] * 3 == [math.isnan(v) for e in logged for k, v in e.values.items() if "ok" in k]


def test_cross_validation_is_left_alone() -> None:
    """`cv` trains several models at once: it is no run, and its result is its own."""
    result: list[Any] = []
    plain = lgb.cv(PARAMS, sets()[0], 2, nfold=2)

    def run(bus: trainbus.Bus) -> None:
        callbacks = [BusCallback(bus)]
        result.append(lgb.cv(PARAMS, sets()[0], 2, nfold=2, callbacks=callbacks))

    assert [] == record(run)
    assert [plain] == result


def test_two_trainings_of_one_object_are_two_runs() -> None:
    """Each `fit` of an estimator is a run of its own; what comes between them is not."""
    records: list[Any] = []
    bus = trainbus.Bus()
    bus.subscribe(records.append)
    with bus:
        classifier = fit(bus, 2)
        count = len(records)
        classifier.predict(X_VALID)
        classifier.score(X_VALID, Y_VALID)
        assert count == len(records)
        classifier.fit(X_TRAIN, Y_TRAIN, **SETS)
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
        train(bus, callbacks=[stop(1, error)])
    assert error is caught.value
    assert status == of(events, RunEnded)[0].status


def test_clones_are_silent_and_searches_work() -> None:
    """A search over an attached estimator trains clones, which report nothing, and finds what it
    finds without."""

    def search(estimator: Any) -> Any:
        return GridSearchCV(estimator, {"num_leaves": [2, 4]}, cv=2).fit(X_TRAIN, Y_TRAIN)

    def run(bus: trainbus.Bus) -> None:
        classifier = lgb.LGBMClassifier(n_estimators=2, n_jobs=1, verbose=-1)
        bus.attach(classifier)
        found.append(search(classifier))
        clone(classifier).fit(X_TRAIN, Y_TRAIN)

    found: list[Any] = []
    assert [] == record(run)
    plain = search(lgb.LGBMClassifier(n_estimators=2, n_jobs=1, verbose=-1))
    scores = [list(each.cv_results_["mean_test_score"]) for each in (plain, *found)]
    assert scores[0] == scores[1]


def test_parameters_and_signature_stay() -> None:
    """What scikit-learn reads of an estimator is the same while it is attached and afterwards."""
    classifier = lgb.LGBMClassifier(n_estimators=1)
    signature, document = inspect.signature(classifier.fit), classifier.fit.__doc__
    before, parameters = dict(vars(classifier)), classifier.get_params()
    detach = trainbus.Bus().attach(classifier).detach
    assert signature == inspect.signature(classifier.fit)
    assert document == classifier.fit.__doc__
    assert parameters == classifier.get_params()
    assert before == {k: v for k, v in vars(classifier).items() if k != "fit"}
    detach()
    assert before == vars(classifier)


def test_callbacks_may_be_given_by_place() -> None:
    """The user's callbacks are called where they are given without a name, and not changed."""
    called: list[int] = []
    mine = [lambda env: called.append(env.iteration)]

    def run(bus: trainbus.Bus) -> None:
        regressor = lgb.LGBMRegressor(n_estimators=2, verbose=-1, n_jobs=1)
        bus.attach(regressor)
        place = list(inspect.signature(regressor.fit).parameters).index("callbacks")
        names = list(inspect.signature(regressor.fit).parameters)[2:place]
        defaults = inspect.signature(regressor.fit).parameters
        regressor.fit(X_TRAIN, Y_TRAIN, *(defaults[n].default for n in names), mine)

    assert [0, 1] == [e.epoch for e in of(record(run), EpochEnded)]
    assert [0, 1] == called
    assert 1 == len(mine)


def test_a_saved_estimator_needs_no_trainbus() -> None:
    """The pickle of an attached and trained estimator names nothing of trainbus, and is silent."""

    def run(bus: trainbus.Bus) -> None:
        saved = pickle.dumps(fit(bus, 1))
        assert b"trainbus" not in saved
        pickle.loads(saved).fit(X_TRAIN, Y_TRAIN)

    assert 1 == len(of(record(run), RunStarted))


def test_a_deep_copy_reports_its_own_training() -> None:
    """A deep copy trains itself and not the original, and falls silent with it."""

    def run(bus: trainbus.Bus) -> None:
        classifier = lgb.LGBMClassifier(n_estimators=1, verbose=-1, n_jobs=1)
        detach = bus.attach(classifier).detach
        copied = copy.deepcopy(classifier).fit(X_TRAIN, Y_TRAIN)
        assert not hasattr(classifier, "fitted_")
        assert copied.fitted_
        detach()
        copied.fit(X_TRAIN, Y_TRAIN)

    assert 1 == len(of(record(run), RunStarted))


class Named(lgb.LGBMClassifier):  # type: ignore[misc]
    """An estimator whose `fit` names no callbacks."""

    def fit(self, X: Any, y: Any, **more: Any) -> Any:  # noqa: N803
        """Fit, with callbacks among the rest."""
        return super().fit(X, y, **more)


def test_a_fit_that_names_no_callbacks_is_recorded() -> None:
    """They are given to it by name."""

    def run(bus: trainbus.Bus) -> None:
        classifier = Named(n_estimators=1, verbose=-1, n_jobs=1)
        bus.attach(classifier)
        classifier.fit(X_TRAIN, Y_TRAIN)

    assert 1 == len(of(record(run), RunStarted))


def test_a_function_in_the_place_of_fit_is_recorded() -> None:
    """The position of its own `callbacks` counts, not that of the method that it replaces."""

    def run(bus: trainbus.Bus) -> None:
        classifier = lgb.LGBMClassifier(n_estimators=1, verbose=-1, n_jobs=1)
        plain = classifier.fit
        classifier.fit = lambda X, y, callbacks=None: plain(X, y, callbacks=callbacks)  # noqa: N803
        bus.attach(classifier)
        classifier.fit(X_TRAIN, Y_TRAIN, [lgb.log_evaluation(0)])

    assert 1 == len(of(record(run), RunStarted))


def test_two_buses_detach_in_any_order() -> None:
    """Two buses get the same training, and the second one to detach leaves no trace."""
    classifier = lgb.LGBMClassifier(n_estimators=1, verbose=-1, n_jobs=1)
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


def test_what_is_no_estimator_is_refused() -> None:
    """The error says what was found, and what to do."""
    booster = lgb.train(PARAMS, sets()[0], 1)
    with pytest.raises(trainbus.AttachError, match=r"found Booster; for lightgbm\.train add BusC"):
        trainbus.Bus().attach(booster)


def test_an_unattached_callback_hurts_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """A callback without a bus logs that, and the training continues."""
    booster = lgb.train(PARAMS, sets()[0], 1, callbacks=[BusCallback()])
    assert 1 == booster.current_iteration()
    assert "this callback has no bus" in caplog.text


def test_the_rank_is_the_place_among_the_machines() -> None:
    """An address of another machine, or another port of this one, is another rank."""
    machines = "192.0.2.1:12400,127.0.0.1:12401,127.0.0.1:12400"
    assert 2 == rank({"machines": machines})
    assert 1 == rank({"workers": machines, "local_port": 12401})
    assert 0 == rank({"machines": None})


def test_a_booster_knows_the_name_of_its_training_set() -> None:
    """It is no part of LightGBM's documented API."""
    booster = lgb.train(PARAMS, sets()[0], 1)
    assert "training" == booster._train_data_name


HOOKED = """
import json
import numpy as np
import trainbus, lightgbm
from trainbus.adapters import lightgbm as adapter
from trainbus.events import event_name

bus, heard = trainbus.Bus(), []
bus.subscribe(lambda r: heard.append((r.run, event_name(r.event), r.event)))
for _ in range(2):
    adapter.hook(lightgbm, bus.attach)
x = np.arange(80.0).reshape(40, 2)
y = np.arange(40) % 2
params = {"verbose": -1, "objective": "binary", "min_data_in_leaf": 1}
results = {}

def observe(name, train):
    del heard[:]
    try:
        train()
    except Exception as error:
        assert "mine" == str(error)
    ended = [event.status for _, kind, event in heard if kind == "run.ended"]
    results[name] = [len({run for run, *_ in heard}), ended]

def fail(*_):
    raise ValueError("mine")

def data():
    return lightgbm.Dataset(x, y)

def train(rounds=1, *callbacks, **given):
    return lightgbm.train(params, data(), rounds, callbacks=list(callbacks), **given)

classifier = lightgbm.LGBMClassifier(n_estimators=1, verbose=-1)
attached = lightgbm.LGBMClassifier(n_estimators=1, verbose=-1)
bus.attach(attached)
own = adapter.BusCallback(bus)
observe("train", train)
observe("fails", lambda: train(1, fail))
observe("own", lambda: train(2, own))
observe("own fails", lambda: train(1, fail, own))
observe("early", lambda: train(
    9, own, lightgbm.early_stopping(1, verbose=False), valid_sets=[data()],
    feval=lambda *_: ("mine", 0.0, False),
))
results["reason"] = heard[-1][2].reason
results["started"] = [kind for _, kind, _ in heard].count("epoch.started")
observe("fit", lambda: classifier.fit(x, y))
observe("attached", lambda: attached.fit(x, y))
observe("cv", lambda: lightgbm.cv(params, data(), 1, nfold=2))
observe("predict", lambda: classifier.predict(x))
results["name"] = lightgbm.train.__name__
print(json.dumps(results))
"""


def test_hooked_trainings_report_once(tmp_path: Path) -> None:
    """Every training of a hooked program is one run that ends as it went, early stops included."""
    done = subprocess.run(
        [sys.executable, "-c", HOOKED], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    one = [1, ["finished"]]
    failed = [1, ["failed"]]
    results = json.loads(done.stdout.splitlines()[-1])
    assert results.pop("reason").startswith("early stop: no better valid_0/")
    assert {
        "train": one,
        "fails": failed,
        "own": one,
        "own fails": failed,
        "early": one,
        "started": 2,
        "fit": one,
        "attached": one,
        "cv": [0, []],
        "predict": [0, []],
        "name": "train",
    } == results


def test_a_logger_beside_ours_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Where a sink feeds the same tracker, one line says so; the run names what is fed twice."""
    from wandb.integration.lightgbm import wandb_callback

    heard = feeding("wandb")
    with wandb.init(mode="offline", dir=tmp_path):
        data = lgb.Dataset(X_TRAIN, Y_TRAIN)
        sets = {"valid_sets": [lgb.Dataset(X_VALID, Y_VALID, reference=data)]}
        callbacks = [wandb_callback(), BusCallback(heard.bus)]
        lgb.train(PARAMS, data, 1, callbacks=callbacks, **sets)
    assert [["wandb"]] == [started.own_loggers for started in heard.of(RunStarted)]
    assert [
        "lightgbm's own WandbCallback and a sink of trainbus both log to Weights & Biases; "
        "remove one of them (leave it out of the callbacks)"
    ] == [line for line in caplog.messages if "both log" in line]


def test_a_callback_in_an_attached_estimator_records_everything() -> None:
    """A run comes once."""
    heard = Heard()
    classifier = lgb.LGBMClassifier(n_estimators=1, verbose=-1)
    heard.bus.attach(classifier)
    classifier.fit(X_TRAIN, Y_TRAIN, callbacks=[BusCallback(heard.bus)])
    assert ["run.started", "run.ended"] == [n for n in heard.names if n.startswith("run.")]


def test_the_exception_that_ends_a_training_on_purpose_exists() -> None:
    """LightGBM's own, which a callback may raise, is known by its name."""
    assert "stopped" == ended_by(lgb.callback.EarlyStopException(0, [])).status
