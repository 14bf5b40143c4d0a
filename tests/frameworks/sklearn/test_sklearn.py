"""The scikit-learn adapter on real estimators: the suite, each way of recording, the traps."""

from __future__ import annotations

import copy
import gc
import inspect
import io
import pickle
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
from sklearn.base import BaseEstimator, clone
from sklearn.cluster import KMeans, MiniBatchKMeans
from sklearn.decomposition import IncrementalPCA
from sklearn.ensemble import (
    GradientBoostingClassifier,
    GradientBoostingRegressor,
    HistGradientBoostingRegressor,
)
from sklearn.linear_model import LogisticRegression, SGDClassifier
from sklearn.model_selection import GridSearchCV, KFold, cross_val_score
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.validation import has_fit_parameter
from trainbus.adapters import sklearn as adapter
from trainbus.adapters.sklearn import BusCallback

import trainbus
from support.heard import Heard as Listener
from trainbus.events import (
    EpochEnded,
    EpochStarted,
    MetricsLogged,
    ModelDescribed,
    Record,
    RunEnded,
    RunStarted,
    TableLogged,
)
from trainbus.testing import AdapterConformance, Training, check_grammar

# Trainings here are too short to converge, and scikit-learn says so.
pytestmark = [
    pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning"),
    pytest.mark.filterwarnings("ignore:Training interrupted by user"),
]

X = np.random.default_rng(0).normal(size=(60, 4))
Y = (X[:, 0] + X[:, 1] ** 2 > 0.5).astype(int)


class TestConformance(AdapterConformance):
    knows_its_run = False

    def start(self, folder: Path, epochs: int) -> Training:
        model = GradientBoostingClassifier(n_estimators=epochs, subsample=0.8, random_state=0)
        error: list[BaseException] = []
        trained: list[int] = []

        def monitor(stage: int, *_: object) -> None:
            trained.append(stage)  # it comes when the stage is fitted
            if stage == 1 and error:
                raise error[0]

        return Training(
            target=model,
            run=lambda: model.fit(X, Y, monitor=monitor),
            result=lambda: model.predict_proba(X).tobytes(),
            fail_at=error.append,
            epochs_trained=lambda: len(trained),
            stop_early=lambda: vars(model).update(n_iter_no_change=1, tol=9.0),
        )

    def trace(self, target: Any) -> object:
        return dict(vars(target))


class Heard(Listener):
    """What is recorded of estimators."""

    def curve(self, name: str) -> list[tuple[int | None, float]]:
        """Return the values of one metric, each with its epoch."""
        return [(e.epoch, e.values[name]) for e in self.of(MetricsLogged) if name in e.values]

    def ends(self) -> list[tuple[str, str | None]]:
        """Return status and reason of each end."""
        return [(e.status, e.reason) for e in self.of(RunEnded)]


@pytest.fixture
def heard() -> Heard:
    return Heard()


def attached(heard: Heard, model: Any) -> Any:
    """Return the estimator, attached."""
    heard.bus.attach(model)
    return model


def numbered(values: Any) -> list[tuple[int, float]]:
    """Return values with the epochs that they are of."""
    return list(enumerate(float(value) for value in values))


def test_only_estimators_can_be_attached(heard: Heard) -> None:
    """The error names what was found and what to attach."""
    with pytest.raises(trainbus.AttachError, match="found KFold; attach the object that you call"):
        heard.bus.attach(KFold())


# Ways of recording --------------------------------------------------------------------------------


def test_gradient_boosting_is_recorded_live(heard: Heard) -> None:
    """Each stage is an epoch with its scores, recorded before the next stage starts."""
    counts: list[int] = []
    model = attached(heard, GradientBoostingRegressor(n_estimators=4, subsample=0.5))
    model.fit(X, Y, None, lambda *_: counts.append(len(heard.of(EpochEnded))))
    assert [1, 2, 3, 4] == counts
    assert [0, 1, 2, 3] == [e.epoch for e in heard.of(EpochEnded)]
    assert numbered(model.train_score_) == heard.curve("train_score_")
    assert numbered(model.oob_improvement_) == heard.curve("oob_improvement_")
    assert {None} == {e.step for e in heard.of(MetricsLogged)}
    assert [("finished", None)] == heard.ends()


