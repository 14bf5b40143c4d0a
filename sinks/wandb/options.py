"""Options of the `wandb` sink, and W&B's rules for names.

A name from the configuration that W&B would refuse is an error there; a name from the training is
made valid.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from msgspec import Meta

from trainbus.interfaces import FilePath, Options

Project = Annotated[
    str,
    Meta(
        pattern=r"^[^/\\#?%:]+$",
        max_length=128,
        extra={"expected": r"a W&B project name: 1 to 128 characters, none of / \ # ? % :"},
        description="Project; by default the trainer's, made valid",
    ),
]
RunId = Annotated[
    str,
    Meta(
        pattern=r"^[^:;,#?/'\s](?:[^:;,#?/']*[^:;,#?/'\s])?$",
        max_length=128,
        extra={"expected": "a W&B run id: 1 to 128 characters, none of : ; , # ? / '"},
        description="Run id; by default the id of the run in trainbus",
    ),
]
Tag = Annotated[
    str,
    Meta(min_length=1, max_length=64, extra={"expected": "a W&B tag: 1 to 64 characters"}),
]


class WandbOptions(Options, frozen=True, kw_only=True):
    """Options of the `wandb` sink; what is not set here comes from the training."""

    project: Project | None = None
    entity: Annotated[str, Meta(description="User or team that owns the project")] | None = None
    name: Annotated[str, Meta(max_length=128, description="Display name of the run")] | None = None
    group: Annotated[str, Meta(description="Group that runs are gathered in")] | None = None
    job_type: Annotated[str, Meta(description="What the run does, such as `train`")] | None = None
    tags: Annotated[list[Tag], Meta(description="Tags, over those of the training")] | None = None
    notes: Annotated[str, Meta(description="A longer description of the run")] | None = None
    mode: (
        Annotated[
            Literal["online", "offline", "disabled", "shared"],
            Meta(description="Where the run goes; by default `WANDB_MODE`, else online"),
        ]
        | None
    ) = None
    dir: (
        Annotated[
            FilePath, Meta(description="Folder for wandb's files; by default the save directory")
        ]
        | None
    ) = None
    id: RunId | None = None
    resume: (
        Annotated[
            Literal["allow", "never", "must", "auto"],
            Meta(description="What an id that W&B knows means; by default `allow` for a resume"),
        ]
        | None
    ) = None
    save_checkpoints: Annotated[
        Literal["best", "last", "all", "none"], Meta(description="Checkpoints kept as artifacts")
    ] = "best"
    curves: Annotated[
        Literal["per_class", "mean"],
        Meta(description="Each class and the mean in one chart, or the mean alone"),
    ] = "per_class"
    curve_points: Annotated[int, Meta(ge=2, le=10_000, description="Points of each curve")] = 100
    log_images: Annotated[bool, Meta(description="Whether pictures are sent")] = True
    init_timeout_secs: Annotated[
        float,
        Meta(gt=0, description="How long the start of the run may take"),
    ] = 30.0


def project_name(name: str) -> str:
    r"""Return a project name that W&B takes: none of ``/ \ # ? % :``, at most 128 characters.

    A longer name keeps its end, which is where paths differ.
    """
    return re.sub(r"[/\\#?%:]", "-", name)[-128:] or "trainbus"


def run_name(name: str | None) -> str | None:
    """Return a display name of at most 128 characters without slashes and spaces."""
    return None if not name else name.replace("/", "-").replace(" ", "_")[:128]


def run_id(name: str) -> str:
    """Return a run id that W&B takes: none of ``: ; , # ? / '``, at most 128 characters."""
    return re.sub(r"[:;,#?/'\s]", "-", name)[:128]


def artifact_name(name: str) -> str:
    """Return an artifact name that W&B takes: letters, digits, `_ - .`, at most 128 characters."""
    return re.sub(r"[^A-Za-z0-9_.-]", "-", name)[:128]
