"""Trains a real YOLO in a process of its own, as a scenario given in JSON says.

Run as a script, it reads one argument, the JSON of a `Scenario`, and writes `result.json` into the
scenario's folder. `run` starts it for a test, with any installed version of Ultralytics.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from support import preloaded
from support.quiet import OWN_LOGGERS_OFF

HERE = Path(__file__).resolve().parent
MODELS = HERE.parent / "data" / "models"
"""Where a model of a few convolutions lies for each task."""
LEARNER = "yolo11n.yaml"
"""A model that finds generated shapes after ten epochs."""
FAST: dict[str, Any] = {
    "imgsz": 64,
    "batch": 8,
    "nbs": 8,
    "epochs": 3,
    "workers": 0,
    "device": "cpu",
    "amp": False,
    "optimizer": "AdamW",
    "lr0": 0.01,
    "warmup_epochs": 0,
    "mosaic": 0.0,
    "close_mosaic": 0,
}
"""Arguments with which a detector learns generated shapes in about ten epochs of 64 pictures."""


@dataclass
class Scenario:
    """One training: where, on what, with which arguments, and who logs it."""

    root: str
    data: str
    task: str = "detect"
    model: str | None = None
    config: str | None = None
    builtin: bool = False
    before: str = ""
    """Python run before training, with `model`, `bus` and `root` in reach."""
    catch: bool = False
    """Whether the script catches what training raises, and goes on to write its result."""
    after: str = ""
    """Python run after it, with `model`, `bus`, `arguments`, `error`, `found` (for the result)."""
    train: dict[str, Any] = field(default_factory=dict)


def run(
    scenario: Scenario,
    *,
    version: str | None = None,
    environment: dict[str, str] | None = None,
    timeout: float = 500,
) -> subprocess.CompletedProcess[str]:
    """Run a scenario in a process of its own and return it; `result` has the rest."""
    root = Path(scenario.root)
    root.mkdir(parents=True, exist_ok=True)
    return preloaded.run(
        __file__,
        [json.dumps(asdict(scenario))],
        env=hermetic(root, version=version) | (environment or {}),
        cwd=root,
        timeout=timeout,
    )


def result(scenario: Scenario) -> dict[str, Any]:
    """Return what a scenario's process wrote down at its end."""
    found: dict[str, Any] = json.loads((Path(scenario.root) / "result.json").read_text())
    return found


def hermetic(root: Path, *, version: str | None = None) -> dict[str, str]:
    """Return an environment in which nothing is read from or written to outside `root`."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB", "YOLO", "PYTEST"))}
    path = [str(HERE.parent), str(HERE.parent.parent / "examples")]
    if version is not None:
        path.insert(0, str(old_ultralytics(version)))
    return kept | {
        "HOME": str(root),
        "YOLO_CONFIG_DIR": str(root),
        "YOLO_OFFLINE": "True",
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "WANDB_CACHE_DIR": str(root / "wandb-cache"),
        "WANDB_CONFIG_DIR": str(root / "wandb-config"),
        "WANDB_DATA_DIR": str(root / "wandb-data"),
        # matplotlib would look at every font of the machine again.
        "MPLCONFIGDIR": os.environ.get("MPLCONFIGDIR", str(root / "matplotlib")),
        "PYTHONPATH": os.pathsep.join(path),
        "PYTHONWARNINGS": "ignore",
    }


def save_below(root: Path) -> None:
    """Make trainings that are run with `hermetic(root)` and name no absolute place save below root.

    Ultralytics would save below the git repository that its package lies in, if there is one, and
    log by itself into every tracker that is installed.
    """
    script = root / "save_below.py"
    script.write_text(f"{OWN_LOGGERS_OFF}settings.update(runs_dir={str(root / 'runs')!r})\n")
    subprocess.run(
        [sys.executable, str(HERE / "torchvision_cpu.py"), str(script)],
        env=hermetic(root),
        check=True,
        capture_output=True,
    )


def old_ultralytics(version: str) -> Path:
    """Return the folder in the virtual environment where `make` puts an older Ultralytics."""
    return Path(sys.prefix) / "ultralytics" / version


def weights_hash(path: Path) -> str:
    """Return a digest of all tensors of a checkpoint, independent of how they were pickled."""
    import torch

    checkpoint = torch.load(path, map_location="cpu", weights_only=False)
    model = checkpoint.get("ema") or checkpoint["model"]
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def main(scenario: Scenario) -> None:
    """Train as the scenario says."""
    from ultralytics import YOLO, settings

    exec(OWN_LOGGERS_OFF, {})
    settings.update({"wandb": scenario.builtin})
    root = Path(scenario.root)
    model = YOLO(scenario.model or MODELS / f"{scenario.task}.yaml")
    bus: Any = None
    if scenario.config is not None:
        import trainbus

        bus = trainbus.load(scenario.config)
        bus.attach(model)
    scope: dict[str, Any] = {"model": model, "bus": bus, "root": root, "found": {}, "error": None}
    exec(scenario.before, scope)
    place = {"data": scenario.data, "project": str(root / "runs"), "name": "train"}
    scope["arguments"] = FAST | place | scenario.train
    try:
        model.train(**scope["arguments"])
    except BaseException as error:
        if not scenario.catch:
            raise
        scope["error"] = error
    exec(scenario.after, scope)
    if bus is not None:
        bus.close()
    best = Path(model.trainer.best) if getattr(model, "trainer", None) else None
    found = {
        "save_dir": str(model.trainer.save_dir) if best else None,
        "weights": weights_hash(best) if best and best.exists() else None,
        "error": repr(scope["error"]) if scope["error"] else None,
        "receipts": [str(receipt) for receipt in bus.receipts] if bus else [],
        **scope["found"],
    }
    (root / "result.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Scenario(**json.loads(sys.argv[1])))
