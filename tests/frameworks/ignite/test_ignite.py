"""The ignite adapter in real trainings: the suite, evaluators, checkpoints, ends, and the hook."""

from __future__ import annotations

import copy
import gc
import inspect
import logging
import os
import pickle
import subprocess
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import pytest
import torch
from trainbus.adapters import ignite as adapter
from trainbus.adapters.ignite import BusLogger

import trainbus
from support.feeding import feeding
from support.heard import Heard as Listener
from trainbus import Record, SinkSpec
from trainbus.delivery.transforms import TransformSpec
from trainbus.events import (
    Best,
    CheckpointSaved,
    EpochEnded,
    EpochStarted,
    MetricsLogged,
    ModelDescribed,
    RunEnded,
    RunStarted,
    TableLogged,
    decode,
    ended_by,
)
from trainbus.testing import AdapterConformance, MemorySink, Training, check_grammar

with warnings.catch_warnings():  # of torch, whose own modules use what it deprecates
    warnings.simplefilter("ignore", DeprecationWarning)
    from ignite.engine import (
        Engine,
        Events,
        create_supervised_evaluator,
        create_supervised_trainer,
    )
    from ignite.handlers import (
        Checkpoint,
        DiskSaver,
        EarlyStopping,
        TensorboardLogger,
        global_step_from_engine,
    )
    from ignite.metrics import (
        ConfusionMatrix,
        Loss,
        MeanAbsoluteError,
        Precision,
        RunningAverage,
    )
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

BATCHES = 4


class Setup:
    """A trainer of one line, an evaluator that runs after each epoch, and what they need."""

    def __init__(self, folder: Path | None = None) -> None:
        torch.manual_seed(0)
        x = torch.rand(BATCHES, 8, 1)
        self.data = [(each, 3 * each + 1) for each in x]
        self.held_out = self.data[:1]
        self.model = torch.nn.Linear(1, 1)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        mse = torch.nn.MSELoss()
        self.trainer = create_supervised_trainer(self.model, self.optimizer, mse)
        self.metrics = {"mse": Loss(mse), "mae": MeanAbsoluteError()}
        self.evaluator = create_supervised_evaluator(self.model, self.metrics)
        self.history: list[dict[str, float]] = []
        self.losses: list[float] = []

        self.trainer.add_event_handler(Events.ITERATION_COMPLETED, self.keep)
        self.trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: self.validate())
        if folder is not None:
            to_save = {"model": self.model, "optimizer": self.optimizer, "trainer": self.trainer}
            self.last = Checkpoint(to_save, DiskSaver(folder, require_empty=False))
            self.trainer.add_event_handler(Events.EPOCH_COMPLETED, self.last)

    def keep(self) -> None:
        self.losses.append(self.trainer.state.output)

    def validate(self) -> None:
        self.history.append(dict(self.evaluator.run(self.held_out).metrics))

    def run(self, epochs: int = 3) -> None:
        self.trainer.run(self.data, max_epochs=epochs)

    def weights(self) -> Hashable:
        return tuple(p.detach().numpy().tobytes() for p in self.model.parameters())


@pytest.fixture
def setup() -> Setup:
    return Setup()


class Heard(Listener):
    """What is recorded of engines."""

    def metrics(self, phase: str) -> list[Any]:
        """Return what was measured in a phase."""
        return [event for event in self.of(MetricsLogged) if event.phase == phase]

    @property
    def ended(self) -> RunEnded:
        """The last event, which is an end."""
        event = self.records[-1].event
        assert isinstance(event, RunEnded)
        return event


@pytest.fixture
def heard() -> Heard:
    return Heard()


class TestConformance(AdapterConformance):
    def start(self, folder: Path, epochs: int) -> Training:
        return self.set_up(folder, epochs)

    def set_up(self, folder: Path, epochs: int, saved: Path | None = None) -> Training:
        setup = Setup(folder)
        if saved is not None:
            Checkpoint.load_objects(setup.last.to_save, saved)

        def fail_at(error: BaseException) -> None:
            second = Events.ITERATION_COMPLETED(once=BATCHES + 1)
            setup.trainer.add_event_handler(second, raises(error))

        def stop_early() -> None:
            stopper = EarlyStopping(1, lambda _: 0.0, setup.trainer)
            setup.evaluator.add_event_handler(Events.COMPLETED, stopper)

        return Training(
            target=setup.trainer,
            run=lambda: setup.run(epochs),
            result=setup.weights,
            fail_at=fail_at,
            epochs_trained=lambda: len(setup.history),
            stop_early=stop_early,
            resume=lambda: self.set_up(folder, epochs, setup.last.last_checkpoint),
        )

    def trace(self, target: Any) -> object:
        return trace(target)


def trace(engine: Engine) -> tuple[Any, ...]:
    """Return what could be changed of an engine and its class."""
    handlers = {event: list(entries) for event, entries in engine._event_handlers.items()}
    return handlers, vars(engine).keys(), Engine.run


