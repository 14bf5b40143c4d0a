"""Converts the values of frameworks and users to plain values that can always be encoded.

No value makes this raise: a value that has no plain form becomes text. No package is imported to
recognize its objects: they are recognized by their attributes, or by the classes of a package that
the program has already imported.
"""

from __future__ import annotations

import enum
import math
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence, Set
from itertools import chain, islice
from types import BuiltinFunctionType, FunctionType, MethodType, SimpleNamespace
from typing import Any

import msgspec
import numpy as np

from trainbus.events import (
    Array,
    Best,
    CheckpointSaved,
    Failure,
    GitState,
    MetricsLogged,
    ModelDescribed,
    Resumed,
    RunEnded,
)

_MAX_DEPTH = 16
_MAX_TEXT = 64 * 1024
_MAX_ITEMS = 10_000
_MAX_TOTAL = 1_000_000
_MAX_BITS = 8192  # Python does not convert much longer integers to decimals
_FUNCTIONS = (type, FunctionType, BuiltinFunctionType, MethodType)
_FLOATS = {float}
_CELLS = {float, int, bool, str, type(None)}
_ADDRESS = re.compile(r" at 0x[0-9A-Fa-f]+")
_PARTS = (Best, Failure, GitState, Resumed)
_ARRAYS = ("array", "x", "y", "matrix", "counts", "edges")
_PATHS = ("save_dir", "path")
_NAMES = ("classes", "columns", "tags", "aliases", "paths", "own_loggers")
_NUMBERS: dict[type[Any], tuple[str, ...]] = {
    MetricsLogged: ("values",),
    CheckpointSaved: ("metrics",),
    ModelDescribed: ("speed_ms", "extra"),
}


def plain(value: Any) -> Any:
    """Return `value` as None, bool, int, float, str, list or dict with str keys, recursively.

    Numbers of any type become plain numbers, objects that `mapping` supports become dicts, and
    sequences and tensors become lists. Enum members become their value or name, dates ISO 8601,
    classes and functions their name, paths and all other objects text. Values are truncated at
    16 levels, 10,000 items per container, 1,000,000 items in total and 64 KiB per string.
    """
    return _plain(value, (), [_MAX_TOTAL])


def plain_mapping(value: Any, name: str = "value") -> dict[str, Any]:
    """Return a configuration as a plain dict; a value without named fields is stored as `name`."""
    found = {} if value is None else plain(value)
    return found if isinstance(found, dict) else {name: found}


def mapping(value: Any) -> dict[Any, Any] | None:
    """Return the named fields of an object, with their values unchanged; None if it has none.

    Supported are mappings (those of OmegaConf too; missing and unresolvable values appear as they
    are written), namespaces, instances of dataclasses and of attrs, pydantic and msgspec classes,
    named tuples, configurations of transformers, and optimizers (type and settings).
    """
    if isinstance(value, Mapping):
        return _items(value)
    if isinstance(value, type):
        return None
    if isinstance(value, SimpleNamespace) or _is(value, "argparse", "Namespace"):
        return dict(vars(value))
    names = _fields(value)
    if names is not None:
        return {name: getattr(value, name, None) for name in names}
    if callable(getattr(value, "keys", None)) and not hasattr(value, "shape"):
        return _items(value) if hasattr(value, "__getitem__") else None
    if callable(getattr(value, "to_dict", None)) and hasattr(value, "to_json_string"):
        return dict(value.to_dict())
    return _optimizer(value)


def to_array(value: Any) -> Array | None:
    """Return a tensor, or nested sequences of numbers, as an array of bools, ints or floats.

    Tensors can be on any device, of any real dtype, sparse, or part of a graph. Anything else
    returns None.
    """
    try:
        found = _ndarray(value)
        if isinstance(found, np.ma.MaskedArray):
            found = np.ma.filled(found.astype(np.float64), np.nan)
        if found.dtype.kind == "V" or (found.dtype.kind == "f" and found.dtype.itemsize > 8):
            found = found.astype(np.float32 if found.dtype.kind == "V" else np.float64)
    except Exception:  # not numeric, ragged, without data (as on torch's meta device), or broken
        return None
    return found if found.dtype.kind in "biuf" else None


