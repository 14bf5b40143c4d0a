"""F1–F14: what goes wrong in the built-in W&B integration, and must not here.

Each check is a plain function over what W&B was sent. It passes on trainbus and fails on the
behaviour that it was written against: Ultralytics' own callbacks, trained for real beside it.
"""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import trainbus
from support import ddp, wandb_file
from support import train as training
from support.trained import UNDRAWN, Trained, train_once
from support.wandb_file import WandbRun
from trainbus.events import EpochEnded, MetricsLogged, RunEnded, RunStarted
from trainbus.testing import MemorySink

REFERENCE = "8.4.90"
"""An Ultralytics whose own callback has the faults that the newest has mended."""

PLOTS = {"labels", "train_batch0", "results", "confusion_matrix", "confusion_matrix_normalized"}
CURVES = {f"curves/{n}(B)" for n in ("Precision-Recall", "F1-Confidence", "Precision-Confidence")}


def image_keys(run: WandbRun) -> list[str]:
    """Return the keys of all pictures in a run's history, one for each time one was logged."""
    return [
        key
        for row in run.history
        for key, value in row.items()
        if isinstance(value, dict) and value.get("_type") == "image-file"
    ]


def curve_rows(run: WandbRun, key: str) -> list[list[Any]]:
    """Return the rows of the table behind a chart."""
    values = [row[f"{key}_table"] for row in run.history if f"{key}_table" in row]
    columns, rows = wandb_file.read_table(run, values[-1])
    assert ["class", "y", "x"] == columns
    return rows


def model_artifacts(run: WandbRun) -> list[wandb_file.WandbArtifact]:
    """Return the models among a run's artifacts."""
    return [artifact for artifact in run.artifacts if artifact.type == "model"]


# F1 -----------------------------------------------------------------------------------------------


def check_last_plots_arrive(run: WandbRun) -> None:
    """Every plot is in the history once, the ones drawn last too."""
    keys = image_keys(run)
    assert set() == PLOTS - set(keys)
    assert sorted(set(keys)) == sorted(keys)


def test_f1_last_plots_arrive(ours: Trained, older_builtin: Trained) -> None:
    """Plots drawn after the last epoch are not logged behind the run's step."""
    check_last_plots_arrive(ours.wandb_run)
    with pytest.raises(AssertionError):
        check_last_plots_arrive(older_builtin.wandb_run)


def test_f1_epoch_is_the_x_axis(ours: Trained) -> None:
    """Epochs count from 1 as W&B's x axis, at a step that never falls."""
    run = ours.wandb_run
    steps = [row["_step"] for row in run.history]
    assert sorted(steps) == steps
    assert list(range(1, 11)) == [row["epoch"] for row in run.history if "epoch" in row]
    assert "epoch" == run.metrics["metrics/mAP50(B)"]["step_metric"]


# F2 -----------------------------------------------------------------------------------------------


def check_class_names(run: WandbRun) -> None:
    """Only the classes with validation instances have curves, under their own names."""
    for key in CURVES:
        assert {"mean", "red", "blue"} == {row[0] for row in curve_rows(run, key)}


def test_f2_curves_carry_their_true_class_names(ours: Trained, builtin: Trained) -> None:
    """A class that is missing from the middle of val does not shift the names behind it."""
    check_class_names(ours.wandb_run)
    with pytest.raises(AssertionError):
        check_class_names(builtin.wandb_run)


# F3 -----------------------------------------------------------------------------------------------


def check_no_phantom_epoch(run: WandbRun) -> None:
    """The evaluation of the best weights is no epoch, and epochs never fall back."""
    epochs = [row["epoch"] for row in run.history if "epoch" in row]
    assert list(range(1, 11)) == epochs
    assert 10 == sum("metrics/mAP50(B)" in row for row in run.history)


def test_f3_final_evaluation_is_no_epoch(ours: Trained, builtin: Trained) -> None:
    """The final evaluation is marked as such, and reaches the summary, not the history."""
    check_no_phantom_epoch(ours.wandb_run)
    with pytest.raises(AssertionError):
        check_no_phantom_epoch(builtin.wandb_run)
    (final,) = [e for e in ours.events(MetricsLogged) if e.final]
    summary = ours.wandb_run.summary
    assert final.values == {k: summary[f"final/{k}"] for k in final.values}


# F4 -----------------------------------------------------------------------------------------------

