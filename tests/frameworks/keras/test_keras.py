"""The Keras adapter in real trainings on the torch backend: the suite, metrics, checkpoints."""

from __future__ import annotations

import atexit
import copy
import importlib
import math
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import trainbus
from support.feeding import feeding
from support.heard import Heard as Listener
from trainbus.events import (
    CheckpointSaved,
    EpochEnded,
    EpochStarted,
    MetricsLogged,
    ModelDescribed,
    RunEnded,
    RunStarted,
    event_name,
)
from trainbus.testing import AdapterConformance, Training, check_grammar
from trainbus.toolkit.adapters import around_of

os.environ["KERAS_BACKEND"] = "torch"
if "KERAS_HOME" not in os.environ:  # Keras writes its settings there when it is imported
    os.environ["KERAS_HOME"] = tempfile.mkdtemp(prefix="keras-")
    atexit.register(shutil.rmtree, os.environ["KERAS_HOME"], ignore_errors=True)

# Keras' variables have an `__array__` whose signature numpy 2 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

X = np.linspace(-1, 1, 96, dtype="float32").reshape(24, 4)
Y = X.sum(axis=1, keepdims=True)
BATCHES = 3


def make(**compiled: Any) -> Any:
    """Return a small compiled model, with the same weights each time."""
    import keras

    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3), keras.layers.Dense(1)])
    arguments = {"optimizer": keras.optimizers.SGD(0.05), "loss": "mse", "metrics": ["mae"]}
    model.compile(**{**arguments, **compiled})
    return model


def fit(model: Any, *callbacks: Any, **arguments: Any) -> Any:
    """Train for three epochs of three batches."""
    options = {"epochs": 3, "batch_size": 8, "verbose": 0, **arguments}
    return model.fit(X, Y, callbacks=list(callbacks), **options)


def at_epoch(epoch: int, action: Callable[[Any], object], hook: str = "on_epoch_begin") -> Any:
    """Return a callback of a user's that does something with the model in one epoch."""
    import keras

    class AtEpoch(keras.callbacks.Callback):  # type: ignore[misc]
        pass

    callback = AtEpoch()
    setattr(callback, hook, lambda at, logs=None: action(callback.model) if at == epoch else None)
    return callback


def throw(error: BaseException) -> Callable[[object], None]:
    """Return a function that raises."""

    def raise_it(_: object) -> None:
        raise error

    return raise_it


def weights(model: Any) -> bytes:
    """Return the weights of a model."""
    return b"".join(np.asarray(w).tobytes() for w in model.get_weights())


class TestConformance(AdapterConformance):
    def start(self, folder: Path, epochs: int) -> Training:
        import keras

        model = make()
        trained: list[int] = []
        count = keras.callbacks.LambdaCallback(
            on_epoch_end=lambda epoch, logs: trained.append(epoch)
        )
        callbacks = [keras.callbacks.BackupAndRestore(str(folder / "backup")), count]

        def stop_early() -> None:
            stopping = keras.callbacks.EarlyStopping("loss", min_delta=1e9, patience=1)
            callbacks.append(stopping)

        return Training(
            target=model,
            run=lambda: fit(model, *callbacks, epochs=epochs),
            result=lambda: weights(model),
            fail_at=lambda error: callbacks.append(at_epoch(1, throw(error))),
            epochs_trained=lambda: len(trained),
            resume=lambda: self.start(folder, epochs),
            stop_early=stop_early,
        )

    def trace(self, target: Any) -> object:
        return dict(vars(target))

    def handles(self, target: Any) -> object:
        return around_of(target, "fit").hooks


class Heard(Listener):
    """What is recorded of models."""

    def __init__(self, journals: Path, every: int | None = None) -> None:
        bus = None
        if every is not None:
            config = journals.parent / "steps.yaml"
            path = journals.parent / "steps.jsonl"
            config.write_text(
                f"isolation: inline\nsinks: {{f: {{type: jsonl, path: '{path}', "
                f"every: {{train: {every}}}}}}}"
            )
            bus = trainbus.load(config)
        super().__init__(bus)

    def only(self, kind: type[Any]) -> Any:
        """Return the event of a type that comes once."""
        (event,) = self.of(kind)
        return event

    @property
    def ids(self) -> list[str]:
        """The ids of the runs, in order."""
        return list(dict.fromkeys(record.run for record in self.records))


