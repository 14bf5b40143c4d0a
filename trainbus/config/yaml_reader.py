"""Parses YAML into values with positions, and substitutes environment variables.

Guarantees: no input raises, runs code or expands without limit; every problem is one line in
`Problems`; no line shows the value of a variable, or of a key that is named like a secret. The
result consists of strings, numbers, booleans and nulls, in lists and in mappings with string keys.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping

import yaml

from trainbus.config.validation import ConfigValue, Problems
from trainbus.text import joined

_MAX_VALUES = 10_000
_MAX_DEPTH = 30
_MAX_DIGITS = 100

_TAG = "tag:yaml.org,2002:"
_MERGE = _TAG + "merge"
_NUMBERS = {_TAG + "int": "a whole number", _TAG + "float": "a number"}
_RESOLVED = {*_NUMBERS, _TAG + "bool", _TAG + "null"}

# In YAML 1.1, dates, `=` and `<<` have their own tags; as values they are strings here.
_TEXTS = {_TAG + "str", _TAG + "timestamp", _TAG + "value", _MERGE}
_ALLOWED = {_TAG + "map", _TAG + "seq", *_RESOLVED, *_TEXTS}

_SECRET = re.compile(
    r"passw|secret|token|api[_-]?key|private[_-]?key|auth|credential", re.IGNORECASE
)
_FLOAT = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+")
_QUOTED = re.compile(r"'(?:(?P<mark>.|\\.|<[a-z ]+>)|[^']*)'")
_VARIABLE = re.compile(r"\$\$\{|\$\{(?:([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\})?")


def read(text: str, problems: Problems, env: Mapping[str, str]) -> ConfigValue:
    """Return the document with `${…}` replaced from `env`; a broken value if it can't be parsed."""
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_node() if loader.check_node() else None
        if node is None or (node.tag == _TAG + "null" and not node.value):
            problems.add("found an empty file, expected a mapping with the key 'sinks'", line=1)
        elif loader.check_node():
            line = loader.peek_event().start_mark.line + 1  # type: ignore[no-untyped-call]
            problems.add("found a second document (after `---`), expected one per file", line=line)
        else:
            return _Reader(loader, problems, env).item(node, path="", line=_line(node))
    except _TooMuchError:
        pass
    except RecursionError:
        problems.add(f"found too many levels, expected {_MAX_DEPTH} at most")
    except yaml.MarkedYAMLError as error:
        _add_syntax_error(error, text, problems)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        problems.add("found a control character, expected printable text", line=line)
    return ConfigValue(problems=problems, path="", line=0, broken=True)


class _TooMuchError(Exception):
    """The file is too large or too deeply nested; the problem is already added."""


