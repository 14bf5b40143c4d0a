"""Makes sinks of a test known to every process that finds a folder on its path."""

from __future__ import annotations

import textwrap
from pathlib import Path


def make_plugin(folder: Path, name: str, source: str, cls: str) -> Path:
    """Write a module and the entry point of the sink in it; return the folder for `sys.path`."""
    folder.mkdir(parents=True, exist_ok=True)
    module = f"{name}_of_a_test"
    (folder / f"{module}.py").write_text(textwrap.dedent(source), encoding="utf-8")
    about = folder / f"{module}-1.0.dist-info"
    about.mkdir(exist_ok=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[trainbus.sinks]\n{name} = {module}:{cls}\n")
    return folder