def to_number(value: Any) -> bool | int | float | None:
    """Return a number, numpy scalar or tensor of one element as a plain number, else None."""
    try:
        found = value if isinstance(value, bool | int | float) else value.item()
        if isinstance(found, float | np.floating):
            return float(found)
        if isinstance(found, int):
            return found if type(found) in (bool, int) else int(found)
    except AttributeError:  # it may still be a Decimal or a Fraction
        if _is(value, "decimal", "Decimal") or _is(value, "fractions", "Fraction"):
            return to_float(value)
    except Exception:  # not a number, more than one element, or unreadable
        return None
    return None


def to_float(number: float) -> float:
    """Return a number as a float; one that is too large becomes infinite."""
    try:
        return float(number)
    except OverflowError:
        return math.inf if number > 0 else -math.inf


def name_of(key: Any) -> str:
    """Return a key of any type as a string."""
    return _text(key if isinstance(key, str) else str(plain(key)))


def metrics(values: Any) -> tuple[dict[str, float], list[str]]:
    """Return the numeric values as floats, and the names of the other values."""
    kept: dict[str, float] = {}
    rejected: list[str] = []
    for name, value in _take(values.items()):
        number = to_number(value)
        if number is None:
            rejected.append(name_of(name))
        else:
            kept[name_of(name)] = to_float(number)
    return kept, rejected


def event(value: Any) -> tuple[Any, list[str]]:
    """Return an event that can be encoded and decoded, and a line for each value removed from it.

    Raises:
        msgspec.ValidationError: a required field has a wrong type.
    """
    rejected: list[str] = []
    if type(value) is MetricsLogged and _is_plain(value):
        return value, rejected
    value = _struct(value, rejected)
    problems = [f"metric {name!r}: expected a number" for name in rejected]
    try:
        return _convert(value), problems
    except msgspec.ValidationError:
        value, wrong = _without_mistyped(value)
        return _convert(value), problems + wrong


def _is_plain(value: MetricsLogged) -> bool:
    """Return whether metrics, the most frequent event, need no conversion."""
    values = value.values
    try:
        return (
            type(values) is dict
            and len(values) <= _MAX_ITEMS
            and set(map(type, values.values())) == _FLOATS
            and "".join(values).isascii()
            and type(value.phase) is str
            and value.phase.isascii()
            and (value.epoch is None or type(value.epoch) is int)
            and (value.step is None or type(value.step) is int)
            and abs(value.epoch or 0) < 2**63
            and abs(value.step or 0) < 2**63
        )
    except TypeError:  # a key that is not a string
        return False


def _struct(value: Any, rejected: list[str]) -> Any:
    changed: dict[str, Any] = {}
    for field in value.__struct_fields__:
        found = getattr(value, field)
        try:
            new = _field(value, field, found, rejected)
        except Exception:  # even its type or length can't be determined
            new = [_repr(found)] if field in _PATHS else _repr(found)
        if new is not found:
            changed[field] = new
    return msgspec.structs.replace(value, **changed) if changed else value


def _field(value: Any, field: str, found: Any, rejected: list[str]) -> Any:
    kind = type(found)
    if found is None or kind is bool or kind is float or (kind is int and abs(found) < 2**63):
        return found
    if kind is str:
        return found if found.isascii() else _utf8(found)
    if field in _PATHS and not isinstance(found, os.PathLike):
        return [_repr(found)]  # the repr of an object is no path; a list fails validation
    if isinstance(found, _PARTS):
        return _struct(found, rejected)
    if field in _ARRAYS and not isinstance(found, str):
        array = found if isinstance(found, np.ndarray) else to_array(found)
        if array is not None:
            return _array(array)
    if field in _NUMBERS.get(type(value), ()):
        return _metrics(found, field, rejected)
    if field in _NAMES:
        return _names(found)
    if field == "rows":
        found = [list(row) if isinstance(row, tuple) else row for row in found]
        if _are_plain(found):
            return found
    if type(found) is list:  # the number of classes and rows must not change
        return [plain(item) for item in found]
    return plain(found)


