"""Places a writer among the outputs of an algorithm's loggers, and takes it out again."""

from __future__ import annotations

from typing import Any


class Outputs:
    """Where a writer was placed.

    Args:
        writer: a `KVWriter`.
    """

    def __init__(self, writer: Any) -> None:
        self._writer = writer
        self._formats: list[list[Any]] = []

    def enter(self, logger: Any) -> None:
        """Have the writer be an output of a logger, also of one that was set meanwhile."""
        if self._writer not in logger.output_formats:
            logger.output_formats.append(self._writer)
            self._formats.append(logger.output_formats)

    def leave(self) -> None:
        """Take the writer out of every logger."""
        for formats in self._formats:
            formats[:] = [each for each in formats if each is not self._writer]
        self._formats = []
