"""The `trainbus` command: what it prints, where, and with which exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from typer.testing import CliRunner

import trainbus
from trainbus import Record, Sink, config, events, registry
from trainbus.cli import app
from trainbus.config.schema import json_schema

GOOD = "sinks: {a: {type: jsonl}, b: {type: jsonl, path: x}}\n"


class NoteSink(Sink):
    """Keeps [bold]nothing[/bold].

    And says more about it.
    """

    def write(self, records: Sequence[Record]) -> None:
        """Take the records."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, which is the working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*args: str) -> tuple[int, str, str]:
    """Run the command in this process; return exit code, stdout and stderr."""
    result = CliRunner().invoke(app.app, args, prog_name="trainbus")
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.exit_code, result.stdout, result.stderr


def run_process(
    folder: Path, *args: str, code: str | None = None, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run the command, or Python code in its place, in a process of its own."""
    command = ["-c", code] if code else ["-m", "trainbus"]
    return subprocess.run(
        [sys.executable, *command, *args],
        cwd=folder,
        env={**os.environ, **env},
        capture_output=True,
        encoding="utf-8",
        timeout=400,
        check=False,
    )


def test_validate_good_files(folder: Path) -> None:
    """A good file is one line on stdout with its sinks, and the exit code is 0."""
    (folder / "a.yaml").write_text(GOOD)
    (folder / "b.yaml").write_text("sinks: {only: {type: jsonl}}")
    said = "a.yaml: ok, 2 sinks: a (jsonl), b (jsonl)\nb.yaml: ok, 1 sink: only (jsonl)\n"
    assert (0, said, "") == run("validate", "a.yaml", "b.yaml")


def test_validate_reports_every_file(folder: Path) -> None:
    """A problem in one file hides neither those in the next file nor the valid files."""
    (folder / "a.yaml").write_text("sinks: {a: {type: jsonl, pth: x}}\n")
    (folder / "b.yaml").write_text(GOOD)
    code, out, err = run("validate", "a.yaml", "b.yaml", "c.yaml")
    assert (2, "b.yaml: ok, 2 sinks: a (jsonl), b (jsonl)\n") == (code, out)
    assert [*config.check("a.yaml"), *config.check("c.yaml")] == err.splitlines()


def test_validate_does_not_wrap(folder: Path) -> None:
    """A long line stays one line, and markup in it stays text."""
    file, name = f"{'long' * 40}[red].yaml", "name" * 40
    (folder / file).write_text(f"sinks: {{{name}: {{type: jsonl}}}}\n")
    assert (0, f"{file}: ok, 1 sink: {name} (jsonl)\n", "") == run("validate", file)


def test_control_characters_are_escaped(folder: Path) -> None:
    """A name can't move the cursor or colour the terminal."""
    (folder / "a\x1b[2J.yaml").write_text("sinks: {a: {type: jsonl}}")
    said = "a\\x1b[2J.yaml: ok, 1 sink: a (jsonl)\n"
    assert (0, said, "") == run("validate", "a\x1b[2J.yaml")
    (folder / "b.yaml").write_text('sinks: {"a\\n\\e[31m": {type: "x\\e"}}')
    known = ", ".join(registry.plugins(registry.SINKS))
    said = (
        "b.yaml:1: sinks: found 'a\\n\\x1b[31m' as a key, expected a name of letters, digits, `_`, "
        "`.` and `-`\n"
        f"b.yaml:1: sinks.'a\\n\\x1b[31m'.type: found 'x\\x1b', expected one of {known}\n"
    )
    assert (2, "", said) == run("validate", "b.yaml")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("sinks:\n\ta: 1\n", "a.yaml:2:1: found bad YAML: found character '\\t' "),
        (
            "sinks:\n  a:\n    type: jsnl\n",
            "a.yaml:3: sinks.a.type: found 'jsnl', expected one of ",
        ),
        ("run: {nmae: x}\nsinks: {a: {type: jsonl}}", "a.yaml:1: run.nmae: found an unknown key, "),
        ("[" * 3000, "a.yaml: found too many levels, expected 30 at most"),
        (
            "sinks: {a: {type: wandb, mode: ofline}}",
            "a.yaml:1: sinks.a.mode: found 'ofline', expected one of 'disabled', 'offline', "
            "'online', 'shared', did you mean 'offline'?",
        ),
        (
            "sinks: {a: {type: wandb, project: a/b}}",
            "a.yaml:1: sinks.a.project: found 'a/b', expected a W&B project name: ",
        ),
    ],
)
def test_validate_in_a_process(text: str, line: str, folder: Path) -> None:
    """The real command prints the problem on stderr and exits with 2, without a traceback."""
    (folder / "a.yaml").write_text(text)
    done = run_process(folder, "validate", "a.yaml")
    assert (2, "") == (done.returncode, done.stdout)
    assert (line, 1) == (done.stderr[: len(line)], done.stderr.count("\n"))


