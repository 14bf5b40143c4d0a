"""`trainbus run`: a command that trains is logged without a word in it, all others are let be."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import pytest

from support import ddp, wandb_file
from support import train as training
from support.trained import CONFIG, Trained
from support.wandb_content import numbers, pictures, tables
from trainbus.events import EpochEnded, MetricsLogged, Record, RunEnded, RunStarted, decode
from trainbus.testing import check_grammar

LOCAL = "sinks: {file: {type: jsonl, path: 'records/{run}.jsonl'}}"
TORCHVISION = "from support import torchvision_cpu\ntorchvision_cpu.install()\n"


def run(
    folder: Path,
    *command: str,
    config: str = LOCAL,
    env: dict[str, str] | None = None,
    options: Sequence[str] = (),
) -> subprocess.CompletedProcess[str]:
    """Run a command under `trainbus run`, in a folder and environment of its own."""
    (folder / "trainbus.yaml").write_text(config)
    ours = [sys.executable, "-m", "trainbus", "run", "-c", "trainbus.yaml", *options, "--"]
    return subprocess.run(
        [*ours, *command],
        cwd=folder,
        env=training.hermetic(folder) | (env or {}),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def python(folder: Path, code: str, **options: object) -> subprocess.CompletedProcess[str]:
    """Run a script of the given code under `trainbus run`."""
    (folder / "script.py").write_text(textwrap.dedent(code))
    return run(folder, sys.executable, "script.py", **options)  # type: ignore[arg-type]


def records_of(folder: Path) -> list[list[Record]]:
    """Return the records of each run that a command left in the file sink, oldest first."""
    files = sorted((folder / "records").glob("*.jsonl"), key=lambda path: path.stat().st_mtime_ns)
    return [[decode(line) for line in path.read_bytes().splitlines()] for path in files]


# Commands that train nothing ----------------------------------------------------------------------

NOTHING = (
    "trainbus: nothing was recorded: found no training of accelerate, ignite, keras, lightgbm, "
    "lightning, pytorch_lightning, skorch, stable_baselines3, transformers, ultralytics, xgboost; "
    "log a loop of your own with `bus.run()` (README, 'A loop of your own'); `trainbus plugins` "
    "lists the supported frameworks\n"
)


def test_output_and_exit_code_are_the_commands(tmp_path: Path) -> None:
    """What the command prints and returns comes through unchanged; one line says what was not."""
    code = "import sys; print('out'); print('err', file=sys.stderr); sys.exit(7)"
    done = python(tmp_path, code, env={"TMPDIR": str(tmp_path)})
    assert (7, "out\n", "err\n" + NOTHING) == (done.returncode, done.stdout, done.stderr)
    assert {"script.py", "trainbus.yaml"} == set(os.listdir(tmp_path))


UNKNOWN = """
    import subprocess, sys
    import wandb
    from support import torchvision_cpu
    torchvision_cpu.install()
    from torch.utils.tensorboard import SummaryWriter

    with wandb.init(mode="offline", dir="own"), SummaryWriter("own") as writer:
        for step in range(3):
            writer.add_scalar("loss", 0.5, step)
            wandb.log({"loss": 0.5})
    subprocess.run([sys.executable, "-c", "print('child')"], check=True)
"""


@pytest.mark.needs("torch", "tensorboard")
def test_what_is_recorded_by_others_alone_is_told_once(tmp_path: Path) -> None:
    """A script with W&B and TensorBoard of its own, and a child, gets one line, at its end."""
    done = python(tmp_path, UNKNOWN)
    assert 0 == done.returncode, done.stderr
    assert (1, True) == (done.stderr.count("nothing was recorded"), done.stderr.endswith(NOTHING))
    assert "child\n" == done.stdout
    assert [] == records_of(tmp_path)


OWN = """
    import trainbus
    with trainbus.load("trainbus.yaml") as bus, bus.run() as run:
        run.log({"loss": 0.5})
"""
BY_A_CHILD = """
    import subprocess, sys
    subprocess.run([sys.executable, "own.py"], check=True)
"""


@pytest.mark.parametrize("code", [OWN, BY_A_CHILD], ids=["itself", "a child"])
def test_a_command_that_records_gets_no_line(code: str, tmp_path: Path) -> None:
    """Neither a bus of the script's own nor one in a child leaves anything to complain of."""
    (tmp_path / "own.py").write_text(textwrap.dedent(OWN))
    (tmp_path / "empty").mkdir()
    done = python(tmp_path, code, env={"TMPDIR": str(tmp_path / "empty")})
    assert 0 == done.returncode, done.stderr
    assert (1, False) == (len(records_of(tmp_path)), "nothing was recorded" in done.stderr)
    assert [] == [path.name for path in (tmp_path / "empty").glob("trainbus-*")]


