"""The reader of offline logs returns what real wandb runs were given, whole or cut off."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import wandb
from PIL import Image

from support import wandb_file

PIXELS = np.full((8, 8, 3), 7, dtype=np.uint8)
LONG = [0.5] * 20_000  # longer than two blocks of the log


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a run that logged one of everything, and a younger run that was resumed."""
    folder = tmp_path_factory.mktemp("offline")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        for name in ("DIR", "CACHE_DIR", "CONFIG_DIR", "DATA_DIR"):
            patch.setenv(f"WANDB_{name}", str(folder))
        # wandb reads its environment once per process, unless it is torn down.
        wandb.teardown()
        log_everything(folder)
        with wandb.init(project="shapes", id="second", resume="allow") as run:
            run.log({"loss": 1.0})
        wandb.teardown()
        yield folder


def log_everything(folder: Path) -> None:
    run: Any = wandb.init(
        project="shapes",
        entity="team",
        id="first",
        name="before",
        group="nightly",
        job_type="train",
        tags=["a"],
        notes="A note.",
        config={"lr": 0.1, "data": {"size": [4, 2]}},
    )
    run.define_metric("epoch", hidden=True)
    run.define_metric("train/*", step_metric="epoch", summary="min")
    run.define_metric("train/*", step_metric="epoch", summary="max")
    run.config.update({"late": "yes"})
    run.log({"train/loss": 1.5, "epoch": 1, "odd": math.inf}, step=1, commit=False)
    run.log({"nested": {"deep": {"x": 1}}, "none": None}, step=1)
    run.log({"train/loss": 0.5, "epoch": 2, "long": LONG}, step=4)
    run.log({"too": "late"}, step=2)
    run.log({"picture": wandb.Image(PIXELS, caption="Grey.")}, step=5, commit=False)
    table = wandb.Table(columns=["class", "y", "x"], data=[["red", 0.25, 1], ["mean", 0.5, 2]])
    fields = {"x": "x", "y": "y", "class": "class"}
    chart = wandb.plot_table("wandb/area-under-curve/v0", table, fields, {"title": "PR"})
    run.log({"curves/PR": chart}, step=5)
    run.summary["best"] = 0.75
    run.summary["gone"] = 1
    del run.summary["gone"]
    (folder / "best.pt").write_bytes(b"weights")
    artifact = wandb.Artifact("run_first_model", "model", metadata={"epoch": 2})
    artifact.add_file(str(folder / "best.pt"))
    run.log_artifact(artifact, aliases=["best"])
    run.name = "after"
    run.tags += ("b",)
    run.finish(exit_code=1)


@pytest.fixture
def path(folder: Path) -> Path:
    """The log of the first run."""
    return wandb_file.find_runs(folder)[0]


@pytest.fixture
def run(path: Path) -> wandb_file.WandbRun:
    """The first run, read back."""
    return wandb_file.read_run(path)


@pytest.mark.needs("posix")
def test_runs_are_found_once_and_by_age(folder: Path) -> None:
    """The link to the latest run adds nothing."""
    assert (folder / "wandb" / "latest-run").is_symlink()
    names = [path.name for path in wandb_file.find_runs(folder)]
    assert ["run-first.wandb", "run-second.wandb"] == names


def test_identity_is_the_last_one_recorded(run: wandb_file.WandbRun) -> None:
    """A changed name and tags replace those at the start; the rest stays."""
    assert ("first", "shapes", "team") == (run.run_id, run.project, run.entity)
    assert ("after", "nightly", "train") == (run.name, run.group, run.job_type)
    assert (("a", "b"), "A note.", 1) == (run.tags, run.notes, run.exit_code)


def test_a_run_tells_whether_it_was_resumed(folder: Path) -> None:
    """Only the second run asked for it, and it ended well."""
    first, second = (wandb_file.read_run(path) for path in wandb_file.find_runs(folder))
    assert (False, True) == (first.resume, second.resume)
    assert 0 == second.exit_code


def test_config_is_merged_without_what_wandb_adds(run: wandb_file.WandbRun) -> None:
    """Later updates join the config of the start."""
    assert {"lr": 0.1, "data": {"size": [4, 2]}, "late": "yes"} == run.config


def test_history_has_a_row_per_committed_step(run: wandb_file.WandbRun) -> None:
    """Parts of one step are one row, a step in the past is dropped, a long row is whole."""
    assert [1, 4, 5] == [row["_step"] for row in run.history]
    assert all({"_runtime", "_timestamp"} <= set(row) for row in run.history)
    rows = [{key: row[key] for key in row if key[0] != "_"} for row in run.history]
    first = {"train/loss": 1.5, "epoch": 1, "odd": math.inf, "nested.deep.x": 1, "none": None}
    assert [first, {"train/loss": 0.5, "epoch": 2, "long": LONG}] == rows[:2]
    assert {"picture", "curves/PR_table"} == set(rows[2])


