"""Finds the rank of this process in a distributed training."""

from __future__ import annotations

import logging
import os
import sys

logger = logging.getLogger("trainbus")


def current_rank() -> int:
    """Return the rank of this process, from torch.distributed if initialized, or the launcher."""
    distributed = sys.modules.get("torch.distributed")
    try:
        if distributed is not None and distributed.is_available() and distributed.is_initialized():
            return int(distributed.get_rank())
    except Exception:  # another thread is destroying the process group
        logger.debug("torch.distributed did not return the rank", exc_info=True)
    for name in ("RANK", "LOCAL_RANK"):
        value = os.environ.get(name, "")
        if value.isdecimal():
            return int(value)
    return 0
