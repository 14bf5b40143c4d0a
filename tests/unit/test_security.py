"""A journal from an untrusted source opens no files, runs no code and allocates no memory."""

from __future__ import annotations

import hashlib
import io
import json
import os
import sys
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import trainbus
from support.journals import SAMPLE, folder_in, read_file, read_run, write_journal, write_lines
from trainbus import config
from trainbus import events as ev
from trainbus.errors import JournalError
from trainbus.journal.blobs import Blob, Blobs, blob_name
from trainbus.journal.directory import RunFolder, is_run_id, open_within, run_id
from trainbus.journal.encoding import Entry, seal
from trainbus.journal.file_access import FileResolver
from trainbus.journal.reader import RecordFile, RunReader
from trainbus.journal.recovery import recover

_DEADLINE_S = 240.0

ESCAPES = [
    "../outside/secret",
    "../../etc/passwd",
    "/etc/passwd",
    "..",
    ".",
    "",
    "a/../../outside/secret",
    "a\0b",
    "..\\outside",
    "a" * 129,
    "a\n",
    "é",
]
SECRET = b"secret of the host"
DIGEST = hashlib.sha256(SECRET).hexdigest()


class Opened:
    """The real paths of all files that are opened while it is on."""

    def __init__(self) -> None:
        self.on = False
        self.paths: list[str] = []

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Note a path; called by the interpreter for whatever it does."""
        if self.on and event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
            given, flags = os.fsdecode(arguments[0]), arguments[2]
            head, tail = os.path.split(given)
            follows = not (isinstance(flags, int) and flags & os.O_NOFOLLOW)
            real = os.path.realpath(given if follows else head)
            self.paths.append(real if follows else os.path.join(real, tail))


_OPENED = Opened()
sys.addaudithook(_OPENED)  # it sees also what does not go through `os.open`, and can't be removed


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """The directory of a run, next to a file that it must not read."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").write_bytes(SECRET)
    (tmp_path / "outside" / "array.npy").write_bytes(npy(np.zeros(4, np.uint8)))
    return folder_in(tmp_path)


@pytest.fixture
def inside_alone(folder: RunFolder) -> Iterator[None]:
    """Have the test fail if anything outside of the run's directory was opened."""
    _OPENED.paths.clear()
    _OPENED.on = True
    yield
    _OPENED.on = False
    code = (".py", ".pyc", ".so")
    outside = [
        path
        for path in _OPENED.paths
        if not Path(path).is_relative_to(folder.path.resolve()) and not path.endswith(code)
    ]
    assert [] == outside


def npy(array: Any, **header: Any) -> bytes:
    """Return an array as numpy's file, whose header may say otherwise."""
    buffer = io.BytesIO()
    if header:
        np.lib.format.write_array_header_1_0(
            buffer, {"descr": "|u1", "fortran_order": False, "shape": array.shape, **header}
        )
        buffer.write(array.tobytes())
    else:
        np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def put_blob(folder: RunFolder, data: bytes, name: str) -> str:
    """Store a blob under its true digest, and return the digest."""
    digest = hashlib.sha256(data).hexdigest()
    path = folder.blobs / digest / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return digest


def in_time(act: Callable[[], object], release: Path) -> bool:
    """Return whether a call comes back by itself, before someone opens the other end of a pipe."""
    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    thread.join(_DEADLINE_S)
    came_back = not thread.is_alive()
    if not came_back:
        os.close(os.open(release, os.O_RDWR | os.O_NONBLOCK))
        thread.join(_DEADLINE_S)
    return came_back


def image(array: Any, **fields: Any) -> dict[str, Any]:
    """Return a line with an image whose array is the given JSON."""
    event = {"type": "image.logged", "key": "k", "array": array, **fields}
    return {"event": event}


def picture(path: str, **blob: Any) -> Entry:
    """Return an entry with a picture, and with its copy if there are fields for it."""
    record = ev.Record(seq=1, run="run", time=1.0, event=ev.ImageLogged(key="k", path=path))
    return Entry(record, [Blob(**{"path": path, "size": len(SECRET), **blob})] if blob else [])


def path_of(record: ev.Record) -> str:
    """Return the path of a picture."""
    assert isinstance(record.event, ev.ImageLogged)
    assert record.event.path is not None
    return record.event.path