LOG_CURVE = """
import sys, numpy as np, wandb
count, who = int(sys.argv[1]), sys.argv[2]
x = np.linspace(0, 1, 1000)
y = np.linspace(0, 1, count)[:, None] * (1 - x)
names = [f"class {i}" for i in range(count)]
if who == "ours":
    import trainbus
    with trainbus.load("trainbus.yaml") as bus, bus.run(name="many") as run:
        run.curve("curves/PR", x, y, classes=names)
        run.curve("curves/F1", x, y, classes=names)
else:
    from support import torchvision_cpu
    torchvision_cpu.install()
    from ultralytics.utils.callbacks import wb
    with wandb.init(project="p"):
        wb._plot_curve(x, y, names, id="curves/PR")
        wb.wb.log({})
"""


def log_curves(root: Path, count: int, who: str) -> tuple[WandbRun, str]:
    """Log curves of many classes, and return what W&B got and what was said."""
    root.mkdir()
    (root / "trainbus.yaml").write_text(
        "sinks: {tracking: {type: wandb, mode: offline, dir: .}}\n", encoding="utf-8"
    )
    (root / "log.py").write_text(LOG_CURVE)
    process = subprocess.run(
        [sys.executable, "log.py", str(count), who],
        cwd=root,
        env=training.hermetic(root),
        check=True,
        capture_output=True,
        text=True,
        timeout=400,
    )
    (path,) = wandb_file.find_runs(root)
    return wandb_file.read_run(path), process.stderr


def check_all_classes(run: WandbRun, count: int) -> None:
    """Each class and the mean have a curve in the chart, none of them cut."""
    rows = curve_rows(run, "curves/PR")
    points = {name: sum(row[0] == name for row in rows) for name in {row[0] for row in rows}}
    assert {"mean", *(f"class {i}" for i in range(count))} == points.keys()
    assert 1 == len(set(points.values()))


@pytest.mark.parametrize("count", [120, 1203])
def test_f4_many_classes_keep_their_curves(tmp_path: Path, count: int) -> None:
    """Curves of more classes than W&B shows rows for are fitted, kept whole, and spoken of once."""
    run, said = log_curves(tmp_path / "ours", count, "ours")
    check_all_classes(run, count)
    assert 1 == said.count("W&B can show")
    (artifact,) = [a for a in run.artifacts if a.type == "curves"]
    assert {"curves-PR.csv", "curves-F1.csv"} == set(artifact.files)
    theirs, _ = log_curves(tmp_path / "theirs", count, "theirs")
    with pytest.raises(AssertionError):
        check_all_classes(theirs, count)


# F5 -----------------------------------------------------------------------------------------------

RAISING_SINK = """
import trainbus
class Raising(trainbus.Sink):
    def write(self, records): raise RuntimeError("no")
    def close(self): raise RuntimeError("no again")
bus = trainbus.Bus({"raising": Raising})
bus.attach(model)
"""


def check_training_completes(trained: Trained) -> None:
    """Training ended well, and wrote its weights."""
    assert 0 == trained.process.returncode, trained.process.stderr[-500:]
    assert trained.result["weights"]


def test_f5_no_api_key_does_not_end_training(tmp_path: Path, data: Path) -> None:
    """Without credentials W&B can't start a run: training goes on, and one line says what to do."""
    config = "sinks: {{tracking: {{type: wandb, mode: online}}}}"
    options: dict[str, Any] = {"epochs": 1, "arguments": UNDRAWN, "check": False}
    options["environment"] = {"WANDB_MODE": "online"}
    trained = train_once(tmp_path / "ours", data, config=config, **options)
    check_training_completes(trained)
    assert 1 == trained.process.stderr.count("can't be opened; training continues without it")
    assert "wandb login" in trained.process.stderr
    theirs = train_once(tmp_path / "theirs", data, config=None, builtin=True, **options)
    with pytest.raises(AssertionError):
        check_training_completes(theirs)


def test_f5_an_unwritable_directory_does_not_end_training(tmp_path: Path, data: Path) -> None:
    """W&B's folder can't be made: training goes on, and one line says which."""
    (tmp_path / "file").write_text("not a folder")
    config = f"sinks: {{{{tracking: {{{{type: wandb, mode: offline, dir: {tmp_path}/file/x}}}}}}}}"
    trained = train_once(
        tmp_path / "ours", data, config=config, epochs=1, arguments=UNDRAWN, check=False
    )
    check_training_completes(trained)
    assert 1 == trained.process.stderr.count("can't be opened; training continues without it")
    assert f"{tmp_path}/file/x" in trained.process.stderr


