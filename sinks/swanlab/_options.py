"""Options of the `swanlab` sink."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from trainbus.interfaces import FilePath, Options
from trainbus.toolkit.sinks import Wanted


class SwanlabOptions(Options, frozen=True, kw_only=True):
    """Options of the `swanlab` sink; what is not set here comes from the training."""

    project: (
        Annotated[
            str,
            Meta(
                pattern=r"^[0-9a-zA-Z_+.-]+$",
                max_length=100,
                extra={"expected": "a SwanLab project name: 1 to 100 letters, digits, _ - + and ."},
                description="Project; by default the trainer's, made valid",
            ),
        ]
        | None
    ) = None
    workspace: Annotated[str, Meta(description="User or team that owns the project")] | None = None
    mode: (
        Annotated[
            Literal["cloud", "offline", "local", "disabled"],
            Meta(description="By default `SWANLAB_MODE`, else `cloud`"),
        ]
        | None
    ) = None
    logdir: (
        Annotated[
            FilePath,
            Meta(
                min_length=1,
                description="Folder for SwanLab's files, `{run}` stands for the run's id; by "
                "default `SWANLAB_LOG_DIR`, else `swanlog`",
            ),
        ]
        | None
    ) = None
    save_checkpoints: Annotated[
        Wanted, Meta(description="Checkpoints kept; `best` keeps the last where none is best")
    ] = "best"
