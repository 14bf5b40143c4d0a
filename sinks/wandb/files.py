"""Files as W&B artifacts."""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainbus.events import CurveLogged
from trainbus.toolkit.sinks import side_by_side

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
) -> bool:
    """Log files and folders as a version of an artifact; return whether W&B has them."""
    import wandb

    try:
        artifact = wandb.Artifact(name, kind, metadata=_metadata(metadata))
        _add_files(artifact, paths)
        run.log_artifact(artifact, aliases=list(aliases) or None)
    except (wandb.Error, OSError, TypeError, ValueError) as error:
        logger.warning("artifact %r can't be kept in W&B: %s", name, error)
        return False
    return True


class Curves:
    """All points of the curves of a run, of which its charts show a part."""

    def __init__(self, run: WandbRun) -> None:
        self._run = run
        self._artifact: WandbArtifact | None = None

    def add(self, event: CurveLogged) -> str | None:
        """Keep a curve; return the artifact's name for the first one, which is to be told."""
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
        """Log them, if there are any."""
        if self._artifact is not None:
            self._run.log_artifact(self._artifact)


def _metadata(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return metadata that W&B takes: ±Inf, which it refuses, as text, and at most 100 keys."""

    def finite(value: Any) -> Any:
        if isinstance(value, float) and not math.isfinite(value):
            return str(value)
        if isinstance(value, Mapping):
            return {k: finite(v) for k, v in value.items()}
        return [finite(v) for v in value] if isinstance(value, list) else value

    kept = {k: finite(v) for k, v in values.items() if v is not None}
    return kept if len(kept) <= 100 else {"metadata": kept}


def _add_files(artifact: WandbArtifact, paths: Sequence[str]) -> None:
    found = [path for path in paths if Path(path).exists()]
    for path in paths:
        if path not in found:
            logger.warning("artifact %r: no file at %s", artifact.name, path)
    if paths and not found:
        raise FileNotFoundError("none of its files is there")
    for path, name in side_by_side(found).items():
        if Path(path).is_dir():
            artifact.add_dir(path, name=name)
        else:
            artifact.add_file(path, name=name)
