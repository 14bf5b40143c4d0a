"""The database or server where MLflow stores runs: connection, errors, and its address."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from trainbus.errors import SinkError
from trainbus.toolkit.sinks import check_folder, make_folder, required_package

_TELEMETRY = "MLFLOW_DISABLE_TELEMETRY"
_OWN_PROCESS = {
    _TELEMETRY: "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
"""Set where the process is the sink's own: the bus itself retries, without a limit."""


class Store:
    """Where MLflow stores runs."""

    def __init__(
        self, uri: str | None, *, base: str | None = None, in_own_process: bool = False
    ) -> None:
        """Import MLflow, and create the folder of a database.

        Args:
            uri: the address; None for that in the environment, else a database in `base`.
            base: folder that the path of a database is relative to; None for the working directory.
            in_own_process: whether the sink may change MLflow's settings.

        Raises:
            MissingPackageError: mlflow is not installed.
            SinkError: the database's folder can't be created.
        """
        if in_own_process:
            for name, value in _OWN_PROCESS.items():
                os.environ.setdefault(name, value)
        self._mlflow = _imported()
        given = uri or os.environ.get("MLFLOW_TRACKING_URI")
        self._uri = _absolute(given or "sqlite:///mlflow.db", base)
        self._base = base

    def check(self) -> str:
        """Make sure that the server answers or the database can be written, and return which.

        Raises:
            PermissionError: the server refuses.
            SinkError: the server is down, or the database's folder can't be written.
        """
        if self._uri.startswith("sqlite:///"):
            return check_folder(Path(self._uri.removeprefix("sqlite:///")).parent)
        with self.translated_errors():
            self.client().search_experiments(max_results=1)
        return "the server answers"

    def client(self) -> Any:
        """Return a client, which doesn't use the active run."""
        return self._mlflow.MlflowClient(self._uri)

    @contextmanager
    def translated_errors(self) -> Iterator[None]:
        """Turn MLflow's errors into ones that say whether a retry may help.

        Raises:
            PermissionError: the server refuses.
            SinkError: any other error; `retry` where the server is down.
        """
        place = _shown(self._uri)
        _reach(self._uri)
        try:
            yield
        except self._mlflow.MlflowException as error:
            status = error.get_http_status_code()
            text = f"MLflow at {place} failed: {_shown(str(error))}"
            if status in (401, 403):
                advice = "check MLFLOW_TRACKING_USERNAME and _PASSWORD, or MLFLOW_TRACKING_TOKEN"
                raise PermissionError(f"{text}; {advice}") from error
            # For a database, 503 means that it is locked or unreachable, and 500 any other error.
            is_away = status >= (500 if self._uri.startswith(("http", "databricks")) else 502)
            raise SinkError(text, retry=is_away or status in (408, 429)) from error

    def experiment(self, client: Any, name: str | None, project: str, location: str | None) -> str:
        """Return the id of an experiment, which is created if there is none of that name.

        Args:
            client: what `client` returned.
            name: its name; None for that in MLflow's own variables, else the project.
            project: the training's.
            location: where to store the files of a new experiment; None to let MLflow decide.

        Raises:
            SinkError: it was deleted.
        """
        number = os.environ.get("MLFLOW_EXPERIMENT_ID")
        name = name or os.environ.get("MLFLOW_EXPERIMENT_NAME")
        if name is None and number:
            found = client.get_experiment(number)  # or an error that says so
            name = found.name
        name = name or project
        found = client.get_experiment_by_name(name)
        if found is None:
            try:
                return str(client.create_experiment(name, location or self._files(name)))
            except self._mlflow.MlflowException:
                found = client.get_experiment_by_name(name)  # another process created it first
                if found is None:
                    raise
        if found.lifecycle_stage != "active":
            raise SinkError(
                f"the MLflow experiment {name!r} is deleted; set another `experiment`, or run "
                f"`mlflow experiments restore -x {found.experiment_id}`"
            )
        return str(found.experiment_id)

    def delete(self, files: str, path: str) -> None:
        """Delete files of a run, if they exist.

        Args:
            files: address of the run's files.
            path: a file or folder among them.

        Raises:
            Exception: they can't be deleted; the errors of the stores have no common class.
        """
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        get_artifact_repository(files, tracking_uri=self._uri).delete_artifacts(path)

    def _files(self, name: str) -> str | None:
        """Return where to store the files of an experiment; None to let MLflow decide."""
        is_database, base = self._uri.startswith("sqlite:///"), self._base
        if not is_database or base is None:
            return None
        # MLflow itself would use the working directory.
        with suppress(OSError):
            if os.path.samefile(base, os.curdir):
                return None
        return os.path.join(base, "mlruns", re.sub(r"[^A-Za-z0-9_.-]", "_", name))

    def address(self, experiment: str, run: str) -> str:
        """Return the address of a run, or the command that shows it."""
        if self._uri.startswith("http"):
            return f"{_shown(self._uri)}/#/experiments/{experiment}/runs/{run}"
        if self._uri.startswith("databricks"):
            return f"{self._uri}: experiment {experiment}, run {run}"
        return f"mlflow ui --backend-store-uri {shlex.quote(_shown(self._uri))}"


def _imported() -> Any:
    """Import mlflow without starting its telemetry."""
    given = os.environ.get(_TELEMETRY)
    os.environ[_TELEMETRY] = given or "true"
    try:
        with required_package("mlflow"):
            import mlflow
    finally:
        if given is None:
            os.environ.pop(_TELEMETRY, None)
    return mlflow


def _reach(uri: str) -> None:
    """Check that a server answers: MLflow's client would silently retry for minutes."""
    if not uri.startswith("http"):
        return
    import ssl
    from http.client import HTTPException
    from urllib.error import HTTPError
    from urllib.request import urlopen

    place, found = _shown(uri), ""
    try:
        urlopen(f"{place}/health", timeout=10).close()
    except HTTPError as error:  # it may lack this page, or require a password
        error.close()
        found = str(error) if error.code in (502, 503, 504) else ""
    except (OSError, HTTPException) as error:
        reason = getattr(error, "reason", error)
        found = "" if isinstance(reason, ssl.SSLError) else str(reason)
    if found:
        raise SinkError(
            f"no MLflow server answers at {place} ({found}); start it, or set `tracking_uri`",
            retry=True,
        )


def _absolute(uri: str, base: str | None) -> str:
    """Return the URI of a database with the absolute path of its file, and create its folder."""
    kind, separator, path = uri.partition(":///")
    if kind != "sqlite" or not separator or path in ("", ":memory:"):
        return uri.rstrip("/")
    file = Path(base or "", Path(path).expanduser()).absolute()
    make_folder(file.parent, option="tracking_uri")
    return f"sqlite:///{file}"


def _shown(text: str) -> str:
    """Return a URI, or a text that contains URIs, without user names and passwords."""
    return re.sub(r"(?<=://)[^@/\s]*@", "", text)
