"""The Lightning adapter in real trainings: the suite, both packages, counters, files, ranks."""

from __future__ import annotations

import math
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from msgspec import structs
from trainbus.adapters import lightning as adapter

import trainbus
from support import lightning_ddp, torchvision_cpu
from support.feeding import feeding
from support.journals import read_run
from support.lightning_ddp import QUIET, Steps, Tiny, data
from support.train import hermetic
from trainbus import AttachError, Bus, Record, SinkError, load
from trainbus.events import (
    CheckpointSaved,
    EpochEnded,
    EpochStarted,
    MetricsLogged,
    ModelDescribed,
    RunEnded,
    RunStarted,
    ended_by,
)
from trainbus.journal.directory import RunFolder
from trainbus.journal.reader import RunReader
from trainbus.testing import AdapterConformance, Training, check_grammar

torchvision_cpu.install()

import lightning.pytorch as pl  # noqa: E402  needs the line above
import pytorch_lightning  # noqa: E402

# Lightning warns of few workers, of folders that are not empty, and of torch's deprecations.
pytestmark = pytest.mark.filterwarnings("default")

EarlyStopping, ModelCheckpoint = pl.callbacks.EarlyStopping, pl.callbacks.ModelCheckpoint


class TinyToo(Steps, pytorch_lightning.LightningModule):  # type: ignore[misc]
    """The module for the package `pytorch_lightning`."""


class At(pl.Callback):  # type: ignore[misc]
    """Calls a function in one hook, from a global step on."""

    def __init__(self, hook: str, do: Callable[[Any], object], step: int = 3) -> None:
        def call(trainer: Any, *args: Any, **kwargs: Any) -> None:
            if trainer.global_step >= step:
                do(trainer)

        setattr(self, hook, call)


class Count(pl.Callback):  # type: ignore[misc]
    """Counts the epochs that were trained."""

    trained = 0

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        """Count one more."""
        self.trained += 1


class UsersLogger(pl.loggers.Logger):  # type: ignore[misc]
    """Keeps what Lightning gives to a logger."""

    name = "users"
    version = 0

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, dict[str, float]]] = []

    def log_hyperparams(self, params: Any) -> None:
        """Take them, and do nothing."""

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        """Keep the values, and the step that Lightning counts from 0."""
        self.seen.append((step, metrics))


def throw(error: BaseException) -> Callable[[Any], object]:
    def fail(trainer: Any) -> None:
        raise error

    return fail


def make(folder: Path, package: Any = pl, **arguments: Any) -> Any:
    """Return a trainer of three epochs that logs every step."""
    defaults = {"max_epochs": 3, "log_every_n_steps": 1, "logger": False}
    return package.Trainer(default_root_dir=folder, **QUIET, **{**defaults, **arguments})


@dataclass
class Heard:
    """The events of the trainings of one bus."""

    records: list[Record]

    def of(self, kind: type[Any], phase: str | None = None) -> list[Any]:
        """Return the events of a type, and of a phase."""
        found: list[Any] = [r.event for r in self.records if isinstance(r.event, kind)]
        return [event for event in found if phase in (None, getattr(event, "phase", None))]

    @property
    def end(self) -> RunEnded:
        """The end of the only run."""
        (event,) = self.of(RunEnded)
        assert [] == check_grammar(self.records)
        assert isinstance(event, RunEnded)
        return event


@pytest.fixture
def bus() -> Iterator[Any]:
    """A bus and its events."""
    with Bus(on_receipt=lambda receipt: None) as made:
        records: list[Record] = []
        made.subscribe(records.append)
        made.heard = Heard(records)  # type: ignore[attr-defined]
        yield made


def fit(bus: Any, trainer: Any, module: Any = None, **arguments: Any) -> Heard:
    """Train on three batches of each of the epochs, listened to."""
    torch.manual_seed(0)
    bus.attach(trainer)
    trainer.fit(Tiny() if module is None else module, data(), data(), **arguments)
    heard: Heard = bus.heard
    return heard


class TestConformance(AdapterConformance):
    def start(self, folder: Path, epochs: int) -> Training:
        return set_up(folder, epochs)

    def trace(self, target: Any) -> object:
        return list(target.callbacks), vars(target).keys(), vars(target._logger_connector).keys()

    def handles(self, target: Any) -> object:
        return target.callbacks

    def test_is_silent_on_other_ranks(  # type: ignore[override]
        self, two_processes: dict[str, Any]
    ) -> None:
        """Of two real processes one has the run; alone in one, Lightning takes no other rank."""
        folder, process = two_processes["ddp"]
        process.wait(300)
        assert [0] == [run.records[0].rank for run in runs_in(folder)[:1]]
        assert 2 == len(runs_in(folder))


