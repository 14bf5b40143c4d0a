"""What a process knows of the `trainbus run` that started it, from its environment."""

from __future__ import annotations

import os
from contextlib import suppress

VARIABLE = "TRAINBUS_CONFIG"
COMMAND = "TRAINBUS_COMMAND"
"""Variable with the process that the command is; in a command within a command, the outer one."""

RECORDED = "TRAINBUS_RECORDED"
"""Variable with the file that a child makes when it records; empty once the command has."""


def note_recorded() -> None:
    """Note that a run has begun: the end of a command says so if nothing was recorded in it."""
    path = os.environ.get(RECORDED)
    if not path:
        return
    if os.environ.get(COMMAND) == str(os.getpid()):
        os.environ[RECORDED] = ""
        return
    with suppress(OSError):
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
