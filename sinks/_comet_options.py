"""Options of the `comet` sink, and Comet's rule for names."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from trainbus.interfaces import FilePath, Options
from trainbus.toolkit.sinks import Wanted


class CometOptions(Options, frozen=True, kw_only=True):
    """Options of the `comet` sink; Comet reads the API key from COMET_API_KEY or its own file."""

    mode: Annotated[
        Literal["online", "offline"],
        Meta(description="Send to Comet at once, or write an archive for `comet upload`"),
    ] = "online"
    project: (
        Annotated[str, Meta(min_length=1, description="Project; by default the trainer's")] | None
    ) = None
    workspace: Annotated[str, Meta(min_length=1, description="Workspace")] | None = None
    name: (
        Annotated[str, Meta(description="Name of the experiment; by default the trainer's")] | None
    ) = None
    tags: Annotated[tuple[str, ...], Meta(description="Tags besides the trainer's")] = ()
    dir: Annotated[
        FilePath,
        Meta(min_length=1, description="Folder of archives; `{run}` is replaced by the run's id"),
    ] = "comet"
    save_checkpoints: Annotated[Wanted, Meta(description="Checkpoints kept as models")] = "best"


def clean(name: str) -> str:
    """Return a name that Comet takes as it is: without line breaks, not empty, no home folder."""
    return "".join(c if c.isprintable() else "_" for c in name).strip(" ~") or "_"
