"""The processes of a training are measured together, and their end is no error."""

from __future__ import annotations

import subprocess
import sys

import pytest

from trainbus.capture.system import SystemSampler

pytest.importorskip("psutil")

PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "print('ready', flush=True); input()"])
child.wait()
"""


def test_descendants_are_measured_until_the_training_ends() -> None:
    """A child counts with its parent; after the training was killed, its metrics are missing."""
    training = subprocess.Popen(
        [sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert training.stdout is not None
        assert b"ready" == training.stdout.readline().strip()
        sampler = SystemSampler(training.pid)
        both = sampler.sample()
        assert 2.0 == both["system/process.count"]
        assert 0.0 <= both["system/process.cpu.percent"]
    finally:
        training.kill()
        training.communicate()
    after = sampler.sample()
    assert [] == [name for name in after if "process" in name]
    assert "system/memory.bytes" in after


def test_a_process_that_never_was() -> None:
    """A sampler for a process that has ended already samples the machine."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    found = SystemSampler(ended.pid).sample()
    assert [] == [name for name in found if "process" in name]
    assert "system/memory.bytes" in found
