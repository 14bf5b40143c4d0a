"""The blocks and commands of README and of the guides run as they are; no link is dead."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest

import shapes
import trainbus
from support import train, wandb_file
from trainbus import AttachedRun, Bus, Record, Run, config, registry
from trainbus.events import EpochEnded, MetricsLogged, RunEnded, RunStarted, decode
from trainbus.testing import AdapterConformance, Training, check_grammar

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # comes with pytest

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
CONFIGURATION = ROOT / "docs" / "configuration.md"
JOURNAL = ROOT / "docs" / "journal.md"
FAILURES = ROOT / "docs" / "failures.md"
FIRST_SINK = ROOT / "docs" / "your-first-sink.md"
FIRST_ADAPTER = ROOT / "docs" / "your-first-adapter.md"
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
SHIM = ROOT / "tests" / "support" / "torchvision_cpu.py"


class Block(NamedTuple):
    """A fenced block of a page."""

    page: Path
    section: str
    language: str
    line: int
    text: str


def read_blocks(page: Path) -> Iterator[Block]:
    """Yield the blocks of a page in order."""
    text, section = page.read_text(encoding="utf-8"), ""
    for found in re.finditer(
        r"^## ([^\n]+)$|^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL
    ):
        section = found[1] or section
        if found[3] is not None:
            line = text.count("\n", 0, found.start(3)) + 1
            yield Block(page, section, found[2], line, found[3])


PAGES = (README, CONFIGURATION, JOURNAL, FAILURES, FIRST_SINK)
CONTRACT = [block for block in read_blocks(FIRST_ADAPTER) if block.section == "The contract"]
"""The rest of that page has a test of its own."""

BLOCKS = [*(block for page in PAGES for block in read_blocks(page)), *CONTRACT]


def blocks(language: str, section: str | None = None) -> list[str]:
    """Return the texts of the blocks in a language, in one section or in all."""
    return [b.text for b in BLOCKS if b.language == language and section in (None, b.section)]


(SINK,) = blocks("python", "The sink")
(SUITE,) = blocks("python", "Its tests")
(ADAPTER,) = (block for block in CONTRACT if block.language == "python")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A reader's folder: the first configuration of README, and 16 pictures to train on."""
    shapes.make_dataset(tmp_path / "shapes", images=12, val_images=4, size=64)
    (tmp_path / "trainbus.yaml").write_text(blocks("yaml")[0], encoding="utf-8")
    return tmp_path


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command of a page, which must succeed; modules in the folder can be imported."""
    environment = train.hermetic(folder)
    search = {"PYTHONPATH": str(folder), "PATH": f"{Path(sys.executable).parent}"}
    for name, first in search.items():
        environment[name] = os.pathsep.join(filter(None, [first, environment.get(name)]))
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment,
        capture_output=True,
        encoding="utf-8",
        timeout=300,
        check=False,
    )
    assert 0 == done.returncode, done.stdout[-4000:] + done.stderr[-4000:]
    return done


def local_records(folder: Path) -> list[Record]:
    """Return the records that README's first configuration sends to a local file."""
    return [decode(line) for line in (folder / "runs/events.jsonl").read_bytes().splitlines()]


def entry_point(group: str) -> tuple[str, str]:
    """Return the name and value of the entry point that the pages register in a group."""
    texts = [text for text in blocks("toml") if f'"{group}"' in text]
    ((name, value),) = tomllib.loads(texts[0])["project"]["entry-points"][group].items()
    return name, value


# Blocks -------------------------------------------------------------------------------------------


def test_every_block_is_run_here() -> None:
    """A block in another language, or a section with more code, needs a test of its own."""
    assert {"sh", "yaml", "python", "toml", "text", "json"} == {block.language for block in BLOCKS}
    assert {
        "60 seconds": 1,
        "A loop of your own": 2,
        "The sink": 1,
        "Its tests": 1,
        "The contract": 1,
    } == {
        section: len(blocks("python", section))
        for section in dict.fromkeys(b.section for b in BLOCKS if b.language == "python")
    }


