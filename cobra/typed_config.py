"""Frozen dataclasses as configuration: strict to and from JSON, and `section.field=value` overrides.

A configuration is a tree of frozen, keyword-only dataclasses. Where a field may hold one of several
classes (a connector, a layer), its annotation is a union of dataclasses that each carry a field
`kind: Literal["..."]`; the kind in the JSON picks the class.
"""

import dataclasses
import functools
import json
import math
import types
from difflib import get_close_matches
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from vision_scan.errors import UserError

T = TypeVar("T")


def to_dict(config: Any) -> Any:
    """The configuration as plain dicts, lists, strings and numbers, ready for JSON."""
    if dataclasses.is_dataclass(config):
        return {
            field.name: to_dict(getattr(config, field.name)) for field in dataclasses.fields(config)
        }
    if isinstance(config, (tuple, list)):
        return [to_dict(item) for item in config]
    if isinstance(config, dict):
        return {key: to_dict(item) for key, item in config.items()}
    if isinstance(config, float) and not math.isfinite(config):
        return str(config)  # JSON has no infinity; from_dict reads the text
    return config


def from_dict(cls: type[T], data: dict, where: str = "configuration") -> T:
    """Builds `cls` from the output of `to_dict`.

    Args:
        cls: a dataclass.
        data: plain data, for instance parsed JSON.
        where: what to call the source in messages, for instance a file name.
    Raises:
        UserError: on an unknown key (with the nearest name), a missing key without default, a value of
            the wrong type, or anything that a dataclass rejects.
    """
    if not isinstance(data, dict):
        raise UserError(f"{where}: expected a mapping with the fields of {cls.__name__}, got {data!r}")
    hints = _field_types(cls)
    for key in data:
        if key not in hints:
            raise UserError(f"{where}: {_unknown(key, hints)}")
    missing = [
        field.name
        for field in dataclasses.fields(cls)
        if field.name not in data
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise UserError(f"{where}: missing {', '.join(missing)}")
    values = {key: _convert(hints[key], value, f"{where}: {key}") for key, value in data.items()}
    return cls(**values)


def override(config: T, path: str, value: str) -> T:
    """A copy of `config` with one field replaced, as `--set path=value` asks for.

    Args:
        config: a dataclass tree.
        path: field names joined by dots, for instance "optim.lr"; a number indexes a tuple.
        value: the new value as text; parsed by the field's type (tuples: comma-separated or JSON;
            nested configurations: JSON).
    Raises:
        UserError: on an unknown field (with the nearest name) or a value of the wrong type.
    """
    return _replace(config, path.split("."), value, path)


def require_positive(config: Any, *names: str) -> None:
    """Raises UserError unless the named fields of a configuration are 1 or more."""
    for name in names:
        value = getattr(config, name)
        if value < 1:
            kind = getattr(config, "kind", type(config).__name__)
            raise UserError(f"{kind}: {name} {value} must be 1 or more")


def _replace(node: Any, names: list[str], value: str, path: str) -> Any:
    name, *rest = names
    if isinstance(node, tuple):
        if not name.isdecimal() or int(name) >= len(node):
            raise UserError(f"{path}: {name!r} must be an index below {len(node)}")
        if not rest:
            raise UserError(f"{path}: name a field of entry {name}, for instance {path}.kind")
        return tuple(
            _replace(item, rest, value, path) if index == int(name) else item
            for index, item in enumerate(node)
        )
    if not dataclasses.is_dataclass(node):
        raise UserError(f"{path}: {node!r} has no field {name!r}")
    hints = _field_types(type(node))
    if name not in hints:
        raise UserError(f"{path}: {_unknown(name, hints)}")
    new = _replace(getattr(node, name), rest, value, path) if rest else _parse(hints[name], value, path)
    return dataclasses.replace(node, **{name: new})


def _unknown(name: str, allowed: dict[str, Any]) -> str:
    near = get_close_matches(name, allowed, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"unknown setting {name!r}{hint} (allowed: {', '.join(allowed)})"


@functools.cache
def _field_types(cls: type) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _members(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def _describe(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return " | ".join(map(str, get_args(kind)))
    if get_origin(kind) is tuple:
        return f"a list of {_describe(get_args(kind)[0])}"
    if kind is type(None):
        return "none"
    if len(_members(kind)) > 1:
        return " or ".join(_describe(member) for member in _members(kind))
    return getattr(kind, "__name__", str(kind))


def _parse(kind: Any, text: str, where: str) -> Any:
    """Reads the text of an override as a value of type `kind`."""
    members = _members(kind)
    if type(None) in members and text.lower() in ("none", "null", ""):
        return None
    if any(get_origin(member) is tuple for member in members) and not text.startswith("["):
        return _convert(kind, [part.strip() for part in text.split(",") if part.strip()], where)
    if str in members or any(get_origin(member) is Literal for member in members):
        return _convert(kind, text, where)
    words = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
    if bool in members and text.lower() in words:
        return words[text.lower()]
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = text
    return _convert(kind, value, where)


def _convert(kind: Any, value: Any, where: str) -> Any:
    """Checks and converts plain data to the annotated type."""
    members = _members(kind)
    classes = [member for member in members if dataclasses.is_dataclass(member)]
    if classes and dataclasses.is_dataclass(value):
        return value
    if classes and isinstance(value, dict):
        return from_dict(_pick(classes, value, where), value, where)
    for member in members:
        if member is Any:
            return value
        if member is type(None) and value is None:
            return None
        if get_origin(member) is Literal and value in get_args(member):
            return value
        if get_origin(member) is tuple and isinstance(value, (list, tuple)):
            return tuple(_convert(get_args(member)[0], item, where) for item in value)
        if get_origin(member) is dict and isinstance(value, dict):
            return {key: _convert(get_args(member)[1], item, where) for key, item in value.items()}
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if member is float and (number or _is_number(value)):
            return float(value)
        if member is int and number and float(value).is_integer():
            return int(value)
        if member is int and isinstance(value, str) and value.removeprefix("-").isdecimal():
            return int(value)
        if member in (bool, str) and isinstance(value, member):
            return value
    raise UserError(f"{where}: got {value!r}, allowed: {_describe(kind)}")


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return isinstance(value, str)


def _pick(classes: list[type], value: dict, where: str) -> type:
    """The dataclass of a tagged union that the data's `kind` names."""
    if len(classes) == 1:
        return classes[0]
    kinds = {get_args(_field_types(cls)["kind"])[0]: cls for cls in classes}
    name = value.get("kind")
    if not isinstance(name, str) or name not in kinds:
        near = get_close_matches(str(name), kinds, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(f"{where}: unknown kind {name!r}{hint} (allowed: {', '.join(kinds)})")
    return kinds[name]