def test_the_start_has_the_configuration(heard: Heard) -> None:
    """Parameters and the size of the data are in the start, the time that the fit took follows."""
    model = attached(heard, LogisticRegression(C=0.5, max_iter=7))
    assert model is model.fit(X=X, y=Y)
    (started,) = heard.of(RunStarted)
    assert ("sklearn", adapter.TESTED_VERSIONS) == (started.framework, started.framework_version)
    assert {"C": 0.5, "max_iter": 7, "n_samples": 60, "n_features": 4}.items() <= (
        started.params.items()
    )
    assert started.params["class"].endswith(".LogisticRegression")
    assert "classifier" == started.task
    assert 1 == len(heard.curve("fit_time"))
    assert [5] == [e.parameters for e in heard.of(ModelDescribed)]
    assert [] == check_grammar(heard.records)


def test_lbfgs_iterations_are_epochs(heard: Heard) -> None:
    """There are as many epochs as iterations ran, without the one too many that is begun."""
    model = attached(heard, LogisticRegression()).fit(X, Y)
    (iterations,) = model.n_iter_
    assert list(range(iterations)) == [e.epoch for e in heard.of(EpochEnded)]
    assert [(None, float(iterations))] == heard.curve("n_iter_")
    assert "_skl_callbacks" not in vars(model)


def test_other_solvers_fit_in_silence(heard: Heard) -> None:
    """A solver that calls no callbacks gives a run without epochs, and no warning."""
    attached(heard, LogisticRegression(solver="liblinear")).fit(X, Y)
    assert [] == heard.of(EpochStarted)
    assert [("finished", None)] == heard.ends()


def test_steps_of_a_pipeline_are_epochs(heard: Heard) -> None:
    """Only the outermost tasks are epochs, not the iterations of the last step."""
    model = attached(heard, make_pipeline(StandardScaler(), LogisticRegression()))
    model.fit(X, Y)
    assert [0, 1] == [e.epoch for e in heard.of(EpochEnded)]
    assert "n_iter_" in vars(model[-1])
    assert [] == check_grammar(heard.records)


def test_a_grid_search_gives_its_table(heard: Heard) -> None:
    """The results are a table with a row a candidate, the best score is in the end."""
    search = attached(heard, GridSearchCV(LogisticRegression(), {"C": [0.1, 1.0, 9.0]}, cv=2))
    search.fit(X, Y)
    (table,) = heard.of(TableLogged)
    columns = {name: i for i, name in enumerate(table.columns)}
    assert set(search.cv_results_) - {"params"} == set(columns)
    scores = [row[columns["mean_test_score"]] for row in table.rows]
    assert search.cv_results_["mean_test_score"].tolist() == scores
    assert [0.1, 1.0, 9.0] == [row[columns["param_C"]] for row in table.rows]
    best = heard.of(RunEnded)[0].best
    assert ("best_score_", search.best_score_) == (best.metric, best.value)
    assert {"best_score_": "max"} == heard.of(RunStarted)[0].goals
    assert [0, 1] == [e.epoch for e in heard.of(EpochEnded)]  # the search, the last fit
    assert 1 == len(heard.runs())


def test_curves_of_a_network_are_recorded_after_the_fit(heard: Heard) -> None:
    """Losses and scores arrive with their epochs; no epoch is claimed to have been observed."""
    model = attached(heard, MLPClassifier((3,), max_iter=5, early_stopping=True, random_state=0))
    model.fit(X, Y)
    assert numbered(model.loss_curve_) == heard.curve("loss_curve_")
    assert numbered(model.validation_scores_) == heard.curve("validation_scores_")
    assert {"validation"} == {
        e.phase for e in heard.of(MetricsLogged) if "validation_scores_" in e.values
    }
    assert [] == heard.of(EpochStarted)
    assert [("finished", None)] == heard.ends()
    assert [19] == [e.parameters for e in heard.of(ModelDescribed)]


def test_curves_of_histogram_boosting_begin_before_it(heard: Heard) -> None:
    """Its first score is that of no iteration: step 0, and the next one is of epoch 0."""
    model = HistGradientBoostingRegressor(max_iter=3, early_stopping=True, random_state=0)
    attached(heard, model).fit(X, Y)
    for name, scores in (
        ("train_score_", model.train_score_),
        ("validation_score_", model.validation_score_),
    ):
        first, *others = heard.curve(name)
        assert (None, scores[0]) == first
        assert numbered(scores[1:]) == others
    zero = [e.step for e in heard.of(MetricsLogged) if e.step is not None]
    assert [0, 0] == zero


