"""Stores what is too large for a line of the journal: files, arrays and long events.

A blob is `blobs/<sha256 of its content>/<name>`. It is written, synced and renamed before the
record that names it is written: a record never names a missing blob, and the trainer may change its
own file afterwards. A hard link to that file would not be enough, as trainers overwrite files in
place.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import re
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import numpy as np

from trainbus.errors import JournalError
from trainbus.events import Array
from trainbus.journal.directory import RunFolder, open_within
from trainbus.redaction.patterns import text

_DIGEST = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")
_RESERVED = re.compile(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?")  # not allowed on Windows
_CHUNK = 2**20
_MAX_LOADED = 2**31


class Blob(msgspec.Struct, frozen=True, kw_only=True):
    """A copy of a file named in a record: the original path, and the copy's name and digest."""

    path: str
    sha256: str
    name: str
    size: int


class Blobs:
    """The blobs of one run."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self.written = 0
        """Bytes written by this process."""

    def add_file(self, path: str, max_bytes: float = math.inf) -> Blob | None:
        """Copy a file; return None if it is not a regular file, or larger than `max_bytes`.

        Raises:
            OSError: the file can't be read, or the copy can't be written.
        """
        if not os.path.isfile(path) or os.path.getsize(path) > max_bytes:
            return None
        with open(path, "rb") as file:
            digest, name, size = self._add(file, text(os.path.basename(path)))
        return Blob(path=path, sha256=digest, name=name, size=size)

    def add_array(self, array: Array) -> str:
        """Store an array as a `.npy` file, and return its digest.

        Raises:
            OSError: it can't be written.
        """
        buffer = io.BytesIO()
        np.save(buffer, np.asarray(array, order="C"), allow_pickle=False)
        buffer.seek(0)
        return self._add(buffer, "array.npy")[0]

    def add_event(self, data: bytes) -> str:
        """Store the JSON of an event that is too long for a line, and return its digest.

        Raises:
            OSError: it can't be written.
        """
        return self._add(io.BytesIO(data), "event.json")[0]

    def find(self, blob: Blob) -> Path:
        """Return the path of a blob after checking its size and content.

        Raises:
            JournalError: the blob is missing or damaged, or its name is not valid.
        """
        path = self._path(blob.sha256, blob.name)
        digest = hashlib.sha256()
        with self._open(path) as file:
            if os.fstat(file.fileno()).st_size != blob.size:
                raise JournalError(f"blob {blob.sha256} is damaged: expected {blob.size} bytes")
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
        if digest.hexdigest() != blob.sha256:
            raise JournalError(f"blob {blob.sha256} is damaged: its digest does not match")
        return path

    def load(
        self, digest: str, dtype: np.dtype[Any] | None = None, shape: tuple[int, ...] = ()
    ) -> Any:
        """Return the content of a blob: an array of `dtype` and `shape`, or an event's JSON.

        Raises:
            JournalError: the blob is missing or damaged, or has another type or shape.
        """
        path = self._path(digest, "event.json" if dtype is None else "array.npy")
        with self._open(path) as file:
            # A corrupt or hostile record must not decide how much is read.
            size = os.fstat(file.fileno()).st_size
            if size > _MAX_LOADED:
                raise JournalError(
                    f"blob {digest} has {size} bytes, expected at most {_MAX_LOADED}"
                )
            data = file.read()
        if hashlib.sha256(data).hexdigest() != digest:
            raise JournalError(f"blob {digest} is damaged: its digest does not match")
        return data if dtype is None else _array(data, dtype, shape)

    def _add(self, source: BinaryIO, name: str) -> tuple[str, str, int]:
        """Copy a file into the blobs, and return its digest, name and size."""
        name = blob_name(name)
        blobs = self._folder.blobs
        blobs.mkdir(mode=0o700, exist_ok=True)
        fd, temporary = tempfile.mkstemp(dir=blobs, prefix=".tmp-")
        try:
            digest, size = hashlib.sha256(), 0
            with os.fdopen(fd, "wb") as copy:
                while chunk := source.read(_CHUNK):
                    digest.update(chunk)
                    size += copy.write(chunk)
                path = blobs / digest.hexdigest() / name
                if not path.exists():
                    copy.flush()
                    os.fsync(fd)
                    path.parent.mkdir(mode=0o700, exist_ok=True)
                    os.replace(temporary, path)
                    self.written += size
        finally:
            with suppress(OSError):
                os.unlink(temporary)
        return digest.hexdigest(), name, size

    def _path(self, digest: str, name: str) -> Path:
        if not _DIGEST.fullmatch(digest) or not _NAME.fullmatch(name):
            raise JournalError(f"rejected a blob named {digest[:80]!r}/{name[:80]!r}")
        return self._folder.blobs / digest / name

    def _open(self, path: Path) -> BinaryIO:
        try:
            return os.fdopen(open_within(self._folder.path, path), "rb")
        except OSError as error:
            text = f"blob {path.parent.name} can't be read: {error.strerror}"
            raise JournalError(text) from error


def blob_name(name: str) -> str:
    """Return a file name as one that is valid on every operating system."""
    kept = re.sub(r"[^A-Za-z0-9._-]", "_", name).lstrip(".")[-128:].lstrip(".") or "file"
    return f"_{kept}"[:128] if _RESERVED.fullmatch(kept) else kept


def array_store(blobs: Blobs, min_bytes: int, fits: Callable[[int], bool]) -> Any:
    """Return a function that stores arrays of at least `min_bytes` as blobs."""

    def store(array: Array) -> str | None:
        if array.nbytes < min_bytes or array.dtype.hasobject or not fits(array.nbytes):
            return None
        try:
            return blobs.add_array(array)
        except OSError:  # a full disk: the array stays in the line
            return None

    return store


def _array(data: bytes, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Array:
    if dtype.hasobject or not all(type(n) is int and n >= 0 for n in shape):
        raise JournalError(f"rejected an array of {dtype} {shape}")
    if math.prod(shape) * dtype.itemsize > len(data):
        raise JournalError(f"rejected an array of {dtype} {shape}: its blob has {len(data)} bytes")
    file = io.BytesIO(data)
    try:
        np.lib.format.read_magic(file)
        found = np.lib.format.read_array_header_1_0(file)
        if found != (shape, False, dtype):
            raise ValueError(f"found {found}")
        array = np.frombuffer(data, dtype, math.prod(shape), offset=file.tell())
    except Exception as error:
        raise JournalError(f"a blob is not an array of {dtype} {shape}: {error}") from error
    return array.reshape(shape).copy()