def set_up(folder: Path, epochs: int, ckpt_path: Path | None = None) -> Training:
    """Return a training in this process."""
    torch.manual_seed(0)
    saver = ModelCheckpoint(folder / "saved", save_last=True)
    count = Count()
    trainer, module = make(folder, max_epochs=epochs, callbacks=[saver, count]), Tiny()

    def run() -> None:
        try:
            trainer.fit(module, data(), data(), ckpt_path=ckpt_path)
        except SystemExit as exit_:  # what Lightning makes of Ctrl-C
            raise exit_.__context__ or exit_ from None

    stop = EarlyStopping("val_loss", patience=1, mode="max")
    return Training(
        target=trainer,
        run=run,
        result=lambda: module.layer.weight.detach().numpy().tobytes(),
        fail_at=lambda error: trainer.callbacks.append(At("on_train_batch_start", throw(error))),
        epochs_trained=lambda: count.trained,
        stop_early=lambda: trainer.callbacks.append(stop),
        resume=lambda: set_up(folder, epochs, folder / "saved" / "last.ckpt"),
    )


# Metrics ------------------------------------------------------------------------------------------


def test_a_run_says_what_it_is(tmp_path: Path, bus: Any) -> None:
    """The start has hyperparameters, trainer and optimizer, the goal, and where files go."""
    saver = ModelCheckpoint(tmp_path / "saved", monitor="val_loss", mode="min")
    heard = fit(bus, make(tmp_path, callbacks=[saver]), Tiny(lr=0.2))
    (started,) = heard.of(RunStarted)
    assert ("lightning", pl.__version__) == (started.framework, started.framework_version)
    assert (0.2, "Tiny") == (started.params["lr"], started.params["module"])
    assert 3 == started.params["trainer"]["max_epochs"]
    assert ("SGD", 0.2) == tuple(started.params["optimizers"][0][k] for k in ("type", "lr"))
    assert {"val_loss": "min"} == started.goals
    assert str(tmp_path / "saved") == started.save_dir
    assert (1, None) == (started.world_size, started.resumed)
    assert [ModelDescribed(parameters=3, gradients=3)] == heard.of(ModelDescribed)
    assert ("finished", None) == (heard.end.status, heard.end.reason)


@pytest.mark.parametrize("accumulated", [1, 2])
def test_metrics_are_those_that_a_logger_gets(tmp_path: Path, bus: Any, accumulated: int) -> None:
    """Names, values and intervals are Lightning's; steps count the updates that were done."""
    users = UsersLogger()
    heard = fit(bus, make(tmp_path, logger=users, accumulate_grad_batches=accumulated))
    expected = []
    for step, values in users.seen:
        in_epoch = {"train_loss_step"} <= values.keys()
        named = {k: v for k, v in values.items() if k != "epoch"}
        expected.append((values["epoch"], step + 1 if in_epoch else None, named))
    found = [
        (e.epoch, e.step, {k: v for k, v in e.values.items() if k != "lr-SGD"})
        for e in heard.of(MetricsLogged)
    ]
    assert expected == found
    updates = {1: [1, 2, 3, 4, 5, 6, 7, 8, 9], 2: [1, 2, 3, 4, 5, 6]}[accumulated]
    assert updates == [e.step for e in heard.of(MetricsLogged, "train") if e.step is not None]
    validated = heard.of(MetricsLogged, "validation")
    assert [(0, None), (1, None), (2, None)] == [(e.epoch, e.step) for e in validated]
    assert all({"val_loss"} == e.values.keys() for e in validated)


def test_rates_are_those_that_a_step_was_made_with(tmp_path: Path, bus: Any) -> None:
    """The schedule halves the rate after each epoch, and the last step of one has the old rate."""
    heard = fit(bus, make(tmp_path))
    rates = [e.values["lr-SGD"] for e in heard.of(MetricsLogged, "train") if e.step is not None]
    assert [0.1] * 3 + [0.05] * 3 + [0.025] * 3 == rates


def test_epochs_shorter_than_the_interval_have_a_rate(tmp_path: Path, bus: Any) -> None:
    """Where Lightning logs no step, values are those of epochs, and the rate is among them."""
    heard = fit(bus, make(tmp_path, log_every_n_steps=50))
    logged = heard.of(MetricsLogged, "train")
    assert [(0, None), (1, None), (2, None)] == [(e.epoch, e.step) for e in logged]
    assert [0.1, 0.05, 0.025] == [e.values["lr-SGD"] for e in logged]
    assert all("train_loss_epoch" in e.values for e in logged)


