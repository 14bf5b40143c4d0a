"""The skorch adapter in real trainings: the suite, the history, checkpoints, and the traps."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV
from skorch import NeuralNetClassifier
from skorch.callbacks import (
    Callback,
    Checkpoint,
    EarlyStopping,
    EpochScoring,
    LoadInitState,
    LRScheduler,
    TrainEndCheckpoint,
)
from trainbus.adapters import skorch as adapter

import trainbus
from support.feeding import feeding
from support.heard import Heard
from trainbus.events import (
    CheckpointSaved,
    EpochEnded,
    EpochStarted,
    MetricsLogged,
    ModelDescribed,
    Record,
    RunEnded,
    RunStarted,
)
from trainbus.testing import AdapterConformance, Training, check_grammar

BusCallback: Any = adapter.BusCallback

X = np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32)
Y = (X[:, 0] > 0).astype(np.int64)
BATCHES = 4


class At(Callback):  # type: ignore[misc]
    """Calls a function of the user's at each of the events `on_train_begin`, `on_batch_end`…"""

    def __init__(self, when: str, do: Callable[[Any], object]) -> None:
        self.when = when
        self.do = do

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("on_") and name == object.__getattribute__(self, "when"):
            return lambda net, **kwargs: self.do(net)
        return super().__getattribute__(name)


class Count(Callback):  # type: ignore[misc]
    """Counts the epochs that were trained."""

    trained = 0

    def on_epoch_end(self, net: Any, **kwargs: Any) -> None:
        """Count one more."""
        self.trained += 1


def raise_in_epoch(error: BaseException, epoch: int) -> At:
    """Return a callback that raises in the second batch of an epoch counted from 0."""

    def do(net: Any) -> None:
        if len(net.history) == epoch + 1 and len(net.history[-1, "batches"]) == 2:
            raise error

    return At("on_batch_end", do)


def make(epochs: int = 3, callbacks: Any = (), **options: Any) -> Any:
    """Return a net with one layer, made with the same weights each time."""
    torch.manual_seed(0)
    return NeuralNetClassifier(
        torch.nn.Linear(4, 2),
        criterion=torch.nn.CrossEntropyLoss,
        max_epochs=epochs,
        lr=0.1,
        batch_size=8,
        callbacks=list(callbacks),
        verbose=0,
        **options,
    )


class TestConformance(AdapterConformance):
    def start(self, folder: Path, epochs: int) -> Training:
        return set_up(folder, epochs)

    def trace(self, target: Any) -> object:
        return list(target.callbacks), sorted(vars(target))

    def handles(self, target: Any) -> object:
        return target.callbacks


def set_up(folder: Path, epochs: int, *, resumed: bool = False) -> Training:
    """Return a training that saves after each epoch."""
    checkpoint = Checkpoint(monitor=None, dirname=str(folder / "saved"))
    count = Count()
    net = make(epochs, [checkpoint, count])
    if resumed:
        net.callbacks.append(LoadInitState(checkpoint))
        net.max_epochs = epochs - 1

    return Training(
        target=net,
        run=lambda: net.fit(X, Y),
        result=lambda: net.module_.weight.detach().numpy().tobytes(),
        fail_at=lambda error: net.callbacks.append(raise_in_epoch(error, 1)),
        epochs_trained=lambda: count.trained,
        resume=lambda: set_up(folder, epochs, resumed=True),
        stop_early=lambda: net.callbacks.append(
            EarlyStopping(patience=1, threshold=9.0, threshold_mode="abs")
        ),
    )


@pytest.fixture
def heard() -> Heard:
    return Heard()


def test_only_nets_can_be_attached(heard: Heard) -> None:
    """The error names what was found and what to attach."""
    with pytest.raises(trainbus.AttachError, match="found EarlyStopping; attach the NeuralNet"):
        heard.bus.attach(EarlyStopping())