def test_narrow_encoding(folder: Path) -> None:
    """A terminal that can't show a name gets an escape, and no traceback."""
    (folder / "指標.yaml").write_text("sinks: {a: {type: jsonl}}")
    done = run_process(folder, "validate", "指標.yaml", PYTHONIOENCODING="latin-1")
    said = "\\u6307\\u6a19.yaml: ok, 1 sink: a (jsonl)\n"
    assert (0, said, "") == (done.returncode, done.stdout, done.stderr)


def test_validate_writes_nothing(folder: Path) -> None:
    """Checking a file makes no journal, and no file of a sink."""
    (folder / "a.yaml").write_text(f"journal: {{dir: runs}}\nisolation: inline\n{GOOD}")
    assert 0 == run("validate", "a.yaml")[0]
    assert ["a.yaml"] == [path.name for path in folder.iterdir()]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("flush_secs: -1", "flush_secs: found the number -1, expected a number (at least 0)"),
        (
            "isolation: thred",
            "isolation: found 'thred', expected one of 'auto', 'inline', 'process', 'thread', "
            "did you mean 'thread'?",
        ),
        (
            "journal: {path: x}",
            "journal.path: found an unknown key, expected one of dir, max_bytes, redact",
        ),
    ],
)
def test_validate_knows_the_journal_and_where_sinks_run(text: str, said: str, folder: Path) -> None:
    """A problem with these keys is one line with its place, as with any other key."""
    (folder / "a.yaml").write_text(f"{text}\n{GOOD}")
    assert (2, "", f"a.yaml:1: {said}\n") == run("validate", "a.yaml")


def test_validate_is_light(folder: Path) -> None:
    """Checking a file for W&B imports neither wandb nor a framework."""
    (folder / "a.yaml").write_text("sinks: {a: {type: wandb, mode: offline}}")
    code = (
        "import sys\nfrom trainbus.cli.app import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "heavy = {'wandb', 'torch', 'ultralytics', 'pandas', 'matplotlib'}\n"
        "print(sorted(heavy & sys.modules.keys()))\n"
    )
    done = run_process(folder, "validate", "a.yaml", code=code)
    assert ("a.yaml: ok, 1 sink: a (wandb)\n[]\n", "") == (done.stdout, done.stderr)


def test_console_script_is_main() -> None:
    """The installed script calls the same function as `python -m trainbus`."""
    from importlib.metadata import entry_points

    (script,) = entry_points(group="console_scripts", name="trainbus")
    assert app.main is script.load()


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["validate"], "Missing argument"),
        (["validat", "a.yaml"], "No such command 'validat'"),
        (["schema", "--event"], "No such option"),
        (["--verison"], "No such option"),
    ],
)
def test_wrong_command_line(args: list[str], said: str) -> None:
    """A command line that makes no sense ends with 2 and says why on stderr."""
    code, out, err = run(*args)
    assert (2, "") == (code, out)
    assert said in err


def test_no_command_shows_help() -> None:
    """Without a command the commands are listed."""
    _, out, err = run()
    names = [
        command.name or command.callback.__name__
        for command in app.app.registered_commands
        if command.callback
    ]
    assert {"validate", "plugins", "schema", "replay", "show"} <= set(names)
    assert [] == [name for name in names if name not in out + err]


def test_version() -> None:
    """`--version` prints the version alone."""
    assert (0, f"{trainbus.__version__}\n", "") == run("--version")


