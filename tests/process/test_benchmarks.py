"""Each benchmark that docs/benchmarks.md names runs, and says what the page shows."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from support import train

ROOT = Path(__file__).parents[2]
SHIM = ROOT / "tests" / "support" / "torchvision_cpu.py"
NUMBER = r" +[\d.]+"
SHAPES = {
    "journal.py": [
        r" +median µs +p99 µs",
        rf"encode and write{NUMBER * 2}",
        rf"emit{NUMBER * 2} +[\d.]+ times the floor",
        rf"wandb run\.log{NUMBER * 2} +[\d.]+ times emit",
        r"emit, 1,000 records: [\d,]+/s, \d+ MB resident",
        r"replay into the memory sink: [\d,]+/s",
    ],
    "overhead.py": [
        r"1 pairs: epoch [\d.]+ ms with the bus, [\d.]+ ms without, ratio [\d.]+",
    ],
    "redaction.py": [
        r"table of 500 numbers +[\d.]+ ms, +[\d.]+ times a plain scan",
        r"text of 65,536 bytes +[\d.]+ ms, +[\d.]+ times a plain scan",
    ],
    "wandb_curves.py": [
        r" +classes +callback ms +sink ms +ratio +default ms",
        rf" +1{NUMBER * 4}",
        rf" +10{NUMBER * 4}",
    ],
}
"""What each line of the short form is made of; Ultralytics may write others between them."""


@pytest.mark.parametrize("name", sorted(SHAPES))
@pytest.mark.needs("torch", "ultralytics")
def test_benchmarks_run(name: str, tmp_path: Path) -> None:
    """The short form ends well, with every line that the long one has."""
    done = subprocess.run(
        [sys.executable, str(SHIM), str(ROOT / "benchmarks" / name), "--short"],
        cwd=tmp_path,
        env=train.hermetic(tmp_path),
        capture_output=True,
        encoding="utf-8",
        timeout=300,
        check=False,
    )
    assert 0 == done.returncode, done.stderr[-4000:]
    lines = done.stdout.splitlines()
    expected = SHAPES[name]
    assert expected == [e for e in expected if any(re.fullmatch(e, line) for line in lines)]


def test_every_benchmark_is_named_and_tried() -> None:
    """The page has the command of each file of the folder, and the test above runs it."""
    files = {path.name for path in (ROOT / "benchmarks").glob("*.py")}
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert SHAPES.keys() == files
    assert files == set(re.findall(r"^python benchmarks/(\w+\.py)$", page, re.MULTILINE))
