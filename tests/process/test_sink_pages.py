"""The pages of the sinks: their YAML loads, and their tables match the options classes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from support import option_tables
from support.option_tables import ROOT
from trainbus import config, registry

PAGES = sorted(p for p in option_tables.FOLDER.glob("*.md") if p.stem != "README")
YAML = re.compile(r"^```yaml\n(.*?)^```$", re.DOTALL | re.MULTILINE)
BLOCKS = [
    (page, number)
    for page in [*PAGES, ROOT / "docs" / "transforms.md"]
    for number in range(len(YAML.findall(page.read_text(encoding="utf-8"))))
]


@pytest.mark.parametrize(
    ("page", "number"), BLOCKS, ids=lambda value: getattr(value, "stem", str(value))
)
def test_the_configuration_loads(page: Path, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every YAML block of a page is a complete configuration."""
    for name in re.findall(r"\$\{(\w+)\}", page.read_text(encoding="utf-8")):
        monkeypatch.setenv(name, "https://example.org/secret")
    text = YAML.findall(page.read_text(encoding="utf-8"))[number]
    routes = config.loads(text, name=page.name).settings.sinks
    assert routes
    assert page.stem in ("transforms", *re.findall(r"type: (\w+)", text))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_option_table_is_that_of_the_class(page: Path) -> None:
    """The page has the table that `make docs` writes."""
    assert option_tables.table(page.stem) == option_tables.shown(page)


def test_every_sink_has_a_page() -> None:
    """Every sink has a page, and the index links to it."""
    assert set(registry.plugins(registry.SINKS)) == {page.stem for page in PAGES}
    index = (option_tables.FOLDER / "README.md").read_text(encoding="utf-8")
    assert [] == [page.name for page in PAGES if f"({page.name})" not in index]
