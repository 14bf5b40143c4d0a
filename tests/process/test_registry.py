"""Plugins are found by their names, and those of others like our own."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from importlib.metadata import EntryPoint, distribution
from pathlib import Path

import pytest

from trainbus import NoAdapterError, PluginError, Sink, UnknownPluginError, registry
from trainbus.registry import ADAPTERS, SINKS, adapter_for, plugins, sink_class

ROOT = Path(__file__).parents[2]


def register(monkeypatch: pytest.MonkeyPatch, group: str, **values: str) -> None:
    """Make these entry points the only ones of a group."""
    points = [EntryPoint(name, value, group) for name, value in values.items()]
    monkeypatch.setattr(registry, "entry_points", lambda group: points)


def test_a_name_finds_the_class() -> None:
    """The YAML `type` is the entry point's name."""
    found = sink_class("jsonl")
    assert issubclass(found, Sink)
    assert "trainbus.sinks.jsonl" == found.__module__


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("jsonll", "no sink is named 'jsonll', did you mean 'jsonl'?; installed: clearml, comet, "),
        ("WandB", "no sink is named 'WandB', did you mean 'wandb'?; installed: clearml, comet, "),
        ("zzz", "no sink is named 'zzz'; installed: clearml, comet, console, csv, "),
    ],
)
def test_an_unknown_name_gets_the_nearest(name: str, text: str) -> None:
    """The error says what was asked for, what is near, and what there is."""
    with pytest.raises(UnknownPluginError) as raised:
        sink_class(name)
    assert str(raised.value).startswith(text)


