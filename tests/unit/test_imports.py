"""Who may import whom, what an import costs, and what is public."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path
from types import ModuleType

import pytest

import trainbus

ROOT = Path(__file__).parents[2]

# What each package of the core, and each module beside the packages, may import of the core.
BASE = {"events", "errors", "interfaces", "normalize", "text", "distributed", "paths", "registry"}
REDACTION = BASE | {"redaction"}
JOURNAL = REDACTION | {"journal"}
DELIVERY = JOURNAL | {"capture", "delivery"}
RECORDING = DELIVERY | {"recording"}
BUS = RECORDING | {"run", "bus", "toolkit"}
CONFIG = BUS | {"config"}
LAYERS = {
    **dict.fromkeys(BASE, BASE),
    "redaction": REDACTION,
    "capture": JOURNAL | {"capture"},
    "journal": JOURNAL,
    "toolkit": BASE | {"journal", "toolkit"},
    "delivery": DELIVERY,
    "recording": RECORDING,
    **dict.fromkeys(("run", "bus"), BUS),
    "config": CONFIG,
    **dict.fromkeys(("cli", "startup", "__init__", "__main__"), CONFIG | {"cli", "__init__"}),
}
CORE = {
    ".".join(path.relative_to(ROOT / "trainbus").with_suffix("").parts): path
    for path in sorted((ROOT / "trainbus").rglob("*.py"))
    if path.parent.name != "testing"
}
"""Name of a module, such as `journal.reader` → its file."""
PLUGINS = [
    path for folder in ("adapters", "sinks") for path in sorted((ROOT / folder).rglob("*.py"))
]
# Heavy or optional: nobody pays for them before they are used.
HEAVY = ("pandas", "pytest", "rich", "torch", "typer", "ultralytics", "wandb", "yaml")
SHARED = {"numpy", "msgspec", "PIL"}  # trackers take pictures as objects of PIL
CONTRACT = {"events", "interfaces", "errors", "distributed", "toolkit"}


@dataclass(frozen=True)
class Import:
    """One imported name: its full path, and where the statement stands."""

    target: str
    at_top: bool
    for_types: bool


def package_of(path: Path) -> str:
    folder = path.parent.relative_to(ROOT)
    parts = folder.parts if folder.parts[0] == "trainbus" else ("trainbus", *folder.parts)
    return ".".join(parts)


def imports_of(path: Path) -> list[Import]:
    """Return the imports of a file, each name of a `from` on its own."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return list(walk(tree, package_of(path), at_top=True, for_types=False))


def walk(node: ast.AST, package: str, *, at_top: bool, for_types: bool) -> Iterator[Import]:
    match node:
        case ast.Import():
            for alias in node.names:
                yield Import(alias.name, at_top, for_types)
        case ast.ImportFrom():
            module = node.module or ""
            if node.level:
                base = package.split(".")[: len(package.split(".")) - node.level + 1]
                module = ".".join([*base, *([module] if module else [])])
            for alias in node.names:
                yield Import(f"{module}.{alias.name}", at_top, for_types)
        case ast.If(test=ast.Name(id="TYPE_CHECKING")):
            for statement in node.body:
                yield from walk(statement, package, at_top=at_top, for_types=True)
        case _:
            inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            for child in ast.iter_child_nodes(node):
                yield from walk(child, package, at_top=at_top and not inside, for_types=for_types)


def ours(imported: Import) -> str | None:
    """Return the package or module of the core that is imported, or `sinks.wandb` of a plugin."""
    first, *rest = imported.target.split(".")
    if first != "trainbus":
        return None
    if rest and rest[0] in ("adapters", "sinks"):
        return ".".join(rest[:2])
    return rest[0] if rest and rest[0] in {*LAYERS, "testing"} else "__init__"


def module_of(imported: Import) -> str | None:
    """Return the module of the core that is imported, such as `journal.reader`."""
    name = imported.target.removeprefix("trainbus.")
    for found in (f"{name}.__init__", name, name.rpartition(".")[0], "__init__"):
        if found in CORE:
            return found if imported.target.startswith("trainbus") else None
    package = f"{name.rpartition('.')[0]}.__init__"
    return package if package in CORE else None


