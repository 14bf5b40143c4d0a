"""Runs a command and records its trainings, without changes to its code: `trainbus run`.

The command replaces this process, so its exit code, signals and output are unchanged. The
environment makes each of its Python processes, children included, import
`startup/sitecustomize.py`, which registers the hooks of the adapters.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from trainbus.recording.launched import COMMAND, VARIABLE


def exec_command(config: str, command: Sequence[str]) -> None:
    """Replace this process with a command whose trainings are recorded; does not return.

    Args:
        config: a valid configuration file.
        command: the program and its arguments.

    Raises:
        OSError: the program does not exist or can't be run.
    """
    os.execvpe(command[0], list(command), environment(config))


def environment(config: str) -> dict[str, str]:
    """Return an environment in which Python processes record trainings with a configuration."""
    startup = str(Path(__file__).parents[1] / "startup")
    path = [startup, *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {
        VARIABLE: os.path.abspath(config),
        COMMAND: os.environ.get(COMMAND) or str(os.getpid()),
        "PYTHONPATH": os.pathsep.join(path),
    }
