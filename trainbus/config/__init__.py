"""Loads a bus from a YAML file, or reports every problem in the file.

Guarantees: nothing is opened or started; all problems are reported, each with file, line, key path,
what was found and what was expected; no report shows the value of an environment variable or of a
key that is named like a secret.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from trainbus import registry
from trainbus.bus import Bus
from trainbus.config.schema import SINK_KEYS, File, sink_class, sink_keys
from trainbus.config.validation import ConfigValue, Problems, check_fields, check_value
from trainbus.config.yaml_reader import read
from trainbus.delivery.spec import SinkSpec
from trainbus.delivery.transforms import TransformSpec
from trainbus.errors import ConfigError, TrainbusError, did_you_mean
from trainbus.interfaces import Options, Sink
from trainbus.paths import resolve_options, working_directory
from trainbus.recording.settings import RunDefaults
from trainbus.text import quoted

_MAX_BYTES = 2**20


def load(path: str | os.PathLike[str], *, name: str | None = None, tags: Sequence[str] = ()) -> Bus:
    """Return a bus with the sinks that a YAML file configures.

    Args:
        path: the file.
        name: name of the runs; replaces that of the file and of the trainer.
        tags: tags of the runs, in addition to those of the file.

    Raises:
        ConfigError: the file can't be read or is not valid; the error lists every problem in it.
    """
    given = os.fspath(path)
    text = _text(given)
    call = RunDefaults(name=name, tags=list(tags) or None)
    try:
        file = os.path.abspath(given)
    except OSError:  # the working directory was deleted
        return _bus(text, name=given, file=given, base=None, call=call)
    return _bus(text, name=given, file=file, base=os.path.dirname(file), call=call)


def loads(text: str, *, name: str = "<config>") -> Bus:
    """Return a bus with the sinks that a YAML string configures; errors call it `name`.

    Relative paths in it are relative to the working directory.

    Raises:
        ConfigError: the string is not valid; the error lists every problem in it.
    """
    base = working_directory()
    return _bus(text, name=name, file=name, base=None if base is None else str(base))


def _bus(
    text: str, *, name: str, file: str, base: str | None, call: RunDefaults | None = None
) -> Bus:
    """Return the bus for a YAML string; relative paths in it are relative to `base`.

    Values of the `call` take precedence over those of the file.
    """
    folder = None if base is None else Path(base)
    problems = Problems(name)
    root = read(text, problems, os.environ)
    check_value(root, File)
    sinks = root.keys["sinks"].keys if "sinks" in root.keys else {}
    specs = {key: _sink_spec(key, item, folder) for key, item in sinks.items()}
    if faults := problems.lines():
        raise ConfigError(faults)
    given = msgspec.convert(root.plain(), File)
    return Bus(
        {key: spec for key, spec in specs.items() if spec},
        defaults=given.run if call is None else (given.run or RunDefaults()).updated(call),
        isolation=given.isolation,
        journal=given.journal,
        flush_secs=given.flush_secs,
        environment=given.environment,
        system_secs=given.system_secs,
        console="python" if given.console in (True, "python") else "off",
        config=file,
        base=folder,
        # Other processes get the unresolved YAML: its variables may hold secrets.
        rebuild=functools.partial(_bus, text, name=name, file=file, base=base, call=call),
    )


def check(path: str | os.PathLike[str]) -> list[str]:
    """Return one line for each problem in a YAML file; an empty list if it is valid."""
    try:
        load(path)
    except ConfigError as error:
        return list(error.problems)
    return []


def _sink_spec(name: str, sink: ConfigValue, base: Path | None) -> SinkSpec | None:
    """Return the specification of one sink, or None if it has a problem."""
    if not isinstance(sink.value, dict):
        return None
    keys = sink_keys(registry.plugins(registry.SINKS))
    check_fields(sink, keys, is_open=True)
    _check_renames(sink)
    cls = _class_of(sink)
    if cls is None:
        return None
    check_fields(sink, keys, cls.Options)
    options = _options(sink, cls) if sink.is_sound else None
    if options is None:
        return None
    options = resolve_options(options, base)
    given = sink.plain()
    common = {key: given[key] for key in TransformSpec.__struct_fields__ if key in given}
    return SinkSpec(
        name=name,
        make=functools.partial(cls, options),
        kind=given["type"],
        service=cls.service,
        transforms=msgspec.convert(common, TransformSpec),
        on_error=given.get("on_error", "warn"),
        options=_without_defaults(options),
        isolation=given.get("isolation"),
    )


def _without_defaults(options: Options) -> dict[str, Any]:
    """Return options as plain values.

    The name of a sink's cursor depends on them: without defaults, a new option renames no cursor.
    """
    found = {}
    for field in msgspec.structs.fields(options):
        value = getattr(options, field.name)
        factory = field.default_factory
        default = field.default if factory is msgspec.NODEFAULT else factory()
        if value != default:
            found[field.encode_name] = msgspec.to_builtins(value)
    return found


def _class_of(sink: ConfigValue) -> type[Sink] | None:
    item = sink.keys.get("type")
    if item is None:
        for key, child in sink.keys.items():
            if key not in SINK_KEYS and (hint := did_you_mean(key, ["type"])):
                child.reject(f"found an unknown key, expected 'type'{hint}")
    elif item.is_sound:
        try:
            return sink_class(item.value)
        except TrainbusError as error:
            reason = "`trainbus plugins` says why it can't" if item.hidden else _line(error)
            item.reject(f"found {item.found()}, expected a sink that loads: {reason}")
    return None


def _check_renames(sink: ConfigValue) -> None:
    rename = sink.keys.get("rename")
    taken: dict[str, str] = {}
    for old, new in rename.keys.items() if rename and rename.is_sound else ():
        before = taken.setdefault(new.value, old)
        if "*" in new.value and "*" not in old:
            new.reject(f"found {new.found()}, expected no `*`, as its pattern has none")
        elif "*" not in new.value and before != old:
            text = f"found {new.found()} again, expected another name than that of {quoted(before)}"
            new.reject(text)


def _options(sink: ConfigValue, cls: type[Sink]) -> Options | None:
    """Return the sink's own options; each field is already checked."""
    own = {key: item for key, item in sink.keys.items() if key not in SINK_KEYS}
    given = {key: item.plain() for key, item in own.items()}
    reason = _options_error(cls, given)
    if reason is None:
        return msgspec.convert(given, cls.Options)
    # An error that is the same for other values can't contain a hidden value.
    if reason != _options_error(cls, {key: item.plain(masked=True) for key, item in own.items()}):
        reason = "(not shown, as it may contain a hidden value)"
    sink.reject(f"found invalid options: {reason}")
    return None


