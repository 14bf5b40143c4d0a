"""The examples run unchanged, and everything they log arrives."""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tokenize
from dataclasses import dataclass
from pathlib import Path
from shutil import copytree, ignore_patterns

import pytest

from support import train, wandb_file
from support.wandb_file import WandbRun
from trainbus import Record
from trainbus.events import MetricsLogged, decode
from trainbus.testing import check_grammar

ROOT = Path(__file__).parents[2]
SHIM = ROOT / "tests" / "support" / "torchvision_cpu.py"
EPOCHS = list(range(1, 13))
NO_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


@dataclass(frozen=True)
class Example:
    """An example that ran in a folder of its own."""

    folder: Path
    process: subprocess.CompletedProcess[str]

    @property
    def receipt(self) -> str:
        """The receipt that was printed at the end."""
        found = self.process.stderr.find("trainbus: run ")
        assert found >= 0, self.process.stderr[-4000:]
        return self.process.stderr[found:]

    @property
    def file(self) -> Path:
        """The records file that the receipt names."""
        (path,) = re.findall(r"^ +(/.+\.jsonl)$", self.receipt, re.MULTILINE)
        return Path(path)

    @property
    def records(self) -> list[Record]:
        """The records in that file."""
        return [decode(line) for line in self.file.read_bytes().splitlines()]

    @property
    def wandb_run(self) -> WandbRun:
        """The run that W&B received."""
        (log,) = wandb_file.find_runs(self.folder)
        return wandb_file.read_run(log)


def run(folder: Path, *command: str) -> Example:
    """Run an example in a folder with a copy of everything that it needs."""
    for name in ("examples", "config"):
        copytree(ROOT / name, folder / name, ignore=ignore_patterns("__pycache__"))
    process = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=train.hermetic(folder),
        capture_output=True,
        encoding="utf-8",
        timeout=300,
        check=False,
    )
    return Example(folder.resolve(), process)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Example:
    """What `make demo` runs."""
    folder = tmp_path_factory.mktemp("demo")
    train.save_below(folder)
    return run(folder, str(SHIM), "examples/ultralytics_wandb.py")


def test_plain_loop_runs(tmp_path: Path) -> None:
    """The file in the receipt has the complete run, with the numbers of ten epochs."""
    example = run(tmp_path, "examples/plain_loop.py")
    assert 0 == example.process.returncode, example.process.stderr[-4000:]
    assert [] == check_grammar(example.records)
    metrics = [r.event for r in example.records if isinstance(r.event, MetricsLogged)]
    assert list(range(10)) == [event.epoch for event in metrics]
    assert {"train/loss", "train/slope", "train/offset"} == metrics[-1].values.keys()
    assert metrics[-1].values["train/loss"] < metrics[0].values["train/loss"] / 10


def test_plain_loop_is_short() -> None:
    """A plain loop takes at most 15 lines of code."""
    assert len(code_lines((ROOT / "examples" / "plain_loop.py").read_text())) <= 15


def test_code_lines_are_counted() -> None:
    """Blank lines, comments and docstring don't count; each line of a long statement does."""
    assert {4, 5, 6, 7} == code_lines(
        '"""Doc\nstring."""\n\nx = [\n    1,\n]\ny = """a"""\n# end\n'
    )


def code_lines(text: str) -> set[int]:
    """Return the numbers of the lines that contain code."""
    found: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in NO_CODE:
            found |= set(range(token.start[0], token.end[0] + 1))
    first = ast.parse(text).body[0]
    assert isinstance(first, ast.Expr)
    return found - set(range(first.lineno, (first.end_lineno or 0) + 1))


@pytest.mark.needs("ultralytics")
def test_demo_succeeds(demo: Example) -> None:
    """The demo exits with 0, and its W&B run too."""
    assert 0 == demo.process.returncode, demo.process.stderr[-4000:]
    assert ("shapes", "demo", 0) == (
        demo.wandb_run.name,
        demo.wandb_run.project,
        demo.wandb_run.exit_code,
    )