def test_validations_within_an_epoch_have_steps(tmp_path: Path, bus: Any) -> None:
    """Of several validations an epoch, each is a value at a step."""
    heard = fit(bus, make(tmp_path, val_check_interval=1, max_epochs=1))
    validated = heard.of(MetricsLogged, "validation")
    assert [(0, 1), (0, 2), (0, 3)] == [(e.epoch, e.step) for e in validated]


class Counting(Tiny):
    """Logs counters, values of single validation batches, NaN, and what is not for loggers."""

    def training_step(self, batch: Any, index: int) -> Any:
        """Return the loss."""
        self.log_dict({"epoch": 7.0, "broken": math.nan})
        self.log("shown", 1.0, prog_bar=True, logger=False)
        return self._loss(batch)

    def validation_step(self, batch: Any, index: int) -> None:
        """Log the batch's number."""
        self.log("batch", float(index), on_step=True, on_epoch=False)

    def on_train_epoch_end(self) -> None:
        """Log what callbacks come too early for."""
        self.log("late", 1.0)


def test_what_a_module_may_log(tmp_path: Path, bus: Any) -> None:
    """Counters are dropped; NaN and the last values of an epoch are recorded."""
    heard = fit(bus, make(tmp_path, max_epochs=1), Counting())
    train = heard.of(MetricsLogged, "train")
    assert [{"broken", "lr-SGD"}] * 3 + [{"late"}] == [set(e.values) for e in train]
    assert all(math.isnan(e.values["broken"]) for e in train[:3])
    validated = heard.of(MetricsLogged, "validation")
    assert [(3, 0.0), (3, 1.0), (3, 2.0)] == [(e.step, e.values["batch"]) for e in validated]


class TwoOptimizers(Tiny):
    """Steps two optimizers by hand, as a GAN does."""

    automatic_optimization = False

    def training_step(self, batch: Any, index: int) -> None:
        """Step both."""
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self._loss(batch))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        """Return two of a kind, one with two groups."""
        weight, bias = self.layer.parameters()
        groups = [{"params": [weight], "lr": 0.2}, {"params": [bias], "lr": 0.3}]
        return [torch.optim.SGD([weight], lr=0.1), torch.optim.SGD(groups)]


def test_steps_of_several_optimizers_add_up(tmp_path: Path, bus: Any) -> None:
    """A batch of manual optimization with two optimizers makes two updates, at two rates."""
    heard = fit(bus, make(tmp_path, max_epochs=1), TwoOptimizers())
    logged = heard.of(MetricsLogged, "train")
    assert [2, 4, 6] == [e.step for e in logged]
    rates = {"lr-SGD": 0.1, "lr-SGD-1/pg1": 0.2, "lr-SGD-1/pg2": 0.3}
    assert [rates] * 3 == [e.values for e in logged]


# Ways of attaching --------------------------------------------------------------------------------


def events(records: list[Record]) -> list[Any]:
    """Return the events without what differs between two runs."""
    found: list[Any] = [record.event for record in records]
    for index, event in enumerate(found):
        if isinstance(event, EpochEnded):
            found[index] = structs.replace(event, duration_s=None)
    return found


def test_the_callback_reports_the_same(tmp_path: Path, bus: Any) -> None:
    """`Trainer(callbacks=[BusCallback(bus)])` gives the events that `bus.attach` gives."""
    heard = fit(bus, make(tmp_path / "same", callbacks=[saver(tmp_path)]))
    first = events(heard.records)
    heard.records.clear()
    (tmp_path / "saved").rename(tmp_path / "before")
    trainer = make(tmp_path / "same", callbacks=[adapter.BusCallback(bus), saver(tmp_path)])
    torch.manual_seed(0)
    trainer.fit(Tiny(), data(), data())
    assert first == events(heard.records)
    bus.attach(trainer)
    heard.records.clear()
    trainer.fit_loop.max_epochs += 1
    trainer.fit(Tiny(), data(), data())
    assert [3] == [event.epoch for event in heard.of(EpochStarted)]


def saver(folder: Path, **options: Any) -> Any:
    return ModelCheckpoint(folder / "saved", monitor="val_loss", save_last=True, **options)