# What arrives ------------------------------------------------------------------------------------


def test_metrics_are_those_of_ignite(setup: Setup, heard: Heard) -> None:
    """Each epoch has the trainer's last output and the evaluator's metrics, at its number."""
    heard.bus.attach(setup.trainer)
    setup.run(3)
    last = setup.losses[BATCHES - 1 :: BATCHES]
    expected = [(epoch, None, {"train/output": loss}) for epoch, loss in enumerate(last)]
    assert expected == [(e.epoch, e.step, e.values) for e in heard.metrics("train")]
    named = [{f"val/{k}": v for k, v in row.items()} for row in setup.history]
    expected = [(epoch, None, row) for epoch, row in enumerate(named)]
    assert expected == [(e.epoch, e.step, e.values) for e in heard.metrics("validation")]
    assert [] == check_grammar(heard.records)
    order = ["epoch.started", "metrics.logged", "metrics.logged", "epoch.ended"]
    assert ["run.started", *order * 3, "run.ended"] == heard.names


def test_metrics_of_the_trainer_stand_for_an_epoch(setup: Setup, heard: Heard) -> None:
    """Where the trainer has metrics of its own, the output of its last batch is left out."""
    RunningAverage(output_transform=lambda loss: loss).attach(setup.trainer, "loss")
    heard.bus.attach(setup.trainer)
    setup.run(1)
    (event,) = heard.metrics("train")
    assert {"train/loss": setup.trainer.state.metrics["loss"]} == event.values


def test_metrics_of_each_class_arrive(setup: Setup, heard: Heard) -> None:
    """A vector has a value a class, as in ignite's own loggers, a matrix is a table."""
    classes = lambda output: (output[0].repeat(1, 2), (output[1] > 2).long().squeeze(1))  # noqa: E731
    precision = Precision(output_transform=classes, average=False)
    precision.attach(setup.evaluator, "prec")
    ConfusionMatrix(2, output_transform=classes).attach(setup.evaluator, "confusion")
    setup.trainer.add_event_handler(
        Events.EPOCH_COMPLETED, lambda engine: engine.state.metrics.update(both=torch.ones(2))
    )
    heard.bus.attach(setup.trainer)
    setup.run(1)
    found = setup.evaluator.state.metrics
    (event,) = heard.metrics("validation")
    assert found["prec"].tolist() == [event.values[f"val/prec/{index}"] for index in range(2)]
    (table,) = heard.of(TableLogged)
    assert ("val/confusion", found["confusion"].tolist()) == (table.key, table.rows)
    (event,) = heard.metrics("train")
    assert {"train/both/0": 1.0, "train/both/1": 1.0} == event.values


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ({"d": 1.0, "g": torch.tensor(2.0), "text": "x"}, {"train/d": 1.0, "train/g": 2.0}),
        ((torch.zeros(3), 0.5), {"train/output/1": 0.5}),
        (torch.tensor([[4.0]]), {"train/output": 4.0}),
        (None, None),
        ("text", None),
    ],
)
def test_outputs_are_numbers_of_any_shape(
    heard: Heard, output: Any, expected: dict[str, float] | None
) -> None:
    """Of a dict or a tuple, the numbers are taken; what is no number is left out."""
    trainer = Engine(lambda engine, batch: output)
    heard.bus.attach(trainer)
    trainer.run([0], max_epochs=1)
    assert [expected] * (expected is not None) == [e.values for e in heard.metrics("train")]
    assert "finished" == heard.ended.status


def test_nan_arrives(heard: Heard) -> None:
    """A loss that is NaN is a value like others."""
    trainer = Engine(lambda engine, batch: float("nan"))
    heard.bus.attach(trainer)
    trainer.run([0], max_epochs=1)
    (event,) = heard.metrics("train")
    assert "nan" == str(event.values["train/output"])


def test_the_start_says_what_is_known(setup: Setup, heard: Heard, tmp_path: Path) -> None:
    """The limits of the training, and by what its checkpoints hold: optimizer, model, folder."""
    other = Setup(tmp_path / "saved")
    heard.bus.attach(other.trainer)
    other.run(1)
    (started,) = heard.of(RunStarted)
    assert ("ignite", "0.5.5", 1) == (
        started.framework,
        started.framework_version,
        started.world_size,
    )
    assert (1, BATCHES) == (started.params["max_epochs"], started.params["epoch_length"])
    assert ("SGD", 0.1) == tuple(started.params["optimizer"][key] for key in ("type", "lr"))
    assert (str(tmp_path / "saved"), None) == (started.save_dir, started.resumed)
    assert [(2, 2, 1)] == [(e.parameters, e.gradients, e.layers) for e in heard.of(ModelDescribed)]
    assert {"lr/group_0": 0.1}.items() <= heard.metrics("train")[0].values.items()


