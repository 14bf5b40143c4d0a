"""Runs a command whose trainings are logged without a line of code in it: `trainbus run`.

The command becomes the process itself: its exit code, signals and output are its own. Each Python
process that it starts, children included, finds `startup/sitecustomize.py` and the name of the
configuration in its environment, and attaches by the hooks that adapters bring.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from trainbus.recording.launched import COMMAND, VARIABLE


def become(config: str, command: Sequence[str]) -> None:
    """Replace this process by a command whose Python processes log; it does not return.

    Args:
        config: YAML file with the sinks; it was checked.
        command: the program and its arguments.

    Raises:
        OSError: there is no such program, or it can't be run.
    """
    os.execvpe(command[0], list(command), environment(config))


def environment(config: str) -> dict[str, str]:
    """Return the environment in which Python processes log by a YAML file with sinks."""
    startup = str(Path(__file__).parents[1] / "startup")
    path = [startup, *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {
        VARIABLE: os.path.abspath(config),
        COMMAND: os.environ.get(COMMAND) or str(os.getpid()),
        "PYTHONPATH": os.pathsep.join(path),
    }
