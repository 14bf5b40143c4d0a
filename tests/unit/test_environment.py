"""What a training runs with is described, whatever the machine lacks."""

from __future__ import annotations

import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from trainbus.capture.environment import (
    SCHEDULERS,
    describe_environment,
    entry_script,
    installed_packages,
    scheduler,
    without_credentials,
)
from trainbus.events import EnvironmentDescribed, Gpu


def described(folder: Path, *argv: str, **environ: str) -> EnvironmentDescribed:
    """Return a description, for which no git is found."""
    return describe_environment(
        argv=argv, cwd=str(folder), environ={"PATH": str(folder), "USER": "me", **environ}
    )


def fake_nvml(**functions: Any) -> types.ModuleType:
    """Return a module like pynvml, in which all other functions fail."""
    library = types.ModuleType("pynvml")
    vars(library).update({"nvmlInit": lambda: None, "nvmlShutdown": lambda: None, **functions})
    return library


def test_the_process_and_the_machine_are_described(tmp_path: Path) -> None:
    """All that this machine knows of itself is there, and the rest is empty."""
    found = described(tmp_path, "python", "-u", "train.py", "--lr", "0.1")
    assert ["python", "-u", "train.py", "--lr", "0.1"] == found.command
    assert (str(tmp_path), str(tmp_path / "train.py")) == (found.cwd, found.script)
    assert (sys.executable, "me") == (found.executable, found.user)
    assert sys.version.split()[0] == found.python
    assert os.cpu_count() == found.cpus
    assert found.host
    assert found.os
    assert found.cpu
    assert 0 < (found.memory or 0)
    assert 0 < (found.cores or 0) <= (found.cpus or 0)
    assert (None, {}) == (found.git, found.scheduler)
    assert "msgspec" in found.packages


def test_secrets_in_arguments_are_replaced(tmp_path: Path) -> None:
    """Neither a secret argument nor one in the name of a job is recorded."""
    token = "hf_" + "a1B2" * 9
    arguments = ["python", "t.py", "--api-key", "hunter2x9", f"--hub={token}", "--lr", "1"]
    found = described(tmp_path, *arguments, SLURM_JOB_ID="1", SLURM_JOB_NAME=f"run {token}")
    assert [
        *("python", "t.py", "--api-key", "[redacted]", "--hub=[redacted]", "--lr", "1")
    ] == found.command
    assert {"SLURM_JOB_ID": "1", "SLURM_JOB_NAME": "run [redacted]"} == found.scheduler


def test_strings_that_are_no_utf8_are_replaced(tmp_path: Path) -> None:
    """A file name in another encoding, which Python decodes to surrogates, can be encoded."""
    found = described(tmp_path, "python", "\udcfc.py")
    assert ["python", "\ufffd.py"] == found.command
    assert str(tmp_path / "\ufffd.py") == found.script


@pytest.mark.parametrize(
    ("expected", "command"),
    [
        ("train.py", "python train.py --lr 1"),
        ("train.py", "/usr/bin/python3.11 -u -X dev -W ignore train.py -c x"),
        ("train.py", "C:\\Python\\python.exe train.py"),
        ("pkg.train", "python -m pkg.train --lr 1"),
        ("pkg.train", "python -mpkg.train"),
        (None, "python -c print(1) train.py"),
        (None, "python -"),
        (None, "python"),
        ("train.py", "train.py --lr 1"),
        ("/venv/bin/yolo", "/venv/bin/yolo detect train"),
        (None, "-c"),
        (None, ""),
    ],
)
def test_the_entry_script_is_found(expected: str | None, command: str) -> None:
    """The script or module is what Python runs, whatever options come before it."""
    assert expected == entry_script(command.split())


