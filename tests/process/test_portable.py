"""Nothing that a training needs is there on POSIX systems alone; locks have a form for Windows."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

from trainbus import registry
from trainbus.events import decode
from trainbus.journal.directory import RunFolder
from trainbus.journal.verify import verify
from trainbus.testing import check_grammar

ROOT = Path(__file__).parents[2]

# What Windows lacks is hidden once the standard library and numpy, which know of it, are there.
HIDE = """
import asyncio, ctypes, importlib, logging, multiprocessing, os, random, select, shutil, signal
import socket, subprocess, sys, tempfile, threading, urllib.request, uuid
import blinker, msgspec, numpy, wrapt, yaml

MODULES = ("fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty")
NAMES = '''
    WNOHANG chown chroot fchdir fchmod fchown fdatasync fork forkpty fpathconf fstatvfs getegid
    geteuid getgid getgroups getpgid getpgrp getpriority getresuid getsid getuid initgroups killpg
    lchown lockf major memfd_create minor mkfifo mknod nice pathconf pipe2 posix_fadvise
    posix_fallocate posix_spawn posix_spawnp pread preadv pwrite pwritev readv register_at_fork
    sched_getaffinity sched_yield sendfile set_blocking setegid seteuid setgid setpgid setsid setuid
    splice statvfs sync sysconf uname wait wait3 wait4 waitid writev
    O_ASYNC O_CLOEXEC O_DIRECT O_DIRECTORY O_DSYNC O_NOATIME O_NOCTTY O_NOFOLLOW O_NONBLOCK
    O_PATH O_SYNC
'''
SIGNALS = '''
    SIGALRM SIGBUS SIGCHLD SIGCONT SIGHUP SIGIO SIGKILL SIGPIPE SIGPROF SIGQUIT SIGSTOP SIGTSTP
    SIGTTIN SIGTTOU SIGURG SIGUSR1 SIGUSR2 SIGWINCH alarm getitimer pause pthread_kill
    pthread_sigmask setitimer siginterrupt sigpending sigwait sigwaitinfo sigtimedwait
'''
for name in MODULES:
    sys.modules[name] = None
for module, names in ((os, NAMES), (signal, SIGNALS)):
    for name in names.split():
        if hasattr(module, name):
            delattr(module, name)

def missing(*args, **options):
    raise OSError("not on this system")

select.select = missing
subprocess.Popen.__init__ = missing

os.O_BINARY = 1 << 28  # Linux ignores it; without it Windows writes \\r\\n for \\n
open_file = os.open

def open_binary(path, flags, *args, **options):
    caller = sys._getframe(1).f_globals["__name__"]
    assert flags & os.O_BINARY or not caller.startswith("trainbus"), (path, caller)
    return open_file(path, flags, *args, **options)

os.open = open_binary
"""

CONFIG = """
sinks:
  lines: {type: jsonl, path: "{run}.jsonl"}
  again: {type: jsonl, path: "again-{run}.jsonl"}
"""
LOOP = """
import json, trainbus

trainbus.load("trainbus.yaml").close()
with trainbus.load("trainbus.yaml") as bus:
    for number in range(2):
        with bus.run(name="portable", params={"lr": 0.1}) as run:
            for epoch in run.epochs(3):
                run.log({"loss": 1.0 / (epoch + 1)})
            run.image("picture", numpy.zeros((8, 8, 3), numpy.uint8))
            run.table("table", ["a"], [[1]])
            run.text("words", "x" * 100_000)
            with open("model.pt", "wb") as file:
                file.write(b"weights" * 100)
            run.checkpoint("model.pt", kind="last")
for receipt in bus.receipts:
    for report in receipt.sinks:
        found = [report.taken, report.pending, report.dead, report.error]
        print(json.dumps([receipt.run, receipt.status, receipt.emitted, *found]))
