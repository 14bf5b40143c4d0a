"""Makes paths absolute, so that they name the same file in every process and at any time.

A training can change its working directory, and another process can reopen a sink. Relative paths
in events are resolved when they are logged, those in options when the bus is created.
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
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


def with_absolute_paths(event: Event) -> Event:
    """Return the event with paths that do not depend on the working directory.

    URLs such as `s3://…` are left unchanged. So are relative paths if the working directory was
    deleted: `is_absolute` is False for them.
    """
    if type(event) not in _WITH_PATHS:  # nearly all events
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
    """Return whether a path is absolute or a URL."""
    return os.path.isabs(path) or _URL.match(path) is not None


def _absolute(path: Any) -> Any:
    if not path or is_absolute(path):
        return path
    try:
        # `..` is kept: after a symbolic link, the path without it is another one.
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
    """Return a path as an absolute path.

    URIs are left unchanged, and so are paths that can't be resolved: the home folder of an unknown
    user, or a relative path if the working directory was deleted. Opening them then fails.

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
    """Return a sink's options with every `FilePath` absolute; other objects are left unchanged."""
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
