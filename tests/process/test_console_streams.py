"""Captured lines survive the death of the process, and its children record none."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

START = """
import os, signal, sys
from trainbus.capture.console import ConsoleCapture
def write(chunk):
    os.write(int(sys.argv[1]), f"{os.getpid() == parent} {chunk.stream} {chunk.text}\\n".encode())
parent = os.getpid()
capture = ConsoleCapture(write)
capture.start()
"""


def recorded(script: str) -> tuple[list[str], int]:
    """Return what the callback in a process wrote, and the exit code of the process."""
    read, write = os.pipe()
    try:
        done = subprocess.run(
            [sys.executable, "-c", START + script, str(write)],
            pass_fds=[write],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=120,
            check=False,
        )
    finally:
        os.close(write)
    with open(read, encoding="utf-8") as file:
        return file.read().splitlines(), done.returncode


pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def test_lines_survive_sigkill() -> None:
    """What was printed before the process was killed has been passed on."""
    found, code = recorded("print('one'); print('two', file=sys.stderr)\nos.kill(parent, 9)")
    assert (["True stdout one", "True stderr two"], -9) == (found, code)


def test_a_forked_child_records_nothing() -> None:
    """A child prints without being captured, also if it was forked while a line was passed on."""
    found, code = recorded(
        """
if os.fork() == 0:
    print("child")
    capture.stop()
    os._exit(0)
os.wait()
print("parent")
capture.stop()
"""
    )
    assert (["True stdout parent"], 0) == (found, code)


def test_a_traceback_at_the_end_is_captured() -> None:
    """The exception that ends the program is among the lines, and its exit code stays."""
    found, code = recorded("raise ValueError('at the end')")
    assert ("True stderr ValueError: at the end", 1) == (found[-1], code)


def test_printing_while_python_shuts_down_is_safe() -> None:
    """Finalizers that print at the very end neither fail nor block."""
    found, code = recorded(
        """
class Late:
    def __del__(self):
        print("late")
late = Late()
sys.late = Late()
print("one")
"""
    )
    assert ("True stdout one", 0) == (found[0], code)


def test_a_crash_writes_its_traceback() -> None:
    """`faulthandler` finds the file descriptor of a captured stderr."""
    found, code = recorded(
        "import faulthandler\nfaulthandler.enable()\nprint('one')\nfaulthandler._sigsegv()"
    )
    assert (["True stdout one"], -11) == (found, code)
