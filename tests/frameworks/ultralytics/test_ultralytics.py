"""The Ultralytics adapter in real trainings: the suite, the five tasks, the traps, old versions."""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest

import shapes
import trainbus
from support.train import FAST, HERE, MODELS, hermetic, weights_hash
from support.trained import CONFIG, UNDRAWN, Trained, train_once
from trainbus.events import (
    CheckpointSaved,
    ConfusionMatrixLogged,
    CurveLogged,
    EpochEnded,
    EpochStarted,
    ImageLogged,
    MetricsLogged,
    ModelDescribed,
    ParamsUpdated,
    RunEnded,
    RunStarted,
    TableLogged,
)
from trainbus.testing import AdapterConformance, Training, check_grammar

# Ultralytics and torch warn of their own deprecations, in this process too.
pytestmark = pytest.mark.filterwarnings("default")

MODEL = str(MODELS / "detect.yaml")
LOCAL = "sinks: {{local: {{type: jsonl, path: '{root}/records/{{run}}.jsonl'}}}}"


class TestConformance(AdapterConformance):
    pickles_with = "cloudpickle"

    def start(self, folder: Path, epochs: int) -> Training:
        data = shapes.make_dataset(folder / "data", images=16, val_images=8, size=64)
        return set_up(MODEL, folder, {"data": str(data), "epochs": epochs, "plots": False})

    def trace(self, target: Any) -> object:
        return {name: list(hooks) for name, hooks in target.callbacks.items()}, vars(target).keys()

    def handles(self, target: Any) -> object:
        return target.callbacks


def set_up(model_file: str, folder: Path, arguments: dict[str, Any]) -> Training:
    """Return a training of a YOLO in this process."""
    from support import torchvision_cpu

    torchvision_cpu.install()
    from ultralytics import YOLO

    model = YOLO(model_file)
    weights = folder / "runs" / "train" / "weights"

    table = weights.parent / "results.csv"
    before = rows(table)

    def fail_at(error: BaseException) -> None:
        def fail(trainer: Any) -> None:
            if trainer.epoch == 1:
                raise error

        model.add_callback("on_train_epoch_start", fail)

    if "resume" not in arguments:
        arguments = FAST | {"project": str(folder / "runs"), "name": "train"} | arguments
    return Training(
        target=model,
        run=lambda: model.train(**arguments),
        result=lambda: weights_hash(weights / "best.pt"),
        fail_at=fail_at,
        epochs_trained=lambda: rows(table) - before,
        resume=lambda: set_up(str(weights / "last.pt"), folder, {"resume": True}),
    )


def rows(table: Path) -> int:
    """Return how many epochs Ultralytics has written down."""
    return len(table.read_text().splitlines()) - 1 if table.exists() else 0


def test_only_what_trains_can_be_attached() -> None:
    """The network inside a YOLO has no callbacks: the error says what to attach."""
    bus = trainbus.Bus()
    with pytest.raises(trainbus.AttachError, match="expected a YOLO model or a trainer, found Det"):
        bus.attach(yolo().model)


# Tasks and versions -------------------------------------------------------------------------------

CURVES = {"detect": 4, "obb": 4, "segment": 8, "pose": 8, "classify": 0}
METRICS = {
    "detect": {"metrics/mAP50-95(B)"},
    "obb": {"metrics/mAP50-95(B)"},
    "segment": {"metrics/mAP50-95(B)", "metrics/mAP50-95(M)"},
    "pose": {"metrics/mAP50-95(B)", "metrics/mAP50-95(P)"},
    "classify": {"metrics/accuracy_top1", "metrics/accuracy_top5"},
}


@pytest.mark.parametrize("task", shapes.TASKS)
def test_each_task_trains(tmp_path: Path, task: str) -> None:
    """Every task reports its metrics, curves, matrix and plots, into W&B too."""
    data = shapes.make_dataset(tmp_path / "data", task, images=32, val_images=8, size=64)
    trained = train_once(tmp_path / "run", data, task=task, epochs=2)
    assert [] == check_grammar(trained.records)
    validated = [e for e in trained.events(MetricsLogged) if e.phase == "validation"]
    assert [(0, False), (1, False), (None, True)] == [(e.epoch, e.final) for e in validated]
    assert all(METRICS[task] <= e.values.keys() for e in validated)
    assert task == trained.events(RunStarted)[0].task
    assert CURVES[task] == len(trained.events(CurveLogged))
    assert CURVES[task] == sum(k.startswith("curves/") for k in trained.wandb_run.charts)
    (matrix,) = trained.events(ConfusionMatrixLogged)
    names = ["red", "green", "blue", "background"]
    if task == "classify":  # its classes are folders, in the order of their names
        names = ["blue", "green", "red"]
    assert names == matrix.classes
    assert {"results", "confusion_matrix"} <= {e.key for e in trained.events(ImageLogged)}
    tables = trained.events(TableLogged)
    assert [] == tables if task == "classify" else names[:3] == [r[0] for r in tables[0].rows]
    assert 1 == len(trained.events(ModelDescribed))
    assert "finished" == trained.events(RunEnded)[0].status


