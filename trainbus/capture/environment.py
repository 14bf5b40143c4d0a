"""Describes what a training runs with: its command, code, packages, machine and scheduler.

Another process can gather this for the training, so everything that belongs to the training is a
parameter. No framework is imported. A part that can't be determined is None or empty; nothing
raises, and no program is waited for longer than a few seconds.
"""

from __future__ import annotations

import importlib.metadata
import logging
import ntpath
import os
import platform
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import TypeVar

from trainbus import redaction
from trainbus.capture.nvml import Nvml
from trainbus.events import EnvironmentDescribed, GitState, Gpu

logger = logging.getLogger("trainbus")

T = TypeVar("T")

MAX_DIFF = 2**20
"""Maximum number of bytes of a diff."""

# What identifies a job and its restarts, and how it is spread over nodes. No secret is among them.
SCHEDULERS: dict[str, tuple[str, ...]] = {
    "SLURM": (
        "SLURM_JOB_ID",
        "SLURM_JOB_NAME",
        "SLURM_JOB_PARTITION",
        "SLURM_JOB_NODELIST",
        "SLURM_JOB_NUM_NODES",
        "SLURM_CLUSTER_NAME",
        "SLURM_ARRAY_JOB_ID",
        "SLURM_ARRAY_TASK_ID",
        "SLURM_ARRAY_TASK_COUNT",
        "SLURM_RESTART_COUNT",
        "SLURM_STEP_ID",
        "SLURM_NTASKS",
        "SLURM_PROCID",
        "SLURM_LOCALID",
        "SLURM_NODEID",
        "SLURMD_NODENAME",
    ),
    "torchrun": (
        "TORCHELASTIC_RUN_ID",
        "TORCHELASTIC_RESTART_COUNT",
        "TORCHELASTIC_MAX_RESTARTS",
        "WORLD_SIZE",
        "RANK",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "GROUP_RANK",
        "GROUP_WORLD_SIZE",
    ),
    "Kubernetes": ("KUBERNETES_SERVICE_HOST", "HOSTNAME", "JOB_COMPLETION_INDEX"),
    "Ray": ("RAY_JOB_ID",),
    "SkyPilot": (
        "SKYPILOT_TASK_ID",
        "SKYPILOT_NODE_RANK",
        "SKYPILOT_NUM_NODES",
        "SKYPILOT_NUM_GPUS_PER_NODE",
    ),
    "LSF": ("LSB_JOBID", "LSB_JOBNAME", "LSB_JOBINDEX"),
    "MPI": ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "PMI_SIZE", "PMI_RANK"),
}
"""Scheduler or launcher → its variables. Each is recorded if the first one of its row is set."""

GIT_TIMEOUT_S = 5.0
"""Seconds after which one call of git is given up."""

_MAX_OUTPUT = 64 * 1024
# A repository's own configuration could otherwise start programs, and color or rename the output.
_GIT = ("git", "--no-pager", "-c", "core.fsmonitor=false", "-c", "core.quotePath=true")
_DIFF = ("diff", "--no-ext-diff", "--no-textconv", "--no-color", "--src-prefix=a/")
_LOGIN = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*://)([^/@]*)@")
_TAKES_VALUE = ("-W", "-X", "--check-hash-based-pycs")
_NAME = re.compile(r"^Name:[ \t]*(.+?)\s*$", re.MULTILINE)
_VERSION = re.compile(r"^Version:[ \t]*(.+?)\s*$", re.MULTILINE)


