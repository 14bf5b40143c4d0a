"""What a configuration file becomes, and what is said of one that can't be used."""

# The messages stand here as they are printed, and asserts say what is expected first.
# ruff: noqa: E501

from __future__ import annotations

import json
import os
import pickle
import re
from collections.abc import Iterator, Sequence
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import Meta
from typer.testing import CliRunner

import trainbus
from trainbus import (
    Bus,
    ConfigError,
    JournalSpec,
    Options,
    Record,
    RunDefaults,
    Sink,
    config,
    registry,
)
from trainbus.cli.app import app
from trainbus.config.schema import SINK_KEYS, json_schema
from trainbus.delivery.transforms import TransformSpec

EXAMPLES = sorted((Path(__file__).parents[2] / "config").glob("*.yaml"))
SECRET = "hunter2-s3cret"
ONE_SINK = "sinks: {a: {type: jsonl}}\n"


class Server(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Options within an option."""

    host: str
    retries: int = 0


class DemoOptions(Options, frozen=True, kw_only=True):
    """Options of every shape that a plugin may ask for."""

    project: Annotated[
        str,
        Meta(
            pattern="^[a-z-]+$",
            description="What the run belongs to",
            extra={"expected": "a demo project name: small letters and -"},
        ),
    ]
    mode: Literal["online", "offline"] = "online"
    port: Annotated[int, Meta(ge=1, le=65535)] = 8080
    rate: float = 1.0
    tags: Sequence[Annotated[str, Meta(max_length=8)]] = ()
    labels: dict[str, int] = msgspec.field(default_factory=dict)
    verbose: bool = False
    api_key: str | None = None
    server: Server | None = None

    def __post_init__(self) -> None:
        """Refuse what doesn't go together."""
        if self.mode == "offline" and self.api_key is not None:
            raise ValueError("api_key is of no use offline")
        if self.project.startswith("taken"):
            raise ValueError(f"project {self.project!r} is taken")


class DemoSink(Sink):
    """Keeps nothing."""

    Options = DemoOptions
    options: DemoOptions
    service = "demo_tracker"

    def write(self, records: Sequence[Record]) -> None:
        """Take the records."""


class ClashingOptions(Options, frozen=True, kw_only=True):
    """Options with a key that every sink has."""

    every: int = 1


class ClashingSink(DemoSink):
    """Can't be configured."""

    Options = ClashingOptions  # type: ignore[assignment]


@pytest.fixture
def demo() -> Iterator[None]:
    """Small sinks, and some that don't load, in place of the installed ones."""
    values = {
        "clash": f"{__name__}:ClashingSink",
        "demo": f"{__name__}:DemoSink",
        "gone": "no_such_package_of_ours:Sink",
        "jsonl": "trainbus.sinks.jsonl:JsonlSink",
        "nosink": "json:dumps",
    }
    points = {name: EntryPoint(name, value, registry.SINKS) for name, value in values.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "plugins", lambda group: points if group == registry.SINKS else {})
        yield


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, which is the working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def problems(text: str) -> list[str]:
    """Return the problems in a YAML string, without the name of the file."""
    with pytest.raises(ConfigError) as caught:
        config.loads(text, name="")
    return [line.removeprefix(":") for line in caught.value.problems]


# A file, and what is printed of it after its name.
BROKEN = """
=== bad syntax
sinks:
  a: {type: demo
  b: 1
--> :3:4: found bad YAML: expected ',' or '}', but got ':', expected valid YAML

=== variable in flow
sinks:
  a: {type: demo, project: ${NAME}}
--> :2:29: found bad YAML: expected ',' or '}', but got '{', expected valid YAML (inside [ ] and { }, write `${…}` in quotes)

=== unknown alias
sinks:
  a: *other
--> :2:6: found bad YAML: found undefined alias …, expected valid YAML

=== only comments
# nothing yet
---
--> :1: found an empty file, expected a mapping with the key 'sinks'

=== a list
- sinks
--> :1: found a list, expected a mapping with the key 'sinks'

=== a text
sinks
--> :1: found 'sinks', expected a mapping with the key 'sinks'

=== two documents
sinks: {a: {type: jsonl}}
---
sinks: {}
--> :2: found a second document (after `---`), expected one per file

=== duplicate key
sinks:
  a: {type: jsonl}
  a: {type: jsonl}
--> :3: sinks.a: found the key again (first in line 2), expected it once

=== duplicate option
sinks:
  a:
    type: jsonl
    path: x
    path: y
--> :5: sinks.a.path: found the key again (first in line 4), expected it once

=== key is a number
sinks:
  1: {type: jsonl}
--> :2: sinks: found the number 1 as a key, expected a string (write it in quotes)

=== key is true
sinks:
  on: {type: jsonl}
--> :2: sinks: found true as a key, expected a string (write it in quotes)

=== key is a list
sinks:
  ? [a]
  : {type: jsonl}
--> :2: sinks: found a list as a key, expected a string (write it in quotes)

=== variable in a key
sinks:
  ${NAME}: {type: jsonl}
--> :2: sinks: found `${` in a key, expected variables in values only

=== python tag
sinks:
  a: !!python/object/apply:os.system ['true']
--> :2: sinks.a: found a YAML tag (`!…`), expected a plain value

=== binary tag
sinks:
  a: {type: jsonl, path: !!binary aGk=}
--> :2: sinks.a.path: found a YAML tag (`!…`), expected a plain value

=== unknown key at the top
sink:
  a: {type: jsonl}
--> :1: sink: found an unknown key, expected one of console, environment, flush_secs, isolation, journal, run, sinks, system_secs, version, did you mean 'sinks'?
--> :1: sinks: found nothing, expected a mapping of one name or more to sinks

=== journal and where sinks run
journal: {dirr: x, max_bytes: 5, redact: x}
isolation: proces
flush_secs: -1
sinks: {a: {type: jsonl, isolation: forked}}
--> :1: journal.dirr: found an unknown key, expected one of dir, max_bytes, redact, did you mean 'dir'?
--> :1: journal.max_bytes: found the number 5, expected a whole number (at least 1048576)
--> :1: journal.redact: found 'x', expected a list of strings
--> :2: isolation: found 'proces', expected one of 'auto', 'inline', 'process', 'thread', did you mean 'process'?
--> :3: flush_secs: found the number -1, expected a number (at least 0)
--> :4: sinks.a.isolation: found 'forked', expected one of 'auto', 'inline', 'process', 'thread', did you mean 'thread'?

=== journal a text
journal: runs
sinks: {a: {type: jsonl}}
--> :1: journal: found 'runs', expected a mapping

=== journal nowhere
journal: {dir: ""}
sinks: {a: {type: jsonl}}
--> :1: journal.dir: found '', expected a string (at least 1 long)

=== journal of half a byte
journal:
  max_bytes: 1048576.5
  redact: [key, 5]
sinks: {a: {type: jsonl}}
--> :2: journal.max_bytes: found the number 1048576.5, expected a whole number (at least 1048576)
--> :3: journal.redact[1]: found the number 5, expected a string (write it in quotes)

=== isolation is true
isolation: on
sinks: {a: {type: jsonl}}
--> :1: isolation: found true, expected one of 'auto', 'inline', 'process', 'thread'

=== flush_secs is no number
flush_secs: 10s
sinks: {a: {type: jsonl}}
--> :1: flush_secs: found '10s', expected a number (at least 0)

=== flush_secs is not a number
flush_secs: .nan
sinks: {a: {type: jsonl}}
--> :1: flush_secs: found the number nan, expected a number (at least 0)

=== version
version: 2
sinks: {a: {type: jsonl}}
--> :1: version: found the number 2, expected 1

=== version as text
version: '1'
sinks: {a: {type: jsonl}}
--> :1: version: found '1', expected 1

=== run is a list
run: [a]
sinks: {a: {type: jsonl}}
--> :1: run: found a list, expected a mapping

=== unknown run key
run:
  porject: x
sinks: {a: {type: jsonl}}
--> :2: run.porject: found an unknown key, expected one of group, job_type, name, notes, project, tags, did you mean 'project'?

=== run tags a text
run:
  tags: demo
sinks: {a: {type: jsonl}}
--> :2: run.tags: found 'demo', expected a list of strings

=== run tag a number
run:
  tags: [a, 5]
sinks: {a: {type: jsonl}}
--> :2: run.tags[1]: found the number 5, expected a string (write it in quotes)

=== run name true
run:
  name: yes
sinks: {a: {type: jsonl}}
--> :2: run.name: found true, expected a string (write it in quotes)

=== no sinks
run: {name: x}
--> :1: sinks: found nothing, expected a mapping of one name or more to sinks

=== sinks null
sinks:
--> :1: sinks: found nothing, expected a mapping of one name or more to sinks

=== sinks empty
sinks: {}
--> :1: sinks: found an empty mapping, expected a mapping of one name or more to sinks

=== sinks a list
sinks:
  - type: jsonl
--> :1: sinks: found a list, expected a mapping of one name or more to sinks

=== sink name with a space
sinks:
  a b: {type: jsnol}
  c: {type: jsonl}
--> :2: sinks: found 'a b' as a key, expected a name of letters, digits, `_`, `.` and `-`
--> :2: sinks.'a b'.type: found 'jsnol', expected one of clash, demo, gone, jsonl, nosink, did you mean 'jsonl'?

=== sink name with a line break
sinks:
  "a\\n": {type: jsonl}
--> :2: sinks: found 'a\\n' as a key, expected a name of letters, digits, `_`, `.` and `-`

=== sink null
sinks:
  a:
--> :2: sinks.a: found nothing, expected a mapping with the key 'type'

=== sink a text
sinks:
  a: jsonl
--> :2: sinks.a: found 'jsonl', expected a mapping with the key 'type'

=== no type
sinks:
  a: {path: x}
--> :2: sinks.a.type: found nothing, expected one of clash, demo, gone, jsonl, nosink

=== typo in type
sinks:
  a:
    tpye: jsonl
--> :2: sinks.a.type: found nothing, expected one of clash, demo, gone, jsonl, nosink
--> :3: sinks.a.tpye: found an unknown key, expected 'type', did you mean 'type'?

=== unknown type
sinks:
  a:
    type: jsnol
--> :3: sinks.a.type: found 'jsnol', expected one of clash, demo, gone, jsonl, nosink, did you mean 'jsonl'?

=== type a number
sinks:
  a:
    type: 5
--> :3: sinks.a.type: found the number 5, expected one of clash, demo, gone, jsonl, nosink

=== plugin gone
sinks:
  a:
    type: gone
--> :3: sinks.a.type: found 'gone', expected a sink that loads: trainbus.sinks plugin 'gone' (no_such_package_of_ours:Sink) can't be imported: ModuleNotFoundError: No module named 'no_such_package_of_ours'

=== plugin clashes
sinks:
  a:
    type: clash
--> :3: sinks.a.type: found 'clash', expected a sink that loads: the options of sink 'clash' can't be read: every is reserved: all sinks have this key

=== required
sinks:
  a:
    type: demo
--> :2: sinks.a.project: found nothing, expected a demo project name: small letters and -

=== unknown option
sinks:
  a:
    type: demo
    project: x
    tgas: [a]
--> :5: sinks.a.tgas: found an unknown key, expected one of api_key, every, exclude, include, isolation, labels, mode, on_error, phase, port, project, rate, rename, server, tags, type, verbose, did you mean 'tags'?

=== enum
sinks:
  a:
    type: demo
    project: x
    mode: ofline
--> :5: sinks.a.mode: found 'ofline', expected one of 'offline', 'online', did you mean 'offline'?

=== enum bool
sinks:
  a:
    type: demo
    project: x
    mode: off
--> :5: sinks.a.mode: found false, expected one of 'offline', 'online'

=== pattern
sinks:
  a:
    type: demo
    project: Shapes/1
--> :4: sinks.a.project: found 'Shapes/1', expected a demo project name: small letters and -

=== project null
sinks:
  a:
    type: demo
    project:
--> :4: sinks.a.project: found nothing, expected a demo project name: small letters and -

=== range
sinks:
  a:
    type: demo
    project: x
    port: 70000
--> :5: sinks.a.port: found the number 70000, expected a whole number (at least 1, at most 65535)

=== item
sinks:
  a:
    type: demo
    project: x
    tags:
      - short
      - much too long
--> :7: sinks.a.tags[1]: found 'much too long', expected a string (at most 8 long)

=== labels
sinks:
  a:
    type: demo
    project: x
    labels: {a b: one}
--> :5: sinks.a.labels.'a b': found 'one', expected a whole number

=== verbose
sinks:
  a:
    type: demo
    project: x
    verbose: 1
--> :5: sinks.a.verbose: found the number 1, expected true or false

=== nested
sinks:
  a:
    type: demo
    project: x
    server: {hots: x}
--> :5: sinks.a.server.hots: found an unknown key, expected one of host, retries, did you mean 'host'?
--> :5: sinks.a.server.host: found nothing, expected a string

=== post init
sinks:
  a:
    type: demo
    project: x
    mode: offline
    api_key: abc
--> :2: sinks.a: found invalid options: api_key is of no use offline

=== every
sinks:
  a:
    type: jsonl
    every: {train: 0}
--> :4: sinks.a.every.train: found the number 0, expected a whole number (at least 1)

=== include empty
sinks:
  a:
    type: jsonl
    include: []
--> :4: sinks.a.include: found an empty list, expected a list of one pattern or more (else nothing is sent)

=== include text
sinks:
  a:
    type: jsonl
    include: train/*
--> :4: sinks.a.include: found 'train/*', expected a list of one pattern or more (else nothing is sent)

=== rename
sinks:
  a:
    type: jsonl
    rename:
      a: loss
      b: loss
--> :6: sinks.a.rename.b: found 'loss' again, expected another name than that of 'a'

=== rename star
sinks:
  a:
    type: jsonl
    rename: {a: b/*}
--> :4: sinks.a.rename.a: found 'b/*', expected no `*`, as its pattern has none

=== on_error
sinks:
  a:
    type: jsonl
    on_error: rase
--> :4: sinks.a.on_error: found 'rase', expected one of 'raise', 'warn', did you mean 'raise'?

=== missing variable
sinks:
  a:
    type: jsonl
    path: x/${TRAINBUS_TEST_FOLDR}
--> :4: sinks.a.path: found ${TRAINBUS_TEST_FOLDR}, which is not set, expected an environment variable or a default, ${TRAINBUS_TEST_FOLDR:-…}, did you mean 'TRAINBUS_TEST_FOLDER'?

=== missing variable far
sinks:
  a:
    type: jsonl
    path: x/${NOWHERE_TO_BE_FOUND}
--> :4: sinks.a.path: found ${NOWHERE_TO_BE_FOUND}, which is not set, expected an environment variable or a default, ${NOWHERE_TO_BE_FOUND:-…}

=== unterminated
sinks:
  a:
    type: jsonl
    path: x/${TRAINBUS
--> :4: sinks.a.path: found `${` without its `}`, expected ${NAME} or ${NAME:-default}

=== bad name
sinks:
  a:
    type: jsonl
    path: x/${1x}
--> :4: sinks.a.path: found `${…}` without a valid variable name, expected ${NAME} or ${NAME:-default}, not nested, or $${ for a literal ${

=== nested variable
sinks:
  a:
    type: jsonl
    path: ${A:-${B}}
--> :4: sinks.a.path: found `${…}` without a valid variable name, expected ${NAME} or ${NAME:-default}, not nested, or $${ for a literal ${

=== recursive alias
sinks: &a
  a: *a
--> :2: found an alias that contains itself, expected plain values

=== bad merge
sinks:
  a:
    <<: [1]
    type: jsonl
--> :3: sinks.a: found the number 1 after `<<`, expected a mapping

=== yaml int
version: !!int abc
sinks: {a: {type: jsonl}}
--> :1: version: found a string that can't be parsed, expected a whole number

=== many
version: 3
run: {nmae: 1}
sinks:
  a: {type: jsonl, pth: x, every: {train: x}}
  b: {type: demo, port: x, rate: y}
  c: {type: wandbb}
--> :1: version: found the number 3, expected 1
--> :2: run.nmae: found an unknown key, expected one of group, job_type, name, notes, project, tags, did you mean 'name'?
--> :4: sinks.a.every.train: found 'x', expected a whole number (at least 1)
--> :4: sinks.a.pth: found an unknown key, expected one of every, exclude, include, isolation, on_error, path, phase, rename, type, did you mean 'path'?
--> :5: sinks.b.port: found 'x', expected a whole number (at least 1, at most 65535)
--> :5: sinks.b.rate: found 'y', expected a number
--> :5: sinks.b.project: found nothing, expected a demo project name: small letters and -
--> :6: sinks.c.type: found 'wandbb', expected one of clash, demo, gone, jsonl, nosink
"""


def broken_files() -> list[Any]:
    """Return the files above, each with the lines that it must lead to."""
    params = []
    for name, text in re.findall(r"=== (.+)\n((?:(?!===).*\n)+)", BROKEN):
        lines = text.strip("\n").split("\n")
        said = [line.removeprefix("--> ") for line in lines if line.startswith("--> ")]
        file = "\n".join(line for line in lines if not line.startswith("--> "))
        params.append(pytest.param(file + "\n", said, id=name.replace(" ", "-")))
    return params


def test_broken_files_are_many() -> None:
    """The cases above are all found, and each says what must be said."""
    cases = [param.values for param in broken_files()]
    assert BROKEN.count("===") == len(cases)
    assert [] == [text for text, said in cases if not said]
    assert len(cases) >= 50


@pytest.mark.usefixtures("demo")
@pytest.mark.parametrize(("text", "said"), broken_files())
def test_broken_file(
    text: str, said: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each problem is one line: file, line, key path, what was found and expected; exit code 2."""
    monkeypatch.setenv("TRAINBUS_TEST_FOLDER", SECRET)
    (folder / "broken.yaml").write_text(text)
    lines = [f"broken.yaml{line}" for line in said]
    assert lines == config.check("broken.yaml")
    result = CliRunner().invoke(app, ["validate", "broken.yaml"])
    assert (2, "", lines) == (result.exit_code, result.stdout, result.stderr.splitlines())
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", [":1: found an empty file, expected a mapping with the key 'sinks'"]),
        (b"a: 1\nb: \xff", [":2: found bytes that are not UTF-8, expected a text file in UTF-8"]),
        (b'a: 1\nb: "\0"', [":2: found a control character, expected printable text"]),
        (b"#" * (2**20 + 1), [": found more than 1 MiB, expected a smaller file"]),
        (
            b"sinks:\n\ta: 1",
            [
                r":2:1: found bad YAML: found character '\t' that cannot start any token, expected "
                "valid YAML (indent with spaces, not tabs)"
            ],
        ),
        (b"[" * 5000, [": found too many levels, expected 30 at most"]),
        (b"sinks: " + b"[" * 40 + b"]" * 40, [":1: found too many levels, expected 30 at most"]),
        (
            b"version: " + b"1" * 5000 + b"\nsinks: {a: {type: jsonl}}",
            [":1: version: found too many digits, expected a whole number"],
        ),
        (
            b"version: " + b"1:" * 500 + b"1\nsinks: {a: {type: jsonl}}",
            [":1: version: found too many digits, expected a whole number"],
        ),
    ],
    ids=["empty", "not-utf-8", "control", "big", "tab", "deep", "levels", "digits", "sexagesimal"],
)
def test_broken_bytes(data: bytes, said: list[str], folder: Path) -> None:
    """A file that is not text, or too large, gets one line too."""
    (folder / "broken.yaml").write_bytes(data)
    assert [f"broken.yaml{line}" for line in said] == config.check("broken.yaml")


def test_alias_bomb() -> None:
    """Aliases that expand without bound end in one line, soon."""
    rows = ["a0: &a0 [x, x]", *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 60))]
    assert ["3: found more than 10000 values (aliases expanded), expected fewer"] == problems(
        "sinks:\n" + "".join(f"  {row}\n" for row in rows)
    )


def test_missing_file(folder: Path) -> None:
    """A file that is not there is named with its folder, and with the nearest YAML file in it."""
    (folder / "trainbus.yml").write_text(ONE_SINK)
    said = f"trainbus.yaml: found no such file in {folder}, expected a YAML file"
    assert [f"{said}, did you mean 'trainbus.yml'?"] == config.check("trainbus.yaml")


@pytest.mark.parametrize(
    ("path", "said"),
    [
        (
            "none/a.yaml",
            "none/a.yaml: found no such folder, expected a YAML file in one that exists",
        ),
        (".", ".: found a folder, expected a YAML file"),
        (
            "a\n\x1b[2J\0",
            r"a\n\x1b[2J\x00: found a file that can't be read (embedded null byte), "
            "expected a YAML file",
        ),
        (
            "x" * 300,
            f"{'x' * 300}: found a file that can't be read (File name too long), expected a YAML file",
        ),
    ],
)
def test_unreadable_file(path: str, said: str, folder: Path) -> None:
    """What can't be read is said in one line, with control characters in the name escaped."""
    assert [said] == config.check(path)


@pytest.mark.usefixtures("demo")
def test_plugin_that_is_no_sink() -> None:
    """An entry point that is not a sink is a problem of the line that names it."""
    (line,) = problems("sinks: {a: {type: nosink}}")
    assert line.startswith(
        "1: sinks.a.type: found 'nosink', expected a sink that loads: sink 'nosi"
    )
    assert line.endswith("expected a class derived from trainbus.Sink")


@pytest.mark.usefixtures("demo")
def test_good_file() -> None:
    """A file becomes a bus with its routes and its defaults."""
    bus = config.loads(
        """
        version: 1
        run: {project: shapes, tags: [a, b]}
        sinks:
          tracking:
            type: demo
            project: shapes
            rate: 1e-3
            tags: [x]
            labels: {y: 1}
            server: {host: h}
            include: ["metrics/*"]
            exclude: [lr]
            rename: {"a/*": "b/*", "c/*": "b/*"}
            every: {train: 50}
            on_error: raise
          local: {type: jsonl}
        """
    )
    assert RunDefaults(project="shapes", tags=["a", "b"]) == bus.settings.defaults
    tracking, local = bus.settings.sinks
    assert ("tracking", "demo", "demo_tracker", "raise") == (
        tracking.name,
        tracking.kind,
        tracking.service,
        tracking.on_error,
    )
    assert (
        TransformSpec(
            include=["metrics/*"],
            exclude=["lr"],
            rename={"a/*": "b/*", "c/*": "b/*"},
            every={"train": 50},
        )
        == tracking.transforms
    )
    assert ("local", "jsonl", None, "warn", TransformSpec()) == (
        local.name,
        local.kind,
        local.service,
        local.on_error,
        local.transforms,
    )
    sink = tracking.make()
    assert isinstance(sink, DemoSink)
    assert (
        DemoOptions(
            project="shapes", rate=1e-3, tags=["x"], labels={"y": 1}, server=Server(host="h")
        )
        == sink.options
    )
    assert sink is not tracking.make()


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What each bus was made with, in the place of the buses."""
    found: list[dict[str, Any]] = []

    def make(sinks: dict[str, Any], **options: Any) -> Bus:
        found.append(options)
        return Bus(sinks)

    monkeypatch.setattr(config, "Bus", make)
    return found


def test_where_sinks_run_and_what_the_journal_holds(
    made: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file says it for all sinks and for each, and variables may stand for values."""
    monkeypatch.setenv("WHERE", "thread")
    monkeypatch.setenv("SECS", "2.5")
    bus = config.loads(
        """
        isolation: ${WHERE}
        flush_secs: ${SECS}
        journal: {dir: "~/runs", max_bytes: 2097152, redact: [house_rule]}
        sinks:
          one: {type: jsonl, isolation: process}
          two: {type: jsonl}
        """,
        name="a.yaml",
    )
    (given,) = made
    spec = JournalSpec(dir="~/runs", max_bytes=2**21, redact=["house_rule"])
    assert ("thread", 2.5, spec) == (given["isolation"], given["flush_secs"], given["journal"])
    assert "a.yaml" == given["config"]
    assert ["process", None] == [route.isolation for route in bus.settings.sinks]
    path = os.path.abspath("trainbus-runs/{run}.jsonl")
    assert [{"path": path}] * 2 == [route.options for route in bus.settings.sinks]


@pytest.mark.parametrize("text", ["", "journal:\n", "journal: {}\n"])
def test_journal_and_isolation_may_be_left_out(text: str, made: list[dict[str, Any]]) -> None:
    """What a file leaves out, or comments out, is as a bus has it by itself."""
    config.loads(text + ONE_SINK)
    (given,) = made
    assert given["journal"] in (None, JournalSpec())
    assert ("auto", 60.0) == (given["isolation"], given["flush_secs"])


@pytest.mark.parametrize("secs", ["60", "1e3", ".inf"])
def test_every_time_that_is_taken_works(secs: str, folder: Path) -> None:
    """A sink gets the whole run, whichever time the file lets the end wait for it."""
    bus = config.loads(f"flush_secs: {secs}\nsinks: {{a: {{type: jsonl, path: kept.jsonl}}}}")
    with bus.run() as run:
        run.log({"loss": 1.0})
    (report,) = bus.receipts[0].sinks
    assert (3, 0, 0) == (report.taken, report.dead, report.pending)
    assert 3 == len((folder / "kept.jsonl").read_text().splitlines())


def test_common_keys_are_all_transforms() -> None:
    """Every transform is a key of every sink, so that none is missing in the file."""
    own = {"type", "on_error", "isolation"}
    assert {*TransformSpec.__struct_fields__, *own} == set(SINK_KEYS)


def test_empty_run_section() -> None:
    """A `run` whose keys are all commented out is valid."""
    assert RunDefaults() == config.loads("run:\n" + ONE_SINK).settings.defaults


def test_merge_keys() -> None:
    """A merge key copies the options of another sink; the sink's own options take precedence."""
    bus = config.loads(
        """
        sinks:
          a: &a {type: jsonl, path: one, exclude: [x]}
          b: {<<: *a, path: two}
        """
    )
    assert (["x"], "jsonl") == (
        bus.settings.sinks[1].transforms.exclude,
        bus.settings.sinks[1].kind,
    )
    assert ["one", "two"] == [Path(each.path).name for each in options(bus)]


def test_several_merges() -> None:
    """The first of several merged mappings takes precedence, and a problem names its own line."""
    text = """
        sinks:
          a: &a {type: jsonl, path: one}
          b: &b {type: jsonl, path: two, pth: 1}
          c: {<<: [*a, *b]}
    """
    assert [
        "4: sinks.b.pth: found an unknown key, expected one of every, exclude, include, isolation, on_error, "
        "path, phase, rename, type, did you mean 'path'?",
        "4: sinks.c.pth: found an unknown key, expected one of every, exclude, include, isolation, on_error, "
        "path, phase, rename, type, did you mean 'path'?",
    ] == problems(text)
    bus = config.loads(text.replace(", pth: 1", ""))
    assert "one" == Path(options(bus)[2].path).name


def options(bus: Bus) -> list[Any]:
    """Return the options of the sinks, in the order of the file."""
    return [route.make().options for route in bus.settings.sinks]


def demo_options(text: str) -> Any:
    """Return the options of a demo sink with one line of YAML among them."""
    project = "" if text.startswith("project") else "    project: x\n"
    return (
        config.loads(f"sinks:\n  a:\n    type: demo\n{project}    {text}\n")
        .settings.sinks[0]
        .make()
        .options
    )


@pytest.mark.usefixtures("demo")
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("port: ${PORT}", 81),
        ("rate: ${PORT}", 81.0),
        ("rate: ${SMALL}", 1e-3),
        ("rate: ${NONE:-0.5}", 0.5),
        ("verbose: ${YES}", True),
        ("api_key: ${PORT}", "81"),
        ("api_key: ${YES}", "true"),
        ('api_key: "${PORT}"', "81"),
        ("api_key: ${EMPTY}", None),
        ('api_key: "${EMPTY}"', ""),
        ("api_key: ${EMPTY:-full}", "full"),
        ("api_key: ${NONE:-}", None),
        ("api_key: a${PORT}b${PORT}c", "a81b81c"),
        ("api_key: $${PORT}", "${PORT}"),
        ("api_key: $$${PORT}", "$${PORT}"),
        ("api_key: $PORT $ {PORT}", "$PORT $ {PORT}"),
        ("api_key: ${LIST}", "[a, b]"),
        ("api_key: ${NESTED}", "${PORT}"),
        ("api_key: ${DATE}", "2024-01-01"),
        ("api_key: |-\n      ${PORT}", "81"),
        ("api_key: ${NONE:-x:y}", "x:y"),
        ('tags: ["${PORT}", b]', ["81", "b"]),
        ('labels: {a: "${NONE:-x}"}', None),
    ],
)
def test_variables(text: str, expected: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Variables are put into values; an unquoted one may become a number, never more than that."""
    for name, value in {
        "PORT": "81",
        "SMALL": "1e-3",
        "YES": "true",
        "EMPTY": "",
        "LIST": "[a, b]",
        "NESTED": "${PORT}",
        "DATE": "2024-01-01",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NONE", raising=False)
    if expected is None and "labels" in text:
        with pytest.raises(
            ConfigError, match=r"sinks\.a\.labels\.a: found a string, expected a whole"
        ):
            demo_options(text)
    else:
        assert expected == getattr(demo_options(text), text.partition(":")[0])


def test_variables_never_make_structure(monkeypatch: pytest.MonkeyPatch) -> None:
    """The value of a variable that looks like YAML stays a string."""
    monkeypatch.setenv("SINKS", "{a: {type: jsonl}}")
    wanted = "a mapping of one name or more to sinks"
    assert [f"1: sinks: found a string, expected {wanted}"] == problems("sinks: ${SINKS}")


@pytest.mark.usefixtures("demo")
@pytest.mark.parametrize(
    "text",
    [
        "project: ${VALUE}",
        "project: x${VALUE:-y}",
        "project: taken-${LETTERS}",
        "mode: ${VALUE}",
        "port: ${VALUE}",
        "port: ${NUMBER}",
        "verbose: ${NUMBER}",
        "rate: ${VALUE:-hunter2-s3cret}",
        "tags: ['${VALUE}']",
        "labels: {a: '${VALUE}'}",
        "every: {train: '${VALUE}'}",
        "include: ${VALUE}",
        "on_error: ${VALUE}",
        "api_key: [hunter2-s3cret]",
        "api_key: {a: hunter2-s3cret}",
        "api_key: ${hunter2-s3cret}",
        "api_key: hunter2-s3cret ${",
        "api_key: *hunter2-s3cret",
        "api_key: !hunter2-s3cret x",
        "api_key: !hunter2!s3cret x",
        "api_key: 'hunter2-s3cret",
        "server: {host: x, password: hunter2-s3cret}",
        "server: {host: {token: hunter2-s3cret}}",
        "my_credentials: hunter2-s3cret",
        "rename: {a: '${VALUE}', b: '${VALUE}'}",
        "rename: {a: '${VALUE}*'}",
        "type: ${VALUE}",
    ],
)
def test_secrets_are_not_shown(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No message repeats the value of a variable, or of a key named like a secret."""
    monkeypatch.setenv("VALUE", SECRET)
    monkeypatch.setenv("LETTERS", "hunter")
    monkeypatch.setenv("NUMBER", "987654")
    with pytest.raises(ConfigError) as caught:
        demo_options(text)
    said = str(caught.value)
    assert [] == [word for word in ("hunter", "s3cret", "987654") if word in said]


@pytest.mark.usefixtures("demo")
def test_refusals_that_repeat_nothing_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a sink says of its options is shown, unless it depends on a value that is hidden."""
    monkeypatch.setenv("KEY", SECRET)
    with pytest.raises(ConfigError, match=r"invalid options: api_key is of no use offline$"):
        demo_options("api_key: ${KEY}\n    mode: offline")
    with pytest.raises(
        ConfigError, match=r"invalid options: \(not shown, as it may contain a hidden"
    ):
        demo_options("project: ${NONE:-taken}")


@pytest.mark.usefixtures("demo")
def test_hidden_type_of_a_plugin_that_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """A type from a variable is not repeated by the error of its import either."""
    monkeypatch.setenv("KIND", "gone")
    assert [
        "1: sinks.a.type: found a string, expected a sink that loads: `trainbus plugins` says why it "
        "can't"
    ] == problems('sinks: {a: {type: "${KIND}"}}')


def test_another_process_reads_the_variables_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is pickled to make the bus anew is the text, without the values of variables."""
    monkeypatch.setenv("FOLDER", SECRET)
    bus = config.loads('sinks: {a: {type: jsonl, path: "${FOLDER}/x"}}', name="a.yaml")
    pickled = pickle.dumps(bus.settings.rebuild)
    assert SECRET.encode() not in pickled
    monkeypatch.setenv("FOLDER", "other")
    rebuilt = pickle.loads(pickled)()
    assert isinstance(rebuilt, Bus)
    assert os.path.abspath("other/x") == options(rebuilt)[0].path


def test_load_and_check(folder: Path) -> None:
    """`trainbus.load` reads a file, with or without a byte-order mark, and `check` finds no problem."""
    file = folder / "a.yaml"
    for start in (b"", b"\xef\xbb\xbf"):
        file.write_bytes(start + ONE_SINK.encode())
        assert [] == config.check(file)
        assert ["a"] == [route.name for route in trainbus.load(file).settings.sinks]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_load(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each file in config/ loads without any environment variable."""
    for name in list(os.environ):
        monkeypatch.delenv(name)
    assert [] == config.check(path)


def test_examples_are_all_there() -> None:
    """The test above covers the files that the documentation names."""
    assert {"everything.yaml", "local.yaml", "wandb-offline.yaml", "wandb.yaml"} <= {
        path.name for path in EXAMPLES
    }


# Whatever the text ------------------------------------------------------------------------------

SPLINTERS = """version run sinks type jsonl wandb path include exclude rename every on_error train
    isolation process flush_secs journal dir max_bytes redact
    project tags mode offline 1 0 -1 .nan .inf 1e9 yes null ~ 2024-01-01 << * &a *a ! !!int !!set ? -
    : [ ] { } | > # ' " % @ ` , --- ... ${ ${PATH} ${PATH:-x} ${NOT_SET_ANYWHERE} $${ $ é 漢"""
WORDS = st.sampled_from([*SPLINTERS.split(), "\\", "\u2028", "\x85"])
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | WORDS | st.text(max_size=8)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORDS | SCALARS, inner, max_size=4),
    max_leaves=12,
)
FILES = st.fixed_dictionaries(
    {},
    optional={
        "version": VALUES,
        "run": VALUES | st.dictionaries(WORDS, VALUES, max_size=4),
        "isolation": VALUES,
        "flush_secs": VALUES,
        "journal": VALUES
        | st.fixed_dictionaries({}, optional=dict.fromkeys(("dir", "max_bytes", "redact"), VALUES)),
        "sinks": VALUES
        | st.dictionaries(
            WORDS,
            st.fixed_dictionaries(
                {"type": st.sampled_from(["jsonl", "wandb"])},
                optional=dict.fromkeys(
                    ("path", "mode", "include", "rename", "tags", "isolation"), VALUES
                ),
            ),
            max_size=3,
        ),
    },
)
SPACED = st.lists(WORDS | st.sampled_from([" ", "  ", "\n", "\n  ", "\n    ", "\t"]), max_size=40)
DUMPED = (VALUES | FILES).map(lambda value: yaml.safe_dump(value, allow_unicode=True))


