"""What the checks of one suite share: a folder, and the results that are expensive to get."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


class Scratch:
    """A folder that lasts as long as the process, and a memory for what was computed in it."""

    def __init__(self) -> None:
        self._folder: Path | None = None
        self._known: dict[str, Any] = {}

    @property
    def folder(self) -> Path:
        """The folder; it is made when it is first asked for, and removed at exit."""
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="trainbus-conformance-"))
            atexit.register(shutil.rmtree, self._folder, ignore_errors=True)
        return self._folder

    def once(self, name: str, compute: Callable[[Path], T]) -> T:
        """Return what `compute` returned for a folder of this name; it is called only once."""
        if name not in self._known:
            self._known[name] = compute(self.folder / name)
        found: T = self._known[name]
        return found
