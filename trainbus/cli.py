"""The `trainbus` command: looks at configuration files and plugins, and starts nothing.

Exit codes: 0 when all is well, 2 when a file or the command line has a fault. Faults go to stderr,
one plain line each, as editors and scripts read them; nothing a user writes leads to a traceback.
"""

from __future__ import annotations

import io
import json
import sys
from importlib.metadata import EntryPoint
from typing import Annotated

import typer

import trainbus
from trainbus import config, events, registry
from trainbus.checks import printable
from trainbus.errors import ConfigError
from trainbus.schema import json_schema

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
) -> None:
    """Check configuration files without starting anything."""
    sound = True
    for file in files:
        try:
            routes = config.load(file).routes
        except ConfigError as error:
            sound = False
            for problem in error.problems:
                typer.echo(problem, err=True)
        else:
            count = "1 sink" if len(routes) == 1 else f"{len(routes)} sinks"
            sinks = ", ".join(f"{route.name} ({route.kind})" for route in routes)
            typer.echo(printable(f"{file}: ok, {count}: {sinks}"))
    if not sound:
        raise typer.Exit(2)


@app.command()
def plugins() -> None:
    """List the installed sinks and adapters, and whether they load."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("kind", "name", "package", "entry point", "loads", "about")
    for kind, group in (("sink", registry.SINKS), ("adapter", registry.ADAPTERS)):
        for name, point in registry.plugins(group).items():
            package = f"{point.dist.name} {point.dist.version}" if point.dist else "unknown"
            cells = (kind, name, package, point.value, *_loaded(point))
            table.add_row(*(Text(printable(cell), overflow="fold") for cell in cells))
    width = None if sys.stdout.isatty() else _WIDTH_WITHOUT_TERMINAL
    Console(width=width).print(table)


@app.command()
def schema(
    of_events: Annotated[
        bool, typer.Option("--events", help="Print that of a record instead of the file's.")
    ] = False,
) -> None:
    """Print the JSON Schema of the configuration file, for editors."""
    found = events.json_schema() if of_events else json_schema()
    typer.echo(json.dumps(found, indent=2, ensure_ascii=False))


def _loaded(point: EntryPoint) -> tuple[str, str]:
    """Return whether a plugin loads, and the first line of what it says about itself."""
    try:
        is_sink = point.group == registry.SINKS
        plugin = registry.sink_class(point.name) if is_sink else point.load()
    except Exception as error:
        return "no", " ".join(str(error).split())
    return "yes", (plugin.__doc__ or "").strip().partition("\n")[0]
