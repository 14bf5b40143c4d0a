"""Read what wandb wrote offline: the transaction log `run-<id>.wandb` and the media beside it.

Nothing here goes through the code that logged the run, so a test may trust it. A log that ends in
the middle of a record, as after a crash, is read up to there; a damaged one is an error.
"""

import contextlib
import json
import struct
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from wandb.proto import wandb_internal_pb2

# wandb ships no stubs for its generated protocol.
pb: Any = wandb_internal_pb2

HEADER = b":W&B\xe1\xbe\x00"
BLOCK_SIZE = 32 * 1024
RECORD_HEADER = struct.Struct("<IHB")
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


class WandbMetric(TypedDict):
    """What `define_metric` said about one metric or glob."""

    step_metric: str
    step_sync: bool
    hidden: bool
    summary: list[str]


class WandbChart(TypedDict):
    """A custom chart: its preset, its columns, its texts, and the history key of its table."""

    panel: str
    fields: dict[str, str | None]
    strings: dict[str, str]
    table: str


@dataclass(frozen=True)
class WandbFile:
    """A file of an artifact; a reference has `ref` instead of a local path."""

    size: int
    digest: str
    local_path: Path | None
    ref: str | None


@dataclass(frozen=True)
class WandbArtifact:
    """An artifact as it was logged."""

    name: str
    type: str
    description: str
    aliases: tuple[str, ...]
    metadata: dict[str, Any]
    files: dict[str, WandbFile]


@dataclass(frozen=True)
class WandbRun:
    """One offline run.

    Nested keys of history and summary are joined with "."; media values (dicts with `_type`) stay
    whole. wandb rewrites numbers, so a logged 1.0 comes back as the int 1.
    """

    dir: Path
    run_id: str
    project: str
    entity: str
    name: str
    group: str
    job_type: str
    tags: tuple[str, ...]
    notes: str
    resume: bool  # whether the run was started to go on with an earlier one
    config: dict[str, Any]
    history: list[dict[str, Any]]
    summary: dict[str, Any]
    metrics: dict[str, WandbMetric]
    charts: dict[str, WandbChart]
    artifacts: list[WandbArtifact]
    files: list[str]
    exit_code: int | None  # None if the run was never finished


def find_runs(folder: Path) -> list[Path]:
    """Return every `run-<id>.wandb` below a folder, oldest change first."""
    # latest-run is a link to one of the others.
    found = {path.resolve() for path in folder.rglob("run-*.wandb")}
    return sorted(found, key=lambda path: (path.stat().st_mtime_ns, path))


def read_run(path: Path) -> WandbRun:
    """Return the run that a transaction log tells of.

    Raises:
        ValueError: The file is no wandb log, is damaged, or ends before its first run record.
    """
    run: Any = None
    config: dict[str, Any] = {}
    summary: dict[str, Any] = {}
    history: list[dict[str, Any]] = []
    metrics: dict[str, Any] = {}
    charts: dict[str, Any] = {}
    artifacts: list[WandbArtifact] = []
    files: list[str] = []
    exit_code: int | None = None
    for record in read_records(path):
        match record.WhichOneof("record_type"):
            case "run":
                # It comes again, whole, when the name, the tags or the notes change.
                run = record.run
                _apply(config, run.config)
                _apply(summary, run.summary)
            case "config":
                _apply(config, record.config)
                # Kept aside: a later run record brings a _wandb without them.
                charts |= config.get("_wandb", {}).get("visualize", {})
            case "summary":
                _apply(summary, record.summary)
            case "history":
                row: dict[str, Any] = {}
                for item in record.history.item:
                    _put(row, _keys(item), json.loads(item.value_json))
                history.append(_flat(row))
            case "metric":
                name = record.metric.name or record.metric.glob_name
                if name not in metrics or record.metric._control.overwrite:
                    metrics[name] = pb.MetricRecord()
                metrics[name].MergeFrom(record.metric)
            case "artifact":
                artifacts.append(_artifact(record.artifact))
            case "files":
                files.extend(file.path for file in record.files.files)
            case "exit":
                exit_code = record.exit.exit_code
    if run is None:
        raise ValueError(f"{path} holds no run record; wandb was killed before it wrote one")
    config.pop("_wandb", None)
    summary.pop("_wandb", None)
    return WandbRun(
        dir=path.resolve().parent,
        run_id=run.run_id,
        project=run.project,
        entity=run.entity,
        name=run.display_name,
        group=run.run_group,
        job_type=run.job_type,
        tags=tuple(run.tags),
        notes=run.notes,
        resume=run.resume or run.resumed,
        config=config,
        history=history,
        summary=_flat(summary),
        metrics={name: _metric(metric) for name, metric in metrics.items()},
        charts={key: _chart(chart) for key, chart in charts.items()},
        artifacts=artifacts,
        files=files,
        exit_code=exit_code,
    )


