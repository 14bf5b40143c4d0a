"""What a final curve into W&B costs: trainbus against Ultralytics' own callback.

    python benchmarks/wandb_curves.py [--short]            (beside a CPU-only torch:
    python tests/support/torchvision_cpu.py benchmarks/wandb_curves.py)

All log the same curves of N = 1000 points for C classes into offline runs, in turns: the callback;
the `wandb` sink on the training thread (`isolation: inline`), where its work can be compared; and
the `wandb` sink in a process of its own, as it is by default, where the training thread only writes
the journal. Above 99 classes the callback's chart is cut by W&B, while the sink's is fitted and
kept whole beside it. `--short` only shows that it runs.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import wandb
from trainbus.sinks.wandb import WandbOptions, WandbSink
from ultralytics.utils.callbacks import wb

import trainbus
import trainbus.config

IN_A_PROCESS = """
journal: {{dir: '{folder}/runs'}}
sinks: {{wandb: {{type: wandb, mode: offline, dir: '{folder}', isolation: process}}}}
"""


def timed(call: Callable[[], object]) -> float:
    """Return the milliseconds that a call blocks."""
    begun = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - begun)


def compare(count: int, folder: str, rounds: int) -> list[float]:
    """Return the median milliseconds of callback, sink and default for `count` classes."""
    x = np.linspace(0, 1, 1000)
    y = np.random.default_rng(0).uniform(size=(count, 1000))
    names = [f"class {i}" for i in range(count)]
    sink = WandbSink(WandbOptions(mode="offline", dir=folder))
    journal = trainbus.JournalSpec(dir=f"{folder}/runs")
    inline = trainbus.Bus({"wandb": sink}, isolation="inline", journal=journal)
    default = trainbus.config.loads(IN_A_PROCESS.format(folder=folder))
    took: list[tuple[float, float, float]] = []
    with inline, inline.run() as here, default, default.run() as there:
        # The sink's run is the process's own; the callback logs into it, too.
        wb.wb = wandb
        for turn in range(rounds):
            key = f"curves/{turn}"
            took.append(
                (
                    timed(partial(wb._plot_curve, x, y, names, id=f"their/{key}")),
                    timed(partial(here.curve, key, x, y, classes=names)),
                    timed(partial(there.curve, key, x, y, classes=names)),
                )
            )
    return [statistics.median(column) for column in zip(*took, strict=True)]


def main() -> None:
    """Print one line for each number of classes."""
    short = "--short" in sys.argv[1:]
    os.environ["WANDB_SILENT"] = "true"
    print(f"{'classes':>8} {'callback ms':>12} {'sink ms':>9} {'ratio':>6} {'default ms':>11}")
    with tempfile.TemporaryDirectory() as folder:
        for count in (1, 10) if short else (1, 10, 80, 365):
            theirs, inline, default = compare(count, folder, rounds=1 if short else 5)
            ratio = inline / theirs
            print(f"{count:>8} {theirs:>12.1f} {inline:>9.1f} {ratio:>6.2f} {default:>11.1f}")


if __name__ == "__main__":
    main()
