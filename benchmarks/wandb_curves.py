"""What a final curve costs the training thread: the `wandb` sink against Ultralytics' own callback.

    python benchmarks/wandb_curves.py            (beside a CPU-only torch:
    python tests/support/torchvision_cpu.py benchmarks/wandb_curves.py)

Both log the same curve of N = 1000 points for C classes into an offline run, in turns. Above 99
classes the callback's chart is cut by W&B, while the sink's is fitted and kept whole beside it.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import wandb
from trainbus.sinks.wandb import WandbOptions, WandbSink
from ultralytics.utils.callbacks import wb

import trainbus

ROUNDS = 5
CLASSES = (1, 10, 80, 365)


def timed(call: Callable[[], None]) -> float:
    """Return the milliseconds that a call blocks."""
    begun = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - begun)


def compare(count: int, folder: str) -> tuple[float, float]:
    """Return the median milliseconds of callback and sink for a curve of `count` classes."""
    x = np.linspace(0, 1, 1000)
    y = np.random.default_rng(0).uniform(size=(count, 1000))
    names = [f"class {i}" for i in range(count)]
    theirs, ours = [], []
    sink = WandbSink(WandbOptions(mode="offline", dir=folder))
    with trainbus.Bus({"wandb": sink}, on_receipt=lambda receipt: None) as bus, bus.run() as run:
        wb.wb = wandb
        for turn in range(ROUNDS):
            key = f"curves/{turn}"
            callback = partial(wb._plot_curve, x, y, names, id=f"their/{key}")
            theirs.append(timed(callback))
            ours.append(timed(partial(run.curve, key, x, y, classes=names)))
    return statistics.median(theirs), statistics.median(ours)


def main() -> None:
    """Print one line for each number of classes."""
    os.environ["WANDB_SILENT"] = "true"
    print(f"{'classes':>8} {'callback ms':>12} {'sink ms':>9} {'ratio':>6}")
    with tempfile.TemporaryDirectory() as folder:
        for count in CLASSES:
            theirs, ours = compare(count, folder)
            print(f"{count:>8} {theirs:>12.1f} {ours:>9.1f} {ours / theirs:>6.2f}")


if __name__ == "__main__":
    main()
