"""Kills trainings at random instants, and says what their journals hold; run as a program.

    python nursery.py FOLDER COUNT SEED

Each training is a fork of this process, which has imported everything already: what is tested is
the kill, not the start. A training acknowledges every record whose `emit` has returned through a
pipe. One line of JSON goes to standard output for each kill.
"""

from __future__ import annotations

import json
import os
import random
import select
import signal
import sys
import time
from pathlib import Path
from typing import NoReturn

from trainbus import Bus, JournalSpec
from trainbus.delivery.spec import SinkSpec
from trainbus.delivery.worker import SinkWorker
from trainbus.events import MetricsLogged, RunStarted, TextLogged
from trainbus.journal.directory import RunFolder
from trainbus.journal.file_access import FileResolver
from trainbus.journal.reader import RunReader
from trainbus.journal.recovery import recover
from trainbus.testing import MemorySink

_DEADLINE_S = 240.0


def main() -> None:
    """Kill as many trainings as are asked for."""
    folder, count, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    chance = random.Random(seed)
    for number in range(count):
        journals = folder / str(number)
        acknowledged = _kill(journals, chance)
        print(json.dumps({"acknowledged": acknowledged, **_look(journals)}), flush=True)


def _kill(journals: Path, chance: random.Random) -> int:
    """Start a training, kill it, and return the seq of the last record that it acknowledged."""
    readable, writable = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(readable)
        _train(journals, writable, chance)
    os.close(writable)
    os.set_blocking(readable, False)
    wanted, lives_s = chance.randrange(1, 60), chance.uniform(0, 0.004)
    acknowledged, rest = 0, b""
    deadline = time.monotonic() + _DEADLINE_S
    while acknowledged < wanted and time.monotonic() < deadline:
        select.select([readable], [], [], 1.0)
        rest, acknowledged = _hear(readable, rest, acknowledged)
    until = time.monotonic() + lives_s
    while time.monotonic() < until:
        pass
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    _, acknowledged = _hear(readable, rest, acknowledged)
    os.close(readable)
    return acknowledged


def _train(journals: Path, acknowledge: int, chance: random.Random) -> NoReturn:
    bus = Bus(journal=JournalSpec(dir=str(journals)))
    emit = bus.emitter()
    emit(RunStarted(name="killed"))
    seq = 1
    while True:
        os.write(acknowledge, b"%d\n" % seq)
        size = int(10 ** chance.uniform(1, 5.3))
        if size < 1000:
            emit(MetricsLogged(values={"loss": 1.0 / seq}, phase="train", step=seq))
        else:
            emit(TextLogged(key="text", text="x" * min(size, 60_000) + "é" * 60_000))
        seq += 1


def _hear(readable: int, rest: bytes, acknowledged: int) -> tuple[bytes, int]:
    while True:
        try:
            chunk = os.read(readable, 65536)
        except BlockingIOError:
            return rest, acknowledged
        if not chunk:
            return rest, acknowledged
        *lines, rest = (rest + chunk).split(b"\n")
        if lines:
            acknowledged = int(lines[-1])


def _look(journals: Path) -> dict[str, object]:
    """Return what is in the journal after recovery, and what a sink gets of it."""
    (path,) = journals.iterdir()
    folder = RunFolder(path)
    torn = not folder.records(1).read_bytes().endswith(b"\n")
    recovered = recover(folder, now=time.time())
    reader, seqs, names = RunReader(folder), [], []
    while entries := reader.read():
        seqs += [entry.record.seq for entry in entries]
        names += [type(entry.record.event).__name__ for entry in entries]
    reader.close()
    sink = MemorySink()
    route = SinkSpec(name="memory", make=lambda: sink, kind="memory", sink=sink)
    worker = SinkWorker(route, folder, FileResolver(folder, []), attempt=1)
    while not worker.done:
        worker.step()
    worker.close()
    return {
        "recovered": recovered,
        "torn": torn,
        "damaged": reader.damaged,
        "seqs": [seqs[0], seqs[-1], len(set(seqs)), len(seqs)],
        "ends": names.count("RunEnded"),
        "last": names[-1],
        "delivered": [record.seq for record in sink.records] == seqs,
    }


if __name__ == "__main__":
    main()
