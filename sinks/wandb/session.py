"""Starts, finds and closes the W&B run that a sink feeds."""

from __future__ import annotations

import logging
import os
import shlex
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainbus.errors import SinkError
from trainbus.interfaces import RunInfo
from trainbus.toolkit.sinks import check_folder

from .options import WandbOptions, project_name, run_id, run_name

if TYPE_CHECKING:
    from wandb import Run as WandbRun

logger = logging.getLogger("trainbus.sinks.wandb")

_ATTEMPT = "trainbus-attempt.txt"
"""File in an offline run's folder that says which attempt of the run it holds."""

_EXIT_CODES = {"finished": 0, "failed": 1, "stopped": 255}
"""255 is what wandb itself reports for Ctrl-C."""

_STARTING = threading.Lock()
"""Two runs that start at once would each take itself for the only one."""

_OURS: weakref.WeakSet[WandbRun] = weakref.WeakSet()
"""Runs opened here, told apart only so that a second training does not log into the first one's."""


def check(options: WandbOptions) -> str:
    """Log in, or make sure that the folder of an offline run can be written; return which.

    Raises:
        SinkError: W&B knows no such login, can't be reached, or the folder can't be written.
    """
    import wandb

    mode = options.mode or os.environ.get("WANDB_MODE", "online")
    if mode in ("offline", "disabled"):
        folder = check_folder(options.dir) if options.dir else "nothing to log in to"
        return f"{mode}, {folder}"
    try:
        user = wandb.Api(timeout=10).viewer.username
    except (wandb.Error, OSError, ValueError) as error:
        raise SinkError(
            f"W&B can't be used ({error}); run `wandb login`, set WANDB_API_KEY, check the "
            "network, or set `mode: offline`"
        ) from error
    return f"logged in as {user}"


def is_users(run: WandbRun | None) -> bool:
    """Return whether a run is open that was opened by somebody else, and is used as it is."""
    return run is not None and run not in _OURS


def use(run: WandbRun, info: RunInfo, options: WandbOptions) -> WandbRun:
    """Return a run of the user's own, after giving it the parameters that it does not have."""
    names = ("project", "entity", "name", "group", "job_type", "tags", "notes", "id", "dir")
    given = [name for name in names if getattr(options, name) is not None]
    if given:
        logger.warning("a W&B run is active and is used as it is; not set: %s", ", ".join(given))
    run.config.setdefaults(info.started.params)  # type: ignore[no-untyped-call]
    return run


def start(info: RunInfo, options: WandbOptions, stop: Callable[[], None]) -> WandbRun:
    """Start the W&B run, or go on in the one that is resumed.

    Args:
        info: the run of trainbus.
        options: of the sink.
        stop: stops the training where that is another process; in its own one W&B does it.

    Raises:
        SinkError: W&B refuses to start the run.
    """
    import wandb

    try:
        with _STARTING:
            run = _started(info, options, stop)
            _OURS.add(run)
    except (wandb.Error, OSError) as error:
        advice = (
            "run `wandb login`, set WANDB_API_KEY, or set `mode: offline`"
            if "API key" in str(error)
            else "check `dir`, the network and the account, or set `mode: offline`"
        )
        text = f"W&B can't start the run ({error}); {advice}"
        retry = isinstance(error, wandb.errors.CommError) and "API key" not in str(error)
        raise SinkError(text, retry=retry) from error
    return run


def _started(info: RunInfo, options: WandbOptions, stop: Callable[[], None]) -> WandbRun:
    import wandb

    started = info.started
    default = None if "WANDB_DIR" in os.environ else info.base
    folder = options.dir or started.save_dir or default
    if folder is not None:
        folder = os.path.abspath(Path(folder).expanduser())
        Path(folder).mkdir(parents=True, exist_ok=True)
    wanted = options.id or run_id(info.id)
    settings: dict[str, Any] = {"init_timeout": options.init_timeout_secs}
    if info.pid is not None:  # this is not the training process, whose service ends with it
        os.environ.pop("WANDB_SERVICE", None)
        settings |= {"x_stats_pid": info.pid, "stop_fn": stop}
    # A second W&B sink on the same bus has a run of its own.
    taken = sum(other.id.startswith(wanted) for other in _OURS)
    project = options.project or (started.project and project_name(started.project))
    run = wandb.init(
        project=project or None,
        entity=options.entity,
        name=options.name or run_name(started.name),
        group=options.group or started.group,
        job_type=options.job_type or started.job_type,
        tags=[tag[:64] for tag in options.tags or started.tags if tag] or None,
        notes=options.notes or started.notes,
        config=started.params,
        id=f"{wanted}-{taken + 1}" if taken else wanted,
        resume=options.resume or ("allow" if info.resumed or info.reopened else None),
        dir=folder,
        mode=options.mode,
        # The framework's own logger would take a run that is open as `wandb.run` for its own.
        reinit="create_new" if wandb.run or "wandb" in started.own_loggers else "default",
        settings=wandb.Settings(**settings),
    )
    if run.settings.mode == "offline":
        _set_aside(run, info)
    return run


def _set_aside(run: WandbRun, info: RunInfo) -> None:
    """Keep `wandb sync --sync-all` from a part of this attempt that is stored anew, and whole.

    What a process took that was killed may be on disk in part, and it can't be asked which part.
    """
    folder = Path(run.dir).parent
    (folder / _ATTEMPT).write_text(f"{info.attempt}\n", encoding="utf-8")
    if not info.reopened or info.resume_after:
        return
    for other in folder.parent.glob(f"offline-run-*-{run.id}"):
        note = other / _ATTEMPT
        if other != folder and note.exists() and note.read_text() == f"{info.attempt}\n":
            other.rename(other.with_name(f"incomplete-{other.name}"))


def location(run: WandbRun) -> str | None:
    """Return the address of a run, or the command that uploads it."""
    if run.settings.mode == "offline":
        return f"wandb sync {shlex.quote(os.path.abspath(Path(run.dir).parent))}"
    return None if run.settings.mode == "disabled" else run.url


def stored(run: WandbRun) -> tuple[int, int]:
    """Return the position of the last record that a run which goes on has, as its summary tells."""
    try:
        summary: Any = run.summary
        return int(summary["trainbus/attempt"]), int(summary["trainbus/seq"])
    except (KeyError, TypeError, ValueError):
        return 0, 0


def finish(run: WandbRun, status: str) -> None:
    """Close a run that was opened here, with the training's outcome; leave the user's own open."""
    if run in _OURS:
        _OURS.discard(run)
        run.finish(exit_code=_EXIT_CODES[status])
