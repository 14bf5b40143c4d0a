"""A relative path is relative to one place, whatever the training does to its working directory."""

from __future__ import annotations

import csv
import json
import os
import pickle
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from trainbus.sinks.jsonl import JsonlOptions, JsonlSink
from typer.testing import CliRunner

import trainbus
from support.emitting import emit
from support.plugins import make_plugin
from trainbus import Bus, FilePath, Options, RunInfo, Sink, config, registry
from trainbus.cli import app
from trainbus.events import MetricsLogged, RunStarted
from trainbus.paths import resolve_options, resolved

BASE = Path("/base")

# A sink of others, whose option says nothing of being a path; it tells which process runs it.
PLAIN = """
    import os
    from trainbus import Options, Sink

    class PlainOptions(Options, frozen=True, kw_only=True):
        file: str

    class PlainSink(Sink):
        Options = PlainOptions

        def write(self, records):
            with open(self.options.file, "a") as file:
                for record in records:
                    step = getattr(record.event, "step", None)
                    print(os.getpid(), record.seq, step, file=file, flush=True)
"""

CONFIG = """
sinks:
  lines: {type: jsonl, path: "out/{run}.jsonl"}
  tables: {type: csv, dir: "out/{run}-csv"}
  plain: {type: plain, file: plain.txt}
"""

# The delivering process dies twice, each time after the training has gone to another folder, and
# between two calls of the sink: one that ends its process in a call twice would be disabled.
TRAINING = """
    import json, os, signal, sys, time
    from pathlib import Path
    import trainbus

    def rows():
        text = plain.read_text() if plain.exists() else ""
        return [line.split() for line in text.splitlines()]

    def pids():
        return list(dict.fromkeys(int(row[0]) for row in rows()))

    def is_between_calls(step):
        seqs = [int(row[1]) for row in rows() if row[2] == str(step)]
        cursors = [json.loads(p.read_bytes()) for p in plain.parent.rglob("cursors/plain-*.json")]
        return bool(seqs and cursors) and cursors[0]["seq"] >= seqs[0]

    plain = Path(sys.argv[1]).absolute().parent / "plain.txt"
    step, epochs, deadline = 0, 0, time.monotonic() + 240
    with trainbus.load(sys.argv[1]) as bus:
        with bus.run() as run:
            for count, folder in enumerate(("../one", "../two", "."), start=1):
                run.log({"loss": float(epochs)}, epoch=epochs)
                epochs += 1
                while len(pids()) < count and time.monotonic() < deadline:
                    step += 1
                    run.log({"loss": 1.0}, step=step)
                    time.sleep(0.02)
                os.chdir(folder)
                step += 1
                run.log({"loss": 1.0}, step=step)
                while not is_between_calls(step) and time.monotonic() < deadline:
                    time.sleep(0.02)
                if count < 3:
                    os.kill(pids()[-1], signal.SIGKILL)
    receipt = bus.receipts[0]
    print(json.dumps({
        "emitted": receipt.emitted, "pids": len(pids()), "epochs": epochs,
        "journal": receipt.journal, "text": str(receipt),
        "sinks": {s.name: [s.pending, s.location] for s in receipt.sinks},
    }))
"""


@pytest.fixture
def folders(tmp_path: Path) -> Iterator[Path]:
    """A folder with one for the configuration, one to begin in, and two to go to."""
    for name in ("conf", "start", "one", "two"):
        (tmp_path / name).mkdir()
    before = os.getcwd()
    yield tmp_path
    os.chdir(before)


def inside(folder: Path) -> list[str]:
    """Return the names in a folder."""
    return sorted(path.name for path in folder.iterdir())


def test_a_change_of_directory_and_a_death_split_no_output(folders: Path) -> None:
    """Every process that delivers writes to the same files, and the receipt names those."""
    plugins = make_plugin(folders / "plugins", "plain", PLAIN, "PlainSink")
    (folders / "conf" / "bus.yaml").write_text(CONFIG)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(TRAINING), "../conf/bus.yaml"],
        cwd=folders / "start",
        env={**os.environ, "PYTHONPATH": str(plugins)},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert 0 == done.returncode, done.stderr
    found = json.loads(done.stdout)
    assert [[], [], []] == [inside(folders / name) for name in ("start", "one", "two")]
    assert (3, 3) == (found["pids"], found["epochs"])
    conf = folders / "conf"
    assert ["bus.yaml", "out", "plain.txt", "trainbus-runs"] == inside(conf)
    assert conf / "trainbus-runs" == Path(found["journal"]).parent
    run = Path(found["journal"]).name
    lines, table = conf / "out" / f"{run}.jsonl", conf / "out" / f"{run}-csv"
    assert {"lines": [0, str(lines)], "tables": [0, str(table)], "plain": [0, None]} == found[
        "sinks"
    ]
    seqs = [json.loads(line)["seq"] for line in lines.read_text().splitlines()]
    assert list(range(1, found["emitted"] + 1)) == seqs
    told = {int(line.split()[1]) for line in (conf / "plain.txt").read_text().splitlines()}
    assert set(seqs) == told
    rows = [
        row
        for path in sorted(table.glob("*.csv"))
        for row in csv.DictReader(path.read_text().splitlines())
        if row.get("epoch")
    ]
    assert [1, 2, 3] == sorted({int(row["epoch"]) for row in rows})


