"""The `trainbus` command: checks configuration, and shows, checks and sends what is on disk.

Exit codes: 0 when all is well, 1 when records are damaged or could not be sent, 2 when a file or
the command line has a fault. Faults go to stderr, one plain line each, as editors and scripts read
them; nothing a user writes leads to a traceback.
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
        if isinstance(stream, io.TextIOWrapper):  # a narrow encoding must not end in a traceback
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
    """Hold the options that come before a command."""


@app.command()
def validate(
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help="YAML files to check.")],
    check: Annotated[
        bool,
        typer.Option("--check", help="Try each sink's login, address and rights; starts no run."),
    ] = False,
) -> None:
    """Check configuration files without starting anything."""
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
                    found = [_try(route) for route in routes]
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


def _try(route: SinkSpec) -> bool:
    """Try what a sink needs, and say what was found."""
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
    """List the installed sinks and adapters, and whether they load and have their packages."""
    table = _table("kind", "name", "package", "entry point", "loads", "about")
    for kind, group in (("sink", registry.SINKS), ("adapter", registry.ADAPTERS)):
        for name, point in registry.plugins(group).items():
            package = f"{point.dist.name} {point.dist.version}" if point.dist else "unknown"
            cells = (kind, name, package, point.value, *_loaded(point))
            table.add_row(*(_text(cell) for cell in cells))
    _print(table)


@app.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
def run(
    file: Annotated[str, typer.Option("--config", "-c", help="YAML file with the sinks.")],
    command: Annotated[
        list[str], typer.Argument(metavar="-- COMMAND...", help="What trains, with its arguments.")
    ],
) -> None:
    """Run a command, and log every training in it and in its Python children.

    The command needs no line of code for it: `trainbus run -c sinks.yaml -- python train.py`. Its
    output and exit code are its own.
    """
    with _faults():
        config.load(file)
        try:
            launch.become(file, command)
        except OSError as error:
            typer.echo(printable(f"{command[0]}: {error.strerror}"), err=True)
            raise typer.Exit(127 if isinstance(error, FileNotFoundError) else 126) from error


@app.command()
def doctor() -> None:
    """Show what is installed, what it was tested with, and whether its hooks are still there."""
    from trainbus.cli.doctor import examine

    sound = True
    table = _table("package", "installed", "tested with", "state")
    for finding in examine():
        sound = sound and not finding.missing
        cells = (finding.package, finding.installed or "-", finding.tested, finding.state)
        table.add_row(*(_text(cell) for cell in cells))
    _print(table)
    if not sound:
        raise typer.Exit(1)


@app.command()
def replay(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="Directory of a run.")],
    file: Annotated[str, typer.Option("--config", "-c", help="YAML file with the sinks.")],
    first: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="SEQ",
            help="Send from this record on, also what was sent before; ATTEMPT:SEQ where a run "
            "has several attempts.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be sent, and send nothing.")
    ] = False,
    files_from: Annotated[
        list[str] | None,
        typer.Option(
            "--files-from",
            metavar="DIR",
            help="Folder outside of the run's directory whose files may be sent too.",
        ),
    ] = None,
) -> None:
    """Send a run to the sinks of a configuration file, as far as they have not got it."""
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
        with _progress() as tell, _working_in(bus.settings.base):
            receipt, files = replays.replay(
                run,
                routes,
                after=after,
                trusted=trusted,
                config=bus.settings.config,
                tell=lambda at: tell(f"to {at.sink}", at.done, at.total),
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
                f"{refused[0]}; if you trust where this journal comes from, add {folders}"
            ),
            err=True,
        )
    if any(sink.pending or sink.dead for sink in receipt.sinks) or faults:
        raise typer.Exit(1)


@app.command()
def verify(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="Directory of a run.")],
) -> None:
    """Check that every record and every blob of a run is there and whole."""
    from trainbus.journal import verify as verification

    with _faults():
        run = RunFolder.existing(folder)
        total = sum(path.stat().st_size for path in run.path.glob("r*.jsonl"))
        with _progress() as tell:
            findings = verification.verify(run, lambda done: tell("checked", done, total))
    for finding in findings:
        counts = [f"{finding.records} records"]
        for number, word in (
            (finding.damaged, "damaged"),
            (finding.missing, "missing"),
            (finding.torn, "bytes of a torn line"),
        ):
            counts += [f"{number} {word}"] if number else []
        typer.echo(printable(f"{finding.file}: {', '.join(counts)}, {finding.state}"))
        for fault in finding.faults:
            typer.echo(printable(f"  {fault}"), err=True)
    if not all(finding.is_sound for finding in findings):
        raise typer.Exit(1)


@app.command()
def show(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="Directory of a run.")],
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on until the run has ended.")
    ] = False,
) -> None:
    """Show a run: parameters, epochs, checkpoints, and how far each sink is."""
    from trainbus.cli import show as shows

    with _faults():
        run = RunFolder.existing(folder)
        width = None if sys.stdout.isatty() else _WIDTH_WITHOUT_TERMINAL
        shows.show(run, follow=follow, width=width)


@app.command()
def compare(
    folders: Annotated[
        list[str], typer.Argument(metavar="DIR...", help="Directories or pages of runs.")
    ],
    out: Annotated[
        str, typer.Option("--out", "-o", help="Folder of the page.")
    ] = "trainbus-pages/compare",
    files_from: Annotated[
        list[str] | None,
        typer.Option("--files-from", help="Folder whose files may be shown; may be repeated."),
    ] = None,
) -> None:
    """Write one page over several runs: metrics in common charts, parameters that differ."""
    from trainbus.cli.compare import compare as write

    with _faults():
        trusted = _folders("--files-from", files_from)
        page = write([Path(folder) for folder in folders], Path(out), trusted)
        typer.echo(printable(str(page.absolute())))


@app.command()
def schema(
    of_events: Annotated[
        bool, typer.Option("--events", help="Print that of a record instead of the file's.")
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
    """Turn what is wrong with files into lines and exit code 2."""
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
    """Work where the sinks of a training do, whose options may name relative paths."""
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
    """Show a bar on a terminal while something takes long."""
    if not sys.stderr.isatty():
        yield lambda what, done, total: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, TaskID] = {}

        def tell(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(printable(what), total=total)
            bars.update(tasks[what], completed=done)

        yield tell


def _folders(option: str, given: list[str] | None) -> list[str]:
    """Return the absolute paths of folders that an option names."""
    for folder in given or []:
        if not folder.strip():
            raise JournalError(f"{option}: found an empty name, expected that of a folder")
        if not os.path.isdir(folder):
            raise JournalError(f"{option}: found no folder {folder!r}, expected one that exists")
    return [os.path.abspath(folder) for folder in given or []]


def _position(text: str | None, run: RunFolder) -> tuple[int, int] | None:
    """Return the position before the first record that is asked for."""
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
    """Return whether a plugin can be used, and the first line of what it says about itself."""
    try:
        is_sink = point.group == registry.SINKS
        plugin = registry.sink_class(point.name) if is_sink else point.load()
    except Exception as error:
        return "no", " ".join(str(error).split())
    if missing := registry.missing_package(point, plugin):
        return "no", missing
    return "yes", (plugin.__doc__ or "").strip().partition("\n")[0]
