"""Frozen dataclasses <-> plain dicts, with errors that name the nearest match.

A field whose type is a union of dataclasses is told apart by the class variable ``kind``::

    {"law": {"kind": "lognormal", "mean": -1.1, "std": 2.0}}

So does a field whose type is a class with a registry ``variants`` (``Objective``).
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from fewstep.errors import ConfigError, nearest

T = TypeVar("T")


def to_dict(value: Any) -> Any:
    """Plain dicts, lists and scalars of a (nested) dataclass; ``from_dict`` inverts it."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        out = {"kind": value.kind} if hasattr(value, "kind") else {}
        return out | {f.name: to_dict(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, (list, tuple)):
        return [to_dict(v) for v in value]
    if isinstance(value, Mapping):
        return {str(k): to_dict(v) for k, v in value.items()}
    return value


def from_dict(cls: type[T], data: Mapping[str, Any], path: str = "") -> T:
    """Build the dataclass ``cls`` from ``data``; unknown names and wrong types are refused.

    Args:
        cls: a dataclass type.
        data: its fields by name; nested dataclasses as nested mappings.
        path: where ``data`` stands, for messages ("objective.law").

    Raises:
        ConfigError: a name is unknown (with the nearest match) or a value has the wrong type.
    """
    kind = getattr(cls, "kind", None)
    if kind is not None and data.get("kind", kind) != kind:
        raise ConfigError(f"'{path}.kind' cannot be changed here", got=data["kind"], want=kind)
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    kwargs: dict[str, Any] = {}
    for key, value in data.items():
        where = f"{path}.{key}" if path else key
        if key == "kind" and "kind" not in names and hasattr(cls, "kind"):
            continue
        if key not in names:
            raise ConfigError(f"There is no setting '{where}'", do=nearest(str(key), names))
        kwargs[key] = _coerce(hints[key], _with_kind(cls, key, value), where)
    try:
        return cls(**kwargs)
    except TypeError as error:
        raise ConfigError(f"The settings under '{path or cls.__name__}' are incomplete: {error}") from error


def _with_kind(cls: type, key: str, value: Any) -> Any:
    """``value`` of a field; where it is a mapping that names no kind, the field's default with ``value`` on top."""
    if not isinstance(value, Mapping) or "kind" in value:
        return value
    field = next(f for f in dataclasses.fields(cls) if f.name == key)
    default: Any = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return to_dict(default) | dict(value) if hasattr(default, "kind") else value


def with_overrides(config: T, overrides: Mapping[str, Any]) -> T:
    """``config`` with dotted paths replaced: ``{"objective.schedule.q": 4}``.

    Giving a nested dataclass a new ``kind`` keeps no field of the old one.

    Raises:
        ConfigError: a path does not exist (with the nearest match) or a value has the wrong type.
    """
    data = to_dict(config)
    kinds_first = sorted(overrides, key=lambda path: (not path.endswith("kind"), path.count(".")))
    for path in kinds_first:
        value = overrides[path]
        *parents, last = path.split(".")
        node = data
        for depth, name in enumerate(parents, start=1):
            if node.get(name) is None:
                node[name] = {}  # from_dict knows the types: it refuses names that do not exist
            node = node[name]
            if not isinstance(node, dict):
                raise ConfigError(f"There is no setting '{path}': '{'.'.join(parents[:depth])}' is a single value")
        if last == "kind" and node.get("kind", value) != value:
            node.clear()
        node[last] = value
    return from_dict(type(config), data)


def parse_assignments(assignments: Sequence[str]) -> dict[str, Any]:
    """``["a.b=3", "c=[1,2]"]`` -> ``{"a.b": 3, "c": [1, 2]}``; values are read as YAML."""
    out: dict[str, Any] = {}
    for item in assignments:
        path, equals, text = item.partition("=")
        if not equals or not path.strip():
            raise ConfigError("An override is not of the form path=value", got=item, want="for example optim.lr=1e-4")
        try:
            out[path.strip()] = yaml.safe_load(text) if text.strip() else ""
        except yaml.YAMLError as error:
            raise ConfigError(f"The value of '{path}' is not readable as YAML: {_where(error)}", got=text) from error
    return out


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML (or JSON) mapping from a file.

    Raises:
        ConfigError: the file is missing, is not YAML, or does not hold a mapping.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"The configuration file '{path}' does not exist") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"The configuration file '{path}' is not readable as YAML: {_where(error)}") from error
    except (UnicodeDecodeError, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"The configuration file '{path}' is not readable: {reason}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"The configuration file '{path}' does not hold a mapping", got=type(data).__name__)
    return data


def _where(error: yaml.YAMLError) -> str:
    """A YAML error in one line, with its place."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    if mark is None or problem is None:
        return " ".join(str(error).split())
    return f"{problem} (line {mark.line + 1}, column {mark.column + 1})"


def flatten(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` -> ``{"a.b": 1}``; ``kind`` comes first, so that it can replace a variant."""
    out: dict[str, Any] = {}
    for key in sorted(data, key=lambda k: k != "kind"):
        value, path = data[key], f"{prefix}{key}"
        out |= flatten(value, path + ".") if isinstance(value, dict) and value else {path: value}
    return out


def dump_yaml(config: Any) -> str:
    """The whole configuration as YAML."""
    return yaml.safe_dump(json.loads(json.dumps(to_dict(config))), sort_keys=False)


def _coerce(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _coerce_union(args, value, where)
    if isinstance(hint, type) and hasattr(hint, "variants") and not dataclasses.is_dataclass(hint):
        return _coerce_variant(hint.variants, value, where)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        if isinstance(value, hint):
            return value
        if not isinstance(value, Mapping):
            raise _wrong(where, value, "a mapping of settings")
        return from_dict(hint, value, where)  # type: ignore[arg-type]
    if origin is typing.Literal:
        if value not in args:
            raise ConfigError(f"'{where}' is not one of its choices", got=value, do=nearest(str(value), map(str, args)))
        return value
    if origin is tuple:
        items = value if isinstance(value, (list, tuple)) else [value]
        if len(args) == 2 and args[1] is ...:
            return tuple(_coerce(args[0], v, f"{where}[{i}]") for i, v in enumerate(items))
        if len(items) != len(args):
            raise _wrong(where, value, f"{len(args)} values")
        return tuple(_coerce(a, v, f"{where}[{i}]") for i, (a, v) in enumerate(zip(args, items, strict=True)))
    if origin is dict or hint is dict:
        if not isinstance(value, Mapping):
            raise _wrong(where, value, "a mapping")
        return dict(value)
    return _coerce_scalar(hint, value, where)


def _coerce_union(args: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in args:
        return None
    options = [a for a in args if a is not type(None)]
    if len(options) == 1:
        return _coerce(options[0], value, where)
    variants: dict[Any, Any] = {getattr(a, "kind", None): a for a in options if dataclasses.is_dataclass(a)}
    if variants and (isinstance(value, Mapping) or any(isinstance(value, a) for a in variants.values())):
        return _coerce_variant(variants, value, where)
    errors = []
    for option in options:
        try:
            return _coerce(option, value, where)
        except ConfigError as error:
            errors.append(error)
    raise errors[0]


def _coerce_variant(variants: Mapping[Any, Any], value: Any, where: str) -> Any:
    """One of several dataclasses, told apart by ``kind``."""
    if any(isinstance(value, a) for a in variants.values()):
        return value
    if not isinstance(value, Mapping):
        raise _wrong(where, value, "a mapping of settings with a 'kind'")
    kind = value.get("kind")
    if kind not in variants:
        raise ConfigError(
            f"'{where}.kind' is not one of its choices", got=kind, do=nearest(str(kind), map(str, variants))
        )
    return from_dict(variants[kind], value, where)


def _coerce_scalar(hint: Any, value: Any, where: str) -> Any:
    if hint is Any:
        return value
    if hint is bool and isinstance(value, bool):
        return value
    if hint is int and not isinstance(value, bool):
        if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
            return int(value)
        if isinstance(value, str):
            try:
                number = float(value.replace("_", ""))
            except ValueError:
                number = 0.5
            if number.is_integer():
                return int(number)
    if hint is float and not isinstance(value, bool):
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isnan(number):
            return number
    if hint is str and isinstance(value, (str, int, float)) and not isinstance(value, bool):
        return str(value)
    raise _wrong(
        where,
        value,
        {int: "a whole number", float: "a number", bool: "true or false", str: "text"}.get(hint, str(hint)),
    )


def _wrong(where: str, value: Any, want: str) -> ConfigError:
    return ConfigError(f"'{where}' has the wrong type", got=repr(value), want=want)
