"""Removes secrets from events before they are written or passed on.

A secret is recognized by its name (`api_key`, `--password`, `HF_TOKEN=`) or by its own format
(`ghp_…`, a JWT, a password in a URL). A reference to a secret is kept: a path, the name of a
variable, a placeholder. No value makes this raise; one that can't be examined is removed.
"""

from __future__ import annotations

import re
from functools import lru_cache
from itertools import chain
from typing import Any

import msgspec

from trainbus import events
from trainbus.redaction.names import (
    ANY,
    NONE,
    PASSWORD,
    TOKEN,
    is_secret,
    kind_of,
    looks_random,
    named,
    squash,
)
from trainbus.redaction.patterns import REDACTED, may_contain_secret, text

__all__ = ["REDACTED", "event", "params", "text"]

_MAX_DEPTH = 20  # more than normalize leaves

# The fields that are examined: values, which may be secret by name or format, and names, which may
# contain a secret. Paths are not redacted, as sinks have to open them.
_VALUES: dict[type[Any], tuple[str, ...]] = {
    events.RunStarted: ("name", "project", "group", "job_type", "tags", "notes", "task", "params"),
    events.ParamsUpdated: ("params",),
    events.ImageLogged: ("caption",),
    events.TextLogged: ("text",),
    events.TableLogged: ("rows",),
    events.CheckpointSaved: ("metadata",),
    events.ArtifactLogged: ("metadata",),
    events.AlertRaised: ("title", "text"),
    events.EnvironmentDescribed: ("command", "scheduler", "git"),
    events.GitState: ("branch", "remote", "diff"),
    events.ConsoleLogged: ("text",),
    events.RunEnded: ("reason", "error", "best"),
    events.Failure: ("message", "traceback"),
}
_NAMES: dict[type[Any], tuple[str, ...]] = {
    events.RunStarted: ("goals",),
    events.ModelDescribed: ("speed_ms", "classes", "extra"),
    events.MetricsLogged: ("values", "phase"),
    events.ImageLogged: ("key",),
    events.CurveLogged: ("key", "title", "x_label", "y_label", "classes"),
    events.ConfusionMatrixLogged: ("key", "classes"),
    events.TableLogged: ("key", "columns"),
    events.HistogramLogged: ("key",),
    events.TextLogged: ("key",),
    events.CheckpointSaved: ("metrics",),
    events.ArtifactLogged: ("name", "kind", "aliases"),
    events.Best: ("metric",),
}
# Commands with secret arguments that have no name.
_COMMANDS = {"curl", "docker", "login", "mysql", "sshpass"}
_FLAG = re.compile(r"--?([A-Za-z][\w./-]*)(=|\Z)")


def params(values: Any, keys: frozenset[str] = frozenset()) -> Any:
    """Return plain nested data with secrets replaced; the same object if there are none.

    Any value whose name is in `keys` is replaced; case and punctuation of the name are ignored.
    """
    return _walk(values, frozenset(map(squash, keys)), NONE, 0)


def event(value: Any, keys: frozenset[str] = frozenset()) -> Any:
    """Return the event with secrets replaced in params, texts and names; the same if none."""
    kind = type(value)
    if kind is events.MetricsLogged and not has_secret((value.phase, *value.values)):
        return value
    names = frozenset(map(squash, keys))
    changed: dict[str, Any] = {}
    for field in (*_VALUES.get(kind, ()), *_NAMES.get(kind, ())):
        old = getattr(value, field)
        try:
            if field in ("error", "best", "git"):
                new = event(old, keys)
            elif field in _NAMES.get(kind, ()):
                new = _in_names(old)
            else:
                new = _field(value, field, old, names)
        except Exception:  # not a normalized event
            new = REDACTED
        if new is not old:
            changed[field] = new
    return msgspec.structs.replace(value, **changed) if changed else value


@lru_cache(maxsize=256)
def has_secret(names: tuple[str, ...]) -> bool:
    """Return whether metric names contain a secret; cached, as they rarely change."""
    return any(text(name) is not name for name in names)


def _in_names(old: Any) -> Any:
    """Return a name, a list of names, or a dict, with secrets in the names replaced."""
    if isinstance(old, str):
        return text(old)
    if isinstance(old, list):
        new = [text(name) for name in old]
        return old if all(a is b for a, b in zip(new, old, strict=True)) else new
    if isinstance(old, dict):
        found: dict[Any, Any] = {}
        for name, item in old.items():
            found[_unique(text(name), name, found)] = item
        return old if all(a is b for a, b in zip(found, old, strict=True)) else found
    return old


def _unique(clean: Any, name: Any, taken: dict[Any, Any]) -> Any:
    """Return a redacted name, made different from the names in `taken`."""
    while clean is not name and clean in taken:
        clean += "*"
    return clean


