"""Runs one check in a new process that imports only the plugin.

The source of this file is the whole program of the child, so it must not import `trainbus.testing`.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def run_in_child(
    task: str,
    cls: type,
    given: Mapping[str, Any],
    *,
    cwd: Path,
    env: Mapping[str, str] | None = None,
) -> Any:
    """Call a task of this file in a new process, and return its result.

    Args:
        task: name of a function in this file.
        cls: class that the task gets.
        given: keyword arguments of the task.
        cwd: working directory of the process; it is created.
        env: additional environment variables.

    Raises:
        AssertionError: the process failed; the message contains its stderr.
    """
    cwd.mkdir(parents=True, exist_ok=True)
    file = inspect.getfile(cls)
    where = {"module": cls.__module__, "file": file, "name": cls.__qualname__}
    path = os.pathsep.join(str(Path(entry).absolute()) for entry in sys.path if entry)
    done = subprocess.run(
        [sys.executable, "-c", Path(__file__).read_text(encoding="utf-8")],
        input=json.dumps({"task": task, "class": where, "given": dict(given)}),
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": path, **(env or {})},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=300,
        check=False,
    )
    if done.returncode != 0:
        raise AssertionError(f"{task} of {cls.__qualname__} failed:\n{done.stderr.strip()}")
    return json.loads(done.stdout.splitlines()[-1])


def imported_by_construction(cls: Any, *, options: Any, heavy: list[str]) -> list[str]:
    """Return which of the modules in `heavy` a sink imports before it is opened."""
    _sink(cls, options)
    return [name for name in heavy if name in sys.modules]


def error_without(cls: Any, *, options: Any, package: str) -> dict[str, Any] | None:
    """Return the error of opening a sink without a package, None if it raises none."""
    from trainbus.events import RunStarted
    from trainbus.interfaces import RunInfo

    sys.modules[package] = None  # type: ignore[assignment]  # as if it were not installed
    sink = _sink(cls, options)
    try:
        sink.open(RunInfo(id="run", started=RunStarted()))
    except Exception as error:
        return {"types": [t.__name__ for t in type(error).__mro__], "text": str(error)}
    finally:
        sink.close()
    return None


def emitted_in(cls: Any, *, folder: str) -> list[str]:
    """Return the names of the events that an adapter emits in this process."""
    heard: list[str] = cls().emitted_in(Path(folder))
    return heard


def _sink(cls: Any, options: Any) -> Any:
    import msgspec

    return cls(msgspec.convert(options, cls.Options))


def _load(module: str, file: str, name: str) -> Any:
    first = name.partition(".")[0]
    try:
        found = importlib.import_module(module)
        getattr(found, first)
    except (ImportError, AttributeError):  # a test file, which only the test runner can import
        spec = importlib.util.spec_from_file_location(module, file)
        assert spec is not None
        assert spec.loader is not None
        found = importlib.util.module_from_spec(spec)
        sys.modules[module] = found
        spec.loader.exec_module(found)
    for part in name.split("."):
        found = getattr(found, part)
    return found


def _main() -> None:
    job = json.loads(sys.stdin.read())
    tasks = {t.__name__: t for t in (imported_by_construction, error_without, emitted_in)}
    print("\n" + json.dumps(tasks[job["task"]](_load(**job["class"]), **job["given"])))


if __name__ == "__main__":
    _main()
