"""Options of the `dvclive` sink."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from trainbus.interfaces import FilePath, Options
from trainbus.toolkit.sinks import Wanted


class DvcliveOptions(Options, frozen=True, kw_only=True):
    """Options of the `dvclive` sink."""

    dir: Annotated[
        FilePath,
        Meta(min_length=1, description="Folder of the files; `{run}` is replaced by the run's id"),
    ] = "dvclive/{run}"
    dvcyaml: (
        Annotated[
            FilePath,
            Meta(
                pattern=r"(^|/)dvc\.yaml$",
                extra={"expected": "a path that ends in `dvc.yaml`"},
                description="File that tells DVC how to draw the plots; by default none is written",
            ),
        ]
        | None
    ) = None
    save_checkpoints: Annotated[Wanted, Meta(description="Checkpoints copied into the folder")] = (
        "none"
    )
