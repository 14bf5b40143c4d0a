"""Builds what TensorBoard shows of each record: values of its plugins, each name under its own tag.

A tag belongs to its first name and kind, as in TensorBoard itself.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.histogram import metadata as histograms
from tensorboard.plugins.hparams import api_pb2
from tensorboard.plugins.hparams import metadata as hparams
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tensorboard.plugins.image import metadata as images
from tensorboard.plugins.pr_curve import metadata as pr_curves
from tensorboard.plugins.scalar import metadata as scalars
from tensorboard.plugins.text import metadata as texts
from tensorboard.util.tensor_util import make_tensor_proto

from trainbus import events
from trainbus.toolkit.plots import picture
from trainbus.toolkit.sinks import (
    Names,
    Timeline,
    epochs_done,
    flat,
    metric_name,
    set_fields,
    utf8,
    x_position,
)

_ROW_LIMIT = 1000

Part = tuple[int | None, list[Any]]
"""Values of one event and their step; None if the event has neither step nor epoch."""


class Values:
    """Builds the values of a run's records, and knows the tags that they have.

    Args:
        showing: context in which a picture that can't be built is counted as lost.
        log_images: whether to include logged pictures.
    """

    def __init__(
        self, showing: Callable[[str], AbstractContextManager[None]], *, log_images: bool
    ) -> None:
        self._showing, self._log_images = showing, log_images
        self._names = Names(utf8, longest=1000)
        self._tags: dict[str, tuple[str, str]] = {}
        self._timeline = Timeline()
        self._next: dict[str, int] = {}
        """Next free step of each tag: TensorBoard shows one value per step."""

    def learn(self, values: Iterable[tuple[Any, int]]) -> None:
        """Learn the tags and steps of values that a file already contains."""
        for value, step in values:
            kind = value.metadata.plugin_data.plugin_name
            if kind == scalars.PLUGIN_NAME:
                kind = value.metadata.summary_description
                name = value.metadata.display_name
                if kind in ("step", "epoch") and not name.startswith(("best/", "final/")):
                    self._timeline.last = step
            self._tags[value.tag] = (value.metadata.display_name, kind)
            self._next[value.tag] = max(self._next.get(value.tag, 0), step + 1)

    def _tag(self, name: str, kind: str) -> str:
        """Return the tag of a name; in TensorBoard a tag keeps its first kind."""
        tag = name = self._names(name)
        while self._tags.setdefault(tag, (name, kind)) != (name, kind):
            tag = f"{tag}_{kind}"
        return tag

    def of(self, record: events.Record) -> list[tuple[int, list[Any]]]:
        """Return the steps and values of the events that show a record; empty if nothing does."""
        found = []
        # Events about the whole run are numbered; others are at the run's current step or later.
        first = self._timeline.last if hasattr(record.event, "epoch") else 0
        for step, values in self._parts(record):
            if step is None:
                step = max(first, *(self._next.get(value.tag, 0) for value in values))
            for value in values:
                self._next[value.tag] = max(self._next.get(value.tag, 0), step + 1)
            found.append((step, values))
        return found

    def _parts(self, record: events.Record) -> list[Part]:
        event, time = record.event, record.time
        match event:
            case events.RunStarted():
                params = flat(event.params)
                about = {k: v for k, v in set_fields(event).items() if k != "params"}
                about = flat({"run": record.run, "attempt": record.attempt, **about})
                shown = [self._text("run/about", _listed(about))]
                shown += [self._text("run/params", _listed(params))] if params else []
                return [(None, shown), (None, [_session_start(params, time)])]
            case events.ParamsUpdated():
                return [(None, [self._text("run/params", _listed(flat(event.params)))])]
            case events.ModelDescribed():
                return [(None, [self._text("run/model", _listed(flat(set_fields(event))))])]
            case events.MetricsLogged():
                kind = "step" if event.step is not None else "epoch"
                kind = "" if _step(event) is None else kind
                self._timeline(event)
                named = {metric_name(k, final=event.final): v for k, v in event.values.items()}
                values = [self._scalar(name, kind, value) for name, value in named.items()]
                return [(_step(event), values)] if values else []
            case events.ImageLogged() if self._log_images:
                return self._picture(event, event.key, event.caption or "")
            case events.CurveLogged() if _is_precision_over_recall(event):
                return [(_step(event), list(self._pr_curves(event)))]
            case events.CurveLogged():
                return self._picture(event, event.key, event.title)
            case events.ConfusionMatrixLogged():
                header = ["true / predicted", *event.classes]
                rows = np.asarray(event.matrix).tolist()
                named_rows = [[n, *row] for n, row in zip(event.classes, rows, strict=False)]
                text = self._text(f"{event.key}/table", _table(header, named_rows))
                return [(_step(event), [text]), *self._picture(event, event.key, "")]
            case events.TableLogged():
                text = self._text(event.key, _table(event.columns, event.rows))
                return [(_step(event), [text])]
            case events.HistogramLogged():
                return [(_step(event), [self._histogram(event)])]
            case events.TextLogged():
                return [(_step(event), [self._text(event.key, event.text)])]
            case events.CheckpointSaved():
                text = self._text(f"checkpoint/{event.kind}", _listed(flat(set_fields(event))))
                return [(_step(event), [text])]
            case events.ArtifactLogged():
                return [(None, [self._text(f"artifact/{event.name}", _listed(set_fields(event)))])]
            case events.AlertRaised():
                text = f"**{event.title}**\n\n{event.text}"
                return [(None, [self._text(f"alert/{event.level}", text)])]
            case events.RunEnded():
                ended: list[Part] = [
                    (None, [self._text("run/end", _listed(flat(set_fields(event))))])
                ]
                if event.best is not None:
                    best = self._scalar(f"best/{event.best.metric}", "epoch", event.best.value)
                    ended.append((epochs_done(event.best.epoch) or self._timeline.last, [best]))
                return [*ended, (None, [_session_end(event.status, time)])]
        return []

    def _scalar(self, name: str, kind: str, number: float) -> Any:
        metadata = scalars.create_summary_metadata(self._names(name), kind)
        return _value(self._tag(name, kind), metadata, simple_value=number)

    def _text(self, name: str, text: str) -> Any:
        metadata = texts.create_summary_metadata(self._names(name), "")
        tensor = make_tensor_proto(utf8(text).encode())
        return _value(self._tag(name, texts.PLUGIN_NAME), metadata, tensor=tensor)

    def _histogram(self, event: events.HistogramLogged) -> Any:
        counts, edges = np.asarray(event.counts, float), np.asarray(event.edges, float)
        tensor = make_tensor_proto(np.stack([edges[:-1], edges[1:], counts], axis=1))
        metadata = histograms.create_summary_metadata(self._names(event.key), "")
        return _value(self._tag(event.key, histograms.PLUGIN_NAME), metadata, tensor=tensor)

    def _pr_curves(self, event: events.CurveLogged) -> Iterator[Any]:
        """Yield the mean over the classes under the key itself, and each class below it."""
        x, rows = np.asarray(event.x, float), np.atleast_2d(np.asarray(event.y, float))
        curves = {event.key: rows.mean(axis=0)} if len(rows) else {}
        curves |= {f"{event.key}/{n}": row for n, row in zip(event.classes, rows, strict=False)}
        for key, precision in curves.items():
            name = self._names(key)
            # The plugin skips points without positives, whose number is unknown here.
            data = np.zeros((6, len(x)), np.float32)
            data[pr_curves.TRUE_POSITIVES_INDEX] = 1
            data[pr_curves.PRECISION_INDEX] = precision[::-1]
            data[pr_curves.RECALL_INDEX] = x[::-1]
            metadata = pr_curves.create_summary_metadata(name, utf8(event.title), len(x))
            tensor = make_tensor_proto(data)
            yield _value(self._tag(key, pr_curves.PLUGIN_NAME), metadata, tensor=tensor)

    def _picture(self, event: Any, name: str, description: str) -> list[Part]:
        with self._showing(name):
            data, _ = picture(event)
            if not data:
                raise ValueError(f"no picture in {event.path}")
            width, height = _size(data)
            image = Summary.Image(width=width, height=height, encoded_image_string=data)
            metadata = images.create_summary_metadata(self._names(name), utf8(description))
            value = _value(self._tag(name, images.PLUGIN_NAME), metadata, image=image)
            return [(_step(event), [value])]
        return []


def _step(event: Any) -> int | None:
    return None if event.epoch is None and event.step is None else x_position(event)


def _value(tag: str, metadata: Any, **content: Any) -> Any:
    return Summary.Value(tag=tag, metadata=metadata, **content)


def _is_precision_over_recall(event: events.CurveLogged) -> bool:
    return (event.x_label.lower(), event.y_label.lower()) == ("recall", "precision")


def _listed(values: Mapping[str, Any]) -> str:
    """Return names and values as a Markdown table."""
    return _table(["name", "value"], [[name, value] for name, value in values.items()])


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return the first rows of a table in Markdown."""
    lines = [columns, ["---"] * len(columns), *rows[:_ROW_LIMIT]]
    text = "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)
    left_out = len(rows) - _ROW_LIMIT
    return f"{text}\n\n{left_out} more rows" if left_out > 0 else text


