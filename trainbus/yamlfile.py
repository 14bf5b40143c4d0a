"""Reads YAML text into values that know where they stand, and fills in environment variables.

Guarantees: no text raises, runs code or grows beyond bounds; every fault in it is one line in
`Problems`; no line repeats the value of a variable, or what stands under a key named like a secret.
What comes out is texts, numbers, booleans and nulls, in lists and in mappings with text keys.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Any

import msgspec
import yaml

MAX_CHARACTERS = 2**20
_MAX_VALUES = 10_000
_MAX_DEPTH = 30
_MAX_NUMBER = 100
_MAX_SHOWN = 60

_TAG = "tag:yaml.org,2002:"
_MERGE = _TAG + "merge"
_NUMBERS = {_TAG + "int": "a whole number", _TAG + "float": "a number"}
_RESOLVED = {*_NUMBERS, _TAG + "bool", _TAG + "null"}
# A date and `=` have tags of their own in YAML 1.1, and are texts to anyone who writes them here.
_TEXTS = {_TAG + "str", _TAG + "timestamp", _TAG + "value"}

_SECRET = re.compile(
    r"passw|secret|token|api[_-]?key|private[_-]?key|auth|credential", re.IGNORECASE
)
_FLOAT = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+")
_QUOTED = re.compile(r"'(?:(?P<mark>.|\\.|<[a-z ]+>)|[^']*)'")
_VARIABLE = re.compile(r"\$\$\{|\$\{(?:([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\})?")


class Problems:
    """The faults of one file, in the order of their lines."""

    def __init__(self, name: str) -> None:
        self._name = printable(name)
        self._found: list[tuple[int, str]] = []

    def add(self, place: str, path: str, text: str, *, line: int = 0) -> None:
        """Note a fault: `place` is the line, `line:column`, or nothing for the whole file."""
        parts = [f"{self._name}:{place}" if place else self._name, path, text]
        self._found.append((line, printable(": ".join(part for part in parts if part))))

    def at(self, line: int, path: str, text: str) -> None:
        """Note a fault in a line, counted from 1."""
        self.add(str(line), path, text, line=line)

    def lines(self) -> list[str]:
        """Return one line for each fault."""
        return [text for _, text in sorted(dict.fromkeys(self._found), key=lambda fault: fault[0])]

    def __len__(self) -> int:
        return len(self._found)


class Item(msgspec.Struct, kw_only=True):
    """A value of the file, and where it stands.

    `hidden` values are never shown. A `broken` one has its line in the problems already, and so has
    each key that a `partial` mapping lacks. `raw` is the text of an unquoted value that variables
    were put into, before it was read as a number.
    """

    value: Any
    line: int
    key_line: int
    path: str
    hidden: bool = False
    broken: bool = False
    raw: str | None = None
    partial: bool = False

    def plain(self) -> Any:
        """Return the value without positions."""
        if isinstance(self.value, dict):
            return {key: item.plain() for key, item in self.value.items()}
        if isinstance(self.value, list):
            return [item.plain() for item in self.value]
        return self.value

    def found(self) -> str:
        """Return what stands here in words, without the value itself where it is hidden."""
        match self.value:
            case None:
                return "nothing"
            case dict() | list():
                empty = "" if self.value else "n empty"
                return f"a{empty} {'mapping' if isinstance(self.value, dict) else 'list'}"
            case bool():
                return "true or false" if self.hidden else str(self.value).lower()
            case str():
                return "a text" if self.hidden else quoted(self.value)
            case _:
                return "a number" if self.hidden else f"the number {self.value}"


def read(text: str, problems: Problems, env: Mapping[str, str]) -> Item | None:
    """Return the file's one value with `${…}` filled in from `env`; None where it can't be read."""
    if len(text) > MAX_CHARACTERS:
        problems.add("", "", "found more than 1 MiB, expected a smaller file")
        return None
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_node() if loader.check_node() else None
        if node is None or (node.tag == _TAG + "null" and not node.value):
            problems.at(1, "", "found an empty file, expected a mapping with the key 'sinks'")
            return None
        if loader.check_node():
            line = loader.peek_event().start_mark.line + 1  # type: ignore[no-untyped-call]
            problems.at(line, "", "found a second document (after `---`), expected one in a file")
            return None
        return _Reader(loader, problems, env).item(node, path="", key_line=1)
    except _TooMuchError as error:
        problems.at(error.line, "", str(error))
    except RecursionError:
        problems.add("", "", f"found too many levels, expected {_MAX_DEPTH} at most")
    except yaml.MarkedYAMLError as error:
        _note_syntax(error, text, problems)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        problems.at(line, "", "found a control character, expected printable text")
    return None


def printable(text: str) -> str:
    """Return the text with everything that could move a terminal's cursor written as an escape."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def quoted(text: str) -> str:
    """Return a text in quotes on one line, cut short where it is long."""
    return repr(text if len(text) <= _MAX_SHOWN else text[: _MAX_SHOWN - 1] + "…")