@pytest.mark.needs("ultralytics")
def test_demo_says_where_everything_is(demo: Example) -> None:
    """The receipt names the folder of the W&B run and the file of all records; both exist."""
    assert [str(demo.wandb_run.dir)] == re.findall(r"wandb sync (.+)", demo.receipt)
    assert demo.file.is_relative_to(demo.folder)
    assert [] == check_grammar(demo.records)
    counts = re.findall(r"(\d+) (?:records|delivered)", demo.receipt)
    assert [str(len(demo.records))] * 4 == counts


@pytest.mark.needs("ultralytics")
def test_demo_logs_a_row_an_epoch(demo: Example) -> None:
    """Losses, learning rates and metrics of an epoch are in one row, with its number."""
    expected = {
        *(f"{phase}/{loss}_loss" for phase in ("train", "val") for loss in ("box", "cls", "dfl")),
        *(f"metrics/{name}(B)" for name in ("precision", "recall", "mAP50", "mAP50-95")),
        *(f"lr/pg{group}" for group in range(3)),
    }
    rows = [row for row in demo.wandb_run.history if "epoch" in row]
    assert EPOCHS == [row["epoch"] for row in rows]
    assert [set()] * len(EPOCHS) == [expected - row.keys() for row in rows]
    others = [row for row in demo.wandb_run.history if "epoch" not in row]
    assert [set()] * len(others) == [expected & row.keys() for row in others]


@pytest.mark.needs("ultralytics")
def test_demo_describes_the_model_once(demo: Example) -> None:
    """Size and speed are logged with the first epoch, and not again."""
    expected = {"model/parameters", "model/GFLOPs", "model/speed_PyTorch(ms)"}
    described = [row for row in demo.wandb_run.history if expected & row.keys()]
    assert [1] == [row["epoch"] for row in described]
    assert set() == expected - described[0].keys()


@pytest.mark.needs("ultralytics")
def test_demo_logs_every_plot_once(demo: Example) -> None:
    """Each picture that Ultralytics drew is in the history, `results` among them, and opens."""
    run = demo.wandb_run
    found = [
        (key, value)
        for row in run.history
        for key, value in row.items()
        if isinstance(value, dict) and "image-file" == value["_type"]
    ]
    save_dir = demo.folder / "runs" / "detect" / "demo" / "shapes"
    drawn = sorted(path.stem for path in save_dir.iterdir() if path.suffix in (".png", ".jpg"))
    assert "results" in drawn
    assert drawn == sorted(key for key, _ in found)
    assert all(wandb_file.media_path(run, value).stat().st_size for _, value in found)


@pytest.mark.needs("ultralytics")
def test_demo_logs_the_best_model(demo: Example) -> None:
    """The artifact is called best, contains the weights and has their metadata."""
    (model,) = [artifact for artifact in demo.wandb_run.artifacts if "model" == artifact.type]
    assert "best" in model.aliases
    best = demo.folder / "runs" / "detect" / "demo" / "shapes" / "weights" / "best.pt"
    assert {"best.pt": best.stat().st_size} == {n: file.size for n, file in model.files.items()}
    assert {"epoch", "fitness", "metrics", "args"} <= model.metadata.keys()
    assert 12 == model.metadata["args"]["epochs"]
    assert "metrics/mAP50(B)" in model.metadata["metrics"]


@pytest.mark.needs("ultralytics")
def test_demo_logs_four_curves(demo: Example) -> None:
    """Each chart has a table with a hundred points of every class and of the mean."""
    run = demo.wandb_run
    tables = {
        key.removesuffix("_table"): wandb_file.read_table(run, value)
        for row in run.history
        for key, value in row.items()
        if key.startswith("curves/") and key.endswith("_table")
    }
    assert {
        "curves/Precision-Recall(B)",
        "curves/F1-Confidence(B)",
        "curves/Precision-Confidence(B)",
        "curves/Recall-Confidence(B)",
    } == tables.keys() & run.charts.keys()
    for columns, rows in tables.values():
        assert (["class", "y", "x"], 400) == (columns, len(rows))
        assert {"mean", "red", "green", "blue"} == {row[0] for row in rows}