def _cell(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return re.sub(r"\s*[\r\n]+\s*", "<br>", text.strip()).replace("|", r"\|")


def _session_start(params: Mapping[str, Any], time: float) -> Any:
    """Return what the HParams plugin shows of the parameters; `time` is in Unix seconds."""
    data = HParamsPluginData()
    data.session_start_info.start_time_secs = time
    for name, value in params.items():
        param = data.session_start_info.hparams[utf8(name)]
        match value:
            case bool():
                param.bool_value = value
            case int() | float() if abs(value) < 1e300:  # the plugin's JSON has no NaN
                param.number_value = value
            case _:
                param.string_value = utf8(str(value))
    return _session(hparams.SESSION_START_INFO_TAG, data)


def _session_end(status: str, time: float) -> Any:
    known = {"finished": api_pb2.STATUS_SUCCESS, "failed": api_pb2.STATUS_FAILURE}
    data = HParamsPluginData()
    data.session_end_info.status = known.get(status, api_pb2.STATUS_UNKNOWN)
    data.session_end_info.end_time_secs = time
    return _session(hparams.SESSION_END_INFO_TAG, data)


def _session(tag: str, data: Any) -> Any:
    return _value(tag, hparams.create_summary_metadata(data), tensor=hparams.NULL_TENSOR)


def _size(data: bytes) -> tuple[int, int]:
    """Return width and height of a PNG or JPEG, else (0, 0), which TensorBoard accepts.

    PNG has them in its first chunk, JPEG in the segment SOFn (ISO/IEC 10918-1, B.2.2).
    """
    if data.startswith(b"\x89PNG") and len(data) >= 24:
        width, height = struct.unpack(">II", data[16:24])
        return width, height
    at = 2
    while data.startswith(b"\xff\xd8") and at + 9 <= len(data):
        if 0xC0 <= data[at + 1] <= 0xCF and data[at + 1] not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack(">HH", data[at + 5 : at + 9])
            return width, height
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return 0, 0