def test_several_optimizers_are_told_apart(heard: Heard, tmp_path: Path) -> None:
    """Those that a checkpoint saves give their rates by the names that they have there."""
    model = torch.nn.Linear(1, 1)
    rates = {"d": 0.1, "g": 0.2}
    saved: dict[str, Any] = {k: torch.optim.SGD(model.parameters(), lr=v) for k, v in rates.items()}
    trainer = Engine(lambda engine, batch: None)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, Checkpoint(saved, tmp_path / "saved"))
    heard.bus.attach(trainer)
    trainer.run([0], max_epochs=1)
    assert {"lr/d/group_0": 0.1, "lr/g/group_0": 0.2} == heard.metrics("train")[0].values


def test_step_values_come_when_they_are_asked_for(setup: Setup) -> None:
    """`every: {train: 3}` gives the output and the rate that each third iteration used."""
    sink = MemorySink()
    spec = TransformSpec(every={"train": 3})
    route = SinkSpec(name="m", make=lambda: sink, kind="memory", sink=sink, transforms=spec)
    heard = Heard(trainbus.Bus({"m": route}))
    scheduler = torch.optim.lr_scheduler.StepLR(setup.optimizer, 1, gamma=0.5)
    setup.trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda _: scheduler.step())
    BusLogger(heard.bus).attach(setup.trainer, optimizer=setup.optimizer)
    setup.run(2)
    steps = [e for e in heard.metrics("train") if e.step is not None]
    rates = [0.1 * 0.5**i for i in range(2 * BATCHES)]
    assert [(3, 0), (6, 1)] == [(e.step, e.epoch) for e in steps]
    assert [True, True] == [e.on_request for e in steps]
    assert [setup.losses[2], setup.losses[5]] == [e.values["train/output"] for e in steps]
    assert [rates[2], rates[5]] == pytest.approx([e.values["lr/group_0"] for e in steps])
    epochs = [e.values["lr/group_0"] for e in heard.metrics("train") if e.step is None]
    assert [rates[3], rates[7]] == pytest.approx(epochs)


# Evaluators --------------------------------------------------------------------------------------


def test_the_logger_reports_as_attach_does(heard: Heard) -> None:
    """`BusLogger(bus).attach(trainer)` gives the same records as `bus.attach(trainer)`."""
    first, second, other = Setup(), Setup(), Heard()
    heard.bus.attach(first.trainer)
    BusLogger(other.bus).attach(second.trainer)
    first.run()
    second.run()
    values = [[e.values for e in each.of(MetricsLogged)] for each in (heard, other)]
    assert (heard.names, values[0]) == (other.names, values[1])


def test_the_logger_names_evaluators(setup: Setup, heard: Heard) -> None:
    """Names are the user's, whatever the order, and give the phase."""
    test = create_supervised_evaluator(setup.model, {"mae": MeanAbsoluteError()})
    setup.trainer.add_event_handler(Events.COMPLETED, lambda _: test.run(setup.held_out))
    logger = BusLogger(heard.bus)
    logger.attach(
        setup.trainer,
        evaluators={"test_set": test, "held out": setup.evaluator},
        params={"seed": 0},
        output_transform=lambda loss: {"loss": loss},
    )
    setup.run(1)
    values = [(e.phase, sorted(e.values), e.epoch, e.final) for e in heard.of(MetricsLogged)]
    assert [
        ("validation", ["held out/mae", "held out/mse"], 0, False),
        ("train", ["train/loss"], 0, False),
        ("test", ["test_set/mae"], None, True),
    ] == values
    assert 0 == heard.of(RunStarted)[0].params["seed"]


def test_evaluators_without_a_name_get_one(setup: Setup, heard: Heard) -> None:
    """One that runs on the training data is told apart; the others are numbered, or named."""
    others = [create_supervised_evaluator(setup.model, {"mae": MeanAbsoluteError()})] * 2
    others = [copy.copy(setup.evaluator), *others[:1]]
    others[0].logger = trainbus_logger("Test Evaluator")
    for engine in (others[1], others[0]):
        setup.trainer.add_event_handler(Events.EPOCH_COMPLETED, run_on(engine, setup.held_out))
    setup.trainer.add_event_handler(Events.EPOCH_COMPLETED, run_on(setup.evaluator, setup.data))
    heard.bus.attach(setup.trainer)
    setup.run(2)
    names = [sorted({k.split("/")[0] for k in e.values}) for e in heard.of(MetricsLogged)]
    assert [["val"], ["val2"], ["test"], ["train_eval"], ["train"]] * 2 == names
    phases = [e.phase for e in heard.of(MetricsLogged)]
    assert ["validation", "validation", "test", "train", "train"] * 2 == phases