def test_the_other_package_trains_too(tmp_path: Path, bus: Any) -> None:
    """A `pytorch_lightning` trainer reports the same, and takes the same callback."""
    heard = fit(bus, make(tmp_path, pytorch_lightning), TinyToo())
    assert "pytorch_lightning" == heard.of(RunStarted)[0].framework
    assert [0, 1, 2] == [event.epoch for event in heard.of(EpochEnded)]
    assert 9 + 3 == len(heard.of(MetricsLogged, "train"))
    assert "finished" == heard.end.status
    heard.records.clear()
    trainer = make(tmp_path, pytorch_lightning, callbacks=[adapter.BusCallback(bus)])
    trainer.fit(TinyToo(), data(), data())
    assert [0, 1, 2] == [event.epoch for event in heard.of(EpochEnded)]


def test_only_trainers_can_be_attached(bus: Any) -> None:
    """A module, or what only looks like a trainer, is refused with what to attach instead."""
    for target in (Tiny(), SimpleNamespace(callbacks=[])):
        with pytest.raises(AttachError, match=r"expected a Lightning Trainer, found .*`fit\(\)`"):
            adapter.attach(target, bus.emitter())


@pytest.mark.parametrize("package", [pl, pytorch_lightning])
def test_the_hook_attaches_what_trains(
    tmp_path: Path, bus: Any, package: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every trainer is attached once, when it trains, unless it has a callback of ours."""
    module = sys.modules[package.Trainer.__module__]
    monkeypatch.setattr(package.Trainer, "fit", package.Trainer.fit)
    before = package.Trainer.fit
    attached: list[object] = []

    def attach(trainer: object) -> None:
        attached.append(trainer)
        bus.attach(trainer)

    adapter.hook(module, attach)
    adapter.hook(module, attach)
    assert before is package.Trainer.fit.__wrapped__
    tiny = Tiny if package is pl else TinyToo
    trainer = make(tmp_path, package, max_epochs=1)
    trainer.validate(tiny(), data())
    assert [] == attached
    trainer.fit(tiny(), data(), data())
    trainer.fit(tiny(), data(), data())
    assert [trainer] == attached
    own = make(tmp_path, package, max_epochs=1, callbacks=[adapter.BusCallback(bus)])
    own.fit(tiny(), data(), data())
    assert [trainer] == attached
    assert 3 == len(bus.heard.of(RunEnded))


def test_trainers_with_the_callback_are_pickled(tmp_path: Path, bus: Any) -> None:
    """A trainer that is attached can be pickled, before a training and after it."""
    trainer = make(tmp_path, max_epochs=1, callbacks=[adapter.BusCallback(bus)])
    bus.attach(trainer)
    for _ in range(2):
        revived = pickle.loads(pickle.dumps(trainer.callbacks))
        assert [type(each) for each in trainer.callbacks] == [type(each) for each in revived]
        trainer.fit(Tiny(), data(), data())


# Evaluations, modes and second trainings ----------------------------------------------------------


def test_evaluations_alone_emit_nothing(tmp_path: Path, bus: Any) -> None:
    """`validate` before a training and after it is no run, nor part of one."""
    trainer = make(tmp_path, max_epochs=1)
    bus.attach(trainer)
    trainer.validate(Tiny(), data())
    assert [] == bus.heard.records
    trainer.fit(Tiny(), data(), data())
    count = len(bus.heard.records)
    trainer.validate(Tiny(), data())
    with pytest.raises(pl.utilities.exceptions.MisconfigurationException):
        trainer.test(Tiny(), data())
    assert count == len(bus.heard.records)


def test_a_search_for_a_rate_emits_nothing(tmp_path: Path, bus: Any) -> None:
    """The tuner calls `fit` and trains, and that is no run; the training after it is one."""
    trainer, module = make(tmp_path, max_epochs=1), Tiny()
    bus.attach(trainer)
    tuner = pl.tuner.Tuner(trainer)
    tuner.lr_find(module, data(), data(), num_training=4)
    assert [] == bus.heard.records
    trainer.fit(module, data(), data())
    assert "finished" == bus.heard.end.status
    assert [0] == [event.epoch for event in bus.heard.of(EpochStarted)]


@pytest.mark.parametrize(
    ("arguments", "steps"),
    [
        ({"logger": True}, [1, 2, 3, 4, 5, 6, 7, 8, 9]),
        ({"fast_dev_run": 2, "logger": True}, [1, 2]),
        ({"barebones": True, "log_every_n_steps": None}, []),
        ({"enable_checkpointing": False}, [1, 2, 3, 4, 5, 6, 7, 8, 9]),
    ],
)
def test_modes_of_the_trainer(
    tmp_path: Path, bus: Any, arguments: dict[str, Any], steps: list[int]
) -> None:
    """With loggers or none, in a dry run, and with all taken away, a run is whole."""
    if "barebones" in arguments:
        trainer = pl.Trainer(accelerator="cpu", barebones=True, max_epochs=1)
    else:
        trainer = make(tmp_path, **arguments)
    loggers = list(trainer.loggers)
    heard = fit(bus, trainer)
    assert "finished" == heard.end.status
    assert loggers == trainer.loggers
    assert steps == [e.step for e in heard.of(MetricsLogged, "train") if e.step is not None]


def test_two_trainings_of_one_trainer_are_two_runs(tmp_path: Path, bus: Any) -> None:
    """A second `fit` continues to count epochs, in its own run."""
    trainer = make(tmp_path, max_epochs=1)
    fit(bus, trainer)
    trainer.fit_loop.max_epochs = 2
    fit(bus, trainer)
    assert 2 == len({record.run for record in bus.heard.records})
    assert [0, 1] == [event.epoch for event in bus.heard.of(EpochStarted)]


# Checkpoints and resuming -------------------------------------------------------------------------


def test_checkpoints_exist_when_they_are_recorded_of(tmp_path: Path, bus: Any) -> None:
    """Each file exists by then, has its score, and best and last are final at the end."""
    missing: list[str] = []
    bus.subscribe(
        lambda record: None if Path(record.event.path).exists() else missing.append(record.event),
        CheckpointSaved,
    )
    heard = fit(bus, make(tmp_path, callbacks=[saver(tmp_path)]))
    assert [] == missing
    scores = {e.epoch: e.values for e in heard.of(MetricsLogged, "validation")}
    saved = heard.of(CheckpointSaved)
    assert all(event.metrics == scores[event.epoch] for event in saved)
    told = [(e.kind, e.epoch, e.step, e.final) for e in saved]
    each = [(kind, n, 3 * n + 3, False) for n in range(3) for kind in ("best", "last")]
    assert [*each, ("last", 2, 9, True), ("best", 2, 9, True)] == told
    assert heard.end.best is not None
    assert ("val_loss", 2) == (heard.end.best.metric, heard.end.best.epoch)
    assert scores[2]["val_loss"] == heard.end.best.value


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [*[("last", False)] * 3, ("last", True)]),
        ({"save_top_k": -1}, [("periodic", True)] * 3),
        ({"save_top_k": -1, "monitor": "val_loss"}, [*[("periodic", True)] * 3, ("best", True)]),
        ({"monitor": "val_loss", "mode": "max", "save_top_k": 2}, None),
        ({"save_last": "link"}, [*[("last", False)] * 3, ("last", True), ("last", True)]),
    ],
)
def test_what_a_checkpoint_is(
    tmp_path: Path, bus: Any, options: dict[str, Any], expected: list[Any] | None
) -> None:
    """Without a metric the newest file is the last; with all kept, each is final at once."""
    heard = fit(bus, make(tmp_path, callbacks=[ModelCheckpoint(tmp_path / "saved", **options)]))
    found = [(event.kind, event.final) for event in heard.of(CheckpointSaved)]
    if expected is None:  # the loss falls: the first is the best, the second is the second best
        expected = [("best", False), ("periodic", False), ("best", True)]
    assert expected == found


@pytest.mark.parametrize("idiom", ["attach", "callback"])
def test_a_checkpoint_saved_on_an_exception_is_recorded(
    tmp_path: Path, bus: Any, idiom: str
) -> None:
    """A checkpoint that is written when a training fails comes before the run's end."""
    save = ModelCheckpoint(tmp_path / "saved", save_on_exception=True, every_n_epochs=9)
    fail = At("on_train_batch_start", throw(RuntimeError("boom")), step=4)
    own = [adapter.BusCallback(bus)] if idiom == "callback" else []
    trainer = make(tmp_path, callbacks=[*own, save, fail])
    with pytest.raises(RuntimeError, match="boom"):
        fit(bus, trainer)
    assert [4] == [event.step for event in bus.heard.of(CheckpointSaved)]
    assert "RuntimeError: boom" == bus.heard.end.reason


@pytest.mark.parametrize(
    ("options", "epochs", "step"),
    [({"every_n_epochs": 1}, [1, 2], 3), ({"every_n_train_steps": 2}, [1, 2], 4)],
)
def test_a_training_is_resumed(
    tmp_path: Path, bus: Any, options: dict[str, Any], epochs: list[int], step: int
) -> None:
    """From the end of an epoch or from the middle of one, it continues its run."""
    trainer = make(tmp_path, callbacks=[ModelCheckpoint(tmp_path / "saved", **options)])
    trainer.callbacks.append(At("on_train_batch_start", throw(RuntimeError("boom")), step=5))
    with pytest.raises(RuntimeError, match="boom"):
        fit(bus, trainer)
    (path,) = (tmp_path / "saved").glob("*.ckpt")
    again = make(tmp_path, callbacks=[ModelCheckpoint(tmp_path / "saved", **options)])
    before = len(bus.heard.records)
    fit(bus, again, ckpt_path=path)
    resumed = Heard(bus.heard.records[before:])
    assert [] == check_grammar(resumed.records)
    told = resumed.of(RunStarted)[0].resumed
    assert (0, step, str(tmp_path / "saved")) == (told.epoch, told.step, told.save_dir)
    assert epochs == [event.epoch for event in resumed.of(EpochStarted)]
    assert {(bus.heard.records[0].run, 2)} == {(r.run, r.attempt) for r in resumed.records}
    steps = [e.step for e in resumed.of(MetricsLogged, "train") if e.step is not None]
    assert list(range(step + 1, 10)) == steps


def test_a_training_is_found_from_a_new_folder(tmp_path: Path, bus: Any) -> None:
    """With the default folders, which are new for each training, the checkpoint's leads back."""
    logger = pl.loggers.CSVLogger(tmp_path)
    fit(bus, make(tmp_path, logger=logger, max_epochs=1))
    (path,) = tmp_path.glob("lightning_logs/version_0/checkpoints/*.ckpt")
    fit(bus, make(tmp_path, logger=pl.loggers.CSVLogger(tmp_path)), ckpt_path=path)
    first, second = bus.heard.of(RunStarted)
    assert first.save_dir != second.save_dir
    assert {bus.heard.records[0].run} == {record.run for record in bus.heard.records}


# Ends ---------------------------------------------------------------------------------------------


STOP = At("on_train_epoch_end", lambda trainer: setattr(trainer, "should_stop", True))
NOT_FINITE = "early stop: Monitored metric broken = nan is not finite. Previous best value was inf."


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"max_steps": 4}, "max_steps of 4 reached"),
        ({"max_time": timedelta(microseconds=1)}, "time limit of 1e-06 s"),
        (
            {"callbacks": [EarlyStopping("val_loss", mode="max", patience=1)]},
            "early stop: Monitored metric val_loss did not improve in the last 1 records. "
            "Best score: 0.290.",
        ),
        (
            {"callbacks": [EarlyStopping("val_loss", mode="max", patience=1)], "min_epochs": 3},
            None,
        ),
        ({"callbacks": [STOP]}, "stopped by a callback"),
        ({"callbacks": [STOP, EarlyStopping("val_loss")]}, "stopped by a callback"),
        ({"callbacks": [EarlyStopping("broken")]}, NOT_FINITE),
        ({"callbacks": [EarlyStopping("val_loss", mode="max", patience=2)]}, None),
    ],
)
def test_the_reason_of_an_end(
    tmp_path: Path, bus: Any, arguments: dict[str, Any], reason: str | None
) -> None:
    """A training that ends before its last epoch is finished, and says what ended it."""
    module = Counting() if reason == NOT_FINITE else None
    heard = fit(bus, make(tmp_path, **arguments), module)
    assert ("finished", reason) == (heard.end.status, heard.end.reason)
    assert (reason is None) == (3 == len(heard.of(EpochEnded)))