def test_early_stops_say_so(heard: Heard) -> None:
    """Each estimator that `n_iter_no_change` ended says by what; the user's monitor is another."""
    options: dict[str, Any] = {"n_iter_no_change": 2, "tol": 9.0, "random_state": 0}
    GB = partial(GradientBoostingClassifier, n_estimators=50)  # noqa: N806
    attached(heard, GB(**options)).fit(X, Y)
    attached(heard, MLPClassifier((3,), max_iter=50, **options)).fit(X, Y)
    attached(heard, SGDClassifier(early_stopping=True, max_iter=50, **options)).fit(X, Y)
    attached(heard, HistGradientBoostingRegressor(max_iter=50, early_stopping=True, **options)).fit(
        X, Y
    )
    attached(heard, MLPClassifier((3,), solver="lbfgs", max_iter=5000, **options)).fit(X, Y)
    attached(heard, GB()).fit(X, Y, monitor=lambda stage, *_: stage == 1)
    validation, training = (
        ("finished", f"early stop: no better {what} in 2 iterations")
        for what in ("validation score", "training loss")
    )
    monitor = ("finished", "stopped by the monitor")
    expected = [validation, training, validation, validation, ("finished", None), monitor]
    assert expected == heard.ends()


# Partial fits -------------------------------------------------------------------------------------


def test_partial_fits_are_epochs_of_one_run(heard: Heard) -> None:
    """Each call is an epoch; the run ends when the bus closes."""
    model = MLPClassifier((3,), random_state=0)
    with heard.bus:
        heard.bus.attach(model)
        for _ in range(3):
            model.partial_fit(X, Y, classes=[0, 1])
        assert numbered(model.loss_curve_) == heard.curve("loss_curve_")
        assert [] == heard.ends()
    assert [0, 1, 2] == [e.epoch for e in heard.of(EpochEnded)]
    assert [("finished", None)] == heard.ends()
    assert [] == check_grammar(heard.records)
    model.partial_fit(X, Y)
    assert 1 == len(heard.runs())


@pytest.mark.parametrize("end", ["fit", "detach"])
def test_a_run_of_partial_fits_ends(heard: Heard, end: str) -> None:
    """A fit begins a run of its own, and detaching ends the run that is open."""
    model = SGDClassifier(random_state=0)
    detach = heard.bus.attach(model).detach
    for _ in range(2):
        model.partial_fit(X, Y, classes=[0, 1])
    if end == "fit":
        model.fit(X, Y)
        assert ["finished"] * 2 == [status for status, _ in heard.ends()]
        model.partial_fit(X, Y)
        assert [0, 1, 0] == [e.epoch for e in heard.of(EpochStarted)]
    detach()
    assert {"finished"} == {status for status, _ in heard.ends()}
    assert "partial_fit" not in vars(model)
    for run in heard.runs():
        assert [] == check_grammar(run)


def test_partial_fits_continue_after_one_that_failed(heard: Heard) -> None:
    """A partial fit that raises ends the run as failed; the next continues there."""
    model = attached(heard, SGDClassifier())
    model.partial_fit(X, Y, classes=[0, 1])
    with pytest.raises(ValueError, match="inconsistent"):
        model.partial_fit(X, Y[:-1])
    model.partial_fit(X, Y)
    assert ["failed"] == [status for status, _ in heard.ends()]
    assert [None, 0] == [e.resumed and e.resumed.epoch for e in heard.of(RunStarted)]
    assert [0, 1, 1] == [e.epoch for e in heard.of(EpochStarted)]


def test_partial_fits_inside_a_fit_are_not_recorded(heard: Heard) -> None:
    """An estimator that fits by its own partial fits has one run without epochs."""
    attached(heard, IncrementalPCA(batch_size=20)).fit(X)
    assert [] == heard.of(EpochStarted)
    assert [("finished", None)] == heard.ends()


def test_what_a_partial_fit_keeps_is_recorded(heard: Heard) -> None:
    """The inertia of each call is a metric of its epoch."""
    model = attached(heard, MiniBatchKMeans(2, n_init=1, random_state=0))
    expected = [model.partial_fit(X).inertia_ for _ in range(2)]
    assert numbered(expected) == heard.curve("inertia_")


# Ends ---------------------------------------------------------------------------------------------


def test_a_fit_that_raises_is_a_failed_run(heard: Heard) -> None:
    """The user's error passes through, and the estimator works afterwards."""
    model = attached(heard, LogisticRegression())
    with pytest.raises(ValueError, match="NaN"):
        model.fit(X * np.nan, Y)
    model.fit(X, Y)
    assert ["failed", "finished"] == [status for status, _ in heard.ends()]
    assert "_skl_callbacks" not in vars(model)


class Interrupted(MLPClassifier):  # type: ignore[misc]
    """A network that Ctrl-C reaches in its second epoch."""

    def _update_no_improvement_count(self, *args: Any) -> None:
        if len(self.loss_curve_) == 2:
            raise KeyboardInterrupt
        super()._update_no_improvement_count(*args)


