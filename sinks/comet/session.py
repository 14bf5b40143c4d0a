"""Imports Comet, starts an experiment, and cleans up its archives.

Comet hooks into frameworks and the process, and has one experiment at a time; both are prevented
here.
"""

from __future__ import annotations

import hashlib
import os
import queue
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile, ZipFile

from trainbus.errors import SinkError
from trainbus.events import RunStarted
from trainbus.toolkit.sinks import required_package

if TYPE_CHECKING:
    from . import CometOptions

_ADVICE = "set COMET_API_KEY, check the network, or set `mode: offline`"

_QUIET = {"COMET_DISABLE_AUTO_LOGGING": "1", "COMET_ERROR_TRACKING_ENABLE": "false"}
_MAX_QUEUED = 1_000
"""Messages that Comet may hold in memory before they are written; it has no limit of its own."""

_STARTING = threading.Lock()
"""Held while Comet's global experiment is set aside to start another one."""


def import_comet() -> Any:
    """Import Comet without its hooks into frameworks, exceptions and error tracking.

    Raises:
        MissingPackageError: comet_ml is not installed.
    """
    if sys.modules.get("comet_ml") is not None:
        return sys.modules["comet_ml"]
    hook, before = sys.excepthook, {name: os.environ.get(name) for name in _QUIET}
    os.environ.update(_QUIET)
    try:
        with required_package("comet_ml", extra="comet"):
            import comet_ml
    finally:
        sys.excepthook = hook
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
    return comet_ml


def check_key() -> None:
    """Check that there is an API key.

    Raises:
        SinkError: there is none.
    """
    from comet_ml.config import get_api_key, get_config

    if not get_api_key(None, get_config()):
        raise SinkError(f"found no API key for Comet; {_ADVICE}")


def experiment_key(run: str) -> str:
    """Return the experiment key of a run id: 40 letters and digits."""
    return hashlib.sha1(run.encode("utf-8", "backslashreplace")).hexdigest()


def start(comet: Any, key: str, folder: Path, options: CometOptions, run: RunStarted) -> Any:
    """Return a new or continued experiment; one of the user stays the global experiment.

    Args:
        comet: the package.
        key: key of the experiment.
        folder: folder of the archive.
        options: options of the sink; they take precedence over the trainer's values.
        run: the trainer's description of the run.

    Raises:
        SinkError: Comet can't start the experiment.
    """
    try:
        with _STARTING:
            experiment = _get_or_create(
                comet,
                workspace=options.workspace,
                project_name=options.project or run.project,
                experiment_key=key,
                online=options.mode == "online",
                config={
                    "offline_directory": str(folder),
                    "name": options.name or run.name,
                    "tags": list(dict.fromkeys([*options.tags, *run.tags])) or None,
                },
            )
    except Exception as error:  # the errors of Comet and requests have no common base class
        raise _failed(str(error), retry=isinstance(error, OSError)) from error
    if not experiment.alive:
        experiment.end()
        raise _failed("see Comet's message above")
    messages = getattr(getattr(experiment, "streamer", None), "messages", None)
    if options.mode == "offline" and isinstance(messages, queue.Queue):
        messages.maxsize = _MAX_QUEUED
    return experiment


def _get_or_create(comet: Any, *, config: Mapping[str, Any], **given: Any) -> Any:
    from comet_ml.config import get_global_experiment, set_global_experiment

    active = get_global_experiment()
    set_global_experiment(None)  # else Comet ends it
    switched_on_by_default = (
        *("log_code", "log_graph", "log_git_metadata", "log_git_patch", "log_env_details"),
        *("parse_args", "auto_output_logging", "auto_param_logging", "auto_metric_logging"),
        "auto_log_co2",
    )
    off = dict.fromkeys(switched_on_by_default, False)
    try:
        return comet.start(
            mode="get_or_create",
            experiment_config=comet.ExperimentConfig(display_summary_level=0, **off, **config),
            **given,
        )
    finally:
        set_global_experiment(active)


def _failed(why: str, *, retry: bool = False) -> SinkError:
    return SinkError(f"Comet can't start the experiment ({why[:200]}); {_ADVICE}", retry=retry)


def remove_unfinished(folder: Path, key: str) -> None:
    """Remove archives that a killed process left unfinished: they can't be uploaded."""
    for path in folder.glob(f"{key}-*.zip"):
        try:
            with ZipFile(path) as archive:
                is_complete = "experiment.json" in archive.namelist()
        except (OSError, BadZipFile):
            is_complete = False
        if not is_complete:
            path.unlink(missing_ok=True)
