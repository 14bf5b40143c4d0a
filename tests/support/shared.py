"""What tests of several workers look at is made by one of them, once a session."""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest

from trainbus.journal.locks import try_lock

_Made = TypeVar("_Made")
_POLL_S = 0.1


def is_worker(config: pytest.Config) -> bool:
    """Return whether this process is one of the workers that share the tests of a session."""
    return hasattr(config, "workerinput")


def folder(config: pytest.Config, factory: pytest.TempPathFactory) -> Path:
    """Return the folder of this session, which all of its workers share."""
    base = factory.getbasetemp()
    return base.parent if is_worker(config) else base


def once(place: Path, make: Callable[[Path], _Made]) -> _Made:
    """Return what `make` returns for a place; only the first who asks makes it, the others read it.

    Args:
        place: A folder that is not there yet. Beside it lie a lock and what was returned.
        make: Returns what can be pickled.

    Raises:
        AssertionError: `make` raised when another one asked; the text holds the error.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    result = place.with_name(f"{place.name}.pickle")
    with place.with_name(f"{place.name}.lock").open("w") as lock:
        while not try_lock(lock.fileno()):
            time.sleep(_POLL_S)
        if not result.exists():
            try:
                made = make(place)
            except BaseException as error:
                result.write_bytes(pickle.dumps((None, repr(error))))
                raise
            result.write_bytes(pickle.dumps((made, None)))
            return made
    found, error_text = pickle.loads(result.read_bytes())
    assert error_text is None, f"{place.name} could not be made: {error_text}"
    shared: _Made = found
    return shared
