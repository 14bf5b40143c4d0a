"""One run in MLflow: its parameters, metrics and tags, and those that are still to be sent."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from collections.abc import Mapping
from typing import Any

from trainbus.events import Record
from trainbus.toolkit.sinks import (
    MAIN,
    NO_POSITION,
    Names,
    Position,
    Positions,
    SeenRecords,
    Timeline,
    flat,
    positions_of,
    utf8,
)

logger = logging.getLogger("trainbus.sinks.mlflow")

RUN, _POSITION, _STREAMS = "trainbus.run", "trainbus.position", "trainbus.streams"
_METRICS_AT_ONCE, _PARAMS_AT_ONCE = 200, 20  # so that a request stays below 1 MB


class TrackedRun:
    """A run that is found by its tag, or created by `begin`; until then its `id` is None.

    `files` is the address of its files, `tags` are those that it has once everything is sent,
    `seen` are the records that it has, and `timeline` the positions of events.
    """

    def __init__(self, client: Any, experiment: str, run: str) -> None:
        """Read from MLflow what it has of the run.

        Args:
            client: MLflow's client.
            experiment: id of the experiment.
            run: id of the run in trainbus.
        """
        from mlflow.utils.validation import MAX_PARAM_VAL_LENGTH, MAX_TAG_VAL_LENGTH

        self._longest_param, self.longest_tag = MAX_PARAM_VAL_LENGTH, MAX_TAG_VAL_LENGTH
        self._client, self._experiment, self._run = client, experiment, run
        self._names = Names(_clean_name)
        runs = client.search_runs([experiment], f"tags.`{RUN}` = '{run}'", max_results=1)
        found = runs[0] if runs else None
        self.id: str | None = found.info.run_id if found else None
        self.files: str = found.info.artifact_uri if found else ""
        self._is_running = found is None or found.info.status == "RUNNING"
        self._params: dict[str, str] = dict(found.data.params) if found else {}
        self.tags: dict[str, str] = dict(found.data.tags) if found else {}
        position, at = _position(self.tags.get(_POSITION))
        last = {MAIN: position, **_streams(self.tags.get(_STREAMS))}
        self.seen, self.timeline = SeenRecords(last=last), Timeline(at)
        self._sent = dict(self.seen.last)
        self._new_metrics: list[Any] = []
        self._new_params: list[Any] = []
        self._new_tags: dict[str, str] = {}

    def begin(self, name: str, time: float) -> str:
        """Create the run unless it exists, mark it as running, and return its id."""
        if self.id is None:
            info = self._client.create_run(
                self._experiment,
                start_time=int(time * 1000),
                tags={**_context(), RUN: self._run},
                run_name=name[:250],
            ).info
            self.id, self.files = info.run_id, info.artifact_uri
        elif not self._is_running:
            self._client.update_run(self.id, status="RUNNING")
        self._is_running = True
        return str(self.id)

    def end(self, status: str, time: float) -> None:
        """End the run with a status of MLflow's."""
        self._client.set_terminated(self.id, status, int(time * 1000))
        self._is_running = False

    def log(self, record: Record, values: Mapping[str, float], step: int) -> None:
        """Log metrics at a step, at the record's time."""
        from mlflow.entities import Metric

        time = int(record.time * 1000)
        self._new_metrics += [Metric(self._names(k), v, time, step) for k, v in values.items()]

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log parameters; MLflow never changes one, so a later value becomes a tag."""
        from mlflow.entities import Param

        for name, value in flat(params).items():
            text = _cut(name, str(value), self._longest_param)
            key, later = self._names(name), self._names(f"updated/{name}")
            if key not in self._params:
                self._params[key] = text
                self._new_params.append(Param(key, text))
            elif text != self.tags.get(later, self._params[key]):
                self.tag(f"updated/{name}", text)

    def tag(self, name: str, value: str) -> None:
        """Set a tag."""
        key = self._names(name)
        self.tags[key] = self._new_tags[key] = _cut(name, value, self.longest_tag)

    def untag(self, *names: str) -> None:
        """Remove tags, if they exist."""
        if self._new_tags.keys() & set(names):
            self.send()
        for name in self.tags.keys() & set(names):
            self._client.delete_tag(self.id, name)
            del self.tags[name]

    @property
    def is_full(self) -> bool:
        """Whether to call `send` before more is logged."""
        return len(self._new_metrics) >= _METRICS_AT_ONCE

    def send(self) -> None:
        """Send everything that was logged; the position is sent with, or after, what it covers."""
        if self.seen.last == self._sent:
            return
        from mlflow.entities import RunTag

        tags = [RunTag(name, value) for name, value in self._new_tags.items()]
        while self._new_params or tags or len(self._new_metrics) > _METRICS_AT_ONCE:
            parts = self._new_metrics[:_METRICS_AT_ONCE], self._new_params[:_PARAMS_AT_ONCE]
            self._client.log_batch(self.id, *parts, tags[:_PARAMS_AT_ONCE])
            del self._new_metrics[:_METRICS_AT_ONCE], self._new_params[:_PARAMS_AT_ONCE]
            del tags[:_PARAMS_AT_ONCE]
        streams = dict(self.seen.last)
        position = "{}.{}.{}".format(*streams.pop(MAIN), self.timeline.last)
        tags = [RunTag(_POSITION, position)]
        tags += [RunTag(_STREAMS, json.dumps(streams))] if streams else []
        self._client.log_batch(self.id, metrics=self._new_metrics, tags=tags)
        self._sent, self._new_metrics, self._new_tags = dict(self.seen.last), [], {}


def _clean_name(name: str) -> str:
    """Return a name without what MLflow rejects in metrics, parameters and tags."""
    return without_dots(re.sub(r"[^\w./\- :]", "_", name))


def clean_text(text: str) -> str:
    """Return a string that MLflow's databases accept."""
    return utf8(text).replace("\x00", "")


