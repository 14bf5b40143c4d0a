"""DVCLive's files: a writer that continues a folder, and the names of files and metrics in it."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from trainbus.toolkit.sinks import Names, required_package, x_position

logger = logging.getLogger("trainbus.sinks.dvclive")

_RESERVED = ("", ".", "..", "step", "timestamp")
"""Parts of names that have another meaning for DVCLive."""


def open_live(folder: Path, dvcyaml: Path | None) -> tuple[Any, dict[str, Any]]:
    """Return DVCLive's writer, at the last step of the folder, and the folder's parameters.

    The writer changes no repository and sends nothing.

    Args:
        folder: folder of the files; it is created if necessary.
        dvcyaml: the file that tells DVC how to draw the plots; None for none.

    Raises:
        MissingPackageError: dvclive is not installed.
        OSError: the folder can't be written.
    """
    with required_package("dvclive"):
        from dvclive import Live
        from dvclive.serialize import load_yaml

    class FilesOnly(Live):  # type: ignore[misc]
        def _init_dvc(self) -> None:  # else DVCLive runs `dvc init` in a Git repository
            self._dvc_file = self._init_dvc_file()

        def _init_studio(self) -> None:
            self._studio_events_to_skip = {"start", "data", "done"}

    params = folder / "params.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    _remove_torn(folder / "metrics.json", lambda path: json.loads(path.read_bytes()))
    _remove_torn(params, load_yaml)
    named = None if dvcyaml is None else str(dvcyaml)
    live = FilesOnly(str(folder), resume=True, save_dvc_exp=False, dvcyaml=named)
    live.step = live.read_step()
    return live, load_yaml(params) if params.exists() else {}


def _remove_torn(path: Path, load: Callable[[Path], Any]) -> None:
    """Remove a file that a crash truncated: DVCLive can't continue it, but writes a new one."""
    try:
        if path.exists() and not isinstance(load(path), dict):
            path.unlink()
    except OSError:
        raise
    except Exception:  # the errors of a YAML parser have no common class
        path.unlink()
        logger.warning("%s is truncated; writing it anew", path)


class FileNames:
    """Names of a run's metrics and files; different names stay different."""

    def __init__(self) -> None:
        self._names, self._dotless = Names(_clean), Names(lambda name: _clean(name, dot="_"))
        self._nested = Names(lambda name: name.replace("/", "_") + "_")

    def metric(self, name: str, summary: Mapping[str, Any]) -> str:
        """Return the name in metrics.json, where `a/b` is nested in `a`, which can't be a number.

        Args:
            name: name of the metric.
            summary: content of metrics.json.
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
        """Return a path without dots, to which a suffix can be added."""
        return self._dotless(name)

    def slide(self, event: Any) -> str:
        """Return the path of an event's file; DVC shows a slider for files in one folder."""
        name = self.file(event.key)
        return name if event.step is None and event.epoch is None else f"{name}/{x_position(event)}"


def _clean(name: str, dot: str = ".") -> str:
    """Return a name that is a relative path and has no part that is reserved by DVCLive."""
    parts = [re.sub(r"[^\w.()\[\]=@+ -]", "_", part)[:60] for part in name.split("/")]
    name = "/".join(f"{p}_" if p in _RESERVED or p.endswith(".tsv") else p for p in parts)
    return name.replace(".", dot)