def test_metrics_are_those_of_the_history(heard: Heard) -> None:
    """Each epoch has the values of its row, by their own names, and no step."""
    net = make(callbacks=[LRScheduler("StepLR", step_size=1, gamma=0.5)])
    heard.bus.attach(net)
    net.fit(X, Y)
    logged = heard.of(MetricsLogged)
    assert [0, 0, 1, 1, 2, 2] == [e.epoch for e in logged]
    assert {None} == {e.step for e in logged}
    for event in logged:
        names = {"train_loss", "dur", "event_lr"}
        if event.phase == "validation":
            names = {"valid_loss", "valid_acc"}
        assert {n: net.history[event.epoch, n] for n in names} == event.values
    rates = [e.values["event_lr"] for e in logged if e.phase == "train"]
    assert [0.1, 0.05, 0.025] == pytest.approx(rates)


def test_the_start_has_the_configuration(heard: Heard) -> None:
    """Parameters are plain and without addresses, goals those of the scores, sizes the module's."""
    net = make(epochs=1, optimizer__momentum=0.5)
    heard.bus.attach(net)
    net.fit(X, Y)
    (started,) = heard.of(RunStarted)
    assert "skorch" == started.framework
    assert adapter.TESTED_VERSIONS == started.framework_version
    assert 0.5 == started.params["optimizer__momentum"]
    assert "SGD" == started.params["optimizer"]
    assert " at 0x" not in repr(started.params)
    assert {"train_loss": "min", "valid_loss": "min", "valid_acc": "max"} == started.goals
    assert "classifier" == started.task
    assert started.resumed is None
    assert [10] == [e.parameters for e in heard.of(ModelDescribed)]
    (lr,) = [e.values["lr"] for e in heard.of(MetricsLogged) if e.phase == "train"]
    assert 0.1 == lr


def without_times(records: list[Record]) -> list[Any]:
    """Return the events without what differs from training to training."""
    found: list[Any] = []
    for event in (record.event for record in records):
        if isinstance(event, MetricsLogged):
            found.append((event.phase, event.epoch, {**event.values, "dur": 0.0}))
        elif isinstance(event, RunStarted):
            found.append({k: v for k, v in event.params.items() if "module" not in k})
        else:
            found.append((type(event), getattr(event, "epoch", None)))
    return found


def test_the_callback_records_what_attach_records(heard: Heard) -> None:
    """`callbacks=[("bus", BusCallback(bus))]` gives the same events, attached as well or not."""
    attached = make()
    heard.bus.attach(attached)
    attached.fit(X, Y)
    expected = without_times(heard.records)
    for is_attached in (False, True):
        heard.records.clear()
        net = make(callbacks=[("bus", BusCallback(heard.bus))])
        if is_attached:
            heard.bus.attach(net)
        net.fit(X, Y)
        assert expected == without_times(heard.records)


def test_an_initialized_net_can_be_attached(heard: Heard) -> None:
    """A net that was initialized before reports, and is as it was after detaching."""
    net = make().initialize()
    before = list(net.callbacks_)
    detach = heard.bus.attach(net).detach
    net.partial_fit(X, Y)
    assert [0, 1, 2] == [e.epoch for e in heard.of(EpochEnded)]
    detach()
    assert before == net.callbacks_
    assert [] == net.callbacks
    net.fit(X, Y)
    assert 1 == len(heard.runs())


def test_a_net_without_callbacks_gets_none_back(heard: Heard) -> None:
    """`callbacks=None` is None again after detaching."""
    net = NeuralNetClassifier(torch.nn.Linear(4, 2))
    heard.bus.attach(net).detach()
    assert net.callbacks is None


def exists(event: Any) -> bool:
    """Return whether the file of a checkpoint is there."""
    return Path(event.path).exists()