def without_dots(path: str) -> str:
    """Return a path without empty parts, `.` and `..`."""
    return "/".join(part for part in path.split("/") if part not in ("", ".", ".."))


def _cut(name: str, value: str, longest: int) -> str:
    text = clean_text(value)
    if len(text) > longest:
        logger.warning("%r: MLflow keeps %d of %d characters", name, longest, len(text))
    return text[:longest]


def _position(text: str | None) -> tuple[Position, int]:
    """Return the position of the last record, and that of the last metric on the x axis."""
    try:
        attempt, seq, at = (text or "").split(".")
        return (int(attempt), int(seq)), int(at)
    except ValueError:
        return NO_POSITION, 0


def _streams(text: str | None) -> Positions:
    """Return the positions of the last records of streams besides the main stream."""
    try:
        return positions_of(json.loads(text or "{}"))
    except (ValueError, TypeError, OverflowError):
        return {}


def _context() -> dict[str, str]:
    """Return the tags that `mlflow.start_run` would set: user, source, commit and so on."""
    from mlflow.tracking.context.git_context import GitRunContext
    from mlflow.tracking.context.registry import resolve_tags
    from mlflow.utils import git_utils, mlflow_tags

    # MLflow finds the repository by the first argument, which is usually relative; the training
    # may have changed its working directory.
    found: dict[str, str] = resolve_tags(ignore=[GitRunContext])
    module = sys.modules.get("__main__")
    if getattr(getattr(module, "__spec__", None), "name", None) == "trainbus.__main__" or (
        os.path.basename(sys.argv[0]) == "trainbus"
    ):
        # A replay, where the training's program and commit are unknown.
        sources = (mlflow_tags.MLFLOW_SOURCE_NAME, mlflow_tags.MLFLOW_SOURCE_TYPE)
        return {name: value for name, value in found.items() if name not in sources}
    main = getattr(module, "__file__", None)
    if main is None:
        return found
    git = {
        mlflow_tags.MLFLOW_GIT_COMMIT: git_utils.get_git_commit(main),
        mlflow_tags.MLFLOW_GIT_BRANCH: git_utils.get_git_branch(main),
        mlflow_tags.MLFLOW_GIT_REPO_URL: git_utils.get_git_repo_url(main),
    }
    return {**found, **{name: value for name, value in git.items() if value}}
