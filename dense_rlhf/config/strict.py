"""Strict parameter classes: pydantic dataclasses whose errors are one line that names the field.

Types convert nothing but whole numbers to numbers and lists to tuples.
"""

from __future__ import annotations

import functools
import inspect
import os
import re
import reprlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, TypeVar, dataclass_transform

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, Strict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from dense_rlhf.types import InputError, did_you_mean

LARGEST = 2**31  # whole numbers stay below
SHIPPED = ("tiny", "smollm2", "scratch", "policy", "endpoint")  # names that are no folder's, whatever lies here
LONGEST = 200  # characters of a hub id
NUMBER = re.compile(r"[-+]?((\d+\.?\d*|\.\d+)e[-+]?\d+|nan|inf|infinity)", re.IGNORECASE)  # text to YAML 1.1
T = TypeVar("T")


def absolute(path: str) -> str:
    """A path from the current folder, or with ~ from the home folder, as an absolute one."""
    if not path:
        raise ValueError("is empty, wanted a path")
    return str(Path(os.path.expanduser(path)).absolute())


def _folder_or_name(name: str) -> str:
    """The absolute path of a folder, or a hub id as it is."""
    if name in SHIPPED:
        return name
    folder = absolute(name)
    if os.path.isdir(folder):
        return folder
    if name.startswith(("/", "./", "../", "~")) or name.endswith("/") or len(name) > LONGEST:
        raise ValueError(f"is {shown(name)}, and there is no such folder; wanted one that exists, or a hub id")
    return name


def _number(given: object) -> object:
    return float(given) if isinstance(given, str) and NUMBER.fullmatch(given) else given


Text, Flag = Annotated[str, Strict()], Annotated[bool, Strict()]
Label = Annotated[int, Strict()] | Text
Place = Annotated[str, Strict(), AfterValidator(absolute)]  # of a file or folder; absolute at once, for runs elsewhere
Model = Annotated[str, Strict(), AfterValidator(_folder_or_name)]
Whole = Annotated[int, Strict(), Field(ge=0, lt=LARGEST)]
Count = Annotated[int, Strict(), Field(ge=1, lt=LARGEST)]
Several = Annotated[int, Strict(), Field(ge=2, lt=LARGEST)]
Real = Annotated[float, Strict(), BeforeValidator(_number)]
Positive = Annotated[float, Strict(), Field(gt=0), BeforeValidator(_number)]
Size = Annotated[float, Strict(), Field(ge=0), BeforeValidator(_number)]
Share = Annotated[float, Strict(), Field(ge=0, le=1), BeforeValidator(_number)]
Part = Annotated[float, Strict(), Field(gt=0, le=1), BeforeValidator(_number)]
_to_tuple = BeforeValidator(lambda given: tuple(given) if type(given) is list else given)
Many = Annotated[tuple[T, ...], Strict(), _to_tuple]
Some = Annotated[tuple[T, ...], Strict(), Field(min_length=1), _to_tuple]

_SHORT = reprlib.Repr()  # shortens values of any size, such as aliases of aliases
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60
KINDS = {str: "text", bool: "yes/no", int: "a whole number", float: "a number", list: "a list", dict: "a mapping"}
WORDS = dict(string="text", boolean="true or false", integer="a whole number", number="a number", object="a mapping")
KEY = 60  # characters of an unknown name that are shown
BOUNDS = {"minimum": "of at least", "exclusiveMinimum": "above", "maximum": "of at most"}
UNKNOWN = ("unexpected_keyword_argument", "unexpected_positional_argument", "invalid_key")
WANTED = {"finite_number": "a finite number", "less_than": "a number below {lt}"}  # by pydantic's name of the error


def shown(value: object) -> str:
    """A value for a line of error, shortened."""
    return _SHORT.repr(value)


def kind(value: object) -> str:
    """The type of a value, in words."""
    return "nothing" if value is None else KINDS.get(type(value), type(value).__name__)


@dataclass_transform(frozen_default=True)
def params(group: str) -> Callable[[type[T]], type[T]]:
    """Decorate the parameter class of a group: a frozen dataclass whose fields are checked when one is made.

    Its constructor raises `InputError` for unknown names, wrong types and values out of bounds.
    """

    def decorate(cls: type[T]) -> type[T]:
        made = dataclass(frozen=True, config=ConfigDict(title=group, extra="forbid", allow_inf_nan=False))(cls)
        checked = made.__init__

        @functools.wraps(checked)
        def __init__(self, *args, **values):
            try:
                checked(self, *args, **values)
            except ValidationError as error:
                raise InputError(_line(error, made, group)) from None

        made.__init__ = __init__
        return made

    return decorate


