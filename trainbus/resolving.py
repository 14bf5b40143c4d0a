"""Makes relative paths absolute, once: when a bus is made, not when a path is used.

A training may change its working directory at any time, and a sink may be opened again by another
process. What an option names must be the same place for all of them.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import msgspec
from msgspec import inspect

from trainbus.interfaces import Options

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
