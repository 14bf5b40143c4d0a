"""Options of the `mlflow` sink."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from trainbus.interfaces import FilePath, Options
from trainbus.toolkit.sinks import Wanted


class MlflowOptions(Options, frozen=True, kw_only=True):
    """Options of the `mlflow` sink; what is not set here comes from the training."""

    tracking_uri: (
        Annotated[
            str,
            Meta(
                pattern=r"^(databricks|(?!file:)[A-Za-z][A-Za-z0-9+.-]*:.+)$",
                extra={
                    "expected": "a URI such as `sqlite:///mlflow.db` or `http://host:5000`; "
                    "MLflow's store of plain files is no more"
                },
                description="Database or server; by default `MLFLOW_TRACKING_URI`, else "
                "`sqlite:///mlflow.db`",
            ),
        ]
        | None
    ) = None
    experiment: (
        Annotated[
            str,
            Meta(
                pattern=r"\S",
                max_length=500,
                extra={"expected": "an MLflow experiment name: 1 to 500 characters, not blank"},
                description="Experiment; by default `MLFLOW_EXPERIMENT_NAME` or `_ID`, else the "
                "trainer's project, else `Default`",
            ),
        ]
        | None
    ) = None
    run_name: (
        Annotated[str, Meta(min_length=1, max_length=250, description="Name of the run")] | None
    ) = None
    artifact_location: (
        Annotated[
            FilePath,
            Meta(
                min_length=1,
                description="Where files are kept, if the experiment is made by this sink; by "
                "default MLflow decides: the server's store, or `./mlruns` beside a database",
            ),
        ]
        | None
    ) = None
    save_checkpoints: Annotated[
        Wanted,
        Meta(description="Checkpoints kept as artifacts; `best` keeps the last until one is best"),
    ] = "best"
    tags: Annotated[dict[str, str], Meta(description="Tags of the run, with values")] | None = None
