"""Writes an HTML page that compares several runs: `trainbus compare`.

Each run is a run's directory, which is only read, or a page of the `html` sink.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from trainbus import registry
from trainbus.errors import PluginError
from trainbus.events import RunStarted
from trainbus.interfaces import RunInfo, Sink
from trainbus.journal.directory import RunFolder
from trainbus.journal.file_access import FileResolver
from trainbus.journal.reader import RunReader

_PAGE = "html"
_DATA = "data.json"


def compare(folders: Sequence[Path], out: Path, trusted: Sequence[str] = ()) -> Path:
    """Write a page with the metrics, parameters and results of several runs.

    Args:
        folders: directories of runs, or pages of the `html` sink.
        out: folder for the new page.
        trusted: folders outside of the runs' directories whose files may be shown.

    Returns:
        The path of the page's `index.html`.

    Raises:
        JournalError: a directory is not that of a run, or can't be read.
        SinkError: a page can't be read or written.
        PluginError: the `html` sink is not installed.
    """
    cls = registry.sink_class(_PAGE)
    write: Any = getattr(sys.modules[cls.__module__], "compare", None)
    if write is None:
        raise PluginError(f"the sink {_PAGE!r} ({cls.__module__}) can't compare runs")
    with tempfile.TemporaryDirectory(prefix="trainbus-") as temporary:
        pages = [
            folder
            if (folder / _DATA).exists()
            else _page(cls, RunFolder.existing(folder), Path(temporary), trusted)
            for folder in folders
        ]
        found: Path = write(pages, out)
        return found


def _page(cls: type[Sink], folder: RunFolder, into: Path, trusted: Sequence[str]) -> Path:
    sink = cls(msgspec.convert({"dir": f"{into}/{{run}}"}, cls.Options))
    files, reader = FileResolver(folder, trusted), RunReader(folder)
    started, attempt = RunStarted(), 0
    try:
        while entries := reader.read():
            records = [files.resolve(entry) for entry in entries]
            first = records[0]
            if first.attempt != attempt:
                sink.close()
                attempt = first.attempt
                started = first.event if isinstance(first.event, RunStarted) else started
                sink.open(RunInfo(id=folder.run, started=started, attempt=attempt))
            sink.write(records)
    finally:
        sink.close()
        reader.close()
    return into / folder.run
