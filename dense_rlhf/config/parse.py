"""Strict reading: mappings to typed dataclasses, YAML files, `key=value` settings. No conversion is silent."""

from __future__ import annotations

import math
import reprlib
import types
import typing
from collections.abc import Mapping
from dataclasses import is_dataclass
from pathlib import Path

from dense_rlhf.types import InputError

if typing.TYPE_CHECKING:
    import yaml

LARGEST = 2**31  # whole numbers stay below
LONGEST = 1_000_000  # bytes of a YAML file
_SHORT = reprlib.Repr()  # a value of any size, such as aliases of aliases, in a line of error
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60


def shown(value: object) -> str:
    """A value as a line of error shows it: shortened."""
    return _SHORT.repr(value)


def kind(value: object) -> str:
    return {
        str: "text",
        bool: "yes/no",
        int: "a whole number",
        float: "a number",
        list: "a list",
        dict: "a mapping",
        type(None): "nothing",
    }.get(type(value), type(value).__name__)


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
    raise InputError(f"{name} is {shown(value)} ({kind(value)}), wanted {names}{hint}")


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
    made = cls(**values)  # what it says of a number is more to the point
    for key, value in values.items():
        check_numbers(prefix + key, value)
    return made


def check_numbers(name: str, value: object) -> None:
    """Raise `InputError` for a number, in a tuple too, that is not finite or larger than any use of it."""
    if isinstance(value, tuple):
        for i, item in enumerate(value):
            check_numbers(f"{name}[{i}]", item)
    elif isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{name} is {value}, wanted a finite number")
    elif isinstance(value, int) and abs(value) >= LARGEST:
        raise InputError(f"{name} is {shown(value)}, wanted a whole number below {LARGEST}")


def merge(base: dict, over: Mapping) -> dict:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def _check_keys(node: yaml.Node | None, met: set[int]) -> None:
    """Raise for a key that a mapping gives twice, of which YAML would keep the last."""
    import yaml

    if node is None or id(node) in met:  # an empty file; an alias
        return
    met.add(id(node))
    seen: set[str] = set()
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        if isinstance(key, yaml.ScalarNode) and key.value in seen:
            raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice", key.start_mark)
        seen |= {key.value} if isinstance(key, yaml.ScalarNode) else set()
        _check_keys(key, met)
        _check_keys(value, met)
    for item in node.value if isinstance(node, yaml.SequenceNode) else ():
        _check_keys(item, met)


def _from_yaml(text: str) -> object:
    """The value of a YAML text. Raises ValueError with one line for whatever is wrong with it."""
    import yaml

    try:
        _check_keys(yaml.compose(text, yaml.SafeLoader), set())
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, TypeError, AttributeError) as error:  # also of dates and numbers
        raise ValueError(" ".join(str(error).split())) from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_yaml(path: Path) -> dict:
    """A YAML mapping, safely; `InputError` for a missing, broken or very large file."""
    if not path.is_file():
        raise InputError(f"no file at {path}; give the path of a study, such as params/reviews.yaml")
    if path.stat().st_size > LONGEST:
        raise InputError(f"{path} has {path.stat().st_size} bytes, wanted a file of parameters, {LONGEST} at most")
    try:
        value = _from_yaml(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise InputError(f"{path} is not YAML: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} holds {kind(value)}, wanted a mapping of parameters")
    return value


def parse_settings(pairs: typing.Iterable[str]) -> dict:
    """`["ppo.lr=0.1", "size=smoke"]` as nested mappings, values read as YAML."""
    nested: dict = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key:
            raise InputError(f"--set {pair!r}: wanted key=value, such as ppo.lr=1.0e-4")
        try:
            value = _from_yaml(text)
        except ValueError as error:
            raise InputError(f"--set {pair!r}: the value is not YAML") from error
        for part in reversed(key.split(".")):
            value = {part: value}
        nested = merge(nested, value)
    return nested
