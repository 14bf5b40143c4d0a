"""Options of the `wandb` sink, and W&B's rules for names.

A name in the configuration that W&B would reject is a configuration error; a name from the training
is made valid.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from msgspec import Meta

from trainbus.interfaces import FilePath, Options
from trainbus.toolkit.sinks import SaveCheckpoints

Project = Annotated[
    str,
    Meta(
        pattern=r"^[^/\\#?%:]+$",
        max_length=128,
        extra={"expected": r"a W&B project name: 1 to 128 characters, none of / \ # ? % :"},
        description="Project; by default the run's, made valid",
    ),
]
RunId = Annotated[
    str,
    Meta(
        pattern=r"^[^:;,#?/'\s](?:[^:;,#?/']*[^:;,#?/'\s])?$",
        max_length=128,
        extra={"expected": "a W&B run id: 1 to 128 characters, none of : ; , # ? / '"},
        description="Run id; by default the run's id in trainbus",
    ),
]
Tag = Annotated[
    str,
    Meta(min_length=1, max_length=64, extra={"expected": "a W&B tag: 1 to 64 characters"}),
]


class WandbOptions(Options, frozen=True, kw_only=True):
    """Options of the `wandb` sink; the training provides what is not set here."""

    project: Project | None = None
    entity: Annotated[str, Meta(description="User or team that owns the project")] | None = None
    name: Annotated[str, Meta(max_length=128, description="Run name")] | None = None
    group: Annotated[str, Meta(description="Group of related runs")] | None = None
    job_type: Annotated[str, Meta(description="Type of the run, such as `train`")] | None = None
    tags: Annotated[list[Tag], Meta(description="Tags; by default the run's")] | None = None
    notes: Annotated[str, Meta(description="Notes about the run")] | None = None
    # `| None` stays outside: Python reuses an equal union that was made before, as by wandb itself,
    # and literals are equal in any order.
    mode: (
        Annotated[
            Literal["online", "offline", "disabled", "shared"],
            Meta(description="Where to log the run; by default `WANDB_MODE`, else online"),
        ]
        | None
    ) = None
    dir: Annotated[
        FilePath | None,
        Meta(description="Folder for wandb's files; by default the run's `save_dir`"),
    ] = None
    id: RunId | None = None
    resume: (
        Annotated[
            Literal["allow", "never", "must", "auto"],
            Meta(
                description="What to do if W&B already has a run with this id; by "
                "default `allow` when resuming"
            ),
        ]
        | None
    ) = None
    save_checkpoints: SaveCheckpoints = "best"
    curves: Annotated[
        Literal["per_class", "mean"],
        Meta(description="Show each class and the mean in one chart, or only the mean"),
    ] = "per_class"
    curve_points: Annotated[int, Meta(ge=2, le=10_000, description="Points per curve")] = 100
    log_images: Annotated[bool, Meta(description="Whether to log pictures")] = True
    init_timeout_secs: Annotated[
        float, Meta(gt=0, description="Maximum time that starting the W&B run may take")
    ] = 30.0


def project_name(name: str) -> str:
    r"""Return a valid W&B project name: none of ``/ \ # ? % :``, at most 128 characters.

    A longer name keeps its end, where paths differ.
    """
    return re.sub(r"[/\\#?%:]", "-", name)[-128:] or "trainbus"


def run_name(name: str | None) -> str | None:
    """Return a display name of at most 128 characters without slashes and spaces."""
    return None if not name else name.replace("/", "-").replace(" ", "_")[:128]


def run_id(name: str) -> str:
    """Return a valid W&B run id: none of ``: ; , # ? / '``, at most 128 characters."""
    return re.sub(r"[:;,#?/'\s]", "-", name)[:128]


def artifact_name(name: str) -> str:
    """Return a valid W&B artifact name: letters, digits, `_ - .`, at most 128 characters."""
    return re.sub(r"[^A-Za-z0-9_.-]", "-", name)[:128]
