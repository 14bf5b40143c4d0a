"""The event schema: everything that trainbus records about a training, as frozen types.

An *event* describes what happened; a *record* is an event with its envelope (run id, attempt, seq,
time, rank). Values are plain Python and numpy: adapters convert tensors before they emit.

Conventions:
    - `epoch` counts from 0. `step` is the number of optimizer updates done.
    - A value measured at one optimizer step has `step` and the epoch of that step. A value for a
      whole epoch has `epoch`, and its `step` is None.
    - In JSON, NaN and ±Inf are the strings `NaN`, `Infinity`, `-Infinity` (as in protobuf's JSON
      mapping), and an array is `{"dtype", "shape", "data"}`.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, TypeAlias, get_origin

import msgspec
import numpy as np
from numpy.typing import NDArray

SCHEMA_VERSION = 1

Phase: TypeAlias = str
"""Phase of a metric: `train`, `validation`, `test`, `system`, or a name of your own."""

Array: TypeAlias = NDArray[Any]


class _Base(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="type"):
    """Base class of all events."""


class Resumed(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Where a resumed training continues; `run` is None if the framework doesn't know it."""

    run: str | None = None
    epoch: int | None = None
    step: int | None = None
    save_dir: str | None = None
    """Save directory of the earlier training, if the resumed one has another."""


