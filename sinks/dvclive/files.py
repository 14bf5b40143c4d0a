"""DVCLive's writer for a folder that may have been written before, and cut short by a crash."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainbus.errors import MissingPackageError

logger = logging.getLogger("trainbus.sinks.dvclive")


def open_live(folder: Path, dvcyaml: Path | None) -> tuple[Any, dict[str, Any]]:
    """Return DVCLive's writer, at the step where the folder is, and the folder's parameters.

    What DVCLive does to repositories and the network is left out.

    Args:
        folder: where the files are; it is made if need be.
        dvcyaml: the file that tells DVC how to draw the plots; None for none.

    Raises:
        MissingPackageError: dvclive is not installed.
        OSError: the folder can't be written.
    """
    try:
        from dvclive import Live
        from dvclive.serialize import load_yaml
    except ImportError as error:
        raise MissingPackageError("dvclive", extra="dvclive") from error

    class FilesOnly(Live):  # type: ignore[misc]
        def _init_dvc(self) -> None:  # else `dvc init` is run in a Git repository
            self._dvc_file = self._init_dvc_file()

        def _init_studio(self) -> None:
            self._studio_events_to_skip = {"start", "data", "done"}

    params = folder / "params.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    _drop_torn(folder / "metrics.json", lambda path: json.loads(path.read_bytes()))
    _drop_torn(params, load_yaml)
    named = None if dvcyaml is None else str(dvcyaml)
    live = FilesOnly(str(folder), resume=True, save_dvc_exp=False, dvcyaml=named)
    live.step = live.read_step()
    return live, load_yaml(params) if params.exists() else {}


def _drop_torn(path: Path, load: Callable[[Path], Any]) -> None:
    """Remove a file that a crash cut short: DVCLive could not go on, and writes it anew."""
    try:
        if path.exists() and not isinstance(load(path), dict):
            path.unlink()
    except OSError:
        raise
    except Exception:  # what a YAML parser raises is no one class
        path.unlink()
        logger.warning("%s was cut short, and is written anew", path)
