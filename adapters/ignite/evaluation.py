"""The engines that evaluate inside a trainer's run: their names and their handlers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from typing import Any


class Engines:
    """A trainer, the evaluators seen in one of its trainings, and those that the user named.

    Args:
        trainer: the engine that trains.
        named: name → evaluator, given by the user.
    """

    def __init__(self, trainer: Any, named: Mapping[str, Any]) -> None:
        self._trainer = trainer
        self._named = named
        self._evaluators = {id(engine): engine for engine in named.values()}
        self._names: dict[tuple[int, bool], str] = {}

    def __contains__(self, evaluator: object) -> bool:
        return id(evaluator) in self._evaluators

    def add(self, evaluator: Any) -> None:
        """Add an evaluator that is about to run."""
        self._evaluators[id(evaluator)] = evaluator

    def handlers(self) -> list[Any]:
        """Return the handlers of trainer and evaluators, each once."""
        found = [handler for handler, *_ in self._entries()]
        # For an event with a filter, ignite registers a function in place of the handler.
        handlers = [h._parent() if hasattr(h, "_parent") else h for h in found]
        return list({id(h): h for h in handlers}.values())

    def loggers(self) -> list[Any]:
        """Return the arguments of handlers, among which are ignite's loggers."""
        return [each for _, args, _ in self._entries() for each in args]

    def _entries(self) -> Iterator[tuple[Any, Sequence[Any], Mapping[str, Any]]]:
        """Yield handlers with their arguments."""
        for engine in (self._trainer, *self._evaluators.values()):
            for entries in engine._event_handlers.values():
                yield from entries

    def name(self, evaluator: Any, *, is_train: bool) -> str:
        """Return the user's name, else that of the engine's logger, else `val`, made unique.

        Args:
            evaluator: the engine.
            is_train: whether it runs over the training data.
        """
        given = next((name for name, each in self._named.items() if each is evaluator), None)
        name = given or _logger_name(evaluator) or "val"
        if is_train and not name.startswith("train"):
            name = "train_eval"
        elif given:
            return given
        key = id(evaluator), is_train
        if key not in self._names:
            taken = {*self._names.values(), *self._named}
            free = (f"{name}{i}" if i > 1 else name for i in count(1))
            self._names[key] = next(each for each in free if each not in taken)
        return self._names[key]


def _logger_name(engine: Any) -> str:
    """Return the name that the user gave an engine's logger: `val` for `Val Evaluator`."""
    name = engine.logger.name
    if name.startswith("ignite."):
        return ""
    return re.sub(r"\W+", "_", name.lower().replace("evaluator", "")).strip("_")
