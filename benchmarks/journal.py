"""What it costs to emit a record that survives SIGKILL, and how fast a journal is read back.

    python benchmarks/journal.py [--short]

In one run, with the same ten metrics and no sink at work: the floor (encode and one `write` a
record), wandb's own `run.log` offline, and `emit`, in turns, so that what else the machine does
falls on all of them; then a million records at once, and a replay of them into a memory sink.
`--short` only shows that it runs.
"""

from __future__ import annotations

import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable

import msgspec

from trainbus import Bus, JournalSpec
from trainbus.delivery.replay import replay
from trainbus.delivery.spec import SinkSpec
from trainbus.events import MetricsLogged, RunStarted
from trainbus.journal.directory import RunFolder
from trainbus.testing import MemorySink


def metrics(step: int) -> dict[str, float]:
    """Return ten numbers."""
    return dict.fromkeys(("a", "b", "c", "d", "e", "f", "g", "h", "i", "j"), 0.5 + step)


def microseconds(call: Callable[[int], object], count: int) -> list[float]:
    """Return how long each of many calls took, in µs."""
    took = []
    for step in range(count):
        begun = time.perf_counter()
        call(step)
        took.append(1e6 * (time.perf_counter() - begun))
    return took


def p99(took: list[float]) -> float:
    """Return the 99th percentile."""
    return sorted(took)[int(0.99 * len(took))]


def main() -> None:
    """Print one line for each way."""
    short = "--short" in sys.argv[1:]
    count, rounds, calls, wandb_calls = (1000, 2, 50, 5) if short else (1_000_000, 20, 5000, 100)
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_DIR": folder}
        import wandb

        encoder = msgspec.json.Encoder()
        fd = os.open(os.path.join(folder, "floor"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        tracker = wandb.init(project="benchmark")
        journals = os.path.join(folder, "journals")
        bus = Bus(journal=JournalSpec(dir=journals, max_bytes=2**40), on_receipt=lambda _: None)
        emitter = bus.emitter()
        emitter(RunStarted(name="benchmark"))

        def write(step: int) -> None:
            os.write(fd, encoder.encode({"seq": step, "values": metrics(step)}))

        def emit(step: int) -> None:
            emitter(MetricsLogged(values=metrics(step), phase="train", step=step))

        def log(step: int) -> None:
            tracker.log(metrics(step))

        ways: dict[Callable[[int], None], int] = {write: calls, emit: calls, log: wandb_calls}
        took: dict[Callable[[int], None], list[float]] = {way: [] for way in ways}
        for _ in range(rounds):
            for way, times in ways.items():
                took[way] += microseconds(way, times)
        tracker.finish()
        os.close(fd)
        floor, ours, theirs = (statistics.median(took[way]) for way in ways)
        print(f"{'':24} {'median µs':>10} {'p99 µs':>10}")
        print(f"{'encode and write':24} {floor:>10.1f} {p99(took[write]):>10.1f}")
        print(
            f"{'emit':24} {ours:>10.1f} {p99(took[emit]):>10.1f}   "
            f"{ours / floor:.1f} times the floor"
        )
        print(
            f"{'wandb run.log':24} {theirs:>10.1f} {p99(took[log]):>10.1f}   "
            f"{theirs / ours:.1f} times emit"
        )

        begun = time.perf_counter()
        for step in range(count):
            emit(step)
        rate = count / (time.perf_counter() - begun)
        rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(f"emit, {count:,} records: {rate:,.0f}/s, {rss:.0f} MB resident")
        bus.close()

        (run,) = [path for path in os.scandir(journals) if path.is_dir()]
        sink = MemorySink()
        route = SinkSpec(name="memory", make=lambda: sink, kind="memory", sink=sink)
        begun = time.perf_counter()
        receipt, _ = replay(RunFolder(run.path), [route])
        rate = receipt.sinks[0].taken / (time.perf_counter() - begun)
        print(f"replay into the memory sink: {rate:,.0f}/s")


if __name__ == "__main__":
    main()
