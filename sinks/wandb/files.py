"""Files as W&B artifacts: checkpoints, artifacts, and the complete curves of a run."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainbus.events import CurveLogged
from trainbus.toolkit.sinks import side_by_side, to_json

from .options import artifact_name

if TYPE_CHECKING:
    from wandb import Artifact as WandbArtifact
    from wandb import Run as WandbRun

logger = logging.getLogger("trainbus.sinks.wandb")


def log_files(
    run: WandbRun,
    name: str,
    kind: str,
    paths: Sequence[str],
    aliases: Sequence[str],
    metadata: Mapping[str, Any],
    lose: Callable[[str, object], None],
) -> None:
    """Log files and folders as a version of an artifact; `lose` it if W&B can't store it."""
    import wandb

    try:
        artifact = wandb.Artifact(name, kind, metadata=_metadata(metadata))
        _add_files(artifact, paths)
        run.log_artifact(artifact, aliases=list(aliases) or None)
    except (wandb.Error, OSError, TypeError, ValueError) as error:
        lose(name, error)


class Curves:
    """An artifact with all points of a run's curves, of which the charts show only some."""

    def __init__(self, run: WandbRun) -> None:
        self._run = run
        self._artifact: WandbArtifact | None = None

    def add(self, event: CurveLogged) -> str | None:
        """Add a curve; return the name of the artifact for the first one, to be logged."""
        import wandb

        from .charts import write_curve

        is_first = self._artifact is None
        if self._artifact is None:
            name = artifact_name(f"run_{self._run.id}_curves")
            self._artifact = wandb.Artifact(name, "curves")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "curve.csv"
            write_curve(event, path)
            name = f"{artifact_name(event.key)}.csv"
            self._artifact.add_file(str(path), name=name, overwrite=True)
        return self._artifact.name if is_first else None

    def log(self) -> None:
        """Log the artifact, if it has any curves."""
        if self._artifact is not None:
            self._run.log_artifact(self._artifact)


def _metadata(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return metadata that W&B accepts: without ±Inf and None, and with at most 100 keys."""
    kept = {k: to_json(v) for k, v in values.items() if v is not None}
    return kept if len(kept) <= 100 else {"metadata": kept}


def _add_files(artifact: WandbArtifact, paths: Sequence[str]) -> None:
    found = [path for path in paths if Path(path).exists()]
    for path in paths:
        if path not in found:
            logger.warning("artifact %r: no file at %s", artifact.name, path)
    if paths and not found:
        raise FileNotFoundError("none of its files exists")
    for path, name in side_by_side(found).items():
        if Path(path).is_dir():
            artifact.add_dir(path, name=name)
        else:
            artifact.add_file(path, name=name)
