"""Drives Ultralytics' multi-GPU path on CPU: its own generated script, in two gloo processes.

With `device=cpu` Ultralytics never starts it, so a test builds the trainer and calls the
framework's own `generate_ddp_file`; in the children, `join` brings them together by gloo, and
answers the CPU where the framework asks for an accelerator.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

CHILD = """
import os
if "LOCAL_RANK" in os.environ:
    from support import ddp
    ddp.join()
"""


def join() -> None:
    """Join the other child by gloo, and make Ultralytics take the CPU for its accelerator."""
    from support import torchvision_cpu

    torchvision_cpu.install()
    import torch
    import torch.distributed
    from ultralytics.engine import validator

    torch.distributed.init_process_group("gloo")
    barrier = torch.distributed.barrier

    def barrier_on_cpu(*args: Any, **kwargs: Any) -> None:
        barrier()

    class TorchOnCpu:
        cuda = SimpleNamespace(current_device=lambda: 0)  # how older versions ask for it

        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

        def device(self, kind: Any, *index: Any) -> Any:
            return torch.device("cpu")

    torch.distributed.barrier = barrier_on_cpu
    validator.get_torch_device_backend = lambda device: SimpleNamespace(current_device=lambda: 0)
    validator.torch = TorchOnCpu()


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def launch(
    script: Path, folder: Path, environment: dict[str, str], startup: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a script that Ultralytics generated for its children, in two processes on CPU.

    Args:
        script: what Ultralytics generated.
        folder: where it runs.
        environment: of the processes.
        startup: folder with a `sitecustomize` that is run before the one of this file.
    """
    hooks = folder / "hooks"
    hooks.mkdir(exist_ok=True)
    (hooks / "sitecustomize.py").write_text(CHILD)
    before = [] if startup is None else [str(startup)]
    path = os.pathsep.join([*before, str(hooks), environment["PYTHONPATH"]])
    port = free_port()
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    return subprocess.run(
        [*command, "--master_port", str(port), str(script)],
        env=environment | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        cwd=folder,
        text=True,
        capture_output=True,
        timeout=400,
        check=False,
    )