def assert_refused(folder: RunFolder, line: dict[str, Any] | bytes) -> None:
    """Assert that a record is counted as damaged, and that the ones beside it are returned."""
    good = {"event": {"type": "epoch.started", "epoch": 1}}
    write_lines(folder, {**good, "seq": 1}, line, {**good, "seq": 3})
    entries, file = read_file(folder)
    assert [1, 3] == [entry.record.seq for entry in entries]
    assert (1, 1, 0) == (file.damaged, len(file.faults), file.missing)


@pytest.mark.parametrize("name", ESCAPES)
@pytest.mark.usefixtures("inside_alone")
def test_run_id_that_leads_elsewhere_is_damage(folder: RunFolder, name: str) -> None:
    """A record whose run could be a path is not returned."""
    assert_refused(folder, {"seq": 2, "run": name, "event": {"type": "epoch.started", "epoch": 1}})
    assert not is_run_id(name)


@pytest.mark.parametrize("name", ESCAPES)
def test_any_text_becomes_a_run_id(name: str) -> None:
    """What is made a run's id is one, whatever it was."""
    assert is_run_id(run_id(name))


@pytest.mark.parametrize("name", ESCAPES)
@pytest.mark.usefixtures("inside_alone")
def test_digest_that_leads_elsewhere_is_damage(folder: RunFolder, name: str) -> None:
    """An invalid digest is not looked up, neither as an array nor as an event nor as a file."""
    event = {"type": "text.logged", "blob": name}
    assert_refused(folder, {"seq": 2, "event": event})
    assert_refused(folder, image({"dtype": "uint8", "shape": [4], "blob": name}) | {"seq": 2})
    files = FileResolver(folder, [])
    found = files.resolve(picture("/x/a.png", sha256=name, name="a.png"))
    assert (str(folder.path / "not-available" / "a.png"), 1) == (path_of(found), len(files.damaged))


@pytest.mark.parametrize("name", ESCAPES)
@pytest.mark.usefixtures("inside_alone")
def test_name_that_leads_elsewhere_is_refused(folder: RunFolder, name: str) -> None:
    """A blob's name that could be a path is not used."""
    put_blob(folder, SECRET, "a.png")
    _OPENED.paths.clear()
    with pytest.raises(JournalError, match="rejected a blob named"):
        Blobs(folder).find(Blob(path="p", sha256=DIGEST, name=name, size=len(SECRET)))
    files = FileResolver(folder, [])
    found = files.resolve(picture("/x/a.png", sha256=DIGEST, name=name))
    assert (str(folder.path / "not-available" / "a.png"), 1) == (path_of(found), len(files.damaged))


@pytest.mark.parametrize("name", [*ESCAPES, "con", "NUL.txt", ".hidden", "x" * 300])
def test_name_of_a_copy_is_harmless(folder: RunFolder, name: str) -> None:
    """Whatever a file is called, its copy has a name that can be stored and found."""
    put_blob(folder, SECRET, blob_name(name))
    found = Blobs(folder).find(
        Blob(path="p", sha256=DIGEST, name=blob_name(name), size=len(SECRET))
    )
    assert folder.blobs / DIGEST == found.parent


@pytest.mark.usefixtures("inside_alone")
@pytest.mark.parametrize("which", ["records", "end"])
@pytest.mark.needs("posix")
def test_linked_records_file_is_refused(folder: RunFolder, tmp_path: Path, which: str) -> None:
    """A records file that is a link is an error, not the file of someone else."""
    write_journal(folder, *SAMPLE[:2])
    _OPENED.paths.clear()
    target = tmp_path / "outside" / "records.jsonl"
    folder.records(1).rename(target)
    path = folder.records(1) if which == "records" else folder.end(1)
    path.symlink_to(target)
    file = RecordFile(folder, path)
    with pytest.raises(JournalError, match=r"rejected .*jsonl"):
        file.read()
    file.close()


