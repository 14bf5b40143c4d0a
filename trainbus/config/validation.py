"""Checks the values of a configuration file against types.

Guarantees: all problems are collected, each as one printable line with file, line, key path, what
was found and what was expected; no line shows a hidden value; a value without a problem converts to
its type.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import msgspec
from msgspec import inspect

from trainbus.errors import did_you_mean
from trainbus.text import joined, printable, quoted

_WORDS: dict[type[inspect.Type], tuple[str, str]] = {
    inspect.AnyType: ("anything", "values"),
    inspect.BoolType: ("true or false", "true or false"),
    inspect.FloatType: ("a number", "numbers"),
    inspect.IntType: ("a whole number", "whole numbers"),
    inspect.StrType: ("a string", "strings"),
    inspect.StructType: ("a mapping", "mappings"),
}
_LIMITS = {
    "ge": "at least {}",
    "gt": "more than {}",
    "le": "at most {}",
    "lt": "less than {}",
    "multiple_of": "a multiple of {}",
    "min_length": "at least {} long",
    "max_length": "at most {} long",
    "pattern": "matching {}",
}


class Problems:
    """The problems in one file, in the order of their lines."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._lines: dict[str, int] = {}

    def add(self, text: str, *, path: str = "", line: int = 0, column: int = 0) -> None:
        """Add a problem; lines and columns count from 1, and 0 means unknown."""
        place = ":".join([self._name, *(str(number) for number in (line, column) if number)])
        problem = ": ".join(part for part in (place, path, text) if part)
        self._lines.setdefault(printable(problem), line)

    def lines(self) -> list[str]:
        """Return one line for each problem."""
        return sorted(self._lines, key=self._lines.__getitem__)


class ConfigValue(msgspec.Struct, kw_only=True):
    """A value in a file, with its key path and line.

    `hidden` values are never shown. A `broken` value already has a problem. `raw` is the string of
    an unquoted value with variables, before it was parsed as a number.
    """

    problems: Problems
    path: str
    line: int
    value: Any = None
    hidden: bool = False
    broken: bool = False
    raw: str | None = None

    @property
    def keys(self) -> Mapping[str, ConfigValue]:
        """The entries of a mapping; empty for other values."""
        return self.value if isinstance(self.value, dict) else {}

    @property
    def is_sound(self) -> bool:
        """Whether neither this value nor one in it has a problem."""
        parts = self.value if isinstance(self.value, list) else self.keys.values()
        return not self.broken and all(part.is_sound for part in parts)

    def reject(self, text: str, *, path: str | None = None, line: int | None = None) -> None:
        """Add a problem of this value; `path` and `line` default to its own."""
        self.broken = True
        self.problems.add(
            text, path=self.path if path is None else path, line=self.line if line is None else line
        )

    def plain(self, *, masked: bool = False) -> Any:
        """Return the plain value; if `masked`, with other values in place of the hidden ones."""
        if isinstance(self.value, dict):
            return {key: item.plain(masked=masked) for key, item in self.value.items()}
        if isinstance(self.value, list):
            return [item.plain(masked=masked) for item in self.value]
        if masked and self.hidden and self.value is not None:
            return "***" if isinstance(self.value, str) else self.value + 1
        return self.value

    def found(self) -> str:
        """Describe the value for an error, without showing it if it is hidden."""
        match self.value:
            case None:
                return "nothing"
            case dict():
                return "a mapping" if self.value else "an empty mapping"
            case list():
                return "a list" if self.value else "an empty list"
            case bool():
                return "true or false" if self.hidden else str(self.value).lower()
            case str():
                return "a string" if self.hidden else quoted(self.value)
        return "a number" if self.hidden else f"the number {self.value}"


