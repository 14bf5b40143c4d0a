"""The two packages that Lightning comes in, of which a program may use either or both."""

from __future__ import annotations

import importlib
import sys
from importlib.util import find_spec
from typing import Any

PACKAGES = ("lightning.pytorch", "pytorch_lightning")


def package_of(trainer: Any) -> str | None:
    """Return `lightning` or `pytorch_lightning`, None for what is no trainer of theirs."""
    for cls in type(trainer).__mro__:
        if cls.__name__ == "Trainer" and cls.__module__.startswith(PACKAGES):
            return str(cls.__module__.partition(".")[0])
    return None


def callback_base() -> type:
    """Return the `Callback` of the package that is in use, or one that is both if both are."""
    used = [name for name in PACKAGES if name in sys.modules]
    used = used or [name for name in PACKAGES if find_spec(name.partition(".")[0])][:1]
    return type("Callback", tuple(importlib.import_module(name).Callback for name in used), {})