class Faulty(Tiny):
    """Fails in the hook with this name."""

    def __init__(self, hook: str) -> None:
        super().__init__()
        self.fails_in = hook

    def __getattribute__(self, name: str) -> Any:
        if name not in ("__dict__", "fails_in") and self.__dict__.get("fails_in") == name:
            raise RuntimeError(f"boom in {name}")
        return super().__getattribute__(name)


@pytest.mark.parametrize("hook", ["prepare_data", "setup", "validation_step", "on_fit_end"])
def test_failures_before_and_after_the_training(tmp_path: Path, bus: Any, hook: str) -> None:
    """What fails while a training is set up, checked or taken down is a failed run."""
    with pytest.raises(RuntimeError, match=f"boom in {hook}"):
        fit(bus, make(tmp_path, max_epochs=1), Faulty(hook))
    assert ("failed", f"RuntimeError: boom in {hook}") == (
        bus.heard.end.status,
        bus.heard.end.reason,
    )


def test_a_failure_after_the_end_is_no_run(tmp_path: Path, bus: Any) -> None:
    """A module that fails when it is taken down, after callbacks were, was trained."""
    with pytest.raises(RuntimeError, match="boom in teardown"):
        fit(bus, make(tmp_path, max_epochs=1), Faulty("teardown"))
    assert "finished" == bus.heard.end.status


