"""State shared by the checks of one suite: a folder, and results that are expensive to compute."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


class Scratch:
    """A folder that exists until the process exits, and a cache of results computed in it."""

    def __init__(self) -> None:
        self._folder: Path | None = None
        self._known: dict[str, Any] = {}

    @property
    def folder(self) -> Path:
        """The folder; it is created on first use and removed at exit."""
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="trainbus-conformance-"))
            atexit.register(shutil.rmtree, self._folder, ignore_errors=True)
        return self._folder

    def once(self, name: str, compute: Callable[[Path], T]) -> T:
        """Return the result of `compute` for a subfolder of this name; it is called only once."""
        if name not in self._known:
            self._known[name] = compute(self.folder / name)
        found: T = self._known[name]
        return found
