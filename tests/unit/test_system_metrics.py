"""How busy a machine is, with exact rates, and without a value that can't be read."""

from __future__ import annotations

import collections
import contextlib
import logging
import os
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest

from trainbus.capture.system import SystemSampler

psutil = pytest.importorskip("psutil")

Times = collections.namedtuple("Times", "user system idle iowait guest guest_nice")


class Process:
    """A process whose numbers are set by the test; one with `error` can't be read."""

    def __init__(self, pid: int, error: Exception | None = None) -> None:
        self.pid = pid
        self.born, self.cpu, self.rss = 0.0, 0.0, 100
        self.below: list[Process] = []
        self.error = error

    @contextlib.contextmanager
    def oneshot(self) -> Iterator[None]:
        yield

    def children(self, *, recursive: bool) -> list[Process]:
        assert recursive
        return self.below

    def create_time(self) -> float:
        if self.error is not None:
            raise self.error
        return self.born

    def cpu_times(self) -> Any:
        return self.cpu / 2, self.cpu / 2, 9.0

    def memory_info(self) -> Any:
        return types.SimpleNamespace(rss=self.rss)


class Machine:
    """A machine whose numbers are set by the test."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.process = Process(7)
        self.times = Times(10.0, 10.0, 80.0, 0.0, 0.0, 0.0)
        self.read = self.sent = 0
        self.library = types.ModuleType("psutil")
        vars(self.library).update(
            Process=lambda pid: self.process,
            cpu_times=lambda: self.times,
            virtual_memory=lambda: types.SimpleNamespace(total=1000, available=750),
            disk_io_counters=lambda: types.SimpleNamespace(read_bytes=self.read, write_bytes=5),
            net_io_counters=self.networks,
        )

    def networks(self, *, pernic: bool) -> dict[str, Any]:
        assert pernic
        card = types.SimpleNamespace(bytes_sent=self.sent, bytes_recv=2 * self.sent)
        lost = types.SimpleNamespace(bytes_sent=10**9 * self.now, bytes_recv=10**9 * self.now)
        return {"eth0": card, "eth1": card, "lo": lost}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A machine without GPUs."""
    machine = Machine()
    monkeypatch.setitem(sys.modules, "psutil", machine.library)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    return machine


def sampler_of(machine: Machine) -> SystemSampler:
    return SystemSampler(7, clock=lambda: machine.now)


def test_rates_are_those_since_the_sample_before(machine: Machine) -> None:
    """Counters become bytes per second, and CPU times shares, over the time that has passed."""
    sampler = sampler_of(machine)
    machine.now += 4
    machine.read, machine.sent = 400, 100
    machine.times = Times(11.0, 11.0, 84.0, 2.0, 0.5, 0.0)  # `user` includes `guest`
    machine.process.cpu = 6.0
    expected = {
        "system/cpu.percent": 25.0,
        "system/memory.bytes": 250.0,
        "system/memory.percent": 25.0,
        "system/disk.read.bytes_per_s": 100.0,
        "system/disk.write.bytes_per_s": 0.0,
        "system/network.sent.bytes_per_s": 50.0,
        "system/network.received.bytes_per_s": 100.0,
        "system/process.cpu.percent": 150.0,
        "system/process.memory.bytes": 100.0,
        "system/process.count": 1.0,
    }
    assert expected == sampler.sample()


def test_no_time_has_no_rate(machine: Machine) -> None:
    """Two samples at the same time have what needs no time, and nothing is divided by zero."""
    found = sampler_of(machine).sample()
    assert {"memory.bytes", "memory.percent", "process.count", "process.memory.bytes"} == {
        name.removeprefix("system/") for name in found
    }


def test_a_counter_that_was_reset_has_no_rate(machine: Machine) -> None:
    """After a counter wraps or a network card is removed, no negative rate is reported."""
    machine.sent = 100
    sampler = sampler_of(machine)
    machine.now += 1
    machine.sent = 50
    assert "system/network.sent.bytes_per_s" not in sampler.sample()
    machine.now += 1
    machine.sent = 60
    assert 20.0 == sampler.sample()["system/network.sent.bytes_per_s"]


