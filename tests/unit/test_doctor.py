"""`trainbus doctor`: what is installed, what it was tested with, and what a release took away."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType

import pytest
from typer.testing import CliRunner

from trainbus import registry
from trainbus.cli import doctor
from trainbus.cli.app import app
from trainbus.cli.doctor import PackageReport, examine

PLUGIN = """
TESTED_VERSIONS = "1.0, 1.1"
REQUIRED_NAMES = ({needs})

def attach(target, emit):
    return lambda: None
"""


def installed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *, framework: str, needs: str, version: str
) -> PackageReport:
    """Return what is found of a framework whose one adapter needs what is given."""
    (folder / "tinyframe.py").write_text(framework)
    (folder / "tinyadapter.py").write_text(PLUGIN.format(needs=needs))
    about = folder / "tinyframe-1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: tinyframe\nVersion: {version}\n")
    (about / "RECORD").write_text("tinyframe.py,,\n")
    (about / "top_level.txt").write_text("tinyframe\n")
    monkeypatch.syspath_prepend(str(folder))
    for name in ("tinyframe", "tinyadapter"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    point = EntryPoint("tinyframe", "tinyadapter:attach", registry.ADAPTERS)
    monkeypatch.setattr(
        registry, "plugins", lambda group: {"tinyframe": point} if group == point.group else {}
    )
    (finding,) = examine()
    for name in ("tinyframe", "tinyadapter"):
        sys.modules.pop(name, None)
    return finding


SOUND = "class Trainer:\n    def fit(self): ...\n"


@pytest.mark.parametrize(
    ("framework", "version", "state"),
    [
        (SOUND, "1.1", "ok"),
        (SOUND, "2.0", "ok, but this version is untested"),
        ("class Trainer: ...\n", "2.0", "missing, so events are lost: "
         "tinyframe:Trainer.fit"),
        ("raise RuntimeError('no GPU')", "1.0", "can't be imported: RuntimeError: no GPU"),
        ("import nowhere_at_all", "1.0", "can't be imported: ModuleNotFoundError: No module named "
         "'nowhere_at_all'"),
    ],
    ids=["sound", "newer", "drifted", "broken", "incomplete"],
)  # fmt: skip
def test_a_framework_is_examined(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, framework: str, version: str, state: str
) -> None:
    """A hook that a release took away is named; a version that is only newer is said to be."""
    needs = "'tinyframe:Trainer.fit',"
    found = installed(tmp_path, monkeypatch, framework=framework, needs=needs, version=version)
    assert ("tinyframe", version, state) == (found.name, found.installed, found.state)


def test_a_module_that_is_gone_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that the framework has removed counts as a missing hook, not as an error."""
    needs = "'tinyframe.callbacks:Callback',"
    found = installed(tmp_path, monkeypatch, framework=SOUND, needs=needs, version="1.0")
    assert ["tinyframe.callbacks:Callback"] == found.missing


def test_what_is_not_installed_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """A framework that nobody installed is listed, with what the adapter was tested with."""
    home = ModuleType("home")
    home.TESTED_VERSIONS = "1.0"  # type: ignore[attr-defined]
    home.attach = lambda target, emit: None  # type: ignore[attr-defined]
    home.attach.__module__ = "home"
    monkeypatch.setitem(sys.modules, "home", home)
    point = EntryPoint("no_such_framework", "home:attach", registry.ADAPTERS)
    monkeypatch.setattr(
        registry, "plugins", lambda group: {point.name: point} if group == point.group else {}
    )
    (found,) = examine()
    assert ("no_such_framework", None, "1.0", "not installed") == (
        *(found.name, found.installed, found.tested),
        found.state,
    )


def test_what_installs_a_missing_package_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package of a sink that is not installed is listed with the extra that brings it."""
    html = registry.plugins(registry.SINKS)["html"]
    monkeypatch.setattr(
        registry, "plugins", lambda group: {"html": html} if group == html.group else {}
    )
    monkeypatch.setattr(doctor, "packages_distributions", lambda: {"plotly": ["no-such-plotly"]})
    (found,) = examine()
    said = "not installed; run `pip install 'trainbus[html]'`"
    assert ("plotly", None, said) == (found.name, found.installed, found.state)


def test_a_hook_that_is_gone_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody calls a hook of `trainbus run` before a training, which would then log nothing."""
    point = EntryPoint("frame", "trainbus.toolkit.adapters:no_such_hook", registry.HOOKS)
    monkeypatch.setattr(
        registry, "plugins", lambda group: {"frame": point} if group == point.group else {}
    )
    (found,) = examine()
    assert found.state.startswith(
        "can't be imported: hook trainbus.toolkit.adapters:no_such_hook: Attr"
    )


@pytest.mark.parametrize(("missing", "code"), [([], 0), (["frame:Trainer.fit"], 1)])
def test_the_command_says_what_is_found(
    monkeypatch: pytest.MonkeyPatch, missing: list[str], code: int
) -> None:
    """There is one row each; the exit code shows whether a hook is missing."""
    finding = PackageReport(name="frame", installed="2.0", tested="1.0, 2.0", missing=missing)
    monkeypatch.setattr(doctor, "examine", lambda: iter([finding]))
    done = CliRunner().invoke(app, ["doctor"])
    assert code == done.exit_code
    for text in ("frame", "2.0", "1.0, 2.0", *missing):
        assert text in done.output


HERE = """
from support import torchvision_cpu
torchvision_cpu.install()
from trainbus.cli.doctor import examine
for found in examine():
    print("found", found.name, found.state)
"""


@pytest.mark.needs("torch", "ultralytics", "keras", "lightning", "mlflow")
def test_what_every_plugin_relies_on_is_there(tmp_path: Path) -> None:
    """The frameworks and trackers that tests install are those the plugins were tested with."""
    done = subprocess.run(
        [sys.executable, "-c", HERE],
        env=os.environ | {"KERAS_BACKEND": "torch", "PYTHONPATH": str(Path(__file__).parents[1])},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    lines = [line.split(maxsplit=2) for line in done.stdout.splitlines()]
    states = {line[1]: line[2] for line in lines if line[:1] == ["found"]}
    assert {} == {package: state for package, state in states.items() if state != "ok"}
    assert {"keras", "lightning", "mlflow", "ultralytics", "wandb"} <= states.keys()
