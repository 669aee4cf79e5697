"""Strict reading: mappings to typed dataclasses, YAML files, `key=value` settings. No conversion is silent."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from dataclasses import is_dataclass
from pathlib import Path

from dense_rlhf.types import InputError


def kind(value: object) -> str:
    return {str: "text", bool: "yes/no", int: "a whole number", float: "a number", list: "a list", dict: "a mapping",
            type(None): "nothing"}.get(type(value), type(value).__name__)  # fmt: skip


def cast(value: object, wanted: object, name: str) -> object:
    """`value` as the annotated type; the only conversions are whole numbers to numbers and lists to tuples."""
    options = typing.get_args(wanted) if isinstance(wanted, types.UnionType) else (wanted,)
    for option in options:
        if option is float and type(value) in (int, float):
            return float(value)
        if option in (int, str, bool, type(None)) and type(value) is option:
            return value
        if typing.get_origin(option) is tuple and isinstance(value, (list, tuple)):
            inner = typing.get_args(option)[0]
            return tuple(cast(item, inner, f"{name}[{i}]") for i, item in enumerate(value))
    hint = ""
    if isinstance(value, str) and float in options:
        hint = "; YAML reads 1e-4 as text, write 1.0e-4"
    names = " or ".join(getattr(o, "__name__", None) or str(o) for o in options).replace("NoneType", "nothing")
    raise InputError(f"{name} is {value!r} ({kind(value)}), wanted {names}{hint}")


def parse(cls: type, given: object, where: str):
    """Build the dataclass `cls` from a mapping. Raises `InputError` for unknown keys and wrong types."""
    if not isinstance(given, Mapping):
        raise InputError(f"{where or 'the file'} is {kind(given)}, wanted a mapping of {cls.__name__}")
    hints = typing.get_type_hints(cls)
    prefix = f"{where}." if where else ""
    unknown = [key for key in given if key not in hints]
    if unknown:
        raise InputError(f"{prefix}{unknown[0]} is not a parameter; wanted one of {', '.join(hints)}")
    values = {}
    for key, value in given.items():
        is_group = is_dataclass(hints[key])
        values[key] = parse(hints[key], value, prefix + key) if is_group else cast(value, hints[key], prefix + key)
    return cls(**values)


def merge(base: dict, over: Mapping) -> dict:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def read_yaml(path: Path) -> dict:
    """A YAML mapping, safely; `InputError` for a missing or broken file."""
    import yaml

    if not path.is_file():
        raise InputError(f"no file at {path}; give the path of a study, such as params/reviews.yaml")
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} holds {kind(value)}, wanted a mapping of parameters")
    return value


def parse_settings(pairs: typing.Iterable[str]) -> dict:
    """`["ppo.lr=0.1", "size=smoke"]` as nested mappings, values read as YAML."""
    import yaml

    nested: dict = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key:
            raise InputError(f"--set {pair!r}: wanted key=value, such as ppo.lr=1.0e-4")
        try:
            value: object = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise InputError(f"--set {pair!r}: the value is not YAML") from error
        for part in reversed(key.split(".")):
            value = {part: value}
        nested = merge(nested, value)
    return nested