@pytest.fixture
def heard(journals: Path) -> Iterator[Heard]:
    listener = Heard(journals)
    yield listener
    listener.bus.close()


def summary(records: list[trainbus.Record]) -> list[object]:
    """Return what records say, without what differs from run to run."""
    return [
        (event_name(r.event), *(getattr(r.event, n, None) for n in ("epoch", "step", "values")))
        for r in records
    ]


def callback_class() -> Any:
    return importlib.import_module("trainbus.adapters.keras").BusCallback


# Metrics ------------------------------------------------------------------------------------------


def test_metrics_are_those_of_the_history(heard: Heard) -> None:
    """Values, names and epochs are Keras' own; validation apart, with the rate of the optimizer."""
    model = make()
    heard.bus.attach(model)
    history = fit(model, validation_data=(X, Y), validation_freq=2).history
    assert [] == check_grammar(heard.records)
    logged = heard.of(MetricsLogged)
    train = [e for e in logged if e.phase == "train"]
    assert [(0, None), (1, None), (2, None)] == [(e.epoch, e.step) for e in train]
    for name in ("loss", "mae"):
        assert history[name] == [e.values.pop(name) for e in train]
    assert [{"learning_rate": pytest.approx(0.05)}] * 3 == [e.values for e in train]
    (validation,) = [e for e in logged if e.phase == "validation"]
    assert (1, None) == (validation.epoch, validation.step)
    assert {n: history[n][0] for n in ("val_loss", "val_mae")} == validation.values
    assert 4 == len(logged)


def test_the_start_has_the_configuration(heard: Heard) -> None:
    """Parameters hold the optimizer, the loss and the arguments of fit, but no data."""
    import keras

    model = make(loss=keras.losses.MeanSquaredError(name="squares"))
    heard.bus.attach(model)
    fit(model)
    started = heard.only(RunStarted)
    about = (started.framework, started.framework_version, started.name, started.world_size)
    assert ("keras", keras.__version__, model.name, 1) == about
    assert (None, None) == (started.save_dir, started.resumed)
    optimizer = started.params.pop("optimizer")
    assert ("SGD", pytest.approx(0.05)) == (
        optimizer["class_name"],
        optimizer["learning_rate"],
    )
    expected = {"epochs": 3, "steps": BATCHES, "batch_size": 8, "verbose": 0, "loss": "squares"}
    assert expected == started.params
    described = heard.only(ModelDescribed)
    assert (19, 19, 2) == (described.parameters, described.gradients, described.layers)


def test_the_rate_is_the_one_that_was_used(heard: Heard) -> None:
    """ReduceLROnPlateau lowers the rate after an epoch: the epoch has the rate before."""
    import keras

    model = make()
    heard.bus.attach(model)
    plateau = keras.callbacks.ReduceLROnPlateau("loss", factor=0.5, patience=1, min_delta=1e9)
    history = fit(model, plateau).history
    rates = [e.values["learning_rate"] for e in heard.of(MetricsLogged)]
    assert history["learning_rate"] == rates
    assert [0.05, 0.05, 0.025] == pytest.approx(rates)


def test_batches_come_when_they_are_asked_for(journals: Path) -> None:
    """Every second update has the running means of its epoch, under TensorBoard's names."""
    heard, seen = Heard(journals, every=2), {}
    model = make()
    import keras

    class Spy(keras.callbacks.Callback):  # type: ignore[misc]
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            seen[int(self.model.optimizer.iterations)] = logs["loss"]

    heard.bus.attach(model)
    fit(model, Spy())
    steps = [e for e in heard.of(MetricsLogged) if e.step is not None]
    assert [(0, 2), (1, 4), (1, 6), (2, 8)] == [(e.epoch, e.step) for e in steps]
    assert [seen[e.step] for e in steps] == [e.values["batch_loss"] for e in steps]
    assert [{"batch_loss", "batch_mae"}] * 4 == [e.values.keys() for e in steps]
    assert all(e.on_request for e in steps)
    heard.bus.close()