def test_the_whole_tree_counts(machine: Machine) -> None:
    """A child counts from its start, one that was there before from the sample before."""
    old, new, gone = Process(8), Process(9), Process(10, psutil.NoSuchProcess(10))
    old.cpu = 50.0
    machine.process.below = [old]
    sampler = sampler_of(machine)
    machine.now += 2
    old.cpu += 1.0
    new.cpu, new.born = 3.0, float("inf")
    machine.process.below = [old, new, gone]
    found = sampler.sample()
    assert 200.0 == found["system/process.cpu.percent"]
    assert (300.0, 3.0) == (found["system/process.memory.bytes"], found["system/process.count"])
    machine.now += 1
    machine.process.below = []
    assert 0.0 == sampler.sample()["system/process.cpu.percent"]


def test_a_reused_id_is_another_process(machine: Machine) -> None:
    """A process that has the id of one that ended has its own times."""
    child, other = Process(8), Process(8)
    child.cpu, other.cpu, other.born = 50.0, 1.0, float("inf")
    machine.process.below = [child]
    sampler = sampler_of(machine)
    machine.now += 1
    machine.process.below = [other]
    assert 100.0 == sampler.sample()["system/process.cpu.percent"]


def test_a_source_that_fails_costs_only_its_own_values(machine: Machine) -> None:
    """A missing permission, or an ended process, leaves the other metrics."""
    sampler = sampler_of(machine)
    machine.now += 1

    def denied() -> Any:
        raise PermissionError("/proc/diskstats")

    vars(machine.library)["disk_io_counters"] = denied
    machine.process.error = psutil.NoSuchProcess(7)
    names = {name.removeprefix("system/").partition(".")[0] for name in sampler.sample()}
    assert {"memory", "network"} == names


def test_a_machine_without_disks_has_no_disk_metrics(machine: Machine) -> None:
    """psutil returns None for the counters of no disks."""
    vars(machine.library)["disk_io_counters"] = lambda: None
    sampler = sampler_of(machine)
    machine.now += 1
    assert [] == [name for name in sampler.sample() if "disk" in name]


def test_without_psutil_one_warning_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Without psutil there are no values of it, and one warning says what to install."""
    monkeypatch.setitem(sys.modules, "psutil", None)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with caplog.at_level(logging.WARNING, "trainbus"):
        sampler = SystemSampler(os.getpid())
        assert [{}, {}] == [sampler.sample(), sampler.sample()]
    assert 1 == len(caplog.records)
    assert "pip install 'trainbus[system]'" in caplog.text


def test_each_gpu_has_its_values(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """GPUs have the numbers of NVML in plain units; what one does not support is missing."""

    def power(gpu: int) -> int:
        if gpu == 1:
            raise OSError("not supported")
        return 250_500

    closed: list[bool] = []
    library = types.ModuleType("pynvml")
    vars(library).update(
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: closed.append(True),
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetUtilizationRates=lambda gpu: types.SimpleNamespace(gpu=90 + gpu),
        nvmlDeviceGetMemoryInfo=lambda gpu: types.SimpleNamespace(used=250, total=1000),
        nvmlDeviceGetPowerUsage=power,
        nvmlDeviceGetTemperature=lambda gpu, sensor: 60 + gpu,
    )
    monkeypatch.setitem(sys.modules, "pynvml", library)
    sampler = sampler_of(machine)
    expected = {
        "system/gpu.0.percent": 90.0,
        "system/gpu.0.memory.bytes": 250.0,
        "system/gpu.0.memory.percent": 25.0,
        "system/gpu.0.power.watts": 250.5,
        "system/gpu.0.temperature.celsius": 60.0,
        "system/gpu.1.percent": 91.0,
        "system/gpu.1.memory.bytes": 250.0,
        "system/gpu.1.memory.percent": 25.0,
        "system/gpu.1.temperature.celsius": 61.0,
    }
    assert expected == {k: v for k, v in sampler.sample().items() if "gpu" in k}
    sampler.close()
    sampler.close()
    assert [True] == closed
    assert [] == [name for name in sampler.sample() if "gpu" in name]


def test_this_machine_can_be_sampled() -> None:
    """With the real psutil, the values are those of this process and machine."""
    sampler = SystemSampler(os.getpid())
    found = sampler.sample()
    sampler.close()
    assert 10 * 2**20 < found["system/process.memory.bytes"] < psutil.virtual_memory().total
    assert 0 < found["system/memory.percent"] <= 100
    assert {float} == set(map(type, found.values()))
    assert [] == [name for name in found if not name.startswith("system/")]