def test_a_bus_in_code_stays_where_it_was_made(
    folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sinks that are objects, or are made later, and the journal are below the first folder."""
    monkeypatch.chdir(folders / "start")
    sinks = {
        "object": JsonlSink(JsonlOptions(path="object.jsonl")),
        "made": lambda: JsonlSink(JsonlOptions(path="{run}/made.jsonl")),
    }
    bus = Bus(sinks, journal=trainbus.JournalSpec(dir="runs"), on_receipt=lambda receipt: None)
    monkeypatch.chdir(folders / "one")
    with bus, bus.run(name="r"):
        pass
    (receipt,) = bus.receipts
    start = folders / "start"
    assert [] == inside(folders / "one")
    assert start / "runs" == Path(receipt.journal or "").parent
    expected = [f"{start}/object.jsonl", f"{start}/{receipt.run}/made.jsonl"]
    assert expected == [sink.location for sink in receipt.sinks]
    assert [True, True] == [Path(path).exists() for path in expected]


def test_another_process_uses_the_same_place(
    folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A callback that a framework pickles makes its bus anew, elsewhere, with the same paths."""
    (folders / "conf" / "bus.yaml").write_text(
        "journal: {dir: runs}\nsinks: {a: {type: jsonl, path: a.jsonl}}"
    )
    monkeypatch.chdir(folders / "start")
    emitter = trainbus.load("../conf/bus.yaml").emitter()
    monkeypatch.chdir(folders / "one")
    again = pickle.loads(pickle.dumps(emitter))
    again(RunStarted())
    again.end()
    (path,) = (folders / "conf" / "runs").glob("*/receipt.json")
    receipt = msgspec.json.decode(path.read_bytes(), type=trainbus.Receipt)
    assert str(folders / "conf" / "runs") == os.path.dirname(receipt.journal or "")
    assert [str(folders / "conf" / "a.jsonl")] == [sink.location for sink in receipt.sinks]
    assert str(folders / "conf" / "bus.yaml") == receipt.config
    assert [] == inside(folders / "one")


def test_a_replay_writes_where_the_training_did(
    folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`-c` names the place for every sink, also for one whose options say nothing of paths."""
    monkeypatch.syspath_prepend(make_plugin(folders / "plugins", "plain", PLAIN, "PlainSink"))
    monkeypatch.chdir(folders / "start")
    with Bus(journal=trainbus.JournalSpec(dir="runs")) as bus, bus.run(name="r") as run:
        run.log({"loss": 1.0})
        place = f"runs/{run.id}"
    (folders / "conf" / "bus.yaml").write_text(CONFIG)
    done = CliRunner().invoke(app.app, ["replay", place, "-c", "../conf/bus.yaml"])
    assert 0 == done.exit_code, done.output
    assert ["bus.yaml", "out", "plain.txt"] == inside(folders / "conf")
    assert ["runs"] == inside(folders / "start")
    assert Path.cwd() == folders / "start"
    checked = CliRunner().invoke(app.app, ["validate", "--check", "../conf/bus.yaml"])
    assert str(folders / "conf" / "out") in checked.output


def test_wandb_is_where_the_configuration_is(
    folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run without a save directory lies beside the file, and the command names the whole path."""
    (folders / "conf" / "bus.yaml").write_text(
        "isolation: thread\nsinks: {a: {type: wandb, mode: offline, project: p}}"
    )
    monkeypatch.chdir(folders / "start")
    with trainbus.load("../conf/bus.yaml") as bus, bus.run(name="r"):
        monkeypatch.chdir(folders / "one")
    (sink,) = bus.receipts[0].sinks
    command = shlex.split(sink.location or "")
    assert ["wandb", "sync"] == command[:2]
    assert folders / "conf" / "wandb" == Path(command[2]).parent
    assert Path(command[2]).is_dir()
    assert [[], []] == [inside(folders / name) for name in ("start", "one")]


PATHS = {
    "clearml": {"dir"},
    "comet": {"dir"},
    "console": set(),
    "csv": {"dir"},
    "dvclive": {"dir", "dvcyaml"},
    "html": {"dir"},
    "jsonl": {"path"},
    "mlflow": {"artifact_location"},
    "notify": {"state"},
    "prometheus": {"textfile"},
    "swanlab": {"logdir"},
    "tensorboard": {"logdir"},
    "trackio": {"dir"},
    "wandb": {"dir"},
}
GIVEN = {"textfile": "a/x.prom", "dvcyaml": "a/dvc.yaml"}


@pytest.mark.parametrize("kind", sorted(registry.plugins(registry.SINKS)))
def test_every_path_of_every_sink_is_resolved(kind: str, folders: Path) -> None:
    """Given or by default, it is absolute once the file is read, and its `{run}` stays."""
    cls = registry.sink_class(kind)
    fields = {f.name: f for f in msgspec.structs.fields(cls.Options)}
    words = re.compile(r"dir$|^path$|file$|folder|location|state$|dvcyaml")
    assert PATHS[kind] == {name for name in fields if words.search(name)}
    given: dict[str, Any] = {name: GIVEN.get(name, "a/{run}") for name in PATHS[kind]}
    given |= {"urls": ["json://x"]} if kind == "notify" else {}
    for options in (given, {k: v for k, v in given.items() if k == "urls"}):
        file = folders / "conf" / "bus.yaml"
        file.write_text(json.dumps({"sinks": {"a": {"type": kind, **options}}}))
        (route,) = trainbus.load(file).settings.sinks
        made = route.make().options
        found = {name: getattr(made, name) for name in PATHS[kind]}
        expected = {
            name: str(folders / "conf" / (options.get(name) or fields[name].default))
            for name in PATHS[kind]
            if options.get(name) or fields[name].default
        }
        assert expected == {name: path for name, path in found.items() if path is not None}


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("a.jsonl", "/base/a.jsonl"),
        ("./a/../b/", "/base/b"),
        ("../{run}/a", "/{run}/a"),
        ("/abs/a", "/abs/a"),
        ("~/a", "/home/me/a"),
        ("~nobody-knows/a", "~nobody-knows/a"),
        ("", ""),
        ("s3://bucket/a", "s3://bucket/a"),
        ("dbfs:/a", "dbfs:/a"),
        ("epoch:1/a", "/base/epoch:1/a"),
    ],
)
def test_what_a_path_becomes(path: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative ones are below the base, `~` is the home folder, and URIs are no paths."""
    monkeypatch.setenv("HOME", "/home/me")
    assert expected == resolved(path, BASE)


def test_without_a_place_a_relative_path_stays() -> None:
    """Where the working directory was deleted, only relative paths can't be used."""
    assert ["a", "/b"] == [resolved(path, None) for path in ("a", "/b")]


class Nested(Options, frozen=True, kw_only=True):
    """Paths in every form that an option may have."""

    one: FilePath | None = None
    many: list[FilePath] = msgspec.field(default_factory=list)
    few: tuple[FilePath, ...] = ()
    named: dict[str, FilePath] = msgspec.field(default_factory=dict)
    text: str = "text"


def test_paths_in_lists_and_mappings_are_resolved() -> None:
    """A sink of others marks its paths by their type, wherever they are; other texts stay."""
    options = Nested(one="a", many=["b", "/c"], few=("d",), named={"e": "f"})
    found = resolve_options(options, BASE)
    assert ("/base/a", ["/base/b", "/c"], ("/base/d",)) == (found.one, found.many, found.few)
    assert ({"e": "/base/f"}, "text") == (found.named, found.text)
    assert Nested() == resolve_options(Nested(), BASE)


def test_a_sink_without_options_stays_as_it_is(journals: Path) -> None:
    """An object that never called `Sink.__init__` is a sink too."""

    class Bare(Sink):
        def __init__(self) -> None:
            self.found: list[tuple[Any, RunInfo]] = []

        def open(self, run: RunInfo) -> None:
            self.run = run

        def write(self, records: Any) -> None:
            self.found += [(record, self.run) for record in records]

    sink = Bare()
    with Bus({"bare": sink}, on_receipt=lambda receipt: None) as bus:
        emit(bus, MetricsLogged(values={"a": 1.0}, phase="train"))
    assert {os.getcwd()} == {run.base for _, run in sink.found}
    assert [1, 2, 3] == [record.seq for record, _ in sink.found]


def test_a_text_without_a_file_is_relative_to_the_working_directory(
    folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`loads` has no other place."""
    monkeypatch.chdir(folders / "start")
    bus = config.loads("sinks: {a: {type: jsonl, path: a.jsonl}}")
    assert (folders / "start") == bus.settings.base
    assert {"path": str(folders / "start" / "a.jsonl")} == bus.settings.sinks[0].options