class Best(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The best value that a run reached, and its epoch."""

    metric: str
    value: float
    epoch: int | None = None


class Failure(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The exception that ended a run."""

    type: str
    message: str
    traceback: str = ""


class GitState(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The state of the git repository that contains the code of a training.

    `diff` is the output of `git diff HEAD`, at most 1 MiB; bytes that are no UTF-8 are replaced. It
    has no untracked files, which count for `dirty`. `dirty` is None if git took too long to say.
    """

    commit: str | None = None
    branch: str | None = None
    remote: str | None = None
    root: str | None = None
    dirty: bool | None = None
    diff: str = ""
    diff_truncated: bool = False


class Gpu(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A GPU of the machine; `memory` is in bytes."""

    name: str
    memory: int | None = None
    uuid: str | None = None


class RunStarted(_Base, frozen=True, kw_only=True, tag="run.started"):
    """A training is set up and about to begin.

    `goals` maps a metric that the trainer ranks by (a name or `prefix*`) to `max` or `min`.
    `own_loggers` has the import names of the trackers that the framework's own loggers log to.
    """

    name: str | None = None
    project: str | None = None
    group: str | None = None
    job_type: str | None = None
    tags: list[str] = []
    notes: str | None = None
    task: str | None = None
    params: dict[str, Any] = {}
    framework: str | None = None
    framework_version: str | None = None
    save_dir: str | None = None
    world_size: int = 1
    resumed: Resumed | None = None
    goals: dict[str, Literal["max", "min"]] = {}
    own_loggers: list[str] = []

    def goal_of(self, metric: str) -> Literal["max", "min"] | None:
        """Return whether the highest or the lowest value of a metric is the best one.

        An exact name takes precedence over a `prefix*`, and a longer prefix over a shorter one. No
        other character of a goal is special.
        """
        if metric in self.goals:
            return self.goals[metric]
        fits = [g for g in self.goals if g.endswith("*") and metric.startswith(g[:-1])]
        return self.goals[max(fits, key=len)] if fits else None


class ParamsUpdated(_Base, frozen=True, kw_only=True, tag="params.updated"):
    """Parameters changed after the start, such as an automatic batch size."""

    params: dict[str, Any]


class ModelDescribed(_Base, frozen=True, kw_only=True, tag="model.described"):
    """Size and speed of the model; unknown fields are None or empty.

    `speed_ms` maps a stage to milliseconds per image; `gflops` is 10⁹ operations per image.
    """

    parameters: int | None = None
    gradients: int | None = None
    layers: int | None = None
    gflops: float | None = None
    speed_ms: dict[str, float] = {}
    classes: list[str] = []
    extra: dict[str, float] = {}


class EpochStarted(_Base, frozen=True, kw_only=True, tag="epoch.started"):
    """An epoch begins."""

    epoch: int


class EpochEnded(_Base, frozen=True, kw_only=True, tag="epoch.ended"):
    """An epoch ended: completed, or aborted to retry it (out of memory) or to recover from NaN."""

    epoch: int
    duration_s: float | None = None
    outcome: Literal["completed", "retried", "recovered"]


class MetricsLogged(_Base, frozen=True, kw_only=True, tag="metrics.logged"):
    """Named numbers.

    `final` marks an evaluation of the selected weights after training, which belongs to no epoch.
    `on_request` marks step values that are only measured because a sink has an `every` interval.
    """

    values: dict[str, float]
    phase: Phase
    epoch: int | None = None
    step: int | None = None
    final: bool = False
    on_request: bool = False


class ImageLogged(_Base, frozen=True, kw_only=True, tag="image.logged"):
    """An image: the path of a file, or an array (H, W) or (H, W, C), uint8, or float in 0…1."""

    key: str
    path: str | None = None
    array: Array | None = None
    caption: str | None = None
    epoch: int | None = None
    step: int | None = None


class CurveLogged(_Base, frozen=True, kw_only=True, tag="curve.logged"):
    """One curve per class over a shared axis: x (N,), ascending; y (C, N); classes, C names."""

    key: str
    x: Array
    y: Array
    classes: list[str]
    title: str = ""
    x_label: str = "x"
    y_label: str = "y"
    epoch: int | None = None
    step: int | None = None


class ConfusionMatrixLogged(_Base, frozen=True, kw_only=True, tag="confusion_matrix.logged"):
    """Counts (C, C), or fractions if normalized: row i, column j is true class i predicted as j."""

    key: str
    matrix: Array
    classes: list[str]
    normalized: bool = False
    epoch: int | None = None
    step: int | None = None


class TableLogged(_Base, frozen=True, kw_only=True, tag="table.logged"):
    """Rows of plain values, one for each column."""

    key: str
    columns: list[str]
    rows: list[list[Any]]
    epoch: int | None = None
    step: int | None = None


class HistogramLogged(_Base, frozen=True, kw_only=True, tag="histogram.logged"):
    """Counts (N,) of values in the bins between edges (N + 1,)."""

    key: str
    counts: Array
    edges: Array
    epoch: int | None = None
    step: int | None = None


class TextLogged(_Base, frozen=True, kw_only=True, tag="text.logged"):
    """A piece of text."""

    key: str
    text: str
    epoch: int | None = None
    step: int | None = None


class CheckpointSaved(_Base, frozen=True, kw_only=True, tag="checkpoint.saved"):
    """The trainer wrote a checkpoint; `final` means that it won't write to this path again."""

    path: str
    kind: Literal["best", "last", "periodic"]
    epoch: int | None = None
    step: int | None = None
    metrics: dict[str, float] = {}
    metadata: dict[str, Any] = {}
    final: bool = False


class ArtifactLogged(_Base, frozen=True, kw_only=True, tag="artifact.logged"):
    """Files that belong together under one name."""

    name: str
    kind: str = "file"
    paths: list[str] = []
    aliases: list[str] = []
    metadata: dict[str, Any] = {}


class AlertRaised(_Base, frozen=True, kw_only=True, tag="alert.raised"):
    """Something that a person should know at once."""

    title: str
    text: str = ""
    level: Literal["info", "warning", "error"]


class EnvironmentDescribed(_Base, frozen=True, kw_only=True, tag="environment.described"):
    """What an attempt runs with: the program, its code and packages, and the machine.

    `packages` maps the distributions that are installed to their versions. `scheduler` has the
    variables, by name, with which a scheduler or launcher identifies the job. `cpus` counts logical
    CPUs, `usable_cpus` those that the process may use, and `cores` physical ones; `memory` is in
    bytes. Unknown fields are None or empty.
    """

    command: list[str] = []
    cwd: str | None = None
    script: str | None = None
    python: str | None = None
    executable: str | None = None
    packages: dict[str, str] = {}
    os: str | None = None
    host: str | None = None
    user: str | None = None
    cpu: str | None = None
    cpus: int | None = None
    usable_cpus: int | None = None
    cores: int | None = None
    memory: int | None = None
    gpus: list[Gpu] = []
    gpu_driver: str | None = None
    cuda: str | None = None
    git: GitState | None = None
    scheduler: dict[str, str] = {}


class ConsoleLogged(_Base, frozen=True, kw_only=True, tag="console.logged"):
    """Lines that the program printed, separated by line feeds, without the last line feed.

    `first_line` is the number of the first line, counted from 1 over both streams of the process;
    `time` is when it was printed, in Unix seconds. If `dropped_lines` is not 0, that many lines
    were dropped in place of this event, from `first_line` on, and the text says so.
    """

    stream: Literal["stdout", "stderr"]
    text: str
    first_line: int
    time: float | None = None
    dropped_lines: int = 0
    dropped_bytes: int = 0


class RunEnded(_Base, frozen=True, kw_only=True, tag="run.ended"):
    """The run is over; `reason` says why, in a word or a short sentence."""

    status: Literal["finished", "failed", "stopped"]
    reason: str | None = None
    error: Failure | None = None
    best: Best | None = None


_ON_PURPOSE = {
    "optuna.exceptions.TrialPruned": "pruned",
    "lightgbm.callback.EarlyStopException": "early stop",
    "ignite.engine.engine._EngineTerminateException": "terminated",
    "ignite.engine.engine._EngineTerminateSingleEpochException": "terminated",
    "lightning.pytorch.utilities.exceptions._TunerExitException": "end of the tuning",
    "pytorch_lightning.utilities.exceptions._TunerExitException": "end of the tuning",
}
"""Names of the exceptions with which frameworks end a training on purpose → reason."""


def ended_by(error: BaseException | None, *, best: Best | None = None) -> RunEnded:
    """Return a run's end: finished without an exception, stopped on purpose, or failed.

    Ctrl-C and `SystemExit` count as stopped, and so do the exceptions with which frameworks end a
    training on purpose, such as Optuna's `TrialPruned`.
    """
    if error is None:
        return RunEnded(status="finished", best=best)
    failure = Failure(
        type=type(error).__qualname__,
        message=_message(error),
        traceback="".join(traceback.format_exception(error)),
    )
    if isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit):
        return RunEnded(status="stopped", reason=failure.type, error=failure, best=best)
    for kind in type(error).__mro__:
        if (why := _ON_PURPOSE.get(f"{kind.__module__}.{kind.__qualname__}")) is not None:
            return RunEnded(status="stopped", reason=why, error=failure, best=best)
    reason = f"{failure.type}: {failure.message}"
    return RunEnded(status="failed", reason=reason, error=failure, best=best)


def _message(error: BaseException) -> str:
    """Return the message of an error, even if its `__str__` raises."""
    try:
        return str(error)
    except Exception as fault:
        frame = fault.__traceback__ and fault.__traceback__.tb_next
        makes_text = getattr(type(error).__str__, "__code__", None)
        if frame is not None and frame.tb_frame.f_code is not makes_text:
            raise  # raised by a signal handler of the program, which can run between any two lines
        return "(its text can't be made)"


class UnknownEvent:
    """An event of a newer schema: its name and all of its data, so that it can be passed on."""

    __slots__ = ("data", "name")

    def __init__(self, name: str, data: dict[str, Any]) -> None:
        self.name = name
        self.data = data

    def __repr__(self) -> str:
        return f"UnknownEvent({self.name!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, UnknownEvent) and self.data == other.data

    __hash__ = None  # type: ignore[assignment]


Event: TypeAlias = (
    RunStarted
    | ParamsUpdated
    | ModelDescribed
    | EpochStarted
    | EpochEnded
    | MetricsLogged
    | ImageLogged
    | CurveLogged
    | ConfusionMatrixLogged
    | TableLogged
    | HistogramLogged
    | TextLogged
    | CheckpointSaved
    | ArtifactLogged
    | AlertRaised
    | EnvironmentDescribed
    | ConsoleLogged
    | RunEnded
)

EVENT_TYPES: tuple[type[Any], ...] = Event.__args__
_BY_NAME: dict[str, type[Any]] = {str(t.__struct_config__.tag): t for t in EVENT_TYPES}
_NAMES = {cls: name for name, cls in _BY_NAME.items()}


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """An event with its envelope.

    `attempt` counts the trainings of a run from 1: resuming starts the next attempt. `time` is
    seconds since the Unix epoch, and `rank` is the rank of the process that emitted the event.
    `stream` names the producer: it is empty for the training itself, whose records are the main
    stream. `seq` counts the records of a stream, rank and attempt from 1 without gaps.
    """

    seq: int
    run: str
    time: float
    event: Event | UnknownEvent
    attempt: int = 1
    rank: int = 0
    schema: int = SCHEMA_VERSION
    stream: str = ""  # the last field: `Codec.encode` removes it from lines of the main stream

    @property
    def source(self) -> str:
        """Stream and rank, such as `console-r0`; empty for the main stream."""
        return self.stream and stream_source(self.stream, self.rank)

    @property
    def position(self) -> tuple[int, int]:
        """(attempt, seq): the record's place among those of its source; it never decreases."""
        return self.attempt, self.seq


def stream_source(stream: str, rank: int) -> str:
    """Return the name of a stream of one rank, such as `console-r0`."""
    return f"{stream}-r{rank}"


def event_name(event: object) -> str:
    """Return the schema name of an event or event type, such as `metrics.logged`.

    Raises:
        TypeError: it is no event.
    """
    name = _NAMES.get(type(event))
    if name is not None:
        return name
    if isinstance(event, UnknownEvent):
        return event.name
    config = getattr(event, "__struct_config__", None)
    if config is None or config.tag not in _BY_NAME:
        raise TypeError(f"expected an event of trainbus.events, found {event!r}")
    return str(config.tag)


class Codec:
    """Encodes records as JSON and decodes them.

    Args:
        store: saves an array outside the line and returns its name, or None to keep it in the line.
        load: returns what was saved under a name: an array if a dtype and shape are passed, else
            the JSON of an event.
    """

    def __init__(
        self,
        store: Callable[[Array], str | None] | None = None,
        load: Callable[..., Any] | None = None,
    ) -> None:
        self._encoder = msgspec.json.Encoder(enc_hook=partial(_encode_other, store))
        self._store = store
        self._load = load
        self._decoders = {
            name: msgspec.json.Decoder(cls, strict=False, dec_hook=partial(_decode_other, load))
            for name, cls in _BY_NAME.items()
        }

    def encode(self, record: Record) -> bytes:
        """Return a record as one line of JSON, without the line feed.

        Raises:
            TypeError: a value is neither plain Python nor numpy.
        """
        line = self._encoder.encode(record)
        # msgspec writes a non-finite float as null; only then is the slower path needed.
        if b"null" in line:
            hook = partial(_encode_other, self._store)
            line = self._encoder.encode(_spell(msgspec.to_builtins(record, enc_hook=hook)))
        # Lines of the main stream have no `stream`, as in journals from before there were streams.
        return line if record.stream else line[: -len(_NO_STREAM)] + b"}"

    def decode(self, line: bytes | str) -> Record:
        """Return the record that `encode` wrote; an unknown event type becomes an `UnknownEvent`.

        Raises:
            msgspec.DecodeError: the line is not JSON, or not a record.
        """
        try:
            envelope = _ENVELOPE.decode(line)
            tag = _TAG.decode(envelope.event)
            event: Event | UnknownEvent
            if tag.blob is None or self._load is None:
                event = self._event(tag.type, envelope.event)
            else:
                event = self._event(tag.type, self._load(tag.blob))
        # Invalid UTF-8, a malformed array, too deep nesting, or a missing blob.
        except (ValueError, KeyError, TypeError, RecursionError, OSError, OverflowError) as error:
            if isinstance(error, msgspec.DecodeError):
                raise
            raise msgspec.DecodeError(f"not a record: {error}") from error
        return Record(
            seq=envelope.seq,
            run=envelope.run,
            time=envelope.time,
            event=event,
            attempt=envelope.attempt,
            rank=envelope.rank,
            schema=envelope.schema,
            stream=envelope.stream,
        )

    def _event(self, name: str, data: Any) -> Event | UnknownEvent:
        decoder = self._decoders.get(name)
        if decoder is None:
            return UnknownEvent(name, msgspec.json.decode(data))
        event: Event = decoder.decode(data)
        return _unspelled(event) if isinstance(event, TableLogged) else event


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of a record."""

    class RecordSchema(msgspec.Struct, kw_only=True, rename={"schema_": "schema"}):
        seq: int
        run: str
        time: float
        event: Event
        attempt: int = 1
        rank: int = 0
        schema_: int = SCHEMA_VERSION
        stream: str = ""

    return msgspec.json.schema(RecordSchema, schema_hook=_array_schema)


class _Envelope(msgspec.Struct, kw_only=True):
    seq: int
    run: str
    time: float
    event: msgspec.Raw
    attempt: int = 1
    rank: int = 0
    schema: int = SCHEMA_VERSION
    stream: str = ""


class _Tag(msgspec.Struct):
    type: str
    blob: str | None = None


def _encode_other(store: Callable[[Array], str | None] | None, value: Any) -> Any:
    if isinstance(value, np.ndarray):
        about = {"dtype": str(value.dtype), "shape": list(value.shape)}
        kept = None if store is None else store(value)
        return {**about, "data": value.tolist()} if kept is None else {**about, "blob": kept}
    if isinstance(value, UnknownEvent):
        return value.data
    raise TypeError(f"expected plain Python or numpy values, found {type(value).__qualname__}")


def _decode_other(load: Callable[..., Any] | None, expected: type, value: Any) -> Any:
    if (get_origin(expected) or expected) is np.ndarray:
        if load is not None and "blob" in value:
            return load(value["blob"], np.dtype(value["dtype"]), tuple(value["shape"]))
        # float() parses NaN and Infinity, which numpy does not for every dtype.
        dtype, shape = np.dtype(value["dtype"]), value["shape"]
        # A corrupt or hostile line must not decide how much memory is allocated.
        is_sound = dtype.kind in _KINDS and dtype.subdtype is None
        if not is_sound or not all(type(n) is int and n >= 0 for n in shape):
            raise ValueError(f"rejected an array of {dtype} {shape}")
        if math.prod(shape) * dtype.itemsize > _MAX_ARRAY:
            raise ValueError(f"rejected an array of {dtype} {shape}: too large for a line")
        data = _unspell(value["data"]) if dtype.kind == "f" else value["data"]
        if np.size(data) != math.prod(shape):
            raise ValueError(f"an array of {dtype} {shape} has {np.size(data)} values")
        return np.array(data, dtype=dtype).reshape(shape)
    raise NotImplementedError(f"can't decode a {expected.__qualname__}")


def _unspelled(table: TableLogged) -> TableLogged:
    """Return a table with NaN and ±Infinity as numbers, in columns without other text."""
    odd = {i for row in table.rows for i, cell in enumerate(row) if cell in _SPELLED}
    odd -= {
        i
        for row in table.rows
        for i, cell in enumerate(row)
        if isinstance(cell, str | list | dict) and cell not in _SPELLED
    }
    if not odd:
        return table
    return msgspec.structs.replace(
        table,
        rows=[
            [float(c) if i in odd and c in _SPELLED else c for i, c in enumerate(row)]
            for row in table.rows
        ],
    )


def _unspell(value: Any) -> Any:
    return [_unspell(item) for item in value] if isinstance(value, list) else float(value)


def _spell(value: Any) -> Any:
    if type(value) is float:
        if math.isnan(value):
            return "NaN"
        if math.isinf(value):
            return "Infinity" if value > 0 else "-Infinity"
        return value
    if isinstance(value, dict):
        return {key: _spell(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_spell(item) for item in value]
    return value


def _array_schema(_: type) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {
            "dtype": {"type": "string"},
            "shape": {"type": "array", "items": {"type": "integer"}},
            "data": {"type": "array"},
        },
        "required": ["dtype", "shape", "data"],
    }


_NO_STREAM = b',"stream":""}'
_KINDS = "biufU"
_MAX_ARRAY = 64 * 2**20
_SPELLED = ("NaN", "Infinity", "-Infinity")
_ENVELOPE = msgspec.json.Decoder(_Envelope)
_TAG = msgspec.json.Decoder(_Tag)
_CODEC = Codec()

encode = _CODEC.encode
decode = _CODEC.decode