LOGS_ITS_OWN = """
    import numpy as np
    import trainbus
    import xgboost

    class Own(xgboost.callback.TrainingCallback):
        def after_iteration(self, model, epoch, evals_log):
            trainbus.current_run().log({"own": epoch})
            return False

    x = np.arange(16.0).reshape(-1, 1)
    data = xgboost.DMatrix(x, x > 7)
    trainbus.current_run().log({"before": 1.0})
    xgboost.train({}, data, 2, evals=[(data, "train")], callbacks=[Own()])
"""


@pytest.mark.needs("xgboost")
def test_a_script_logs_its_own_into_the_run(tmp_path: Path) -> None:
    """`current_run` finds the run that the command records, which has the name and tags given."""
    options = ["--name", "n", "--tag", "a", "--tag", "b"]
    done = python(tmp_path, LOGS_ITS_OWN, options=options)
    assert 0 == done.returncode, done.stderr
    (records,) = records_of(tmp_path)
    assert [] == check_grammar(records)
    started = records[0].event
    assert isinstance(started, RunStarted)
    assert ("n", ["a", "b"]) == (started.name, started.tags)
    logged = [record.event for record in records if isinstance(record.event, MetricsLogged)]
    own = [
        (event.values["train/own"], event.epoch) for event in logged if "train/own" in event.values
    ]
    assert [(0.0, 0), (1.0, 1)] == own
    assert 1 == done.stderr.count("was used while no run was open")


def test_a_command_within_a_command_is_told_once(tmp_path: Path) -> None:
    """`trainbus run` in a program that `trainbus run` runs leaves the line to the outer one."""
    code = """
        import subprocess, sys
        command = [sys.executable, "-m", "trainbus", "run", "-c", "trainbus.yaml", "--"]
        subprocess.run([*command, sys.executable, "own.py"], check=True)
    """
    (tmp_path / "own.py").write_text("")
    done = python(tmp_path, code)
    assert (0, NOTHING) == (done.returncode, done.stderr)


def test_a_signal_reaches_the_command(tmp_path: Path) -> None:
    """The command is the process itself: who signals it signals the command."""
    done = python(tmp_path, "import os, signal; os.kill(os.getpid(), signal.SIGTERM)")
    assert -signal.SIGTERM == done.returncode


def test_a_program_that_trains_nothing_imports_next_to_nothing(tmp_path: Path) -> None:
    """Neither a sink nor a framework nor the bus is imported before something trains."""
    code = "import sys; print(*sorted(m for m in sys.modules if m.split('.')[0] in {0!r}))"
    names = ("trainbus", "numpy", "yaml", "wandb", "torch", "msgspec", "blinker", "rich")
    done = python(tmp_path, code.format(names))
    assert [] == done.stdout.split()


def test_a_hidden_sitecustomize_is_run(tmp_path: Path) -> None:
    """A `sitecustomize` of the user's own is run as it is without trainbus."""
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "sitecustomize.py").write_text("import builtins; builtins.mine = 5\n")
    done = python(tmp_path, "print(mine)", env={"PYTHONPATH": str(tmp_path / "own")})
    assert "5\n" == done.stdout, done.stderr


def test_a_python_without_trainbus_says_so(tmp_path: Path) -> None:
    """A Python of another environment runs as it would, and a line says that it logs nothing."""
    other = str(getattr(sys, "_base_executable", sys.executable))
    env = {"PYTHONPATH": ""}
    if (
        "trainbus"
        in subprocess.run(
            [other, "-m", "pip", "list"], capture_output=True, text=True, check=False, env=env
        ).stdout
    ):
        pytest.skip("trainbus is installed in the base interpreter")
    done = run(tmp_path, other, "-c", "print(1)", env=env)
    assert (0, "1\n") == (done.returncode, done.stdout)
    assert "trainbus: not installed for " in done.stderr
    assert "; its trainings are not recorded" in done.stderr


def test_a_bad_configuration_starts_nothing(tmp_path: Path) -> None:
    """The command is not begun with sinks that can't be: one line for each fault, exit code 2."""
    config = "sinks: {a: {type: jsonl, path: 5}}"
    done = python(tmp_path, "open('started', 'w')", config=config)
    assert 2 == done.returncode
    assert "trainbus.yaml:1: sinks.a.path: found the number 5, expected a string" in done.stderr
    assert not (tmp_path / "started").exists()