def test_an_early_stop_is_reported_once(tmp_path: Path, bus: Any) -> None:
    """What stopped an earlier training of the same callbacks does not stop a later one."""
    stop = EarlyStopping("val_loss", mode="max", patience=1)
    trainer = make(tmp_path, callbacks=[stop], max_epochs=5)
    fit(bus, trainer)
    stop.patience = 9
    trainer.callbacks.append(STOP)
    fit(bus, trainer)
    first, second = bus.heard.of(RunEnded)
    assert first.reason.startswith("early stop: Monitored metric val_loss did not improve")
    assert "stopped by a callback" == second.reason


REQUIRED = "sinks: {{needed: {{type: jsonl, path: /dev/null/no, on_error: raise}}}}\njournal: {0}\n"


@pytest.mark.parametrize("hook", ["", "setup"])
def test_a_required_sink_stops_the_training(tmp_path: Path, hook: str) -> None:
    """Without the sink there is no training; an error of the user's that came before is shown."""
    (tmp_path / "bus.yaml").write_text(REQUIRED.format({"dir": str(tmp_path / "runs")}))
    error: Any = RuntimeError if hook else SinkError
    with load(tmp_path / "bus.yaml") as bus:
        trainer = make(tmp_path)
        bus.attach(trainer)
        with pytest.raises(error, match="boom" if hook else "'needed'"):
            trainer.fit(Faulty(hook), data(), data())
    assert 0 == trainer.global_step
    (heard,) = runs_in(tmp_path)
    assert "failed" == heard.end.status


