"""The transformers adapter in real trainings: the suite, its values, the end, TRL, two ranks."""

from __future__ import annotations

import copy
import hashlib
import importlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import pytest
from trainbus.adapters import transformers as adapter

import trainbus
from support import hf_ddp, torchvision_cpu
from support.feeding import feeding
from trainbus import Bus, Record
from trainbus.events import (
    CheckpointSaved,
    EpochEnded,
    EpochStarted,
    MetricsLogged,
    ModelDescribed,
    ParamsUpdated,
    RunEnded,
    RunStarted,
    TableLogged,
    TextLogged,
    event_name,
)
from trainbus.testing import AdapterConformance, Training, check_grammar

# transformers, accelerate and torch warn of their own deprecations.
pytestmark = pytest.mark.filterwarnings("default")

ROOT = Path(__file__).parents[3]
STEPS = 4


class UserError(Exception):
    """What no framework knows."""


def make(folder: Path, epochs: float = 3, **arguments: Any) -> Any:
    """Return a trainer of a tiny model: four steps an epoch, and an evaluation and a checkpoint."""
    from transformers import Trainer

    return hf_ddp.make(folder / "out", epochs, Trainer, **arguments)


def digest(model: Any) -> str:
    """Return what equal weights have in common."""
    found = hashlib.sha256()
    for value in model.state_dict().values():
        found.update(value.numpy().tobytes())
    return found.hexdigest()


