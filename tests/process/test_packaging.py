"""What is built, installed and imported is what the repository holds, under one name everywhere."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from shutil import copytree, ignore_patterns

import pytest
from packaging.requirements import Requirement

import trainbus

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # comes with pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
INSTALLED_AS = {"trainbus": "trainbus", "adapters": "trainbus.adapters", "sinks": "trainbus.sinks"}
BUILT_IN = [
    (folder, path.stem)
    for folder in ("adapters", "sinks")
    for path in sorted((ROOT / folder).iterdir())
    if path.suffix == ".py" or (path / "__init__.py").is_file()
    if not path.stem.startswith("_")
]
TESTED_IN = {"adapters": "frameworks", "sinks": "trackers"}


@dataclass(frozen=True)
class Built:
    """What `python -m build` made."""

    sdist: Path
    wheel: Path

    @property
    def sdist_names(self) -> set[str]:
        """The sdist's files, without the folder that holds them all."""
        with tarfile.open(self.sdist) as archive:
            return {name.partition("/")[2] for name in archive.getnames()}

    @property
    def wheel_names(self) -> set[str]:
        """The wheel's files."""
        with zipfile.ZipFile(self.wheel) as archive:
            return set(archive.namelist())


def run(folder: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command that has to succeed, in a folder without the repository in reach."""
    # What `make` hands to its children would make a `make` in here say more.
    dropped = ("PYTHONPATH", "MAKEFLAGS", "MAKELEVEL", "MFLAGS")
    kept = {key: value for key, value in os.environ.items() if key not in dropped}
    done = subprocess.run(
        command,
        cwd=folder,
        env=kept | environment,
        capture_output=True,
        encoding="utf-8",
        timeout=300,
        check=False,
    )
    assert 0 == done.returncode, done.stdout[-2000:] + done.stderr[-4000:]
    return done


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The sdist of a copy of the repository, and the wheel that is made from the sdist."""
    folder = tmp_path_factory.mktemp("build")
    # A copy: a build leaves its own folders behind, and reads what an earlier one left.
    leavings = ("build", "dist", "*.egg-info", "__pycache__", "runs", "trainbus-runs")
    copytree(ROOT, folder / "source", ignore=ignore_patterns(".*", *leavings))
    # With a setuptools at hand nothing has to be downloaded.
    isolation = ["--no-isolation"] if setuptools_major() >= 77 else []
    run(folder, sys.executable, "-m", "build", *isolation, "--outdir", "dist", "source")
    (sdist,), (wheel,) = (list((folder / "dist").glob(p)) for p in ("*.tar.gz", "*.whl"))
    return Built(sdist, wheel)


def setuptools_major() -> int:
    """Return the major version of the setuptools that is installed, 0 if there is none."""
    try:
        return int(version("setuptools").partition(".")[0])
    except PackageNotFoundError:
        return 0


@pytest.fixture(scope="module")
def installed(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the wheel is installed in."""
    folder = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    run(folder, *pip, "--target", str(folder / "site"), str(built.wheel))
    return folder / "site"


def test_every_package_is_listed() -> None:
    """A folder with an `__init__.py` that nobody lists would be missing from the wheel."""
    found = [
        ".".join([INSTALLED_AS[top], *path.parent.relative_to(ROOT / top).parts])
        for top in INSTALLED_AS
        for path in (ROOT / top).rglob("__init__.py")
    ]
    assert sorted(found) == sorted(PROJECT["tool"]["setuptools"]["packages"])


def test_the_wheel_holds_every_module(built: Built) -> None:
    """Each source file, and the marker of typed packages, is there under its installed name."""
    expected = {
        "/".join([*INSTALLED_AS[top].split("."), *path.relative_to(ROOT / top).parts])
        for top in INSTALLED_AS
        for path in (ROOT / top).rglob("*")
        if path.suffix in (".py", ".js", ".css") or path.name == "py.typed"
    }
    assert {"trainbus/bus.py", "trainbus/sinks/jsonl.py", "trainbus/py.typed"} <= expected
    for folder, name in BUILT_IN:
        module = f"trainbus/{folder}/{name}"
        assert {f"{module}.py", f"{module}/__init__.py"} & expected
    assert expected == {name for name in built.wheel_names if ".dist-info/" not in name}


def test_the_wheel_has_one_top_level_package(built: Built) -> None:
    """`adapters` and `sinks`, which other projects are called too, are not among them."""
    tops = {name.partition("/")[0] for name in built.wheel_names}
    assert {"trainbus", f"trainbus-{trainbus.__version__}.dist-info"} == tops


def test_the_wheel_registers_the_entry_points(built: Built) -> None:
    """Sinks, adapters and the command are those of `pyproject.toml`."""
    with zipfile.ZipFile(built.wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith("/entry_points.txt"))
        text = archive.read(name).decode()
    groups = PROJECT["project"]["entry-points"] | {"console_scripts": PROJECT["project"]["scripts"]}
    expected = {(group, *item) for group, items in groups.items() for item in items.items()}
    found = set()
    for line in filter(None, text.splitlines()):
        if line.startswith("["):
            group = line.strip("[]")
        else:
            found.add((group, *line.split(" = ")))
    assert expected == found


def test_the_sdist_holds_what_the_tests_need(built: Built) -> None:
    """Every test, example and configuration file is there, to test a package before it ships."""
    expected = {
        path.relative_to(ROOT).as_posix()
        for folder, pattern in (("tests", "*.py"), ("examples", "*.py"), ("config", "*.yaml"))
        for path in (ROOT / folder).rglob(pattern)
    }
    assert {"tests/conftest.py", "examples/plain_loop.py", "config/wandb.yaml"} <= expected
    assert set() == (expected | {"README.md", "Makefile", "constraints.txt"}) - built.sdist_names


def test_plugins_are_imported_by_their_installed_names(installed: Path) -> None:
    """From the wheel, `trainbus.sinks` is a package, and the folders' own names are none."""
    code = """
import importlib, trainbus, trainbus.sinks.jsonl
print(trainbus.__file__, trainbus.sinks.jsonl.__file__, sep="\\n")
for name in ("adapters", "sinks"):
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        print(error.name)
"""
    done = run(installed.parent, sys.executable, "-c", code, PYTHONPATH=str(installed))
    files = ["trainbus/__init__.py", "trainbus/sinks/jsonl.py"]
    assert [*(str(installed / name) for name in files), "adapters", "sinks"] == (
        done.stdout.splitlines()
    )


def test_the_wheel_delivers_from_another_process(installed: Path) -> None:
    """The process that feeds the sinks runs what is installed, in a folder without a repository."""
    code = """
import trainbus, trainbus.config
bus = trainbus.config.loads("sinks: {a: {type: jsonl, path: out.jsonl, isolation: process}}")
with bus.run() as run:
    run.log({"loss": 1.0})
(report,) = bus.receipts[0].sinks
print(trainbus.__file__, report.taken, report.pending)
"""
    done = run(installed.parent, sys.executable, "-c", code, PYTHONPATH=str(installed))
    assert f"{installed / 'trainbus/__init__.py'} 3 0\n" == done.stdout
    assert 3 == len((installed.parent / "out.jsonl").read_text().splitlines())


@pytest.mark.needs("accelerate", "ignite", "keras", "lightgbm", "lightning", "sklearn", "skorch")
@pytest.mark.needs("stable_baselines3", "transformers", "ultralytics", "xgboost", "clearml")
@pytest.mark.needs("comet_ml", "dvclive", "plotly", "mlflow", "apprise", "prometheus_client")
@pytest.mark.needs("swanlab", "tensorboard", "trackio")
def test_the_installed_command_lists_the_built_ins(installed: Path) -> None:
    """`trainbus plugins` of the wheel loads all of them."""
    command = str(installed / "bin" / "trainbus")
    done = run(installed.parent, sys.executable, command, "plugins", PYTHONPATH=str(installed))
    rows = [[cell.strip() for cell in line.split("│")] for line in done.stdout.splitlines()]
    loaded = {(row[1], row[2]) for row in rows if len(row) > 5 and "yes" == row[5]}
    assert {(folder.removesuffix("s"), name) for folder, name in BUILT_IN} <= loaded


@pytest.mark.parametrize("folder", ["adapters", "sinks"])
def test_every_entry_point_is_a_module_of_its_name(folder: str) -> None:
    """A built-in's name is that of its module, a file or a package."""
    points = dict(PROJECT["project"]["entry-points"][f"trainbus.{folder}"])
    points.pop("pytorch_lightning", None)  # the package has been called by two names
    names = sorted(name for place, name in BUILT_IN if place == folder)
    assert names == sorted(points)
    assert [f"trainbus.{folder}.{name}" for name in names] == [
        points[name].partition(":")[0] for name in names
    ]


@pytest.mark.parametrize(("folder", "name"), BUILT_IN)
def test_every_built_in_has_an_extra_of_its_name(folder: str, name: str) -> None:
    """`pip install "trainbus[name]"` works for each, also where nothing has to be installed."""
    assert name in PROJECT["project"]["optional-dependencies"]


@pytest.mark.parametrize(("folder", "name"), BUILT_IN)
def test_every_built_in_has_a_test_file_of_its_name(folder: str, name: str) -> None:
    """The tests mirror the tree."""
    assert (ROOT / "tests" / TESTED_IN[folder] / name / f"test_{name}.py").is_file()


def test_importing_loads_little(tmp_path: Path) -> None:
    """`import trainbus` loads fewer modules than numpy does, and no tracker or framework."""
    code = """
import sys, numpy
before = set(sys.modules)
import trainbus
print(len(before), *(set(sys.modules) - before))
"""
    of_numpy, *loaded = run(tmp_path, sys.executable, "-c", code).stdout.split()
    packages = {name.partition(".")[0] for name in loaded} - sys.stdlib_module_names
    small = {"blinker", "msgspec", "numpy", "trainbus", "typing_extensions"}
    assert set() == {name for name in packages if not name.startswith("__")} - small
    assert len(loaded) < int(of_numpy)


def test_make_test_checks_everything() -> None:
    """`make test` runs the linter, the type checker and the tests."""
    planned = run(ROOT, "make", "--dry-run", "test", "WORKERS=5").stdout
    last = [line.split("/bin/")[-1] for line in planned.splitlines()][-4:]
    assert [
        "ruff check .",
        "ruff format --check .",
        "mypy trainbus adapters sinks tests examples benchmarks",
        "python -m pytest -n 5",
    ] == last


DEMO = {
    *("torch", "torchvision", "ultralytics", "ultralytics-thop", "ultralytics-platform"),
    *("opencv-python-headless", "matplotlib", "pillow", "polars", "psutil", "requests"),
    *("nvidia-ml-py", ".[wandb]"),
}
"""All that the demo asks pip for."""


def test_make_demo_installs_what_it_needs() -> None:
    """No other framework or tracker, nothing by apt, and the OpenCV that needs no screen."""
    place = "DEMO_VENV=/nowhere/demo"
    planned = run(ROOT, "make", "--dry-run", "demo", place).stdout.splitlines()
    assert [] == [line for line in planned if "apt" in line.split() or "apt-get" in line]
    words = [w for line in planned if " install " in line for w in shlex.split(line)]
    options = {"-m", "pip", "install", "-q", "-c", "-e", "constraints.txt"}
    python = "/nowhere/demo/bin/python"
    asked = {w for w in words if not w.startswith("--")} - options - {python}
    assert DEMO == asked
    assert f"{python} tests/support/torchvision_cpu.py examples/ultralytics_wandb.py" == planned[-1]


@pytest.mark.needs("ultralytics")
def test_the_demo_has_all_that_ultralytics_requires() -> None:
    """What pip is not asked to find out is in the Makefile, but for the name of OpenCV's build."""
    needed = [Requirement(line) for line in requires("ultralytics") or []]
    names = {each.name for each in needed if each.marker is None or each.marker.evaluate()}
    by_trainbus = {"numpy", "pyyaml"}
    assert {"opencv-python"} == names - DEMO - by_trainbus


def test_ci_runs_make_test(tmp_path: Path) -> None:
    """`.ci/run` can be executed from anywhere, and calls `make test` in the repository."""
    make = tmp_path / "make"
    make.write_text('#!/bin/sh\necho "$PWD: make $*"\n')
    make.chmod(0o755)
    path = os.pathsep.join([str(tmp_path), os.environ["PATH"]])
    assert f"{ROOT}: make test\n" == run(tmp_path, str(ROOT / ".ci" / "run"), PATH=path).stdout


def test_the_version_is_one() -> None:
    """The package, its metadata and the newest entry of the changelog agree."""
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    newest = re.search(r"^## \[?(\d[\w.]*)\]? - \d{4}-\d{2}-\d{2}$", changelog, re.MULTILINE)
    assert newest is not None
    assert PROJECT["project"]["version"] == trainbus.__version__ == newest[1]
