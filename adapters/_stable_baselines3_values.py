"""Sorts what an algorithm's logger holds by phase, and by the timestep at which it was measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_COUNTERS = {
    f"time/{name}" for name in ("episodes", "iterations", "time_elapsed", "total_timesteps")
}


class Values:
    """The values of one `learn`, of which a logger writes those of an update one log late.

    Args:
        step: timestep at which it begins.
        earlier: what the logger holds by then, which is not of this `learn`.
    """

    def __init__(self, step: int = 0, earlier: Mapping[str, Any] | None = None) -> None:
        self._earlier = dict(earlier or {})
        self._of_update: dict[str, Any] = {}
        self._updated_at = step

    def updated(self, step: int, held: Mapping[str, Any]) -> None:
        """Say when the last update was, and what the logger still holds of it."""
        self._updated_at, self._of_update = step, dict(held)

    def sort(
        self, written: Mapping[str, Any], excluded: Mapping[str, Any], step: int
    ) -> Iterator[tuple[int, str, dict[str, Any]]]:
        """Yield the values that are written to the logger's outputs: timestep, phase and values.

        Args:
            written: all that the logger holds.
            excluded: name → the outputs that are not to have it.
            step: the timestep of now.
        """
        kept = {
            name: value
            for name, value in written.items()
            if name not in _COUNTERS
            and "trainbus" not in (excluded.get(name) or ())
            and self._earlier.get(name) is not value
        }
        of_update = {name: v for name, v in kept.items() if self._of_update.get(name) is v}
        recent = {name: v for name, v in kept.items() if name not in of_update}
        self._earlier, self._of_update = {}, {}
        for at, values in ((self._updated_at, of_update), (step, recent)):
            judged = {name: v for name, v in values.items() if name.startswith("eval/")}
            yield at, "train", {name: v for name, v in values.items() if name not in judged}
            yield at, "validation", judged
