"""Turns a YAML file into a bus, or into one line for each fault of the file.

Guarantees: nothing is opened or started; all faults are reported, not only the first, each with its
file, line, key path, what was found and expected; no report shows the value of an environment
variable or of a key named like a secret. Nothing else in trainbus reads the environment.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Collection, Mapping, Sequence, Set
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import msgspec
from msgspec import Meta, inspect

from trainbus import registry
from trainbus.bus import Bus, RunDefaults
from trainbus.delivery import Route
from trainbus.errors import ConfigError, PluginError, TrainbusError, did_you_mean
from trainbus.interfaces import Options, Sink
from trainbus.transforms import TransformSpec
from trainbus.yamlfile import MAX_CHARACTERS, Item, Problems, joined, quoted, read


class _SinkKeys(TransformSpec, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The keys of every sink, next to its own options; `type` is a further one."""

    include: Annotated[
        Sequence[str],
        Meta(
            min_length=1,
            description="Names that the sink gets; `*` matches any text, `?` one character",
            extra={"expected": "a list of one pattern or more, or nothing would ever arrive"},
        ),
    ] = TransformSpec().include
    exclude: Annotated[Sequence[str], Meta(description="Names that the sink does not get")] = ()
    rename: Annotated[
        Mapping[str, Annotated[str, Meta(min_length=1)]],
        Meta(description="Name → its name in this sink; `*` in both stands for the same text"),
    ] = {}
    every: Annotated[
        Mapping[str, Annotated[int, Meta(ge=1)]],
        Meta(description="Phase, such as `train` → steps from one value to the next"),
    ] = {}
    on_error: Annotated[
        Literal["warn", "raise"],
        Meta(description="What happens when the sink can't be opened: go on, or stop the training"),
    ] = "warn"


class _File(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The configuration of trainbus: where records go, and what is set for every run."""

    version: Annotated[Literal[1], Meta(description="Version of this file's format")] = 1
    run: Annotated[
        RunDefaults | None, Meta(description="Set for every run, over what the adapter finds")
    ] = None
    sinks: Annotated[
        dict[str, Any],
        Meta(
            min_length=1,
            description="Your name for a sink → its `type` and options",
            extra={"expected": "a mapping of one name or more to sinks"},
        ),
    ]


_SINK_KEYS = ("type", *_SinkKeys.__struct_fields__)
_VARIABLE = {"type": "string", "pattern": r"\$\{"}
_NOTES = ("title", "description", "default", "examples")
_PARTS = ("array", "object")

_WORDS: dict[type[inspect.Type], tuple[str, str]] = {
    inspect.AnyType: ("anything", "values"),
    inspect.BoolType: ("true or false", "true or false"),
    inspect.FloatType: ("a number", "numbers"),
    inspect.IntType: ("a whole number", "whole numbers"),
    inspect.StrType: ("a text", "texts"),
    inspect.StructType: ("a mapping", "mappings"),
}
_LIMITS = {
    "ge": "at least {}",
    "gt": "more than {}",
    "le": "at most {}",
    "lt": "less than {}",
    "multiple_of": "a multiple of {}",
    "min_length": "at least {} long",
    "max_length": "at most {} long",
    "pattern": "matching {}",
}


def load(path: str | os.PathLike[str]) -> Bus:
    """Return a bus with the sinks that a YAML file configures.

    Raises:
        ConfigError: the file can't be read or used; it says where and what was expected.
    """
    name = os.fspath(path)
    return loads(_text(name), name=name)


def loads(text: str, *, name: str = "<config>") -> Bus:
    """Return a bus with the sinks that a YAML text configures; `name` stands for it in errors.

    Raises:
        ConfigError: the text can't be used.
    """
    problems = Problems(name)
    root = read(text, problems, os.environ)
    loader = _Loader(problems)
    routes = loader.routes(root) if root else {}
    if problems:
        raise ConfigError(problems.lines())
    # Only the text goes to other processes: the variables in it may be secrets, and are theirs too.
    rebuild = functools.partial(loads, text, name=name)
    return Bus(routes, defaults=loader.defaults, rebuild=rebuild)


def check(path: str | os.PathLike[str]) -> list[str]:
    """Return one line for each fault of a YAML file, and an empty list if there is none."""
    try:
        load(path)
    except ConfigError as error:
        return list(error.problems)
    return []


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of the file, with the options of every sink that can be imported."""
    sinks: dict[str, type[Sink]] = {}
    for name in registry.plugins(registry.SINKS):
        try:
            sinks[name] = _sink_class(name)
            msgspec.json.schema(sinks[name].Options)
        except (TrainbusError, TypeError):
            sinks.pop(name, None)
    options = [cls.Options for cls in sinks.values()]
    refs, defs = msgspec.json.schema_components(
        [_File, _SinkKeys, *options], ref_template="#/$defs/{name}"
    )
    names = [ref["$ref"].rpartition("/")[2] for ref in refs]
    file, common, *own = (defs[name] for name in names)
    for name in names:
        defs.pop(name, None)
    kind = {"anyOf": [{"enum": list(sinks)}, _VARIABLE], "description": "Which sink it is"}
    choices = []
    for (name, cls), fields in zip(sinks.items(), own, strict=True):
        choices.append(
            {
                "if": {"properties": {"type": {"const": name}}, "required": ["type"]},
                "then": {"$ref": f"#/$defs/sink.{name}"},
            }
        )
        defs[f"sink.{name}"] = {
            "description": (cls.__doc__ or name).strip().partition("\n")[0],
            "type": "object",
            "properties": {
                "type": {"const": name},
                **fields["properties"],
                **common["properties"],
            },
            "required": ["type", *fields.get("required", [])],
            "additionalProperties": False,
        }
    file["properties"]["sinks"]["additionalProperties"] = {
        "type": "object",
        "properties": {"type": kind},
        "required": ["type"],
        "allOf": choices,
    }
    for schema in (file, *defs.values()):
        properties = schema.get("properties", {})
        properties.update({k: _or_variable(v) for k, v in properties.items()})
    dialect = "https://json-schema.org/draft/2020-12/schema"
    schema = {"$schema": dialect, **file, "title": "trainbus", "$defs": defs}
    plain: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(schema))
    return plain


