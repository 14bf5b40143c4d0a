"""The option tables of docs/sinks: made from the options classes. As a script, it writes them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import msgspec

from trainbus import registry

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docs" / "sinks"
KINDS: dict[Any, str] = {
    str: "string",
    int: "integer",
    float: "number",
    bool: "boolean",
    dict: "mapping",
    Mapping: "mapping",
}
BEGIN, END = "<!-- options -->\n", "<!-- end -->\n"


def table(name: str) -> str:
    """Return the table of a sink's own options, a row for each."""
    cls = registry.sink_class(name).Options
    hints = get_type_hints(cls, include_extras=True)
    rows = []
    for field in msgspec.structs.fields(cls):
        about = _about(hints[field.name])
        default = "required" if field.required else _default(field)
        cells = (f"`{field.encode_name}`", _kind(hints[field.name]), default, about)
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    if not rows:
        return "It has no options of its own.\n"
    return "\n".join(["| option | type | default | meaning |", "|---|---|---|---|", *rows]) + "\n"


def shown(page: Path) -> str:
    """Return the table that a page has."""
    pattern = f"{re.escape(BEGIN)}(.*?){re.escape(END)}"
    found = re.search(pattern, page.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None, f"{page} has no lines {BEGIN!r} and {END!r}"
    return found[1]


def _default(field: Any) -> str:
    has_one = field.default is not msgspec.NODEFAULT
    value = field.default if has_one else field.default_factory()
    return "" if value is None else f"`{msgspec.json.encode(value).decode()}`"


def _about(hint: Any) -> str:
    for arm in _arms(hint):
        for meta in getattr(arm, "__metadata__", ()):
            if getattr(meta, "description", None):
                return str(meta.description)
    return ""


def _kind(hint: Any) -> str:
    arms = []
    for arm in _arms(hint):
        plain = get_args(arm)[0] if hasattr(arm, "__metadata__") else arm
        if plain is type(None) or _is_union(plain):  # the members of a union follow it
            continue
        origin = get_origin(plain) or plain
        if origin is Literal:
            arms += [f"`{value}`" for value in get_args(plain)]
        elif origin in (list, tuple, Sequence):
            items = _kind(get_args(plain)[0])
            arms.append(f"list of {items}" if items.startswith("`") else f"list of {items}s")
        else:
            arms.append(KINDS[origin])
    return ", ".join(dict.fromkeys(arms))


def _arms(hint: Any) -> tuple[Any, ...]:
    """Return the members of a union, also of one inside `Annotated`."""
    if hasattr(hint, "__metadata__"):
        inner = get_args(hint)[0]
        return (hint,) if not _is_union(inner) else (hint, *get_args(inner))
    return get_args(hint) if _is_union(hint) else (hint,)


def _is_union(hint: Any) -> bool:
    return type(hint).__name__ in ("UnionType", "Union", "_UnionGenericAlias")


def main() -> None:
    """Write the tables into the pages."""
    for page in sorted(FOLDER.glob("*.md")):
        if page.stem != "README":
            old, new = (f"{BEGIN}{text}{END}" for text in (shown(page), table(page.stem)))
            page.write_text(page.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")


if __name__ == "__main__":
    main()