@pytest.mark.parametrize(("name", "code"), [("no-such-command", 127), ("./trainbus.yaml", 126)])
def test_a_command_that_can_not_be_run_is_one_line(tmp_path: Path, name: str, code: int) -> None:
    """The exit codes are those that shells have for it."""
    done = run(tmp_path, name)
    assert code == done.returncode
    assert [f"{name}: "] == [line[: len(name) + 2] for line in done.stderr.splitlines()]


# Ultralytics --------------------------------------------------------------------------------------


def arguments(data: Path, root: Path, epochs: int) -> dict[str, object]:
    """Return what a YOLO is trained with."""
    place = {"data": str(data), "project": str(root / "runs"), "name": "train", "epochs": epochs}
    return {**training.FAST, **place}


def yolo(root: Path, data: Path, *, version: str | None = None) -> Sequence[str]:
    """Train with the `yolo` command line, under `trainbus run`; return its faults."""
    root.mkdir()
    training.save_below(root)
    (root / "site").mkdir()
    (root / "site" / "sitecustomize.py").write_text(TORCHVISION)
    given = [f"{key}={value}" for key, value in arguments(data, root, 2).items()]
    path = [str(root / "site"), training.hermetic(root, version=version)["PYTHONPATH"]]
    entry = "from ultralytics.cfg import entrypoint; entrypoint()"
    command = [
        sys.executable,
        "-c",
        entry,
        "detect",
        "train",
        f"model={training.MODELS / 'detect.yaml'}",
        *given,
    ]
    config = CONFIG.format(root=root)
    done = run(root, *command, config=config, env={"PYTHONPATH": os.pathsep.join(path)})
    assert 0 == done.returncode, done.stdout[-2000:] + done.stderr[-3000:]
    assert "trainbus: run train_" in done.stderr
    return [line for line in done.stderr.splitlines() if "not logged" in line]


@pytest.mark.needs("ultralytics")
def test_the_yolo_command_gives_what_attach_gives(
    tmp_path: Path, data: Path, train: object
) -> None:
    """The command line, where no callback can be passed, fills W&B as two lines of code do."""
    attached: Trained = train("attached", epochs=2)  # type: ignore[operator]
    root = tmp_path / "auto"
    assert [] == yolo(root, data)
    (path,) = wandb_file.find_runs(root)
    found, expected = wandb_file.read_finished(path), attached.wandb_run
    assert numbers(expected) == numbers(found)
    assert [1, 2] == sorted(numbers(found))
    assert pictures(expected) == pictures(found)
    assert tables(expected) == tables(found)
    assert expected.charts == found.charts
    assert [a.type for a in expected.artifacts] == [a.type for a in found.artifacts]
    places = {"project", "save_dir"}
    assert {k: v for k, v in expected.config.items() if k not in places} == {
        k: v for k, v in found.config.items() if k not in places
    }
    (records,) = records_of(root)
    assert [] == check_grammar(records)


@pytest.mark.needs("ultralytics")
def test_a_model_that_is_attached_already_is_logged_once(tmp_path: Path, data: Path) -> None:
    """A script that has its own bus keeps it: `trainbus run` adds no second run."""
    config = tmp_path / "own.yaml"
    config.write_text(LOCAL)
    scenario = training.Scenario(
        root=str(tmp_path), data=str(data), config=str(config), train={"epochs": 1}
    )
    done = run(tmp_path, *trained_by(scenario), config=LOCAL.replace("records", "again"))
    assert 0 == done.returncode, done.stderr[-3000:]
    assert 1 == len(records_of(tmp_path))
    assert not (tmp_path / "again").exists()


def trained_by(scenario: training.Scenario) -> list[str]:
    """Return the command that trains a scenario."""
    here = training.HERE
    scripts = [str(here / "torchvision_cpu.py"), str(here / "train.py")]
    return [sys.executable, *scripts, json.dumps(asdict(scenario))]


GENERATE = """
from ultralytics.utils.dist import generate_ddp_file
from ultralytics.engine.trainer import BaseTrainer
def stop(trainer):
    found["script"] = generate_ddp_file(trainer)
BaseTrainer.train = stop
"""


