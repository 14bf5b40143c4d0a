"""`trainbus compare`: one page over several runs."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from trainbus import Bus, JournalSpec
from trainbus.cli.app import app
from trainbus.config import loads

pytestmark = pytest.mark.needs("plotly")


def trained(folder: Path, lr: float) -> Path:
    """Log a short run, and return its directory."""
    bus = Bus(journal=JournalSpec(dir=str(folder)))
    with bus, bus.run(name=f"lr{lr}", params={"lr": lr, "same": 1}) as run:
        for epoch in run.epochs(3):
            run.log({"loss": lr * (3 - epoch)})
    (found,) = (path for path in folder.iterdir() if path.name.startswith(f"lr{lr}"))
    return found


def snapshot(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder."""
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_runs_are_compared(tmp_path: Path) -> None:
    """Journals are read and not touched; the page has the metrics and parameters of both."""
    runs = [trained(tmp_path / "journals", lr) for lr in (0.5, 0.25)]
    before = snapshot(tmp_path / "journals")
    done = CliRunner().invoke(app, ["compare", *map(str, runs), "-o", str(tmp_path / "out")])
    assert 0 == done.exit_code, done.output
    page = Path(done.output.strip())
    assert tmp_path / "out" / "index.html" == page
    assert before == snapshot(tmp_path / "journals")
    text = page.read_text(encoding="utf-8")
    (data,) = re.findall(
        r'<script[^>]*type="application/json"[^>]*>(.*?)</script>', text, re.DOTALL
    )
    assert json.loads(data)
    for word in ("lr0.5", "lr0.25", "train/loss"):
        assert word in data


def test_pages_are_compared_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page of the `html` sink can be compared in place of its run."""
    monkeypatch.chdir(tmp_path)
    bus = loads("isolation: inline\nsinks: {page: {type: html, dir: 'pages/{run}'}}")
    with bus, bus.run(name="paged") as run:
        run.log({"loss": 1.0})
    (page,) = (tmp_path / "pages").iterdir()
    other = trained(tmp_path / "journals", 0.5)
    done = CliRunner().invoke(app, ["compare", str(page), str(other), "-o", "out"])
    assert 0 == done.exit_code, done.output
    assert "paged" in (tmp_path / "out" / "index.html").read_text(encoding="utf-8")


def test_what_is_no_run_is_one_line(tmp_path: Path) -> None:
    """The error says what was expected, and nothing is written."""
    done = CliRunner().invoke(app, ["compare", str(tmp_path), "-o", str(tmp_path / "out")])
    assert 2 == done.exit_code
    assert 1 == len(done.output.splitlines())
    assert "expected the directory of a run" in done.output
    assert [] == os.listdir(tmp_path)
