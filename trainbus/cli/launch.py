"""Runs a command and records its trainings, without changes to its code: `trainbus run`.

The command replaces this process, so its exit code, signals and output are unchanged. The
environment makes each of its Python processes, children included, import
`startup/sitecustomize.py`, which registers the hooks of the adapters.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from trainbus.recording.launched import COMMAND, NAME, TAGS, VARIABLE


def exec_command(
    config: str, command: Sequence[str], *, name: str | None = None, tags: Sequence[str] = ()
) -> None:
    """Replace this process with a command whose trainings are recorded; does not return.

    Args:
        config: a valid configuration file.
        command: the program and its arguments.
        name: name of the runs.
        tags: tags of the runs, in addition to those of the file.

    Raises:
        OSError: the program does not exist or can't be run.
    """
    environ = environment(config)
    if name is not None:
        environ[NAME] = name
    if tags:
        environ[TAGS] = json.dumps(list(tags))
    os.execvpe(command[0], list(command), environ)


def environment(config: str) -> dict[str, str]:
    """Return an environment in which Python processes record trainings with a configuration."""
    startup = str(Path(__file__).parents[1] / "startup")
    path = [startup, *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {
        VARIABLE: os.path.abspath(config),
        COMMAND: os.environ.get(COMMAND) or str(os.getpid()),
        "PYTHONPATH": os.pathsep.join(path),
    }
