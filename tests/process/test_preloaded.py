"""A program that is forked ends as one that is started, and has the same surroundings."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from support import preloaded

PROGRAM = """
import os, signal, sys, time
assert "torch" in sys.modules and "trainbus" not in sys.modules
print(sys.argv[1:], os.getcwd(), sorted(os.environ))
print("said", file=sys.stderr)
if sys.argv[1] == "exit":
    sys.exit(3)
if sys.argv[1] == "raise":
    raise ValueError("no")
if sys.argv[1] == "kill":
    sys.stdout.flush()
    os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[1] == "hang":
    time.sleep(600)
"""


def run(folder: Path, how: str, timeout: float = 60.0) -> subprocess.CompletedProcess[str]:
    script = folder / "program.py"
    script.write_text(PROGRAM)
    env = {"PATH": os.environ["PATH"], "OF_TEST": "1"}
    return preloaded.run(str(script), [how], env=env, cwd=folder, timeout=timeout)


@pytest.mark.parametrize(
    ("how", "code", "error"),
    [("return", 0, ""), ("exit", 3, ""), ("raise", 1, "ValueError: no\n"), ("kill", -9, "")],
)
@pytest.mark.needs("torch")
def test_a_forked_program_ends_as_a_started_one(
    how: str, code: int, error: str, tmp_path: Path
) -> None:
    """Exit code, signal, output, arguments, folder and environment are its own."""
    done = run(tmp_path, how)
    expected = f"{[how]} {tmp_path} {['OF_TEST', 'PATH']}\n"
    assert (code, expected) == (done.returncode, done.stdout)
    assert done.stderr.startswith("said\n")
    assert done.stderr.endswith(error)
    assert bool(error) == (done.stderr != "said\n")


@pytest.mark.needs("torch")
def test_a_program_that_hangs_is_no_killed_one(tmp_path: Path) -> None:
    """What is still running after the timeout raises, and the next program runs."""
    with pytest.raises(subprocess.TimeoutExpired):
        run(tmp_path, "hang", timeout=1.0)
    assert 0 == run(tmp_path, "return").returncode