def _options_error(cls: type[Sink], values: Mapping[str, Any]) -> str | None:
    """Return the error of a sink's options class for these values, None if they are valid."""
    try:
        msgspec.convert(values, cls.Options)
    except Exception as error:
        return _line(error.__cause__ or error)
    return None


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _text(name: str) -> str:
    """Return the content of the file."""
    line = 0
    try:
        with open(name, "rb") as file:
            data = file.read(_MAX_BYTES + 1)
        if len(data) <= _MAX_BYTES:
            return data.decode("utf-8-sig")
        text = "found more than 1 MiB, expected a smaller file"
    except FileNotFoundError:
        text = _no_such_file(name)
    except IsADirectoryError:
        text = "found a folder, expected a YAML file"
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        text = "found bytes that are not UTF-8, expected a text file in UTF-8"
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        text = f"found a file that can't be read ({reason}), expected a YAML file"
    problems = Problems(name)
    problems.add(text, line=line)
    raise ConfigError(problems.lines())


def _no_such_file(name: str) -> str:
    path = Path(name)
    try:
        folder = path.absolute().parent
        others = [other for other in os.listdir(folder) if other.endswith((".yaml", ".yml"))]
    except OSError:
        return "found no such folder, expected a YAML file in one that exists"
    return f"found no such file in {folder}, expected a YAML file{did_you_mean(path.name, others)}"