def _names(found: Any) -> Any:
    """Return names as strings: frameworks number columns, and map indices to classes."""
    if isinstance(found, Mapping):
        found = list(found.values())
    if isinstance(found, str) or not isinstance(found, Iterable):
        return plain(found)
    return [name_of(item) for item in found]


def _convert(value: Any) -> Any:
    """Return the event with the schema's types: other types could be written, but not read back."""
    fields = {name: _builtins(getattr(value, name)) for name in value.__struct_fields__}
    return msgspec.convert(fields, type(value), strict=False, dec_hook=_to_array)


def _without_mistyped(value: Any) -> tuple[Any, list[str]]:
    """Return the event with values of the wrong type replaced by defaults, and a line for each."""
    changed, wrong = {}, []
    for field in msgspec.structs.fields(value):
        try:
            found = _builtins(getattr(value, field.name))
            msgspec.convert(found, field.type, strict=False, dec_hook=_to_array)
        except msgspec.ValidationError as error:
            if not field.required:
                changed[field.name] = field.default
                if field.default is msgspec.NODEFAULT:
                    changed[field.name] = field.default_factory()
                wrong.append(f"{field.name}: {error}")
            elif isinstance(value, RunEnded):  # the run is over, whatever the status
                changed[field.name] = "failed"
                wrong.append(f"{field.name}: {error}")
    return msgspec.structs.replace(value, **changed), wrong


def _builtins(value: Any) -> Any:
    return msgspec.structs.asdict(value) if isinstance(value, _PARTS) else value


def _to_array(kind: type, value: Any) -> Any:
    """Return the value of an array field as an array; it may be a list of numbers."""
    array = value if isinstance(value, np.ndarray) else np.asarray(value)
    if array is not value and array.dtype.kind not in "biuf":
        raise ValueError(f"Expected an array of numbers, got {type(value).__name__}")
    return array


def _metrics(values: Any, field: str, rejected: list[str]) -> Any:
    try:
        if all(type(v) is float and type(k) is str and k.isascii() for k, v in values.items()):
            return values
        kept, names = metrics(values)
    except Exception:  # not a mapping, or one that can't be read
        kept, names = {}, [field]
    rejected += names
    return kept


def _are_plain(rows: list[Any]) -> bool:
    """Return whether the rows of a table need no conversion."""
    try:
        kinds = set(map(type, chain.from_iterable(rows)))
        if set(map(type, rows)) != {list} or not kinds <= _CELLS:
            return False
        if str in kinds:
            texts = {cell for row in rows for cell in row if type(cell) is str}
            if max(map(len, texts)) > _MAX_TEXT or not "".join(texts).isascii():
                return False
        return int not in kinds or all(
            -(2**63) <= cell < 2**63 for row in rows for cell in row if type(cell) is int
        )
    except TypeError:  # a row that is not a list
        return False


def _plain(value: Any, inside: tuple[int, ...], left: list[int]) -> Any:
    """Return a plain value; `inside` has the ids of its containers, `left[0]` the items left."""
    try:
        kind = type(value)
        if value is None or kind is bool or kind is float:
            return value
        if isinstance(value, str):
            return _text(value)
        if isinstance(value, enum.Enum) and not isinstance(value, int):
            return _text(value.value if isinstance(value.value, str) else value.name)
        if kind not in (list, tuple, dict) and not isinstance(value, np.ndarray):
            if _is(value, "decimal", "Decimal"):
                near = to_float(value)
                return near if type(value)(repr(near)) == value else _text(str(value))
            number = to_number(value)
            if isinstance(number, int) and number.bit_length() > _MAX_BITS:
                return _text(hex(number))
            if number is not None:
                return number
            if (text := _named(value)) is not None:
                return _text(text)
        return _container(value, inside, left)
    except Exception:
        return _text(_repr(value))


