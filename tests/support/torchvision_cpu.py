"""Make a torchvision that was built for CUDA importable beside a CPU build of torch.

Only for tests on a machine without a GPU. Where torchvision imports anyway, nothing changes. As a
script it prepares the process and then runs another one in it:

    python tests/support/torchvision_cpu.py SCRIPT [ARGS...]
    python tests/support/torchvision_cpu.py -m MODULE [ARGS...]
"""

import importlib
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

# An operator lives only as long as the library object that declared it.
_DECLARED: list[torch.library.Library] = []


def install() -> None:
    """Make `import torchvision` work, with a non-maximum suppression that needs no C++ operator."""
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
    else:
        return
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _DECLARED.append(library)
    ops = importlib.import_module("torchvision.ops")
    boxes = importlib.import_module("torchvision.ops.boxes")
    # Both hold the name: the package for its users, the module for its own batched_nms.
    for module in (ops, boxes):
        vars(module)["nms"] = _nms


def install_numpy() -> None:
    """Give NumPy the `trapz` that it dropped in 2.4 and Ultralytics 8.3.0 still calls."""
    if not hasattr(np, "trapz"):
        vars(np)["trapz"] = np.trapezoid


def main(argv: list[str]) -> None:
    """Prepare the process, then run the script or module that the arguments name."""
    if argv[:1] == ["-m"]:
        runs_module, argv = True, argv[1:]
    else:
        runs_module = False
    if not argv:
        raise SystemExit("usage: torchvision_cpu.py (SCRIPT | -m MODULE) [ARGS...]")
    sys.path[0] = str(Path.cwd()) if runs_module else str(Path(argv[0]).resolve().parent)
    sys.argv = argv
    install()
    install_numpy()
    if runs_module:
        runpy.run_module(argv[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(argv[0], run_name="__main__")


def _nms(boxes: torch.Tensor, scores: torch.Tensor, iou_threshold: float) -> torch.Tensor:
    # Looked up at the call: importing Ultralytics early would fix its settings for the process.
    try:
        ultralytics_nms: Any = importlib.import_module("ultralytics.utils.nms").TorchNMS.nms
    except (ImportError, AttributeError):
        return greedy_nms(boxes, scores, iou_threshold)
    kept: torch.Tensor = ultralytics_nms(boxes, scores, iou_threshold)
    return kept


def greedy_nms(boxes: torch.Tensor, scores: torch.Tensor, iou_threshold: float) -> torch.Tensor:
    """Return the indices of the boxes to keep, best score first.

    Args:
        boxes: Corners x1, y1, x2, y2; shape (N, 4).
        scores: Shape (N,).
        iou_threshold: A box that overlaps a kept one by more than this is dropped.
    """
    order = scores.argsort(descending=True, stable=True)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)
    kept = []
    while order.numel():
        best, order = order[0], order[1:]
        kept.append(best)
        low = torch.maximum(boxes[best, :2], boxes[order, :2])
        high = torch.minimum(boxes[best, 2:], boxes[order, 2:])
        shared = (high - low).clamp(min=0).prod(dim=1)
        order = order[shared / (areas[best] + areas[order] - shared) <= iou_threshold]
    return torch.stack(kept) if kept else order


if __name__ == "__main__":
    main(sys.argv[1:])
