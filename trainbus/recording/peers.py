"""Connects the processes of a distributed training, so that a run ends with the actual error.

Only rank 0 records the run. It stores the run id of the job in the folder of the journals. Another
rank that fails finds the run there and writes its error to its own records file. The run then ends
with that error, and not with the lost connection that rank 0 saw.

    trainbus-runs/.jobs/<key>            run and attempt of the current job
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
    """Store the run of this process's job for other ranks, if the job is distributed.

    Raises:
        OSError: the note can't be written.
    """
    note = json.dumps({"run": folder.run, "attempt": attempt}).encode()
    for key in _keys():
        write_atomically(folder.path.parent / _JOBS / key, note)


def withdraw(folder: RunFolder) -> None:
    """Delete the note of the job."""
    for key in _keys():
        path = folder.path.parent / _JOBS / key
        try:
            if json.loads(path.read_bytes())["run"] == folder.run:
                path.unlink()
        except (OSError, ValueError, KeyError, TypeError):
            continue


def report(parents: list[Path], rank: int, error: BaseException, now: float) -> bool:
    """Record the error that ended this rank in the run of its job; False if there is none.

    Raises:
        OSError: the record can't be written.
        JournalError: the records file can't be created.
    """
    for path in (parent / _JOBS / key for parent in parents for key in _keys()):
        try:
            found = json.loads(path.read_bytes())
            run, attempt = str(found["run"]), int(found["attempt"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
        folder = RunFolder(path.parents[1] / run)
        # The note of an earlier job names an attempt that no process is writing.
        if is_run_id(run) and is_being_written(folder.records(attempt)):
            if folder.records(attempt, rank).exists():
                return True
            journal = JournalWriter(folder, attempt, rank=rank)
            journal.append(ended_by(error), now)
            journal.close()
            return True
    return False


def _keys() -> list[str]:
    """Return a key that is the same in all processes of this job, and unique to it."""
    port, parent = os.environ.get("MASTER_PORT"), multiprocessing.parent_process()
    if port is not None:
        parts = [os.environ.get("MASTER_ADDR"), port, os.environ.get("TORCHELASTIC_RUN_ID")]
    elif parent is not None:  # spawned by one parent, without the variables of a launcher
        parts = [str(parent.pid)]
    else:
        return []
    return [hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]]