def _named(value: Any) -> str | None:
    """Return the text that describes an object better than its repr, None if there is none."""
    if hasattr(value, "__fspath__"):
        return str(value)
    if isinstance(value, np.generic) and value.dtype.kind in "mMSU":
        return str(value)
    if callable(getattr(value, "isoformat", None)) and not isinstance(value, type):
        return str(value.isoformat())
    if _is(value, "datetime", "timedelta") or _is(value, "uuid", "UUID"):
        return str(value)
    if isinstance(value, _FUNCTIONS):
        module = value.__module__
        return (
            value.__qualname__ if module in (None, "builtins") else f"{module}.{value.__qualname__}"
        )
    if type(value).__module__ in ("torch", "pydantic.types", "pydantic.networks"):
        return str(value) if not hasattr(value, "shape") else None  # a device, a dtype, a SecretStr
    return None


def _container(value: Any, inside: tuple[int, ...], left: list[int]) -> Any:
    if isinstance(value, np.ndarray) and value.ndim == 0:
        return _plain(value.item(), (*inside, id(value)), left)
    found = _members(value)
    if found is None:
        return _text(_repr(value))
    if id(value) in inside or len(inside) >= _MAX_DEPTH or left[0] <= 0:
        return f"<{type(value).__qualname__}: left out>"  # its repr may not terminate either
    inside = (*inside, id(value))
    left[0] -= len(found)
    if isinstance(found, dict):
        return {name_of(k): _plain(v, inside, left) for k, v in found.items()}
    return [_plain(item, inside, left) for item in found]


def _members(value: Any) -> dict[Any, Any] | list[Any] | None:
    """Return the items of a container, by name or in order; None if it is no container."""
    if isinstance(value, np.ndarray):
        return value[:_MAX_ITEMS].tolist()  # type: ignore[no-any-return]
    if type(value) in (list, tuple, set, frozenset):
        return _take(value)
    if (named := mapping(value)) is not None:
        return dict(_take(named.items()))
    if callable(getattr(value, "detach", None)):
        array = to_array(value)
        is_small = array is not None and array.size <= _MAX_ITEMS
        return array.tolist() if array is not None and is_small else None
    if isinstance(value, Sequence | Set) and not isinstance(value, range | bytes | memoryview):
        try:
            return _take(value)
        except Exception:
            return [_at(value, index) for index in range(min(len(value), _MAX_ITEMS))]
    return None


def _items(value: Any) -> dict[Any, Any]:
    try:
        return {key: value[key] for key in islice(value.keys(), _MAX_ITEMS)}
    except Exception:  # one unreadable item must not cost the others
        return {key: _at(value, key) for key in islice(value.keys(), _MAX_ITEMS)}


def _at(value: Any, key: Any) -> Any:
    try:
        return value[key]
    except Exception as error:
        try:  # unresolved values of OmegaConf, such as `???` and `${db.host}`
            package = sys.modules["omegaconf"]
            return package.OmegaConf.to_container(value, resolve=False)[key]
        except Exception:
            return f"<{type(error).__qualname__}>"


def _fields(value: Any) -> list[str] | None:
    """Return the names of the fields declared by an object's class, None if it declares none."""
    kind = type(value)
    if hasattr(kind, "__dataclass_fields__"):
        return [field.name for field in sys.modules["dataclasses"].fields(value)]
    if hasattr(kind, "__attrs_attrs__"):
        return [field.name for field in kind.__attrs_attrs__]
    if hasattr(kind, "__pydantic_fields__") or hasattr(kind, "__pydantic_validator__"):
        return [*kind.model_fields, *(getattr(value, "model_extra", None) or ())]
    if isinstance(value, msgspec.Struct):
        return list(value.__struct_fields__)
    if isinstance(value, tuple) and isinstance(getattr(kind, "_fields", None), tuple):
        return list(kind._fields)
    return None