@pytest.mark.usefixtures("inside_alone")
@pytest.mark.needs("posix")
def test_linked_blob_is_refused(folder: RunFolder, tmp_path: Path) -> None:
    """A blob that is a link, or lies in a linked directory, is not read, right as it may be."""
    outside = tmp_path / "outside"
    blob = Blob(path="p", sha256=DIGEST, name="secret", size=len(SECRET))
    folder.blobs.mkdir()
    (folder.blobs / DIGEST).mkdir()
    (folder.blobs / DIGEST / "secret").symlink_to(outside / "secret")
    with pytest.raises(JournalError):
        Blobs(folder).find(blob)
    (folder.blobs / DIGEST / "secret").unlink()
    (folder.blobs / DIGEST).rmdir()
    (folder.blobs / DIGEST).symlink_to(outside)
    with pytest.raises(JournalError, match="it leads out of"):
        Blobs(folder).find(blob)
    with pytest.raises(JournalError, match="it leads out of"):
        Blobs(folder).load(DIGEST, np.dtype("u1"), (4,))
    (folder.blobs / DIGEST).unlink()
    folder.blobs.rmdir()
    outside.rename(tmp_path / DIGEST)
    folder.blobs.symlink_to(tmp_path)
    with pytest.raises(JournalError, match="it leads out of"):
        Blobs(folder).find(blob)
    assert_refused(folder, {"seq": 2, "event": {"type": "text.logged", "blob": DIGEST}})


@pytest.mark.usefixtures("inside_alone")
@pytest.mark.needs("posix")
def test_pipe_as_a_blob_is_refused(folder: RunFolder) -> None:
    """A blob that is a pipe, a socket or a directory is an error, and nothing waits for it."""
    (folder.blobs / DIGEST).mkdir(parents=True)
    faults: list[str] = []

    def find(name: str) -> None:
        """Look for a blob, and keep what is said."""
        try:
            Blobs(folder).find(Blob(path="p", sha256=DIGEST, name=name, size=len(SECRET)))
        except JournalError as error:
            faults.append(str(error))

    pipe = folder.blobs / DIGEST / "pipe"
    os.mkfifo(pipe)
    (folder.blobs / DIGEST / "folder").mkdir()
    assert in_time(lambda: find("pipe"), pipe)
    find("folder")
    assert ["not a regular file", "not a regular file"] == [
        fault.split("is ")[-1] for fault in faults
    ]
    os.mkfifo(folder.blobs / DIGEST / "event.json")
    assert_refused(folder, {"seq": 2, "event": {"type": "text.logged", "blob": DIGEST}})


@pytest.mark.usefixtures("inside_alone")
@pytest.mark.needs("posix")
def test_pipe_as_records_file_is_refused(folder: RunFolder) -> None:
    """A records file that is a pipe is an error, and reading it does not wait."""
    os.mkfifo(folder.records(1))
    faults: list[JournalError] = []

    def read() -> None:
        """Read, and keep the error."""
        try:
            RecordFile(folder, folder.records(1)).read()
        except JournalError as error:
            faults.append(error)

    assert in_time(read, folder.records(1))
    assert 1 == len(faults)


@pytest.mark.needs("posix")
def test_pipe_as_records_file_does_not_stop_recovery(folder: RunFolder) -> None:
    """Looking for attempts without an end does not wait for a pipe."""
    os.mkfifo(folder.records(1))

    def look() -> None:
        """Recover, or raise an error."""
        with suppress(JournalError):
            recover(folder, now=1.0)

    assert in_time(look, folder.records(1))


@pytest.mark.usefixtures("inside_alone")
@pytest.mark.needs("posix")
def test_device_is_refused(folder: RunFolder) -> None:
    """Only plain files below the directory are opened."""
    with pytest.raises(JournalError, match="it leads out of"):
        open_within(folder.path, Path("/dev/zero"))
    with pytest.raises(JournalError, match="it leads out of"):
        open_within(folder.path, folder.path / ".." / "outside" / "secret")


@pytest.mark.usefixtures("inside_alone")
@pytest.mark.parametrize("size", [0, len(SECRET) - 1, len(SECRET) + 1, 10 * 10**12, -1, 2**70])
def test_blob_of_another_size_is_refused(folder: RunFolder, size: int) -> None:
    """A size other than the file's is an error, and allocates no memory."""
    put_blob(folder, SECRET, "a.png")
    _OPENED.paths.clear()
    blob = Blob(path="p", sha256=DIGEST, name="a.png", size=size)
    tracemalloc.start()
    with pytest.raises(JournalError, match=f"expected {size} bytes"):
        Blobs(folder).find(blob)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * 2**20