def test_checkpoints_are_recorded_when_they_exist(heard: Heard, tmp_path: Path) -> None:
    """Best ones carry their score, periodic ones their own path; the last write is final."""
    seen: list[bool] = []
    heard.bus.subscribe(lambda r: seen.append(exists(r.event)), CheckpointSaved)
    net = make(
        callbacks=[
            Checkpoint(dirname=str(tmp_path / "best")),
            Checkpoint(
                monitor=None,
                dirname=str(tmp_path / "each"),
                f_params="{last_epoch[epoch]}.pt",
                event_name="event_each",
            ),
            TrainEndCheckpoint(dirname=str(tmp_path / "end")),
        ]
    )
    heard.bus.attach(net)
    net.fit(X, Y)
    saved = heard.of(CheckpointSaved)
    assert all(seen)
    assert str(tmp_path / "best") == heard.of(RunStarted)[0].save_dir
    epochs = [i for i, row in enumerate(net.history) if row["valid_loss_best"]]
    best = [e for e in saved if e.kind == "best"]
    assert [*epochs, epochs[-1]] == [e.epoch for e in best]
    assert [False] * len(epochs) + [True] == [e.final for e in best]
    scores = [{"valid_loss": net.history[e.epoch, "valid_loss"]} for e in best]
    assert scores == [e.metrics for e in best]
    each = [e for e in saved if e.kind == "periodic"]
    assert ["1.pt", "2.pt", "3.pt"] == [Path(e.path).name for e in each]
    assert [BATCHES, 2 * BATCHES, 3 * BATCHES] == [e.step for e in each]
    assert [True] * 3 == [e.final for e in each]
    (end,) = [e for e in saved if e.kind == "last"]
    assert (2, True, "train_end_params.pt") == (end.epoch, end.final, Path(end.path).name)
    found = heard.of(RunEnded)[0].best
    assert ("valid_loss", epochs[-1]) == (found.metric, found.epoch)
    assert net.history[epochs[-1], "valid_loss"] == found.value


def test_early_stopping_is_no_interrupt(heard: Heard) -> None:
    """The epoch that stops the training is recorded in full, and the end has the reason."""
    net = make(9, [EarlyStopping(patience=2, threshold=9.0, threshold_mode="abs")])
    heard.bus.attach(net)
    net.fit(X, Y)
    (ended,) = heard.of(RunEnded)
    assert "finished" == ended.status
    assert "early stop: no better valid_loss in 2 epochs" == ended.reason
    assert [0, 1, 2] == [e.epoch for e in heard.of(EpochEnded)]
    assert len(net.history) == 3
    assert {0, 1, 2} == {e.epoch for e in heard.of(MetricsLogged)}


@pytest.mark.parametrize("when", ["on_batch_end", "on_epoch_begin", "on_epoch_end"])
def test_a_swallowed_interrupt_is_a_stop(heard: Heard, when: str) -> None:
    """Ctrl-C, after which `fit` returns, ends the run as stopped wherever it comes."""

    def interrupt(net: Any) -> None:
        if len(net.history) == 2:
            raise KeyboardInterrupt

    net = make(callbacks=[At(when, interrupt)])
    heard.bus.attach(net)
    assert net is net.fit(X, Y)
    (ended,) = heard.of(RunEnded)
    assert ("stopped", "KeyboardInterrupt") == (ended.status, ended.reason)
    assert [] == check_grammar(heard.records)
    assert [0] == [e.epoch for e in heard.of(EpochEnded)]


def test_the_users_error_ends_the_run(heard: Heard) -> None:
    """An error in another callback leaves `fit` as it was, and no later fit is disturbed."""
    error = RuntimeError("boom")
    net = make(callbacks=[raise_in_epoch(error, 1)])
    heard.bus.attach(net)
    with pytest.raises(RuntimeError) as raised:
        net.fit(X, Y)
    assert error is raised.value
    assert "fit_loop" not in vars(net)
    (ended,) = heard.of(RunEnded)
    assert ("failed", "RuntimeError: boom") == (ended.status, ended.reason)
    net.set_params(callbacks__At=None)
    net.fit(X, Y)
    assert ["failed", "finished"] == [e.status for e in heard.of(RunEnded)]


def test_an_error_before_the_loop_leaves_nothing(heard: Heard) -> None:
    """After an error in `on_train_begin` of a later callback there is no run, the next works."""
    errors = [RuntimeError("boom")]

    def fail(net: Any) -> None:
        if errors:
            raise errors.pop()

    net = make(1, [("bus", BusCallback(heard.bus)), At("on_train_begin", fail)])
    with pytest.raises(RuntimeError, match="boom"):
        net.fit(X, Y)
    assert [] == heard.records
    net.fit(X, Y)
    assert "fit_loop" not in vars(net)
    assert ["finished"] == [e.status for e in heard.of(RunEnded)]