def test_one_evaluator_for_two_sets(setup: Setup, heard: Heard) -> None:
    """Run over the training data too, an evaluator's metrics of the two are told apart."""
    setup.trainer.add_event_handler(Events.EPOCH_COMPLETED, run_on(setup.evaluator, setup.data))
    BusLogger(heard.bus).attach(setup.trainer, evaluators={"held_out": setup.evaluator})
    setup.run(1)
    names = [sorted(e.values) for e in heard.of(MetricsLogged)]
    assert [["held_out/mae", "held_out/mse"], ["train_eval/mae", "train_eval/mse"]] == names[:2]


def run_on(engine: Engine, data: Any) -> Callable[[], object]:
    return lambda: engine.run(data)


def trainbus_logger(name: str) -> Any:
    return logging.getLogger(name)


def test_an_evaluation_within_an_epoch_has_its_step(setup: Setup, heard: Heard) -> None:
    """Evaluated at an iteration, the metrics are of that step; at the start, of no epoch."""
    second = create_supervised_evaluator(setup.model, {"mae": MeanAbsoluteError()})
    for event in (Events.STARTED, Events.EPOCH_STARTED, Events.ITERATION_COMPLETED(every=3)):
        setup.trainer.add_event_handler(event, run_on(second, setup.held_out))
    heard.bus.attach(setup.trainer)
    setup.run(2)
    found = [(e.epoch, e.step) for e in heard.metrics("validation") if "val/mae" in e.values]
    assert [(None, 0), (0, 0), (0, 3), (1, 4), (1, 6)] == [f for f in found if f[1] is not None]
    assert [] == check_grammar(heard.records)


def test_an_evaluation_that_was_cut_short_is_not_recorded(setup: Setup, heard: Heard) -> None:
    """What an evaluator measured an epoch ago is not logged again when its run is terminated."""

    def stop(engine: Engine) -> None:
        if setup.trainer.state.epoch == 2:
            engine.terminate()

    setup.evaluator.add_event_handler(Events.ITERATION_COMPLETED, stop)
    heard.bus.attach(setup.trainer)
    setup.run(3)
    assert [0, 2] == [e.epoch for e in heard.metrics("validation")]


def test_evaluations_alone_are_not_recorded(setup: Setup, heard: Heard) -> None:
    """An evaluator that runs before or after the training is no part of it."""
    BusLogger(heard.bus).attach(setup.trainer, evaluators={"val": setup.evaluator})
    setup.evaluator.run(setup.held_out)
    assert [] == heard.records
    setup.run(1)
    count = len(heard.records)
    setup.evaluator.run(setup.held_out)
    assert count == len(heard.records)


def test_trainers_in_two_threads_are_told_apart(heard: Heard) -> None:
    """Each run has the evaluations of its own thread, and the class is as it was afterwards."""
    before, setups = Engine.run, [Setup(), Setup()]
    meet = threading.Barrier(2, timeout=60)
    for setup in setups:
        setup.trainer.add_event_handler(Events.EPOCH_STARTED, lambda: meet.wait())
        heard.bus.attach(setup.trainer)
    threads = [threading.Thread(target=setup.run) for setup in setups]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    runs = {record.run for record in heard.records}
    for run in runs:
        records = [record for record in heard.records if record.run == run]
        assert [] == check_grammar(records)
        events = [r.event for r in records if isinstance(r.event, MetricsLogged)]
        assert [0, 1, 2] == [e.epoch for e in events if e.phase == "validation"]
    assert 2 == len(runs)
    assert before is Engine.run


# Checkpoints and ends ----------------------------------------------------------------------------


def test_checkpoints_exist_when_they_are_recorded(
    setup: Setup, heard: Heard, tmp_path: Path
) -> None:
    """The last, the best by its score, and periodic ones, each after its file is there."""
    scores = iter([0.5, 0.75, 0.25])
    best = Checkpoint(
        {"model": setup.model},
        DiskSaver(str(tmp_path / "best"), create_dir=True),
        score_function=lambda _: next(scores),
        score_name="acc",
        n_saved=2,
    )
    setup.evaluator.add_event_handler(Events.COMPLETED, best)
    for folder, saved in (("last", 1), ("each", None)):
        handler = Checkpoint({"model": setup.model}, str(tmp_path / folder), n_saved=saved)
        setup.trainer.add_event_handler(Events.EPOCH_COMPLETED(every=2), handler)
    there: list[bool] = []

    def look(record: Record) -> None:
        assert isinstance(record.event, CheckpointSaved)
        there.append(Path(record.event.path).exists())

    heard.bus.subscribe(look, CheckpointSaved)
    heard.bus.attach(setup.trainer)
    setup.run(3)
    saved_events = heard.of(CheckpointSaved)
    found = [(e.kind, e.epoch, e.step, e.metrics, e.final) for e in saved_events]
    assert [
        ("best", 0, 4, {"acc": 0.5}, False),
        ("best", 1, 8, {"acc": 0.75}, False),
        ("last", 1, 8, {}, False),
        ("periodic", 1, 8, {}, True),
        ("best", 1, 8, {"acc": 0.75}, True),
        ("last", 1, 8, {}, True),
    ] == found
    assert [True] * len(found) == there
    assert Best(metric="acc", value=0.75, epoch=1) == heard.ended.best
    assert str(tmp_path / "last") == heard.of(RunStarted)[0].save_dir
    assert str(best.last_checkpoint) == [e.path for e in saved_events if e.kind == "best"][-1]


