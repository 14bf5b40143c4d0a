"""Finds sinks and adapters by their entry points; the built-in ones too."""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from typing import Any

from trainbus.errors import (
    MissingPackageError,
    NoAdapterError,
    PluginError,
    UnknownPluginError,
)
from trainbus.interfaces import Adapter, Sink

SINKS = "trainbus.sinks"
HOOKS = "trainbus.hooks"
ADAPTERS = "trainbus.adapters"


def plugins(group: str) -> dict[str, EntryPoint]:
    """Return the installed plugins of an entry-point group by name."""
    return {point.name: point for point in sorted(entry_points(group=group), key=lambda p: p.name)}


def sink_class(name: str) -> type[Sink]:
    """Return the sink class that is registered under a name.

    Raises:
        UnknownPluginError: no installed package registers the name.
        PluginError: the registered object can't be imported, or is not a sink.
    """
    known = plugins(SINKS)
    if name not in known:
        raise UnknownPluginError("sink", name, known)
    found = _load(known[name])
    if not (isinstance(found, type) and issubclass(found, Sink)):
        raise PluginError(
            f"sink {name!r} is registered as {known[name].value!r}, which is {found!r}; "
            "expected a class derived from trainbus.Sink"
        )
    return found


def adapter_for(target: object) -> Adapter:
    """Return the adapter for the framework that defines `target`'s class or one of its bases.

    Raises:
        NoAdapterError: no installed adapter is named after any of these frameworks.
        PluginError: the adapter can't be imported, or is not a function.
    """
    known = plugins(ADAPTERS)
    for cls in type(target).__mro__:
        framework, *rest = cls.__module__.split(".")
        if [framework, *rest[:1]] == ["trainbus", "adapters"] and len(rest) > 1:
            framework = rest[1]  # a callback class that the adapter defines
        if framework in known:
            found = _load(known[framework])
            if not callable(found):
                raise PluginError(
                    f"adapter {framework!r} is registered as {known[framework].value!r}, which is "
                    f"{found!r}; expected a function attach(target, emit)"
                )
            adapter: Adapter = found
            return adapter
    raise NoAdapterError(target, known)


def packages_of(point: EntryPoint, plugin: Any) -> list[str]:
    """Return the import names of the packages that a sink or adapter requires."""
    if point.group == ADAPTERS:
        return [point.name]
    return list(dict.fromkeys(name for name in (plugin.service, *plugin.packages) if name))


def missing_package(point: EntryPoint, plugin: Any) -> str | None:
    """Return one line about a required package that is not installed, None if all are.

    The packages are not imported.
    """
    missing = (package for package in packages_of(point, plugin) if not _is_installed(package))
    package = next(missing, None)
    return None if package is None else not_installed(point, package)


def not_installed(point: EntryPoint, package: str) -> str:
    """Return one line that says that a required package is not installed, and how to install it.

    The command is known if the plugin's distribution has an extra named after the plugin.
    """
    extras = point.dist.metadata.get_all("Provides-Extra", []) if point.dist else []
    if point.dist is None or point.name not in [extra.replace("-", "_") for extra in extras]:
        return f"the package {package!r} is not installed"
    return str(MissingPackageError(package, extra=point.name, distribution=point.dist.name))


def _is_installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except (ImportError, ValueError):  # a parent package is missing, or its import is blocked
        return False


def _load(point: EntryPoint) -> Any:
    try:
        return point.load()
    except Exception as error:
        raise PluginError(
            f"{point.group} plugin {point.name!r} ({point.value}) can't be imported: "
            f"{type(error).__name__}: {error}"
        ) from error
