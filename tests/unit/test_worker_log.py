"""The log of the delivery process: what is printed while it is saved is kept."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from trainbus.delivery.sidecar_protocol import Marks, anonymous_file
from trainbus.delivery.worker_log import Output

LAST = b"the last line\n"


def test_a_line_printed_while_much_output_is_saved_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file in memory is emptied in a pause of the output, not between two lines of it."""
    fd, real, looks = anonymous_file(), os.fstat, 0

    def fstat(which: int) -> os.stat_result:
        """Have the line printed after the second look at the size in one save."""
        nonlocal looks
        found = real(which)
        looks += which == fd
        if looks == 2:
            os.write(fd, LAST)
        return found

    output = Output(fd, Marks())
    os.write(fd, b"x" * (2**20 + 1))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fstat", fstat)
        output.save([tmp_path / "worker.log"])
    if looks < 2:
        os.write(fd, LAST)
    output.save([tmp_path / "worker.log"])
    assert (tmp_path / "worker.log").read_bytes().endswith(LAST)
    output.save([])
    assert 0 == os.fstat(fd).st_size
    output.close()
