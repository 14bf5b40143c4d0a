"""What it costs to emit a record that survives SIGKILL, and how fast a journal is read back.

    python benchmarks/journal.py [RECORDS]

In one run, with the same ten metrics: the floor (encode and one `write` a record), wandb's own
`run.log` offline, and `emit`; then a replay of the whole journal into a memory sink.
"""

from __future__ import annotations

import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable

import msgspec

from trainbus import Bus, JournalSpec
from trainbus.events import MetricsLogged, RunStarted
from trainbus.replay import replay
from trainbus.route import Route
from trainbus.runfolder import RunFolder
from trainbus.testing import MemorySink

_WANDB_CALLS = 2_000


def metrics(step: int) -> dict[str, float]:
    """Return ten numbers."""
    return dict.fromkeys(("a", "b", "c", "d", "e", "f", "g", "h", "i", "j"), 0.5 + step)


def per_call(call: Callable[[int], object], count: int) -> tuple[float, float]:
    """Return the mean and the 99th percentile of a call in µs."""
    took = []
    begun = time.perf_counter()
    for step in range(count):
        at = time.perf_counter()
        call(step)
        took.append(time.perf_counter() - at)
    mean = (time.perf_counter() - begun) / count
    return 1e6 * mean, 1e6 * sorted(took)[int(0.99 * count)]


def main() -> None:
    """Print one line for each way."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    with tempfile.TemporaryDirectory() as folder:
        encoder = msgspec.json.Encoder()
        fd = os.open(os.path.join(folder, "floor"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        floor, floor_99 = per_call(
            lambda step: os.write(fd, encoder.encode({"seq": step, "values": metrics(step)})),
            min(count, 100_000),
        )
        os.close(fd)
        print(f"floor: encode and write        {floor:8.1f} µs   p99 {floor_99:8.1f}")

        bus = Bus(journal=JournalSpec(dir=folder, max_bytes=2**40))
        bus.emit(RunStarted(name="benchmark"))

        def emit(step: int) -> None:
            bus.emit(MetricsLogged(values=metrics(step), phase="train", step=step))

        _, emit_99 = per_call(emit, min(count, 100_000))
        begun = time.perf_counter()
        for step in range(count):
            emit(step)
        ours = 1e6 * (time.perf_counter() - begun) / count
        rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(
            f"emit, {count:,} records   {ours:8.1f} µs   p99 {emit_99:8.1f}   "
            f"{1e6 / ours:,.0f}/s, {rss:.0f} MB resident, {ours / floor:.1f} times the floor"
        )
        bus.close()

        (run,) = [p for p in os.scandir(folder) if p.is_dir()]
        sink = MemorySink()
        route = Route(name="memory", make=lambda: sink, kind="memory", sink=sink)
        begun = time.perf_counter()
        receipt, _ = replay(RunFolder(run.path), [route])
        took = time.perf_counter() - begun
        print(f"replay into the memory sink    {receipt.sinks[0].taken / took:,.0f}/s")

        os.environ |= {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_DIR": folder}
        import wandb

        tracker = wandb.init(project="benchmark")
        theirs, theirs_99 = per_call(lambda step: tracker.log(metrics(step)), _WANDB_CALLS)
        tracker.finish()
        print(
            f"wandb run.log, {_WANDB_CALLS:,} calls     {theirs:8.1f} µs   p99 {theirs_99:8.1f}   "
            f"{theirs / ours:.0f} times emit"
        )


if __name__ == "__main__":
    main()
