"""The name `trainbus` in the `report_to` of transformers' `TrainingArguments`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_NAME = "trainbus"


def make_known(callback: Callable[[], Any]) -> Callable[[], None]:
    """Have each Trainer that is made with the name get a callback.

    Args:
        callback: makes it.

    Returns:
        A function that makes the name unknown again.
    """
    known = _known()

    class Registered:
        """What the Trainer makes without arguments."""

        def __new__(cls) -> Any:
            return callback()

    before = known.get(_NAME)
    known[_NAME] = Registered

    def forget() -> None:
        if known.get(_NAME) is Registered:
            del known[_NAME]
            known.update({} if before is None else {_NAME: before})

    return forget


def accept() -> None:
    """Have no Trainer refuse the name; where nobody made it known, it adds nothing."""
    from transformers import TrainerCallback

    _known().setdefault(_NAME, TrainerCallback)


def _known() -> dict[str, Any]:
    from transformers.integrations import integration_utils

    found: dict[str, Any] = integration_utils.INTEGRATION_TO_CALLBACK
    return found
