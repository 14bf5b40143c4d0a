"""Names as DVCLive's files can have them: a path below a folder, in metrics.json a place there."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from trainbus.toolkit.sinks import Names, x_position

_OWN = ("", ".", "..", "step", "timestamp")
"""Parts of names that mean something else to DVCLive."""


class FileNames:
    """The names that a run's metrics and files get; two that differ stay two."""

    def __init__(self) -> None:
        self._names, self._dotless = Names(_clean), Names(_clean_dotless)
        self._nested = Names(lambda name: name.replace("/", "_") + "_")

    def metric(self, name: str, summary: Mapping[str, Any]) -> str:
        """Return a name for metrics.json, where `a/b` lies in `a`, which can't be a number then.

        Args:
            name: the metric's name.
            summary: what metrics.json holds.
        """
        name = self._names(name)
        *folders, last = name.split("/")
        found: Any = summary
        for part in folders:
            found = found.get(part, {})
            if not isinstance(found, dict):
                return self._nested(name)
        return self._nested(name) if isinstance(found.get(last), dict) else name

    def file(self, name: str) -> str:
        """Return a path without dots, behind which a suffix may be put."""
        return self._dotless(name)

    def slide(self, event: Any) -> str:
        """Return the path of an event's file: what is logged repeatedly gets a slider in DVC."""
        name = self.file(event.key)
        return name if event.step is None and event.epoch is None else f"{name}/{x_position(event)}"


def _clean(name: str) -> str:
    """Return a name that is a path below a folder, and no name that DVCLive uses itself."""
    parts = [re.sub(r"[^\w.()\[\]=@+ -]", "_", part)[:60] for part in name.split("/")]
    return "/".join(f"{p}_" if p in _OWN or p.endswith(".tsv") else p for p in parts)


def _clean_dotless(name: str) -> str:
    return _clean(name).replace(".", "_")