def describe_environment(
    *,
    argv: Sequence[str],
    cwd: str,
    environ: Mapping[str, str],
    pid: int | None = None,
    executable: str = sys.executable,
    path: Sequence[str] | None = None,
) -> EnvironmentDescribed:
    """Return a description of a training, with secrets in it replaced.

    The Python version is that of the calling process, which must run with the same Python.

    Args:
        argv: `sys.orig_argv` of the training, or its `sys.argv`.
        cwd: its working directory.
        environ: its environment variables.
        pid: id of its process; None for the calling process.
        executable: its Python.
        path: its `sys.path`; None for that of the calling process.
    """
    nvml = Nvml()
    try:
        gpus = _safely(lambda: _gpus(nvml), list[Gpu]())
        driver, cuda = nvml.text("nvmlSystemGetDriverVersion"), _cuda(nvml)
    finally:
        nvml.close()
    script = _safely(lambda: entry_script(argv), None)
    return EnvironmentDescribed(
        command=_safely(lambda: redaction.params([_text(each) for each in argv]), []),
        cwd=_text(cwd),
        script=script and _text(os.path.join(cwd, script)),
        python=platform.python_version(),
        executable=_text(executable),
        packages=_safely(lambda: installed_packages(path), {}),
        os=_safely(platform.platform, None),
        host=_safely(socket.gethostname, None),
        user=_safely(lambda: _user(environ), None),
        cpu=_safely(lambda: _cpu(environ), None),
        cpus=os.cpu_count(),
        usable_cpus=_safely(lambda: len(os.sched_getaffinity(pid or 0)), None),
        cores=_safely(_cores, None),
        memory=_safely(_memory, None),
        gpus=gpus,
        gpu_driver=driver,
        cuda=cuda,
        git=_safely(lambda: git_state(cwd, environ), None),
        scheduler=_safely(lambda: redaction.params(scheduler(environ)), {}),
    )


def entry_script(argv: Sequence[str]) -> str | None:
    """Return the script or module that a command runs, None for `python -c` and a prompt."""
    if not argv:
        return None
    name = ntpath.basename(argv[0]).lower()  # splits at both kinds of slashes
    if not name.startswith(("python", "pypy")):
        return argv[0] if argv[0] not in ("", "-c", "-m", "-") else None
    words = iter(argv[1:])
    for word in words:
        if not word.startswith("-"):
            return word
        if word.startswith("-m"):
            return word[2:] or next(words, None)
        if word == "-" or word.startswith("-c"):
            return None
        if word in _TAKES_VALUE:
            next(words, None)
    return None


def installed_packages(path: Sequence[str] | None = None) -> dict[str, str]:
    """Return name → version of the installed distributions, sorted by name.

    If one is installed twice, the version that an import finds is listed.
    """
    found: dict[str, tuple[str, str]] = {}
    for distribution in importlib.metadata.distributions(
        path=list(sys.path if path is None else path)
    ):
        with suppress(Exception):  # a damaged one must not hide the others
            text = distribution.read_text("METADATA") or distribution.read_text("PKG-INFO") or ""
            # Parsing the whole file as an e-mail, as `metadata` does, takes five times as long.
            name, version = _NAME.search(text), _VERSION.search(text)
            if name is not None:
                key = re.sub(r"[-_.]+", "-", name[1]).lower()
                found.setdefault(key, (name[1], version[1] if version else ""))
    return {name: version for _, (name, version) in sorted(found.items())}