def test_sigterm_is_a_stop(tmp_path: Path, bus: Any) -> None:
    """Lightning ends the training itself when SIGTERM comes, and its handler is left in place."""
    before = signal.getsignal(signal.SIGTERM)
    kill = At("on_train_batch_start", lambda trainer: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit):
        fit(bus, make(tmp_path, callbacks=[kill]))
    assert ("stopped", "SIGTERMException") == (bus.heard.end.status, bus.heard.end.reason)
    assert before is signal.getsignal(signal.SIGTERM)


def test_ctrl_c_is_a_stop(tmp_path: Path, bus: Any) -> None:
    """Lightning makes an exit of Ctrl-C; the run says what it was."""
    with pytest.raises(SystemExit):
        fit(bus, make(tmp_path, callbacks=[At("on_train_batch_start", throw(KeyboardInterrupt()))]))
    assert ("stopped", "KeyboardInterrupt") == (bus.heard.end.status, bus.heard.end.reason)


# Ranks --------------------------------------------------------------------------------------------

CONFIG = (
    "journal: {{dir: {0}/runs}}\nsinks: {{local: {{type: jsonl, path: '{0}/{{run}}.jsonl'}}}}\n"
)
STRATEGIES = ("ddp", "ddp_spawn", "ddp_fork")


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """The trainings in two gloo processes, all strategies at a time: most of it is imports."""
    started: dict[str, Any] = {}
    for strategy in STRATEGIES:
        folder = tmp_path_factory.mktemp(strategy)
        (folder / "bus.yaml").write_text(CONFIG.format(folder))
        with (folder / "said.txt").open("w") as said:
            process = subprocess.Popen(
                [sys.executable, lightning_ddp.__file__, str(folder), strategy],
                env=hermetic(folder) | {"OMP_NUM_THREADS": "1"},
                cwd=folder,
                stdout=said,
                stderr=said,
            )
        started[strategy] = folder, process
    yield started
    for _, process in started.values():
        process.kill()
        process.wait()


def runs_in(folder: Path) -> list[Heard]:
    """Return the runs in a folder's journals, as they began."""
    found = [RunFolder(path) for path in (folder / "runs").glob("run_*")]
    runs = [Heard(read_run(RunReader(each))) for each in found]
    return sorted(runs, key=lambda run: run.records[0].time)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_are_one_run(two_processes: dict[str, Any], strategy: str) -> None:
    """One rank reports the run; an exception on the other ends it, however launched."""
    folder, process = two_processes[strategy]
    process.wait(300)
    good, bad = runs_in(folder)
    assert [] == check_grammar(good.records)
    assert {0} == {record.rank for record in good.records}
    assert 2 == good.of(RunStarted)[0].world_size
    assert [0, 1, 2] == [event.epoch for event in good.of(EpochEnded)]
    steps = [e.step for e in good.of(MetricsLogged, "train") if e.step is not None]
    assert list(range(1, 10)) == steps
    assert 3 == len(good.of(MetricsLogged, "validation"))
    assert "finished" == good.of(RunEnded)[0].status
    end = bad.of(RunEnded)[0]
    assert ("failed", "rank 1: RuntimeError: boom on rank 1") == (end.status, end.reason)
    assert [0, 1] == [event.epoch for event in bad.of(EpochStarted)]
    assert 0 != process.returncode