def test_steps_are_updates_and_not_batches(journals: Path) -> None:
    """With accumulated gradients a value comes once an update."""
    import keras

    heard = Heard(journals, every=1)
    model = make(optimizer=keras.optimizers.SGD(0.05, gradient_accumulation_steps=2))
    heard.bus.attach(model)
    fit(model, epochs=2)
    assert [1, 2, 3] == [e.step for e in heard.of(MetricsLogged) if e.step is not None]
    heard.bus.close()


def test_batches_that_nobody_asked_for_stay_with_keras(heard: Heard) -> None:
    """Without a sink that asks, Keras sees no hook for batches, and may read them later."""
    callback = callback_class()(heard.bus)
    assert callback.on_train_batch_end._is_default


def test_a_loss_that_is_nan_arrives(heard: Heard) -> None:
    """TerminateOnNaN ends the run as finished, the reason says so, and the value is NaN."""
    import keras

    model = make(optimizer=keras.optimizers.SGD(1e30))
    heard.bus.attach(model)
    fit(model, keras.callbacks.TerminateOnNaN())
    losses = [e.values["loss"] for e in heard.of(MetricsLogged)]
    assert not math.isfinite(losses[-1])
    ended = heard.only(RunEnded)
    assert ("finished", f"TerminateOnNaN: the loss is {losses[-1]}") == (ended.status, ended.reason)


def test_a_model_with_optimizers_of_its_own_has_no_steps(heard: Heard, tmp_path: Path) -> None:
    """Where Keras' optimizer does nothing, as in GANs, its counter is not taken for the steps."""
    import keras

    class Own(keras.Model):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.dense = keras.layers.Dense(1)

        def call(self, x: Any) -> Any:
            return self.dense(x)

        def train_step(self, data: Any) -> dict[str, float]:
            return {"own": 0.5}

    model = Own()
    model.compile(loss="mse")
    heard.bus.attach(model)
    fit(model, keras.callbacks.ModelCheckpoint(tmp_path / "m.weights.h5", save_weights_only=True))
    assert {None} == {e.step for e in heard.of(CheckpointSaved)}
    assert [0.5] * 3 == [e.values["own"] for e in heard.of(MetricsLogged)]


# Runs ---------------------------------------------------------------------------------------------


def test_the_callback_alone_records_the_same(heard: Heard, journals: Path, tmp_path: Path) -> None:
    """`BusCallback(bus)` among the callbacks reports what an attached model does."""
    import keras

    other = Heard(journals)
    for listener, is_attached in ((heard, True), (other, False)):
        model = make()
        folder = tmp_path / str(is_attached)
        callbacks: list[Any] = [
            keras.callbacks.ModelCheckpoint(folder / "{epoch}.keras"),
            keras.callbacks.ModelCheckpoint(folder / "b.keras", "loss", save_best_only=True),
            keras.callbacks.EarlyStopping("loss", min_delta=1e9, patience=1),
        ]
        if is_attached:
            listener.bus.attach(model)
        else:
            callbacks.append(callback_class()(listener.bus))
        fit(model, *callbacks)
        assert {"save", "save_weights"}.isdisjoint(vars(model))
    assert summary(heard.records) == summary(other.records)
    assert heard.only(RunEnded) == other.only(RunEnded)
    assert heard.only(RunStarted).goals == other.only(RunStarted).goals
    assert str(tmp_path / "False") == other.only(RunStarted).save_dir
    other.bus.close()


def test_both_ways_at_once_record_everything_once(heard: Heard) -> None:
    """A BusCallback in an attached model's fit takes precedence, and records exceptions."""
    model = make()
    heard.bus.attach(model)
    callback = callback_class()(heard.bus)
    fit(model, callback)
    assert [0, 1, 2] == [e.epoch for e in heard.of(EpochStarted)]
    assert 8 == heard.only(RunStarted).params["batch_size"]
    with pytest.raises(ZeroDivisionError):
        fit(model, callback, at_epoch(1, throw(ZeroDivisionError())))
    assert ["finished", "failed"] == [e.status for e in heard.of(RunEnded)]


