"""Takes secrets out of events before they are written or handed to anybody.

A secret is known by the name it stands under (`api_key`, `--password`, `HF_TOKEN=`) or by its own
shape (`ghp_…`, a JWT, a password in a URL). What only says where a secret lies stays: a path, the
name of a variable, a placeholder. Nothing here raises on a value; what can't be looked at goes.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

from trainbus import events
from trainbus.secretnames import ANY, NONE, PASSWORD, hides, is_odd, kind_of, named, squash
from trainbus.secrettexts import REDACTED, text

__all__ = ["REDACTED", "event", "params", "text"]

_MAX_DEPTH = 20  # more than normalize leaves
_TEXTS: dict[type[Any], tuple[str, ...]] = {
    events.RunStarted: ("name", "project", "group", "job_type", "tags", "notes", "task", "params"),
    events.ParamsUpdated: ("params",),
    events.ImageLogged: ("caption",),
    events.TextLogged: ("text",),
    events.TableLogged: ("rows",),
    events.CheckpointSaved: ("metadata",),
    events.ArtifactLogged: ("metadata",),
    events.AlertRaised: ("title", "text"),
    events.RunEnded: ("reason", "error"),
    events.Failure: ("message", "traceback"),
}

_FLAG = re.compile(r"--?([A-Za-z][\w./-]*)(=|\Z)")


def params(values: Any, keys: frozenset[str] = frozenset()) -> Any:
    """Return plain nested data with secrets replaced; the same object if there are none.

    What stands under a name of `keys`, however it is written, is replaced whatever it is.
    """
    return _walk(values, frozenset(map(squash, keys)), NONE, 0)


def event(value: Any, keys: frozenset[str] = frozenset()) -> Any:
    """Return the event with secrets replaced in its params and texts; the same one if none."""
    fields = _TEXTS.get(type(value))
    if fields is None:
        return value
    names = frozenset(map(squash, keys))
    changed: dict[str, Any] = {}
    for field in fields:
        old = getattr(value, field)
        try:
            new = event(old, keys) if field == "error" else _field(value, field, old, names)
        except Exception:  # not normalised, and not to be trusted
            new = REDACTED
        if new is not old:
            changed[field] = new
    return msgspec.structs.replace(value, **changed) if changed else value


def _field(value: Any, field: str, old: Any, keys: frozenset[str]) -> Any:
    if field == "rows":  # in which a secret is known by its column, or by the cell before it
        kinds = [named(column, keys) for column in value.columns]
        new = [_list(row, keys, NONE, 0, "", kinds) for row in old]
        return old if all(a is b for a, b in zip(old, new, strict=True)) else new
    kind = named(value.key, keys) if type(value) is events.TextLogged else NONE
    return _walk(old, keys, kind, 0)


def _walk(value: Any, keys: frozenset[str], kind: int, depth: int, name: Any = "") -> Any:
    """Return a value that stands under a name, of which `kind` is said, with secrets replaced."""
    try:
        if kind == ANY:
            return REDACTED
        if isinstance(value, str):
            new = REDACTED if hides(kind, value) else text(value)
            return REDACTED if new is not value and hides(kind, new) else new
        if isinstance(value, dict | list | tuple):
            if depth > _MAX_DEPTH:
                return REDACTED
            if isinstance(value, dict):
                return _dict(value, keys, kind, depth + 1, name)
            return _list(value, keys, kind, depth + 1, name, [])
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return REDACTED if number and kind == PASSWORD else value
    except Exception:  # not plain, and not to be trusted
        return REDACTED


def _dict(value: dict[Any, Any], keys: frozenset[str], kind: int, depth: int, name: Any) -> Any:
    new: dict[Any, Any] = {}
    same = True
    login = not {"user", "username", "login"}.isdisjoint(value)
    for key, old in value.items():
        clean = text(key) if isinstance(key, str) else key
        here = max(kind, named(key, keys), named(clean, keys))
        if key in ("pass", "key"):  # of {"username": …, "key": …} or {"wandb": {"key": …}}
            here = max(here, kind_of(f"login_{key}" if login else f"{name}_{key}"[-80:]))
        elif key == "value":  # of {"name": "WANDB_API_KEY", "value": …}
            here = max(here, named(value.get("name", value.get("key")), keys))
        while clean is not key and clean in new:
            clean += "*"
        new[clean] = _walk(old, keys, here, depth, key)
        same = same and clean is key and new[clean] is old
    return value if same else new


def _list(
    value: Any, keys: frozenset[str], kind: int, depth: int, name: Any, columns: list[int]
) -> Any:
    new: list[Any] = []
    before = NONE  # what the item before says of this one, being a flag or the name in a pair
    for index, old in enumerate(value):
        here = max(kind, columns[index] if index < len(columns) else NONE)
        flag = _FLAG.match(old) if isinstance(old, str) else None
        if flag:
            said = named(flag[1], keys)
            mine = said == ANY and flag[2]
            new.append(flag[0] + REDACTED if mine else _walk(old, keys, here, depth, name))
            before = NONE if flag[2] else said
        else:
            new.append(_walk(old, keys, max(here, before), depth, name))
            before = NONE
            if index == 0 and len(value) == 2:
                said = named(old, keys)
                before = said if said == ANY or is_odd(said, str(value[1])) else NONE
    return value if all(a is b for a, b in zip(new, value, strict=True)) else new