@pytest.mark.parametrize("version", ["8.3.0", "8.3.200"])
def test_older_versions_train(tmp_path: Path, data: Path, version: str) -> None:
    """Older versions give the same: epochs, true class names, plots, checkpoints and the end."""
    trained = train_once(tmp_path / "run", data, version=version, epochs=8)
    assert [] == check_grammar(trained.records)
    (started,) = trained.events(RunStarted)
    assert version == started.framework_version
    assert list(range(8)) == [e.epoch for e in trained.events(EpochEnded)]
    train_epochs = [e.epoch for e in trained.events(MetricsLogged) if e.phase == "train"]
    assert list(range(8)) == train_epochs
    assert 1 == sum(e.final for e in trained.events(MetricsLogged))
    curves = trained.events(CurveLogged)
    assert 4 == len(curves)
    assert all({"red", "blue"} >= set(c.classes) for c in curves)
    assert {"last", "best"} == {e.kind for e in trained.events(CheckpointSaved) if e.final}
    run = trained.wandb_run
    assert list(range(1, 9)) == [row["epoch"] for row in run.history if "epoch" in row]
    assert any("results" in row for row in run.history)
    assert 0 == run.exit_code


# Evaluation ---------------------------------------------------------------------------------------


def test_the_confusion_matrix_has_true_classes_in_rows(ours: Trained) -> None:
    """Row sums are the instances of each class, which the data set says."""
    (matrix,) = ours.events(ConfusionMatrixLogged)
    (table,) = ours.events(TableLogged)
    instances = {row[0]: row[table.columns.index("instances")] for row in table.rows}
    sums = dict(zip(matrix.classes, matrix.matrix.sum(axis=1).tolist(), strict=True))
    assert {"red", "blue"} == instances.keys()
    assert instances == {name: sums[name] for name in instances}
    assert 0 == sums["green"]


def test_results_by_class_average_to_the_final_metrics(ours: Trained) -> None:
    """The mean over the rows of the table is what the final evaluation says of all classes."""
    (table,) = ours.events(TableLogged)
    (final,) = [e for e in ours.events(MetricsLogged) if e.final]
    for name in ("precision(B)", "recall(B)", "mAP50(B)", "mAP50-95(B)"):
        values = [row[table.columns.index(name)] for row in table.rows]
        expected = final.values[f"metrics/{name}"]
        assert expected == pytest.approx(sum(values) / len(values), abs=1e-9)


def test_the_best_epoch_is_the_one_that_was_saved(ours: Trained) -> None:
    """`best` in the end names the epoch whose checkpoint was last saved as best."""
    saved = [e.epoch for e in ours.events(CheckpointSaved) if e.kind == "best" and not e.final]
    best = ours.events(RunEnded)[0].best
    assert ("fitness", saved[-1]) == (best.metric, best.epoch)


# Traps --------------------------------------------------------------------------------------------


def train_local(tmp_path: Path, data: Path, **options: Any) -> Trained:
    """Train with a local sink alone, and no plots unless they are asked for."""
    arguments = UNDRAWN | options.pop("arguments", {})
    return train_once(tmp_path / "run", data, arguments=arguments, **{"config": LOCAL, **options})


def outcomes(trained: Trained) -> list[tuple[int, str]]:
    """Return epoch and outcome of each end of an epoch."""
    return [(e.epoch, e.outcome) for e in trained.events(EpochEnded)]


