"""Makes the paths in events absolute: they name the same file in every process and at any time."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from trainbus.events import ArtifactLogged, CheckpointSaved, Event, ImageLogged, RunStarted

T = TypeVar("T", bound=msgspec.Struct)

_WITH_PATHS = frozenset({RunStarted, ImageLogged, CheckpointSaved, ArtifactLogged})
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


def located(event: Event) -> Event:
    """Return an event whose paths do not depend on the working directory.

    Addresses such as `s3://…` stay as they are. So do paths for which no working directory can be
    found, because it was deleted: `is_located` is False for them.
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


def is_located(path: str) -> bool:
    """Return whether a path is the same in every working directory."""
    return os.path.isabs(path) or _ADDRESS.match(path) is not None


def _absolute(path: Any) -> Any:
    if not path or is_located(path):
        return path
    try:
        # `..` is kept: behind a link it leads elsewhere than the text says.
        return str(Path(path).absolute())
    except (OSError, ValueError):
        return path


def _replaced(found: T, **fields: Any) -> T:
    return msgspec.structs.replace(found, **fields)