@pytest.mark.parametrize("text", blocks("yaml"))
def test_yaml_blocks_load(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is a valid configuration, without any environment variable."""
    for name in list(os.environ):
        monkeypatch.delenv(name)
    file = tmp_path / "trainbus.yaml"
    file.write_text(text, encoding="utf-8")
    assert [] == config.check(file)
    assert ["tracking", "local"] == [route.name for route in trainbus.load(file).settings.sinks]


@pytest.mark.needs("ultralytics")
def test_60_seconds(folder: Path) -> None:
    """The first block trains a real YOLO, and its receipt is the one that README shows."""
    train.save_below(folder)
    script = blocks("python", "60 seconds")[0]
    assert '"coco8.yaml"' in script  # which can't be downloaded everywhere
    script = script.replace('"coco8.yaml"', '"shapes/data.yaml"')
    (folder / "train.py").write_text(script, encoding="utf-8")
    done = run(folder, sys.executable, str(SHIM), "train.py")
    (shown,) = [text for text in blocks("text", "60 seconds") if text.startswith("trainbus: run")]
    receipt = done.stderr[done.stderr.index("trainbus: run") :]
    assert _anonymous(shown) == _anonymous(receipt.replace(str(folder.resolve()), "/home/you"))
    records = local_records(folder)
    assert [] == check_grammar(records)
    assert [0, 1, 2] == [r.event.epoch for r in records if isinstance(r.event, EpochEnded)]
    assert {str(len(records))} == set(re.findall(r"(\d+) (?:records|delivered)", receipt))
    assert [re.findall(r"wandb sync (.+)", receipt)] == [
        [str(log.parent) for log in wandb_file.find_runs(folder)]
    ]


def _anonymous(receipt: str) -> str:
    """Return a receipt without what no two runs share."""
    for pattern, word in ((r"\d{8}_\d{6}", "DATE"), (r"_[0-9a-f]{6}\b", "_ID"), (r"\b\d+ ", "N ")):
        receipt = re.sub(pattern, word, receipt)
    return receipt


def test_a_loop_of_your_own(folder: Path) -> None:
    """Both blocks run in one script: the run is in the file and in W&B, the subscriber gets it."""
    (folder / "loop.py").write_text("".join(blocks("python", "A loop of your own")))
    assert "epoch 0\nepoch 1\n" == run(folder, sys.executable, "loop.py").stdout
    records = local_records(folder)
    assert [] == check_grammar(records)
    assert [1, 1 / 2, 1 / 3] == [
        record.event.values["train/loss"]
        for record in records
        if isinstance(record.event, MetricsLogged) and "train/loss" in record.event.values
    ]
    (log,) = wandb_file.find_runs(folder)
    logged = wandb_file.read_run(log)
    assert ("line", 0.1, 0) == (logged.name, logged.config["lr"], logged.exit_code)
    assert {"curves/roc", "confusion"} == logged.charts.keys()


def test_a_run_has_what_is_listed() -> None:
    """The methods that README lists without an example exist."""
    (listed,) = re.findall(r"`run` also has (.+?)\.", README.read_text(encoding="utf-8"))
    names = re.findall(r"`(\w+)`", listed)
    assert "checkpoint" in names
    assert [] == [name for name in names if not callable(getattr(Run, name, None))]


# A sink -------------------------------------------------------------------------------------------


@pytest.fixture
def package(folder: Path) -> Path:
    """A folder in which the sink of the guide is a package that looks installed."""
    name, value = entry_point(registry.SINKS)
    *parents, stem = value.partition(":")[0].split(".")
    home = folder.joinpath(*parents)
    home.mkdir()
    (home / "__init__.py").touch()
    (home / f"{stem}.py").write_text(SINK, encoding="utf-8")
    about = folder / f"{parents[0]}-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {parents[0]}\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[{registry.SINKS}]\n{name} = {value}\n")
    return folder


def test_the_sink_passes_its_suite(package: Path) -> None:
    """The guide's sink, in a package of its own, passes the guide's test file."""
    (package / "test_csv_sink.py").write_text(SUITE, encoding="utf-8")
    options = ["-q", "-p", "no:cacheprovider", "-W", "error", "test_csv_sink.py"]
    done = run(package, sys.executable, "-m", "pytest", *options)
    (passed,) = re.findall(r"(\d+) passed", done.stdout)
    assert 10 < int(passed)


def test_the_sink_is_found_by_its_type(package: Path) -> None:
    """With the entry point, `type: metrics_csv` writes the metrics of a loop to a CSV file."""
    (package / "csv.yaml").write_text("sinks: {table: {type: metrics_csv, path: out.csv}}")
    assert "csv.yaml: ok, 1 sink: table (metrics_csv)\n" == (
        run(package, "trainbus", "validate", "csv.yaml").stdout
    )
    code = (
        'import trainbus\nwith trainbus.load("csv.yaml") as bus, bus.run() as run:\n'
        '    for _ in run.epochs(2):\n        run.log({"loss": 0.5})\n'
    )
    run(package, sys.executable, "-c", code)
    rows = [line.split(",")[4:] for line in (package / "out.csv").read_text().splitlines()]
    assert [[epoch, "", "train/loss", "0.5"] for epoch in "01"] == rows


# An adapter ---------------------------------------------------------------------------------------


class AcmeTrainer:
    """The trainer of a framework that calls `callback(event_name, trainer)`."""

    __module__ = "acme"

    def __init__(self, epochs: int) -> None:
        self.name, self.args = "demo", {"epochs": epochs}
        self.callbacks: list[Callable[[str, AcmeTrainer], None]] = []
        self.on_batch: Callable[[int], None] = lambda epoch: None
        self.epoch, self.loss, self.done = 0, 1.0, 0

    def fit(self) -> None:
        self._call("start")
        for epoch in range(self.args["epochs"]):
            self.epoch = epoch
            self._call("epoch_start")
            self.on_batch(self.epoch)
            self.loss /= 2
            self.done += 1
            self._call("epoch_end")
        self._call("end")

    def _call(self, event: str) -> None:
        if os.environ.get("RANK", "0") == "0":
            for callback in list(self.callbacks):
                callback(event, self)

    def raise_in_second_epoch(self, error: BaseException) -> None:
        def on_batch(epoch: int) -> None:
            if epoch == 1:
                raise error

        self.on_batch = on_batch


def adapter_module() -> ModuleType:
    """Return the guide's adapter as the module that its entry point names."""
    module = ModuleType(entry_point(registry.ADAPTERS)[1].partition(":")[0])
    # With these line numbers, tracebacks show the lines of the page.
    text = "\n" * (ADAPTER.line - 1) + ADAPTER.text
    code = compile(text, ADAPTER.page, "exec", dont_inherit=True)
    exec(code, module.__dict__)
    return module


MODULE = adapter_module()


@contextlib.contextmanager
def registered() -> Iterator[None]:
    """Register the guide's adapter, as its entry point would."""
    name, value = entry_point(registry.ADAPTERS)
    point = EntryPoint(name, value, registry.ADAPTERS)
    package = MODULE.__name__.partition(".")[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, package, ModuleType(package))
        patch.setitem(sys.modules, MODULE.__name__, MODULE)
        patch.setattr(registry, "plugins", lambda group: {name: point})
        yield


class TestAdapter(AdapterConformance):
    """The guide's adapter passes the conformance suite."""

    @pytest.fixture(autouse=True)
    def _registered(self) -> Iterator[None]:
        with registered():
            yield

    def start(self, folder: Path, epochs: int) -> Training:
        trainer = AcmeTrainer(epochs)
        return Training(
            target=trainer,
            run=trainer.fit,
            result=lambda: trainer.loss,
            fail_at=trainer.raise_in_second_epoch,
            epochs_trained=lambda: trainer.done,
        )

    def attach(self, bus: Bus, target: Any) -> AttachedRun:
        with registered():  # the suite calls this in processes without the fixture, too
            return bus.attach(target)

    def trace(self, target: Any) -> object:
        return list(target.callbacks)

    def handles(self, target: Any) -> object:
        return target.callbacks


def test_the_adapter_reports_a_training() -> None:
    """The run has the trainer's name, parameters and losses, and ends by itself."""
    trainer, bus, records = AcmeTrainer(2), Bus(), list[Record]()
    bus.subscribe(records.append)
    with registered():
        bus.attach(trainer)
    trainer.fit()
    assert [] == check_grammar(records)
    first, *between, last = (record.event for record in records)
    assert RunStarted(name="demo", params={"epochs": 2}, framework="acme") == first
    losses = [event.values["loss"] for event in between if isinstance(event, MetricsLogged)]
    assert [0.5, 0.25] == losses
    assert RunEnded(status="finished") == last


def test_with_bus_supplies_the_failed_end() -> None:
    """If the trainer raises, without a hook for it, the run ends as failed."""
    trainer, bus, records = AcmeTrainer(3), Bus(), list[Record]()
    bus.subscribe(records.append)
    trainer.raise_in_second_epoch(ZeroDivisionError("user"))
    with contextlib.suppress(ZeroDivisionError), bus:
        with registered():
            bus.attach(trainer)
        trainer.fit()
    assert [] == check_grammar(records)
    ended = records[-1].event
    assert isinstance(ended, RunEnded)
    assert ("failed", "ZeroDivisionError: user") == (ended.status, ended.reason)
    assert [] == trainer.callbacks


# Commands and links -------------------------------------------------------------------------------


def commands(program: str) -> list[str]:
    """Return the commands of the pages that begin with a program."""
    return [line for line in SHELL if line.split()[0] == program]


SHELL = {
    line.partition("#")[0].strip(): line for text in blocks("sh") for line in text.splitlines()
}
"""Command → its line, with the comment; a command that several pages show is run once."""


def test_every_command_is_run_here() -> None:
    """A command of another program needs a test of its own."""
    assert {"pip", "trainbus"} == {line.split()[0] for line in SHELL}


@pytest.mark.parametrize("command", commands("trainbus"), ids=lambda command: command[9:])
def test_trainbus_commands_run(command: str, folder: Path) -> None:
    """Each line, with its comment and redirection, does what it says and reports no problem."""
    line = SHELL[command]
    if "RUN_ID" in line:
        (folder / "loop.py").write_text(blocks("python", "A loop of your own")[0])
        run(folder, sys.executable, "loop.py")
        (made,) = (path for path in (folder / "trainbus-runs").iterdir() if path.is_dir())
        line = line.replace("RUN_ID", made.name)
    done = run(folder, "sh", "-ec", line)
    expected = {
        "replay": "0 records would be sent" if "--dry-run" in line else "finished, 16 records",
        "verify": "r0-a1.jsonl: 16 records, finished",
        "show": "validation/accuracy",
        "validate": "trainbus.yaml: ok, 2 sinks: tracking (wandb), local (jsonl)\n",
        "plugins": "trainbus.sinks.jsonl:JsonlSink",
        "schema": "",
    }
    assert (True, "") == (expected[line.split()[1]] in done.stdout, done.stderr)
    if ">" in line:
        file = folder / line.partition("#")[0].split(">")[1].strip()
        assert "trainbus" == json.loads(file.read_text(encoding="utf-8"))["title"]


def make_targets() -> list[str]:
    """Return the targets that README and CONTRIBUTING name, each once."""
    texts = [path.read_text(encoding="utf-8") for path in (README, ROOT / "CONTRIBUTING.md")]
    return sorted({name for text in texts for name in re.findall(r"\bmake ([a-z]+)\b", text)})


def test_make_targets_are_named() -> None:
    """The pages name the targets that everybody needs."""
    assert {"check", "demo", "test"} <= set(make_targets())


@pytest.mark.parametrize("target", make_targets())
def test_make_targets_exist(target: str) -> None:
    """`make` knows each target."""
    done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, check=False)
    assert (0, b"") == (done.returncode, done.stderr)


@pytest.mark.parametrize("line", commands("pip"))
def test_extras_exist(line: str) -> None:
    """The extras that README installs exist."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    ((name, extras),) = re.findall(r'"(\w+)\[([\w,]+)\]"', line)
    assert project["name"] == name
    assert set() == set(extras.split(",")) - project["optional-dependencies"].keys()


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    """Every relative link of a document points at a file or folder that exists."""
    links = re.findall(r"\]\((?!\w+:|#)([^)#\s]+)[^)]*\)", path.read_text(encoding="utf-8"))
    assert [] == [link for link in links if not (path.parent / link).exists()]
