"""The files and commands of docs/your-first-adapter.md work as they are."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from trainbus.events import EpochEnded, MetricsLogged, RunEnded, decode
from trainbus.testing import check_grammar

PAGE = Path(__file__).parents[2] / "docs" / "your-first-adapter.md"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
FILE = re.compile(r"# file: (\S+)\n")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files of the page, and what its `pip` command installs."""
    found = tmp_path_factory.mktemp("tinyloop")
    for _, text in BLOCK.findall(PAGE.read_text(encoding="utf-8")):
        if name := FILE.match(text):
            (found / name[1]).write_text(text)
    pip = ["-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-build-isolation"]
    call(found, *pip, "--target", "site", ".")
    return found


def call(folder: Path, *arguments: str) -> str:
    """Return what Python prints when it is called in the folder with these arguments."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder / "site")},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert 0 == done.returncode, done.stdout + done.stderr
    return done.stdout


def commands() -> list[list[str]]:
    """Return the commands of the page."""
    return [
        line.split()
        for kind, text in BLOCK.findall(PAGE.read_text(encoding="utf-8"))
        for line in text.splitlines()
        if kind == "sh"
    ]


def test_the_adapter_passes_the_suite(folder: Path) -> None:
    """The page's test file, run as the page says, passes every check that applies."""
    (command,) = (words for words in commands() if "pytest" in words)
    printed = call(folder, *command[1:], "-q", "-p", "no:cacheprovider")
    assert re.search(r"\b16 passed\b", printed), printed


def test_the_adapter_is_found(folder: Path) -> None:
    """`trainbus plugins` lists it, and loads it."""
    assert ["trainbus", "plugins"] in commands()
    printed = call(folder, "-m", "trainbus", "plugins")
    (row,) = (line for line in printed.splitlines() if "tinyloop:attach" in line)
    assert "yes" in row


def test_a_training_is_logged_without_a_line_in_it(folder: Path) -> None:
    """The page's last command records a complete run."""
    *_, (name, *arguments) = commands()
    assert "trainbus" == name
    arguments[-2] = sys.executable
    call(folder, "-m", "trainbus", *arguments)
    records = [decode(line) for line in (folder / "records.jsonl").read_bytes().splitlines()]
    assert [] == check_grammar(records)
    kinds = [type(record.event) for record in records]
    assert (3, 3, 1) == tuple(kinds.count(k) for k in (MetricsLogged, EpochEnded, RunEnded))
