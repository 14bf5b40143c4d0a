"""What an `Accelerator` says of a training: who starts it and how, its folder, weights, rank."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import FrameType
from typing import Any


def initializing() -> tuple[Any, str | None]:
    """Return the accelerator that starts its trackers, and the project: it passes on neither."""
    from accelerate import Accelerator

    frame: FrameType | None = sys._getframe()
    while frame is not None:
        caller = frame.f_locals.get("self") if frame.f_code.co_name == "init_trackers" else None
        if isinstance(caller, Accelerator):
            project = frame.f_locals.get("project_name")
            return caller, None if project is None else str(project)
        frame = frame.f_back
    return None, None


def settings(accelerator: Any) -> dict[str, Any]:
    """Return how an accelerator trains; nothing is known without one."""
    if accelerator is None:
        return {}
    return {
        "mixed_precision": accelerator.mixed_precision,
        "gradient_accumulation_steps": accelerator.gradient_accumulation_steps,
        "distributed_type": str(accelerator.distributed_type.value),
        "num_processes": accelerator.num_processes,
        "device": str(accelerator.device),
    }


def save_dir_of(state: Any) -> str | None:
    """Return the folder of the training that saved a state, None for a state without a path."""
    if state is None:
        return None
    parent = Path(state).expanduser().absolute().parent
    return str(parent.parent if parent.name == "checkpoints" else parent)


def weights(accelerator: Any) -> list[Any]:
    """Return the weights of all models; none where each process has only a part of them."""
    models = getattr(accelerator, "_models", ())
    if not models or re.search("FSDP|DEEPSPEED|MEGATRON", accelerator.distributed_type.value):
        return []
    return [weight for model in models for weight in model.parameters()]


def process_index() -> int:
    """Return the rank that accelerate has given to this process, 0 if none yet."""
    from accelerate.state import PartialState, is_initialized

    return int(PartialState().process_index) if is_initialized() else 0
