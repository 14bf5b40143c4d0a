"""What each tracker stored of a run's metrics, read by its own means: name → axis → value."""

from __future__ import annotations

import json
import re
import sqlite3
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from support import wandb_file
from trainbus.events import MetricsLogged, Record

Metrics = dict[str, dict[int, float]]

_MARK = re.compile(r"_[0-9a-f]{6}$")


def gathered(found: Iterable[tuple[str, int, float]]) -> Metrics:
    """Return values by name and axis; of names only what all trackers allow is compared.

    Values have six digits, as one tracker keeps them in 32 bits.
    """
    metrics: Metrics = defaultdict(dict)
    for name, axis, value in found:
        metrics[re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")][axis] = float(f"{value:.6g}")
    return dict(metrics)


def of_records(records: Iterable[Record]) -> Metrics:
    """Return what was emitted: values of steps at their step, others at the epochs done."""
    return gathered(
        (name, event.epoch + 1 if event.step is None else event.step, value)
        for event in (r.event for r in records)
        if isinstance(event, MetricsLogged) and not event.final and event.epoch is not None
        for name, value in event.values.items()
    )


def of_tensorboard(folder: Path) -> Metrics:
    """Return the scalars of the one run below a log directory."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (run,) = folder.iterdir()
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    return gathered(
        (tag, event.step, event.value)
        for tag in events.Tags()["scalars"]
        for event in events.Scalars(tag)
    )


def of_mlflow(uri: str) -> Metrics:
    """Return the metrics of the one run that a database or server has."""
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    experiments = [each.experiment_id for each in client.search_experiments()]
    (run,) = client.search_runs(experiments)
    return gathered(
        (_MARK.sub("", name), each.step, each.value)
        for name in run.data.metrics
        for each in client.get_metric_history(run.info.run_id, name)
    )


def of_trackio(folder: Path) -> Metrics:
    """Return the metrics of the one project in a folder."""
    (path,) = folder.glob("*.db")
    with sqlite3.connect(path) as database:
        rows = database.execute("SELECT step, metrics FROM metrics").fetchall()
    database.close()
    return gathered(
        (name, step, value)
        for step, metrics in rows
        for name, value in json.loads(metrics).items()
        if isinstance(value, int | float)
    )


def of_page(folder: Path) -> Metrics:
    """Return the values of the charts of the one page in a folder."""
    (path,) = folder.glob("*/data.json")
    return gathered(
        (series["name"], int(x), y)
        for series in json.loads(path.read_text(encoding="utf-8"))["series"]
        for x, y in zip(series["x"], series["y"], strict=True)
    )


def of_wandb(folder: Path) -> Metrics:
    """Return the numbers of the one offline run below a folder."""
    (path,) = wandb_file.find_runs(folder)
    found = []
    for row in wandb_file.read_finished(path).history:
        axis = row.get("trainer/step", row.get("epoch"))
        values = {k: v for k, v in row.items() if isinstance(v, int | float) and k[0] != "_"}
        if axis is not None:
            axes = ("trainer/step", "epoch")
            found += [(k, int(axis), v) for k, v in values.items() if k not in axes]
    return gathered(found)
