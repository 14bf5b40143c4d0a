"""What the processes of one distributed training know of each other.

Rank 0 has the run. It notes, in the folder of the journals, which run the job belongs to; another
rank that fails finds the run there and writes what happened into a records file of its own. So the
run ends with the error that ended it, and not with the broken connection that rank 0 saw of it.

    trainbus-runs/.jobs/<key>            run and attempt of the job that runs now
    trainbus-runs/<run id>/r1-a1.jsonl   the end of rank 1
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from pathlib import Path

from trainbus.events import ended_by
from trainbus.journal.directory import RunFolder, is_run_id, write_atomically
from trainbus.journal.locks import is_being_written
from trainbus.journal.writer import JournalWriter

_JOBS = ".jobs"


def announce(folder: RunFolder, attempt: int) -> None:
    """Note which run the job of this process belongs to, if it is distributed.

    Raises:
        OSError: it can't be written.
    """
    note = json.dumps({"run": folder.run, "attempt": attempt}).encode()
    for key in _keys():
        write_atomically(folder.path.parent / _JOBS / key, note)


def withdraw(folder: RunFolder) -> None:
    """Take the note of the job away again."""
    for key in _keys():
        path = folder.path.parent / _JOBS / key
        try:
            if json.loads(path.read_bytes())["run"] == folder.run:
                path.unlink()
        except (OSError, ValueError, KeyError, TypeError):
            continue


def report(parents: list[Path], rank: int, error: BaseException, now: float) -> bool:
    """Write what ended this rank into the run of its job; False if there is no such run.

    Raises:
        OSError: it can't be written.
        JournalError: likewise.
    """
    for path in (parent / _JOBS / key for parent in parents for key in _keys()):
        try:
            found = json.loads(path.read_bytes())
            run, attempt = str(found["run"]), int(found["attempt"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
        folder = RunFolder(path.parents[1] / run)
        # A note that an earlier job left behind names an attempt that nobody writes.
        if is_run_id(run) and is_being_written(folder.records(attempt)):
            if folder.records(attempt, rank).exists():
                return True
            journal = JournalWriter(folder, attempt, rank=rank)
            journal.append(ended_by(error), now)
            journal.close()
            return True
    return False


def _keys() -> list[str]:
    """Return what the processes of this job have in common, and other jobs have not."""
    port, parent = os.environ.get("MASTER_PORT"), multiprocessing.parent_process()
    if port is not None:
        parts = [os.environ.get("MASTER_ADDR"), port, os.environ.get("TORCHELASTIC_RUN_ID")]
    elif parent is not None:  # spawned side by side, and set up without a launcher's variables
        parts = [str(parent.pid)]
    else:
        return []
    return [hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]]