def on(event: str, call: Callable[..., Any]) -> Any:
    """Return a user's callback that calls `call(args, state, control)` at one event."""
    from transformers import TrainerCallback

    def hear(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        call(args, state, control)

    return type("UserCallback", (TrainerCallback,), {event: hear})()


def raising(error: BaseException, *, at: int) -> Any:
    """Return a user's callback that raises at the begin of a step."""

    def hear(args: Any, state: Any, control: Any) -> None:
        if state.global_step == at:
            raise error

    return on("on_step_begin", hear)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Keep to one thread: on a busy machine several wait for each other, for a model this small."""
    torchvision_cpu.install()
    import torch

    count = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(count)


class TestConformance(AdapterConformance):
    other_rank_env: ClassVar = {"RANK": "1", "LOCAL_RANK": "1", "OMP_NUM_THREADS": "1"}

    def start(self, folder: Path, epochs: int) -> Training:
        torchvision_cpu.install()  # the suite's own child has no fixture
        if os.environ.get("RANK") == "1":
            hf_ddp.be_rank_1(folder / "main")
        return set_up(folder, epochs)

    def trace(self, target: Any) -> object:
        return list(target.callback_handler.callbacks), vars(target).keys()

    def handles(self, target: Any) -> object:
        return target.callback_handler.callbacks


def set_up(folder: Path, epochs: int, *, resume: bool = False) -> Training:
    """Return a training for the suite."""
    trainer = make(folder, epochs)

    def stop_early() -> None:
        from transformers import EarlyStoppingCallback

        # The loss falls, so that no evaluation is better than the first.
        trainer.args.metric_for_best_model, trainer.args.greater_is_better = "loss", True
        trainer.add_callback(EarlyStoppingCallback(1))

    return Training(
        target=trainer,
        run=lambda: trainer.train(resume_from_checkpoint=resume),
        result=lambda: digest(trainer.model),
        fail_at=lambda error: trainer.add_callback(raising(error, at=STEPS + 1)),
        epochs_trained=lambda: int(trainer.state.epoch or 0) - resume,
        resume=lambda: set_up(folder, epochs, resume=True),
        stop_early=stop_early,
    )


def train(trainer: Any, *, bus: Bus | None = None, **options: Any) -> list[Record]:
    """Attach, train, and return the records; what the user raises is in them."""
    records: list[Record] = []
    bus = Bus() if bus is None else bus
    bus.subscribe(records.append)
    bus.attach(trainer)
    with suppress(UserError):
        trainer.train(**options)
    bus.close()
    return records


def of(records: list[Record], kind: type[Any]) -> list[Any]:
    return [record.event for record in records if isinstance(record.event, kind)]


def plot(records: list[Record]) -> list[str]:
    """Return what happened, in short: `epoch.started 0`, `metrics.logged train 2`, …"""
    found = []
    for record in records:
        event = record.event
        about = [getattr(event, name, None) for name in ("phase", "kind", "step")]
        if isinstance(event, EpochStarted | EpochEnded):
            about = [event.epoch]
        found.append(" ".join([event_name(event), *(str(a) for a in about if a is not None)]))
    return found


def test_an_epoch_holds_its_evaluation_and_its_checkpoint(tmp_path: Path) -> None:
    """Events come in order, each once."""
    assert [
        "run.started",
        "model.described",
        *(
            line
            for epoch in (0, 1)
            for line in (
                f"epoch.started {epoch}",
                f"metrics.logged train {STEPS * epoch + 2}",
                f"metrics.logged train {STEPS * epoch + 4}",
                f"metrics.logged validation {STEPS * epoch + 4}",
                f"checkpoint.saved periodic {STEPS * epoch + 4}",
                f"epoch.ended {epoch}",
            )
        ),
        "metrics.logged train",
        "checkpoint.saved last 8",
        "run.ended",
    ] == plot(train(make(tmp_path, 2)))


def test_values_are_those_of_the_log(tmp_path: Path) -> None:
    """Names, values and steps are those of the Trainer's own history, without its counters."""
    trainer = make(tmp_path)
    logged = of(train(trainer), MetricsLogged)
    history = trainer.state.log_history
    assert [{k: v for k, v in row.items() if k not in ("epoch", "step")} for row in history] == [
        event.values for event in logged
    ]
    *during, summary = logged
    assert [row["step"] for row in history[:-1]] == [event.step for event in during]
    assert [math.ceil(row["epoch"]) - 1 for row in history[:-1]] == [e.epoch for e in during]
    assert (None, None, "train", False) == (
        *(summary.epoch, summary.step),
        *(summary.phase, summary.final),
    )
    assert {"loss", "grad_norm", "learning_rate"} == during[0].values.keys()
    assert "train_loss" in summary.values
    assert {"train", "validation"} == {event.phase for event in during}


def test_the_start_has_the_configuration(tmp_path: Path) -> None:
    """Arguments and model configuration are there as plain values, and tokens are not."""
    trainer = make(tmp_path, 1, run_name="tiny", metric_for_best_model="loss", hub_token="hf_abc")
    records = train(trainer)
    (started,) = of(records, RunStarted)
    assert ("tiny", "transformers", 1) == (started.name, started.framework, started.world_size)
    assert importlib.import_module("transformers").__version__ == started.framework_version
    assert str(tmp_path / "out") == started.save_dir
    assert (0.01, "epoch", 8) == (
        started.params["learning_rate"],
        started.params["eval_strategy"],
        started.params["model"]["hidden_size"],
    )
    assert {"eval_loss": "min"} == started.goals
    assert "hf_abc" not in str(started)
    assert started.resumed is None
    (described,) = of(records, ModelDescribed)
    assert sum(p.numel() for p in trainer.model.parameters()) == described.parameters


def test_accumulated_batches_are_one_step(tmp_path: Path) -> None:
    """Steps count updates, of which two batches make one here."""
    trainer = make(tmp_path, 2, gradient_accumulation_steps=2, logging_steps=1)
    logged = [e for e in of(train(trainer), MetricsLogged) if "loss" in e.values]
    assert [(0, 1), (0, 2), (1, 3), (1, 4)] == [(e.epoch, e.step) for e in logged]


def test_evaluations_between_epochs_have_their_step(tmp_path: Path) -> None:
    """An evaluation before the first step, every three steps, and of two data sets."""
    trainer = make(
        tmp_path,
        2,
        eval_strategy="steps",
        eval_steps=3,
        eval_on_start=True,
        eval_dataset={"near": hf_ddp.samples(4), "far": hf_ddp.samples(4, seed=2)},
    )
    logged = [e for e in of(train(trainer), MetricsLogged) if e.phase == "validation"]
    assert [(None, 0), (None, 0), (0, 3), (0, 3), (1, 6), (1, 6), (1, 8), (1, 8)] == [
        (e.epoch, e.step) for e in logged
    ]
    assert {"eval_near_loss", "eval_far_loss"} <= logged[0].values.keys() | logged[1].values.keys()


def test_a_trainer_that_logs_in_its_own_way_is_heard(tmp_path: Path) -> None:
    """Metrics that `log` hid come with the evaluation, and what it added is there too."""
    from transformers import Trainer

    class Own(Trainer):  # type: ignore[misc]
        def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
            added = {"eval_added": 1.0} if "eval_loss" in logs else {"added": 2.0}
            kept = {k: v for k, v in logs.items() if k != "eval_loss"}
            super().log({**kept, **added}, start_time)

    records = train(hf_ddp.make(tmp_path / "out", 1, Own))
    logged = of(records, MetricsLogged)
    names = [name for e in logged if e.phase == "validation" for name in e.values]
    assert sorted({*names}) == sorted(names)
    assert {"eval_loss", "eval_added"} <= {*names}
    assert 2.0 == logged[0].values["added"]


def test_what_compute_metrics_returns_arrives(tmp_path: Path) -> None:
    """Values deeper down are flattened, a matrix is a table, a word a text, None no value."""
    trainer = make(tmp_path, 1)
    per_class = {"cat": 0.1, "dog": {"small": 0.5}}
    trainer.compute_metrics = lambda prediction: {
        "f1": 0.5,
        "per class": per_class,
        "confusion": [[1, 2], [3, 4]],
        "label": "good",
        "nothing": None,
    }
    records = train(trainer)
    (event,) = (e for e in of(records, MetricsLogged) if e.phase == "validation")
    expected = {"f1": 0.5, "per class/cat": 0.1, "per class/dog/small": 0.5}
    assert {f"eval_{name}": value for name, value in expected.items()}.items() <= (
        event.values.items()
    )
    rows = [[1, 2], [3, 4]]
    table = TableLogged(key="eval_confusion", columns=["0", "1"], rows=rows, epoch=0, step=STEPS)
    assert [table] == of(records, TableLogged)
    text = TextLogged(key="eval_label", text="good", epoch=0, step=STEPS)
    assert [text] == of(records, TextLogged)


def test_nan_stays_nan(tmp_path: Path) -> None:
    """A loss of NaN is recorded as NaN."""
    trainer = make(tmp_path, 1, learning_rate=1e30, max_grad_norm=0.0, logging_nan_inf_filter=False)
    (_, second, *_) = [e for e in of(train(trainer), MetricsLogged) if "loss" in e.values]
    assert math.isnan(second.values["loss"])


def test_evaluating_alone_emits_nothing(tmp_path: Path) -> None:
    """Before and after its training a trainer may evaluate and predict: no run is open then."""
    trainer, records = make(tmp_path, 1), list[Record]()
    with Bus() as bus:
        bus.subscribe(records.append)
        bus.attach(trainer)
        trainer.evaluate()
        trainer.predict(hf_ddp.samples(4))
        assert [] == records
        trainer.train()
        count = len(records)
        trainer.evaluate()
        trainer.predict(hf_ddp.samples(4))
        assert count == len(records)
    assert [] == check_grammar(records)


def test_a_test_during_training_has_its_phase(tmp_path: Path) -> None:
    """What a callback of the user's predicts or tests in a training belongs to it."""
    trainer = make(tmp_path, 1)

    def test(args: Any, state: Any, control: Any) -> None:
        trainer.evaluate(hf_ddp.samples(4), metric_key_prefix="test")
        trainer.predict(hf_ddp.samples(4), metric_key_prefix="test_again")

    trainer.add_callback(on("on_epoch_end", test))
    tested = [e for e in of(train(trainer), MetricsLogged) if e.phase == "test"]
    assert [(0, STEPS), (0, STEPS)] == [(e.epoch, e.step) for e in tested]
    assert [True, False] == ["test_loss" in e.values for e in tested]
    assert "test_again_loss" in tested[1].values


def test_two_trainings_are_two_runs(tmp_path: Path) -> None:
    """As in a search of hyperparameters, the second `train()` begins a run of its own."""
    trainer, records = make(tmp_path, 1), list[Record]()
    with Bus() as bus:
        bus.subscribe(records.append)
        bus.attach(trainer)
        trainer.train()
        trainer.args.learning_rate = 0.5
        trainer.train()
    runs = list(dict.fromkeys(record.run for record in records))
    assert 2 == len(runs)
    for run, rate in zip(runs, (0.01, 0.5), strict=True):
        mine = [record for record in records if record.run == run]
        assert [] == check_grammar(mine)
        assert rate == of(mine, RunStarted)[0].params["learning_rate"]


# Ends ---------------------------------------------------------------------------------------------


def test_early_stopping_says_what_it_saw(tmp_path: Path) -> None:
    """Its reason names metric and patience; the best is that of the Trainer."""
    from transformers import EarlyStoppingCallback

    trainer = make(
        tmp_path,
        5,
        metric_for_best_model="loss",
        greater_is_better=True,
        load_best_model_at_end=True,
        callbacks=[EarlyStoppingCallback(2)],
    )
    (ended,) = of(train(trainer), RunEnded)
    assert "early stop: no better eval_loss in 2 evaluations" == ended.reason
    assert ("eval_loss", trainer.state.best_metric, 0) == (
        *(ended.best.metric, ended.best.value),
        ended.best.epoch,
    )


@pytest.mark.parametrize(
    ("event", "reason"),
    [
        ("on_step_end", "stopped by a callback at step 5 of 12"),
        ("on_evaluate", "early stop: by a callback, after the evaluation at step 8 of 12"),
        ("on_epoch_end", "stopped by a callback at step 8 of 12"),
    ],
)
def test_a_stop_by_the_user_says_so(tmp_path: Path, event: str, reason: str) -> None:
    """The reason depends on when the training was stopped."""

    def stop(args: Any, state: Any, control: Any) -> None:
        control.should_training_stop |= state.global_step > STEPS

    (ended,) = of(train(make(tmp_path, callbacks=[on(event, stop)])), RunEnded)
    assert ("finished", reason) == (ended.status, ended.reason)


def test_max_steps_ends_in_an_epoch(tmp_path: Path) -> None:
    """The reason is the number of steps that was asked for, and the epoch ends with it."""
    records = train(make(tmp_path, max_steps=6))
    (ended,) = of(records, RunEnded)
    assert "max_steps of 6 done" == ended.reason
    assert [0, 1] == [e.epoch for e in of(records, EpochEnded)]
    assert [] == check_grammar(records)


def test_a_stream_has_an_epoch_a_pass(tmp_path: Path) -> None:
    """Where the data have no length, the Trainer's own epochs don't count; their begins do."""
    from torch.utils.data import IterableDataset

    class Stream(IterableDataset):  # type: ignore[misc]
        def __iter__(self) -> Any:
            return iter(hf_ddp.samples(12))

    trainer = make(tmp_path, max_steps=7, logging_steps=1, eval_strategy="no", save_strategy="no")
    trainer.train_dataset = Stream()
    records = train(trainer)
    assert [] == check_grammar(records)
    assert [0, 1, 2] == [e.epoch for e in of(records, EpochStarted)]
    logged = [e for e in of(records, MetricsLogged) if "loss" in e.values]
    assert [0, 0, 0, 1, 1, 1, 2] == [e.epoch for e in logged]


def test_a_failure_keeps_the_best(tmp_path: Path) -> None:
    """An exception of the user's ends the run as failed, with the best value until then."""
    error = UserError("raised by the user")
    trainer = make(tmp_path, metric_for_best_model="loss", callbacks=[raising(error, at=9)])
    records = train(trainer)
    (ended,) = of(records, RunEnded)
    assert ("failed", "UserError: raised by the user") == (ended.status, ended.reason)
    assert (1, trainer.state.best_metric) == (ended.best.epoch, ended.best.value)
    assert [0, 1] == [e.epoch for e in of(records, EpochEnded)]


def test_a_failure_in_the_last_hook_counts(tmp_path: Path) -> None:
    """A run is finished when `train()` returned, not before."""

    def fail(args: Any, state: Any, control: Any) -> None:
        raise UserError("raised by the user")

    records = train(make(tmp_path, 1, callbacks=[on("on_train_end", fail)]))
    assert "failed" == of(records, RunEnded)[0].status
    assert [] == check_grammar(records)


def test_a_smaller_batch_continues_the_run(tmp_path: Path) -> None:
    """If memory runs out, the epoch ends as retried, and the smaller batch is recorded."""
    failed: list[int] = []

    def run_out(args: Any, state: Any, control: Any) -> None:
        if not failed and state.global_step == 2:
            failed.append(1)
            raise RuntimeError("CUDA out of memory. Tried to allocate")

    trainer = make(tmp_path, 1, auto_find_batch_size=True, callbacks=[on("on_step_begin", run_out)])
    records = train(trainer)
    assert [] == check_grammar(records)
    assert [(0, "retried"), (0, "completed")] == [
        (e.epoch, e.outcome) for e in of(records, EpochEnded)
    ]
    (updated,) = of(records, ParamsUpdated)
    assert {"per_device_train_batch_size": trainer._train_batch_size} == updated.params
    assert "finished" == of(records, RunEnded)[0].status


# Checkpoints --------------------------------------------------------------------------------------


def test_checkpoints_exist_when_they_are_recorded(tmp_path: Path) -> None:
    """Each folder exists by then; the best one is recorded as best, with its score."""
    trainer, there = make(tmp_path, 2, metric_for_best_model="loss"), list[bool]()

    def look(record: Record) -> None:
        assert isinstance(record.event, CheckpointSaved)
        there.append(Path(record.event.path).is_dir())

    with Bus() as bus:
        records: list[Record] = []
        bus.subscribe(records.append)
        bus.subscribe(look, CheckpointSaved)
        bus.attach(trainer)
        trainer.train()
    saved = of(records, CheckpointSaved)
    assert [True] * 5 == there
    assert [
        *(("periodic", 0, 4, "checkpoint-4"), ("best", 0, 4, "checkpoint-4")),
        *(("periodic", 1, 8, "checkpoint-8"), ("best", 1, 8, "checkpoint-8")),
        ("last", 1, 8, "checkpoint-8"),
    ] == [(e.kind, e.epoch, e.step, Path(e.path).name) for e in saved]
    assert trainer.state.best_model_checkpoint == saved[-1].path
    assert trainer.state.best_metric == saved[-1].metrics["eval_loss"]


def test_a_resumed_training_continues(tmp_path: Path) -> None:
    """A checkpoint in the middle of an epoch, given by its path, saved below another folder."""
    first = train(make(tmp_path, 2, save_strategy="steps", save_steps=6, max_steps=6))
    trainer = make(tmp_path, 3)
    trainer.args.output_dir = str(tmp_path / "elsewhere")
    second = train(trainer, resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-6"))
    (started,) = of(second, RunStarted)
    assert (0, 6, str(tmp_path / "out")) == (
        *(started.resumed.epoch, started.resumed.step),
        started.resumed.save_dir,
    )
    assert (first[0].run, 2) == (second[0].run, second[0].attempt)
    assert [1, 2] == [e.epoch for e in of(second, EpochStarted)]
    steps = [e.step for e in of(second, MetricsLogged) if "loss" in e.values]
    assert [8, 10, 12] == steps


# Ways to attach -----------------------------------------------------------------------------------


def test_the_callback_reports_the_same(tmp_path: Path) -> None:
    """`BusCallback(bus)` in the list of callbacks gives what `bus.attach(trainer)` gives."""
    attached, records = train(make(tmp_path / "a", 2)), list[Record]()
    with Bus() as bus:
        bus.subscribe(records.append)
        make(tmp_path / "b", 2, callbacks=[adapter.BusCallback(bus)]).train()
    assert plot(attached) == plot(records)
    timed = ("runtime", "second", "total_flos")
    for one, other in zip(of(attached, MetricsLogged), of(records, MetricsLogged), strict=True):
        names = {name for name in one.values if not any(part in name for part in timed)}
        assert {n: one.values[n] for n in names} == {n: other.values[n] for n in names}


def test_the_callback_leaves_a_failure_to_the_bus(tmp_path: Path) -> None:
    """It sees no exception; the one that leaves the bus's block ends its run."""
    records: list[Record] = []
    error = UserError("raised by the user")
    bus = Bus()
    bus.subscribe(records.append)
    trainer = make(tmp_path, 1, callbacks=[adapter.BusCallback(bus), raising(error, at=2)])
    with pytest.raises(UserError, match="raised by the user"), bus:
        trainer.train()
    assert "failed" == of(records, RunEnded)[0].status


def test_callback_and_attach_together_report_once(tmp_path: Path) -> None:
    """The callback reports, and the attached trainer records its failure."""
    error = UserError("raised by the user")
    bus = Bus()
    trainer = make(tmp_path, 2, callbacks=[adapter.BusCallback(bus), raising(error, at=5)])
    records = train(trainer, bus=bus)
    assert 1 == len({record.run for record in records})
    assert [] == check_grammar(records)
    assert "failed" == of(records, RunEnded)[0].status


def test_a_removed_callback_emits_nothing(tmp_path: Path) -> None:
    """`remove_callback` removes it, by class or object, and training continues."""
    records: list[Record] = []
    with Bus() as bus:
        bus.subscribe(records.append)
        trainer = make(tmp_path, 1, callbacks=[adapter.BusCallback(bus)])
        bus.attach(trainer)
        trainer.remove_callback(adapter.BusCallback)
        trainer.remove_callback(adapter.BusCallback)
        trainer.train()
    assert [] == records


def test_a_detached_callback_emits_nothing(tmp_path: Path) -> None:
    """After the bus is closed its callback stays in the trainer and says nothing."""
    records: list[Record] = []
    with Bus() as bus:
        bus.subscribe(records.append)
        trainer = make(tmp_path, 1, callbacks=[adapter.BusCallback(bus)])
    trainer.train()
    assert [] == records


def test_a_callback_can_be_copied() -> None:
    """Its copy reports to the same bus; the class is found by its name."""
    with Bus() as bus:
        callback = adapter.BusCallback(bus)
        copied = copy.deepcopy(callback)
        assert callback.report.emit is copied.report.emit
        assert adapter.BusCallback is type(copied)


def test_only_what_trains_can_be_attached() -> None:
    """A model has no callbacks: the error says what to attach."""
    with pytest.raises(trainbus.AttachError, match="or a BusCallback, found LlamaForCausalLM"):
        Bus().attach(hf_ddp.model())


def test_report_to_makes_the_callback(tmp_path: Path) -> None:
    """Registered, `report_to="trainbus"` logs each trainer; unregistered, it is unknown again."""
    records: list[Record] = []
    with Bus() as bus:
        bus.subscribe(records.append)
        unregister = adapter.register(bus)
        trainer = make(tmp_path, 1, report_to="trainbus")
        trainer.train()
        unregister()
        unregister()
        with pytest.raises(ValueError, match="trainbus is not supported"):
            make(tmp_path, 1, report_to="trainbus")
    assert [] == check_grammar(records)
    assert 1 == len({record.run for record in records})
    assert adapter.BusCallback in {type(c) for c in trainer.callback_handler.callbacks}


HOOKED = """
import inspect, json, sys
from pathlib import Path
from support import hf_ddp, torchvision_cpu
torchvision_cpu.install()
import transformers.trainer
from transformers import Trainer
from trainbus import Bus, JournalSpec
from trainbus.adapters import transformers as adapter
from trainbus.events import event_name

folder, signature = Path(sys.argv[1]), inspect.signature(Trainer)
bus = Bus(journal=JournalSpec(dir=str(folder / "runs")))
heard = []
bus.subscribe(lambda record: heard.append((record.run, event_name(record.event))))
for _ in range(2):
    adapter.hook(transformers.trainer, bus.attach)
assert signature == inspect.signature(Trainer)

found = {}
def run(name, mine=None, **arguments):
    heard.clear()
    trainer = hf_ddp.make(folder / name, 1, Trainer, save_strategy="no", **arguments)
    if mine is not None:
        mine.attach(trainer)
    trainer.train()
    found[name] = [len({run for run, _ in heard}), len(heard)]

with bus:
    run("plain")
    run("report_to", report_to="trainbus")
    run("callback", callbacks=[adapter.BusCallback(bus)])
    run("attached", mine=bus)
print(json.dumps(found))
"""


def test_a_hooked_trainer_reports_once(tmp_path: Path) -> None:
    """Hooked twice, and with a callback or an attach of the program's own: one run each."""
    done = subprocess.run(
        [sys.executable, "-c", HOOKED, str(tmp_path)],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert 0 == done.returncode, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert {"plain", "report_to", "callback", "attached"} == found.keys()
    assert [[1, 9]] * 4 == list(found.values())


def environment() -> dict[str, str]:
    """Return what a process needs to find the tests' own modules."""
    path = os.pathsep.join([str(ROOT / "tests"), str(ROOT)])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


# Two processes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("failing", [None, 1])
def test_two_ranks_are_one_run(tmp_path: Path, failing: int | None) -> None:
    """Rank 0 logs; what ends rank 1 ends the run, and not the connection that broke by it."""
    done = hf_ddp.launch(tmp_path, 2, failing, environment())
    (run,) = (tmp_path / "runs").glob("[!.]*")
    records = [json.loads(line) for line in (run / "r0-a1.jsonl").read_text().splitlines()]
    events = [record["event"] for record in records]
    (ended,) = [event for event in events if event["type"] == "run.ended"]
    if failing is None:
        assert 0 == done.returncode, done.stderr[-4000:]
        assert ("finished", 2) == (ended["status"], events[0]["world_size"])
        trained = [e["step"] for e in events if "loss" in e.get("values", {})]
        assert [2, 4] == trained
        assert ["r0-a1.jsonl"] == sorted(path.name for path in run.glob("r*.jsonl"))
    else:
        assert 0 != done.returncode
        assert "failed" == ended["status"]
        assert ended["reason"].startswith("rank 1: "), ended["reason"]
        assert "raised by the user" in ended["reason"]


# TRL ----------------------------------------------------------------------------------------------


def tokenizer() -> Any:
    """Return a tokenizer of 16 words, made in memory."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2, **{f"w{i}": i for i in range(3, 16)}}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, **special)


COMMON: dict[str, Any] = {
    "max_steps": 2,
    "logging_steps": 1,
    "save_strategy": "no",
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "disable_tqdm": True,
}


def test_sft_reports_its_own_metrics(tmp_path: Path) -> None:
    """TRL's supervised trainer is a Trainer; what it adds to the log is there, in both phases."""
    words = tokenizer()
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = Dataset.from_dict({"text": ["w3 w4 w5 w6", "w7 w8 w9"] * 4})
    trainer = SFTTrainer(
        model=hf_ddp.model(),
        args=SFTConfig(
            output_dir=str(tmp_path), eval_strategy="steps", eval_steps=2, max_length=8, **COMMON
        ),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=words,
    )
    records = train(trainer)
    assert [] == check_grammar(records)
    logged = of(records, MetricsLogged)
    trained = [e for e in logged if "loss" in e.values]
    assert [1, 2] == [e.step for e in trained]
    assert {"mean_token_accuracy", "num_tokens"} <= trained[0].values.keys()
    (validated,) = [e for e in logged if e.phase == "validation"]
    assert {"eval_loss", "eval_mean_token_accuracy"} <= validated.values.keys()
    assert 2 == of(records, RunStarted)[0].params["max_steps"]


def test_grpo_reports_its_rewards(tmp_path: Path) -> None:
    """Two steps of TRL's policy optimisation log the reward of each function by its name."""
    words = tokenizer()
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    def length(completions: list[str], **kwargs: Any) -> list[float]:
        return [float(len(completion)) for completion in completions]

    trainer = GRPOTrainer(
        model=hf_ddp.model(),
        reward_funcs=length,
        args=GRPOConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=2,
            num_generations=2,
            max_completion_length=4,
            **COMMON,
        ),
        train_dataset=Dataset.from_dict({"prompt": ["w3 w4", "w5 w6"] * 2}),
        processing_class=words,
    )
    records = train(trainer)
    assert [] == check_grammar(records)
    trained = [e for e in of(records, MetricsLogged) if "reward" in e.values]
    assert [1, 2] == [e.step for e in trained]
    assert "rewards/length/mean" in trained[0].values
    assert "finished" == of(records, RunEnded)[0].status


@pytest.mark.parametrize("idiom", ["attach", "callback"])
def test_an_integration_of_transformers_is_reported(
    tmp_path: Path, idiom: str, caplog: pytest.LogCaptureFixture
) -> None:
    """What `report_to` names, and a sink feeds too, is said in one line and in the run's start."""
    heard = feeding("tensorboard")
    own = [adapter.BusCallback(heard.bus)] if idiom == "callback" else []
    trainer = make(tmp_path, 1, callbacks=own, report_to="tensorboard")
    if idiom == "attach":
        heard.bus.attach(trainer)
    trainer.train()
    assert [["tensorboard"]] == [started.own_loggers for started in heard.of(RunStarted)]
    assert [
        "transformers's own TensorBoardCallback and a sink of trainbus both log to TensorBoard; "
        'remove one of them (TrainingArguments(report_to="none"))'
    ] == [line for line in caplog.messages if "both log" in line]