def check_value(item: ConfigValue, wanted: Any) -> None:
    """Add a problem for each part of a value that does not fit its type."""
    parts: list[tuple[ConfigValue, Any]] = []
    for arm in _arms(wanted):
        origin, args = get_origin(arm) or arm, get_args(arm)
        if not isinstance(origin, type):
            continue
        if isinstance(item.value, dict) and issubclass(origin, msgspec.Struct):
            check_fields(item, origin)
            return
        if isinstance(item.value, dict) and issubclass(origin, Mapping) and args:
            parts = [(child, args[1]) for child in item.value.values()]
            for key, child in item.value.items():
                if not _converts(key, args[0]):
                    expected = _expected(inspect.type_info(args[0]))
                    text = f"found {quoted(key)} as a key, expected {expected}"
                    child.reject(text, path=item.path)
        # A tuple with a type for each element is checked as a whole.
        is_uniform = len(args) == 1 or args[1:] == (...,)
        if isinstance(item.value, list) and issubclass(origin, Sequence | Set) and is_uniform:
            parts = [(child, args[0]) for child in item.value]
    for child, part in parts:
        check_value(child, part)
    is_reported = item.broken or not all(child.is_sound for child, _ in parts)
    if is_reported or _converts(item.plain(), wanted):
        return
    if item.raw is not None and _converts(item.raw, wanted):
        item.value = item.raw
        return
    expected = _expected(inspect.type_info(wanted))
    item.reject(f"found {item.found()}, expected {expected}{_hint(item, wanted, expected)}")


def check_fields(item: ConfigValue, *structs: type[Any], is_open: bool = False) -> None:
    """Add a problem for each key that does not fit the fields; `is_open` allows other keys."""
    fields = {field.encode_name: field for cls in structs for field in msgspec.structs.fields(cls)}
    known = sorted(fields)
    for key, child in item.keys.items():
        if key in fields:
            check_value(child, fields[key].type)
        elif not is_open:
            expected = f"one of {', '.join(known)}{did_you_mean(key, known)}"
            child.reject(f"found an unknown key, expected {expected}")
    for key, field in fields.items():
        if field.required and key not in item.keys:
            expected = _expected(inspect.type_info(field.type))
            item.reject(f"found nothing, expected {expected}", path=joined(item.path, key))


def _arms(wanted: Any) -> list[Any]:
    """Return the types of a union, without annotations."""
    if get_origin(wanted) is Annotated:
        return _arms(get_args(wanted)[0])
    if get_origin(wanted) in (Union, UnionType):
        return [arm for each in get_args(wanted) for arm in _arms(each)]
    return [wanted]


def _converts(value: Any, wanted: Any) -> bool:
    try:
        msgspec.convert(value, wanted)
    except msgspec.ValidationError:
        return False
    return True


def _hint(item: ConfigValue, wanted: Any, expected: str) -> str:
    """Return a hint for an error: the most similar known value, or to use quotes."""
    if isinstance(item.value, str) and not item.hidden:
        choices = [arm for arm in _arms(wanted) if get_origin(arm) is Literal]
        known = [value for arm in choices for value in get_args(arm) if isinstance(value, str)]
        return did_you_mean(item.value, known)
    is_quotable = isinstance(item.value, bool | int | float) and expected.startswith("a string")
    return " (write it in quotes)" if is_quotable else ""


def _expected(info: inspect.Type, *, many: bool = False) -> str:
    """Describe a type in words."""
    match info:
        case inspect.Metadata():
            return (info.extra or {}).get("expected") or _expected(info.type, many=many)
        case inspect.UnionType():
            arms = (_expected(a, many=many) for a in info.types if type(a) is not inspect.NoneType)
            return " or ".join(dict.fromkeys(arms))
        case inspect.LiteralType():
            values = ", ".join(map(repr, info.values))
            return f"one of {values}" if len(info.values) > 1 else values
        case inspect.EnumType():
            return f"one of {', '.join(repr(member.value) for member in info.cls)}"
        case inspect.DictType():
            words = f"a mapping of names to {_expected(info.value_type, many=True)}"
        case inspect.ListType() | inspect.VarTupleType() | inspect.SetType():
            words = f"a list of {_expected(info.item_type, many=True)}"
        case _:
            words = _WORDS.get(type(info), (type(info).__name__, "values"))[many]
    limits = [
        text.format(getattr(info, name))
        for name, text in _LIMITS.items()
        if getattr(info, name, None) is not None
    ]
    return f"{words} ({', '.join(limits)})" if limits else words
