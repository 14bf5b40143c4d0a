"""Files that are kept with a run: copies of them, as SwanLab itself would only link to them."""

from __future__ import annotations

import glob
import logging
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainbus.toolkit.sinks import Names

logger = logging.getLogger("trainbus.sinks.swanlab")


class FileResolver:
    """Copies files into the folder of a run and has SwanLab keep them from there.

    Args:
        run: SwanLab's run.
        folder: its folder.
    """

    def __init__(self, run: Any, folder: Path) -> None:
        self._run = run
        self._base = folder / "trainbus"
        self._names = Names(_folder_name)

    def keep(self, name: str, paths: Sequence[str]) -> int:
        """Keep files and folders below a name.

        Returns:
            How many of them are kept; for the others there is a warning.
        """
        kept, base = 0, self._base / self._names(name)
        for number, path in enumerate(map(Path, paths)):
            is_first = path.name not in [Path(other).name for other in paths[:number]]
            target = base / (path.name if is_first else f"{number}-{path.name}")
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                if path.is_dir():
                    shutil.copytree(path, target, dirs_exist_ok=True)
                else:
                    shutil.copyfile(path, target)
            except OSError as error:
                logger.warning("%r can't be kept in SwanLab: %s", name, error)
                continue
            kept += 1
            for file in [target, *target.rglob("*")]:
                if file.is_file():
                    self._run.save(glob.escape(str(file)), base_path=str(self._base), policy="now")
        return kept


def _folder_name(name: str) -> str:
    """Return a name that leads to no other folder than one of its own."""
    return "/".join(re.sub(r"[^\w.-]|^\.+$", "-", part) or "-" for part in name.split("/"))
