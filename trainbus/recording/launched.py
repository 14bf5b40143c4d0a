"""Environment variables that `trainbus run` sets for the processes that it starts."""

from __future__ import annotations

import os
from contextlib import suppress

VARIABLE = "TRAINBUS_CONFIG"
"""Variable with the path of the configuration file."""

COMMAND = "TRAINBUS_COMMAND"
"""Variable with the id of the command's process; for nested commands, of the outermost one."""

NAME = "TRAINBUS_NAME"
"""Variable with the name of the runs."""

TAGS = "TRAINBUS_TAGS"
"""Variable with the tags of the runs, as a JSON list."""

RECORDED = "TRAINBUS_RECORDED"
"""Variable with a file that a child creates when it records; empty once the command itself does."""


def note_recorded() -> None:
    """Note that a run was recorded: otherwise the command warns at its end that none was."""
    path = os.environ.get(RECORDED)
    if not path:
        return
    if os.environ.get(COMMAND) == str(os.getpid()):
        os.environ[RECORDED] = ""
        return
    with suppress(OSError):
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
