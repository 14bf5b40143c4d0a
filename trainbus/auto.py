"""Attaches to every trainer that a program makes, without a line of code in it: `trainbus run`.

The command becomes the program itself: its exit code, signals and output are its own. Each Python
process that it starts, children included, hears of the configuration by the environment, and hangs
a hook behind the import of each framework that has an adapter.

Guarantees: a program that trains nothing is left alone, and imports nothing of trainbus but this
module's few; what goes wrong here is said once and never reaches the program.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from functools import partial
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import wrapt

from trainbus.errors import SinkError

if TYPE_CHECKING:
    from trainbus.bus import Bus

logger = logging.getLogger("trainbus")

HOOKS = "trainbus.hooks"
VARIABLE = "TRAINBUS_CONFIG"


def become(config: str, command: Sequence[str]) -> None:
    """Replace this process by a command whose Python processes log; return never.

    Args:
        config: YAML file with the sinks; it was checked.
        command: the program and its arguments.

    Raises:
        OSError: there is no such program, or it can't be run.
    """
    startup = str(Path(__file__).parent / "startup")
    path = [startup, *filter(None, [os.environ.get("PYTHONPATH")])]
    added = {VARIABLE: os.path.abspath(config), "PYTHONPATH": os.pathsep.join(path)}
    os.execvpe(command[0], list(command), {**os.environ, **added})


def install(config: str) -> None:
    """Have every trainer that this process makes attached; its sinks are opened when one trains."""
    session = _Session(config)
    for point in entry_points(group=HOOKS):
        wrapt.register_post_import_hook(partial(session.hook, point), point.name)


class _Session:
    def __init__(self, config: str) -> None:
        self._config = config
        self._bus: Bus | None = None
        self._has_failed = False

    def hook(self, point: EntryPoint, module: ModuleType) -> None:
        """Hook into a framework, whose module was imported."""
        try:
            point.load()(module, self.attach)
        except Exception as error:
            logger.warning("trainings of %s are not logged: %r", point.name, error)

    def attach(self, target: object) -> None:
        """Attach to a trainer."""
        try:
            if self._bus is None and not self._has_failed:
                self._has_failed = True  # one try, and one complaint
                self._bus = self._load()
            if self._bus is not None:
                self._bus.follow(target)
        except SinkError:
            raise
        except Exception as error:
            kind = type(target)
            logger.warning("%s.%s is not logged: %s", kind.__module__, kind.__qualname__, error)

    def _load(self) -> Bus:
        from trainbus import config

        return config.load(self._config)