def test_a_callback_without_an_attached_model_ends_with_the_bus(heard: Heard) -> None:
    """An exception that only the bus sees ends the run as failed, and leaves the model clean."""
    model = make()
    with pytest.raises(ZeroDivisionError), heard.bus:
        fit(model, callback_class()(heard.bus), at_epoch(1, throw(ZeroDivisionError("user"))))
    assert ("failed", "ZeroDivisionError: user") == (
        heard.only(RunEnded).status,
        heard.only(RunEnded).reason,
    )
    assert {"fit", "save", "save_weights"}.isdisjoint(vars(model))


def test_a_callback_serves_many_trainings(heard: Heard) -> None:
    """One BusCallback in three fits, the first of which fails, makes a run of each."""
    callback = callback_class()(heard.bus)
    with pytest.raises(ZeroDivisionError):
        fit(make(), callback, at_epoch(1, throw(ZeroDivisionError())))
    fit(make(), callback)
    fit(make(), callback)
    assert 3 == len(heard.ids)
    assert ["stopped", "finished", "finished"] == [e.status for e in heard.of(RunEnded)]
    assert [] == [
        said
        for run in heard.ids
        for said in check_grammar([r for r in heard.records if r.run == run])
    ]


def test_two_trainings_are_two_runs(heard: Heard) -> None:
    """Each `fit` of a model is a run that begins with epoch 0."""
    model = make()
    heard.bus.attach(model)
    fit(model)
    fit(model)
    assert 2 == len(heard.ids)
    assert [0, 1, 2] * 2 == [e.epoch for e in heard.of(EpochStarted)]
    assert [None, None] == [e.resumed for e in heard.of(RunStarted)]


def test_evaluation_alone_is_silent(heard: Heard) -> None:
    """`evaluate` and `predict`, before and after training, and no epochs, emit nothing."""
    model, callback = make(), callback_class()(heard.bus)
    heard.bus.attach(model)
    count = 0
    for _ in range(2):
        model.evaluate(X, Y, verbose=0, callbacks=[callback])
        model.predict(X, verbose=0, callbacks=[callback])
        fit(model, epochs=0)
        assert count == len(heard.records)
        fit(model)
        count = len(heard.records)
    assert 2 == len(heard.ids)


@pytest.mark.parametrize("form", ["none", "one", "nested", "positional", "list"])
def test_callbacks_come_in_any_form(heard: Heard, form: str) -> None:
    """All that `fit` takes for callbacks is taken, called, and left as it was."""
    import keras

    model, calls = make(), list[int]()
    mine = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: calls.append(epoch))
    given: Any = {"none": None, "one": mine, "nested": [(mine,), []], "positional": [mine]}.get(
        form
    )
    if form == "list":
        given = keras.callbacks.CallbackList([mine], True, model=model, epochs=2)
    heard.bus.attach(model)
    if form == "positional":
        model.fit(X, Y, 8, 2, 0, given)
    else:
        model.fit(X, Y, epochs=2, verbose=0, callbacks=given)
    assert ([] if form == "none" else [0, 1]) == calls
    assert [0, 1] == [e.epoch for e in heard.of(EpochEnded)]
    assert "finished" == heard.only(RunEnded).status
    if form == "list":
        assert [mine, model.history] == given.callbacks


# Ends ---------------------------------------------------------------------------------------------


def test_an_early_stop_says_why(heard: Heard) -> None:
    """EarlyStopping is the reason, and its best value and epoch are the best of the run."""
    import keras

    model = make()
    heard.bus.attach(model)
    stopping = keras.callbacks.EarlyStopping("loss", min_delta=1e9, patience=2)
    fit(model, stopping, epochs=9)
    ended = heard.only(RunEnded)
    assert ("finished", "early stop: no better loss in 2 epochs") == (ended.status, ended.reason)
    assert [0, 1, 2] == [e.epoch for e in heard.of(EpochEnded)]
    assert ("loss", stopping.best, stopping.best_epoch) == (
        ended.best.metric,
        ended.best.value,
        ended.best.epoch,
    )
    assert {"loss": "min"} == heard.only(RunStarted).goals


