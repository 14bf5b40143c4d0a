"""A run of SwanLab's in this process: begun and ended so that nothing of it stays behind."""

from __future__ import annotations

import os
import queue
import re
import shlex
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from trainbus.errors import SinkError
from trainbus.interfaces import RunInfo
from trainbus.toolkit.sinks import folder_of

from ._options import SwanlabOptions
from ._values import valid_text

_STATES: dict[str, Any] = {"finished": "success", "failed": "crashed", "stopped": "aborted"}
_MOST_WAITING = 1_000
_COLLECTED = ("hardware", "runtime", "requirements", "conda", "git", "swanlab", "monitor")


def begin(options: SwanlabOptions, run: RunInfo) -> Any:
    """Start a run of SwanLab's, or one that goes on with the run of the same id.

    Raises:
        SinkError: SwanLab refuses to start it, or has one open in this process.
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
        # SwanLab takes over Ctrl-C where it starts in the main thread.
        with _hook_kept(), ThreadPoolExecutor(1) as thread:
            return thread.submit(_init, options, run).result()
    except Exception as error:  # SwanLab's own errors have no common class
        advice = "run `swanlab login`, set SWANLAB_API_KEY, or set `mode: offline`"
        is_key = "API key" in str(error) or "login" in str(error)
        text = f"SwanLab can't start the run ({' '.join(str(error).split())}); "
        text += advice if is_key else "check `logdir` and the network, or set `mode: offline`"
        raise SinkError(text, retry=isinstance(error, OSError) and not is_key) from error


def bound(run: Any) -> None:
    """Have a run take no more than its thread can write; SwanLab would keep 100,000 values."""
    emitter = getattr(getattr(run, "_components", None), "emitter", None)
    waiting = getattr(emitter, "queue", None)
    if isinstance(waiting, queue.Queue):
        waiting.maxsize = _MOST_WAITING


def finish(run: Any, status: str, error: str | None) -> None:
    """End a run as the training ended, with its error unless that finished."""
    text = None if status == "finished" else valid_text(error or status)
    watcher = getattr(getattr(getattr(run, "_ctx", None), "core", None), "_watcher", None)
    observer = getattr(watcher, "_observer", None)
    try:
        with _hook_kept():
            run.finish(state=_STATES[status], error=text)
    finally:
        # It has a thread and an inotify instance, of which a user may have 128, since it was made;
        # SwanLab stops it only where there were files to look after.
        if observer is not None and not observer.is_alive():
            observer.stop()


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


def _init(options: SwanlabOptions, run: RunInfo) -> Any:
    import swanlab

    started, settings = run.started, swanlab.Settings
    default = None if run.base is None else os.path.join(run.base, "swanlog")
    folder = options.logdir or (None if "SWANLAB_LOG_DIR" in os.environ else default)
    return swanlab.init(
        mode="online" if options.mode == "cloud" else options.mode,
        log_dir=str(folder_of(folder, run.id)) if folder else None,
        workspace=options.workspace,
        project=options.project or _project(started.project),
        name=_cut(started.name),
        description=_cut(started.notes, 1024),
        group=_cut(started.group),
        job_type=_cut(started.job_type),
        tags=[valid_text(tag)[:512] for tag in started.tags[:30]] or None,
        id=re.sub(r'[<>:"/\\|?*#%\x00-\x1f\x7f]', "-", valid_text(run.id))[:512],
        resume="allow",
        settings=settings(
            interactive=False,
            terminal=settings.Terminal(proxy_type="none"),
            probe=settings.Probe(**dict.fromkeys(_COLLECTED, False)),
        ),
    )


def _project(name: str | None) -> str:
    return re.sub(r"[^0-9a-zA-Z_+.-]", "-", name or "")[:100] or "trainbus"


def _cut(text: str | None, longest: int = 512) -> str | None:
    return valid_text(text or "")[:longest] or None


@contextmanager
def _hook_kept() -> Iterator[None]:
    """Keep SwanLab from changing what this process does with an exception that ends it."""
    hook = sys.excepthook
    try:
        yield
    finally:
        sys.excepthook = hook