class _Loader:
    """Makes the parts of a bus from what stands in the file; whatever doesn't fit is a problem."""

    def __init__(self, problems: Problems) -> None:
        self._problems = problems
        self.defaults: RunDefaults | None = None

    def routes(self, root: Item) -> dict[str, Route]:
        """Return the sinks of the file, and keep its `run` as `defaults`."""
        if not isinstance(root.value, dict):
            self._note(root, f"found {root.found()}, expected a mapping with the key 'sinks'")
            return {}
        if self._fits(root, _File):
            self.defaults = msgspec.convert(root.plain(), _File).run
        sinks = root.value.get("sinks")
        if sinks is None or not isinstance(sinks.value, dict):
            return {}
        found = {name: self._route(name, item) for name, item in sinks.value.items()}
        return {name: route for name, route in found.items() if route}

    def _route(self, name: str, item: Item) -> Route | None:
        if item.broken:
            return None
        if not isinstance(item.value, dict):
            self._note(item, f"found {item.found()}, expected a mapping with the key 'type'")
            return None
        cls = self._kind(item)
        fit = [
            self._fields_fit(item, _SinkKeys, others=item.value),
            self._renames_fit(item.value.get("rename")),
            cls is not None and self._fields_fit(item, cls.Options, others=_SINK_KEYS),
        ]
        options = self._options(item, cls) if cls and fit[-1] else None
        if cls is None or options is None or not all(fit):
            return None
        given = {key: child.plain() for key, child in item.value.items()}
        keys = msgspec.convert({k: v for k, v in given.items() if k in _SINK_KEYS[1:]}, _SinkKeys)
        spec = {field: getattr(keys, field) for field in TransformSpec.__struct_fields__}
        return Route(
            name=name,
            make=functools.partial(cls, options),
            kind=given["type"],
            service=cls.service,
            transforms=TransformSpec(**spec),
            on_error=keys.on_error,
        )

    def _kind(self, sink: Item) -> type[Sink] | None:
        known = list(registry.plugins(registry.SINKS))
        wanted = f"one of {', '.join(known)}"
        item = sink.value.get("type")
        if item is None:
            self._missing(sink, "type", wanted)
            for key in sink.value.keys() - set(_SINK_KEYS):
                if did_you_mean(key, ["type"]):
                    self._unknown(sink, key, ["type"])
        elif item.broken:
            pass
        elif item.value not in known:
            self._note(item, f"found {item.found()}, expected {wanted}{_nearest(item, known)}")
        else:
            try:
                return _sink_class(item.value)
            except TrainbusError as error:
                reason = "`trainbus plugins` says why it can't" if item.hidden else _line(error)
                self._note(item, f"found {item.found()}, expected a sink that loads: {reason}")
        return None

    def _options(self, sink: Item, cls: type[Sink]) -> Any:
        """Return the sink's own options, whose fields fit each by itself."""
        own = {key: item for key, item in sink.value.items() if key not in _SINK_KEYS}
        try:
            return msgspec.convert({key: item.plain() for key, item in own.items()}, cls.Options)
        except Exception as error:
            reason = _line(error.__cause__ or error)
            # What is said of other values just the same can't repeat a value that is hidden.
            if reason != _refusal(cls.Options, {key: _masked(item) for key, item in own.items()}):
                reason = "(not shown, as it may repeat a hidden value)"
            self._problems.at(
                sink.key_line, sink.path, f"found options that don't fit, expected others: {reason}"
            )
            return None

    def _renames_fit(self, item: Item | None) -> bool:
        rules = item.value if item and isinstance(item.value, dict) else {}
        taken: dict[str, str] = {}
        fit = True
        for old, new in rules.items():
            if not isinstance(new.value, str):
                continue
            before = taken.setdefault(new.value, old)
            if "*" in new.value and "*" not in old:
                fit = self._note(
                    new, f"found {new.found()}, expected no `*`, as its pattern has none"
                )
            elif "*" not in new.value and before != old:
                fit = self._note(
                    new,
                    f"found {new.found()} again, expected another name than {quoted(before)} gets",
                )
        return fit

    def _fields_fit(self, item: Item, cls: type[Any], *, others: Collection[str] = ()) -> bool:
        """Check each field by itself, so that one fault doesn't hide another."""
        fields = {field.encode_name: field for field in msgspec.structs.fields(cls)}
        known = sorted({*fields, *others})
        fit = True
        for key, child in item.value.items():
            if key in fields:
                fit &= self._fits(child, fields[key].type)
            elif key not in others:
                fit = self._unknown(item, key, known)
        for key, field in fields.items():
            if field.required and key not in item.value:
                wanted = _expected(inspect.type_info(field.type))
                fit = self._missing(item, key, wanted)
        return fit

    def _fits(self, item: Item, wanted: Any) -> bool:
        """Check a value against a type, part by part where both have parts."""
        if item.broken:
            return False
        for arm in _arms(wanted):
            origin, args = get_origin(arm) or arm, get_args(arm)
            if not isinstance(origin, type):
                continue
            if isinstance(item.value, dict) and issubclass(origin, msgspec.Struct):
                return self._fields_fit(item, origin)
            parts, part = [], Any
            if isinstance(item.value, dict) and issubclass(origin, Mapping) and args:
                parts, part = list(item.value.values()), args[1]
            elif isinstance(item.value, list) and issubclass(origin, Sequence | Set) and args:
                parts, part = item.value, args[0]
            fit = [self._fits(child, part) for child in parts]
            if not all(fit) or item.partial:
                return False
        if _converts(item.plain(), wanted):
            return True
        if item.raw is not None and _converts(item.raw, wanted):
            item.value = item.raw
            return True
        info = inspect.type_info(wanted)
        expected = _expected(info)
        hint = _hint(item, info, expected)
        return self._note(item, f"found {item.found()}, expected {expected}{hint}")

    def _unknown(self, item: Item, key: str, known: list[str]) -> bool:
        wanted = f"one of {', '.join(known)}" if len(known) > 1 else repr(known[0])
        text = f"found an unknown key, expected {wanted}{did_you_mean(key, known)}"
        self._problems.at(item.value[key].key_line, joined(item.path, key), text)
        return False

    def _missing(self, item: Item, key: str, wanted: str) -> bool:
        path = joined(item.path, key)
        self._problems.at(item.key_line, path, f"found nothing, expected {wanted}")
        return False

    def _note(self, item: Item, text: str) -> bool:
        self._problems.at(item.line, item.path, text)
        return False


