"""Who may import whom, what an import costs, and what is public."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

import trainbus

ROOT = Path(__file__).parents[2]

# A module imports only from the lines above its own.
LAYERS = [
    ["events", "errors"],
    ["interfaces", "secretnames", "paths", "filestates", "auto"],
    ["secrettexts"],
    ["redact", "resolving"],
    ["normalize", "transforms", "registry", "checks", "runfolder"],
    ["receipt", "blobs", "identity", "lanes", "exits", "wrapping", "drawing"],
    ["splitting"],
    ["lines", "route", "cursor", "hooking", "storing"],
    ["journal", "recordfile"],
    ["files", "reading", "endings"],
    ["ranks"],
    ["delivery", "protocol"],
    ["workerlog"],
    ["sidecar"],
    ["workers"],
    ["sidecarmain", "emitter"],
    ["run"],
    ["bus"],
    ["schema"],
    ["yamlfile"],
    ["config"],
    ["compare", "doctor", "replay", "show"],
    ["cli"],
    ["__main__"],
]
CORE = [name for layer in LAYERS for name in layer]
PLUGINS = sorted(path for folder in ("adapters", "sinks") for path in (ROOT / folder).glob("*.py"))
# Heavy or optional: nobody pays for them before they are used.
HEAVY = ("pandas", "pytest", "rich", "torch", "typer", "ultralytics", "wandb", "yaml")
SHARED = {"numpy", "msgspec", "PIL"}  # trackers take pictures as objects of PIL
TOOLS = ("hooking", "storing", "drawing")


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
    """Return the module of ours that is imported, such as `events` or `sinks.wandb`."""
    first, *rest = imported.target.split(".")
    if first != "trainbus":
        return None
    if rest and rest[0] in ("adapters", "sinks", "testing"):
        return ".".join(rest[:2])
    return rest[0] if rest and rest[0] in CORE else "__init__"


def third_party(path: Path) -> set[str]:
    names = {imported.target.partition(".")[0] for imported in imports_of(path)}
    return names - set(sys.stdlib_module_names) - {"trainbus"}


def core(name: str) -> Path:
    return ROOT / "trainbus" / f"{name}.py"


def test_every_module_of_the_core_has_a_layer() -> None:
    """A new file of the core has to say, above, what it may import."""
    found = {path.stem for path in (ROOT / "trainbus").glob("*.py")}
    assert {*CORE, "__init__"} == found


@pytest.mark.parametrize("name", CORE)
def test_the_core_imports_downwards(name: str) -> None:
    """A module of the core imports only what is below it, except for type hints."""
    layer = next(index for index, names in enumerate(LAYERS) if name in names)
    below = {module for names in LAYERS[:layer] for module in names}
    allowed = below | ({"__init__"} if name in ("cli", "__main__") else set())
    found = {ours(imported) for imported in imports_of(core(name)) if not imported.for_types}
    assert set() == found - allowed - {None}


@pytest.mark.parametrize(
    ("library", "modules"),
    [
        ("blinker", {"bus"}),
        ("yaml", {"yamlfile"}),
        ("typer", {"cli"}),
        ("wandb", set()),
        ("ultralytics", set()),
        ("pytest", set()),
    ],
)
def test_a_library_has_one_place(library: str, modules: set[str]) -> None:
    """What the core needs of others is imported in one module, trackers and frameworks in none."""
    assert modules == {name for name in [*CORE, "__init__"] if library in third_party(core(name))}


def test_only_the_configuration_reads_the_environment() -> None:
    """Elsewhere in the core a variable would change what a file says."""
    readers = {
        name
        for name in [*CORE, "__init__"]
        for node in ast.walk(ast.parse(core(name).read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "environb", "getenv")
    }
    # The sidecar hands its own on; a launcher says in it which processes belong together.
    assert {"auto", "config", "hooking", "ranks", "sidecar"} == readers


def test_only_the_sidecar_starts_a_process() -> None:
    """A fork of a training holds its locks and its GPU; what runs beside it is started afresh."""
    starters, forks = set(), set()
    for name in [*CORE, "__init__"]:
        if any(imported.target.startswith("subprocess") for imported in imports_of(core(name))):
            starters.add(name)
        tree = ast.parse(core(name).read_text(encoding="utf-8"))
        used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        if used & {"fork", "forkpty", "posix_spawn", "system", "popen", "Process", "Pool"}:
            forks.add(name)
    assert ({"sidecar"}, set()) == (starters, forks)


def test_the_training_never_imports_what_the_sidecar_runs() -> None:
    """It sets signals and streams of a process that is its own."""
    found = {
        name
        for name in [*CORE, "__init__"]
        for imported in imports_of(core(name))
        if ours(imported) == "sidecarmain"
    }
    assert set() == found


@pytest.mark.parametrize("path", PLUGINS, ids=lambda path: path.stem)
def test_a_plugin_imports_the_contract_only(path: Path) -> None:
    """Plugins know the contract, the tools for plugins, and files that bear their own name."""
    own = f"{path.parent.name}._{path.stem.lstrip('_').partition('_')[0]}"
    for imported in imports_of(path):
        module = ours(imported)
        assert (
            module in (None, "events", "interfaces", "errors", *TOOLS)
            or f"{module}_".startswith(f"{own}_")
            or (imported.target.startswith(f"trainbus.{own}_"))
        ), imported.target


@pytest.mark.parametrize("path", PLUGINS, ids=lambda path: path.stem)
def test_a_plugin_has_one_library(path: Path) -> None:
    """Besides numpy, msgspec and PIL, a plugin imports the one third-party package it is for."""
    libraries = third_party(path) - SHARED
    assert len(libraries) <= 1, libraries


LIGHT = [
    "trainbus",
    "trainbus.delivery.sidecar_main",
    *(f"trainbus.{p.parent.name}.{p.stem}" for p in PLUGINS if p.stem[0] != "_"),
]
EACH_ALONE = """
import importlib, os, sys
for name in sys.argv[1:]:
    pid = os.fork()
    if pid == 0:
        before = set(sys.modules)
        importlib.import_module(name)
        print(name, *sorted(set(sys.modules) - before), flush=True)
        os._exit(0)
    os.waitpid(pid, 0)
"""
"""Imports each module in a fork of a process that has imported nothing else."""


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """What the import of each module of `LIGHT` loads."""
    done = subprocess.run(
        [sys.executable, "-c", EACH_ALONE, *LIGHT],
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
        [sys.executable, "-c", code, str(ROOT / "tests" / "test_transforms.py")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    kind, *names = done.stdout.splitlines()[-1].split()
    assert "loaded" == kind
    assert "trainbus.bus" in names
    assert set() == {"PIL", "pandas", "shapes", "torch", "ultralytics", "wandb"} & set(names)


def test_nobody_imports_the_testing_package() -> None:
    """The suites are for plugin authors; the product works without pytest."""
    for path in [*map(core, CORE), core("__init__"), *PLUGINS]:
        for imported in imports_of(path):
            assert not (ours(imported) or "").startswith("testing"), path


def test_the_product_has_no_pickle() -> None:
    """Nothing that comes from a file or another process is unpickled."""
    for path in [*map(core, CORE), core("__init__"), *PLUGINS]:
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
Adapter AttachError Bus ConfigError Detach Emit Event FilePath JournalError JournalSpec
MissingPackageError NoAdapterError Options PluginError Receipt Record Route Run RunDefaults RunInfo
Sink SinkError SinkReport SubscribeError TrainbusError UnknownPluginError load
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
