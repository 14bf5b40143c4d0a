"""A real MLflow server that a test starts, stops and starts again, and an empty database for it."""

from __future__ import annotations

import functools
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from atexit import register
from pathlib import Path


@functools.cache
def _empty() -> Path:
    from mlflow import MlflowClient

    folder = Path(tempfile.mkdtemp(prefix="trainbus-mlflow-"))
    register(shutil.rmtree, folder, ignore_errors=True)
    MlflowClient(f"sqlite:///{folder}/empty.db").search_experiments()
    return folder / "empty.db"


def database(folder: Path) -> str:
    """Return the URI of a database in a folder; making the first one takes seconds, so copy it."""
    path = folder / "mlflow.db"
    if not path.exists():
        shutil.copy(_empty(), path)
    return f"sqlite:///{path}"


class Server:
    """An MLflow server over a database and a folder of files, at a port of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._database = database(folder)
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            self._port = found.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self._port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, deadline_s: float = 300.0) -> None:
        """Start the server, and wait until it answers."""
        options = {
            "host": "127.0.0.1",
            "port": str(self._port),
            "backend-store-uri": self._database,
            "artifacts-destination": str(self._folder / "artifacts"),
            "workers": "1",
        }
        command = [sys.executable, "-m", "mlflow", "server"]
        command += [part for name, value in options.items() for part in (f"--{name}", value)]
        with (self._folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                command,
                cwd=self._folder,
                env={
                    **os.environ,
                    "MLFLOW_DISABLE_TELEMETRY": "true",
                    # Eight processes that wait for evaluations of language models.
                    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
                },
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        end = time.monotonic() + deadline_s
        while not self._answers():
            assert time.monotonic() < end, (self._folder / "server.log").read_text()[-2000:]
            assert self._process.poll() is None, (self._folder / "server.log").read_text()[-2000:]
            time.sleep(0.1)

    def _answers(self) -> bool:
        try:
            urllib.request.urlopen(f"{self.uri}/health", timeout=5).close()
        except OSError:
            return False
        return True

    def stop(self) -> None:
        """Stop the server; stopping it twice does nothing more."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with its workers: the session is its own
            process.wait()