def test_an_out_of_memory_retry_is_an_outcome(tmp_path: Path, data: Path) -> None:
    """The epoch that ran out of memory ends as retried, and its smaller batch is recorded."""
    before = """
from ultralytics.models.yolo.detect import DetectionTrainer
real, failed = DetectionTrainer.preprocess_batch, []
def preprocess(self, batch):
    if not failed:
        failed.append(1)
        raise RuntimeError("CUDA out of memory")
    return real(self, batch)
DetectionTrainer.preprocess_batch = preprocess
"""
    trained = train_local(tmp_path, data, before=before)
    assert [(0, "retried"), (0, "completed"), (1, "completed")] == outcomes(trained)
    assert [0, 0, 1] == [e.epoch for e in trained.events(EpochStarted)]
    assert [{"batch": 4}] == [e.params for e in trained.events(ParamsUpdated)]
    assert [] == check_grammar(trained.records)


def test_a_nan_recovery_is_an_outcome(tmp_path: Path, data: Path) -> None:
    """The epoch that went NaN ends as recovered, and the one that is redone counts."""
    before = """
import torch
failed = []
def poison(trainer):
    if trainer.epoch == 1 and not failed:
        failed.append(1)
        trainer.loss = torch.tensor(float("nan"))
model.add_callback("on_train_epoch_end", poison)
"""
    trained = train_local(tmp_path, data, before=before, config=CONFIG)
    assert [(0, "completed"), (1, "recovered"), (1, "completed")] == outcomes(trained)
    assert [] == check_grammar(trained.records)
    rows = [row["epoch"] for row in trained.wandb_run.history if "epoch" in row]
    assert [1, 2] == rows, "W&B has one row for the epoch that was redone"


def test_an_early_stop_is_the_reason(tmp_path: Path, data: Path, ours: Trained) -> None:
    """A training that patience ends is finished, and says why."""
    trained = train_local(
        tmp_path,
        data,
        model=str(ours.save_dir / "weights" / "best.pt"),
        epochs=10,
        arguments={"lr0": 1e-9, "patience": 2},
    )
    (end,) = trained.events(RunEnded)
    assert "finished" == end.status
    assert "early stop: no better fitness in 2 epochs" == end.reason
    assert len(trained.events(EpochEnded)) < 10


def test_a_time_limit_is_the_reason(tmp_path: Path, data: Path) -> None:
    """A time limit changes the number of epochs, and is why the training ends."""
    trained = train_local(tmp_path, data, epochs=100, arguments={"time": 0.004})
    (end,) = trained.events(RunEnded)
    assert ("finished", "time limit of 0.004 h") == (end.status, end.reason)
    assert any("epochs" in e.params for e in trained.events(ParamsUpdated))
    assert [] == check_grammar(trained.records)


def test_a_stop_by_a_callback_is_the_reason(tmp_path: Path, data: Path) -> None:
    """`trainer.stop = True` in a callback of the user's ends the run as finished, with a reason."""
    before = "model.add_callback('on_fit_epoch_end', lambda t: setattr(t, 'stop', True))"
    trained = train_local(tmp_path, data, epochs=5, before=before)
    assert "stopped by a callback" == trained.events(RunEnded)[0].reason
    assert [(0, "completed")] == outcomes(trained)


def test_stale_metrics_are_not_logged(tmp_path: Path, data: Path) -> None:
    """With `val=False` only the last epoch is validated; the others have no validation metrics."""
    trained = train_local(tmp_path, data, epochs=3, arguments={"val": False})
    validated = [e for e in trained.events(MetricsLogged) if e.phase == "validation"]
    assert [(2, False), (None, True)] == [(e.epoch, e.final) for e in validated]


def test_a_failure_while_setting_up_is_a_failed_run(tmp_path: Path) -> None:
    """A data set that isn't there gives a run that failed, with the reason."""
    trained = train_local(tmp_path, tmp_path / "none.yaml", catch=True)
    assert [RunStarted, RunEnded] == [type(r.event) for r in trained.records]
    end = trained.events(RunEnded)[0]
    assert ("failed", "RuntimeError") == (end.status, end.error.type)
    assert "none.yaml" in end.error.message


def test_a_trainer_can_be_attached(tmp_path: Path, data: Path) -> None:
    """`bus.attach(trainer)` reports the same as `bus.attach(model)`."""
    before = f"""
import trainbus
from ultralytics.models.yolo.detect import DetectionTrainer
bus = trainbus.load({str(tmp_path / "bus.yaml")!r})
def train(**arguments):
    trainer = DetectionTrainer(overrides={{"model": "{MODEL}", **arguments}})
    bus.attach(trainer)
    trainer.train()
    model.trainer = trainer
model.train = train
"""
    (tmp_path / "bus.yaml").write_text(LOCAL.format(root=tmp_path / "run"))
    trained = train_local(tmp_path, data, config=None, before=before)
    assert [] == check_grammar(trained.records)
    assert [(0, "completed"), (1, "completed")] == outcomes(trained)
    assert "finished" == trained.events(RunEnded)[0].status


