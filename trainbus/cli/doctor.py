"""Checks the installed frameworks and trackers: `trainbus doctor`.

A framework can rename a hook in any release, and trainings would then lose metrics. So each plugin
lists the names that it requires, and this finds those that are missing.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint, PackageNotFoundError, packages_distributions, version

import msgspec

from trainbus import registry


class PackageReport(msgspec.Struct, frozen=True, kw_only=True):
    """The state of one framework or tracker."""

    name: str
    installed: str | None
    tested: str
    missing: list[str]
    """Names that the plugin requires and this version lacks."""
    fault: str | None = None
    install: str = ""
    """How to install it, if it is not installed and that is known."""

    @property
    def state(self) -> str:
        """The state in a few words."""
        if self.installed is None:
            return "; ".join(text for text in ("not installed", self.install) if text)
        if self.missing:
            return f"missing, so events are lost: {', '.join(self.missing)}"
        if self.fault:
            return f"can't be imported: {self.fault}"
        known = [each.strip() for each in self.tested.split(",")]
        return "ok" if self.installed in known else "ok, but this version is untested"


def examine() -> Iterator[PackageReport]:
    """Yield the state of each framework and tracker; imports the installed ones."""
    names = packages_distributions()
    for group in (registry.ADAPTERS, registry.SINKS):
        for point in registry.plugins(group).values():
            try:
                plugin = point.load()
            except Exception as error:
                yield _faulty(point, f"{type(error).__name__}: {error}")
                continue
            home = sys.modules[plugin.__module__]
            for package in registry.packages_of(point, plugin):
                yield _examine(point, package, home, names.get(package, [package])[0])
    yield from _broken_hooks()


def _broken_hooks() -> Iterator[PackageReport]:
    """Yield a report for each hook of `trainbus run` that can't be loaded."""
    for point in registry.plugins(registry.HOOKS).values():
        try:
            point.load()
        except Exception as error:
            yield _faulty(point, f"hook {point.value}: {type(error).__name__}: {error}")


def _faulty(point: EntryPoint, fault: str) -> PackageReport:
    """Return a report for a plugin or hook that can't be loaded."""
    return PackageReport(name=point.name, installed="?", tested="", missing=[], fault=fault)


def _examine(point: EntryPoint, package: str, home: object, distribution: str) -> PackageReport:
    tested = str(getattr(home, "TESTED_VERSIONS", ""))
    try:
        installed = version(distribution)
    except PackageNotFoundError:
        install = registry.not_installed(point, package).partition("; ")[2]
        return PackageReport(
            name=package, installed=None, tested=tested, missing=[], install=install
        )
    missing: list[str] = []
    try:
        importlib.import_module(package)
        needs = [
            need for need in getattr(home, "REQUIRED_NAMES", ()) if need.startswith(f"{package}")
        ]
        missing = [need for need in needs if not _is_there(need)]
    except Exception as error:
        fault = f"{type(error).__name__}: {error}"
        return PackageReport(
            name=package, installed=installed, tested=tested, missing=[], fault=fault
        )
    return PackageReport(name=package, installed=installed, tested=tested, missing=missing)


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