def title(path: Path) -> str:
    """Return what the test of a plugin's file is called."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def plugin_of(path: Path) -> str:
    """Return the name of the plugin that a file is, or is a part of, such as `sinks.wandb`."""
    folder, name = path.relative_to(ROOT).with_suffix("").parts[:2]
    return f"{folder}.{name}"


def third_party(path: Path) -> set[str]:
    names = {imported.target.partition(".")[0] for imported in imports_of(path)}
    return names - set(sys.stdlib_module_names) - {"trainbus"}


def test_every_package_of_the_core_has_a_layer() -> None:
    """A new package or module of the core is listed above, with what it may import."""
    assert {name.partition(".")[0] for name in CORE} == LAYERS.keys()


@pytest.mark.parametrize("name", CORE)
def test_the_core_imports_downwards(name: str) -> None:
    """A module of the core imports only what its row allows, except for type hints."""
    allowed = LAYERS[name.partition(".")[0]]
    found = {ours(each) for each in imports_of(CORE[name]) if not each.for_types}
    assert set() == found - allowed - {None}


def test_no_imports_of_the_core_go_in_a_circle() -> None:
    """Two modules that import each other are one, or have a third in common."""
    above = {"__init__", "cli.__init__"}  # `trainbus` itself, which `load` imports all of
    graph = {
        name: {module_of(each) for each in imports_of(path) if not each.for_types} - {None, name}
        for name, path in CORE.items()
        if name not in above
    }
    order = list(TopologicalSorter(graph).static_order())
    assert order.index("events") < order.index("journal.writer") < order.index("bus")


@pytest.mark.parametrize(
    ("library", "modules"),
    [
        ("blinker", {"recording.subscribers"}),
        ("yaml", {"config.yaml_reader"}),
        ("typer", {"cli.app"}),
        ("wandb", set()),
        ("ultralytics", set()),
        ("pytest", set()),
    ],
)
def test_a_library_has_one_place(library: str, modules: set[str]) -> None:
    """What the core needs of others is imported in one module, trackers and frameworks in none."""
    assert modules == {name for name, path in CORE.items() if library in third_party(path)}


def test_only_the_configuration_reads_the_environment() -> None:
    """Elsewhere in the core a variable would change what a file says."""
    readers = {
        name
        for name, path in CORE.items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "environb", "getenv")
    }
    # A launcher says in it which processes belong together; the sidecar gets the training's.
    ranks, launchers = {"distributed", "recording.peers"}, {"cli.launch", "recording.launched"}
    own = {"config.__init__", "delivery.sidecar", "startup.sitecustomize", "capture.recorder"}
    assert own | ranks | launchers == readers


def test_only_the_sidecar_starts_a_process() -> None:
    """A fork of a training holds its locks and its GPU; what runs beside it is started afresh."""
    starters, forks = set(), set()
    for name, path in CORE.items():
        if any(imported.target.startswith("subprocess") for imported in imports_of(path)):
            starters.add(name)
        tree = ast.parse(path.read_text(encoding="utf-8"))
        used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        if used & {"fork", "forkpty", "posix_spawn", "system", "popen", "Process", "Pool"}:
            forks.add(name)
    # The sidecar asks git about the training's code.
    assert ({"delivery.sidecar", "capture.environment"}, set()) == (starters, forks)


def test_the_training_never_imports_what_the_sidecar_runs() -> None:
    """It sets signals and streams of a process that is its own."""
    found = {
        name
        for name, path in CORE.items()
        for imported in imports_of(path)
        if module_of(imported) == "delivery.sidecar_main"
    }
    assert set() == found


@pytest.mark.parametrize("path", PLUGINS, ids=title)
def test_a_plugin_imports_the_contract_only(path: Path) -> None:
    """Plugins know the contract, the tools for plugins, and the files of their own package."""
    found = {ours(imported) for imported in imports_of(path)}
    assert set() == found - CONTRACT - {None, plugin_of(path)}


@pytest.mark.parametrize("path", PLUGINS, ids=title)
def test_a_plugin_has_one_library(path: Path) -> None:
    """Besides numpy, msgspec and PIL, a plugin imports the one third-party package it is for."""
    libraries = third_party(path) - SHARED
    assert len(libraries) <= 1, libraries


LIGHT = [
    "trainbus",
    "trainbus.delivery.sidecar_main",
    *dict.fromkeys(f"trainbus.{plugin_of(path)}" for path in PLUGINS),
]
ALONE = """
before = set(sys.modules)
importlib.import_module(name)
print(name, *sorted(set(sys.modules) - before), flush=True)
"""
EACH_ALONE = """
import importlib, os, subprocess, sys
alone, *names = sys.argv[1:]
for name in names:
    if not hasattr(os, "fork"):
        code = f"import importlib, sys; name = {name!r}{alone}"
        subprocess.run([sys.executable, "-c", code], check=True)
    elif (pid := os.fork()) == 0:
        exec(alone)
        os._exit(0)
    else:
        os.waitpid(pid, 0)