"""


def python(folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process that has nothing of what is hidden."""
    (folder / "trainbus.yaml").write_text(CONFIG)
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", HIDE + code],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )


def test_a_plain_loop_is_whole_without_posix(tmp_path: Path) -> None:
    """Two runs reach two sinks, in threads, which is said once; the journals are sound."""
    done = python(tmp_path, LOOP)
    assert 0 == done.returncode, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert 4 == len(rows)
    for run, status, emitted, *report in rows:
        assert ("finished", [emitted, 0, 0, None]) == (status, report)
        for name in (f"{run}.jsonl", f"again-{run}.jsonl"):
            records = [decode(line) for line in (tmp_path / name).read_bytes().splitlines()]
            assert [] == check_grammar(records)
            assert emitted == len(records)
        reports = verify(RunFolder(tmp_path / "trainbus-runs" / run))
        assert [("finished", True)] == [(each.state, each.is_sound) for each in reports]
    assert 1 == done.stderr.count("delivery processes need a POSIX system"), done.stderr


def test_the_rest_of_a_run_is_replayed_without_posix(tmp_path: Path) -> None:
    """Commands work: a run is sent once more, to a sink that was added later."""
    replay = """
from trainbus.cli.app import main
(run,) = os.listdir("trainbus-runs")
sys.argv = ["trainbus", "replay", f"trainbus-runs/{run}", "-c", "trainbus.yaml"]
main()
"""
    first = """
import trainbus
with trainbus.Bus() as bus, bus.run(name="portable") as run:
    run.log({"loss": 1.0})
"""
    done = python(tmp_path, first)
    assert 0 == done.returncode, done.stderr
    done = python(tmp_path, replay)
    assert 0 == done.returncode, done.stdout + done.stderr
    assert [3, 3] == [len(path.read_bytes().splitlines()) for path in tmp_path.glob("*.jsonl")]


def test_every_module_can_be_imported_without_posix(tmp_path: Path) -> None:
    """The core and all plugins: trackers and frameworks are imported when they are used."""
    core = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in (ROOT / "trainbus").rglob("*.py")
        if not {"testing", "startup", "__main__.py"} & {*path.parts}
    ]
    groups = (registry.ADAPTERS, registry.SINKS)
    names = [*core, *(p.value.partition(":")[0] for g in groups for p in entry_points(group=g))]
    assert {"trainbus", "trainbus.delivery.sidecar_main", "trainbus.sinks.wandb"} <= {*names}
    code = f"import typer, rich.console\nfor name in {names}: importlib.import_module(name)"
    done = python(tmp_path, code)
    assert 0 == done.returncode, done.stderr


LOCKS = """
import errno, types

held = {}

def locking(fd, mode, count):
    at, file = os.lseek(fd, 0, os.SEEK_CUR), os.fstat(fd).st_ino
    assert (2, 1, True) == (mode, count, at > 10**9)  # a locked byte can't be read by others
    if "broken" in held:
        raise OSError(errno.EINVAL, "no locks here")
    if held.setdefault((file, at), fd) != fd:
        raise OSError(errno.EACCES, "locked")

sys.modules["msvcrt"] = types.SimpleNamespace(locking=locking, LK_NBLCK=2)
from trainbus.journal.locks import open_lock, try_lock
from pathlib import Path

first, second = open_lock(Path("locks/a")), open_lock(Path("locks/a"))
os.write(first, b"abc")
print(try_lock(first), try_lock(second), try_lock(open_lock(Path("locks/b"))))
os.write(first, b"def")
print(Path("locks/a").read_text())
held["broken"] = True
print(try_lock(second))
"""


def test_locks_have_a_form_for_windows(tmp_path: Path) -> None:
    """One byte far behind the end is locked, the position stays, and who has no locks goes on."""
    done = python(tmp_path, LOCKS)
    assert 0 == done.returncode, done.stderr
    assert ["True False True", "abcdef", "True"] == done.stdout.splitlines()