def test_a_stop_by_a_callback_is_recorded(heard: Heard) -> None:
    """`model.stop_training` that a user sets ends the run as finished."""
    model = make()
    heard.bus.attach(model)
    fit(model, at_epoch(0, lambda m: setattr(m, "stop_training", True)))
    ended = heard.only(RunEnded)
    assert ("finished", "stopped by a callback") == (ended.status, ended.reason)


def test_a_failure_before_the_first_epoch_is_a_failed_run(heard: Heard) -> None:
    """Data that doesn't fit the model gives a run that failed, with the reason."""
    model = make()
    heard.bus.attach(model)
    with pytest.raises(ValueError, match="expected axis") as raised:
        model.fit(X[:, :3], Y, verbose=0)
    assert ["run.started", "model.described", "run.ended"] == [
        event_name(r.event) for r in heard.records
    ]
    assert str(raised.value) == heard.only(RunEnded).error.message


def test_a_failed_run_has_its_best(heard: Heard, tmp_path: Path) -> None:
    """What was best before an exception is in the end, and nothing is left on the objects."""
    import keras

    model, error = make(), ZeroDivisionError("user")
    heard.bus.attach(model)
    saver = keras.callbacks.ModelCheckpoint(tmp_path / "b.keras", "loss", save_best_only=True)
    before = set(vars(saver))
    with pytest.raises(ZeroDivisionError) as raised:
        fit(model, saver, at_epoch(2, throw(error)))
    assert error is raised.value
    ended = heard.only(RunEnded)
    assert ("failed", 1, saver.best) == (ended.status, ended.best.epoch, ended.best.value)
    assert set() == set(vars(saver)) - before - {"_current_epoch"}
    assert {"save", "save_weights"}.isdisjoint(vars(model))


# Checkpoints --------------------------------------------------------------------------------------


def test_checkpoints_exist_when_they_are_recorded(heard: Heard, tmp_path: Path) -> None:
    """Best, last and periodic ones are recorded after they exist, with epoch, step and score."""
    import keras

    model, missing = make(metrics=["accuracy"]), list[str]()

    def check(record: Any) -> None:
        if not Path(record.event.path).exists():
            missing.append(record.event.path)

    heard.bus.subscribe(check, CheckpointSaved)
    heard.bus.attach(model)
    kinds = keras.callbacks.ModelCheckpoint
    history = fit(
        model,
        kinds(tmp_path / "e{epoch:02d}.keras"),
        kinds(tmp_path / "last.weights.h5", save_weights_only=True),
        kinds(tmp_path / "best.keras", "val_loss", save_best_only=True),
        kinds(tmp_path / "acc.keras", "val_accuracy", save_best_only=True),
        validation_data=(X, Y),
    ).history
    assert [] == missing
    saved = heard.of(CheckpointSaved)
    names = [(Path(e.path).name, e.kind, e.epoch, e.step) for e in saved if not e.final]
    assert [f"e0{n}.keras" for n in (1, 2, 3)] == [n[0] for n in names if n[1] == "periodic"]
    assert [("last.weights.h5", "last", n, BATCHES * (n + 1)) for n in range(3)] == [
        n for n in names if n[1] == "last"
    ]
    best = [n for n in names if n[0] == "best.keras"]
    assert [("best.keras", "best", n, BATCHES * (n + 1)) for n in range(3)] == best
    assert [{k: v[e.epoch] for k, v in history.items()} for e in saved if not e.final] == [
        e.metrics for e in saved if not e.final
    ]
    finals = {Path(e.path).name: (e.kind, e.epoch) for e in saved if e.final}
    assert {
        "last.weights.h5": ("last", 2),
        "best.keras": ("best", 2),
        "acc.keras": ("best", 0),
    } == (finals)
    assert {"val_loss": "min", "val_accuracy": "max"} == heard.only(RunStarted).goals
    assert str(tmp_path) == heard.only(RunStarted).save_dir
    ended = heard.only(RunEnded)
    assert ("val_loss", min(history["val_loss"]), 2) == (
        ended.best.metric,
        ended.best.value,
        ended.best.epoch,
    )


