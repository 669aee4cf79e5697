"""What a study is read from: YAML files, `key=value` settings, and names of the user's own functions."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import re
import sys
import typing
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from dense_rlhf.config.strict import kind, shown
from dense_rlhf.types import InputError, did_you_mean, nearest

if typing.TYPE_CHECKING:
    import yaml

LONGEST = 100_000  # bytes of YAML
MOST = 10_000  # values in it, aliases counted as often as they stand
LEVELS = 10  # of a key
OTHER_BASE = re.compile(r"[-+]?0[\dxb_].*|.*:.*")  # whole numbers that YAML 1.1 does not read by tens
T = typing.TypeVar("T")


def merge(base: dict, over: Mapping) -> dict:
    """`base` with what `over` says in its place; mappings merge, an empty one replaces."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and value and isinstance(merged.get(key), Mapping)
        merged[key] = merge(merged[key], value) if both else value
    return merged


@cache
def _loader() -> type[yaml.SafeLoader]:
    """YAML's safe loader, to which a date is text."""
    import yaml

    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers = {
            first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
            for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }

    return Loader


def _size(node: yaml.Node, met: dict[int, int]) -> int:
    """How many values a node holds. Raises ValueError for what YAML would take in silence, and nobody means.

    That is a key given twice, an alias within what it stands for, and a number by another base.
    """
    import yaml

    if id(node) in met:  # an alias
        if not met[id(node)]:
            raise ValueError(f"line {node.start_mark.line + 1}: an alias stands within itself")
        return met[id(node)]
    met[id(node)], children, seen = 0, [], set()
    if isinstance(node, yaml.ScalarNode):
        if node.tag.endswith(":int") and OTHER_BASE.fullmatch(node.value) or ":" in node.value * (":float" in node.tag):
            raise ValueError(f"{node.value!r} is no number by tens to YAML; write it without 0 and :, or in quotes")
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            children += [key, value]
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice", key.start_mark)
                seen.add(key.value)
    else:
        children = node.value
    met[id(node)] = 1 + sum(_size(child, met) for child in children)
    return met[id(node)]


def _from_yaml(text: str, comments: bool = True) -> object:
    """The value of a YAML text. Raises ValueError with one line for whatever is wrong with it.

    Without `comments` the text is one value, and a # in it is no comment.
    """
    import yaml

    if len(text) > LONGEST:
        raise ValueError(f"it has {len(text)} characters, wanted parameters, {LONGEST} at most")
    try:
        loader = _loader()(text)
        node = loader.get_single_node()
        if not comments and (rest := text[node.end_mark.index :] if node else text).strip():
            if node and (not isinstance(node, yaml.ScalarNode) or node.style):
                raise ValueError(f"{rest.strip()!r} follows the value")
            return text.strip()
        if node is None:
            return None
        if (size := _size(node, {})) > MOST:
            raise ValueError(f"it holds {size if size < 10**9 else 'billions of'} values, wanted {MOST} at most")
        return loader.construct_document(node)
    except (yaml.YAMLError, ValueError, TypeError, AttributeError) as error:  # also of numbers
        raise ValueError(" ".join(str(error).split())) from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_yaml(path: Path) -> dict:
    """A YAML mapping, safely; `InputError` for a missing, broken or very large file."""
    if not os.path.isfile(path):
        raise InputError(f"no file at {path}; give the path of a study, such as params/reviews.yaml{_meant(path)}")
    if path.stat().st_size > LONGEST:
        raise InputError(f"{path} has {path.stat().st_size} bytes, wanted a file of parameters, {LONGEST} at most")
    try:
        value = _from_yaml(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise InputError(f"{path} is not YAML: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} holds {kind(value)}, wanted a mapping of parameters")
    return value


def _meant(path: Path) -> str:
    """The end of a message about a study that is not there: the nearest that is."""
    folders = [folder for folder in (path.parent, Path("params"), Path("params/ablations")) if os.path.isdir(folder)]
    known = {one.stem: one for folder in folders for one in folder.glob("[!.]*.yaml")}
    near = nearest(path.stem, known)
    return f"; did you mean {known[near]}?" if near else ""


def parse_settings(pairs: typing.Iterable[str]) -> list[dict]:
    """`["ppo.lr=0.1", "size=smoke"]` as nested mappings, one each, values read as YAML."""
    settings = []
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key:
            raise InputError(f"--set {shown(pair)}: wanted key=value, such as ppo.lr=1.0e-4")
        if key.count(".") >= LEVELS:
            raise InputError(f"--set {shown(pair)}: the key has {key.count('.') + 1} parts, wanted {LEVELS} at most")
        try:
            value = _from_yaml(text, comments=False)
        except ValueError as error:
            hint = "; text with signs that YAML reads goes in quotes of its own, --set 'data.path=\"[old] #1.csv\"'"
            raise InputError(f"--set {shown(pair)}: the value is not YAML: {error}{hint}") from error
        for part in reversed(key.split(".")):
            value = {part: value}
        settings.append(value)
    return settings


def parameter_cells(cells: typing.Iterable[str]) -> tuple[dict, dict]:
    """What a notebook's cell of parameters assigned last, and what papermill's did, of the cells that have run."""
    own, passed = {}, {}
    for cell in cells:
        try:
            assigned = {line.targets[0].id: ast.literal_eval(line.value) for line in ast.parse(cell).body}
        except (SyntaxError, ValueError, TypeError, AttributeError):  # it does more than assign plain values
            continue
        if cell.startswith("# Parameters"):
            passed = assigned
        elif "run_dir" in assigned:
            own = assigned
    return own, passed


def named(registry: Mapping[str, T], name: str, where: str) -> T:
    """The entry of `registry` by that name, or the user's own function, named by its Python path `module:function`.

    Modules are also sought in the current folder. Raises `InputError`, which names the parameter `where`.
    """
    if name in registry:
        return registry[name]
    module, colon, function = name.partition(":")
    if not colon:
        known, hint = ", ".join(registry), did_you_mean(name, registry)
        own = "or your own as my_module:my_function"
        raise InputError(f"{where}: {shown(name)} is not known, wanted {known}, {own}{hint}")
    try:
        module_file(name)
        found = getattr(importlib.import_module(module), function)
    except (Exception, SystemExit) as error:  # whatever the user's module raises
        problem = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(f"{where}: cannot import {shown(name)} ({problem})") from error
    if not callable(found):
        raise InputError(f"{where}: {shown(name)} is {kind(found)}, wanted a function")
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
    except Exception:  # of a package of the user's, which this imports
        return None
    return Path(spec.origin) if spec and spec.origin else None
