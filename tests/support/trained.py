"""A finished training, with everything that was recorded of it, for tests to look at."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support import train, wandb_file
from trainbus.events import Record, decode

CONFIG = """
sinks:
  tracking:
    type: wandb
    mode: offline
  local:
    type: jsonl
    path: {root}/records/{{run}}.jsonl
"""
"""What trainbus is configured with, unless a scenario brings its own."""

UNDRAWN = {"plots": False}
"""Arguments of a training whose plots no test looks at: to draw them takes almost half its time."""


@dataclass(frozen=True)
class Trained:
    """One training that ran in a process of its own."""

    scenario: train.Scenario
    process: subprocess.CompletedProcess[str]

    @property
    def root(self) -> Path:
        """Folder that holds everything."""
        return Path(self.scenario.root)

    @property
    def result(self) -> dict[str, Any]:
        """What the script wrote at its end."""
        return train.result(self.scenario)

    @property
    def save_dir(self) -> Path:
        """The trainer's save directory."""
        return Path(self.result["save_dir"])

    @property
    def wandb_runs(self) -> list[wandb_file.WandbRun]:
        """All W&B runs that it left behind, oldest first."""
        return [wandb_file.read_run(path) for path in wandb_file.find_runs(self.root)]

    @property
    def wandb_run(self) -> wandb_file.WandbRun:
        """The only W&B run that it left behind."""
        (run,) = self.wandb_runs
        return run

    @property
    def records(self) -> list[Record]:
        """All records of the `jsonl` sink, in the order in which they were written."""
        files = sorted((self.root / "records").glob("*.jsonl"), key=lambda p: p.stat().st_mtime)
        return [decode(line) for path in files for line in path.read_bytes().splitlines()]

    def events(self, kind: type[Any]) -> list[Any]:
        """All recorded events of one type."""
        return [r.event for r in self.records if isinstance(r.event, kind)]


def train_once(
    root: Path,
    data: Path,
    *,
    config: str | None = CONFIG,
    version: str | None = None,
    environment: dict[str, str] | None = None,
    check: bool = True,
    epochs: int = 2,
    arguments: dict[str, Any] | None = None,
    **scenario: Any,
) -> Trained:
    """Train in a process of its own; `scenario` has further fields of `train.Scenario`.

    Raises:
        AssertionError: the process failed, unless `check` is False.
    """
    root.mkdir(parents=True)
    file = None
    if config is not None:
        file = root / "trainbus.yaml"
        file.write_text(config.format(root=root))
    described = train.Scenario(
        root=str(root),
        data=str(data),
        config=str(file) if file else None,
        train={"epochs": epochs, **(arguments or {})},
        **scenario,
    )
    process = train.run(described, version=version, environment=environment)
    assert not check or process.returncode == 0, process.stdout[-2000:] + process.stderr[-4000:]
    return Trained(described, process)
