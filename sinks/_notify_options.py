"""Options of the `notify` sink."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeAlias

from msgspec import Meta

from trainbus.interfaces import FilePath, Options

Kind: TypeAlias = Literal["start", "end", "failure", "alert", "best"]

FIELDS = ("name", "run", "project", "kind", "what", "details")
FIELD = re.compile(r"\{(\w+)\}")


class NotifyOptions(Options, frozen=True, kw_only=True):
    """Options of the `notify` sink."""

    urls: Annotated[
        list[Annotated[str, Meta(min_length=1)]],
        Meta(
            min_length=1,
            description="Apprise URLs of the services; keep them in variables: `${SLACK_URL}`",
        ),
    ]
    when: Annotated[
        Sequence[Kind],
        Meta(min_length=1, description="What is told; `end` is one that is no failure"),
    ] = ("end", "failure", "alert")
    metric: (
        Annotated[
            str,
            Meta(min_length=1, description="Metric of `best`; by default the trainer's"),
        ]
        | None
    ) = None
    goal: (
        Annotated[
            Literal["max", "min"],
            Meta(description="Which value of `metric` is better"),
        ]
        | None
    ) = None
    title: Annotated[
        str, Meta(description="Title; of {name} {run} {project} {kind} {what} {details}")
    ] = "{name}: {what}"
    body: Annotated[str, Meta(min_length=1, description="Text, of the same")] = "{details}"
    min_interval_secs: Annotated[
        float,
        Meta(ge=0, description="Shortest time between two alerts, or two bests"),
    ] = 60.0
    max_age_secs: Annotated[
        float, Meta(ge=0, description="What happened longer ago, as in a replay, is not told")
    ] = 3600.0
    state: Annotated[
        FilePath,
        Meta(min_length=1, description="Folder that keeps which messages of a run were sent"),
    ] = "trainbus-runs/.notify"

    def __post_init__(self) -> None:
        for text in (self.title, self.body):
            if unknown := [name for name in FIELD.findall(text) if name not in FIELDS]:
                known = ", ".join(f"{{{name}}}" for name in FIELDS)
                raise ValueError(f"found {{{unknown[0]}}} in title or body, expected {known}")

    def __repr__(self) -> str:
        return f"NotifyOptions({len(self.urls)} urls, when={self.when!r})"

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        return [("urls", len(self.urls))]