def test_a_save_between_epochs_has_its_step(heard: Heard, tmp_path: Path) -> None:
    """`save_freq` in batches, and a save by the user's callback, are recorded where they happen."""
    import keras

    model = make()
    heard.bus.attach(model)
    path = tmp_path / "b{epoch}-{batch}.keras"
    mine = at_epoch(2, lambda m: m.save(filepath=tmp_path / "mine.keras"), "on_epoch_end")
    fit(model, keras.callbacks.ModelCheckpoint(path, save_freq=4), mine)
    saved = [(Path(e.path).name, e.kind, e.epoch, e.step) for e in heard.of(CheckpointSaved)]
    assert [
        ("b2-1.keras", "periodic", 1, 4),
        ("b3-2.keras", "periodic", 2, 8),
        ("mine.keras", "periodic", 2, 9),
    ] == saved


def test_initial_epoch_is_a_resume(heard: Heard, tmp_path: Path) -> None:
    """A loaded model continues the run of the folder that it saves to."""
    import keras

    saver = keras.callbacks.ModelCheckpoint(tmp_path / "m.keras")
    model = make()
    heard.bus.attach(model)
    fit(model, saver, epochs=2)
    again = keras.models.load_model(tmp_path / "m.keras")
    heard.bus.attach(again)
    fit(again, saver, epochs=4, initial_epoch=2)
    assert 1 == len(heard.ids)
    assert {1, 2} == {r.attempt for r in heard.records}
    resumed = heard.of(RunStarted)[1].resumed
    assert (1, 2 * BATCHES, str(tmp_path)) == (resumed.epoch, resumed.step, resumed.save_dir)
    assert [0, 1, 2, 3] == [e.epoch for e in heard.of(EpochStarted)]


@pytest.mark.parametrize("is_first", [True, False])
def test_a_restored_backup_is_seen(heard: Heard, tmp_path: Path, is_first: bool) -> None:
    """BackupAndRestore sets the epoch when training begins, after or before our callback."""
    import keras

    def callbacks(*more: Any) -> list[Any]:
        backup = keras.callbacks.BackupAndRestore(tmp_path / "backup")
        ours = callback_class()(heard.bus)
        return [*([ours, backup] if is_first else [backup, ours]), *more]

    with pytest.raises(ZeroDivisionError):
        fit(make(), *callbacks(at_epoch(2, throw(ZeroDivisionError()))))
    for record in heard.records:
        assert not isinstance(record.event, RunEnded)
    fit(make(), *callbacks())
    resumed = heard.of(RunStarted)[1].resumed
    assert (1, 2 * BATCHES) == (resumed.epoch, resumed.step)
    assert [0, 1, 2, 2] == [e.epoch for e in heard.of(EpochStarted)]
    assert str(tmp_path / "backup") == heard.of(RunStarted)[1].save_dir


# Copies -------------------------------------------------------------------------------------------


def test_saved_and_copied_models_carry_nothing_of_ours(heard: Heard, tmp_path: Path) -> None:
    """Saving, cloning, copying and pickling an attached model work, and give it clean."""
    import keras

    model = make()
    heard.bus.attach(model)
    fit(model)
    model.save(tmp_path / "m.keras")
    copies = [
        keras.models.load_model(tmp_path / "m.keras"),
        keras.models.clone_model(model),
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
    ]
    assert [False] * 4 == ["fit" in vars(each) for each in copies]
    assert [weights(model)] * 3 == [weights(copies[i]) for i in (0, 2, 3)]
    count = len(heard.records)
    fit(copies[0])
    assert count == len(heard.records)


