"""Which process of a distributed training this is."""

from __future__ import annotations

import logging
import os
import sys

logger = logging.getLogger("trainbus")


def current_rank() -> int:
    """Return the rank of this process: torch's if it is distributed, else what a launcher says."""
    distributed = sys.modules.get("torch.distributed")
    try:
        if distributed is not None and distributed.is_available() and distributed.is_initialized():
            return int(distributed.get_rank())
    except Exception:  # another thread is ending the group
        logger.debug("torch.distributed doesn't say which rank this is", exc_info=True)
    for name in ("RANK", "LOCAL_RANK"):
        value = os.environ.get(name, "")
        if value.isdecimal():
            return int(value)
    return 0
