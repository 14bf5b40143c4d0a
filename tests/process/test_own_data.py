"""The code of docs/log-your-own.md, run as its readers would."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import shapes
from support import train
from support.event_table import SHIM
from trainbus.events import MetricsLogged, Record, RunStarted, TableLogged, TextLogged, decode
from trainbus.testing import check_grammar

PAGE = (Path(__file__).parents[2] / "docs" / "log-your-own.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))


def blocks(text: str, language: str = "python") -> list[str]:
    """Return the code blocks in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def run(section: str, folder: Path) -> list[Record]:
    """Run the code of a section, its blocks one after the other; return what was recorded."""
    (config,) = blocks(PAGE, "yaml")
    (folder / "trainbus.yaml").write_text(config, encoding="utf-8")
    (folder / "own.py").write_text("\n".join(blocks(SECTIONS[section])), encoding="utf-8")
    shim = [str(SHIM)] if find_spec("torch") else []
    done = subprocess.run(
        [sys.executable, *shim, "own.py"],
        cwd=folder,
        env=train.hermetic(folder),
        capture_output=True,
        encoding="utf-8",
        timeout=400,
        check=False,
    )
    assert 0 == done.returncode, done.stdout[-2000:] + done.stderr[-4000:]
    lines = (folder / "events.jsonl").read_bytes().splitlines()
    records = [decode(line) for line in lines]
    assert [] == check_grammar(records)
    assert 1 == len({record.run for record in records})
    return records


def own(records: list[Record], *names: str) -> dict[str, list[int | None]]:
    """Return the epochs that metrics were logged for."""
    found: dict[str, list[int | None]] = {name: [] for name in names}
    for record in records:
        if isinstance(record.event, MetricsLogged):
            for name in found.keys() & record.event.values.keys():
                found[name].append(record.event.epoch)
    return found


def test_every_section_is_run_here() -> None:
    """A further section needs a test of its own."""
    expected = ["Ultralytics", "Lightning", "Transformers", "A notebook", "A plain loop"]
    assert expected == list(SECTIONS)


@pytest.mark.needs("ultralytics")
def test_ultralytics(tmp_path: Path) -> None:
    """A callback of the user logs into the run of each epoch, a text before the training too."""
    shapes.make_dataset(tmp_path / "shapes", images=8, val_images=4, size=64)
    train.save_below(tmp_path)
    records = run("Ultralytics", tmp_path)
    assert {"train/box_to_cls": [0, 1]} == own(records, "train/box_to_cls")
    assert ["purpose"] == [r.event.key for r in records if isinstance(r.event, TextLogged)]


@pytest.mark.needs("lightning")
def test_lightning(tmp_path: Path) -> None:
    """A module logs by `current_run`."""
    records = run("Lightning", tmp_path)
    assert {"train/weight": [0, 1], "train/bias": [0, 1]} == own(
        records, "train/weight", "train/bias"
    )
    assert [0, 1] == [r.event.epoch for r in records if isinstance(r.event, TableLogged)]


@pytest.mark.needs("transformers")
def test_transformers(tmp_path: Path) -> None:
    """A callback of the user logs by `current_run`."""
    records = run("Transformers", tmp_path)
    assert {"train/sample_length": [0, 1]} == own(records, "train/sample_length")
    assert [0, 1] == [r.event.epoch for r in records if isinstance(r.event, TextLogged)]


def test_a_notebook(tmp_path: Path) -> None:
    """The cells are one run."""
    records = run("A notebook", tmp_path)
    assert {"train/loss": [0, 1, 2]} == own(records, "train/loss")


def test_a_plain_loop(tmp_path: Path) -> None:
    """A function that has no bus logs into the run, which has the name and tags of the call."""
    records = run("A plain loop", tmp_path)
    names = ("train/loss", "validation/accuracy")
    assert {name: [0, 1] for name in names} == own(records, *names)
    started = records[0].event
    assert isinstance(started, RunStarted)
    assert ("loop", ["try"]) == (started.name, started.tags)
