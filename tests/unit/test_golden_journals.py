"""The journals of earlier versions are read for ever: `tests/data` keeps one of each schema."""

from __future__ import annotations

import json
from pathlib import Path
from zlib import crc32

import pytest

from support import golden
from support.exact import exact
from trainbus.events import EVENT_TYPES, ArtifactLogged, CheckpointSaved, ImageLogged, Record
from trainbus.journal.directory import RunFolder
from trainbus.journal.encoding import Entry
from trainbus.journal.file_access import FileResolver
from trainbus.journal.reader import RunReader

KEPT = RunFolder(Path(__file__).parents[1] / "data" / "journal-1")


def entries_of(folder: RunFolder) -> tuple[list[Entry], tuple[int, int]]:
    """Return all that a journal holds, and how many records are damaged and missing."""
    reader, found = RunReader(folder), []
    while new := reader.read():
        found += new
    reader.close()
    return found, (reader.damaged, reader.missing)


def copies_of(folder: RunFolder) -> dict[str, bytes | None]:
    """Return the files that records name and what sinks find in them, None where nothing is."""
    found = {}
    files = FileResolver(folder, [])
    for entry in entries_of(folder)[0]:
        given, here = entry.record.event, files.resolve(entry).event
        if isinstance(given, ImageLogged | CheckpointSaved) and given.path is not None:
            assert isinstance(here, ImageLogged | CheckpointSaved)
            pairs = [(given.path, here.path)]
        elif isinstance(given, ArtifactLogged):
            assert isinstance(here, ArtifactLogged)
            pairs = list(zip(given.paths, here.paths, strict=True))
        else:
            continue
        for name, path in pairs:
            key = f"{entry.record.position} {name}"
            found[key] = Path(path or "").read_bytes() if Path(path or "").exists() else None
    return found


def details(records: list[Record]) -> list[object]:
    """Return records so that any difference shows."""
    return [exact(record) for record in records]


@pytest.fixture(params=["kept", "new"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> RunFolder:
    """The journal that version 1 wrote, and the one that this version writes."""
    return KEPT if request.param == "kept" else golden.write(tmp_path / "new")


def test_every_record_is_read_back_in_every_detail(folder: RunFolder) -> None:
    """Values, types, arrays and envelopes are what was logged, and nothing is counted as lost."""
    entries, counted = entries_of(folder)
    assert details(golden.records()) == details([entry.record for entry in entries])
    assert (0, 0) == counted


def test_the_copies_of_files_are_there(folder: RunFolder) -> None:
    """Files that records name, and that are gone, are found with the bytes they had."""
    expected = {
        "(1, 8) picture é.png": golden.FILES["picture é.png"],
        "(1, 9) gone.png": None,
        "(2, 2) best.pt": None,
        "(2, 3) best.pt": golden.FILES["best.pt"],
        "(2, 4) best.pt": golden.FILES["best.pt"],
        "(2, 4) notes.txt": golden.FILES["notes.txt"],
        "(2, 4) gone.bin": None,
    }
    assert expected == copies_of(folder)


def test_the_journal_has_everything_in_it() -> None:
    """Every event type is there, arrays and long events as blobs, and an end in another's place."""
    types = {type(event) for _, event in golden.events()}
    assert set(EVENT_TYPES) == types
    names = sorted(path.name for path in KEPT.blobs.rglob("*") if path.is_file())
    arrays = ["array.npy"] * 5
    assert [*arrays, "best.pt", "event.json", "event.json", "notes.txt", "picture__.png"] == names
    assert KEPT.end(1).exists()
    assert [1, 2, 3] == KEPT.attempts()


def test_the_lines_are_json_with_a_checksum() -> None:
    """Any JSON reader reads the lines, and the checksum is that of the bytes behind it."""
    for path in KEPT.path.glob("*.jsonl"):
        for line in path.read_bytes().splitlines():
            told = json.loads(line)
            assert told["crc"] == f"{crc32(line[18:]):08x}"
            assert {"seq", "run", "time", "event", "attempt", "rank", "schema"} <= set(told)


def test_reading_leaves_no_trace() -> None:
    """Nothing is written to a journal that is only read."""
    before = sorted(path.name for path in KEPT.path.rglob("*"))
    entries_of(KEPT)
    copies_of(KEPT)
    assert before == sorted(path.name for path in KEPT.path.rglob("*"))