BATCHES = """
sinks:
  tracking: {{type: wandb, mode: offline, every: {{train: 3}}}}
  local: {{type: jsonl, path: '{root}/records/{{run}}.jsonl'}}
"""


def test_batch_losses_come_when_they_are_asked_for(tmp_path: Path, data: Path) -> None:
    """`every: {train: 3}` gives that sink, and no other, the losses of every third update."""
    trained = train_local(tmp_path, data, config=BATCHES, epochs=2)
    assert [] == [e for e in trained.events(MetricsLogged) if e.step is not None]
    run = trained.wandb_run
    rows = [row for row in run.history if "batch/box_loss" in row]
    assert [3, 6, 9, 12, 15] == [row["trainer/step"] for row in rows]
    assert "trainer/step" == run.metrics["batch/box_loss"]["step_metric"]
    epochs = [row["epoch"] for row in run.history if "train/box_loss" in row]
    assert [1, 2] == epochs
    steps = [row["_step"] for row in run.history]
    assert sorted(set(steps)) == steps


BROKEN_PARTS = """
from ultralytics.utils import torch_utils
def fail(trainer):
    raise RuntimeError("no info")
torch_utils.model_info_for_loggers = fail

class NoMetrics:
    def __getattr__(self, name):
        raise RuntimeError("no metrics")
def blind(trainer):
    trainer.validator.metrics = NoMetrics()
model.callbacks["on_train_end"].insert(0, blind)
"""


def test_what_fails_in_a_hook_costs_only_its_events(tmp_path: Path, data: Path) -> None:
    """What can't be read from a trainer is logged once; everything else is recorded."""
    trained = train_local(tmp_path, data, before=BROKEN_PARTS, arguments={"plots": True})
    assert [] == trained.events(ModelDescribed) == trained.events(CurveLogged)
    assert [(0, "completed"), (1, "completed")] == outcomes(trained)
    validated = [e.epoch for e in trained.events(MetricsLogged) if e.phase == "validation"]
    assert [0, 1, None] == validated
    assert "finished" == trained.events(RunEnded)[0].status
    assert 2 == sum(e.final for e in trained.events(CheckpointSaved))
    said = trained.process.stderr
    assert 2 == said.count("its events were not recorded")
    assert "hook describe in trainbus.adapters.ultralytics" in said
    assert "RuntimeError: no info" in said


def test_what_fails_after_training_does_not_reach_the_user(tmp_path: Path, data: Path) -> None:
    """A trainer that is left in a state that can't be read has trained all the same."""
    before = "model.add_callback('on_train_end', lambda t: setattr(t, 'world_size', 'two'))"
    trained = train_local(tmp_path, data, before=before, epochs=1)
    assert "finished" == trained.events(RunEnded)[0].status
    assert "hook conclude in trainbus.adapters.ultralytics raised" in trained.process.stderr


def test_the_users_error_is_not_hidden_by_one_of_ours(tmp_path: Path) -> None:
    """A failed training whose start can't be recorded either raises its own error."""
    before = "model.add_callback('on_pretrain_routine_start', lambda t: delattr(t, 'epochs'))"
    trained = train_local(tmp_path, tmp_path / "none.yaml", before=before, catch=True)
    assert trained.result["error"].startswith("RuntimeError(")
    assert "hook record_failure in trainbus.adapters.ultralytics raised" in trained.process.stderr


def test_each_checkpoint_has_its_own_metrics(ours: Trained) -> None:
    """The final `last` has the metrics of the last epoch, the final `best` those of its own."""
    logged = {e.epoch: e.values for e in ours.events(MetricsLogged) if e.phase == "validation"}
    for event in ours.events(CheckpointSaved):
        assert event.metrics == {k: logged[event.epoch][k] for k in event.metrics}
        assert "metrics/mAP50(B)" in event.metrics


def test_a_moved_training_finds_its_run(tmp_path: Path, data: Path) -> None:
    """Resumed from a folder that was moved, a training continues its run."""
    after = """
import shutil
from ultralytics import YOLO
shutil.move(root / "runs" / "train", root / "moved")
model = YOLO(root / "moved" / "weights" / "last.pt")
bus.attach(model)
model.train(resume=True)
"""
    before = """
def interrupt(trainer):
    if trainer.epoch == 1:
        raise KeyboardInterrupt
model.add_callback("on_train_epoch_start", interrupt)
"""
    trained = train_local(tmp_path, data, before=before, after=after, catch=True, epochs=3)
    assert 1 == len({record.run for record in trained.records})
    assert {1, 2} == {record.attempt for record in trained.records}


