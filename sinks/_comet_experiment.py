"""The connection to Comet: its package, the API key, an experiment and the archives of it.

Comet hooks into frameworks and into the process, and has one experiment at a time: here it is kept
from both.
"""

from __future__ import annotations

import hashlib
import os
import queue
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

from trainbus.errors import MissingPackageError, SinkError
from trainbus.events import RunStarted

from ._comet_options import CometOptions

_ADVICE = "set COMET_API_KEY, check the network, or set `mode: offline`"

_QUIET = {"COMET_DISABLE_AUTO_LOGGING": "1", "COMET_ERROR_TRACKING_ENABLE": "false"}
_MOST_WAITING = 1_000
"""Messages that Comet keeps before its thread has written them; it has no bound of its own."""

_STARTING = threading.Lock()
"""Comet's global experiment is set aside while one is started."""


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
        import comet_ml
    except ImportError as error:
        raise MissingPackageError("comet_ml", extra="comet") from error
    finally:
        sys.excepthook = hook
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
    return comet_ml


def look_for_key() -> None:
    """Make sure that there is an API key.

    Raises:
        SinkError: there is none.
    """
    from comet_ml.config import get_api_key, get_config

    if not get_api_key(None, get_config()):
        raise SinkError(f"found no API key for Comet; {_ADVICE}")


def experiment_key(run: str) -> str:
    """Return the key of a run's experiment: 40 letters and digits."""
    return hashlib.sha1(run.encode("utf-8", "backslashreplace")).hexdigest()


def start(comet: Any, key: str, folder: Path, options: CometOptions, run: RunStarted) -> Any:
    """Return an experiment that is started or gone on in; one of the user's own stays the global.

    Args:
        comet: the package.
        key: of the experiment.
        folder: where an archive is written.
        options: the sink's, which win over the trainer's.
        run: what the trainer tells of the run.

    Raises:
        SinkError: Comet refuses.
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
    except Exception as error:  # Comet's, those of requests and ValueError share no base
        raise _refused(str(error), retry=isinstance(error, OSError)) from error
    if not experiment.alive:
        experiment.end()
        raise _refused("its own message is above")
    waiting = getattr(getattr(experiment, "streamer", None), "messages", None)
    if options.mode == "offline" and isinstance(waiting, queue.Queue):
        waiting.maxsize = _MOST_WAITING
    return experiment


def _get_or_create(comet: Any, *, config: Mapping[str, Any], **given: Any) -> Any:
    from comet_ml.config import get_global_experiment, set_global_experiment

    active = get_global_experiment()
    set_global_experiment(None)  # else Comet ends it
    try:
        return comet.start(
            mode="get_or_create",
            experiment_config=comet.ExperimentConfig(
                log_code=False,
                log_graph=False,
                parse_args=False,
                display_summary_level=0,
                log_git_metadata=False,
                log_git_patch=False,
                log_env_details=False,
                auto_output_logging=False,
                auto_param_logging=False,
                auto_metric_logging=False,
                auto_log_co2=False,
                **config,
            ),
            **given,
        )
    finally:
        set_global_experiment(active)


def _refused(why: str, *, retry: bool = False) -> SinkError:
    return SinkError(f"Comet can't start the experiment ({why[:200]}); {_ADVICE}", retry=retry)


def remove_unfinished(folder: Path, key: str) -> None:
    """Remove archives that a killed process began: they are empty, and can't be uploaded."""
    for path in folder.glob(f"{key}-*.zip"):
        try:
            with ZipFile(path) as archive:
                is_whole = "experiment.json" in archive.namelist()
        except (OSError, BadZipFile):
            is_whole = False
        if not is_whole:
            path.unlink(missing_ok=True)
