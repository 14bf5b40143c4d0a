"""Installs each sink's extra alone, in a fresh environment, and sends a run to the sink.

    python tests/support/extras.py [NAME...]

It downloads hundreds of megabytes, and is therefore run by `make extras` and not with the tests.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OWN = {
    "wandb": "{type: wandb, mode: offline}",
    "comet": "{type: comet, mode: offline}",
    "swanlab": "{type: swanlab, mode: offline}",
    "mlflow": "{type: mlflow, tracking_uri: 'sqlite:///mlflow.db'}",
    "notify": "{type: notify, urls: ['json://127.0.0.1:9/'], when: [alert]}",
    "prometheus": "{type: prometheus, port: 0}",
}
"""Options with which a sink works without a network, where its own defaults don't."""

SCRIPT = """
import sys, numpy as np, trainbus.config
from trainbus import JournalSpec
bus = trainbus.config.loads("sinks: {one: %s}" % sys.argv[1])
with bus, bus.run(name="alone", params={"lr": 0.1}) as run:
    for epoch in run.epochs(2):
        run.log({"loss": 1.0 / (epoch + 1)})
        run.image("picture", np.zeros((8, 8, 3), np.uint8))
    run.curve("curve", [0.0, 1.0], [[0.0, 1.0]])
    run.confusion_matrix("matrix", [[3, 1], [0, 4]], ["a", "b"])
    run.table("table", ["a"], [[1]])
(report,) = bus.receipts[0].sinks
print(report)
sys.exit(bool(report.pending or report.dead or report.error))
"""


def sinks() -> list[str]:
    """Return the names of the sinks that `pyproject.toml` registers."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return sorted(set(re.findall(r'^(\w+) = "trainbus\.sinks\.', text, re.MULTILINE)))


def try_alone(name: str, folder: Path) -> bool:
    """Return whether a sink works where nothing but its extra is installed."""
    venv.create(folder / "venv", with_pip=True)
    python = str(folder / "venv" / "bin" / "python")
    constraints = str(ROOT / "constraints.txt")
    pip = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    done = subprocess.run([*pip, "-c", constraints, f"{ROOT}[{name}]"], check=False)
    if done.returncode != 0:
        return False
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "WANDB"))}
    env = kept | {"HOME": str(folder), "MPLBACKEND": "agg", "DO_NOT_TRACK": "1"}
    sink = OWN.get(name, json.dumps({"type": name}))
    done = subprocess.run(
        [python, "-c", SCRIPT, sink], cwd=folder, env=env, check=False, timeout=300
    )
    return done.returncode == 0


def main(names: list[str]) -> int:
    """Try sinks, all of them if none is named."""
    failed = []
    for name in names or sinks():
        with tempfile.TemporaryDirectory(prefix=f"trainbus-{name}-") as folder:
            is_sound = try_alone(name, Path(folder))
        print(f"{name}: {'works alone' if is_sound else 'FAILED'}", flush=True)
        failed += [] if is_sound else [name]
    return len(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