@pytest.mark.usefixtures("inside_alone")
def test_blob_of_another_content_is_refused(folder: RunFolder) -> None:
    """A blob whose bytes were changed is an error, as a file, an array and an event."""
    array = npy(np.arange(4, dtype=np.uint8))
    digests = [
        put_blob(folder, SECRET, "a.png"),
        put_blob(folder, array, "array.npy"),
        put_blob(folder, b'{"type":"text.logged","key":"k","text":"t"}', "event.json"),
    ]
    for path in folder.blobs.rglob("*.*"):
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(JournalError, match="digest does not match"):
        Blobs(folder).find(Blob(path="p", sha256=digests[0], name="a.png", size=len(SECRET)))
    with pytest.raises(JournalError, match="digest does not match"):
        Blobs(folder).load(digests[1], np.dtype("u1"), (4,))
    assert_refused(folder, {"seq": 2, "event": {"type": "text.logged", "blob": digests[2]}})


def test_huge_blob_is_not_loaded(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A blob larger than the limit is rejected before it is read."""
    path = folder.blobs / DIGEST / "array.npy"
    path.parent.mkdir(parents=True)
    path.touch()
    os.truncate(path, 10**12)  # takes no room
    with pytest.raises(JournalError, match="has 1000000000000 bytes, expected at most"):
        Blobs(folder).load(DIGEST, np.dtype("u1"), (10**12,))


@pytest.mark.usefixtures("inside_alone")
@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        ("uint8", [10**12]),
        ("uint8", [2**70]),
        ("uint8", [-1]),
        ("uint8", [-4]),
        ("uint8", [2, -2]),
        ("uint8", [2**32, 2**32]),
        ("uint8", [3]),
        ("uint8", [2, 2]),
        ("uint8", [4.0]),
        ("uint8", [True]),
        ("uint8", ["4"]),
        ("uint8", 4),
        ("uint8", None),
        ("float64", [4]),
        ("|O", [4]),
        ("O", []),
        ([["a", "|O"]], [4]),
        ("no dtype", [4]),
        (None, [4]),
        ("S2147483647", [4]),
        ("(4,)u1", [1]),
    ],
)
def test_blob_of_another_shape_is_damage(folder: RunFolder, dtype: Any, shape: Any) -> None:
    """An array that is not what its record declares is not returned."""
    digest = put_blob(folder, npy(np.zeros(4, np.uint8)), "array.npy")
    assert_refused(folder, image({"dtype": dtype, "shape": shape, "blob": digest}) | {"seq": 2})


@pytest.mark.usefixtures("inside_alone")
@pytest.mark.parametrize(
    ("header", "dtype", "shape"),
    [
        ({"descr": "|O"}, "|O", [4]),
        ({"shape": (10**12,)}, "uint8", [10**12]),
        ({"shape": (0, 2**70)}, "uint8", [0, 2**70]),
        ({"shape": (0, 2**62)}, "float64", [0, 2**62]),
        ({"shape": (-4,)}, "uint8", [-4]),
        ({"fortran_order": True}, "uint8", [4]),
        ({"descr": "|S0"}, "S0", [4]),
    ],
)
def test_blob_with_a_lying_header_is_damage(
    folder: RunFolder, header: dict[str, Any], dtype: str, shape: list[int]
) -> None:
    """A `.npy` file whose header matches the record, but not its own size, is rejected."""
    digest = put_blob(folder, npy(np.zeros(4, np.uint8), **header), "array.npy")
    assert_refused(folder, image({"dtype": dtype, "shape": shape, "blob": digest}) | {"seq": 2})


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        """Have the unpickler make the folder."""
        return os.mkdir, (str(self.path),)


def test_pickle_in_an_array_is_never_run(folder: RunFolder, tmp_path: Path) -> None:
    """An array of objects, which is a pickle, is rejected, and no code in it is run."""
    array = np.array([Bomb(tmp_path / "burst")], dtype=object)
    digest = put_blob(folder, npy(array), "array.npy")
    for dtype in ("|O", "object", "uint8"):
        line = image({"dtype": dtype, "shape": [1], "blob": digest})
        assert_refused(folder, line | {"seq": 2})
    assert not (tmp_path / "burst").exists()


@pytest.mark.usefixtures("inside_alone")
@pytest.mark.parametrize(
    "array",
    [
        {"dtype": "uint8", "shape": [10**12], "data": [1]},
        {"dtype": "uint8", "shape": [2**70], "data": [1]},
        {"dtype": "uint8", "shape": [-1], "data": [1, 2]},
        {"dtype": "uint8", "shape": [0, 2**70], "data": []},
        {"dtype": "uint8", "shape": [1], "data": [300]},
        {"dtype": "int64", "shape": [1], "data": [10**30]},
        {"dtype": "float64", "shape": [1], "data": [10**400]},
        {"dtype": "M8[s]", "shape": [1], "data": [10**30]},
        {"dtype": "|O", "shape": [1], "data": [{"a": 1}]},
        {"dtype": "O", "shape": [1], "data": [[1, 2]]},
        {"dtype": "uint8", "shape": [1], "data": [[1], [1, 2]]},
        {"dtype": "uint8", "shape": [1]},
        {"dtype": "uint8", "data": [1]},
        {"shape": [1], "data": [1]},
        {"dtype": ["x"], "shape": [1], "data": [1]},
        {"dtype": "uint8", "shape": "x", "data": [1]},
        [],
        5,
        "blob",
    ],
)
def test_array_in_a_line_that_is_none_is_damage(folder: RunFolder, array: Any) -> None:
    """An array in a line that numpy can't make, or that would hold objects, is not returned."""
    assert_refused(folder, image(array) | {"seq": 2})


@pytest.mark.parametrize(
    "array",
    [
        {"dtype": "S100000000", "shape": [1], "data": ["a"]},
        {"dtype": "U25000000", "shape": [1], "data": ["a"]},
        {"dtype": "V100000000", "shape": [1], "data": ["a"]},
        {"dtype": "(100000000,)u1", "shape": [1], "data": [1]},
    ],
)
def test_dtype_in_a_line_takes_no_memory(folder: RunFolder, array: Any) -> None:
    """A few bytes of a journal never become an array of 100 MB."""
    write_lines(folder, image(array))
    tracemalloc.start()
    read_file(folder)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 * 2**20


def nested(depth: int) -> bytes:
    """Return a list in a list, and so on."""
    return b"[" * depth + b"]" * depth


@pytest.mark.usefixtures("inside_alone")
@pytest.mark.parametrize(
    "line",
    [
        b'{"seq":2,"run":"run","time":1.0,"event":{"type":"new","a":%b}}' % nested(100_000),
        b'{"seq":2,"run":"run","time":1.0,"event":{"type":"table.logged","key":"k","columns":[],'
        b'"rows":%b}}' % nested(100_000),
        b'{"seq":2,"run":"run","time":1.0,"event":{"type":"run.started","params":{"a":%b}}}'
        % nested(100_000),
        b'{"seq":2,"run":"run","time":1.0,"event":{"type":"image.logged","key":"k","array":'
        b'{"dtype":"float32","shape":[1],"data":%b}}}' % nested(900),
        b'{"blobs":%b,"seq":2,"run":"run","time":1.0,"event":{"type":"new"}}' % nested(100_000),
        b'{"seq":2,"x":%b,"run":"run","time":1.0,"event":{"type":"new"}}' % nested(100_000),
        b'{"seq":2,"run":"run","time":1.0,"event":%b}' % nested(100_000),
        b"{" + nested(100_000),
        b'{"blobs":[{"path":"\xff","sha256":"a","name":"b","size":1}],"seq":2,"run":"run",'
        b'"time":1.0,"event":{"type":"new"}}',
        b'{"blobs":5,"seq":2,"run":"run","time":1.0,"event":{"type":"new"}}',
        b'{"blobs":[5],"seq":2,"run":"run","time":1.0,"event":{"type":"new"}}',
        b'{"seq":2,"run":"\xff","time":1.0,"event":{"type":"new"}}',
        b'{"seq":2,"run":"run","time":1.0,"event":{"type":"new","a":"\xff"}}',
        b'{"seq":2,"run":"run","time":1e400,"event":{"type":"new"}}',
        b'{"seq":2,"run":"run","time":1.0,"event":5}',
        b'{"seq":2,"run":"run","time":1.0}',
        b"{}",
        b"{",
        b"{\0}",
    ],
    ids=range(19),
)
def test_line_that_is_no_record_is_damage(folder: RunFolder, line: bytes) -> None:
    """Nesting without end, bytes that are no text, and other odd lines cost themselves alone."""
    assert_refused(folder, line)


def test_nesting_in_a_blob_is_damage(folder: RunFolder) -> None:
    """An event that is kept as a blob is nested no deeper than one in a line."""
    data = b'{"type":"new","a":%b}' % nested(100_000)
    digest = put_blob(folder, data, "event.json")
    assert_refused(folder, {"seq": 2, "event": {"type": "new", "blob": digest}})


def test_odd_numbers_take_no_time(folder: RunFolder) -> None:
    """Seqs, attempts and ranks of any size are numbers, and nothing is made for each of them."""
    event = {"type": "epoch.started", "epoch": 10**18}
    numbers = [1, 2**62, -(2**62), 0]
    write_lines(
        folder, *({"seq": n, "attempt": n, "rank": n, "event": event} for n in numbers), b"{}"
    )
    entries, file = read_file(folder)
    assert numbers == [entry.record.seq for entry in entries]
    assert 1 == file.damaged
    reader = RunReader(folder)
    read_run(reader)
    reader.close()


def test_paths_of_the_host_reach_no_sink(folder: RunFolder, tmp_path: Path) -> None:
    """Without trusted folders, sinks get no path outside of the run's directory."""
    secret = str(tmp_path / "outside" / "secret")
    event = ev.RunStarted(
        name="n", save_dir=str(tmp_path), resumed=ev.Resumed(save_dir=str(tmp_path))
    )
    named: list[ev.Event] = [
        event,
        ev.ImageLogged(key="k", path="/etc/passwd"),
        ev.CheckpointSaved(path=secret, kind="best"),
        ev.ArtifactLogged(name="a", paths=[secret, "/etc/passwd", "../outside/secret"]),
    ]
    files = FileResolver(folder, [])
    records = [ev.Record(seq=n, run="run", time=1.0, event=e) for n, e in enumerate(named)]
    started, shown, saved, kept = (files.resolve(Entry(r, [])).event for r in records)
    assert isinstance(shown, ev.ImageLogged)
    assert isinstance(saved, ev.CheckpointSaved)
    assert isinstance(kept, ev.ArtifactLogged)
    assert isinstance(started, ev.RunStarted)
    nowhere = folder.path / "not-available"
    assert [str(nowhere / "passwd"), str(nowhere / "secret")] == [shown.path, saved.path]
    assert [str(nowhere / name) for name in ("secret", "passwd", "secret")] == kept.paths
    assert not nowhere.exists()
    assert ["/etc/passwd", secret, secret, "/etc/passwd"] == files.refused
    assert ["'../outside/secret'"] == [text.partition(" is not sent")[0] for text in files.changed]
    assert started.save_dir is None
    assert started.resumed is None or started.resumed.save_dir is None


@pytest.mark.usefixtures("inside_alone")
@pytest.mark.parametrize("path", ["..", "/", ".", "//", "a/..", "\0", "a\0/b", "x" * 5_000, "a\n"])
def test_odd_path_is_refused(folder: RunFolder, path: str) -> None:
    """An invalid path raises no error; the sink gets a path that can't be opened."""
    for trusted in ([], [folder.path]):
        found = path_of(FileResolver(folder, trusted).resolve(picture(path)))
        assert found.startswith(str(folder.path / "not-available"))
        assert not os.path.isfile(found.replace("\0", ""))


@pytest.mark.needs("posix")
def test_trusted_folder_opens_itself_alone(folder: RunFolder, tmp_path: Path) -> None:
    """Paths in a trusted folder are used; `..` and links out of it, and names like it, are not."""
    trusted, outside = tmp_path / "trusted", tmp_path / "outside"
    (trusted / "deep").mkdir(parents=True)
    (tmp_path / "trusted-not").mkdir()
    good = [trusted / "a.png", trusted / "deep" / "b.png", trusted / "deep" / ".." / "a.png"]
    for path in (*good[:2], tmp_path / "trusted-not" / "c.png"):
        path.write_bytes(b"x")
    (trusted / "link.png").symlink_to(outside / "secret")
    (trusted / "linked").symlink_to(outside)
    (trusted / "within.png").symlink_to(trusted / "a.png")
    bad = [
        outside / "secret",
        trusted / ".." / "outside" / "secret",
        trusted / "link.png",
        trusted / "linked" / "secret",
        tmp_path / "trusted-not" / "c.png",
        trusted / "deep" / ".." / ".." / "outside" / "secret",
    ]
    files = FileResolver(folder, [trusted])
    for path in (*good, trusted / "within.png"):
        assert str(path) == path_of(files.resolve(picture(str(path))))
    assert [] == files.refused
    for path in bad:
        found = path_of(files.resolve(picture(str(path))))
        assert str(folder.path / "not-available" / path.name) == found
    assert list(map(str, bad)) == files.refused


@pytest.mark.parametrize(
    ("given", "kept"), [("trusted", True), ("trusted/../outside", False), ("trusted/l", False)]
)
@pytest.mark.needs("posix")
def test_save_dir_has_to_be_trusted(
    folder: RunFolder, tmp_path: Path, given: str, kept: bool
) -> None:
    """Where a training saved reaches sinks only if it lies in a trusted folder."""
    (tmp_path / "trusted").mkdir()
    (tmp_path / "trusted" / "l").symlink_to(tmp_path / "outside")
    path = str(tmp_path / given)
    event = ev.RunStarted(save_dir=path)
    record = ev.Record(seq=1, run="run", time=1.0, event=event)
    found = FileResolver(folder, [str(tmp_path / "trusted")]).resolve(Entry(record, [])).event
    assert isinstance(found, ev.RunStarted)
    assert (path if kept else None) == found.save_dir


def test_damaged_copy_is_not_replaced_by_the_original(folder: RunFolder, tmp_path: Path) -> None:
    """Where a copy is damaged, the path it was made from is not used in its place."""
    path = str(tmp_path / "outside" / "secret")
    for trusted in ([], [tmp_path]):
        files = FileResolver(folder, trusted)
        found = files.resolve(picture(path, sha256=DIGEST, name="secret"))
        assert str(folder.path / "not-available" / "secret") == path_of(found)
        assert 1 == len(files.damaged)


@pytest.mark.usefixtures("inside_alone")
@pytest.mark.needs("posix")
def test_linked_temporary_file_of_an_end_is_not_followed(folder: RunFolder, tmp_path: Path) -> None:
    """Giving an attempt its end overwrites no file that a link in the directory leads to."""
    write_journal(folder, *SAMPLE[:2])
    _OPENED.paths.clear()
    victim = tmp_path / "outside" / "secret"
    (folder.path / f".tmp-{os.getpid()}-r0-a1-end.jsonl").symlink_to(victim)
    with suppress(OSError):
        recover(folder, now=1.0)
    _OPENED.on = False
    assert SECRET == victim.read_bytes()


TAGS = [
    "!!python/object/apply:os.system [touch {burst}]",
    "!!python/object/apply:subprocess.check_output [[touch, {burst}]]",
    "!!python/object/new:os.system [touch {burst}]",
    "!!python/name:os.system",
    "!!python/module:os",
    "!!python/tuple [1, 2]",
    "!!binary aGVsbG8=",
    "!own [1]",
]


@pytest.mark.parametrize("tag", TAGS)
@pytest.mark.parametrize(
    ("place", "where"),
    [
        ("sinks:\n  a:\n    type: jsonl\n    path: %s\n", "4: sinks.a.path: "),
        ("sinks: %s\n", "1: sinks: "),
        ("%s\n", "1: "),
    ],
    ids=["option", "sinks", "file"],
)
def test_tags_in_a_configuration_are_refused(
    tmp_path: Path, tag: str, place: str, where: str
) -> None:
    """A tag that would make an object is one clear line with its place, and runs nothing."""
    burst = tmp_path / "burst"
    path = tmp_path / "trainbus.yaml"
    path.write_text(place % tag.format(burst=burst))
    fault = "found a YAML tag (`!…`), expected a plain value"
    assert [f"{path}:{where}{fault}"] == config.check(path)
    assert not burst.exists()


def test_nothing_of_ours_unpickles() -> None:
    """No source of the product lets numpy unpickle, or loads YAML with objects."""
    root = Path(trainbus.__file__).parent
    sources = [
        p for part in ("trainbus", "adapters", "sinks") for p in (root.parent / part).rglob("*.py")
    ]
    assert len(sources) > 25
    banned = ("allow_pickle=True", "pickle.load", "yaml.load(", "unsafe_load", "full_load")
    found = [(p.name, word) for p in sources for word in banned if word in p.read_text()]
    assert [] == found


def test_checksum_alone_makes_no_record_of_what_is_none(folder: RunFolder) -> None:
    """A line with the right checksum is still read as what a stranger wrote."""
    folder.records(1).write_bytes(
        seal(b'["a"]') + seal(b"null") + seal(json.dumps("text").encode()) + b"\n" + b"{}\n"
    )
    entries, file = read_file(folder)
    assert [] == entries
    assert 4 == file.damaged