def test_f5_a_sink_that_always_raises_does_not_end_training(tmp_path: Path, data: Path) -> None:
    """A sink that raises at every call costs its own records, and nothing else."""
    trained = train_once(
        tmp_path / "ours", data, config=None, before=RAISING_SINK, arguments=UNDRAWN, check=False
    )
    check_training_completes(trained)
    assert "rejected" in trained.process.stderr


# F6 -----------------------------------------------------------------------------------------------

ODD = {"project": "shapes#1/50%:" + "long" * 30, "name": "a b#c" + "long" * 40}


def check_odd_names(trained: Trained) -> None:
    """The run reached W&B under names that it takes."""
    check_training_completes(trained)
    assert not set(trained.wandb_run.project) & set("/\\#?%:")


def test_f6_odd_names_are_made_valid(tmp_path: Path, data: Path) -> None:
    """Projects and names that W&B refuses are changed just as far as W&B needs."""
    options: dict[str, Any] = {"epochs": 1, "check": False}
    arguments = UNDRAWN | {"project": f"{tmp_path}/ours/{ODD['project']}", "name": ODD["name"]}
    trained = train_once(tmp_path / "ours", data, arguments=arguments, **options)
    check_odd_names(trained)
    assert trained.wandb_run.project.endswith("-50--" + "long" * 30)
    assert 128 == len(trained.wandb_run.project) == len(trained.wandb_run.name)
    arguments |= {"project": f"{tmp_path}/theirs/{ODD['project']}"}
    theirs = train_once(
        tmp_path / "theirs",
        data,
        arguments=arguments,
        builtin=True,
        config=None,
        version=REFERENCE,
        **options,
    )
    with pytest.raises(AssertionError):
        check_odd_names(theirs)


# F7, F8, F9, F11 ----------------------------------------------------------------------------------

SAME_TIMES = """
from pathlib import Path
from ultralytics.engine.trainer import BaseTrainer
from ultralytics.engine.validator import BaseValidator
def on_plot(self, name, data=None):
    self.plots[Path(name)] = {"data": data, "timestamp": 1.0}
BaseTrainer.on_plot = BaseValidator.on_plot = on_plot
"""
AGAIN = "model.train(**(arguments | {'exist_ok': True}))"


def check_same_plots(trained: Trained) -> None:
    """Both trainings logged all their plots, each into its own run."""
    first, second = trained.wandb_runs
    assert set() == PLOTS - set(image_keys(first))
    assert sorted(image_keys(first)) == sorted(image_keys(second))


def test_f7_a_second_training_has_its_own_plots(tmp_path: Path, data: Path) -> None:
    """Plots of the same path and time as those of an earlier training are logged again."""
    options: dict[str, Any] = {"before": SAME_TIMES, "after": AGAIN, "epochs": 1}
    check_same_plots(train_once(tmp_path / "ours", data, **options))
    theirs = train_once(tmp_path / "theirs", data, builtin=True, config=None, **options)
    with pytest.raises(AssertionError):
        check_same_plots(theirs)


OPEN_RUN = "import wandb\nmine = wandb.init(project='mine', config={'epochs': 'kept'})"
STILL_OPEN = (
    "found['open'] = wandb.run is mine\n"
    "if wandb.run is mine: mine.log({'after': 1})\n"
    "found['batch'] = mine.config.get('batch')\n"
    "found['epochs'] = mine.config.get('epochs')"
)


def check_user_run_is_left_open(trained: Trained) -> None:
    """The user's run took the training and its config, and was left open for more."""
    found = trained.result
    assert (True, 8, "kept") == (found["open"], found["batch"], found["epochs"])
    assert "mine" == trained.wandb_run.project
    assert any("train/box_loss" in row for row in trained.wandb_run.history)
    assert 1 == trained.wandb_run.history[-1]["after"]


def test_f8_a_run_of_the_user_is_used_and_left_open(tmp_path: Path, data: Path) -> None:
    """A W&B run that was open before training is not closed by it."""
    options: dict[str, Any] = {"epochs": 1, "before": OPEN_RUN, "after": STILL_OPEN}
    options["arguments"] = UNDRAWN
    check_user_run_is_left_open(train_once(tmp_path / "ours", data, **options))
    theirs = train_once(
        tmp_path / "theirs", data, builtin=True, config=None, version=REFERENCE, **options
    )
    with pytest.raises(AssertionError):
        check_user_run_is_left_open(theirs)