@settings(deadline=None, max_examples=400)
@given(text=st.text() | SPACED.map("".join) | DUMPED)
def test_any_text_is_a_bus_or_lines(text: str) -> None:
    """Any file content results in a bus, or in lines that name the file."""
    said: tuple[str, ...] = ()
    try:
        assert len(config.loads(text, name="any.yaml").settings.sinks) > 0
    except ConfigError as error:
        said = error.problems or ("nothing",)
    assert [] == [line for line in said if not re.match(r"any\.yaml:[ 1-9]", line)]
    assert [] == [line for line in said if not line.isprintable()]


@settings(deadline=None, max_examples=100)
@given(data=st.binary() | DUMPED.map(str.encode))
def test_any_bytes_are_checked(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    """`check` accepts any bytes and never raises."""
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(data)
    assert all(line.startswith(f"{path}:") for line in config.check(path))


# The schema ----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("demo")
def test_schema_describes_every_sink_that_loads() -> None:
    """The schema has the sinks that load, with their own and the common keys, and no others."""
    schema = json_schema()
    names = {"version", "run", "isolation", "flush_secs", "journal", "sinks"}
    names |= {"environment", "system_secs", "console"}
    assert names == set(schema["properties"])
    assert (["sinks"], False) == (schema["required"], schema["additionalProperties"])
    sink = schema["properties"]["sinks"]["additionalProperties"]
    assert ["demo", "jsonl"] == sink["properties"]["type"]["anyOf"][0]["enum"]
    assert ["demo", "jsonl"] == [c["if"]["properties"]["type"]["const"] for c in sink["allOf"]]
    demo = schema["$defs"]["sink.demo"]
    assert {*SINK_KEYS, *DemoOptions.__struct_fields__} == set(demo["properties"])
    assert (["type", "project"], False) == (demo["required"], demo["additionalProperties"])
    assert "Keeps nothing." == demo["description"]
    assert "What the run belongs to" == demo["properties"]["project"]["description"]
    ours = {key: demo["properties"][key] for key in SINK_KEYS if key != "type"}
    parts = [schema["$defs"][name]["properties"] for name in ("RunDefaults", "JournalSpec")]
    keys = [*ours.values(), *(key for part in parts for key in part.values())]
    # What stands for each sink is described by the sink.
    keys += [key for name, key in schema["properties"].items()]
    assert [] == [key for key in keys if not key.get("description")]
    assert {"auto", "process", "thread", "inline"} == set(
        schema["properties"]["isolation"]["anyOf"][0]["enum"]
    )


def test_schema_of_sinks_with_the_same_options(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of two sinks that share a class of options is described by itself."""
    points = {
        name: EntryPoint(name, f"{__name__}:DemoSink", registry.SINKS) for name in ("one", "two")
    }
    monkeypatch.setattr(registry, "plugins", lambda group: points)
    one, two = (json_schema()["$defs"][f"sink.{name}"] for name in points)
    assert ("one", "two") == (
        one["properties"]["type"]["const"],
        two["properties"]["type"]["const"],
    )
    assert ["type", "project"] == one["required"] == two["required"]


@pytest.mark.usefixtures("demo")
def test_schema_lets_variables_stand_for_scalars() -> None:
    """The schema allows a variable wherever the loader substitutes one."""
    variable = {"type": "string", "pattern": r"\$\{"}
    keys = json_schema()["$defs"]["sink.demo"]["properties"]
    for key in ("project", "mode", "port", "rate", "verbose", "on_error"):
        assert variable == keys[key]["anyOf"][-1]
    assert variable == keys["tags"]["items"]["anyOf"][-1]
    assert variable == keys["labels"]["additionalProperties"]["anyOf"][-1]
    assert [{"type": "string"}, {"type": "null"}] == keys["api_key"]["anyOf"]


@pytest.mark.usefixtures("demo")
@pytest.mark.parametrize(
    ("text", "is_good"),
    [
        ("sinks: {a: {type: jsonl}}", True),
        ("version: 1\nrun:\nsinks: {a: {type: jsonl, path: x, include: [y]}}", True),
        ("sinks:\n a:\n  type: demo\n  project: x\n  port: ${PORT}\n  tags: ['${T}']", True),
        ("sinks: {a: {type: '${KIND}', whatever: 1}}", True),
        ("sinks: {a: {type: demo}}", False),
        ("sinks: {a: {type: demo, project: x, port: '80'}}", False),
        ("sinks: {a: {type: demo, project: X}}", False),
        ("sinks: {a: {type: jsonl, project: x}}", False),
        ("sinks: {a: {type: jsnol}}", False),
        ("sinks: {a: {type: jsonl, every: {train: 0}}}", False),
        ("sinks: {a: {type: jsonl, include: []}}", False),
        ("sinks: {}", False),
        ("sinks: {a.b_c-D9: {type: jsonl}}", True),
        ("sinks: {'a b': {type: jsonl}}", False),
        ('sinks: {"a\\n": {type: jsonl}}', False),
        ("version: 2\nsinks: {a: {type: jsonl}}", False),
        ("run: {nmae: x}\nsinks: {a: {type: jsonl}}", False),
        ("jurnal: {}\nsinks: {a: {type: jsonl}}", False),
        ("journal: {}\nisolation: inline\nflush_secs: 0\nsinks: {a: {type: jsonl}}", True),
        ("journal:\nsinks: {a: {type: jsonl, isolation: thread}}", True),
        ("journal: {dir: x, max_bytes: 1048576, redact: [a]}\nsinks: {a: {type: jsonl}}", True),
        ("isolation: ${MODE:-auto}\nflush_secs: ${S:-1}\nsinks: {a: {type: jsonl}}", True),
        ("journal: {max_bytes: 1048575}\nsinks: {a: {type: jsonl}}", False),
        ("journal: {dri: x}\nsinks: {a: {type: jsonl}}", False),
        ("journal: {dir: ''}\nsinks: {a: {type: jsonl}}", False),
        ("isolation: forked\nsinks: {a: {type: jsonl}}", False),
        ("isolation:\nsinks: {a: {type: jsonl}}", False),
        ("flush_secs: -0.1\nsinks: {a: {type: jsonl}}", False),
        ("sinks: {a: {type: jsonl, isolation: forked}}", False),
    ],
)
def test_schema_agrees_with_the_loader(
    text: str, is_good: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An editor that validates by the schema says the same of a file as the loader does."""
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(json_schema())
    assert is_good == validator.is_valid(yaml.safe_load(text))
    if "KIND" not in text:
        monkeypatch.setenv("PORT", "80")
        monkeypatch.setenv("T", "t")
        assert is_good == _loads(text)


def _loads(text: str) -> bool:
    try:
        config.loads(text)
    except ConfigError:
        return False
    return True


def test_a_default_that_is_spelled_out_names_no_other_cursor() -> None:
    """A replay finds the cursor whether a key is left out or has its default; other values differ."""
    keys = [
        trainbus.config.loads(f"sinks: {{a: {{type: html{more}}}}}").settings.sinks[0].key
        for more in ("", ", points: 2000", ", points: 1000")
    ]
    assert [True, False] == [key == keys[0] for key in keys[1:]]


def test_schema_is_json() -> None:
    """The schema with the real sinks is plain JSON, and every reference in it has its aim."""
    schema = json_schema()
    assert schema == json.loads(json.dumps(schema))
    refs = {part.split('"')[0] for part in json.dumps(schema).split('"#/$defs/')[1:]}
    assert refs == set(schema["$defs"])