def _optimizer(value: Any) -> dict[str, Any] | None:
    """Return the type and settings of an optimizer of PyTorch or Keras, None for other objects.

    Settings shared by all parameter groups come first; `group_<i>` has those of one group.
    """
    inner = getattr(value, "optimizer", None)
    value = inner if hasattr(value, "param_groups") and hasattr(inner, "param_groups") else value
    groups = getattr(value, "param_groups", None)
    if isinstance(groups, list) and isinstance(getattr(value, "defaults", None), Mapping):
        own = [{k: v for k, v in g.items() if k[:5] != "param" and v is not None} for g in groups]
        shared = {k: v for k, v in own[0].items() if all(k in g and g[k] == v for g in own)}
        found = {"type": type(value).__qualname__, **shared}
        for index, group in enumerate(own):
            if rest := {k: v for k, v in group.items() if k not in shared}:
                found[f"group_{index}"] = rest
        return found
    if hasattr(value, "learning_rate") and callable(getattr(value, "get_config", None)):
        return {"type": type(value).__qualname__, **value.get_config()}
    return None


def _is(value: Any, module: str, name: str) -> bool:
    """Return whether an object is an instance of a class, without importing the class's module."""
    kind = getattr(sys.modules.get(module), name, None)
    return isinstance(kind, type) and isinstance(value, kind)


def _ndarray(value: Any) -> Array:
    if isinstance(value, np.ndarray):
        return value
    if callable(getattr(value, "detach", None)):
        return _of_torch(value)
    if isinstance(value, list | tuple):
        try:
            found = np.asarray(value)
        except Exception:  # tensors that numpy can't convert; ragged lists fail again below
            found = None
        if found is None or found.dtype.kind in "OV":
            found = np.stack([_ndarray(item) for item in value])
        return found
    for name in ("to_numpy", "numpy", "get"):  # of pandas and polars, TensorFlow, CuPy
        convert = getattr(value, name, None)
        if callable(convert) and hasattr(value, "dtype"):
            try:
                return np.asarray(convert())
            except Exception:
                continue  # another method may work
    if not any(hasattr(value, name) for name in ("__array__", "__array_interface__", "__float__")):
        raise TypeError(f"expected numbers, found {type(value).__qualname__}")
    return np.asarray(value)


def _of_torch(value: Any) -> Array:
    found = value.detach()
    if getattr(found, "is_quantized", False):
        found = found.dequantize()
    if not str(getattr(found, "layout", "strided")).endswith("strided"):
        found = found.to_dense()
    found = found.cpu()
    try:
        return np.asarray(found.numpy())
    except (TypeError, RuntimeError):  # numpy has neither bfloat16 nor 8-bit floats
        return np.asarray(found.float().numpy())


def _array(value: Array) -> Array:
    """Return the array if JSON can represent its numbers, else an array of strings."""
    if isinstance(value, np.ma.MaskedArray):
        value = np.ma.filled(value.astype(np.float64), np.nan)
    kind, size = value.dtype.kind, value.dtype.itemsize
    if kind in "biu" or (kind == "f" and size <= 8):
        return value
    if kind == "f":
        with np.errstate(all="ignore"):
            return value.astype(np.float64)
    texts = [_utf8(item) if isinstance(item, str) else _repr(item) for item in value.ravel()]
    return np.array(texts, dtype=np.str_).reshape(value.shape)


def _take(items: Iterable[Any]) -> list[Any]:
    return list(islice(items, _MAX_ITEMS))


def _text(value: str) -> str:
    return _utf8(str.__getitem__(value, slice(_MAX_TEXT)))


def _utf8(value: str) -> str:
    return str.encode(value, "utf-8", "backslashreplace").decode("utf-8")


def _repr(value: Any) -> str:
    try:
        # Memory addresses differ in every process.
        return _utf8(_ADDRESS.sub("", repr(value)[:1000]))
    except Exception as error:  # a broken __repr__ must not cost the rest of the event
        return f"<{type(value).__qualname__}: {type(error).__name__} in repr>"
