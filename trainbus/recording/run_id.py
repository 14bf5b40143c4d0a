"""Determines the run id and attempt of a training.

The id is stored in a file in the training's save directory, so that a resumed training finds it,
even if the directory has been moved.
"""

from __future__ import annotations

import json
import logging
import re
import secrets
import time
from pathlib import Path

from trainbus.events import RunStarted
from trainbus.journal.directory import is_run_id, run_id

logger = logging.getLogger("trainbus")

MARKER = ".trainbus.json"
"""File in a run's save directory that names the run, for a resumed training to find."""

_MAX_ATTEMPT = 10**5


def identify(event: RunStarted) -> tuple[str, int]:
    """Return the run id, and the lowest possible number of this attempt, from 1."""
    if event.resumed is not None:
        marked, attempt = _marked(event.save_dir)
        if marked is None:
            marked, attempt = _marked(event.resumed.save_dir)
        known = event.resumed.run or marked
        if known:
            return run_id(known), attempt + 1 if known == marked else 2
        logger.warning("a resumed training starts a new run: %s", _missing(event))
    stem = re.sub(r"[^A-Za-z0-9._-]+", "_", event.name or "run").strip("._-")[:64] or "run"
    # Not `random`, which trainers seed; and two trainings can start within one second.
    return f"{stem}_{time.strftime('%Y%m%d_%H%M%S')}_{secrets.token_hex(3)}", 1


def _missing(event: RunStarted) -> str:
    """Return why the run of a resumed training was not found."""
    resumed = event.resumed.save_dir if event.resumed else None
    folders = dict.fromkeys(folder for folder in (event.save_dir, resumed) if folder is not None)
    if not folders:
        return "the framework reports no save directory, of neither this nor the earlier training"
    return f"found no {MARKER}, which names the run, in {' or in '.join(folders)}"


def mark(save_dir: str, run: str, attempt: int) -> None:
    """Store in a save directory which run it belongs to.

    Raises:
        OSError: the file can't be written.
        ValueError: the path is not valid.
    """
    folder = Path(save_dir)
    folder.mkdir(parents=True, exist_ok=True)
    marker = json.dumps({"run": run, "attempt": attempt})
    (folder / MARKER).write_text(marker + "\n", encoding="utf-8")


def _marked(save_dir: str | None) -> tuple[str | None, int]:
    """Return the run that a save directory belongs to, and its last attempt."""
    if save_dir is None:
        return None, 0
    try:
        found = json.loads((Path(save_dir) / MARKER).read_text(encoding="utf-8"))
        run, attempt = str(found["run"]), int(found["attempt"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None, 0
    return (run, attempt) if is_run_id(run) and 0 <= attempt < _MAX_ATTEMPT else (None, 0)