def test_summary_is_the_last_state(run: wandb_file.WandbRun) -> None:
    """Rules of `define_metric` count, values set by hand too, and a removed one is gone."""
    assert {"train/loss.min": 0.5, "train/loss.max": 1.5, "best": 0.75, "epoch": 2} == {
        key: run.summary[key] for key in ("train/loss.min", "train/loss.max", "best", "epoch")
    }
    assert {"gone", "too", "_wandb.runtime"}.isdisjoint(run.summary)


def test_metrics_are_known_by_name_or_glob(run: wandb_file.WandbRun) -> None:
    """A second definition of a metric adds to the first."""
    assert {
        "epoch": {"step_metric": "", "step_sync": False, "hidden": True, "summary": []},
        "train/*": {
            "step_metric": "epoch",
            "step_sync": True,
            "hidden": False,
            "summary": ["min", "max"],
        },
    } == run.metrics


def test_an_image_can_be_opened(run: wandb_file.WandbRun) -> None:
    """Its file holds the pixels that were logged, and is among the run's files."""
    value = run.history[-1]["picture"]
    assert ("image-file", "Grey.") == (value["_type"], value["caption"])
    with Image.open(wandb_file.media_path(run, value)) as picture:
        assert PIXELS.tolist() == np.asarray(picture).tolist()
    assert value["path"] in run.files


def test_a_chart_leads_to_its_table(run: wandb_file.WandbRun) -> None:
    """The chart survives the later change of the run's name."""
    assert {
        "curves/PR": {
            "panel": "wandb/area-under-curve/v0",
            "fields": {"x": "x", "y": "y", "class": "class"},
            "strings": {"title": "PR"},
            "table": "curves/PR_table",
        }
    } == run.charts
    columns, rows = wandb_file.read_table(run, run.history[-1][run.charts["curves/PR"]["table"]])
    assert ["class", "y", "x"] == columns
    assert [["red", 0.25, 1], ["mean", 0.5, 2]] == rows


def test_an_artifact_tells_its_files(run: wandb_file.WandbRun) -> None:
    """The model comes after the artifact that wandb makes of a table."""
    assert ["run_table", "model"] == [artifact.type for artifact in run.artifacts]
    model = run.artifacts[1]
    assert ("run_first_model", {"epoch": 2}) == (model.name, model.metadata)
    assert ("best", "latest") == model.aliases
    file = model.files["best.pt"]
    assert (["best.pt"], 7, None) == (list(model.files), file.size, file.ref)
    assert file.local_path is not None
    assert b"weights" == file.local_path.read_bytes()


def test_a_log_cut_anywhere_gives_what_is_whole(path: Path, tmp_path: Path) -> None:
    """Each cut yields the first records, and at least all those that ended before it."""
    data, whole = path.read_bytes(), list(wandb_file.read_records(path))
    counts = []
    cut = tmp_path / path.name
    for size in range(len(wandb_file.HEADER), len(data), 331):
        cut.write_bytes(data[:size])
        records = list(wandb_file.read_records(cut))
        assert whole[: len(records)] == records
        counts.append(len(records))
    assert sorted(counts) == counts
    assert 0 == counts[0] < counts[-1] <= len(whole)
    cut.write_bytes(data[:-1])
    run = wandb_file.read_run(cut)
    assert (None, 3) == (run.exit_code, len(run.history))


def test_an_empty_log_says_so(tmp_path: Path) -> None:
    """A header alone is what a killed run may leave."""
    path = tmp_path / "run-x.wandb"
    path.write_bytes(wandb_file.HEADER)
    with pytest.raises(ValueError, match=r"run-x\.wandb holds no run record"):
        wandb_file.read_run(path)


def test_a_damaged_log_is_an_error(path: Path, tmp_path: Path) -> None:
    """A changed byte is not taken for the end of the log."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    damaged = tmp_path / path.name
    damaged.write_bytes(data)
    with pytest.raises(ValueError, match="is damaged: wrong checksum"):
        wandb_file.read_run(damaged)


def test_another_file_is_an_error(tmp_path: Path) -> None:
    """The error shows what the file begins with."""
    path = tmp_path / "run-x.wandb"
    path.write_bytes(b"something else")
    with pytest.raises(ValueError, match="begins with b'somethi', expected b':W&B"):
        wandb_file.read_run(path)


def test_media_without_a_file_is_an_error(run: wandb_file.WandbRun) -> None:
    """Not every media value has one file."""
    with pytest.raises(ValueError, match="expected a media value with a path, found"):
        wandb_file.media_path(run, {"_type": "histogram"})