FAIL = """
def fail(trainer):
    if trainer.epoch == 1:
        raise {error}
model.add_callback("on_train_epoch_start", fail)
"""
CLOSED = "import wandb\nfound['open'] = wandb.run is not None"


def check_closed_with(trained: Trained, exit_code: int) -> None:
    """The run was closed when the exception left training, with an exit code that tells of it."""
    assert not trained.result["open"]
    assert exit_code == trained.wandb_run.exit_code


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [("ValueError('no')", "failed", 1), ("KeyboardInterrupt()", "stopped", 255)],
)
def test_f9_an_exception_closes_the_run(
    tmp_path: Path, data: Path, error: str, status: str, code: int
) -> None:
    """A training that raises leaves a failed run, an interrupted one a stopped run."""
    options: dict[str, Any] = {"before": FAIL.format(error=error), "after": CLOSED, "catch": True}
    options["arguments"] = UNDRAWN
    trained = train_once(tmp_path / "ours", data, **options)
    check_closed_with(trained, code)
    (end,) = trained.events(RunEnded)
    assert (status, error[: error.index("(")]) == (end.status, end.error.type)
    assert error.replace("()", "") in trained.result["error"]
    theirs = train_once(
        tmp_path / "theirs", data, builtin=True, config=None, version=REFERENCE, **options
    )
    with pytest.raises(AssertionError):
        check_closed_with(theirs, code)


def check_one_run(trained: Trained) -> None:
    """All attempts bear one id, and together hold each epoch once."""
    assert 1 == len({run.run_id for run in trained.wandb_runs})
    epochs = [
        row["epoch"]
        for run in trained.wandb_runs
        for row in run.history
        if "epoch" in row and "metrics/mAP50(B)" in row
    ]
    assert [1, 2, 3, 4] == sorted(epochs)


INTERRUPT = """
def interrupt(trainer):
    if trainer.epoch == 2:
        raise KeyboardInterrupt
model.add_callback("on_train_epoch_start", interrupt)
"""
RESUME = """
import wandb
wandb.finish()
from ultralytics import YOLO
model = YOLO(root / "runs" / "train" / "weights" / "last.pt")
if bus is not None:
    bus.attach(model)
model.train(resume=True)
"""


def test_f10_a_resumed_training_goes_on_in_its_run(tmp_path: Path, data: Path) -> None:
    """A training that was interrupted and resumed is one run, in W&B and in the records."""
    options: dict[str, Any] = {"before": INTERRUPT, "after": RESUME, "catch": True, "epochs": 4}
    options["arguments"] = UNDRAWN
    trained = train_once(tmp_path / "ours", data, **options)
    check_one_run(trained)
    first, second = trained.events(RunStarted)
    assert (None, 2) == (first.resumed, second.resumed.epoch)
    assert 1 == len({record.run for record in trained.records})
    theirs = train_once(
        tmp_path / "theirs", data, builtin=True, config=None, version=REFERENCE, **options
    )
    with pytest.raises(AssertionError):
        check_one_run(theirs)


BUILTIN_IDS = """
import time, types
from pathlib import Path
from support import torchvision_cpu
torchvision_cpu.install()
from ultralytics.utils.callbacks import wb
class Known(Exception):
    pass
ids = []
def init(id, **rest):
    ids.append(id)
    raise Known
wb.wb = types.SimpleNamespace(run=None, init=init)
args = types.SimpleNamespace(name="train", project=None, resume=False)
trainer = types.SimpleNamespace(args=args, save_dir=Path("."), add_callback=lambda *_: None)
while time.time() % 1 > 0.5:
    pass
for _ in range(2):
    try:
        wb.on_pretrain_routine_end(trainer)
    except Known:
        pass
print(*ids)
"""


def test_f11_trainings_of_one_second_have_ids_of_their_own(tmp_path: Path) -> None:
    """Runs that start in the same second, with the same seed and name, never share an id."""
    (tmp_path / "ids.py").write_text(BUILTIN_IDS)
    process = subprocess.run(
        [sys.executable, "ids.py"],
        cwd=tmp_path,
        env=training.hermetic(tmp_path) | {"WANDB_MODE": "disabled"},
        check=True,
        capture_output=True,
        text=True,
    )
    first, second = process.stdout.split()[-2:]
    assert first == second, "the callback tells them apart"
    ids = set()
    for _ in range(50):
        random.seed(0)
        np.random.seed(0)
        sink = MemorySink()
        with trainbus.Bus({"memory": sink}) as bus, bus.run(name="train"):
            pass
        ids.add(sink.records[0].run)
    assert 50 == len(ids)


