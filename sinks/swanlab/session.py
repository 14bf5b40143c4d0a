"""Starts and finishes a SwanLab run, and keeps its state for the process that continues it."""

from __future__ import annotations

import os
import queue
import re
import shlex
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from trainbus.errors import SinkError
from trainbus.interfaces import RunInfo
from trainbus.toolkit.sinks import folder_of, utf8

if TYPE_CHECKING:
    from . import SwanlabOptions

_STATES: dict[str, Any] = {"finished": "success", "failed": "crashed", "stopped": "aborted"}
_MAX_QUEUED = 1_000
_COLLECTED = ("hardware", "runtime", "requirements", "conda", "git", "swanlab", "monitor")
_CLOSED = "trainbus-closed.json"
_OPEN = "trainbus-open-"


def start(options: SwanlabOptions, run: RunInfo) -> Any:
    """Start a SwanLab run, or continue the one with the same id.

    Raises:
        SinkError: SwanLab can't start it, or has one open in this process.
    """
    import swanlab

    if swanlab.has_run():
        raise SinkError(
            "a SwanLab run is open in this process, and there can be only one; call "
            "swanlab.finish(), or set `isolation: process`"
        )
    if options.mode == "local" and find_spec("swanboard") is None:
        raise SinkError("`mode: local` needs `pip install 'swanlab[dashboard]'`")
    try:
        # In the main thread, SwanLab would replace the handler of Ctrl-C.
        with _excepthook_restored(), ThreadPoolExecutor(1) as thread:
            return thread.submit(_init, options, run).result()
    except Exception as error:  # SwanLab's own errors have no common class
        advice = "run `swanlab login`, set SWANLAB_API_KEY, or set `mode: offline`"
        is_key = "API key" in str(error) or "login" in str(error)
        text = f"SwanLab can't start the run ({' '.join(str(error).split())}); "
        text += advice if is_key else "check `logdir` and the network, or set `mode: offline`"
        raise SinkError(text, retry=isinstance(error, OSError) and not is_key) from error


def _init(options: SwanlabOptions, run: RunInfo) -> Any:
    import swanlab

    started, settings = run.started, swanlab.Settings
    default = None if run.base is None else os.path.join(run.base, "swanlog")
    folder = options.logdir or (None if "SWANLAB_LOG_DIR" in os.environ else default)
    return swanlab.init(
        mode="online" if options.mode == "cloud" else options.mode,
        log_dir=str(folder_of(folder, run.id)) if folder else None,
        workspace=options.workspace,
        project=options.project
        or re.sub(r"[^0-9a-zA-Z_+.-]", "-", started.project or "")[:100]
        or "trainbus",
        name=_shortened(started.name),
        description=_shortened(started.notes, 1024),
        group=_shortened(started.group),
        job_type=_shortened(started.job_type),
        tags=[utf8(tag)[:512] for tag in started.tags[:30]] or None,
        id=re.sub(r'[<>:"/\\|?*#%\x00-\x1f\x7f]', "-", utf8(run.id))[:512],
        resume="allow",
        settings=settings(
            interactive=False,
            terminal=settings.Terminal(proxy_type="none"),
            probe=settings.Probe(**dict.fromkeys(_COLLECTED, False)),
        ),
    )


def _shortened(text: str | None, longest: int = 512) -> str | None:
    return utf8(text or "")[:longest] or None


def limit_queue(run: Any) -> None:
    """Make `log` wait for SwanLab's writer thread, which may fall 100,000 values behind else."""
    emitter = getattr(getattr(run, "_components", None), "emitter", None)
    waiting = getattr(emitter, "queue", None)
    if isinstance(waiting, queue.Queue):
        waiting.maxsize = _MAX_QUEUED


def finish(run: Any, status: str, error: str | None) -> None:
    """Finish a run with the status of the training, and its error unless it finished."""
    text = None if status == "finished" else utf8(error or status)
    watcher = getattr(getattr(getattr(run, "_ctx", None), "core", None), "_watcher", None)
    observer = getattr(watcher, "_observer", None)
    try:
        with _excepthook_restored():
            run.finish(state=_STATES[status], error=text)
    finally:
        # From its creation on, it has a thread and an inotify instance, of which a user may have
        # 128; SwanLab stops it only if there were files to watch.
        if observer is not None and not observer.is_alive():
            observer.stop()


@contextmanager
def _excepthook_restored() -> Iterator[None]:
    """Restore `sys.excepthook`, which SwanLab replaces."""
    hook = sys.excepthook
    try:
        yield
    finally:
        sys.excepthook = hook


def location(run: Any, folder: Path | None) -> str | None:
    """Return the address of a run, or the command that uploads or shows it."""
    match run.mode:
        case "online":
            return str(run.url)
        case "offline":
            return f"swanlab sync --id {shlex.quote(run.id)} {shlex.quote(str(folder))}"
        case "local" if folder is not None:
            return f"swanlab watch {shlex.quote(str(folder.parent))}"
    return None


class State(msgspec.Struct):
    """What the next process has to know of a run: SwanLab's files can't be read back."""

    run: str
    seen: tuple[int, int]
    """Attempt and seq of the last record of the main stream."""
    config: dict[str, Any]
    steps: dict[str, int]
    """The last step of each key."""
    axes: dict[str, str]
    """The axis of each key: `step` or `epoch`."""
    last: int = 0
    """Position of the last metric."""
    streams: dict[str, tuple[int, int]] = {}
    """Attempt and seq of the last record of each other stream, by its source."""

    @property
    def age(self) -> tuple[tuple[int, int], list[tuple[int, int]]]:
        """What grows from one process to the next."""
        return self.seen, sorted(self.streams.values(), reverse=True)


def load_state(folder: Path | None, run: RunInfo) -> State:
    """Return the state of a run, and mark its new folder as open.

    An earlier folder of the same attempt that was not closed, because its process was killed, is
    set aside: its file may be incomplete, and all its records come again.

    Args:
        folder: folder of SwanLab's new file; None if the run is disabled.
        run: the run.
    """
    new = State(run.id, (0, 0), {}, {}, {})
    if folder is None:
        return new
    state = max(_earlier(folder, run), key=lambda state: state.age, default=new)
    (folder / f"{_OPEN}{run.attempt}").write_text(run.id, "utf-8")
    return state


def save_state(folder: Path, state: State) -> None:
    """Save the state of a run, once SwanLab's file has everything up to it."""
    partial = folder / f"{_CLOSED}.part"
    partial.write_bytes(msgspec.json.encode(state))
    partial.replace(folder / _CLOSED)
    for mark in folder.glob(f"{_OPEN}*"):
        mark.unlink()


def _earlier(folder: Path, run: RunInfo) -> list[State]:
    found: list[State] = []
    own = [file.name for file in folder.glob("run-*.swanlab")]
    for other in folder.parent.glob("run-*"):
        closed, mark = other / _CLOSED, other / f"{_OPEN}{run.attempt}"
        if not any((other / name).exists() for name in own):
            continue
        with suppress(OSError, ValueError):  # an unreadable state is no reason to fail
            if closed.exists():
                found.append(msgspec.json.decode(closed.read_bytes(), type=State))
            elif run.reopened and mark.exists() and mark.read_text("utf-8") == run.id:
                other.rename(other.with_name(f"incomplete-{other.name}"))
    return [state for state in found if state.run == run.id]  # different ids can share file names