def test_a_partial_fit_continues(heard: Heard) -> None:
    """A further `partial_fit` is a run that continues the first; a further `fit` starts anew."""
    net = make(2)
    heard.bus.attach(net)
    net.fit(X, Y)
    net.partial_fit(X, Y, epochs=1)
    net.fit(X, Y)
    starts = [
        None if e.resumed is None else (e.resumed.epoch, e.resumed.step)
        for e in heard.of(RunStarted)
    ]
    assert [None, (1, 2 * BATCHES), None] == starts
    assert [0, 1, 2, 0, 1] == [e.epoch for e in heard.of(EpochStarted)]
    assert ["finished"] * 3 == [e.status for e in heard.of(RunEnded)]
    for run in heard.runs():
        assert [] == check_grammar(run)


def test_a_loaded_checkpoint_is_a_resumed_run(heard: Heard, tmp_path: Path) -> None:
    """`LoadInitState` continues the first run, whatever its place in the list of callbacks."""
    heard.bus.attach(first := make(2, [Checkpoint(monitor=None, dirname=str(tmp_path / "cp"))]))
    first.fit(X, Y)
    checkpoint = Checkpoint(monitor=None, dirname=str(tmp_path / "cp"))
    net = make(1, [("bus", BusCallback(heard.bus)), checkpoint, LoadInitState(checkpoint)])
    net.fit(X, Y)
    resumed = heard.of(RunStarted)[1].resumed
    assert (1, 2 * BATCHES, str(tmp_path / "cp")) == (resumed.epoch, resumed.step, resumed.save_dir)
    assert [0, 1, 2] == [e.epoch for e in heard.of(EpochStarted)]
    assert 1 == len({record.run for record in heard.records})


def test_batch_losses_come_when_they_are_asked_for(tmp_path: Path) -> None:
    """`every: {train: 3}` gives the losses of every third training batch, no validation batches."""
    config = tmp_path / "bus.yaml"
    config.write_text(
        f"sinks: {{local: {{type: jsonl, path: '{tmp_path}/r.jsonl', every: {{train: 3}}}}}}\n"
        f"journal: {{dir: '{tmp_path}/journal'}}\n"
    )
    logged: list[Any] = []
    net = make(2)
    with trainbus.load(str(config)) as bus:
        bus.subscribe(lambda r: logged.append(r.event), MetricsLogged)
        bus.attach(net)
        net.fit(X, Y)
    steps = [e for e in logged if e.step is not None]
    assert [(0, 3), (1, 6)] == [(e.epoch, e.step) for e in steps]
    losses = [row["train_loss"] for e in net.history for row in e["batches"] if "train_loss" in row]
    assert [losses[2], losses[5]] == [e.values["batch/train_loss"] for e in steps]


def test_custom_scores_have_their_phase(heard: Heard) -> None:
    """A score of the training data is one of training, whatever its name."""
    scores = [
        EpochScoring("accuracy", name="fit", lower_is_better=False, on_train=True),
        EpochScoring(lambda net, x, y: float("nan"), name="odd", lower_is_better=None),
    ]
    net = make(1, [("bus", BusCallback(heard.bus)), *scores])
    net.fit(X, Y)
    names = {e.phase: set(e.values) for e in heard.of(MetricsLogged)}
    assert {"train_loss", "fit", "dur", "lr"} == names["train"]
    assert {"valid_loss", "valid_acc", "odd"} == names["validation"]
    assert any(np.isnan(e.values.get("odd", 0)) for e in heard.of(MetricsLogged))
    assert {"train_loss", "valid_loss", "valid_acc", "fit"} == set(heard.of(RunStarted)[0].goals)


def test_evaluation_alone_records_nothing(heard: Heard) -> None:
    """Prediction and scoring are no training."""
    net = make(1)
    heard.bus.attach(net)
    net.fit(X, Y)
    count = len(heard.records)
    net.predict(X)
    net.score(X, Y)
    assert count == len(heard.records)


def test_copies_report_until_the_original_is_detached(heard: Heard) -> None:
    """Clones and deep copies train as runs of their own, and fall silent with the original."""
    net = make(1)
    detach = heard.bus.attach(net).detach
    copies = [clone(net), copy.deepcopy(net)]
    for each in copies:
        each.fit(X, Y)
    assert 2 == len(heard.runs())
    detach()
    for each in copies:
        each.fit(X, Y)
    assert 2 == len(heard.runs())


