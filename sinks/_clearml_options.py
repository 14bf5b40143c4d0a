"""Options of the `clearml` sink."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from trainbus.interfaces import FilePath, Options
from trainbus.toolkit.sinks import Wanted


class ClearmlOptions(Options, frozen=True, kw_only=True):
    """Options of the `clearml` sink; neither a server nor credentials are needed."""

    project: (
        Annotated[str, Meta(min_length=1, description="Project; by default the trainer's")] | None
    ) = None
    task_name: (
        Annotated[str, Meta(min_length=1, description="Name of the task; by default the trainer's")]
        | None
    ) = None
    tags: Annotated[tuple[str, ...], Meta(description="Tags besides the trainer's")] = ()
    dir: Annotated[
        FilePath,
        Meta(min_length=1, description="Folder of archives; `{run}` is replaced by the run's id"),
    ] = "clearml"
    save_checkpoints: Annotated[Wanted, Meta(description="Checkpoints kept as artifacts")] = "best"
