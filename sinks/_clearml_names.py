"""ClearML's rules for names: of tasks, projects and files, and the two parts of a value's name."""

from __future__ import annotations

import re


def clean(name: str) -> str:
    """Return a name without characters that can't be seen, no path upwards, not empty."""
    seen = "".join(c if c.isprintable() else "_" for c in name).strip() or "_"
    return "/".join("_" if part in (".", "..") else part for part in seen.split("/"))


def file_name(name: str) -> str:
    """Return a name that is one of a file too."""
    return re.sub(r"[^\w .=+@,-]", "_", name).strip(" .") or "_"


def project_name(name: str) -> str:
    """Return a project's name, in which `/` parts projects, and which leads to no other folder."""
    return "/".join(file_name(part) for part in name.split("/") if part.strip(" .")) or "_"


def title_and_series(name: str) -> tuple[str, str]:
    """Return ClearML's title and series of a name; two names never have the same."""
    title, _, series = name.rpartition("/")
    return (title, series) if title and series and title != series else (name, name)
