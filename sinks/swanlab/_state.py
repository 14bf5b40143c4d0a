"""Where a run stands, kept beside SwanLab's files: these can't be continued, nor asked."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from trainbus.interfaces import RunInfo

_CLOSED = "trainbus-closed.json"
_OPEN = "trainbus-open-"


class State(msgspec.Struct):
    """What the next file of a run has to know of those before."""

    run: str
    taken: tuple[int, int]
    config: dict[str, Any]
    steps: dict[str, int]
    """The last step of each key."""
    axes: dict[str, str]
    """Whether a key has values of steps or of epochs."""
    at: int = 0
    """Where the last metric stands."""


def begin(folder: Path | None, run: RunInfo) -> State:
    """Return where a run stands, and mark its new folder as open.

    What SwanLab took before it was killed may be on disk in part, and comes again, as a whole: the
    folder of this attempt that was cut short is set aside.

    Args:
        folder: where SwanLab writes; None for a run that is nowhere.
        run: the run that goes on there.
    """
    new = State(run.id, (0, 0), {}, {}, {})
    if folder is None:
        return new
    state = max(_before(folder, run), key=lambda state: state.taken, default=new)
    (folder / f"{_OPEN}{run.attempt}").write_text(run.id, "utf-8")
    return state


def close(folder: Path, state: State) -> None:
    """Keep where the run stands, once everything up to there is in SwanLab's file."""
    partial = folder / f"{_CLOSED}.part"
    partial.write_bytes(msgspec.json.encode(state))
    partial.replace(folder / _CLOSED)
    for mark in folder.glob(f"{_OPEN}*"):
        mark.unlink()


def _before(folder: Path, run: RunInfo) -> list[State]:
    found: list[State] = []
    own = [file.name for file in folder.glob("run-*.swanlab")]
    for other in folder.parent.glob("run-*"):
        closed, mark = other / _CLOSED, other / f"{_OPEN}{run.attempt}"
        if not any((other / name).exists() for name in own):
            continue
        with suppress(OSError, ValueError):  # one that can't be read tells nothing
            if closed.exists():
                found.append(msgspec.json.decode(closed.read_bytes(), type=State))
            elif run.reopened and mark.exists() and mark.read_text("utf-8") == run.id:
                other.rename(other.with_name(f"incomplete-{other.name}"))
    return [state for state in found if state.run == run.id]  # names of files tell less