def test_no_plugins_at_all_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """With nothing installed the errors say so, too."""
    register(monkeypatch, SINKS)
    with pytest.raises(UnknownPluginError, match=r"installed: none \(`trainbus plugins`"):
        sink_class("jsonl")
    with pytest.raises(NoAdapterError, match="there are adapters for: nothing"):
        adapter_for(1)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("no_such_module:X", "can't be imported: ModuleNotFoundError: No module named"),
        ("json:NoSuchClass", "can't be imported: AttributeError"),
        ("json:loads", "expected a class derived from trainbus.Sink"),
        ("pathlib:Path", "expected a class derived from trainbus.Sink"),
    ],
)
def test_a_broken_sink_plugin_is_named(
    value: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an entry point promises and does not hold is said with the entry point's name."""
    register(monkeypatch, SINKS, broken=value)
    with pytest.raises(PluginError, match="'broken'") as raised:
        sink_class("broken")
    assert value in str(raised.value)
    assert text in str(raised.value)


class Builtin(list[int]):
    """A class of this file whose base comes from elsewhere."""


def test_an_adapter_is_found_by_the_framework_of_a_base_class(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Users derive from a framework's classes; the nearest base with an adapter decides."""
    register(monkeypatch, ADAPTERS, builtins="json:dumps")
    assert "dumps" == getattr(adapter_for(Builtin()), "__name__", None)


def test_a_broken_adapter_plugin_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapter that can't be imported or called is an error with its name."""
    register(monkeypatch, ADAPTERS, builtins="json:__doc__")
    with pytest.raises(PluginError, match=r"expected a function attach\(target, emit\)"):
        adapter_for(1)
    register(monkeypatch, ADAPTERS, builtins="no_such_module:attach")
    with pytest.raises(PluginError, match=r"'builtins'.*can't be imported"):
        adapter_for(1)


def test_an_object_without_an_adapter_is_named() -> None:
    """The error names the class, the adapters there are, and the way without one."""
    with pytest.raises(NoAdapterError) as raised:
        adapter_for(Builtin())
    assert f"no adapter for {__name__}.Builtin" in str(raised.value)
    assert "ultralytics" in str(raised.value)
    assert "with bus.run(...)" in str(raised.value)


@pytest.mark.parametrize(("group", "folder"), [(SINKS, "sinks"), (ADAPTERS, "adapters")])
def test_a_built_in_plugin_has_one_name_everywhere(group: str, folder: str) -> None:
    """File or package, entry point and extra have the same name."""
    found = {
        name: point.value.partition(":")[0]
        for name, point in plugins(group).items()
        if point.value.startswith("trainbus.")
    }
    packages = {path.parent.name for path in (ROOT / folder).glob("*/__init__.py")}
    files = packages | {p.stem for p in (ROOT / folder).glob("*.py") if p.stem[0] != "_"}
    # The package has been called by two names.
    assert "trainbus.adapters.lightning" == found.pop("pytorch_lightning", "") or folder == "sinks"
    assert files == set(found)
    assert {name: f"trainbus.{folder}.{name}" for name in files} == found
    extras = distribution("trainbus").metadata.get_all("Provides-Extra") or []
    assert files <= {extra.replace("-", "_") for extra in extras}  # as packages are named


PYPROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "trainbus-toy"
version = "1.0"

[project.entry-points."trainbus.sinks"]
toylog = "toylog:ToySink"

[project.entry-points."trainbus.adapters"]
toyframe = "toyframe:attach"

[tool.setuptools]
py-modules = ["toylog", "toyframe"]
"""

TOYLOG = '''
"""A sink of somebody else's: a line for each metric."""
from pathlib import Path
from trainbus import Options, Sink
from trainbus.events import MetricsLogged

class ToyOptions(Options, frozen=True, kw_only=True):
    path: str = "toy.log"

class ToySink(Sink):
    Options = ToyOptions

    def open(self, run):
        self.path = Path(self.options.path)
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        self.known = {line.partition("\\t")[0] for line in lines}

    def write(self, records):
        with self.path.open("a") as file:
            for record in records:
                key = f"{record.run}:{record.source}:{record.attempt}:{record.seq}"
                if isinstance(record.event, MetricsLogged) and key not in self.known:
                    self.known.add(key)
                    file.write(f"{key}\\t{record.event.values}\\n")
'''

CHECKS = """
from toyframe import setup
from toylog import ToyOptions, ToySink
from trainbus.testing import AdapterConformance, SinkConformance

class TestToySink(SinkConformance):
    def make(self, folder):
        return ToySink(ToyOptions(path=str(folder / "toy.log")))

    def read(self, folder):
        path = folder / "toy.log"
        return path.read_text() if path.exists() else ""

class TestToyAdapter(AdapterConformance):
    def start(self, folder, epochs):
        return setup(folder, epochs)

    def trace(self, target):
        return list(target.callbacks)

    def handles(self, target):
        return target.callbacks
"""

USE = """
import sys
from toyframe import Trainer
from trainbus import Bus, registry
from pathlib import Path

sink = registry.sink_class("toylog")
trainer = Trainer(Path("run"), 3)
with Bus({"mine": sink(sink.Options(path="used.log"))}) as bus:
    bus.attach(trainer)
    trainer.fit()
print(Path("used.log").read_text())
"""


USE_IN_A_PROCESS = """
from pathlib import Path
from trainbus import config
with config.loads("sinks: {mine: {type: toylog, path: used.log, isolation: process}}") as bus:
    with bus.run() as run:
        for _ in run.epochs(3):
            run.log({"loss": 0.5})
print(Path("used.log").read_text())
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder that a package with a sink and an adapter was installed to by pip."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("target")
    (source / "pyproject.toml").write_text(PYPROJECT)
    (source / "toylog.py").write_text(TOYLOG)
    tiny = ROOT / "tests" / "support" / "tinytrainer.py"
    (source / "toyframe.py").write_text(tiny.read_text(encoding="utf-8"), encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    offline = ["--no-index", "--no-deps", "--no-build-isolation", "--target", str(target)]
    run([*pip, *offline, str(source)], source, {})
    return target


def run(command: list[str], folder: Path, env: dict[str, str]) -> str:
    """Return what a command prints.

    Raises:
        AssertionError: it failed; the text holds what it printed.
    """
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert 0 == done.returncode, done.stdout + done.stderr
    return done.stdout


def test_plugins_of_another_package_are_found(installed: Path, tmp_path: Path) -> None:
    """An installed package adds a sink and an adapter without any change to trainbus."""
    code = textwrap.dedent(USE)
    printed = run([sys.executable, "-c", code], tmp_path, {"PYTHONPATH": str(installed)})
    assert 3 == printed.count("train/loss")


@pytest.mark.parametrize("safe_path", ["", "1"], ids=["as usual", "safe path"])
def test_plugins_of_another_package_are_found_by_the_sidecar(
    safe_path: str, installed: Path, tmp_path: Path
) -> None:
    """What this process can import the one that delivers can, however Python makes its path."""
    env = {"PYTHONPATH": str(installed), "PYTHONSAFEPATH": safe_path}
    printed = run([sys.executable, "-c", USE_IN_A_PROCESS], tmp_path, env)
    assert 3 == printed.count("train/loss")


def test_plugins_of_another_package_pass_the_suites(installed: Path, tmp_path: Path) -> None:
    """A plugin author's test file is some twenty lines, and runs outside of trainbus's folder."""
    (tmp_path / "test_toy.py").write_text(CHECKS)
    pytest_ = [sys.executable, "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider"]
    printed = run([*pytest_, "test_toy.py"], tmp_path, {"PYTHONPATH": str(installed)})
    assert "passed" in printed
    assert "failed" not in printed


def test_a_failing_check_of_a_suite_says_why(installed: Path, tmp_path: Path) -> None:
    """The asserts of the shipped suites show what they compared, in another package's tests too."""
    broken = CHECKS.replace('return path.read_text() if path.exists() else ""', 'return "nothing"')
    (tmp_path / "test_toy.py").write_text(broken)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_toy.py"]
    done = subprocess.run(
        [*command, "-k", "accepts"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert 1 == done.returncode
    assert "assert 'nothing' != 'nothing'" in done.stdout