@pytest.mark.parametrize(
    ("event", "handler", "reason"),
    [
        (Events.EPOCH_COMPLETED, lambda e: e.terminate(), "terminated"),
        (Events.ITERATION_COMPLETED(once=6), lambda e: e.terminate(), "terminated"),
        (
            Events.ITERATION_COMPLETED(once=6),
            lambda e: e.terminate(skip_completed=True),
            "terminated",
        ),
    ],
)
def test_a_termination_is_recorded(
    setup: Setup, heard: Heard, event: Any, handler: Any, reason: str
) -> None:
    """`terminate()` ends the run as finished and says so, also in the middle of an epoch."""
    setup.trainer.add_event_handler(event, handler)
    heard.bus.attach(setup.trainer)
    setup.run(3)
    assert ("finished", reason) == (heard.ended.status, heard.ended.reason)
    assert [] == check_grammar(heard.records)
    epochs = [e.epoch for e in heard.of(EpochEnded)]
    assert epochs == [e.epoch for e in heard.metrics("train")]


def test_an_early_stop_names_its_score(setup: Setup, heard: Heard) -> None:
    """The reason names the function that gave the score, and the patience."""

    def accuracy(engine: Engine) -> float:
        return 0.0

    handler = EarlyStopping(2, accuracy, setup.trainer)
    setup.evaluator.add_event_handler(Events.COMPLETED, handler)
    heard.bus.attach(setup.trainer)
    setup.run(9)
    assert "early stop: no better accuracy in 2 evaluations" == heard.ended.reason
    assert [0, 1, 2] == [e.epoch for e in heard.of(EpochEnded)]


def test_max_iters_is_no_early_end(setup: Setup, heard: Heard) -> None:
    """A run of six iterations ends in its second epoch, which counts, and needs no reason."""
    heard.bus.attach(setup.trainer)
    setup.trainer.run(setup.data, max_iters=6)
    assert ("finished", None) == (heard.ended.status, heard.ended.reason)
    assert [0, 1] == [e.epoch for e in heard.of(EpochEnded)]
    assert [setup.losses[3], setup.losses[5]] == [
        e.values["train/output"] for e in heard.metrics("train")
    ]


@pytest.mark.parametrize("skip", [False, True])
def test_an_epoch_that_is_cut_short_ends(setup: Setup, heard: Heard, skip: bool) -> None:
    """`terminate_epoch()` ends one epoch, with or without ignite's event, and the next begins."""
    stop = Events.ITERATION_COMPLETED(once=2)
    setup.trainer.add_event_handler(stop, lambda e: e.terminate_epoch(skip_epoch_completed=skip))
    heard.bus.attach(setup.trainer)
    setup.run(3)
    assert [] == check_grammar(heard.records)
    ended = [e.epoch for e in heard.of(EpochEnded)]
    assert (
        ended
        == [e.epoch for e in heard.of(EpochStarted)]
        == [e.epoch for e in heard.metrics("train")]
    )


def test_an_interrupted_run_continues(setup: Setup, heard: Heard) -> None:
    """`interrupt()` stops the run; the next `run()` is its second attempt, in the same epoch."""
    setup.trainer.add_event_handler(Events.ITERATION_COMPLETED(once=6), lambda e: e.interrupt())
    heard.bus.attach(setup.trainer)
    setup.run(3)
    assert ("stopped", "interrupted") == (heard.ended.status, heard.ended.reason)
    setup.run(3)
    assert "finished" == heard.ended.status
    attempts = [[r for r in heard.records if r.attempt == n] for n in (1, 2)]
    assert [[], []] == [check_grammar(records) for records in attempts]
    assert 1 == len({record.run for record in heard.records})
    assert [0, 1, 1, 2] == [e.epoch for e in heard.of(EpochStarted)]
    resumed = heard.of(RunStarted)[1].resumed
    assert (0, 6) == (resumed.epoch, resumed.step)