def test_a_pickled_net_trains(heard: Heard, tmp_path: Path) -> None:
    """A net that its own checkpoint pickled, in the midst of its training, can be trained."""
    saving = Checkpoint(monitor=None, f_pickle="net.pkl", dirname=str(tmp_path))
    net = make(1, [saving])
    heard.bus.attach(net)
    net.fit(X, Y)
    count = len(heard.records)
    revived = pickle.loads((tmp_path / "net.pkl").read_bytes())
    assert "fit_loop" not in vars(revived)
    revived.fit(X, Y)
    assert 1 == len(revived.history)
    assert count == len(heard.records)


def test_a_grid_search_trains_as_without(heard: Heard) -> None:
    """Each net of a search in this process is a run; the search finds what it finds without."""

    def search(net: Any, jobs: int | None) -> Any:
        return GridSearchCV(net, {"lr": [0.01, 0.5]}, cv=2, n_jobs=jobs).fit(X, Y)

    expected = search(make(1), None).cv_results_["mean_test_score"].tolist()
    net = make(1)
    heard.bus.attach(net)
    assert expected == search(net, None).cv_results_["mean_test_score"].tolist()
    assert [0.01, 0.01, 0.5, 0.5] == [e.params["lr"] for e in heard.of(RunStarted)][:4]
    assert ["finished"] * 5 == [e.status for e in heard.of(RunEnded)]


def test_other_processes_of_a_search_can_unpickle_it(heard: Heard) -> None:
    """A search over an attached net in two processes ends as without."""
    net = make(1)
    heard.bus.attach(net)
    search = GridSearchCV(net, {"lr": [0.01, 0.5]}, cv=2, n_jobs=2, refit=False).fit(X, Y)
    assert not np.isnan(search.cv_results_["mean_test_score"]).any()
    assert [] == heard.records


HOOKED = """
import skorch.net
from trainbus.adapters import skorch as adapter
attached = []
before = skorch.net.NeuralNet.partial_fit
for _ in range(2):
    adapter.hook(skorch.net, attached.append)
hooked = skorch.net.NeuralNet.partial_fit
assert before.__doc__ == hooked.__doc__ and hooked.__wrapped__ is before

import numpy as np, torch, trainbus
from skorch import NeuralNetRegressor
X = np.zeros((8, 2), np.float32)
Y = np.zeros((8, 1), np.float32)
net = NeuralNetRegressor(torch.nn.Linear(2, 1), max_epochs=1, verbose=0)
net.initialize()
assert attached == []
net.fit(X, Y)
assert attached == [net]
bus = trainbus.Bus()
bus.attach(net)
net.fit(X, Y)
net.partial_fit(X, Y)
assert attached == [net], attached
"""


def test_hooked_nets_are_attached_when_they_train(tmp_path: Path) -> None:
    """`hook` attaches each net once when it trains, unless it has a callback of ours already."""
    script = tmp_path / "hooked.py"
    script.write_text(HOOKED)
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True
    )
    assert 0 == done.returncode, done.stderr


def test_a_logger_of_skorch_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Where a sink feeds the same tracker, one line says so; the run names what is fed twice."""
    from skorch.callbacks import TensorBoard
    from torch.utils.tensorboard import SummaryWriter

    heard = feeding("tensorboard")
    net = make(1, [TensorBoard(SummaryWriter(str(tmp_path)))])
    heard.bus.attach(net)
    net.fit(X, Y)
    assert [["tensorboard"]] == [started.own_loggers for started in heard.of(RunStarted)]
    assert [
        "skorch's own TensorBoard and a sink of trainbus both log to TensorBoard; "
        "remove one of them (leave it out of the callbacks)"
    ] == [line for line in caplog.messages if "both log" in line]


@pytest.mark.parametrize("is_first", [False, True])
def test_a_callback_in_an_attached_net_records_everything(heard: Heard, is_first: bool) -> None:
    """Whichever came first, a run comes once."""
    net = make(1)
    if is_first:
        heard.bus.attach(net)
    net.callbacks.append(("bus", BusCallback(heard.bus)))
    heard.bus.attach(net)
    net.fit(X, Y)
    assert ["run.started", "run.ended"] == [n for n in heard.names if n.startswith("run.")]