def _field(value: Any, field: str, old: Any, keys: frozenset[str]) -> Any:
    if field == "rows":  # a secret is recognized by its column, or by the cell before it
        return _rows(old, [named(column, keys) for column in value.columns], keys)
    kind = named(value.key, keys) if type(value) is events.TextLogged else NONE
    if not kind and not value_may_contain_secret(old, keys):
        return old
    return _walk(old, keys, kind, 0)


def _rows(old: list[Any], kinds: list[int], keys: frozenset[str]) -> list[Any]:
    """Return the rows of a table with secrets replaced; only suspicious rows are examined."""
    suspicious: set[str] | None = None
    if not any(kinds) and (texts := _cells(old)) is not None:
        if not value_may_contain_secret(list(texts), keys):
            return old
        suspicious = {
            cell for cell in texts if value_may_contain_secret(cell, keys) or named(cell, keys)
        }
    new = [
        row
        if suspicious is not None and suspicious.isdisjoint(row)
        else _list(row, keys, NONE, 0, "", kinds)
        for row in old
    ]
    return old if all(a is b for a, b in zip(old, new, strict=True)) else new


def _cells(rows: list[Any]) -> set[str] | None:
    """Return the distinct strings in a table; None if a cell is a container."""
    kinds = set(map(type, chain.from_iterable(rows)))
    if not kinds <= {str, float, int, bool, type(None)}:
        return None
    return {cell for row in rows for cell in row if type(cell) is str} if str in kinds else set()


def value_may_contain_secret(value: Any, keys: frozenset[str]) -> bool:
    """Return whether a value may contain a secret; a fast check in one scan."""
    texts: list[str] = []
    _gather(value, texts, 0)
    whole = "\n".join(texts)
    if keys:
        squashed = squash(whole)
        if any(key in squashed for key in keys):
            return True
    return bool(whole) and may_contain_secret(whole)


def _gather(value: Any, texts: list[str], depth: int) -> None:
    if isinstance(value, str):
        texts.append(value)
    elif isinstance(value, dict | list | tuple):
        if depth > _MAX_DEPTH:
            raise ValueError("nested too deeply to examine")
        for item in value:
            _gather(item, texts, depth + 1)
        if isinstance(value, dict):
            for item in value.values():
                _gather(item, texts, depth + 1)


def _walk(value: Any, keys: frozenset[str], kind: int, depth: int, name: Any = "") -> Any:
    """Return a value with secrets replaced; `kind` is what its name says about it."""
    try:
        if kind == ANY:
            return REDACTED
        if isinstance(value, str):
            new = REDACTED if is_secret(kind, value) else text(value)
            return REDACTED if new is not value and is_secret(kind, new) else new
        if isinstance(value, dict | list | tuple):
            if depth > _MAX_DEPTH:
                return REDACTED
            if isinstance(value, dict):
                return _dict(value, keys, kind, depth + 1, name)
            return _list(value, keys, kind, depth + 1, name, [])
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return REDACTED if number and kind == PASSWORD else value
    except Exception:  # not plain data
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
        clean = _unique(clean, key, new)
        new[clean] = _walk(old, keys, here, depth, key)
        same = same and clean is key and new[clean] is old
    return value if same else new


def _list(
    value: Any, keys: frozenset[str], kind: int, depth: int, name: Any, columns: list[int]
) -> Any:
    new: list[Any] = []
    before = NONE  # what the previous item, a flag or the name in a pair, says about this one
    login = False
    value, given = _command(value), value
    for index, old in enumerate(value):
        here = max(kind, columns[index] if index < len(columns) else NONE)
        flag = _FLAG.match(old) if isinstance(old, str) else None
        if flag:
            following = named(flag[1], keys)
            mine = following == ANY and flag[2]
            new.append(flag[0] + REDACTED if mine else _walk(old, keys, here, depth, name))
            before = NONE if flag[2] else following
        elif login and isinstance(old, str) and len(old) >= 20 and looks_random(TOKEN, old):
            new.append(REDACTED)  # of `["login", KEY]`
            login = False
        else:
            new.append(_walk(old, keys, max(here, before), depth, name))
            login = old == "login" if isinstance(old, str) else False
            before = NONE
            if index == 0 and len(value) == 2:
                following = named(old, keys)
                is_sure = following == ANY or looks_random(following, str(value[1]))
                before = following if is_sure else NONE
    return given if all(a is b for a, b in zip(new, given, strict=True)) else new


def _command(items: Any) -> Any:
    """Return the arguments of a command, with those replaced that only the command makes secret."""
    if not all(isinstance(item, str) for item in items) or _COMMANDS.isdisjoint(items):
        return items
    pieces = [item.replace(" ", "\0") for item in items]
    clean = text(" ".join(pieces)).split(" ")
    if len(clean) != len(pieces):
        return items
    pairs = zip(items, pieces, clean, strict=True)
    return [item if a == b else b.replace("\0", " ") for item, a, b in pairs]