def _text(name: str) -> str:
    """Return what the file holds."""
    problems = Problems(name)
    try:
        with open(name, "rb") as file:
            data = file.read(MAX_CHARACTERS + 1)
        if len(data) > MAX_CHARACTERS:
            problems.add("", "", "found more than 1 MiB, expected a smaller file")
        else:
            return data.decode("utf-8-sig")
    except FileNotFoundError:
        problems.add("", "", _no_such_file(name))
    except IsADirectoryError:
        problems.add("", "", "found a folder, expected a YAML file")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        problems.at(line, "", "found bytes that are no UTF-8, expected a text file in UTF-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        problems.add("", "", f"found a file that can't be read ({reason}), expected a YAML file")
    raise ConfigError(problems.lines())


def _no_such_file(name: str) -> str:
    path = Path(name)
    try:
        folder = path.absolute().parent
        others = [other for other in os.listdir(folder) if other.endswith((".yaml", ".yml"))]
    except OSError:
        return "found no such folder, expected a YAML file in one that exists"
    return f"found no such file in {folder}, expected a YAML file{did_you_mean(path.name, others)}"


def _sink_class(name: str) -> type[Sink]:
    """Return a sink class whose options can be read.

    Raises:
        TrainbusError: it can't be imported, or is not what its entry point promises.
    """
    cls = registry.sink_class(name)
    try:
        if not issubclass(cls.Options, Options):
            raise TypeError("expected a class derived from trainbus.Options")
        inspect.type_info(cls.Options)
        taken = {f.encode_name for f in msgspec.structs.fields(cls.Options)}.intersection(
            _SINK_KEYS
        )
        if taken:
            raise TypeError(f"{', '.join(sorted(taken))} means the same for every sink")
    except Exception as error:
        raise PluginError(f"the options of sink {name!r} can't be read: {error}") from error
    return cls


def _arms(wanted: Any) -> list[Any]:
    """Return the types that a union allows, without their annotations."""
    if get_origin(wanted) is Annotated:
        return _arms(get_args(wanted)[0])
    if get_origin(wanted) in (Union, UnionType):
        return [arm for each in get_args(wanted) for arm in _arms(each)]
    return [wanted]


def _converts(value: Any, wanted: Any) -> bool:
    try:
        msgspec.convert(value, wanted)
    except msgspec.ValidationError:
        return False
    return True


def _masked(item: Item) -> Any:
    """Return the value with everything that is hidden replaced by something else."""
    match item.value:
        case dict():
            return {key: _masked(child) for key, child in item.value.items()}
        case list():
            return [_masked(child) for child in item.value]
        case str() if item.hidden:
            return "***"
        case bool() if item.hidden:
            return not item.value
        case int() | float() if item.hidden:
            return item.value + 1
    return item.value


def _refusal(options: type[Any], values: Mapping[str, Any]) -> str | None:
    """Return what options of these values are refused with; their types aren't checked."""
    names = {field.encode_name: field.name for field in msgspec.structs.fields(options)}
    try:
        options(**{names[key]: value for key, value in values.items()})
    except Exception as error:
        return _line(error)
    return None


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _values(info: inspect.Type) -> list[Any]:
    """Return the values that a type consists of, where it lists them."""
    match info:
        case inspect.Metadata():
            return _values(info.type)
        case inspect.UnionType():
            return [value for arm in info.types for value in _values(arm)]
        case inspect.LiteralType():
            return list(info.values)
        case inspect.EnumType():
            return [member.value for member in info.cls]
    return []


def _hint(item: Item, info: inspect.Type, expected: str) -> str:
    """Return what helps besides the expectation: the nearest known value, or quotes."""
    if isinstance(item.value, str):
        return _nearest(item, [value for value in _values(info) if isinstance(value, str)])
    is_scalar = item.value is not None and not isinstance(item.value, list | dict)
    return " (write it in quotes)" if is_scalar and expected.startswith("a text") else ""


def _nearest(item: Item, known: Collection[str]) -> str:
    return (
        did_you_mean(item.value, known) if isinstance(item.value, str) and not item.hidden else ""
    )


def _expected(info: inspect.Type, *, many: bool = False) -> str:
    """Return a type in words."""
    match info:
        case inspect.Metadata():
            return (info.extra or {}).get("expected") or _expected(info.type, many=many)
        case inspect.UnionType():
            arms = (_expected(a, many=many) for a in info.types if type(a) is not inspect.NoneType)
            return " or ".join(dict.fromkeys(arms))
        case inspect.LiteralType() | inspect.EnumType():
            values = ", ".join(map(repr, _values(info)))
            return f"one of {values}" if len(_values(info)) > 1 else values
        case inspect.DictType():
            words = f"a mapping of names to {_expected(info.value_type, many=True)}"
        case inspect.ListType() | inspect.VarTupleType() | inspect.SetType():
            words = f"a list of {_expected(info.item_type, many=True)}"
        case _:
            words = _WORDS.get(type(info), (type(info).__name__, "values"))[many]
    limits = [
        text.format(getattr(info, name))
        for name, text in _LIMITS.items()
        if getattr(info, name, None) is not None
    ]
    return f"{words} ({', '.join(limits)})" if limits else words


def _or_variable(schema: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a value, in which a text with a variable may stand for each scalar."""
    schema = dict(schema)
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            schema[key] = _or_variable(schema[key])
    arms = [dict(arm) for arm in schema.pop("anyOf", [])]
    # Editors show the notes of a key, not those of one of its choices.
    notes = {k: v for each in (*arms, schema) for k, v in each.items() if k in _NOTES}
    rest = [{k: v for k, v in each.items() if k not in _NOTES} for each in arms or [schema]]
    if arms:
        rest = [_or_variable(each) if each.get("type") in _PARTS else each for each in rest]
    is_open = any(each in ({}, {"type": "string"}) for each in rest)
    is_whole = not arms and (rest[0].get("type") in _PARTS or "$ref" in rest[0])
    if is_open or is_whole:
        return {**notes, **(rest[0] if not arms else {"anyOf": rest})}
    return {**notes, "anyOf": [*rest, _VARIABLE]}
