"""Starts, finds and finishes the W&B run that a sink feeds."""

from __future__ import annotations

import json
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
from trainbus.toolkit.sinks import (
    MAIN,
    Positions,
    check_folder,
    positions_of,
    required_package,
)

from .options import WandbOptions, project_name, run_id, run_name

if TYPE_CHECKING:
    from wandb import Run as WandbRun

logger = logging.getLogger("trainbus.sinks.wandb")

_ATTEMPT = "trainbus-attempt.txt"
"""File in an offline run's folder with the number of the attempt that it contains."""

_EXIT_CODES = {"finished": 0, "failed": 1, "stopped": 255}
"""255 is wandb's own code for Ctrl-C."""

_STARTING = threading.Lock()
"""Held while a run starts: two that start at once would both get the same id."""

_OURS: weakref.WeakSet[WandbRun] = weakref.WeakSet()
"""Runs that this sink started, so that a second training doesn't log to the first one's."""


def check(options: WandbOptions) -> str:
    """Log in, or make sure that the folder of an offline run can be written; return which.

    Raises:
        MissingPackageError: wandb is not installed.
        SinkError: W&B rejects the login, can't be reached, or the folder can't be written.
    """
    with required_package("wandb"):
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
    """Return whether a run is active that the user's program started."""
    return run is not None and run not in _OURS


def use(run: WandbRun, info: RunInfo, options: WandbOptions) -> WandbRun:
    """Add the parameters that a run of the user's lacks, and return it."""
    names = ("project", "entity", "name", "group", "job_type", "tags", "notes", "id", "dir")
    given = [name for name in names if getattr(options, name) is not None]
    if given:
        logger.warning("using the active W&B run as it is; ignored options: %s", ", ".join(given))
    run.config.setdefaults(info.started.params)  # type: ignore[no-untyped-call]
    return run


def start(info: RunInfo, options: WandbOptions, stop: Callable[[], None]) -> WandbRun:
    """Start the W&B run, or continue the one that is resumed.

    Args:
        info: the run in trainbus.
        options: the sink's.
        stop: stops a training in another process; W&B itself stops one in this process.

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
    if info.pid is not None:  # wandb's service in the training process ends with it
        os.environ.pop("WANDB_SERVICE", None)
        settings |= {"x_stats_pid": info.pid, "stop_fn": stop}
    # A second W&B sink on the same bus gets its own run.
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
        # The framework's own logger would use an active `wandb.run` as its own.
        reinit="create_new" if wandb.run or "wandb" in started.own_loggers else "default",
        settings=wandb.Settings(**settings),
    )
    if run.settings.mode == "offline":
        _hide_incomplete(run, info)
    return run


def _hide_incomplete(run: WandbRun, info: RunInfo) -> None:
    """Hide incomplete files of this attempt from `wandb sync --sync-all`; they are written again.

    The file of a killed process may be incomplete, and wandb can't tell how much it contains.
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


def as_summary(positions: Positions) -> dict[str, Any]:
    """Return the positions of the last records that a run has as values of its summary."""
    streams = {source: at for source, at in positions.items() if source != MAIN}
    found: dict[str, Any] = {}
    if MAIN in positions:
        found |= dict(zip(("trainbus/attempt", "trainbus/seq"), positions[MAIN], strict=True))
    return found | ({"trainbus/streams": json.dumps(streams)} if streams else {})


def stored(run: WandbRun) -> Positions:
    """Return the positions of the last records that a continued run has, from its summary."""
    summary: Any = run.summary
    try:
        found = {MAIN: (int(summary["trainbus/attempt"]), int(summary["trainbus/seq"]))}
        return found | positions_of(json.loads(summary.get("trainbus/streams", "{}")))
    except (KeyError, TypeError, ValueError):
        return {}


def finish(run: WandbRun, status: str) -> None:
    """Finish a run that was started here with the training's status; leave the user's open."""
    if run in _OURS:
        _OURS.discard(run)
        run.finish(exit_code=_EXIT_CODES[status])