def test_schema() -> None:
    """`schema` prints that of the file, and with `--events` that of a record."""
    code, out, err = run("schema")
    assert (0, json_schema(), "") == (code, json.loads(out), err)
    code, out, err = run("schema", "--events")
    assert (0, json.loads(json.dumps(events.json_schema())), "") == (code, json.loads(out), err)


def test_plugins() -> None:
    """`plugins` lists what is installed with its package, and that it loads."""
    code, out, err = run("plugins")
    assert (0, "") == (code, err)
    (row,) = [line for line in out.splitlines() if "trainbus.sinks.jsonl" in line]
    cells = [cell.strip() for cell in row.strip("│").split("│")]
    assert [
        "sink",
        "jsonl",
        f"trainbus {trainbus.__version__}",
        "trainbus.sinks.jsonl:JsonlSink",
        "yes",
        "Appends each record to a file as one line of JSON.",
    ] == cells
    assert "trainbus.adapters.ultralytics:attach" in out


def test_plugins_that_do_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plugin that can't be imported is listed with the reason; markup and controls are text."""
    values = {"note\x1b[2J": f"{__name__}:NoteSink", "gone": "no_such_package_of_ours:Sink"}
    points = {name: EntryPoint(name, value, registry.SINKS) for name, value in values.items()}
    monkeypatch.setattr(
        registry, "plugins", lambda group: points if group == registry.SINKS else {}
    )
    code, out, _ = run("plugins")
    rows = {
        cells[1]: cells[2:]
        for line in out.splitlines()
        if len(cells := [cell.strip() for cell in line.strip("│").split("│")]) == 6 and cells[0]
    }
    assert 0 == code
    assert ["unknown", f"{__name__}:NoteSink", "yes", "Keeps [bold]nothing[/bold]."] == rows[
        "note\\x1b[2J"
    ]
    assert ["unknown", "no_such_package_of_ours:Sink", "no"] == rows["gone"][:3]
    assert "ModuleNotFoundError" in out