def test_a_swallowed_error_ends_the_run_if_it_ends_training(setup: Setup, heard: Heard) -> None:
    """ignite swallows what a handler of EXCEPTION_RAISED does not raise again."""
    seen: list[BaseException] = []
    setup.trainer.add_event_handler(Events.EXCEPTION_RAISED, lambda _, error: seen.append(error))
    heard.bus.attach(setup.trainer)
    setup.trainer.add_event_handler(Events.ITERATION_COMPLETED(once=6), raises(ValueError("bad")))
    setup.run(3)
    assert ("finished", None) == (heard.ended.status, heard.ended.reason)
    assert [0, 1, 2] == [e.epoch for e in heard.of(EpochEnded)]
    setup.trainer.add_event_handler(Events.EPOCH_STARTED(once=2), raises(KeyboardInterrupt()))
    setup.run(3)
    assert "stopped" == heard.ended.status
    setup.trainer.state.max_epochs = None
    setup.trainer.add_event_handler(Events.EPOCH_STARTED(once=1), raises(ValueError("worse")))
    setup.run(3)
    assert ("failed", "ValueError: worse") == (heard.ended.status, heard.ended.reason)
    assert 3 == len(seen)


def raises(error: BaseException) -> Callable[[], None]:
    def handler() -> None:
        raise error

    return handler


def test_a_transform_that_raises_costs_its_values_alone(
    setup: Setup, heard: Heard, caplog: pytest.LogCaptureFixture
) -> None:
    """An error in the user's `output_transform` is logged once; epochs and the rest continue."""
    logger = BusLogger(heard.bus)
    logger.attach(setup.trainer, output_transform=lambda loss: loss["missing"])
    setup.run(2)
    assert [] == check_grammar(heard.records)
    assert [0, 1] == [e.epoch for e in heard.of(EpochEnded)]
    assert [] == heard.metrics("train")
    assert 1 == caplog.text.count("hook output in trainbus.adapters.ignite.trainer raised")


@pytest.mark.parametrize("folder", ["saved", None])
def test_two_runs_of_a_trainer(heard: Heard, tmp_path: Path, folder: str | None) -> None:
    """Run again for more epochs, it continues the same run; run anew, it starts another."""
    setup = Setup(tmp_path / folder if folder else None)
    heard.bus.attach(setup.trainer)
    setup.run(1)
    setup.run(3)
    setup.trainer.state.max_epochs = None
    setup.run(1)
    runs = list(dict.fromkeys((r.run, r.attempt) for r in heard.records))
    assert [1, 2, 1] == [attempt for _, attempt in runs]
    assert runs[0][0] == runs[1][0] != runs[2][0]
    assert [0, 1, 2, 0] == [e.epoch for e in heard.of(EpochStarted)]
    resumed = [e.resumed for e in heard.of(RunStarted)]
    assert (0, BATCHES) == (resumed[1].epoch, resumed[1].step)
    assert (None, None) == (resumed[0], resumed[2])


# Attaching ---------------------------------------------------------------------------------------


def test_only_engines_can_be_attached(setup: Setup, heard: Heard) -> None:
    """What comes from ignite and trains nothing is refused, with what to attach instead."""
    with pytest.raises(
        trainbus.AttachError, match="expected an ignite Engine that trains, found D"
    ):
        heard.bus.attach(DiskSaver("."))


@pytest.mark.parametrize("is_first", [False, True])
def test_a_logger_is_not_doubled(setup: Setup, heard: Heard, is_first: bool) -> None:
    """Attached twice, and by `bus.attach` before or after, all comes once; closed, nothing."""
    logger = BusLogger(heard.bus)
    before = trace(setup.trainer)
    detach = heard.bus.attach(setup.trainer).detach if is_first else None
    for _ in range(2):
        logger.attach(setup.trainer, evaluators={"val": setup.evaluator})
    detach = detach or heard.bus.attach(setup.trainer).detach
    setup.run(1)
    assert 1 == len(heard.of(RunStarted))
    assert 1 == len(heard.metrics("validation"))
    logger.close()
    detach()
    handlers = trace(setup.trainer)[0]
    assert before[0] == {event: entries for event, entries in handlers.items() if entries}
    assert not {"run", "_fire_event"} & vars(setup.trainer).keys()


def test_a_copied_trainer_reports_of_its_own(setup: Setup, heard: Heard) -> None:
    """A deep copy of an attached trainer trains, and is reported, without the original."""
    heard.bus.attach(setup.trainer)
    copied = copy.deepcopy(setup.trainer)
    copied.run(setup.data, max_epochs=2)
    assert 0 == setup.trainer.state.iteration
    assert [0, 1] == [e.epoch for e in heard.metrics("train")]
    setup.run(1)
    assert ["finished"] * 2 == [e.status for e in heard.of(RunEnded)]
    assert [0, 1, 0] == [e.epoch for e in heard.metrics("validation")]


def test_a_logger_can_be_pickled(heard: Heard) -> None:
    """As `idist.Parallel` does with the arguments of a function."""
    logger = BusLogger(heard.bus)
    logger.attach(Setup().trainer)
    assert isinstance(pickle.loads(pickle.dumps(logger)), BusLogger)


# Processes ---------------------------------------------------------------------------------------

