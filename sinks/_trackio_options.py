"""Options of the `trackio` sink."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from trainbus.interfaces import FilePath, Options
from trainbus.toolkit.sinks import Wanted


class TrackioOptions(Options, frozen=True, kw_only=True):
    """Options of the `trackio` sink; what is not set here comes from the training."""

    project: (
        Annotated[
            str,
            Meta(
                pattern=r"^(?!registry-)\w[\w .-]*$",
                max_length=128,
                extra={
                    "expected": "a Trackio project name: letters, digits, _ - . and spaces, not "
                    "beginning with `registry-`"
                },
                description="Project; by default the trainer's, made valid",
            ),
        ]
        | None
    ) = None
    dir: (
        Annotated[
            FilePath,
            Meta(
                min_length=1,
                description="Folder of the databases, one for a process; by default Trackio's own: "
                "`TRACKIO_DIR`, else `trackio` in Hugging Face's cache",
            ),
        ]
        | None
    ) = None
    save_checkpoints: Annotated[
        Wanted,
        Meta(description="Checkpoints kept as artifacts; `best` keeps the last until one is best"),
    ] = "best"