class InterruptedAtOnce(MLPClassifier):  # type: ignore[misc]
    """A network that Ctrl-C reaches in its first batch."""

    def _backprop(self, *args: Any) -> Any:
        raise KeyboardInterrupt


def test_an_interrupt_that_a_network_catches_is_a_stop(heard: Heard) -> None:
    """MLPs catch Ctrl-C and return: the run is stopped all the same, in partial fits too."""
    attached(heard, Interrupted((3,), max_iter=9)).fit(X, Y)
    attached(heard, InterruptedAtOnce((3,), max_iter=9)).partial_fit(X, Y, classes=[0, 1])
    assert [("stopped", "KeyboardInterrupt")] * 2 == heard.ends()
    assert [0, 1] == [epoch for epoch, _ in heard.curve("loss_curve_")]


def test_two_fits_are_two_runs(heard: Heard) -> None:
    """Each fit is a run, `fit_predict` and `fit_transform` are too, and only once."""
    model = attached(heard, KMeans(2, n_init=1, random_state=0))
    model.fit(X)
    model.fit_predict(X)
    attached(heard, make_pipeline(StandardScaler())).fit_transform(X)
    assert [("finished", None)] * 3 == heard.ends()
    model.predict(X)
    model.score(X)
    assert 3 == len(heard.runs())


@pytest.mark.parametrize(
    ("model", "more"),
    [
        (GradientBoostingClassifier(n_estimators=2, warm_start=True), {"n_estimators": 5}),
        (MLPClassifier((3,), max_iter=2, warm_start=True), {"max_iter": 3}),
        (
            HistGradientBoostingRegressor(max_iter=2, warm_start=True, early_stopping=True),
            {"max_iter": 5},
        ),
    ],
)
def test_a_warm_start_continues(heard: Heard, model: Any, more: dict[str, Any]) -> None:
    """A fit that continues says where, and records only what is new."""
    heard.bus.attach(model)
    model.fit(X, Y)
    model.set_params(**more).fit(X, Y)
    assert [None, 1] == [e.resumed and e.resumed.epoch for e in heard.of(RunStarted)]
    name = "loss_curve_" if hasattr(model, "loss_curve_") else "train_score_"
    epochs = [epoch for epoch, _ in heard.curve(name) if epoch is not None]
    assert [0, 1, 2, 3, 4] == epochs


# Copies -------------------------------------------------------------------------------------------

