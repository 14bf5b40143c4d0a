"""The same training, logged by the newest built-in callback and by trainbus: what reaches W&B.

Everything that differs is named here, and listed with its reason in docs/parity.md.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from support.train import LEARNER, weights_hash
from support.trained import Trained
from support.wandb_content import numbers, pictures, tables

PARITY = Path(__file__).parents[2] / "docs" / "parity.md"

OURS_ALONE = {
    "model/gradients",
    "model/layers",
    "model/speed_preprocess(ms)",
    "model/speed_postprocess(ms)",
    "metrics/per_class",
    "confusion_matrix/counts_table",
}
"""Keys of the history that only trainbus logs."""


def test_the_same_numbers_each_epoch(ours: Trained, builtin: Trained) -> None:
    """Losses, learning rates and metrics agree; only the phantom epoch is missing (F3)."""
    theirs, here = numbers(builtin.wandb_run, OURS_ALONE), numbers(ours.wandb_run, OURS_ALONE)
    assert list(range(1, 12)) == sorted(theirs)
    assert list(range(1, 11)) == sorted(here)
    assert {epoch: theirs[epoch] for epoch in here} == here


def test_the_final_evaluation_is_in_the_summary(ours: Trained, builtin: Trained) -> None:
    """What the built-in callback logs as epoch 11 is kept, under `final/` (F3)."""
    phantom = numbers(builtin.wandb_run, OURS_ALONE)[11]
    summary = ours.wandb_run.summary
    assert phantom == {k: summary[f"final/{k}"] for k in phantom}


def test_the_same_pictures(ours: Trained, builtin: Trained) -> None:
    """Every picture arrives with the same content under the same key."""
    assert pictures(builtin.wandb_run) == pictures(ours.wandb_run)


def test_the_same_curves_under_true_names(ours: Trained, builtin: Trained) -> None:
    """The curves agree point by point; blue's is no longer called green (F2)."""
    theirs = {
        key: [["blue" if name == "green" else name, y, x] for name, y, x in rows]
        for key, rows in tables(builtin.wandb_run).items()
    }
    assert theirs == tables(ours.wandb_run)
    assert 4 == len(theirs)


def test_the_same_charts(ours: Trained, builtin: Trained) -> None:
    """The charts are drawn with the same preset, fields and titles."""
    theirs, here = builtin.wandb_run.charts, dict(ours.wandb_run.charts)
    assert "wandb/confusion_matrix/v1" == here.pop("confusion_matrix/counts")["panel"]
    assert theirs == here


def test_the_same_artifact(ours: Trained, builtin: Trained) -> None:
    """The model is the same to the last weight, under the same name and aliases (F12)."""
    both = []
    for trained in (builtin, ours):
        run = trained.wandb_run
        (artifact,) = [a for a in run.artifacts if a.type == "model"]
        ((name, file),) = artifact.files.items()
        assert file.local_path is not None
        name_of_artifact = artifact.name.replace(run.run_id, "<run>")
        both.append((name_of_artifact, artifact.aliases, name, weights_hash(file.local_path)))
    assert both[0] == both[1]
    assert ("run_<run>_model", ("best", "latest"), "best.pt") == both[0][:3]


def test_the_same_weights(ours: Trained, builtin: Trained, train: Any) -> None:
    """With trainbus, with the built-in callback and with neither, training is the same."""
    plain = train("plain", epochs=10, model=LEARNER, config=None)
    hashes = {t.result["weights"] for t in (ours, builtin, plain)}
    assert 1 == len(hashes)
    assert None not in hashes


def test_the_same_run_settings(ours: Trained, builtin: Trained) -> None:
    """Project, name and config agree; only the id is one that no other run can have (F11)."""
    theirs, here = builtin.wandb_run, ours.wandb_run
    places = {"project", "save_dir"}  # each training has a folder of its own
    assert theirs.name == here.name
    assert here.project.endswith("-runs")
    assert {k: v for k, v in theirs.config.items() if k not in places} == {
        k: v for k, v in here.config.items() if k not in places
    }
    assert re.fullmatch(r"train_\d{8}_\d{6}_[0-9a-f]{6}", here.run_id)
    assert 0 == theirs.exit_code == here.exit_code


def test_no_key_is_lost(ours: Trained, builtin: Trained) -> None:
    """Every key that the built-in callback logs is logged here too, and the rest is listed."""
    theirs = {key for row in builtin.wandb_run.history for key in row}
    here = {key for row in ours.wandb_run.history for key in row}
    assert set() == theirs - here
    assert here - theirs == OURS_ALONE


@pytest.mark.parametrize("key", sorted(OURS_ALONE))
def test_what_differs_is_documented(key: str) -> None:
    """docs/parity.md names each key that only trainbus logs."""
    assert key.removesuffix("_table") in PARITY.read_text(encoding="utf-8")