REQUIRED = """
sinks:
  tracking: {{type: wandb, mode: offline}}
  required: {{type: jsonl, path: /dev/null/no, on_error: raise}}
"""


def test_a_required_sink_stops_the_training_once(tmp_path: Path, data: Path) -> None:
    """`on_error: raise` ends the training at its start, and leaves one W&B run behind."""
    trained = train_local(tmp_path, data, config=REQUIRED, check=False)
    assert 0 != trained.process.returncode
    assert "SinkError: sink 'required' (jsonl) can't be opened" in trained.process.stderr
    assert "During handling" not in trained.process.stderr
    assert 1 == len(trained.wandb_runs)


def test_an_ultralytics_whose_children_have_no_callbacks_is_reported(tmp_path: Path) -> None:
    """After a multi-GPU training in older versions a line says that nothing was logged."""
    script = tmp_path / "deaf.py"
    script.write_text(
        "from types import SimpleNamespace as Trainer\n"
        "from trainbus.adapters.ultralytics.trainer import warn_if_children_have_no_callbacks\n"
        "for size in (1, 2):\n    warn_if_children_have_no_callbacks(Trainer(world_size=size))\n"
    )
    said = {}
    for version in (None, "8.4.90"):
        process = subprocess.run(
            [sys.executable, str(HERE / "torchvision_cpu.py"), str(script)],
            env=hermetic(tmp_path, version=version),
            check=True,
            capture_output=True,
            text=True,
        )
        said[version] = process.stderr.count("gives its multi-GPU processes no callbacks")
    assert {None: 0, "8.4.90": 1} == said


def yolo() -> Any:
    """Return a YOLO that is not trained."""
    from support import torchvision_cpu

    torchvision_cpu.install()
    from ultralytics import YOLO

    return YOLO(MODEL)


def test_detaching_one_bus_leaves_the_other() -> None:
    """Two buses on one model come off in any order, and a `train` of the user's comes back."""
    model, buses = yolo(), [trainbus.Bus(), trainbus.Bus()]

    def mine(**arguments: Any) -> None:
        """Stand for a training of the user's own."""

    model.train = mine
    first, second = (bus.attach(model) for bus in buses)
    watched = vars(model)["train"]
    first.detach()
    assert watched is vars(model)["train"]
    second.detach()
    assert mine is vars(model)["train"]


def test_what_is_no_model_is_left_as_it_was() -> None:
    """An object with callbacks and no `train` is rejected before it is changed."""
    from support import torchvision_cpu

    torchvision_cpu.install()
    from ultralytics.models.yolo.detect import DetectionPredictor

    predictor = DetectionPredictor()
    before = {name: list(hooks) for name, hooks in predictor.callbacks.items()}
    with pytest.raises(trainbus.AttachError, match="found DetectionPredictor"):
        trainbus.Bus().attach(predictor)
    assert before == {name: list(hooks) for name, hooks in predictor.callbacks.items()}


def test_a_copied_model_is_detached_with_the_original() -> None:
    """After `detach`, the hooks in a deep copy of the model say nothing either."""
    model = yolo()
    detach = trainbus.Bus().attach(model).detach
    copied = copy.deepcopy(model)
    detach()
    hooks = [c.__self__ for c in copied.callbacks["on_train_end"] if hasattr(c, "__self__")]
    assert [False] == [each.report.active for each in hooks]


def test_models_of_folds_are_freed(tmp_path: Path) -> None:
    """A bus that was attached to one model after another holds none of them, nor their trainers."""
    bus = trainbus.Bus(on_receipt=lambda receipt: None)
    data = shapes.make_dataset(tmp_path / "data", images=8, val_images=8, size=32)
    alive: list[weakref.ref[Any]] = []
    for fold in range(3):
        arguments = {"data": str(data), "epochs": 1, "plots": False, "imgsz": 32}
        training = set_up(MODEL, tmp_path / str(fold), arguments)
        bus.attach(training.target)
        if fold == 0:  # the rest need no training to be held
            training.run()
            alive.append(weakref.ref(training.target.trainer))
        alive.append(weakref.ref(training.target))
        del training
        gc.collect()
    assert [None] * 4 == [each() for each in alive]
    bus.close()
