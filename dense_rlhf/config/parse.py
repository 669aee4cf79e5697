"""What a study is read from: YAML files, `key=value` settings, and names of the user's own functions."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
import typing
from collections.abc import Mapping
from pathlib import Path

from dense_rlhf.config.strict import kind
from dense_rlhf.types import InputError

if typing.TYPE_CHECKING:
    import yaml

LONGEST = 1_000_000  # bytes of a YAML file
T = typing.TypeVar("T")


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


def named(registry: Mapping[str, T], name: str, where: str) -> T:
    """The entry of `registry` by that name, or the user's own function, named by its Python path `module:function`.

    Modules are also sought in the current folder. Raises `InputError`, which names the parameter `where`.
    """
    if name in registry:
        return registry[name]
    module, colon, function = name.partition(":")
    if not colon:
        close = difflib.get_close_matches(name, registry, 1)
        hint = f"; did you mean {close[0]}?" if close else ""
        known = ", ".join(registry)
        raise InputError(f"{where}: {name!r} is not known, wanted {known}, or your own as my_module:my_function{hint}")
    try:
        module_file(name)
        found = getattr(importlib.import_module(module), function)
    except Exception as error:  # whatever the user's module raises
        problem = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(f"{where}: cannot import {name!r} ({problem})") from error
    if not callable(found):
        raise InputError(f"{where}: {name!r} is {kind(found)}, wanted a function")
    return found


def module_file(name: str) -> Path | None:
    """The source file of `module:function`; none of a name without a module, or of one that cannot be found."""
    module, colon, _ = name.partition(":")
    if not colon:
        return None
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None
    return Path(spec.origin) if spec and spec.origin else None