def test_a_copied_callback_reports_on_its_own(heard: Heard) -> None:
    """Copies, as tuners make them for each trial, are runs of the same bus; the model stays out."""
    callback = callback_class()(heard.bus)
    fit(make(), callback)
    copied = copy.deepcopy(callback)
    assert copied.model is None
    fit(make(), copied)
    assert ["finished", "finished"] == [e.status for e in heard.of(RunEnded)]
    assert callback_class() is type(pickle.loads(pickle.dumps(callback)))


def test_buses_detach_in_any_order(heard: Heard, journals: Path) -> None:
    """Two buses on one model both hear it, and each leaves the other when it goes."""
    model, other = make(), Heard(journals)
    first, second = heard.bus.attach(model), other.bus.attach(model)
    fit(model)
    assert summary(heard.records) == summary(other.records)
    first.detach()
    fit(model)
    assert (1, 2) == (len(heard.ids), len(other.ids))
    second.detach()
    assert "fit" not in vars(model)


# Attaching ----------------------------------------------------------------------------------------


def test_what_does_not_train_is_refused() -> None:
    """The error for a layer says what to attach."""
    import keras

    with pytest.raises(
        trainbus.AttachError, match=r"expected a keras.Model or a BusCallback, found Dense; attach"
    ):
        trainbus.Bus().attach(keras.layers.Dense(1))


def test_a_fit_without_callbacks_is_reported(
    heard: Heard, caplog: pytest.LogCaptureFixture
) -> None:
    """A subclass's `fit` that takes no callbacks trains as ever, and one line says what to do."""
    import keras

    class Own(keras.Sequential):  # type: ignore[misc]
        def fit(self, data: Any) -> Any:
            return super().fit(*data, verbose=0)

    model = Own([keras.layers.Dense(1)])
    model.compile(loss="mse")
    heard.bus.attach(model)
    model.fit((X, Y))
    assert [] == heard.records
    assert "this `fit` takes no `callbacks`" in caplog.text


HOOKED = """
import os, sys
os.environ["KERAS_BACKEND"] = "torch"
import inspect
import keras
import numpy as np
import trainbus
from trainbus.adapters import keras as adapter

bus, other, attached, records = trainbus.Bus(), trainbus.Bus(), [], []
bus.subscribe(records.append)
other.subscribe(lambda record: records.append("other"))

def attach(target):
    attached.append(target)
    bus.attach(target)

before = inspect.signature(keras.Model.fit), keras.Model.fit.__doc__
adapter.hook(keras, attach)
adapter.hook(keras, attach)
assert before == (inspect.signature(keras.Model.fit), keras.Model.fit.__doc__)

class Own(keras.Sequential):
    def fit(self, x, y, epochs, mine=0):
        mines.append(mine)
        return super().fit(x, y, epochs=epochs, verbose=0)

mines = []
x = np.ones((8, 2))
models = [kind([keras.layers.Dense(1)]) for kind in (keras.Sequential, Own, keras.Sequential)]
for model in models:
    model.compile(loss="mse")
assert not attached
for _ in range(2):
    models[0].fit(x, x[:, :1], epochs=1, verbose=0)
    models[1].fit(x, x[:, :1], 1, mine=7)
models[2].evaluate(x, x[:, :1], verbose=0)
assert models[:2] == attached, attached
assert [7, 7] == mines
ended = [r.event.status for r in records if isinstance(r.event, trainbus.events.RunEnded)]
assert ["finished"] * 4 == ended, ended
models[2].fit(x, x[:, :1], verbose=0, callbacks=[adapter.BusCallback(other)])
other.attach(models[2])
count = len(records)
models[2].fit(x, x[:, :1], verbose=0)
assert 2 == len(attached), "a model that reports to a bus is attached to no other"
assert {"other"} == set(records[count:])
try:
    models[2].fit(no_such_argument=1)
except TypeError:
    print("ok")
"""


