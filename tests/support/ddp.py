"""Drives Ultralytics' multi-GPU path on CPU: its own generated script, in two gloo processes.

With `device=cpu` Ultralytics never starts it, so the parent builds the trainer and calls Ultralytics'
own `generate_ddp_file`; in the children, this file (as `sitecustomize` on their path) joins them by
gloo and answers the CPU where the framework asks for an accelerator.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

CHILD = """
import os, sys
if "LOCAL_RANK" in os.environ:
    from support import torchvision_cpu
    torchvision_cpu.install()
    import torch, torch.distributed as dist
    from types import SimpleNamespace
    from ultralytics.engine import trainer as engine, validator

    dist.init_process_group("gloo")
    barrier = dist.barrier
    dist.barrier = lambda *args, **kwargs: barrier()
    cpu = SimpleNamespace(current_device=lambda: "cpu")
    real_device = torch.device
    engine_init = engine.BaseTrainer.__init__
    validator.get_torch_device_backend = lambda device: cpu
    class Torch:
        def __getattr__(self, name):
            return getattr(torch, name)
        def device(self, kind, *index):
            return real_device("cpu")
    validator.torch = Torch()
"""


def launch(
    script: Path, folder: Path, environment: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    """Run a script that Ultralytics generated for its children, in two processes on CPU."""
    hooks = folder / "hooks"
    hooks.mkdir(exist_ok=True)
    (hooks / "sitecustomize.py").write_text(textwrap.dedent(CHILD))
    path = os.pathsep.join([str(hooks), environment["PYTHONPATH"]])
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    return subprocess.run(
        [*command, "--master_port", "0", str(script)],
        env=environment | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        cwd=folder,
        text=True,
        capture_output=True,
        timeout=300,
        check=False,
    )
