"""The commands of `trainbus`: validate configuration, run a training, and work with recorded runs.

Exit codes: 0 for success, 1 if records are damaged or were not sent, 2 if a file or the command
line is not valid. Errors go to stderr, one plain line each, for editors and scripts to parse.
"""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import trainbus
from trainbus import config, events, redaction, registry
from trainbus.cli import launch
from trainbus.config.schema import json_schema
from trainbus.delivery.spec import SinkSpec
from trainbus.errors import ConfigError, JournalError, TrainbusError
from trainbus.journal.directory import RunFolder
from trainbus.paths import working_directory
from trainbus.text import printable

if TYPE_CHECKING:
    from rich.progress import TaskID
    from rich.table import Table
    from rich.text import Text


_WIDTH_WITHOUT_TERMINAL = 200

app = typer.Typer(
    help="Attach once to any trainer; every metric, plot, curve and model reaches any tracker.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Run the command line; the entry point of the console script."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a limited encoding must not cause a traceback
            stream.reconfigure(errors="backslashreplace")
    app(prog_name="trainbus")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(trainbus.__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Define the options before a command."""


@app.command()
def validate(
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help="YAML files to check.")],
    check: Annotated[
        bool,
        typer.Option("--check", help="Also check each sink's login, address and permissions."),
    ] = False,
) -> None:
    """Check configuration files without starting a run."""
    sound = True
    for file in files:
        try:
            bus = config.load(file)
            if missing := _missing(file, bus.settings.sinks):
                raise ConfigError(missing)
        except ConfigError as error:
            sound = False
            for problem in error.problems:
                typer.echo(problem, err=True)
        else:
            routes = bus.settings.sinks
            count = "1 sink" if len(routes) == 1 else f"{len(routes)} sinks"
            sinks = ", ".join(f"{route.name} ({route.kind})" for route in routes)
            typer.echo(printable(f"{file}: ok, {count}: {sinks}"))
            if check:
                with _working_in(bus.settings.base):
                    found = [_check_sink(route) for route in routes]
                sound = sound and all(found)
    if not sound:
        raise typer.Exit(2)


def _missing(file: str, routes: Sequence[SinkSpec]) -> list[str]:
    """Return a line for each sink whose package is not installed."""
    found = []
    known = registry.plugins(registry.SINKS)
    for route in routes:
        text = registry.missing_package(known[route.kind], registry.sink_class(route.kind))
        if text is not None:
            found.append(printable(f"{file}: sinks.{route.name}: {text}"))
    return found


def _check_sink(route: SinkSpec) -> bool:
    """Check what a sink needs, and print the result."""
    about = f"  {route.name} ({route.kind}): "
    try:
        found = route.make().check()
    except Exception as error:
        text = str(error) if isinstance(error, TrainbusError) else repr(error)
        typer.echo(printable(about + " ".join(redaction.text(text).split())), err=True)
        return False
    typer.echo(printable(f"{about}ok{f', {found}' if found else ''}"))
    return True


@app.command()
def plugins() -> None:
    """List the installed sinks and adapters, and whether each can be used."""
    table = _table("kind", "name", "package", "entry point", "loads", "about")
    for kind, group in (("sink", registry.SINKS), ("adapter", registry.ADAPTERS)):
        for name, point in registry.plugins(group).items():
            package = f"{point.dist.name} {point.dist.version}" if point.dist else "unknown"
            cells = (kind, name, package, point.value, *_loaded(point))
            table.add_row(*(_text(cell) for cell in cells))
    _print(table)


@app.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
def run(
    file: Annotated[str, typer.Option("--config", "-c", help="Configuration file (YAML).")],
    command: Annotated[
        list[str],
        typer.Argument(metavar="-- COMMAND...", help="Training command and its arguments."),
    ],
    name: Annotated[str | None, typer.Option(help="Run name.")] = None,
    tag: Annotated[
        list[str] | None, typer.Option(help="Tag to add to the runs; may be repeated.")
    ] = None,
) -> None:
    """Run a command and record every training in it and in its Python child processes.

    The command needs no changes: `trainbus run -c sinks.yaml -- python train.py`. Its output and
    exit code stay the same.
    """
    with _faults():
        config.load(file)
        try:
            launch.exec_command(file, command, name=name, tags=tag or ())
        except OSError as error:
            typer.echo(printable(f"{command[0]}: {error.strerror}"), err=True)
            raise typer.Exit(127 if isinstance(error, FileNotFoundError) else 126) from error


@app.command()
def doctor() -> None:
    """Show the installed frameworks and trackers, the tested versions, and missing hooks."""
    from trainbus.cli.doctor import examine

    sound = True
    table = _table("package", "installed", "tested with", "state")
    for package in examine():
        sound = sound and not package.missing
        cells = (package.name, package.installed or "-", package.tested, package.state)
        table.add_row(*(_text(cell) for cell in cells))
    _print(table)
    if not sound:
        raise typer.Exit(1)


@app.command()
def replay(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="Directory of a run.")],
    file: Annotated[str, typer.Option("--config", "-c", help="Configuration file (YAML).")],
    first: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="SEQ",
            help="Send all records from this one on again; ATTEMPT:SEQ if the run has several "
            "attempts.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be sent without sending it.")
    ] = False,
    files_from: Annotated[
        list[str] | None,
        typer.Option(
            "--files-from",
            metavar="DIR",
            help="Folder outside of the run's directory whose files may be sent; repeatable.",
        ),
    ] = None,
) -> None:
    """Send the records of a run that the configured sinks have not received yet."""
    from trainbus.delivery import replay as replays

    with _faults():
        bus = config.load(file)
        routes = bus.settings.sinks
        run = RunFolder.existing(folder)
        after = _position(first, run)
        if dry_run:
            for plan in replays.plan(run, routes, after=after):
                count = "1 record" if plan.missing == 1 else f"{plan.missing} records"
                typer.echo(printable(f"{plan.sink} ({plan.kind}): {count} would be sent"))
            return
        trusted = _folders("--files-from", files_from)
        with _progress() as progress, _working_in(bus.settings.base):
            receipt, files = replays.replay(
                run,
                routes,
                after=after,
                trusted=trusted,
                config=bus.settings.config,
                on_progress=lambda at: progress(f"to {at.sink}", at.done, at.total),
            )
    typer.echo(str(receipt))
    faults = [*files.damaged, *files.changed]
    for fault in faults:
        typer.echo(printable(fault), err=True)
    if refused := sorted(set(files.refused)):
        folders = " ".join(
            f"--files-from {shlex.quote(p)}" for p in sorted({os.path.dirname(r) for r in refused})
        )
        typer.echo(
            printable(
                f"{len(refused)} files outside of the run's directory were not sent, such as "
                f"{refused[0]}; if you trust the source of this journal, add {folders}"
            ),
            err=True,
        )
    if any(sink.pending or sink.dead for sink in receipt.sinks) or faults:
        raise typer.Exit(1)


@app.command()
def verify(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="Directory of a run.")],
) -> None:
    """Check every record and every blob of a run for damage."""
    from trainbus.journal import verify as verification

    with _faults():
        run = RunFolder.existing(folder)
        total = sum(path.stat().st_size for path in run.path.glob("*.jsonl"))
        with _progress() as progress:
            reports = verification.verify(run, lambda done: progress("checked", done, total))
    for report in reports:
        counts = [f"{report.records} records"]
        for number, word in (
            (report.damaged, "damaged"),
            (report.missing, "missing"),
            (report.torn, "bytes of an incomplete line"),
        ):
            counts += [f"{number} {word}"] if number else []
        typer.echo(printable(f"{report.file}: {', '.join(counts)}, {report.state}"))
        for fault in report.faults:
            typer.echo(printable(f"  {fault}"), err=True)
    if not all(report.is_sound for report in reports):
        raise typer.Exit(1)


@app.command()
def show(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="Directory of a run.")],
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Update until the run has ended.")
    ] = False,
) -> None:
    """Show a run: parameters, epochs, checkpoints, and the state of each sink."""
    from trainbus.cli import show as shows

    with _faults():
        run = RunFolder.existing(folder)
        width = None if sys.stdout.isatty() else _WIDTH_WITHOUT_TERMINAL
        shows.show(run, follow=follow, width=width)


@app.command()
def compare(
    folders: Annotated[
        list[str],
        typer.Argument(metavar="DIR...", help="Directories of runs, or their HTML pages."),
    ],
    out: Annotated[
        str, typer.Option("--out", "-o", help="Folder for the page.")
    ] = "trainbus-pages/compare",
    files_from: Annotated[
        list[str] | None,
        typer.Option("--files-from", help="Folder whose files may be shown; repeatable."),
    ] = None,
) -> None:
    """Write an HTML page that compares runs: metrics in shared charts, parameters that differ."""
    from trainbus.cli.compare import compare as write

    with _faults():
        trusted = _folders("--files-from", files_from)
        page = write([Path(folder) for folder in folders], Path(out), trusted)
        typer.echo(printable(str(page.absolute())))


@app.command()
def schema(
    of_events: Annotated[
        bool,
        typer.Option(
            "--events",
            help="Print the schema of event records instead of the configuration file.",
        ),
    ] = False,
) -> None:
    """Print the JSON Schema of the configuration file, for editors."""
    found = events.json_schema() if of_events else json_schema()
    typer.echo(json.dumps(found, indent=2, ensure_ascii=False))


def _table(*columns: str) -> Table:
    from rich.table import Table

    return Table(*columns)


def _text(cell: str) -> Text:
    from rich.text import Text

    return Text(printable(cell), overflow="fold")


def _print(table: Table) -> None:
    from rich.console import Console

    width = None if sys.stdout.isatty() else _WIDTH_WITHOUT_TERMINAL
    Console(width=width).print(table)


@contextmanager
def _faults() -> Iterator[None]:
    """Print errors as lines, and exit with code 2."""
    try:
        yield
    except ConfigError as error:
        for problem in error.problems:
            typer.echo(problem, err=True)
        raise typer.Exit(2) from error
    except (TrainbusError, OSError) as error:
        typer.echo(printable(str(error)), err=True)
        raise typer.Exit(2) from error


@contextmanager
def _working_in(folder: Path | None) -> Iterator[None]:
    """Change to the folder that relative paths in the options of sinks are relative to."""
    before = working_directory()
    if folder is None or before is None or not os.access(folder, os.X_OK):
        yield
        return
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """Show a progress bar, if stderr is a terminal."""
    if not sys.stderr.isatty():
        yield lambda what, done, total: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, TaskID] = {}

        def progress(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(printable(what), total=total)
            bars.update(tasks[what], completed=done)

        yield progress


def _folders(option: str, given: list[str] | None) -> list[str]:
    """Return the absolute paths of the folders given with an option."""
    for folder in given or []:
        if not folder.strip():
            raise JournalError(f"{option}: found an empty name, expected a folder")
        if not os.path.isdir(folder):
            raise JournalError(f"{option}: found no folder {folder!r}, expected one that exists")
    return [os.path.abspath(folder) for folder in given or []]


def _position(text: str | None, run: RunFolder) -> tuple[int, int] | None:
    """Return the position before the record given with `--from`."""
    if text is None:
        return None
    match = re.fullmatch(r"(?:(\d{1,6}):)?(\d{1,15})", text)
    attempts = run.attempts()
    if match is None or int(match[2]) < 1:
        raise JournalError(f"--from: found {text!r}, expected SEQ or ATTEMPT:SEQ, from 1")
    attempt = int(match[1] or attempts[0])
    if attempt not in attempts:
        known = ", ".join(map(str, attempts))
        raise JournalError(f"--from: found attempt {attempt}, expected one of {known}")
    return attempt, int(match[2]) - 1


def _loaded(point: EntryPoint) -> tuple[str, str]:
    """Return whether a plugin can be used, and the first line of its docstring or the error."""
    try:
        is_sink = point.group == registry.SINKS
        plugin = registry.sink_class(point.name) if is_sink else point.load()
    except Exception as error:
        return "no", " ".join(str(error).split())
    if missing := registry.missing_package(point, plugin):
        return "no", missing
    return "yes", (plugin.__doc__ or "").strip().partition("\n")[0]