# F12 ----------------------------------------------------------------------------------------------


def check_artifact(run: WandbRun) -> None:
    """The best checkpoint is an artifact that says what it is."""
    (artifact,) = model_artifacts(run)
    assert f"run_{run.run_id}_model" == artifact.name
    assert "best" in artifact.aliases
    assert ["best.pt"] == list(artifact.files)
    assert {"epoch", "fitness", "metrics", "args"} <= artifact.metadata.keys()


def test_f12_the_artifact_carries_metadata(ours: Trained, builtin: Trained) -> None:
    """Epoch, fitness, metrics and arguments come with the model."""
    check_artifact(ours.wandb_run)
    (artifact,) = model_artifacts(ours.wandb_run)
    best = ours.events(RunEnded)[0].best
    assert (best.epoch + 1, best.value) == (
        artifact.metadata["epoch"],
        artifact.metadata["fitness"],
    )
    with pytest.raises(AssertionError):
        check_artifact(builtin.wandb_run)


def test_f12_a_training_that_dies_leaves_its_best_checkpoint(tmp_path: Path, data: Path) -> None:
    """What was best when training raised is saved all the same."""
    before = FAIL.format(error="ValueError('no')")
    trained = train_once(tmp_path / "ours", data, before=before, arguments=UNDRAWN, catch=True)
    check_artifact(trained.wandb_run)


# F13 ----------------------------------------------------------------------------------------------

GENERATE = """
from pathlib import Path
from ultralytics.utils.dist import generate_ddp_file

class Naive:
    def __call__(self, trainer):
        import os
        with open(trainer.save_dir.parent.parent / f"naive-{os.environ['RANK']}", "a") as file:
            file.write(f"{trainer.epoch}\\n")

model.add_callback("on_train_epoch_end", Naive())
from ultralytics.engine.trainer import BaseTrainer
def stop(trainer):
    found["script"] = generate_ddp_file(trainer)
    raise SystemExit
BaseTrainer.train = stop
"""


def test_f13_multi_gpu_children_log_once(tmp_path: Path, data: Path) -> None:
    """Ultralytics' own child script, in two processes: rank 0 logs one run, rank 1 nothing."""
    parent = train_once(
        tmp_path / "ours", data, before=GENERATE, arguments=UNDRAWN, catch=True, epochs=2
    )
    script = Path(parent.result["script"])
    environment = training.hermetic(parent.root)
    process = ddp.launch(script, parent.root, environment)
    assert 0 == process.returncode, process.stderr[-3000:]
    assert "0\n1\n" == (parent.root / "naive-0").read_text()
    assert "0\n1\n" == (parent.root / "naive-1").read_text(), "callbacks run on every rank"
    children = [r for r in parent.records if r.run == parent.records[-1].run]
    kinds = [type(r.event) for r in children]
    assert (1, 2, 1) == tuple(kinds.count(k) for k in (RunStarted, EpochEnded, RunEnded))
    assert ["finished"] == [e.event.status for e in children if isinstance(e.event, RunEnded)]
    run = parent.wandb_runs[-1]
    assert [1, 2] == [row["epoch"] for row in run.history if "epoch" in row]


# F14 ----------------------------------------------------------------------------------------------


def test_f14_the_builtin_callback_is_switched_off(tmp_path: Path, data: Path) -> None:
    """With a W&B sink on the bus there is one W&B run, and a line says whose."""
    trained = train_once(tmp_path / "ours", data, builtin=True, epochs=1, arguments=UNDRAWN)
    assert 1 == len(trained.wandb_runs)
    assert 1 == len(model_artifacts(trained.wandb_run))
    assert trained.wandb_run.run_id == trained.records[0].run
    assert "Ultralytics' own wandb logging is off" in trained.process.stderr
    config = "sinks: {{local: {{type: jsonl, path: '{root}/records/{{run}}.jsonl'}}}}"
    beside = train_once(
        tmp_path / "beside", data, builtin=True, epochs=1, arguments=UNDRAWN, config=config
    )
    assert beside.wandb_run.run_id != beside.records[0].run