PARALLEL = """
import sys
sys.path.insert(0, {tests!r})
import ignite.distributed as idist
import trainbus
from test_ignite_copy import Events, Setup, raises
from trainbus.adapters.ignite import BusLogger

def train(rank, logger):
    setup = Setup()
    logger.attach(setup.trainer, evaluators={{"val": setup.evaluator}})
    if rank == 1:
        setup.trainer.add_event_handler(Events.EPOCH_STARTED(once=2), raises(ValueError("boom")))
    try:
        setup.run(2)
    except (ValueError, RuntimeError) as error:
        print(rank, type(error).__name__)

if __name__ == "__main__":
    with trainbus.load("trainbus.yaml") as bus:
        with idist.Parallel(backend="gloo", nproc_per_node=2) as parallel:
            parallel.run(train, BusLogger(bus))
"""


def test_only_the_main_rank_reports(tmp_path: Path) -> None:
    """Of two processes that ignite spawned, one has the run; the other records why it failed."""
    sink = "{type: jsonl, path: '{run}.jsonl'}"
    (tmp_path / "trainbus.yaml").write_text(f"sinks: {{file: {sink}}}")
    raised = run_script(tmp_path, PARALLEL).split("\n")
    assert {"0 RuntimeError", "1 ValueError"} <= set(raised)
    (file,) = tmp_path.glob("*.jsonl")
    records = [decode(line) for line in file.read_bytes().splitlines()]
    assert [] == check_grammar(records)
    assert [2] == [r.event.world_size for r in records if isinstance(r.event, RunStarted)]
    assert [0] == [r.event.epoch for r in records if isinstance(r.event, EpochEnded)]
    ended = records[-1].event
    assert isinstance(ended, RunEnded)
    assert ("failed", "rank 1: ValueError: boom") == (ended.status, ended.reason)


