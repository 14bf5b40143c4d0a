"""Looks whether the installed frameworks and trackers are those that the plugins were made for.

A framework may rename a hook in any release, and a training would then go on without its metrics:
each adapter names what it relies on, and this finds what is not there.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint, PackageNotFoundError, packages_distributions, version

import msgspec

from trainbus import registry


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of one framework or tracker."""

    package: str
    installed: str | None
    tested: str
    missing: list[str]
    """What the plugin relies on and this version has not."""
    fault: str | None = None
    install: str = ""
    """What to do where it is not installed, if that is known."""

    @property
    def state(self) -> str:
        """The finding in a few words."""
        if self.installed is None:
            return "; ".join(text for text in ("not installed", self.install) if text)
        if self.missing:
            return f"these are missing, and events with them: {', '.join(self.missing)}"
        if self.fault:
            return f"can't be imported: {self.fault}"
        known = [each.strip() for each in self.tested.split(",")]
        return "ok" if self.installed in known else "ok, a version that was not tested"


def examine() -> Iterator[Finding]:
    """Yield what is found of each framework and tracker; imports those that are installed."""
    names = packages_distributions()
    for group in (registry.ADAPTERS, registry.SINKS):
        for point in registry.plugins(group).values():
            try:
                plugin = point.load()
            except Exception as error:
                fault = f"{type(error).__name__}: {error}"
                yield Finding(package=point.name, installed="?", tested="", missing=[], fault=fault)
                continue
            home = sys.modules[plugin.__module__]
            for package in registry.packages_of(point, plugin):
                yield _examine(point, package, home, names.get(package, [package])[0])
    yield from _broken_hooks()


def _broken_hooks() -> Iterator[Finding]:
    """Yield the hooks of `trainbus run` that can't be loaded."""
    for point in registry.plugins(registry.HOOKS).values():
        try:
            point.load()
        except Exception as error:
            fault = f"its hook {point.value}: {type(error).__name__}: {error}"
            yield Finding(package=point.name, installed="?", tested="", missing=[], fault=fault)


def _examine(point: EntryPoint, package: str, home: object, distribution: str) -> Finding:
    tested = str(getattr(home, "TESTED_VERSIONS", ""))
    try:
        installed = version(distribution)
    except PackageNotFoundError:
        install = registry.not_installed(point, package).partition("; ")[2]
        return Finding(package=package, installed=None, tested=tested, missing=[], install=install)
    missing: list[str] = []
    try:
        importlib.import_module(package)
        needs = [
            need for need in getattr(home, "REQUIRED_NAMES", ()) if need.startswith(f"{package}")
        ]
        missing = [need for need in needs if not _is_there(need)]
    except Exception as error:
        fault = f"{type(error).__name__}: {error}"
        return Finding(package=package, installed=installed, tested=tested, missing=[], fault=fault)
    return Finding(package=package, installed=installed, tested=tested, missing=missing)


def _is_there(need: str) -> bool:
    module, _, path = need.partition(":")
    try:
        found: object = importlib.import_module(module)
        for name in path.split(".") if path else ():
            found = getattr(found, name)
    except AttributeError:
        return False
    except ModuleNotFoundError as error:
        if error.name is not None and f"{module}.".startswith(f"{error.name}."):
            return False
        raise
    return True