def test_a_callback_that_goes_to_a_second_bus_stays_with_it() -> None:
    """The first bus, when it is closed, has let go of it."""
    first, second = trainbus.Bus(), trainbus.Bus()
    given = adapter.BusCallback(first)
    second.attach(given)
    first.close()
    assert given.report.active
    second.close()
    assert not given.report.active


# Beside Lightning's own loggers, and beside each other --------------------------------------------


def test_a_logger_of_lightning_is_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """If a sink feeds the same tracker, one warning names both; so does the run."""
    heard = feeding("wandb")
    own = [pl.loggers.WandbLogger(save_dir=tmp_path, offline=True), pl.loggers.CSVLogger(tmp_path)]
    trainer = make(tmp_path, logger=own, max_epochs=1)
    heard.bus.attach(trainer)
    trainer.fit(Tiny(), data(), data())
    own[0].experiment.finish()
    assert [["wandb"]] == [started.own_loggers for started in heard.of(RunStarted)]
    assert [
        "lightning's own WandbLogger and a sink of trainbus both log to Weights & Biases; "
        "remove one of them (Trainer(logger=False))"
    ] == [line for line in caplog.messages if "both log" in line]


def test_a_logger_of_another_tracker_is_no_matter(
    tmp_path: Path, bus: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """The run names it, and nothing is said."""
    heard = fit(bus, make(tmp_path, logger=pl.loggers.TensorBoardLogger(tmp_path), max_epochs=1))
    assert [["tensorboard"]] == [started.own_loggers for started in heard.of(RunStarted)]
    assert [] == [line for line in caplog.messages if "both log" in line]


@pytest.mark.parametrize("fails_in", ["", "prepare_data"])
def test_a_callback_in_an_attached_trainer_reports_all(
    tmp_path: Path, bus: Any, fails_in: str
) -> None:
    """Whichever came first, a run comes once."""
    trainer = make(tmp_path, max_epochs=1)
    bus.attach(trainer)
    trainer.callbacks.append(adapter.BusCallback(bus))
    if fails_in:
        with pytest.raises(RuntimeError, match="boom"):
            fit(bus, trainer, Faulty(fails_in))
    else:
        fit(bus, trainer)
    assert 1 == len(bus.heard.of(RunStarted))
    assert ("failed" if fails_in else "finished") == bus.heard.end.status


class Positioned(Tiny):
    """Logs a metric that Lightning's loggers take for the position."""

    def training_step(self, batch: Any, index: int) -> Any:
        """Return the loss."""
        self.log_dict({"step": 100.0 + index, "loss": 1.0})
        return self._loss(batch)

    def on_validation_epoch_end(self) -> None:
        """Log by epochs."""
        self.log_dict({"step": 7.0, "accuracy": 0.5})


def test_a_metric_named_step_is_the_position(tmp_path: Path, bus: Any) -> None:
    """As in Lightning's own loggers: its value is where the others stand."""
    users = UsersLogger()
    heard = fit(bus, make(tmp_path, logger=users, max_epochs=1), Positioned())
    expected = [(step, "loss" in values, "accuracy" in values) for step, values in users.seen]
    logged = heard.of(MetricsLogged)
    assert expected == [(e.step, "loss" in e.values, "accuracy" in e.values) for e in logged]
    assert (100, True, False) in expected
    assert all("step" not in event.values for event in logged)


def test_a_trial_that_is_pruned_is_stopped(tmp_path: Path, bus: Any) -> None:
    """Optuna's exception, as its pruning callback raises it, is no failure."""
    import optuna

    prune = At("on_validation_end", throw(optuna.TrialPruned()))
    with pytest.raises(optuna.TrialPruned):
        fit(bus, make(tmp_path, callbacks=[prune]))
    assert ("stopped", "pruned") == (bus.heard.end.status, bus.heard.end.reason)


def test_the_exceptions_that_end_a_training_on_purpose_exist() -> None:
    """Lightning's own, by which a search ends a training, is known by its name."""
    for package in (pl, pytorch_lightning):
        error = package.utilities.exceptions._TunerExitException()
        assert "stopped" == ended_by(error).status