"""
"""Imports each module in a process that has imported nothing else; a fork starts soonest."""


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """What the import of each module of `LIGHT` loads."""
    done = subprocess.run(
        [sys.executable, "-c", EACH_ALONE, ALONE, *LIGHT],
        cwd=tmp_path_factory.mktemp("imports"),
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    lines = [line.split() for line in done.stdout.splitlines()]
    return {name: set(found) for name, *found in lines}


@pytest.mark.parametrize("module", LIGHT)
def test_an_import_is_light(module: str, loaded: dict[str, set[str]]) -> None:
    """Importing trainbus or a plugin loads no tracker, no framework and nothing optional."""
    assert module in loaded[module]
    assert set() == set(HEAVY) & loaded[module]


def test_a_test_file_starts_light(tmp_path: Path) -> None:
    """What all tests share imports no tracker, no framework and no pictures."""
    code = """
import sys, pytest
pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", sys.argv[1]])
print("loaded", *sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(ROOT / "tests" / "unit" / "test_transforms.py")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    kind, *names = done.stdout.splitlines()[-1].split()
    assert "loaded" == kind
    assert "trainbus.bus" in names
    heavy = {"PIL", "matplotlib", "pandas", "shapes", "torch", "ultralytics", "wandb"}
    assert set() == heavy & set(names)


def test_nobody_imports_the_testing_package() -> None:
    """The suites are for plugin authors; the product works without pytest."""
    for path in [*CORE.values(), *PLUGINS]:
        for imported in imports_of(path):
            assert "testing" != ours(imported), path


def test_the_product_has_no_pickle() -> None:
    """Nothing that comes from a file or another process is unpickled."""
    for path in [*CORE.values(), *PLUGINS]:
        names = {imported.target.partition(".")[0] for imported in imports_of(path)}
        assert set() == names & {"pickle", "cloudpickle", "dill", "marshal", "shelve"}, path


def test_the_walk_sees_every_kind_of_import(tmp_path: Path) -> None:
    """The tests of this file would be worth nothing if the walk overlooked imports."""
    folder = ROOT / "sinks"
    source = (
        "import a.b\nfrom c import d\nfrom trainbus import bus\nfrom . import e\n"
        "from ._f import g\nfrom ..events import Event\n"
        "if TYPE_CHECKING:\n    import h\n"
        "class C:\n    def m(self):\n        import i\n"
        "try:\n    import j\nexcept ImportError:\n    pass\n"
    )
    package = package_of(folder / "x.py")
    found = list(walk(ast.parse(source), package, at_top=True, for_types=False))
    top = ["a.b", "c.d", "trainbus.bus", "trainbus.sinks.e", "trainbus.sinks._f.g"]
    assert [*top, "trainbus.events.Event", "h", "i", "j"] == [each.target for each in found]
    assert ["i"] == [each.target for each in found if not each.at_top]
    assert ["h"] == [each.target for each in found if each.for_types]
    assert ["bus", "sinks.e", "sinks._f", "events"] == [m for m in map(ours, found) if m]


PUBLIC = """
Adapter AttachError AttachedRun Bus ConfigError Detach Emit Event FilePath JournalError
JournalSpec LoopRun MissingPackageError NoAdapterError Options PluginError Receipt Record Run
RunDefaults RunInfo Sink SinkError SinkReport SinkSpec SubscribeError TrainbusError
UnknownPluginError current_run load
"""
PUBLIC_TESTING = """
AdapterConformance MemorySink SinkConformance Training check_grammar sample_records
"""


@pytest.mark.parametrize(
    ("name", "public"), [("trainbus", PUBLIC), ("trainbus.testing", PUBLIC_TESTING)]
)
def test_the_public_names_are_pinned(name: str, public: str) -> None:
    """What others build on is listed; a new name is a decision, a lost one breaks them."""
    module = importlib.import_module(name)
    assert sorted(public.split()) == sorted(module.__all__)
    shown = {
        key
        for key, value in vars(module).items()
        if not key.startswith("_") and not isinstance(value, ModuleType)
    }
    assert shown - {"annotations", "TYPE_CHECKING"} == set(module.__all__)


def test_the_version_is_the_packages() -> None:
    """`trainbus.__version__` is what pip shows."""
    assert importlib.metadata.version("trainbus") == trainbus.__version__


def test_every_module_says_what_it_is() -> None:
    """Each file of the product begins with a docstring."""
    files = [*(ROOT / "trainbus").rglob("*.py"), *PLUGINS]
    assert len(files) > 20
    for path in files:
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), path