def read_finished(path: Path, *, deadline_s: float = 30.0) -> WandbRun:
    """Read the log of a run that was finished in this process.

    wandb writes in a process of its own, and `finish` may return shortly before the last block
    is on disk: wait until the exit is there.

    Raises:
        TimeoutError: it was not there in time.
    """
    until = time.monotonic() + deadline_s
    while time.monotonic() < until:
        with contextlib.suppress(ValueError):
            run = read_run(path)
            if run.exit_code is not None:
                return run
        time.sleep(0.01)
    raise TimeoutError(f"no exit was written to {path} within {deadline_s} s")


def media_path(run: WandbRun, value: dict[str, Any]) -> Path:
    """Return where the file of an image or table of the history lies."""
    if "path" not in value:
        raise ValueError(f"expected a media value with a path, found {value}")
    return run.dir / "files" / str(value["path"])


def read_table(run: WandbRun, value: dict[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """Return the columns and rows of a table of the history."""
    table = json.loads(media_path(run, value).read_text(encoding="utf-8"))
    return table["columns"], table["data"]


def read_records(path: Path) -> Iterator[Any]:
    """Yield each whole `wandb_internal_pb2.Record` of a log.

    The layout is that of a LevelDB log, with wandb's header in the first block and a plain CRC-32:
    https://github.com/google/leveldb/blob/main/doc/log_format.md
    """
    data = path.read_bytes()
    if not data.startswith(HEADER):
        raise ValueError(f"{path} begins with {data[:7]!r}, expected {HEADER!r}: no wandb log")
    position, parts = len(HEADER), b""
    while position + RECORD_HEADER.size <= len(data):
        left = BLOCK_SIZE - position % BLOCK_SIZE
        if left < RECORD_HEADER.size:
            position += left
            continue
        checksum, length, kind = RECORD_HEADER.unpack_from(data, position)
        start = position + RECORD_HEADER.size
        position = start + length
        if position > len(data):
            return
        if checksum != zlib.crc32(data[start - 1 : position]):
            raise ValueError(f"{path} is damaged: wrong checksum of the record at byte {start}")
        parts = data[start:position] if kind in (FULL, FIRST) else parts + data[start:position]
        if kind in (FULL, LAST):
            yield pb.Record.FromString(parts)


def _keys(item: Any) -> list[str]:
    return list(item.nested_key) or [item.key]


def _put(tree: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        if not isinstance(tree.get(key), dict):
            tree[key] = {}
        tree = tree[key]
    tree[keys[-1]] = value


def _apply(tree: dict[str, Any], change: Any) -> None:
    for item in change.update:
        _put(tree, _keys(item), json.loads(item.value_json))
    for item in change.remove:
        *parents, last = _keys(item)
        branch = tree
        for key in parents:
            branch = branch.get(key, {})
        branch.pop(last, None)


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value and "_type" not in value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _metric(metric: Any) -> WandbMetric:
    return {
        "step_metric": metric.step_metric,
        "step_sync": metric.options.step_sync,
        "hidden": metric.options.hidden,
        "summary": [field.name for field, _ in metric.summary.ListFields()],
    }


def _chart(chart: dict[str, Any]) -> WandbChart:
    panel = chart["panel_config"]
    [query] = panel["userQuery"]["queryFields"]
    [table] = [field for field in query["fields"] if field["name"] == "summaryTable"]
    return {
        "panel": panel["panelDefId"],
        "fields": panel["fieldSettings"],
        "strings": panel["stringSettings"],
        "table": table["args"][0]["value"],
    }


def _artifact(artifact: Any) -> WandbArtifact:
    return WandbArtifact(
        name=artifact.name,
        type=artifact.type,
        description=artifact.description,
        aliases=tuple(sorted(artifact.aliases)),  # wandb keeps no order
        metadata=json.loads(artifact.metadata or "{}"),
        files={
            entry.path: WandbFile(
                size=entry.size,
                digest=entry.digest,
                local_path=Path(entry.local_path) if entry.local_path else None,
                ref=entry.ref or None,
            )
            for entry in artifact.manifest.contents
        },
    )
