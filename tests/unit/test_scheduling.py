"""Tests that share something go to one worker, which makes it once."""

from __future__ import annotations

from pathlib import Path

import pytest

from support import scheduling, shared

ROOT = Path(__file__).parents[2]


def scope(nodeid: str) -> str:
    """Return what the scheduler keeps together with a test."""
    return str(scheduling.ByFile._split_scope(object(), nodeid))  # type: ignore[arg-type]


def test_files_stay_together() -> None:
    """The tests of a file go together, unless each of them starts processes of its own."""
    spread, whole = "tests/chaos/test_kill.py", "tests/unit/test_run.py"
    assert [whole, whole] == [scope(f"{whole}::test_a"), scope(f"{whole}::TestB::test_c[x::y]")]
    assert f"{spread}::test_a[1]" == scope(f"{spread}::test_a[1]")
    assert f"{spread}::TestB" == scope(f"{spread}::TestB::test_c[x::y]")


@pytest.mark.parametrize("file", sorted({*scheduling.FIRST, *scheduling.SPREAD}))
def test_every_file_that_is_named_is_there(file: str) -> None:
    """A file that was moved would be handed out as any other."""
    assert (ROOT / file).is_file()


def test_what_is_shared_is_made_once(tmp_path: Path) -> None:
    """The first who asks makes it; the others get the same, or the error that came of it."""
    asked: list[Path] = []

    def make(place: Path) -> dict[str, Path]:
        asked.append(place)
        return {"made in": place}

    def fail(place: Path) -> None:
        asked.append(place)
        raise ValueError("no room")

    place, failed = tmp_path / "data", tmp_path / "failed"
    assert [{"made in": place}] * 2 == [shared.once(place, make) for _ in range(2)]
    with pytest.raises(ValueError, match="no room"):
        shared.once(failed, fail)
    with pytest.raises(AssertionError, match=r"failed could not be made: ValueError.*no room"):
        shared.once(failed, fail)
    assert [place, failed] == asked
