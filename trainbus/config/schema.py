"""The types of the configuration file, and its JSON Schema for editors.

Guarantees: validation and the JSON Schema use the same types; the options of a sink never shadow
the keys that all sinks share.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, inspect

from trainbus import registry
from trainbus.delivery.spec import Isolation
from trainbus.delivery.transforms import TransformSpec
from trainbus.errors import PluginError, TrainbusError
from trainbus.interfaces import Options, Sink
from trainbus.journal.writer import JournalSpec
from trainbus.recording.settings import RunDefaults

_Name = Annotated[
    str,
    Meta(
        # `$` alone also matches before a line break at the end.
        pattern=r"^[A-Za-z0-9_.-]+(?!\n)$",
        extra={"expected": "a name of letters, digits, `_`, `.` and `-`"},
    ),
]
_VARIABLE = {"type": "string", "pattern": r"\$\{"}
_NOTES = ("title", "description", "default", "examples")
_PARTS = ("array", "object")
_AnySink = Annotated[dict[str, Any], Meta(extra={"expected": "a mapping with the key 'type'"})]


class _File(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The configuration of trainbus: sinks, journal, and settings for every run."""

    version: Annotated[Literal[1], Meta(description="Version of this file's format")] = 1
    run: Annotated[
        RunDefaults | None,
        Meta(description="Settings for every run; they override those of the adapter"),
    ] = None
    isolation: Annotated[
        Isolation,
        Meta(description="Where sinks run; auto: outside of the training process if possible"),
    ] = "auto"
    flush_secs: Annotated[
        float, Meta(ge=0, description="How long the end of a run waits for the sinks, in seconds")
    ] = 60.0
    environment: Annotated[
        bool,
        Meta(description="Whether to record command, code, packages and machine of each attempt"),
    ] = False
    system_secs: Annotated[
        float,
        Meta(ge=0, description="Seconds between two samples of the machine's load; 0 for none"),
    ] = 0.0
    console: Annotated[
        Literal["off", "python"] | bool,  # YAML reads `off` as false
        Meta(description="Whether to record what Python prints to stdout and stderr"),
    ] = "off"
    journal: Annotated[
        JournalSpec | None, Meta(description="Where each run's journal is written")
    ] = None
    sinks: Annotated[
        dict[_Name, _AnySink],
        Meta(
            min_length=1,
            description="Name of a sink → its `type` and options",
            extra={"expected": "a mapping of one name or more to sinks"},
        ),
    ]


File = Annotated[_File, Meta(extra={"expected": "a mapping with the key 'sinks'"})]
"""The whole file; each sink is checked separately, against the types of its own options."""


class _SinkKeys(TransformSpec, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The keys of every sink except `type`, whose values depend on the installed sinks."""

    on_error: Annotated[
        Literal["warn", "raise"],
        Meta(description="`warn`, or `raise`: abort training if this sink can't be opened"),
    ] = "warn"
    isolation: Annotated[
        Isolation | None,
        Meta(description="Where this sink runs; overrides `isolation` of all sinks"),
    ] = None


SINK_KEYS = ("type", *_SinkKeys.__struct_fields__)
"""The keys that every sink has besides its own options."""


def sink_keys(kinds: Iterable[str]) -> type[msgspec.Struct]:
    """Return the keys of every sink as a struct whose `type` is one of `kinds`."""
    names = tuple(kinds)
    meta = Meta(description="Type of the sink", extra={"expected": f"one of {', '.join(names)}"})
    kind = ("type", Annotated[Literal[names], meta])
    return msgspec.defstruct("sink", [kind], bases=(_SinkKeys,), kw_only=True)


def sink_class(name: str) -> type[Sink]:
    """Return a sink class with valid options.

    Raises:
        TrainbusError: the class can't be imported, or it or its options are not valid.
    """
    cls = registry.sink_class(name)
    try:
        if not issubclass(cls.Options, Options):
            raise TypeError("expected a class derived from trainbus.Options")
        inspect.type_info(cls.Options)
        fields = {field.encode_name for field in msgspec.structs.fields(cls.Options)}
        if taken := sorted(fields.intersection(SINK_KEYS)):
            raise TypeError(f"{', '.join(taken)} is reserved: all sinks have this key")
    except Exception as error:
        raise PluginError(f"the options of sink {name!r} can't be read: {error}") from error
    return cls


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of the file, with the options of every importable sink."""
    sinks: dict[str, type[Sink]] = {}
    for name in registry.plugins(registry.SINKS):
        try:
            cls = sink_class(name)
            msgspec.json.schema(cls.Options)
        except (TrainbusError, TypeError):
            continue
        sinks[name] = cls
    types = [_File, sink_keys(sinks), *(cls.Options for cls in sinks.values())]
    refs, defs = msgspec.json.schema_components(types, ref_template="#/$defs/{name}")
    for part in (each for each in defs.values() if "properties" in each):
        part["properties"] = {k: _or_variable(v) for k, v in part["properties"].items()}
    names = [ref["$ref"].rpartition("/")[2] for ref in refs]
    file, common, *own = (defs[name] for name in names)
    defs = {name: part for name, part in defs.items() if name not in names}
    for (name, cls), part in zip(sinks.items(), own, strict=True):
        defs[f"sink.{name}"] = {
            **part,
            "title": name,
            "description": (cls.__doc__ or name).strip().partition("\n")[0],
            "properties": part["properties"] | common["properties"] | {"type": {"const": name}},
            "required": ["type", *part["required"]],
        }
    file["properties"]["sinks"]["additionalProperties"] = {
        "type": "object",
        "properties": {"type": common["properties"]["type"]},
        "required": ["type"],
        "allOf": [
            {
                "if": {"properties": {"type": {"const": name}}, "required": ["type"]},
                "then": {"$ref": f"#/$defs/sink.{name}"},
            }
            for name in sinks
        ],
    }
    dialect = "https://json-schema.org/draft/2020-12/schema"
    schema = {"$schema": dialect, **file, "title": "trainbus", "$defs": defs}
    return msgspec.json.decode(msgspec.json.encode(schema), type=dict[str, Any])


def _or_variable(schema: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a value, extended so that each scalar can also be a `${…}` string."""
    arms = schema.get("anyOf") or [schema]
    # Editors show the notes of a key, but not those of one branch of `anyOf`.
    notes = {k: v for each in (*arms, schema) for k, v in each.items() if k in _NOTES}
    rest = [{k: v for k, v in arm.items() if k not in _NOTES} for arm in arms]
    for arm in rest:
        for key in ("items", "additionalProperties"):
            if isinstance(arm.get(key), dict):
                arm[key] = _or_variable(arm[key])
    scalars = [arm for arm in rest if arm.get("type") not in _PARTS and "$ref" not in arm]
    if scalars and {} not in scalars and {"type": "string"} not in scalars:
        rest.append(_VARIABLE)
    return {**notes, **(rest[0] if len(rest) == 1 else {"anyOf": rest})}