def parse(cls: type[T], given: object, where: str = "") -> T:
    """Make the parameter class `cls` from a mapping. Raises `InputError`, which names fields after `where`."""
    try:
        return TypeAdapter(cls).validate_python(given)
    except ValidationError as error:
        raise InputError(_line(error, cls, where)) from None


@functools.cache
def _schema(cls: type) -> dict:
    return TypeAdapter(cls).json_schema()


def _line(error: ValidationError, cls: type, where: str) -> str:
    """One sentence about the innermost of the errors: what arrived, and what was wanted."""
    first = max(error.errors(include_url=False), key=lambda one: len(one["loc"]))
    value, cause = first["input"], first.get("ctx", {}).get("error")
    is_unknown = first["type"] in UNKNOWN
    name, node = _place(cls, first["loc"][:-1] if is_unknown else first["loc"], where)
    if is_unknown:
        unknown, known = str(first["loc"][-1]), node["properties"]
        key, hint = f"{name}.{unknown[:KEY]}".lstrip("."), did_you_mean(unknown, known)
        return f"{key} is not a parameter; wanted one of {', '.join(known)}{hint}"
    if cause and "properties" not in node:
        return f"{name} {cause}"
    if cause:  # of fields together: the group's own check names them
        return re.sub(rf"\b{node['title']}\.", f"{name}.", str(cause)) if node.get("title") else str(cause)
    if first["type"] == "dataclass_type":
        return f"{name or 'the file'} is {kind(value)}, wanted a mapping"
    wanted = WANTED.get(first["type"], _words(node)).format(**first.get("ctx", {}))
    is_kind = first["type"].endswith("_type")
    value = list(value) if isinstance(value, tuple) else value
    return f"{name} is {shown(value)}{f' ({kind(value)})' if is_kind else ''}, wanted {wanted}{_hint(first, node)}"


def _hint(error: dict, node: dict) -> str:
    """How to write what was meant, where that can be told from what arrived."""
    value = error["input"]
    if error["type"] == "literal_error":
        return did_you_mean(value, [str(one) for one in node.get("enum", ())])
    if error["type"] == "tuple_type" and not isinstance(value, dict):
        return f"; write [{shown(value)}]"
    if error["type"] == "string_type" and isinstance(value, (bool, int, float)):
        return "; put it in quotes"
    return ""


def _place(cls: type, path: tuple[str | int, ...], where: str) -> tuple[str, dict]:
    """The name of the field that pydantic calls `path`, and its JSON schema."""
    node = _schema(cls)
    groups = node.get("$defs", {})
    for part in path:
        fields = node.get("properties", {})
        part = list(fields)[part] if fields and isinstance(part, int) else part  # a positional argument
        if part in fields:
            where, node = f"{where}.{part}".lstrip("."), fields[part]
        elif isinstance(part, int):  # else the branch of a union, which needs no name
            where, node = f"{where}[{part}]", node.get("items", node)
        node = groups[node["$ref"].rpartition("/")[2]] if "$ref" in node else node
    return where, node


def _words(node: dict) -> str:
    """What a JSON schema of a field admits, in words."""
    if "anyOf" in node:
        return ", or ".join(map(_words, node["anyOf"]))
    if "enum" in node:
        return f"one of {', '.join(node['enum'])}"
    if "const" in node:
        return f"the word {node['const']!r}"
    if node["type"] == "array":
        least = f" of at least {node['minItems']}" if "minItems" in node else ""
        return f"a list{least}, each {_words(node['items'])}"
    bounds = [f" {text} {node[key]:g}" for key, text in BOUNDS.items() if key in node]
    return WORDS.get(node["type"], "nothing") + " and".join(bounds)


def listed(cls: type, names: Iterable[str] | None = None) -> dict[str, tuple[str, object, str]]:
    """What the fields of a parameter class admit, in words, their default, and what they mean."""
    meaning, fields = described(cls), _schema(cls)["properties"]
    chosen = {name: fields[name] for name in names or fields}
    return {name: (_words(node), node.get("default"), meaning.get(name, "")) for name, node in chosen.items()}


def described(cls: type) -> dict[str, str]:
    """The comment on each field of a parameter class, by the field's name."""
    return dict(re.findall(r"^    (\w+): .*?  # (.+)$", inspect.getsource(cls), re.M))
