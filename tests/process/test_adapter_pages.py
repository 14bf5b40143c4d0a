"""Examples and pages of the adapters: each runs unchanged, and the table lists its events."""

from __future__ import annotations

import functools
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from support import event_table
from support.event_table import ROOT, counted, examples, records_of, run_script, title
from trainbus import registry
from trainbus.testing import check_grammar

PAGES = sorted(p for p in (ROOT / "docs" / "adapters").glob("*.md") if p.stem != "README")
PYTHON = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
FRAMEWORKS = [title(example) for example in examples() if title(example) != "plain loop"]

Ran = tuple[subprocess.CompletedProcess[str], Path]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Ran]:
    """Run an example once, and return how it ended and its folder."""

    @functools.cache
    def run(example: Path) -> Ran:
        folder = tmp_path_factory.mktemp(example.stem)
        return run_script(example, folder), folder

    return run


def blocks(page: Path) -> list[str]:
    """Return the Python blocks of a page."""
    return PYTHON.findall(page.read_text(encoding="utf-8"))


def needing(framework: str, *values: object) -> object:
    """Return the values of a parametrized test that needs a framework."""
    marks = () if framework == "plain loop" else (pytest.mark.needs(framework),)
    name = "-".join(str(getattr(value, "stem", value)) for value in values)
    return pytest.param(*values, marks=marks, id=name.removesuffix("_basic"))


@pytest.mark.parametrize("example", [needing(title(each), each) for each in examples()])
def test_the_example_runs(example: Path, ran: Callable[[Path], Ran]) -> None:
    """It records one run that obeys the grammar with `config/local.yaml`, in at most 30 lines."""
    done, folder = ran(example)
    assert 0 == done.returncode, done.stdout[-2000:] + done.stderr[-4000:]
    assert "config/local.yaml" in example.read_text(encoding="utf-8")
    assert len(example.read_text(encoding="utf-8").splitlines()) <= 30
    assert [] == check_grammar(records_of(folder))


@pytest.mark.needs(*FRAMEWORKS)
def test_the_table_tells_what_the_examples_supplied(ran: Callable[[Path], Ran]) -> None:
    """The table of the page lists the events that the examples emit; `make docs` writes it."""
    supplied = {title(each): counted(records_of(ran(each)[1])) for each in examples()}
    assert event_table.shown() == event_table.table(supplied)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_page_begins_with_the_example(page: Path) -> None:
    """The first block of a page is the example, character by character."""
    example = ROOT / "examples" / f"{page.stem}_basic.py"
    assert example.read_text(encoding="utf-8") == blocks(page)[0]


@pytest.mark.parametrize(
    ("page", "number"),
    [needing(page.stem, page, n) for page in PAGES for n in range(1, len(blocks(page)))],
)
def test_other_blocks_run(page: Path, number: int, tmp_path: Path) -> None:
    """Every further block of a page is a script that succeeds and records a complete run."""
    script = tmp_path / "script.py"
    script.write_text(blocks(page)[number])
    done = run_script(script, tmp_path)
    assert 0 == done.returncode, done.stdout[-2000:] + done.stderr[-4000:]
    assert [] == check_grammar(records_of(tmp_path))


def test_every_adapter_has_a_page_and_an_example() -> None:
    """Every adapter has a page and an example, and the index links to the page."""
    names = set(registry.plugins(registry.ADAPTERS)) - {"pytorch_lightning"}
    assert names <= {page.stem for page in PAGES}
    assert names <= {title(example) for example in examples()}
    index = (ROOT / "docs" / "adapters" / "README.md").read_text(encoding="utf-8")
    for page in PAGES:
        assert f"({page.name})" in index
