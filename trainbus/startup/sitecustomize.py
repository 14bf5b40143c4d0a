"""What every Python process under `trainbus run` begins with: hooks behind framework imports.

Python imports this file when it starts, as `trainbus run` puts its folder on the path; the file of
the same name that it hides, if there is one, is run afterwards. A program that trains nothing
imports neither trainbus nor numpy by it; what goes wrong here is said once and never reaches the
program.
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
    """Attaches to every trainer that this process makes; its sinks are opened when one trains."""

    def __init__(self, config: str) -> None:
        self._config = config
        self._bus: Bus | None = None
        self._has_tried = False

    def start(self) -> None:
        """Have the hooks called once their frameworks are imported."""
        from functools import partial
        from importlib.metadata import entry_points
        from importlib.util import find_spec

        if find_spec("trainbus") is None:
            print(
                f"trainbus: {sys.executable} has no trainbus; what it trains is not logged",
                file=sys.stderr,
            )
            return
        import wrapt

        points = entry_points(group="trainbus.hooks")
        for point in points:
            wrapt.register_post_import_hook(partial(self.hook, point), point.name)
        _watch_for_nothing(sorted({point.name.partition(".")[0] for point in points}))

    def hook(self, point: EntryPoint, module: ModuleType) -> None:
        """Hook into a framework, whose module was imported."""
        try:
            point.load()(module, self.attach)
        except Exception as error:
            logger.warning("trainings of %s are not logged: %r", point.name, error)

    def attach(self, target: object) -> None:
        """Attach to a trainer."""
        from trainbus import SinkError, load

        try:
            if self._bus is None and not self._has_tried:
                self._has_tried = True  # one try, and one complaint
                self._bus = load(self._config)
            if self._bus is not None:
                self._bus.attach(target)
        except SinkError:
            raise
        except Exception as error:
            kind = type(target)
            logger.warning("%s.%s is not logged: %s", kind.__module__, kind.__qualname__, error)


def _watch_for_nothing(frameworks: list[str]) -> None:
    """Have the end of the command say so if neither it nor a child of it has recorded anything."""
    pid = os.getpid()
    if os.environ.get("TRAINBUS_COMMAND") != str(pid):
        return
    from tempfile import gettempdir

    try:
        file = os.path.join(gettempdir(), f"trainbus-{pid}-{os.urandom(8).hex()}")
    except OSError:
        return
    file = os.environ.setdefault("TRAINBUS_RECORDED", file)

    def say() -> None:
        if os.getpid() != pid or not os.environ.get("TRAINBUS_RECORDED"):
            return
        try:
            os.unlink(file)
        except FileNotFoundError:
            print(
                f"trainbus: nothing was recorded: found no training of {', '.join(frameworks)}; "
                "log a loop of your own with `bus.run()` (README, 'A loop of your own'), "
                "`trainbus plugins` lists what can be used",
                file=sys.stderr,
            )
        except OSError:
            return

    atexit.register(say)


def _run_the_hidden_one() -> None:
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
        print(f"trainbus: trainings are not logged: {error!r}", file=sys.stderr)
_run_the_hidden_one()
