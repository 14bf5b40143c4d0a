"""The Stop button of W&B, which W&B's own core presses; only the server's answers are made up."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from support import wandb_server
from support.wandb_file import find_runs, read_finished

TRAINING = """
import time
import trainbus

with trainbus.load("bus.yaml") as bus, bus.run() as run:
    try:
        for epoch in run.epochs(4_500):
            run.log({"loss": 1.0})
            time.sleep(0.01)
            if epoch == 100:
                print("trains", flush=True)
    except KeyboardInterrupt:
        print("interrupted")
        raise
"""


def test_the_stop_button_stops_the_training(tmp_path: Path) -> None:
    """A training whose W&B run is in another process gets the Ctrl-C that W&B sends natively."""
    (tmp_path / "bus.yaml").write_text("sinks: {w: {type: wandb, project: p, entity: me}}\n")
    with (
        wandb_server.running() as server,
        subprocess.Popen(
            [sys.executable, "-c", TRAINING],
            cwd=tmp_path,
            env={**os.environ, **server.env},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process,
    ):
        assert process.stdout is not None
        assert "trains\n" == process.stdout.readline()
        server.stop()
        output, errors = process.communicate(timeout=400)
    assert "interrupted\n" == output
    assert "the run was stopped in W&B" in errors
    assert errors.endswith("KeyboardInterrupt\n")
    (folder,) = (tmp_path / "trainbus-runs").iterdir()
    assert "stopped" == json.loads((folder / "receipt.json").read_text())["status"]
    (path,) = find_runs(tmp_path)
    run = read_finished(path)
    assert (255, "stopped from W&B") == (run.exit_code, run.summary["ended"])
