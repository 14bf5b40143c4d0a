"""What logging adds to the epochs of a real YOLO: the bus on and off, in turns.

    python benchmarks/overhead.py [--short]        (beside a CPU-only torch:
    python tests/support/torchvision_cpu.py benchmarks/overhead.py)

Prints the median epoch time of both and their ratio; the first epoch of each training, which loads
and warms up, and the last, which is followed by the end, are left out. W&B (offline) and a file are
fed, as `config/wandb-offline.yaml` does. `--short` only shows that it runs.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import itertools

import shapes
import trainbus

CONFIG = """
sinks:
  tracking: {type: wandb, mode: offline}
  local: {type: jsonl, path: records.jsonl}
"""


def epochs(data: Path, folder: Path, *, count: int, with_bus: bool) -> list[float]:
    """Return the seconds from the start of each epoch but the first to that of the next."""
    from ultralytics import YOLO

    model = YOLO("yolo11n.yaml")
    begun: list[float] = []
    model.add_callback("on_train_epoch_start", lambda trainer: begun.append(time.perf_counter()))
    arguments: dict[str, Any] = {
        "data": str(data),
        "epochs": count,
        "imgsz": 64,
        "batch": 8,
        "workers": 0,
        "device": "cpu",
        "plots": True,
        "verbose": False,
        "project": str(folder / "runs"),
    }
    if not with_bus:
        model.train(**arguments)
    else:
        (folder / "config.yaml").write_text(CONFIG)
        with trainbus.load(folder / "config.yaml") as bus:
            bus.attach(model)
            model.train(**arguments)
    return [after - before for before, after in itertools.pairwise(begun[1:])]


def main() -> None:
    """Print the medians and their ratio."""
    short = "--short" in sys.argv[1:]
    pairs, count, images = (1, 3, 8) if short else (10, 10, 64)
    took: dict[bool, list[float]] = {True: [], False: []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.chdir(folder)
        os.environ |= {"WANDB_SILENT": "true", "YOLO_CONFIG_DIR": name, "YOLO_OFFLINE": "true"}
        from ultralytics import settings

        # Only the bus is to make a difference, whichever trackers are installed.
        own = (
            "clearml",
            "comet",
            "dvc",
            "hub",
            "mlflow",
            "neptune",
            "raytune",
            "tensorboard",
            "wandb",
        )
        silent = {name: False for name in own if name in settings}
        settings.update({**silent, "runs_dir": str(folder / "runs")})
        data = shapes.make_dataset(
            folder / "data", images=images, val_images=8, size=64, val_names=("red", "blue")
        )
        for pair in range(pairs):
            for with_bus in (pair % 2 == 0, pair % 2 == 1):
                took[with_bus] += epochs(data, folder, count=count, with_bus=with_bus)
    on, off = statistics.median(took[True]), statistics.median(took[False])
    print(
        f"{pairs} pairs: epoch {1e3 * on:.1f} ms with the bus, {1e3 * off:.1f} ms without, "
        f"ratio {on / off:.4f}"
    )


if __name__ == "__main__":
    main()
