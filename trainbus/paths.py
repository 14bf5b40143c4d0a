"""Makes paths absolute: they name the same file in every process and at any time.

A training may change its working directory at any time, and another process may open a sink again.
Relative paths in events are resolved when they are logged, those in options when a bus is made.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from msgspec import inspect

from trainbus.events import ArtifactLogged, CheckpointSaved, Event, ImageLogged, RunStarted
from trainbus.interfaces import Options

T = TypeVar("T", bound=msgspec.Struct)

_WITH_PATHS = frozenset({RunStarted, ImageLogged, CheckpointSaved, ArtifactLogged})
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


def with_absolute_paths(event: Event) -> Event:
    """Return an event whose paths do not depend on the working directory.

    Addresses such as `s3://…` stay as they are. So do paths for which no working directory can be
    found, because it was deleted: `is_absolute` is False for them.
    """
    if type(event) not in _WITH_PATHS:  # nearly all of them
        return event
    match event:
        case ImageLogged() | CheckpointSaved():
            path = _absolute(event.path)
            return event if path is event.path else _replaced(event, path=path)
        case ArtifactLogged():
            paths = [_absolute(path) for path in event.paths]
            return event if paths == event.paths else _replaced(event, paths=paths)
        case RunStarted():
            folder, resumed = _absolute(event.save_dir), event.resumed
            if resumed is not None:
                resumed = _replaced(resumed, save_dir=_absolute(resumed.save_dir))
            if (folder, resumed) == (event.save_dir, event.resumed):
                return event
            return _replaced(event, save_dir=folder, resumed=resumed)
        case _:
            return event


def is_absolute(path: str) -> bool:
    """Return whether a path is the same in every working directory."""
    return os.path.isabs(path) or _ADDRESS.match(path) is not None


def _absolute(path: Any) -> Any:
    if not path or is_absolute(path):
        return path
    try:
        # `..` is kept: behind a link it leads elsewhere than the text says.
        return str(Path(path).absolute())
    except (OSError, ValueError):
        return path


def _replaced(found: T, **fields: Any) -> T:
    return msgspec.structs.replace(found, **fields)


_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


def working_directory() -> Path | None:
    """Return the working directory, None if it was deleted."""
    try:
        return Path.cwd()
    except OSError:
        return None


def resolved(path: str, base: Path | None) -> str:
    """Return a path as an absolute one.

    A URI stays as it is, and so does what can't be resolved: the home folder of nobody, or a
    relative path where the working directory was deleted. Whoever opens it finds out.

    Args:
        path: the path; `~` is the home folder.
        base: folder that a relative path is relative to; None if there is none.
    """
    if not path or _URI.match(path):
        return path
    path = os.path.expanduser(path)
    if path.startswith("~") or (base is None and not os.path.isabs(path)):
        return path
    return os.path.abspath(os.path.join(base or "", path))


def resolve_options(options: Any, base: Path | None) -> Any:
    """Return a sink's options in which each `FilePath` is absolute; what is no `Options` stays."""
    if not isinstance(options, Options):
        return options
    changed = {}
    for field in inspect.type_info(type(options)).fields:  # type: ignore[attr-defined]
        value = getattr(options, field.name)
        new = _resolve(value, field.type, base)
        if new != value:
            changed[field.name] = new
    return msgspec.structs.replace(options, **changed) if changed else options


def _resolve(value: Any, info: inspect.Type, base: Path | None, *, is_path: bool = False) -> Any:
    match info:
        case inspect.Metadata():
            is_path = is_path or bool((info.extra or {}).get("path"))
            return _resolve(value, info.type, base, is_path=is_path)
        case inspect.UnionType():
            for arm in info.types:
                value = _resolve(value, arm, base, is_path=is_path)
        case inspect.ListType() | inspect.VarTupleType() if isinstance(value, list | tuple):
            return type(value)(_resolve(v, info.item_type, base, is_path=is_path) for v in value)
        case inspect.DictType() if isinstance(value, dict):
            part = info.value_type
            return {k: _resolve(v, part, base, is_path=is_path) for k, v in value.items()}
        case inspect.StrType() if is_path and isinstance(value, str):
            return resolved(value, base)
    return value