def test_the_packages_are_those_that_an_import_finds(tmp_path: Path) -> None:
    """Names are as published; the first of two versions counts, and a damaged one is left out."""
    for folder, name, text in [
        ("a", "two_words-2.0", "Metadata-Version: 2.1\nName: two.words\nVersion: 2.0\n\nName: x\n"),
        ("a", "damaged-1", "nothing"),
        ("b", "two_words-1.0", "Name: two-words\nVersion: 1.0\n"),
        ("b", "zed-3", "Name: Zed\nVersion: 3\n"),
    ]:
        place = tmp_path / folder / f"{name}.dist-info"
        place.mkdir(parents=True)
        (place / "METADATA").write_text(text, encoding="utf-8")
    found = installed_packages([str(tmp_path / "a"), str(tmp_path / "b")])
    assert {"two.words": "2.0", "Zed": "3"} == found
    assert ["two.words", "Zed"] == list(found)


def test_only_the_variables_of_schedulers_are_recorded() -> None:
    """A scheduler's variables are recorded if it started the training, and no others."""
    torchrun = {"TORCHELASTIC_RUN_ID": "r", "TORCHELASTIC_RESTART_COUNT": "2", "RANK": "0"}
    assert torchrun == scheduler({**torchrun, "HOSTNAME": "h", "HF_TOKEN": "t", "HOME": "/"})
    assert {} == scheduler({"HOSTNAME": "h", "RANK": "0", "SLURM_ARRAY_TASK_ID": "1"})
    assert {"RAY_JOB_ID": "01"} == scheduler({"RAY_JOB_ID": "01", "RAY_ADDRESS": "ray://me:pw@h"})
    pod = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "HOSTNAME": "pod-0", "JOB_COMPLETION_INDEX": "0"}
    assert pod == scheduler(pod)


def test_no_variable_is_listed_twice() -> None:
    """Each variable belongs to one scheduler."""
    names = [name for row in SCHEDULERS.values() for name in row]
    assert sorted(set(names)) == sorted(names)


@pytest.mark.parametrize(
    ("expected", "url"),
    [
        ("https://host/a.git", "https://me:pw@host/a.git"),
        ("https://host/a.git", "https://ghp_abc@host/a.git"),
        ("https://host/a@b.git", "https://host/a@b.git"),
        ("ssh://git@host:22/a.git", "ssh://git:pw@host:22/a.git"),
        ("git@host:a/b.git", "git@host:a/b.git"),
        ("../other", "../other"),
    ],
)
def test_a_remote_has_no_credentials(expected: str, url: str) -> None:
    """Passwords and tokens in the URL of a remote are removed, and nothing else is."""
    assert expected == without_credentials(url)


def test_gpus_are_described(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each GPU has what NVML says about it; strings may be bytes, and a lost GPU is left out."""

    def handle(index: int) -> str:
        if index == 1:
            raise OSError("GPU is lost")
        return f"gpu{index}"

    library = fake_nvml(
        nvmlDeviceGetCount=lambda: 3,
        nvmlDeviceGetHandleByIndex=handle,
        nvmlDeviceGetName=lambda gpu: b"A100" if gpu == "gpu0" else "H100",
        nvmlDeviceGetMemoryInfo=lambda gpu: types.SimpleNamespace(total=2**36),
        nvmlSystemGetDriverVersion=lambda: "550.54",
        nvmlSystemGetCudaDriverVersion=lambda: 12040,
    )
    monkeypatch.setitem(sys.modules, "pynvml", library)
    found = described(tmp_path, "python")
    assert [Gpu(name="A100", memory=2**36), Gpu(name="H100", memory=2**36)] == found.gpus
    assert ("550.54", "12.4") == (found.gpu_driver, found.cuda)


@pytest.mark.parametrize("library", [None, fake_nvml(), types.ModuleType("pynvml")])
def test_no_gpu_is_no_error(
    library: types.ModuleType | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the package, without a GPU and without a driver, there are no GPUs."""
    monkeypatch.setitem(sys.modules, "pynvml", library)
    found = described(tmp_path, "python")
    assert ([], None, None) == (found.gpus, found.gpu_driver, found.cuda)


def test_a_folder_that_is_gone_is_no_error(tmp_path: Path) -> None:
    """The working directory may have been deleted."""
    gone = tmp_path / "gone"
    found = describe_environment(argv=["python", "t.py"], cwd=str(gone), environ=dict(os.environ))
    assert (str(gone), None) == (found.cwd, found.git)