class _Reader:
    """Converts the nodes of one document."""

    def __init__(self, loader: yaml.SafeLoader, problems: Problems, env: Mapping[str, str]) -> None:
        self._loader = loader
        self._problems = problems
        self._env = env
        self._count = 0
        self._open: list[yaml.Node] = []

    def item(self, node: yaml.Node, *, path: str, line: int, hidden: bool = False) -> ConfigValue:
        item = ConfigValue(problems=self._problems, path=path, line=line, hidden=hidden)
        self._count += 1
        fault = ""
        if self._count > _MAX_VALUES:
            fault = f"found more than {_MAX_VALUES} values (aliases expanded), expected fewer"
        elif any(node is outer for outer in self._open):
            fault = "found an alias that contains itself, expected plain values"
        elif len(self._open) >= _MAX_DEPTH:
            fault = f"found too many levels, expected {_MAX_DEPTH} at most"
        if fault:
            item.reject(fault, path="")
            raise _TooMuchError
        self._open.append(node)
        if node.tag not in _ALLOWED:
            item.reject("found a YAML tag (`!…`), expected a plain value")
        elif isinstance(node, yaml.MappingNode):
            item.value = self._mapping(node, item)
        elif isinstance(node, yaml.SequenceNode):
            item.value = [
                self.item(child, path=f"{path}[{i}]", line=_line(child), hidden=hidden)
                for i, child in enumerate(node.value)
            ]
        else:
            self._fill_scalar(node, item)
        self._open.pop()
        return item

    def _mapping(self, node: yaml.MappingNode, item: ConfigValue) -> dict[str, ConfigValue]:
        merged: dict[str, ConfigValue] = {}
        own: dict[str, ConfigValue] = {}
        for key_node, value in node.value:
            line = _line(key_node)
            if key_node.tag == _MERGE:
                merged = self._merged(value, item) | merged
                continue
            key = self._key(key_node, item)
            if key is None:
                continue
            path = joined(item.path, key)
            if key in own:
                text = f"found the key again (first in line {own[key].line}), expected it once"
                item.reject(text, path=path, line=line)
                continue
            hidden = item.hidden or _SECRET.search(key) is not None
            own[key] = self.item(value, path=path, line=line, hidden=hidden)
        return {key: child for key, child in merged.items() if key not in own} | own

    def _key(self, node: yaml.Node, parent: ConfigValue) -> str | None:
        if isinstance(node, yaml.ScalarNode) and node.tag in _TEXTS:
            if "${" not in node.value:
                return str(node.value)
            text = "found `${` in a key, expected variables in values only"
        else:
            key = self.item(node, path=parent.path, line=_line(node), hidden=parent.hidden)
            text = f"found {key.found()} as a key, expected a string (write it in quotes)"
        parent.reject(text, line=_line(node))
        return None

    def _merged(self, node: yaml.Node, parent: ConfigValue) -> dict[str, ConfigValue]:
        merged: dict[str, ConfigValue] = {}
        for each in node.value if isinstance(node, yaml.SequenceNode) else [node]:
            item = self.item(each, path=parent.path, line=_line(each), hidden=parent.hidden)
            if isinstance(item.value, dict):
                merged = item.value | merged
            elif not item.broken:
                item.reject(f"found {item.found()} after `<<`, expected a mapping")
        return merged

    def _fill_scalar(self, node: yaml.Node, item: ConfigValue) -> None:
        text, tag = str(node.value), node.tag
        is_plain = isinstance(node, yaml.ScalarNode) and node.style is None
        if "${" in text:
            text = self._filled(text, item)
            if is_plain:
                item.raw = text
                tag = self._loader.resolve(yaml.ScalarNode, text, (True, False))  # type: ignore[no-untyped-call]
        if is_plain and tag == _TAG + "str" and _FLOAT.fullmatch(text):
            tag = _TAG + "float"  # YAML 1.1 parses 1e-3 as a string, which nobody expects
        if item.broken:
            return
        if tag not in _RESOLVED:
            item.value = text
        elif tag in _NUMBERS and len(text) > _MAX_DIGITS:
            item.reject(f"found too many digits, expected {_NUMBERS[tag]}")
        else:
            try:
                item.value = self._loader.construct_object(yaml.ScalarNode(tag, text))
            except (ValueError, LookupError, ArithmeticError):
                wanted = _NUMBERS.get(tag, "true or false")
                item.reject(f"found a string that can't be parsed, expected {wanted}")

    def _filled(self, text: str, item: ConfigValue) -> str:
        """Return the text with variables replaced; the value is broken if one is not set."""

        def fill(match: re.Match[str]) -> str:
            name, default = match.groups()
            if match[0] == "$${":
                return "${"
            if name is None and "}" not in text[match.end() :]:
                item.reject("found `${` without its `}`, expected ${NAME} or ${NAME:-default}")
                return ""
            if name is None or "${" in (default or ""):
                item.reject(
                    "found `${…}` without a valid variable name, expected ${NAME} or "
                    "${NAME:-default}, not nested, or $${ for a literal ${"
                )
                return ""
            item.hidden = True
            value = self._env.get(name)
            if not value and default is not None:  # as in a shell, also if it is empty
                return str(default)
            if value is None:
                # Only a close match is suggested: others would disclose names of the environment.
                nearest = difflib.get_close_matches(name, list(self._env), n=1, cutoff=0.85)
                hint = f", did you mean {nearest[0]!r}?" if nearest else ""
                item.reject(
                    f"found ${{{name}}}, which is not set, expected an environment variable "
                    f"or a default, ${{{name}:-…}}{hint}"
                )
                return ""
            return value

        return _VARIABLE.sub(fill, text)


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _add_syntax_error(error: yaml.MarkedYAMLError, text: str, problems: Problems) -> None:
    mark = error.problem_mark or error.context_mark
    line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
    # An unquoted password may start with `*` or `!`, and the parser shows it as a name.
    reason = _QUOTED.sub(lambda m: m[0] if m["mark"] else "…", error.problem or "can't be parsed")
    wanted = "valid YAML"
    source = text.splitlines()[line - 1 : line]
    if source and "${" in source[0]:
        wanted += " (inside [ ] and { }, write `${…}` in quotes)"
    elif source and "\t" in source[0]:
        wanted += " (indent with spaces, not tabs)"
    problems.add(f"found bad YAML: {reason}, expected {wanted}", line=line, column=column)
