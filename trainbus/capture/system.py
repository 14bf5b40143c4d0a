"""Measures how busy the machine, its GPUs and the processes of a training are.

| metric | meaning |
|---|---|
| `system/cpu.percent` | share of all CPUs in use, 0 to 100 |
| `system/memory.bytes`, `system/memory.percent` | memory that is not available to new processes |
| `system/disk.read.bytes_per_s`, `system/disk.write.bytes_per_s` | all disks together |
| `system/network.sent.bytes_per_s`, `system/network.received.bytes_per_s` | all networks but `lo` |
| `system/process.cpu.percent` | the process and its descendants; 100 is one CPU |
| `system/process.memory.bytes` | their resident memory; what they share counts for each |
| `system/process.count` | their number |
| `system/gpu.0.percent` | share of the time in which GPU 0 computed, 0 to 100 |
| `system/gpu.0.memory.bytes`, `system/gpu.0.memory.percent` | memory of GPU 0 in use, by anybody |
| `system/gpu.0.power.watts`, `system/gpu.0.temperature.celsius` | power and temperature of GPU 0 |

CPU shares and rates are averages since the sample before, or since the sampler was created. The
machine is the host: limits of a container are not considered. The time of a process that started
and ended between two samples is not counted.

psutil is required for all but the GPUs, and nvidia-ml-py for the GPUs: `trainbus[system]`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from trainbus.capture.nvml import Nvml

logger = logging.getLogger("trainbus")

_LOOPBACK = ("lo", "lo0", "Loopback Pseudo-Interface 1")


class SystemSampler:
    """Samples the machine and the process tree of a training.

    Nothing raises: a value that can't be read is missing from the sample. Without psutil, one
    warning says so. A sampler is used by one thread at a time.

    Args:
        pid: id of the training process; after it has ended, its metrics are missing.
        clock: returns seconds, for the rates.
    """

    def __init__(self, pid: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._nvml = Nvml()
        self._psutil = _psutil()
        self._process: Any = None
        self._counters: dict[str, tuple[float, float]] = {}
        self._cpu: tuple[float, float] | None = None
        self._tree: dict[tuple[int, float], float] = {}
        self._tree_at: tuple[float, float] | None = None
        if self._psutil is not None:
            try:
                from psutil import Process

                self._process = Process(pid)
            except Exception as error:
                logger.debug("process %s is not measured: %s", pid, error)
        self.sample()

    def sample(self) -> dict[str, float]:
        """Return metric → value; the rates of a counter are missing until it was read twice."""
        found: dict[str, float] = {}
        sources = [self._sample_gpus]
        if self._psutil is not None:
            sources += [self._sample_cpu, self._sample_memory, self._sample_disk]
            sources += [self._sample_network, self._sample_process]
        for source in sources:
            try:
                found |= source()
            except Exception as error:  # no permission, or the process has ended
                logger.debug("%s: %s", source.__name__, error)
        return {f"system/{name}": float(value) for name, value in found.items()}

    def close(self) -> None:
        """Release the connection to the GPUs."""
        self._nvml.close()

    def _sample_cpu(self) -> dict[str, float]:
        # `psutil.cpu_percent` keeps its last values in the module, where other callers change them.
        times = self._psutil.cpu_times()
        guest = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)
        total = sum(times) - guest  # `user` and `nice` include these
        busy = total - times.idle - getattr(times, "iowait", 0.0)
        before, self._cpu = self._cpu, (busy, total)
        if before is None or total <= before[1]:
            return {}
        return {"cpu.percent": _percent(busy - before[0], total - before[1])}

    def _sample_memory(self) -> dict[str, float]:
        memory = self._psutil.virtual_memory()
        used = memory.total - memory.available
        return {"memory.bytes": used, "memory.percent": _percent(used, memory.total)}

    def _sample_disk(self) -> dict[str, float]:
        counters = self._psutil.disk_io_counters()
        if counters is None:  # a machine without disks
            return {}
        return {
            **self._rate("disk.read", counters.read_bytes),
            **self._rate("disk.write", counters.write_bytes),
        }

    def _sample_network(self) -> dict[str, float]:
        networks = self._psutil.net_io_counters(pernic=True)
        real = [counters for name, counters in networks.items() if name not in _LOOPBACK]
        return {
            **self._rate("network.sent", sum(each.bytes_sent for each in real)),
            **self._rate("network.received", sum(each.bytes_recv for each in real)),
        }

    def _sample_process(self) -> dict[str, float]:
        if self._process is None:
            return {}
        now, unix = self._clock(), time.time()
        tree: dict[tuple[int, float], float] = {}
        memory = 0
        spent = 0.0
        for process in (self._process, *self._process.children(recursive=True)):
            try:
                with process.oneshot():
                    key = process.pid, process.create_time()
                    user, kernel, *_ = process.cpu_times()
                    memory += process.memory_info().rss
            except Exception:  # it has just ended
                if process is self._process:
                    raise
                continue
            tree[key] = user + kernel
            # All the time of a process that has started since the last sample is of this interval.
            is_new = self._tree_at is not None and key[1] >= self._tree_at[1]
            spent += tree[key] - self._tree.get(key, 0.0 if is_new else tree[key])
        before, self._tree, self._tree_at = self._tree_at, tree, (now, unix)
        found: dict[str, float] = {"process.memory.bytes": memory, "process.count": len(tree)}
        if before is not None and now > before[0]:
            found["process.cpu.percent"] = 100.0 * max(spent, 0.0) / (now - before[0])
        return found

    def _sample_gpus(self) -> dict[str, float]:
        found: dict[str, float] = {}
        read = self._nvml.read
        for index, gpu in enumerate(self._nvml.handles):
            name = f"gpu.{index}"
            if (use := read("nvmlDeviceGetUtilizationRates", gpu)) is not None:
                found[f"{name}.percent"] = use.gpu
            if (memory := read("nvmlDeviceGetMemoryInfo", gpu)) is not None:
                found[f"{name}.memory.bytes"] = memory.used
                found[f"{name}.memory.percent"] = _percent(memory.used, memory.total)
            if (milliwatts := read("nvmlDeviceGetPowerUsage", gpu)) is not None:
                found[f"{name}.power.watts"] = milliwatts / 1000
            if (celsius := self._nvml.temperature(gpu)) is not None:
                found[f"{name}.temperature.celsius"] = celsius
        return found

    def _rate(self, name: str, value: float) -> dict[str, float]:
        """Return a counter's increase per second; nothing at first, and when it was reset."""
        now = self._clock()
        before, at = self._counters.get(name, (value + 1.0, now))
        self._counters[name] = value, now
        if value < before or now <= at:
            return {}
        return {f"{name}.bytes_per_s": (value - before) / (now - at)}


def _percent(part: float, whole: float) -> float:
    return min(max(100.0 * part / whole, 0.0), 100.0) if whole else 0.0


def _psutil() -> Any:
    try:
        import psutil
    except Exception as error:
        text = "system metrics need psutil (%s): pip install 'trainbus[system]'"
        logger.warning(text, error)
        return None
    return psutil
