"""Installs hooks that run after framework imports, in every Python process of `trainbus run`.

Python imports this file at startup, because `trainbus run` puts its folder on the path. Another
`sitecustomize` that it shadows is run afterwards. A program that trains nothing imports neither
trainbus nor numpy; an error here is logged once and never reaches the program.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint
    from types import ModuleType

    from trainbus.bus import Bus

logger = logging.getLogger("trainbus")


class Session:
    """Attaches to every trainer that this process creates; sinks are opened when one trains."""

    def __init__(self, config: str) -> None:
        self._config = config
        self._bus: Bus | None = None
        self._has_loaded = False

    def start(self) -> None:
        """Register the hooks, to be called once their frameworks are imported."""
        from functools import partial
        from importlib.metadata import entry_points
        from importlib.util import find_spec

        if find_spec("trainbus") is None:
            print(
                f"trainbus: not installed for {sys.executable}; its trainings are not recorded",
                file=sys.stderr,
            )
            return
        import wrapt

        points = entry_points(group="trainbus.hooks")
        for point in points:
            wrapt.register_post_import_hook(partial(self.hook, point), point.name)
        _warn_if_nothing_recorded(sorted({point.name.partition(".")[0] for point in points}))

    def hook(self, point: EntryPoint, module: ModuleType) -> None:
        """Call the hook of a framework whose module was imported."""
        try:
            point.load()(module, self.attach)
        except Exception as error:
            logger.warning("trainings of %s are not recorded: %r", point.name, error)

    def attach(self, target: object) -> None:
        """Attach to a trainer."""
        import json

        from trainbus import SinkError, load

        try:
            if self._bus is None and not self._has_loaded:
                self._has_loaded = True  # try once, and warn once
                name, tags = os.environ.get("TRAINBUS_NAME"), os.environ.get("TRAINBUS_TAGS", "[]")
                self._bus = load(self._config, name=name, tags=json.loads(tags))
            if self._bus is not None:
                self._bus.attach(target)
        except SinkError:
            raise
        except Exception as error:
            kind = type(target)
            logger.warning("%s.%s is not recorded: %s", kind.__module__, kind.__qualname__, error)


def _warn_if_nothing_recorded(frameworks: list[str]) -> None:
    """Warn when the command ends if neither it nor a child process has recorded a run."""
    pid = os.getpid()
    if os.environ.get("TRAINBUS_COMMAND") != str(pid):
        return
    from tempfile import gettempdir

    try:
        file = os.path.join(gettempdir(), f"trainbus-{pid}-{os.urandom(8).hex()}")
    except OSError:
        return
    file = os.environ.setdefault("TRAINBUS_RECORDED", file)

    def warn() -> None:
        if os.getpid() != pid or not os.environ.get("TRAINBUS_RECORDED"):
            return
        try:
            os.unlink(file)
        except FileNotFoundError:
            print(
                f"trainbus: nothing was recorded: found no training of {', '.join(frameworks)}; "
                "log a loop of your own with `bus.run()` (README, 'A loop of your own'); "
                "`trainbus plugins` lists the supported frameworks",
                file=sys.stderr,
            )
        except OSError:
            return

    atexit.register(warn)


def _run_shadowed() -> None:
    """Run the `sitecustomize` that this file shadows, if there is one."""
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec

    here = os.path.dirname(os.path.abspath(__file__))
    path = [entry for entry in sys.path if os.path.abspath(entry) != here]
    spec = PathFinder.find_spec("sitecustomize", path)
    if spec is not None and spec.loader is not None:
        module = module_from_spec(spec)
        sys.modules["sitecustomize"] = module
        spec.loader.exec_module(module)


if os.environ.get("TRAINBUS_CONFIG"):
    try:
        Session(os.environ["TRAINBUS_CONFIG"]).start()
    except Exception as error:
        print(f"trainbus: trainings are not recorded: {error!r}", file=sys.stderr)
_run_shadowed()