COPIES: dict[str, Callable[[Any], Any]] = {
    "clone": clone,
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("is_fitted", [False, True])
def test_copies_are_plain(heard: Heard, how: str, is_fitted: bool) -> None:
    """A copy has nothing of ours, fits itself and not the original, and emits nothing."""
    plain = MLPClassifier((3,), max_iter=2, random_state=0)
    model = attached(heard, MLPClassifier((3,), max_iter=2, random_state=0))
    attached(Heard(), model)
    if is_fitted:
        plain.fit(X, Y)
        model.fit(X, Y)
    count = len(heard.records)
    copied = COPIES[how](model)
    assert vars(COPIES[how](plain)).keys() == vars(copied).keys()
    fitted = getattr(model, "coefs_", None)
    copied.fit(X, Y)
    copied.partial_fit(X, Y)
    assert fitted is getattr(model, "coefs_", None)
    assert count == len(heard.records)


def test_a_dumped_model_names_nothing_of_ours(heard: Heard) -> None:
    """What `joblib.dump` writes of an attached estimator loads where trainbus is not installed."""
    model = attached(heard, GradientBoostingClassifier(n_estimators=1)).fit(X, Y)
    file = io.BytesIO()
    joblib.dump(model, file)
    assert b"trainbus" not in file.getvalue()


def test_meta_estimators_see_the_signature(heard: Heard) -> None:
    """An attached estimator still says that its fit takes weights, and what its methods are."""
    model = SGDClassifier(random_state=0)
    names = ("fit", "partial_fit")
    expected = [(inspect.signature(getattr(model, n)), getattr(model, n).__doc__) for n in names]
    attached(heard, model)
    assert expected == [
        (inspect.signature(getattr(model, n)), getattr(model, n).__doc__) for n in names
    ]
    assert has_fit_parameter(model, "sample_weight")


def test_searches_over_an_attached_estimator(heard: Heard) -> None:
    """Searches and cross-validation, in other processes too, find what they find without."""
    plain = Pipeline([("scale", StandardScaler()), ("fit", LogisticRegression())])
    model = attached(heard, clone(plain))
    grid = {"fit__C": [0.1, 1.0]}
    expected = GridSearchCV(plain, grid, cv=2).fit(X, Y).cv_results_["mean_test_score"].tolist()
    for jobs in (None, 2):
        search = GridSearchCV(model, grid, cv=2, n_jobs=jobs).fit(X, Y)
        assert expected == search.cv_results_["mean_test_score"].tolist()
    assert cross_val_score(plain, X, Y).tolist() == cross_val_score(model, X, Y).tolist()
    assert [] == heard.records
    attached(heard, search).fit(X, Y)
    assert expected == search.cv_results_["mean_test_score"].tolist()
    assert [0, 1] == [e.epoch for e in heard.of(EpochEnded)]
    assert [("finished", None)] == heard.ends()


def test_joblib_runs_an_attached_fit(heard: Heard) -> None:
    """Bound methods of an attached estimator reach other processes, and record nothing there."""
    model = attached(heard, LogisticRegression())
    jobs = [joblib.delayed(model.fit)(X, Y) for _ in range(2)]
    fitted = joblib.Parallel(n_jobs=2)(jobs)
    assert [True, True] == [hasattr(each, "coef_") for each in fitted]
    assert [] == heard.records


# The callback -------------------------------------------------------------------------------------


def shapes(records: list[Record]) -> list[Any]:
    """Return the events without what differs from fit to fit."""
    return [
        (type(r.event), getattr(r.event, "epoch", None), sorted(getattr(r.event, "values", ())))
        for r in records
    ]


def test_the_callback_records_what_attach_records(heard: Heard) -> None:
    """`set_callbacks(BusCallback(bus))` gives the same events, attached as well or not."""
    attached(heard, LogisticRegression()).fit(X, Y)
    expected, params = shapes(heard.records), heard.of(RunStarted)[0].params
    for is_attached in (False, True):
        heard.records.clear()
        model = LogisticRegression().set_callbacks(BusCallback(heard.bus))
        if is_attached:
            heard.bus.attach(model)
        model.fit(X, Y)
        assert expected == shapes(heard.records)
        assert params == heard.of(RunStarted)[0].params


def test_the_callback_records_how_a_fit_ended(heard: Heard) -> None:
    """What raises is failed, even inside the handling of another error, where a good fit is not."""
    model = LogisticRegression().set_callbacks(BusCallback(heard.bus))
    with pytest.raises(ValueError, match="classes"):
        model.fit(X, np.zeros(60))
    try:
        raise RuntimeError("earlier")
    except RuntimeError:
        model.fit(X, Y)
    assert "finished" == heard.ends()[-1][0]
    for run in heard.runs():
        assert [] == check_grammar(run)


def test_steps_with_a_callback_are_silent_inside_another_fit(heard: Heard) -> None:
    """A search over an estimator with a callback records nothing of its fits, in any process."""
    model = LogisticRegression().set_callbacks(BusCallback(heard.bus))
    GridSearchCV(model, {"C": [0.1, 1.0]}, cv=2, n_jobs=2).fit(X, Y)
    assert [] == heard.records


class Bare(BaseEstimator):  # type: ignore[misc]
    """An estimator of the user's, with the least that one needs, that keeps a NaN."""

    def __init__(self, size: Any = None) -> None:
        self.size = size

    def fit(self, X: Any) -> Bare:  # noqa: N803
        """Do nothing."""
        self.inertia_ = float("nan")
        return self


def test_an_estimator_of_the_users_own(heard: Heard) -> None:
    """Whatever it is fitted on, it gives a run; NaN arrives as NaN."""
    model = attached(heard, Bare())
    for data in (None, iter([1]), [[1, 2]], "text"):
        model.fit(data)
    assert [("finished", None)] * 4 == heard.ends()
    assert all(np.isnan(value) for _, value in heard.curve("inertia_"))
    assert [1, 4] == [e.params.get("n_samples") for e in heard.of(RunStarted)][2:]


def test_partial_fits_of_an_estimator_that_is_gone_are_over(heard: Heard) -> None:
    """They have no last one: who deletes the estimator has had enough, and nothing failed."""
    ended = threading.Event()
    heard.bus.subscribe(lambda record: ended.set(), RunEnded)
    model = attached(heard, SGDClassifier())
    model.partial_fit(X, Y, classes=[0, 1])
    del model
    gc.collect()
    assert ended.wait(60)
    assert [("finished", None)] == [(end.status, end.reason) for end in heard.of(RunEnded)]


def test_a_callback_in_an_attached_estimator_records_everything(heard: Heard) -> None:
    """A run comes once."""
    model = attached(heard, LogisticRegression())
    model.set_callbacks(BusCallback(heard.bus))
    model.fit(X, Y)
    assert ["run.started", "run.ended"] == [n for n in heard.names if n.startswith("run.")]