class _TooMuchError(Exception):
    def __init__(self, line: int, text: str) -> None:
        super().__init__(text)
        self.line = line


class _Reader:
    """Turns the nodes of one document into items."""

    def __init__(self, loader: yaml.SafeLoader, problems: Problems, env: Mapping[str, str]) -> None:
        self._loader = loader
        self._problems = problems
        self._env = env
        self._count = 0
        self._open: list[yaml.Node] = []

    def item(self, node: yaml.Node, *, path: str, key_line: int, hidden: bool = False) -> Item:
        line = node.start_mark.line + 1
        item = Item(value=None, line=line, key_line=key_line, path=path, hidden=hidden)
        self._count += 1
        if self._count > _MAX_VALUES:
            raise _TooMuchError(
                line, f"found more than {_MAX_VALUES} values (aliases expanded), expected fewer"
            )
        if any(node is outer for outer in self._open):
            raise _TooMuchError(line, "found an alias that contains itself, expected plain values")
        if len(self._open) >= _MAX_DEPTH:
            raise _TooMuchError(line, f"found too many levels, expected {_MAX_DEPTH} at most")
        self._open.append(node)
        if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
            item.value = self._mapping(node, item)
        elif isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
            item.value = [
                self.item(
                    child, path=f"{path}[{i}]", key_line=child.start_mark.line + 1, hidden=hidden
                )
                for i, child in enumerate(node.value)
            ]
        elif isinstance(node, yaml.ScalarNode) and node.tag in {*_RESOLVED, *_TEXTS, _MERGE}:
            self._scalar(node, item)
        else:
            self._refuse(
                item, "found a YAML tag (`!…`), expected a value without: tags aren't allowed"
            )
        self._open.pop()
        return item

    def _mapping(self, node: yaml.MappingNode, item: Item) -> dict[str, Item]:
        merged: dict[str, Item] = {}
        own: dict[str, Item] = {}
        for key_node, node_of_value in node.value:
            line = key_node.start_mark.line + 1
            if key_node.tag == _MERGE:
                merged = self._merged(node_of_value, item) | merged
                continue
            key = self._key(key_node, item)
            if key is None:
                item.partial = True
                continue
            path = joined(item.path, key)
            if key in own:
                first = own[key].key_line
                self._problems.at(
                    line, path, f"found the key again (first in line {first}), expected it once"
                )
                continue
            hidden = item.hidden or _SECRET.search(key) is not None
            own[key] = self.item(node_of_value, path=path, key_line=line, hidden=hidden)
        return {key: child for key, child in merged.items() if key not in own} | own

    def _key(self, node: yaml.Node, parent: Item) -> str | None:
        line = node.start_mark.line + 1
        if isinstance(node, yaml.ScalarNode) and node.tag in _TEXTS:
            key = str(node.value)
            if "${" not in key:
                return key
            text = "found `${` in a key, expected variables in values only"
        else:
            found = self.item(node, path=parent.path, key_line=line, hidden=parent.hidden)
            if found.broken:
                return None
            text = f"found {found.found()} as a key, expected a text (write it in quotes)"
        self._problems.at(line, parent.path, text)
        return None

    def _merged(self, node: yaml.Node, parent: Item) -> dict[str, Item]:
        nodes = node.value if isinstance(node, yaml.SequenceNode) else [node]
        merged: dict[str, Item] = {}
        for each in nodes:
            item = self.item(
                each, path=parent.path, key_line=each.start_mark.line + 1, hidden=parent.hidden
            )
            if isinstance(item.value, dict):
                merged = item.value | merged
            elif not item.broken:
                self._refuse(item, f"found {item.found()} after `<<`, expected a mapping")
        return merged

    def _scalar(self, node: yaml.ScalarNode, item: Item) -> None:
        text, tag = str(node.value), node.tag
        if "${" in text:
            filled = self._filled(text, item)
            if filled is None:
                item.broken = True
                return
            text = filled
            if item.hidden and node.style is None:
                item.raw = text
                tag = self._loader.resolve(yaml.ScalarNode, text, (True, False))  # type: ignore[no-untyped-call]
        if node.style is None and tag == _TAG + "str" and _FLOAT.fullmatch(text):
            tag = _TAG + "float"  # YAML 1.1 takes 1e-3 for a text, which no one expects
        if tag not in _RESOLVED:
            item.value = text
        elif tag in _NUMBERS and len(text) > _MAX_NUMBER:
            self._refuse(item, f"found too many digits, expected {_NUMBERS[tag]}")
        else:
            try:
                item.value = self._loader.construct_object(yaml.ScalarNode(tag, text))
            except (ValueError, LookupError, ArithmeticError):
                wanted = _NUMBERS.get(tag, "true or false")
                self._refuse(item, f"found a text that can't be read, expected {wanted}")

    def _filled(self, text: str, item: Item) -> str | None:
        """Return the text with its variables filled in, None where one of them can't be."""
        faults: list[str] = []
        seen: list[str] = []

        def fill(match: re.Match[str]) -> str:
            name, default = match.groups()
            if match[0] == "$${":
                return "${"
            if name is None and "}" not in text[match.end() :]:
                faults.append("found `${` without its `}`, expected ${NAME} or ${NAME:-default}")
                return ""
            if name is None or "${" in (default or ""):
                faults.append(
                    "found `${…}` around what is no name of a variable, expected ${NAME} or "
                    "${NAME:-default}, one not inside another, or $${ for a literal ${"
                )
                return ""
            seen.append(name)
            value = self._env.get(name)
            # As in a shell, `:-` also stands in for a variable that is set to nothing.
            if value is None or (value == "" and default is not None):
                value = default
            if value is None:
                faults.append(
                    f"found ${{{name}}}, which is not set, expected a variable of the environment "
                    f"or a default, ${{{name}:-…}}{_nearest_variable(name, self._env)}"
                )
                return ""
            return value

        filled = _VARIABLE.sub(fill, text)
        item.hidden = item.hidden or bool(seen)
        for fault in faults:
            self._problems.at(item.line, item.path, fault)
        return None if faults else filled

    def _refuse(self, item: Item, text: str) -> None:
        item.broken = True
        self._problems.at(item.line, item.path, text)


def joined(path: str, key: str) -> str:
    """Return a key path with one more key, in quotes where it isn't a plain word."""
    word = key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else quoted(key)
    return f"{path}.{word}" if path else word


def _nearest_variable(name: str, env: Mapping[str, str]) -> str:
    # A far-fetched suggestion would tell more about the environment than about the mistake.
    nearest = difflib.get_close_matches(name, list(env), n=1, cutoff=0.85)
    return f", did you mean {nearest[0]!r}?" if nearest else ""


def _note_syntax(error: yaml.MarkedYAMLError, text: str, problems: Problems) -> None:
    mark = error.problem_mark or error.context_mark
    line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
    # An unquoted password may begin with `*` or `!`, and the parser repeats it as a name.
    reason = _QUOTED.sub(lambda m: m[0] if m["mark"] else "…", error.problem or "can't be parsed")
    wanted = "valid YAML"
    source = text.splitlines()[line - 1 : line]
    if source and "${" in source[0]:
        wanted += " (inside [ ] and { }, `${…}` needs quotes, which keep it a text)"
    elif source and "\t" in source[0]:
        wanted += " (indent with spaces, not tabs)"
    problems.add(f"{line}:{column}", "", f"found bad YAML: {reason}, expected {wanted}", line=line)
