"""Builds what TensorBoard shows of each record: the values of its plugins, under tags of their own.

A tag belongs to the name and kind that it had first, as TensorBoard itself has it.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.histogram import metadata as histograms
from tensorboard.plugins.image import metadata as images
from tensorboard.plugins.pr_curve import metadata as pr_curves
from tensorboard.plugins.scalar import metadata as scalars
from tensorboard.plugins.text import metadata as texts
from tensorboard.util.tensor_util import make_tensor_proto

from trainbus.errors import MissingPackageError
from trainbus.events import (
    AlertRaised,
    ArtifactLogged,
    CheckpointSaved,
    ConfusionMatrixLogged,
    CurveLogged,
    HistogramLogged,
    ImageLogged,
    MetricsLogged,
    ModelDescribed,
    ParamsUpdated,
    Record,
    RunEnded,
    RunStarted,
    TableLogged,
    TextLogged,
)
from trainbus.toolkit.plots import drawn, png
from trainbus.toolkit.sinks import Names, Timeline, flat, metric_name, x_position

from ._tensorboard_hparams import session_end, session_start
from ._tensorboard_text import listed, table, utf8

logger = logging.getLogger("trainbus.sinks.tensorboard")

Part = tuple[int | None, list[Any]]
"""Values of one event, and their step, None where nothing was counted."""


class Values:
    """Knows the tags of a run, and what is shown under them."""

    def __init__(self, *, log_images: bool) -> None:
        self.lost = 0
        self._log_images = log_images
        self._names = Names(utf8, longest=1000)
        self._tags: dict[str, tuple[str, str]] = {}
        self._timeline = Timeline()
        self._next: dict[str, int] = {}
        """Steps behind all those that tags have: TensorBoard shows one value of a step."""

    def learn(self, values: Iterable[tuple[Any, int]]) -> None:
        """Take over the tags of values, with their steps, that are in a file already."""
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
        """Return the tag of a name; TensorBoard knows a tag by the first kind that it had."""
        tag = name = self._names(name)
        while self._tags.setdefault(tag, (name, kind)) != (name, kind):
            tag = f"{tag}_{kind}"
        return tag

    def of(self, record: Record) -> list[tuple[int, list[Any]]]:
        """Return steps and values of the events that show a record, none if nothing does."""
        found = []
        # What tells of the run as a whole is counted; the rest stands where the run is, or later.
        first = self._timeline.last if hasattr(record.event, "epoch") else 0
        for step, values in self._parts(record):
            if step is None:
                step = max(first, *(self._next.get(value.tag, 0) for value in values))
            for value in values:
                self._next[value.tag] = max(self._next.get(value.tag, 0), step + 1)
            found.append((step, values))
        return found

    def _parts(self, record: Record) -> list[Part]:
        event, time = record.event, record.time
        match event:
            case RunStarted():
                params = flat(event.params)
                about = {k: v for k, v in _fields(event).items() if k != "params"}
                about = flat({"run": record.run, "attempt": record.attempt, **about})
                shown = [self._text("run/about", listed(about))]
                shown += [self._text("run/params", listed(params))] if params else []
                return [(None, shown), (None, [session_start(params, time)])]
            case ParamsUpdated():
                return [(None, [self._text("run/params", listed(flat(event.params)))])]
            case ModelDescribed():
                return [(None, [self._text("run/model", listed(flat(_fields(event))))])]
            case MetricsLogged():
                kind = "step" if event.step is not None else "epoch"
                kind = "" if _step(event) is None else kind
                self._timeline(event)
                named = {metric_name(k, final=event.final): v for k, v in event.values.items()}
                values = [self._scalar(name, kind, value) for name, value in named.items()]
                return [(_step(event), values)] if values else []
            case ImageLogged() if self._log_images:
                return self._picture(event, event.key, event.caption or "")
            case CurveLogged() if _is_precision_over_recall(event):
                return [(_step(event), list(self._pr_curves(event)))]
            case CurveLogged():
                return self._picture(event, event.key, event.title)
            case ConfusionMatrixLogged():
                header = ["true / predicted", *event.classes]
                rows = np.asarray(event.matrix).tolist()
                named_rows = [[n, *row] for n, row in zip(event.classes, rows, strict=False)]
                text = self._text(f"{event.key}/table", table(header, named_rows))
                return [(_step(event), [text]), *self._picture(event, event.key, "")]
            case TableLogged():
                text = self._text(event.key, table(event.columns, event.rows))
                return [(_step(event), [text])]
            case HistogramLogged():
                return [(_step(event), [self._histogram(event)])]
            case TextLogged():
                return [(_step(event), [self._text(event.key, event.text)])]
            case CheckpointSaved():
                text = self._text(f"checkpoint/{event.kind}", listed(flat(_fields(event))))
                return [(_step(event), [text])]
            case ArtifactLogged():
                return [(None, [self._text(f"artifact/{event.name}", listed(_fields(event)))])]
            case AlertRaised():
                text = f"**{event.title}**\n\n{event.text}"
                return [(None, [self._text(f"alert/{event.level}", text)])]
            case RunEnded():
                ended: list[Part] = [(None, [self._text("run/end", listed(flat(_fields(event))))])]
                if event.best is not None:
                    best = self._scalar(f"best/{event.best.metric}", "epoch", event.best.value)
                    at, epoch = self._timeline.last, event.best.epoch
                    ended.append((at if epoch is None else epoch + 1, [best]))
                return [*ended, (None, [session_end(event.status, time)])]
        return []

    def _scalar(self, name: str, kind: str, number: float) -> Any:
        metadata = scalars.create_summary_metadata(self._names(name), kind)
        return _value(self._tag(name, kind), metadata, simple_value=number)

    def _text(self, name: str, text: str) -> Any:
        metadata = texts.create_summary_metadata(self._names(name), "")
        tensor = make_tensor_proto(utf8(text).encode())
        return _value(self._tag(name, texts.PLUGIN_NAME), metadata, tensor=tensor)

    def _histogram(self, event: HistogramLogged) -> Any:
        counts, edges = np.asarray(event.counts, float), np.asarray(event.edges, float)
        tensor = make_tensor_proto(np.stack([edges[:-1], edges[1:], counts], axis=1))
        metadata = histograms.create_summary_metadata(self._names(event.key), "")
        return _value(self._tag(event.key, histograms.PLUGIN_NAME), metadata, tensor=tensor)

    def _pr_curves(self, event: CurveLogged) -> Iterator[Any]:
        """Yield the mean over the classes under the key itself, and each class below it."""
        x, rows = np.asarray(event.x, float), np.atleast_2d(np.asarray(event.y, float))
        curves = {event.key: rows.mean(axis=0)} if len(rows) else {}
        curves |= {f"{event.key}/{n}": row for n, row in zip(event.classes, rows, strict=False)}
        for key, precision in curves.items():
            name = self._names(key)
            # The plugin leaves out points without positives, whose number nobody knows here.
            data = np.zeros((6, len(x)), np.float32)
            data[pr_curves.TRUE_POSITIVES_INDEX] = 1
            data[pr_curves.PRECISION_INDEX] = precision[::-1]
            data[pr_curves.RECALL_INDEX] = x[::-1]
            metadata = pr_curves.create_summary_metadata(name, utf8(event.title), len(x))
            tensor = make_tensor_proto(data)
            yield _value(self._tag(key, pr_curves.PLUGIN_NAME), metadata, tensor=tensor)

    def _picture(self, event: Any, name: str, description: str) -> list[Part]:
        try:
            if not isinstance(event, ImageLogged):
                data = drawn(event) or b""
            else:
                data = png(event.array) if event.array is not None else _read(event.path)
        except (MissingPackageError, OSError, TypeError, ValueError) as error:
            self.lost += 1
            logger.warning("%r can't be shown in TensorBoard: %s", name, error)
            return []
        width, height = _size(data)
        image = Summary.Image(width=width, height=height, encoded_image_string=data)
        metadata = images.create_summary_metadata(self._names(name), utf8(description))
        value = _value(self._tag(name, images.PLUGIN_NAME), metadata, image=image)
        return [(_step(event), [value])]


def _step(event: Any) -> int | None:
    return None if event.epoch is None and event.step is None else x_position(event)


def _value(tag: str, metadata: Any, **content: Any) -> Any:
    return Summary.Value(tag=tag, metadata=metadata, **content)


def _is_precision_over_recall(event: CurveLogged) -> bool:
    return (event.x_label.lower(), event.y_label.lower()) == ("recall", "precision")


def _fields(event: Any) -> dict[str, Any]:
    """Return the fields of an event that are set."""
    fields = {name: getattr(event, name) for name in event.__struct_fields__}
    found = {
        name: _fields(value) if isinstance(value, msgspec.Struct) else value
        for name, value in fields.items()
    }
    return {name: v for name, v in found.items() if v is not None and v not in ("", [], {})}


def _read(path: str | None) -> bytes:
    data = Path(path).read_bytes() if path else b""
    if not data:
        raise ValueError(f"no picture in {path}")
    return data


def _size(data: bytes) -> tuple[int, int]:
    """Return width and height of a PNG or JPEG, 0 if it is neither: TensorBoard does not need it.

    PNG keeps them in its first chunk, JPEG in the segment SOFn (ISO/IEC 10918-1, B.2.2).
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