def run_script(folder: Path, code: str) -> str:
    """Run a script beside a copy of this file, and return what it printed."""
    (folder / "test_ignite_copy.py").write_bytes(Path(__file__).read_bytes())
    (folder / "script.py").write_text(code.format(tests=str(folder)))
    done = subprocess.run(
        [sys.executable, "script.py"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert 0 == done.returncode, done.stderr
    return done.stdout


# No code -----------------------------------------------------------------------------------------


@pytest.fixture
def attached(heard: Heard, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What the hook attached to `heard`; the class is restored afterwards."""
    found: list[object] = []

    def attach(target: object) -> None:
        found.append(target)
        heard.bus.attach(target)

    monkeypatch.setattr(Engine, "run", Engine.run)
    about = Engine.run.__doc__, inspect.signature(Engine.run)
    for _ in range(2):
        adapter.hook(sys.modules["ignite.engine.engine"], attach)
    assert about == (Engine.run.__doc__, inspect.signature(Engine.run))
    return found


def test_the_hook_attaches_a_trainer_once(
    setup: Setup, heard: Heard, attached: list[object]
) -> None:
    """A trainer is attached by its first run, an evaluator alone or inside it is not."""
    setup.evaluator.run(setup.held_out)
    assert [] == attached
    setup.run(2)
    setup.trainer.state.max_epochs = None
    setup.run(1)
    assert [setup.trainer] == attached
    epoch = ["epoch.started", "metrics.logged", "metrics.logged", "epoch.ended"]
    one, two = (["run.started", *epoch * count, "run.ended"] for count in (1, 2))
    assert [*two, *one] == heard.names


def test_the_hook_attaches_what_continues(
    setup: Setup, heard: Heard, attached: list[object]
) -> None:
    """A trainer whose state was loaded is run without limits, which it has already."""
    state = {"epoch": 1, "max_epochs": 2, "epoch_length": BATCHES}
    setup.trainer.load_state_dict(state)
    setup.trainer.run(setup.data)
    assert [setup.trainer] == attached
    assert [1] == [e.epoch for e in heard.of(EpochEnded)]


def test_the_hook_leaves_a_logger_alone(setup: Setup, heard: Heard, attached: list[object]) -> None:
    """What the program logs by itself comes once."""
    BusLogger(heard.bus).attach(setup.trainer)
    setup.run(1)
    assert [] == attached
    assert 1 == len(heard.of(RunStarted))


def test_the_hook_goes_on_after_an_error(
    setup: Setup, heard: Heard, attached: list[object]
) -> None:
    """An error passes, its run has failed, and the next trainer is attached."""
    broken = Setup()
    broken.trainer.add_event_handler(Events.EPOCH_STARTED, raises(ValueError("bad")))
    with pytest.raises(ValueError, match="bad"):
        broken.run(1)
    setup.run(1)
    assert ["failed", "finished"] == [e.status for e in heard.of(RunEnded)]
    assert [broken.trainer, setup.trainer] == attached


def test_a_logger_that_goes_to_a_second_bus_stays_with_it() -> None:
    """Closing the first bus does not detach it from the second."""
    first, second = trainbus.Bus(), trainbus.Bus()
    given = BusLogger(first)
    second.attach(given)
    first.close()
    assert given.report.active
    second.close()
    assert not given.report.active


# As one of ignite's loggers -----------------------------------------------------------------------


def test_a_logger_logs_as_those_of_ignite(setup: Setup, heard: Heard, tmp_path: Path) -> None:
    """Names, values and positions are those of ignite's own; the run ends with the `with` block."""
    with BusLogger(heard.bus) as logger, TensorboardLogger(log_dir=str(tmp_path)) as theirs:
        for each in (logger, theirs):
            each.attach_output_handler(
                setup.trainer,
                Events.ITERATION_COMPLETED(every=2),
                tag="training",
                output_transform=lambda loss: {"loss": loss, "pair": [loss, 2 * loss]},
            )
            each.attach_output_handler(
                setup.evaluator,
                Events.EPOCH_COMPLETED,
                tag="validation",
                metric_names="all",
                global_step_transform=global_step_from_engine(setup.trainer),
            )
            each.attach_opt_params_handler(
                setup.trainer, Events.ITERATION_STARTED(every=4), optimizer=setup.optimizer
            )
        setup.run(2)
        assert (1, 0) == (len(heard.of(RunStarted)), len(heard.of(RunEnded)))
    assert "finished" == heard.ended.status
    assert [] == check_grammar(heard.records)
    found = {
        (name, e.step if e.epoch is None else e.epoch + 1): value
        for e in heard.of(MetricsLogged)
        for name, value in e.values.items()
    }
    written = EventAccumulator(str(tmp_path)).Reload()
    expected = {
        (tag, point.step): pytest.approx(point.value)
        for tag in written.Tags()["scalars"]
        for point in written.Scalars(tag)
    }
    assert expected == found
    assert {"train", "validation"} == {e.phase for e in heard.of(MetricsLogged)}
    assert {None} == {e.step for e in heard.metrics("validation")}


def test_handlers_log_into_the_run_of_the_trainer(setup: Setup, heard: Heard) -> None:
    """With `attach(trainer)` there is one run, which ends with the training."""
    with BusLogger(heard.bus) as logger:
        logger.attach(setup.trainer)
        handler = adapter.OutputHandler("extra", output_transform=lambda loss: {"loss": loss})
        handle = logger.attach(setup.trainer, handler, Events.ITERATION_COMPLETED)
        setup.run(1)
        handle.remove()
        assert "finished" == heard.ended.status
    assert 1 == len(heard.of(RunStarted))
    steps = [e.step for e in heard.of(MetricsLogged) if "extra/loss" in e.values]
    assert [1, 2, 3, 4] == steps


def test_a_logger_that_an_exception_leaves_has_failed(setup: Setup, heard: Heard) -> None:
    """The exception leaves the `with` block, and the run says so; ignite refuses wrong events."""
    logger = BusLogger(heard.bus)
    logger.attach_opt_params_handler(
        setup.trainer, Events.ITERATION_STARTED, optimizer=setup.optimizer
    )
    setup.run(1)
    with pytest.raises(RuntimeError, match="Unknown event"), logger:
        logger.attach_output_handler(setup.trainer, "no event", tag="a", metric_names="all")
    assert "failed" == heard.ended.status


def test_a_logger_of_ignite_is_reported(
    setup: Setup, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Where a sink feeds the same tracker, one line says so; the run names what is fed twice."""
    heard = feeding("tensorboard")
    heard.bus.attach(setup.trainer)
    with TensorboardLogger(log_dir=str(tmp_path)) as theirs:
        theirs.attach_opt_params_handler(
            setup.trainer, Events.ITERATION_STARTED, optimizer=setup.optimizer
        )
        setup.run(1)
    assert [["tensorboard"]] == [started.own_loggers for started in heard.of(RunStarted)]
    assert [
        "ignite's own TensorboardLogger and a sink of trainbus both log to TensorBoard; "
        "remove one of them (leave out either logger)"
    ] == [line for line in caplog.messages if "both log" in line]


def test_a_logger_that_nobody_holds_lives_as_long_as_its_trainer(heard: Heard) -> None:
    """`BusLogger(bus).attach(trainer)` needs no variable: the bus takes it out at its end."""
    setup = Setup()
    with heard.bus:
        BusLogger(heard.bus).attach(setup.trainer)
        gc.collect()
    setup.run(1)
    assert [] == heard.records
    trainer = weakref.ref(setup.trainer)
    del setup
    gc.collect()
    assert trainer() is None


def test_the_exceptions_that_end_a_training_on_purpose_exist() -> None:
    """ignite's own, by which it ends a run, is known by its name."""
    from ignite.engine import engine

    errors = [engine._EngineTerminateException(), engine._EngineTerminateSingleEpochException()]
    assert ["stopped", "stopped"] == [ended_by(error).status for error in errors]