@pytest.mark.parametrize("version", [None, "8.4.90"])
@pytest.mark.needs("ultralytics")
def test_multi_gpu_children_are_one_run(tmp_path: Path, data: Path, version: str | None) -> None:
    """Ultralytics' own child script, in two processes: one run, with rank 0's metrics once.

    The newest version pickles callbacks for its children and 8.4.90 drops them; both are logged.
    """
    scenario = training.Scenario(
        root=str(tmp_path), data=str(data), before=GENERATE, catch=True, train={"epochs": 2}
    )
    env = {"PYTHONPATH": training.hermetic(tmp_path, version=version)["PYTHONPATH"]}
    done = run(tmp_path, *trained_by(scenario), env=env)
    assert 0 == done.returncode, done.stderr[-3000:]
    assert [] == records_of(tmp_path), "the parent trains nothing itself"
    startup = Path(trainbus_folder()) / "startup"
    environment = training.hermetic(tmp_path, version=version)
    environment["TRAINBUS_CONFIG"] = str(tmp_path / "trainbus.yaml")
    script = Path(training.result(scenario)["script"])
    process = ddp.launch(script, tmp_path, environment, startup)
    assert 0 == process.returncode, process.stderr[-3000:]
    (records,) = records_of(tmp_path)
    assert [] == check_grammar(records)
    kinds = [type(record.event) for record in records]
    assert (1, 2, 1) == tuple(kinds.count(k) for k in (RunStarted, EpochEnded, RunEnded))


def trainbus_folder() -> str:
    """Return where the package lies."""
    import trainbus

    return str(Path(trainbus.__file__).parent)


# Other trainers -----------------------------------------------------------------------------------

LIGHTNING = """
import os, sys
from support import torchvision_cpu
torchvision_cpu.install()
import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

class Line(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.line = torch.nn.Linear(1, 1)

    def training_step(self, batch):
        loss = torch.nn.functional.mse_loss(self.line(batch[0]), batch[1])
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

if __name__ == "__main__":
    pl.seed_everything(0)
    x = torch.linspace(0, 1, 64)[:, None]
    data = DataLoader(TensorDataset(x, 3 * x + 1), batch_size=16)
    options = {"devices": int(os.environ.get("WORLD_SIZE", 1)), "strategy": "auto"}
    trainer = pl.Trainer(
        max_epochs=3, log_every_n_steps=2, accelerator="cpu", logger=False,
        callbacks=[pl.callbacks.ModelCheckpoint("saved", monitor="train_loss_epoch")], **options,
    )
    ATTACH
    trainer.fit(Line(), data)
"""
WANDB = """
sinks:
  tracking: {type: wandb, mode: offline, dir: tracked}
  file: {type: jsonl, path: 'records/{run}.jsonl'}
"""


def rows(folder: Path) -> list[dict[str, float]]:
    """Return the numbers of the rows of the one W&B run in a folder, without times."""
    (path,) = wandb_file.find_runs(folder)
    return [
        {k: v for k, v in row.items() if isinstance(v, int | float) and k[0] != "_"}
        for row in wandb_file.read_finished(path).history
    ]


@pytest.mark.needs("lightning")
def test_a_lightning_script_gives_what_attach_gives(tmp_path: Path) -> None:
    """A script that knows nothing of trainbus fills W&B as one with two lines of it does."""
    by = {name: tmp_path / name for name in ("attach", "auto")}
    for folder in by.values():
        folder.mkdir()
    attach = "import trainbus; bus = trainbus.load('trainbus.yaml'); bus.attach(trainer)"
    (by["attach"] / "trainbus.yaml").write_text(WANDB)
    (by["attach"] / "script.py").write_text(LIGHTNING.replace("ATTACH", attach))
    done = subprocess.run(
        [sys.executable, "script.py"],
        cwd=by["attach"],
        env=training.hermetic(by["attach"]),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert 0 == done.returncode, done.stderr[-3000:]
    done = python(by["auto"], LIGHTNING.replace("ATTACH", ""), config=WANDB)
    assert 0 == done.returncode, done.stderr[-3000:]
    (records,) = records_of(by["auto"])
    assert [] == check_grammar(records)
    assert rows(by["attach"]) == rows(by["auto"])
    assert len(rows(by["auto"])) >= 3


@pytest.mark.needs("torch")
def test_torchrun_gives_one_run(tmp_path: Path) -> None:
    """Two processes of `torchrun` are one run, with rank 0's metrics once."""
    (tmp_path / "script.py").write_text(LIGHTNING.replace("ATTACH", ""))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    port = str(ddp.free_port())
    done = run(
        tmp_path,
        *[*launcher, "--master_port", port, "script.py"],
        config=WANDB,
        env={"OMP_NUM_THREADS": "1"},
    )
    assert 0 == done.returncode, done.stderr[-3000:]
    (records,) = records_of(tmp_path)
    assert [] == check_grammar(records)
    ended = [record.event.epoch for record in records if isinstance(record.event, EpochEnded)]
    assert [0, 1, 2] == ended
    (started,) = (r.event for r in records if isinstance(r.event, RunStarted))
    assert 2 == started.world_size
    losses = [row["train_loss_epoch"] for row in rows(tmp_path) if "train_loss_epoch" in row]
    assert 3 == len(losses)