@pytest.fixture
def without_plotly(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process in which plotly is not installed."""
    monkeypatch.setitem(sys.modules, "plotly", None)


def about_plugins() -> dict[tuple[str, str], tuple[str, str]]:
    """Return whether each plugin loads and what is said of it, by kind and name."""
    found: dict[tuple[str, str], tuple[str, str]] = {}
    for line in run("plugins")[1].splitlines():
        cells = [cell.strip() for cell in line.strip("│").split("│")]
        if len(cells) != 6:
            continue
        kind, name, _, _, loads, about = cells
        if kind in ("sink", "adapter"):
            last, found[kind, name] = (kind, name), (loads, about)
        elif not kind and about:  # a long text goes on in the next line
            found[last] = (found[last][0], f"{found[last][1]} {about}")
    return found


@pytest.mark.usefixtures("without_plotly")
@pytest.mark.needs("keras", "tensorboard")
def test_plugins_name_the_package_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plugin whose package is not installed does not load, and what installs it is said."""
    monkeypatch.setitem(sys.modules, "stable_baselines3", None)
    found = about_plugins()
    text = "the package '{0}' is not installed; run `pip install 'trainbus[{1}]'`"
    assert ("no", text.format("plotly", "html")) == found["sink", "html"]
    assert ("no", text.format(*["stable_baselines3"] * 2)) == found["adapter", "stable_baselines3"]
    assert ("yes", "yes") == (found["sink", "tensorboard"][0], found["adapter", "keras"][0])


@pytest.mark.usefixtures("without_plotly")
@pytest.mark.parametrize("more", [[], ["--check"]])
def test_validate_names_the_package_that_is_missing(more: list[str], folder: Path) -> None:
    """A sink that can't be opened is a problem of the file; the line says what to install."""
    (folder / "a.yaml").write_text("sinks: {page: {type: html}, b: {type: jsonl}}")
    said = "the package 'plotly' is not installed; run `pip install 'trainbus[html]'`"
    assert (2, "", f"a.yaml: sinks.page: {said}\n") == run("validate", *more, "a.yaml")


def test_validate_check_tries_each_sink(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was found is a line a sink; what would fail is one on stderr, and exit code 2."""
    (folder / "file").write_text("")
    (folder / "a.yaml").write_text(
        "sinks:\n  good: {type: jsonl, path: 'out/{run}.jsonl'}\n"
        "  bad: {type: jsonl, path: file/below.jsonl}\n"
        "  offline: {type: wandb, mode: offline}\n  screen: {type: console}\n"
    )
    code, out, err = run("validate", "--check", "a.yaml")
    assert 2 == code
    assert [
        "a.yaml: ok, 4 sinks: good (jsonl), bad (jsonl), offline (wandb), screen (console)",
        f"  good (jsonl): ok, {folder}/out can be written",
        "  offline (wandb): ok, offline, nothing to log in to",
        "  screen (console): ok",
    ] == out.splitlines()
    said = f"  bad (jsonl): can't write below {folder}/file: Not a directory; set another folder\n"
    assert said == err
    assert {"a.yaml", "file"} == set(os.listdir(folder)), "nothing was started or written"


def test_validate_check_needs_a_login(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a login W&B's sink says how to get one."""
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    (folder / "a.yaml").write_text("sinks: {tracking: {type: wandb, mode: online}}")
    code, _, err = run("validate", "--check", "a.yaml")
    assert 2 == code
    assert "  tracking (wandb): W&B can't be used (" in err
    assert "run `wandb login`, set WANDB_API_KEY" in err


QUIET = {"TRACKIO_DIR": "trackio", "MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "1"}
CHECKED = """
sinks:
  board: {type: tensorboard, logdir: 'board/{run}'}
  registry: {type: mlflow, tracking_uri: 'sqlite:///mlflow.db'}
  local: {type: trackio}
  page: {type: html}
  tables: {type: csv}
  comet: {type: comet, mode: offline}
  clear: {type: clearml}
  swan: {type: swanlab, mode: offline}
  dvc: {type: dvclive}
  messages: {type: notify, urls: ['json://127.0.0.1:9/']}
  live: {type: prometheus, port: 0}
"""


@pytest.mark.needs("tensorboard", "mlflow", "trackio", "plotly", "comet_ml", "clearml")
@pytest.mark.needs("swanlab", "dvclive", "apprise", "prometheus_client")
def test_validate_check_tries_every_kind_of_sink(folder: Path) -> None:
    """Each sink says what it found, and none starts a run or leaves a file."""
    (folder / "a.yaml").write_text(CHECKED)
    done = run_process(folder, "validate", "--check", "a.yaml", HOME=str(folder.parent), **QUIET)
    assert 0 == done.returncode, done.stderr
    lines = done.stdout.splitlines()[1:]
    assert 11 == len(lines)
    for line in lines:
        assert "): ok, " in line, line
    assert {"a.yaml"} == {path.name for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("sink", "text"),
    [
        ("{type: csv, dir: 'a.yaml/{run}'}", "can't write below"),
        pytest.param(
            "{type: mlflow, tracking_uri: 'http://127.0.0.1:9'}",
            "no MLflow server answers at http",
            marks=pytest.mark.needs("mlflow"),
        ),
        pytest.param(
            "{type: notify, urls: ['nonsense://x']}",
            "found a URL that Apprise does not accept",
            marks=pytest.mark.needs("apprise"),
        ),
        pytest.param(
            "{type: comet, mode: online}",
            "found no API key for Comet",
            marks=pytest.mark.needs("comet_ml"),
        ),
        pytest.param(
            "{type: prometheus, address: 203.0.113.1}",
            "can't listen on port 9464 of 203.0.113.1",
            marks=pytest.mark.needs("prometheus_client"),
        ),
    ],
)
def test_validate_check_says_what_would_fail(folder: Path, sink: str, text: str) -> None:
    """A server that is down, a wrong address, a missing key: one line that says what to do."""
    (folder / "a.yaml").write_text(f"sinks: {{one: {sink}}}")
    done = run_process(folder, "validate", "--check", "a.yaml", HOME=str(folder.parent), **QUIET)
    assert 2 == done.returncode
    assert text in done.stderr
