"""Sinks that hang, raise or crawl, and disks that are full or read-only: training goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.plugins import make_plugin

ADVERSE = """
    import time
    from trainbus import Options, Sink

    class AdverseOptions(Options, frozen=True, kw_only=True):
        how: str
        path: str = ""

    class AdverseSink(Sink):
        Options = AdverseOptions

        def write(self, records):
            match self.options.how:
                case "hangs":
                    time.sleep(3600)
                case "raises":
                    raise ValueError("no")
                case "crawls":
                    for record in records:
                        time.sleep(0.1)
"""

TRAINING = """
    import json, resource, sys, time
    import trainbus

    def loop(run, steps):
        for step in range(steps):
            sum(i * i for i in range(2000))
            values = {f"loss{i}": 1.0 / (step + i + 1) for i in range(10)}
            begun = time.perf_counter()
            run.log(values, step=step)
            took.append(time.perf_counter() - begun)

    took = []

    with trainbus.load("config.yaml") as bus:
        with bus.run(name="adverse") as run:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            for epoch in run.epochs(2):
                loop(run, int(sys.argv[1]))
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    receipt = bus.receipts[0]
    print(json.dumps({
        "emitted": receipt.emitted, "dropped": receipt.dropped, "unsaved": receipt.unsaved,
        "p99_us": round(1e6 * sorted(took)[int(0.99 * len(took))]),
        "journal": receipt.journal, "grown_mib": grown / 1024,
        "sinks": {s.name: [s.taken, s.skipped, s.dead, s.pending] for s in receipt.sinks},
    }))
"""


def trained(
    folder: Path,
    sinks: str,
    *,
    steps: int = 500,
    journal: str = "trainbus-runs",
    flush_secs: float = 5.0,
    isolation: str = "auto",
) -> tuple[dict[str, Any], str]:
    """Return what a training says of its run, and what it wrote on stderr."""
    plugins = make_plugin(folder / "plugins", "adverse", ADVERSE, "AdverseSink")
    (folder / "config.yaml").write_text(
        f"isolation: {isolation}\nflush_secs: {flush_secs}\njournal: {{dir: {journal}}}\n"
        f"sinks: {{good: {{type: jsonl, path: good.jsonl}}, {sinks}}}\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(TRAINING), str(steps)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(plugins)},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert 0 == done.returncode, done.stderr
    assert "Traceback" not in done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    for counts in found["sinks"].values():
        assert found["emitted"] == sum(counts)
    assert found["grown_mib"] <= 64
    print(f"emit p99 {found['p99_us']} µs, memory +{found['grown_mib']:.1f} MiB")
    return found, done.stderr


@pytest.mark.parametrize("isolation", ["process", "thread"])
@pytest.mark.parametrize("how", ["hangs", "raises", "crawls"])
def test_an_adverse_sink_costs_only_itself(how: str, isolation: str, tmp_path: Path) -> None:
    """Training ends normally, the other sink has everything, and the numbers add up."""
    found, errors = trained(tmp_path, f"bad: {{type: adverse, how: {how}}}", isolation=isolation)
    emitted = found["emitted"]
    assert 1006 == emitted
    assert [emitted, 0, 0, 0] == found["sinks"]["good"]
    taken, _, dead, pending = found["sinks"]["bad"]
    assert {"hangs": 0, "raises": 5, "crawls": 0}[how] == dead
    assert (how == "crawls") == (taken > 0)
    assert pending > 0
    assert "trainbus replay" in errors
    assert emitted == len((tmp_path / "good.jsonl").read_text().splitlines())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 256 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("only root can mount a small disk")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.parametrize("isolation", ["process", "thread", "inline"])
def test_a_full_disk_stops_nothing(isolation: str, small_disk: Path, tmp_path: Path) -> None:
    """What the disk has no room for reaches the sinks from memory, and the receipt says so."""
    found, errors = trained(
        tmp_path,
        "other: {type: jsonl, path: other.jsonl}",
        steps=1000,
        journal=str(small_disk / "runs"),
        flush_secs=20,
        isolation=isolation,
    )
    assert (2006, 0) == (found["emitted"], found["dropped"])
    assert found["unsaved"] > 0
    for name in ("good", "other"):
        assert [2006, 0, 0, 0] == found["sinks"][name]
    assert "can't be written" in errors
    assert "NOT ON DISK" in errors
    lines = (tmp_path / "good.jsonl").read_text().splitlines()
    seqs = [json.loads(line)["seq"] for line in lines]
    assert list(range(1, 2007)) == seqs


def test_a_directory_that_can_not_be_written(tmp_path: Path) -> None:
    """The journal goes to the system's temporary folder, one line says so, and all is kept."""
    (tmp_path / "file").write_text("no folder")
    found, errors = trained(
        tmp_path, "other: {type: jsonl, path: other.jsonl}", journal="file/runs", flush_secs=20
    )
    assert "can't be written, the journal is in" in errors
    assert not found["journal"].startswith(str(tmp_path / "file"))
    assert [1006, 0, 0, 0] == found["sinks"]["good"]


READ_ONLY = """
    import resource, trainbus
    from trainbus.testing import MemorySink
    import trainbus.bus

    memory = MemorySink()
    with trainbus.load("config.yaml") as bus:
        heard = []
        bus.subscribe(heard.append)
        with bus.run() as run:
            run.log({"loss": 1.0})
    print(len(heard), bus.receipts[0].unsaved)
"""


def test_no_directory_at_all(tmp_path: Path) -> None:
    """Where nothing can be written training goes on, subscribers hear it, and one line says so."""
    (tmp_path / "file").write_text("no folder")
    (tmp_path / "config.yaml").write_text(
        "journal: {dir: file/runs}\nsinks: {good: {type: jsonl, path: good.jsonl}}\n"
    )
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import tempfile\ntempfile.tempdir = 'file'\n" + textwrap.dedent(READ_ONLY),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert 0 == done.returncode, done.stderr
    assert "3 3" == done.stdout.strip()
    assert "this run is not logged: no directory for the journal can be written" in done.stderr