def scheduler(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of the schedulers and launchers that started the training."""
    return {
        name: _text(environ[name])
        for first, *rest in SCHEDULERS.values()
        if first in environ
        for name in (first, *rest)
        if environ.get(name)
    }


def git_state(cwd: str, environ: Mapping[str, str]) -> GitState | None:
    """Return the state of the repository that contains a folder.

    None without git, in no repository, or in one that git refuses to read because it belongs to
    another user. In a repository that is too large, `dirty` and the diff are missing.
    """
    git = _Git(cwd, environ)
    root = git.line("rev-parse", "--show-toplevel")
    if root is None:
        return None
    commit = git.line("rev-parse", "--verify", "--quiet", "HEAD")
    remote = git.line("config", "--get", "remote.origin.url")
    # Untracked files are not listed one by one: there can be millions.
    status = git.output("status", "--porcelain", "--untracked-files=normal", limit=1)
    diff = None
    if commit is not None and status:
        diff = git.output(*_DIFF, "--dst-prefix=b/", "HEAD", "--", limit=MAX_DIFF + 1)
    truncated = diff is not None and len(diff) > MAX_DIFF
    if diff is not None and truncated:
        diff = diff[: diff.rfind(b"\n", 0, MAX_DIFF) + 1]
    return GitState(
        commit=commit,
        branch=git.line("symbolic-ref", "--quiet", "--short", "HEAD"),
        remote=None if remote is None else without_credentials(remote),
        root=root,
        dirty=None if status is None else bool(status),
        diff=redaction.text((diff or b"").decode("utf-8", "replace")),
        diff_truncated=truncated,
    )


def without_credentials(url: str) -> str:
    """Return the URL of a remote without its password; over HTTP also without the user."""
    found = _LOGIN.match(url)
    if found is not None:
        scheme, login = found.groups()
        user = "" if scheme.lower().startswith("http") else login.partition(":")[0]
        url = f"{scheme}{user + '@' if user else ''}{url[found.end() :]}"
    return redaction.text(url)


class _Git:
    """Runs git in a folder, with limits for its time and its output."""

    def __init__(self, cwd: str, environ: Mapping[str, str]) -> None:
        self._cwd = cwd
        # It must neither lock the index against the user's own git, nor ask for a password.
        own = {"GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C"}
        self._environ = {**environ, **own}
        self._is_missing = False

    def line(self, *arguments: str) -> str | None:
        """Return the output in one line, None if it is empty or git fails."""
        output = self.output(*arguments)
        text = (output or b"").decode("utf-8", "replace").strip()
        return text or None

    def output(self, *arguments: str, limit: int = _MAX_OUTPUT) -> bytes | None:
        """Return at most `limit` bytes of the output, None if git fails or takes too long."""
        if self._is_missing:
            return None
        try:
            process = subprocess.Popen(
                [*_GIT, *arguments],
                cwd=self._cwd,
                env=self._environ,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        except (OSError, ValueError) as error:
            logger.debug("git can't be started: %s", error)
            self._is_missing = True
            return None
        is_late = threading.Event()

        def stop() -> None:
            is_late.set()
            _kill(process)

        timer = threading.Timer(GIT_TIMEOUT_S, stop)
        timer.daemon = True
        timer.start()
        try:
            assert process.stdout is not None
            output = process.stdout.read(limit)
            is_cut = len(output) == limit
            if is_cut:
                _kill(process)
            code = process.wait()
        finally:
            timer.cancel()
            _kill(process)
            process.stdout.close() if process.stdout else None
            process.wait()
        return output if is_cut or (code == 0 and not is_late.is_set()) else None


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill git and the filters that it started, which could keep its output open."""
    if process.returncode is not None:
        return
    with suppress(OSError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()


def _safely(call: Callable[[], T], default: T) -> T:
    try:
        return call()
    except Exception:
        logger.debug("a part of the environment can't be determined", exc_info=True)
        return default


def _text(value: str) -> str:
    """Return a string that can be encoded: file names need not be UTF-8."""
    return value.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _user(environ: Mapping[str, str]) -> str | None:
    for name in ("LOGNAME", "USER", "USERNAME"):
        if environ.get(name):
            return _text(environ[name])
    import pwd

    return pwd.getpwuid(os.getuid()).pw_name


def _cpu(environ: Mapping[str, str]) -> str | None:
    if sys.platform.startswith("linux"):
        found = re.search(r"^model name\s*:\s*(.+)$", _cpuinfo(), re.MULTILINE)
        return found[1].strip() if found else platform.machine() or None
    if sys.platform == "darwin":
        call = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(call, capture_output=True, text=True, timeout=5).stdout.strip()
    return environ.get("PROCESSOR_IDENTIFIER") or platform.machine() or None


def _cpuinfo() -> str:
    with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        return file.read()


def _cores() -> int | None:
    """Return the number of physical cores, as Linux lists them or psutil counts them."""
    if sys.platform.startswith("linux"):
        found = re.findall(r"^(physical id|core id)\s*:\s*(\d+)", _cpuinfo(), re.MULTILINE)
        socket_id, cores = "0", set()
        for name, number in found:
            if name == "physical id":
                socket_id = number
            else:
                cores.add((socket_id, number))
        return len(cores) or None
    import psutil

    return psutil.cpu_count(logical=False)


def _memory() -> int:
    if hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    import psutil

    return int(psutil.virtual_memory().total)


def _gpus(nvml: Nvml) -> list[Gpu]:
    found = []
    for handle in nvml.handles:
        memory = nvml.read("nvmlDeviceGetMemoryInfo", handle)
        found.append(
            Gpu(
                name=nvml.text("nvmlDeviceGetName", handle) or "GPU",
                memory=None if memory is None else int(memory.total),
                uuid=nvml.text("nvmlDeviceGetUUID", handle),
            )
        )
    return found


def _cuda(nvml: Nvml) -> str | None:
    """Return the CUDA version that the driver supports, such as `12.4`."""
    number = nvml.read("nvmlSystemGetCudaDriverVersion")
    return None if number is None else f"{number // 1000}.{number % 1000 // 10}"