def test_the_hook_attaches_what_trains_once(tmp_path: Path) -> None:
    """Under `trainbus run` each model that trains is attached once, at its first fit."""
    done = subprocess.run(
        [sys.executable, "-c", HOOKED],
        cwd=tmp_path,
        env={**os.environ, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (0, "ok\n") == (done.returncode, done.stdout), done.stderr[-3000:]


def test_importing_the_adapter_imports_no_framework(tmp_path: Path) -> None:
    """Keras is imported by who trains with it."""
    code = "import sys, trainbus.adapters.keras; print({'keras', 'torch'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert "set()\n" == done.stdout


def test_an_odd_optimizer_costs_only_its_values(heard: Heard) -> None:
    """What can't be read of an optimizer is logged once, and everything else arrives."""
    import keras

    class Odd(keras.optimizers.SGD):  # type: ignore[misc]
        @property
        def iterations(self) -> Any:
            return "many"

    model = make(optimizer=Odd(0.05))
    heard.bus.attach(model)
    fit(model)
    assert [0, 1, 2] == [e.epoch for e in heard.of(EpochEnded)]
    assert [{"loss", "mae", "learning_rate"}] * 3 == [
        e.values.keys() for e in heard.of(MetricsLogged)
    ]


def test_a_loop_of_the_users_own_is_heard(heard: Heard) -> None:
    """A CallbackList that a user's own loop drives makes a run of it."""
    import keras

    model = make()
    callbacks = keras.callbacks.CallbackList([callback_class()(heard.bus)], model=model)
    callbacks.on_train_begin()
    for epoch in range(2):
        callbacks.on_epoch_begin(epoch)
        callbacks.on_epoch_end(epoch, {"loss": model.train_on_batch(X, Y)[0]})
    callbacks.on_train_end()
    assert [] == check_grammar(heard.records)
    assert [0, 1] == [e.epoch for e in heard.of(MetricsLogged)]
    assert ("finished", None) == (heard.only(RunEnded).status, heard.only(RunEnded).reason)


def test_a_torch_rank_is_asked_for(heard: Heard, tmp_path: Path) -> None:
    """With a process group of torch its rank counts, and not what the environment says."""
    import torch

    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RANK", "3")
            fit(make(), callback_class()(heard.bus), epochs=1)
    finally:
        torch.distributed.destroy_process_group()
    assert 1 == heard.only(RunStarted).world_size


def test_a_failure_of_another_rank_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is not the main one emits nothing, and says what ended it."""

    class Emit:
        services: frozenset[str] = frozenset()

        def __init__(self) -> None:
            self.heard: list[object] = []

        def __call__(self, event: object, /) -> None:
            self.heard.append(event)

        def every(self, phase: str) -> int | None:
            return None

        def failed_on(self, rank: int, error: BaseException) -> None:
            self.heard.append((rank, error))

    adapter = importlib.import_module("trainbus.adapters.keras")
    model, emit, error = make(), Emit(), ZeroDivisionError("user")
    adapter.attach(model, emit)
    monkeypatch.setenv("RANK", "2")
    with pytest.raises(ZeroDivisionError):
        fit(model, at_epoch(1, throw(error)))
    assert [(2, error)] == emit.heard


def test_a_callback_that_goes_to_a_second_bus_stays_with_it() -> None:
    """Closing the first bus does not detach it from the second."""
    first, second = trainbus.Bus(), trainbus.Bus()
    given = callback_class()(first)
    second.attach(given)
    first.close()
    assert given.report.active
    second.close()
    assert not given.report.active


def test_a_logger_of_keras_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    """Where a sink feeds the same tracker, one line says so; the run names what is fed twice."""
    import keras

    base, theirs = keras.callbacks.Callback, keras.callbacks.TensorBoard
    # Keras' own writes by TensorFlow: here it is one that writes nothing.
    mute = {n: getattr(base, n) for n in dir(base) if n.startswith(("on_", "set_", "__init__"))}
    heard = feeding("tensorboard")
    model = make()
    heard.bus.attach(model)
    fit(model, type("TensorBoard", (theirs,), mute)(), epochs=1)
    assert [["tensorboard"]] == [started.own_loggers for started in heard.of(RunStarted)]
    assert [
        "keras's own TensorBoard and a sink of trainbus both log to TensorBoard; "
        "remove one of them (leave it out of the callbacks of fit())"
    ] == [line for line in caplog.messages if "both log" in line]
