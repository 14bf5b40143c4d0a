"""A process that has imported what Ultralytics needs, and forks for each training of a test.

The imports take longer than a training of a small model. Neither Ultralytics nor trainbus nor a
tracker is among them: they read the environment when they are imported, and it is the test's.

Run as a script, it reads a line of JSON for each program, and writes one with its pid, then one
with its return code.
"""

from __future__ import annotations

import atexit
import functools
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
MODULES = (
    "torch",
    "cv2",
    "matplotlib.pyplot",
    "polars",
    "PIL.Image",
    "psutil",
    "requests",
    "scipy",
)


class _Server:
    """The process of one test session, or of one of its workers."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "torchvision_cpu.py"), __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={k: v for k, v in os.environ.items() if not k.startswith(("WANDB", "YOLO"))},
        )
        atexit.register(self.close)

    def run(self, order: Mapping[str, Any], timeout: float) -> int:
        """Return the return code of a program that was forked, negative for a signal.

        Raises:
            subprocess.TimeoutExpired: it had not ended after `timeout` seconds, and was killed.
        """
        pid = self._ask(json.dumps(order))
        is_late = threading.Event()

        def kill() -> None:
            is_late.set()
            os.kill(pid, signal.SIGKILL)

        timer = threading.Timer(timeout, kill)
        timer.start()
        try:
            code = self._read()
        finally:
            timer.cancel()
        # Else a program that hangs would look like one that was killed on purpose.
        if is_late.is_set():
            raise subprocess.TimeoutExpired(order["argv"], timeout)
        return code

    def close(self) -> None:
        """End the process; programs that still run are not touched."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        self._process.wait()

    def _ask(self, line: str) -> int:
        assert self._process.stdin is not None
        self._process.stdin.write(line.encode() + b"\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> int:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the process that forks trainings has ended; see what it wrote to stderr"
        return int(line)


_server = functools.cache(_Server)


def run(
    script: str, args: Sequence[str], *, env: Mapping[str, str], cwd: Path, timeout: float
) -> subprocess.CompletedProcess[str]:
    """Run a script as `python script args` would, without its first seconds.

    Args:
        script: path of a Python file.
        args: its arguments.
        env: its whole environment.
        cwd: the folder that it runs in.
        timeout: seconds after which it is killed.

    Raises:
        subprocess.TimeoutExpired: it had not ended by then.
    """
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "stdout", Path(folder) / "stderr"
        order = {
            "argv": [script, *args],
            "env": dict(env),
            "cwd": str(cwd),
            "stdout": str(out),
            "stderr": str(err),
        }
        code = _server().run(order, timeout)
        texts = [path.read_text(errors="replace") for path in (out, err)]
    return subprocess.CompletedProcess([script, *args], code, *texts)


def serve() -> dict[str, Any] | None:
    """Fork for each order; return the order in the child, and None at the end of the input."""
    for name in MODULES:
        importlib.import_module(name)
    # The pipes are not the program's.
    orders, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    for line in orders:
        order: dict[str, Any] = json.loads(line)
        pid = os.fork()
        if pid == 0:
            orders.close()
            answers.close()
            return order
        print(pid, file=answers, flush=True)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), file=answers, flush=True)
    return None


def become(order: Mapping[str, Any]) -> None:
    """Run the program of an order in this process, which ends as any other one does."""
    os.chdir(order["cwd"])
    os.environ.clear()
    os.environ.update(order["env"])
    for fd, path in ((1, order["stdout"]), (2, order["stderr"])):
        opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(opened, fd)
        os.close(opened)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    sys.argv = order["argv"]
    path = order["env"].get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:] = [os.path.dirname(sys.argv[0]), *filter(None, path), *_installed()]
    runpy.run_path(sys.argv[0], run_name="__main__")


def _installed() -> list[str]:
    """Return what `sys.path` has besides the script's folder and the variable of this process."""
    mine = {str(HERE), *os.environ.get("PYTHONPATH", "").split(os.pathsep)}
    return [entry for entry in sys.path if entry not in mine]


if __name__ == "__main__":
    wanted = serve()
    if wanted is not None:
        become(wanted)
