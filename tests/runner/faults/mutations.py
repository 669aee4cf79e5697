"""Damaged parameter and data files, made one by one from good ones; each with what the line of error must name."""

import copy
import gzip
import io
import json
import math
from collections.abc import Iterator
from dataclasses import fields

import yaml
from pydantic import TypeAdapter

from dense_rlhf.config.params import GROUPS, RunParams

STUDY = {"study": "s", "notebooks": ["04_ppo"], "arms": {"plain": {"sources": ["terminal"], "weights": [1.0]}}}
WRONG = {  # by the type's name in JSON schema
    "boolean": ["yes please", 1, [True]],
    "integer": ["text", 1.5, True, [1], {"a": 1}, 10**30, math.nan],
    "number": ["one", True, [1.0], {"a": 1}, math.nan],
    "string": [3, True, ["x"], {"a": 1}],
    "array": [{"a": 1}, [[["x"]]], True, [math.nan], [{"a": [1]}]],
}


def changed(group: str, name: str, value: object) -> str:
    """The good study with one value of its own."""
    study = copy.deepcopy(STUDY)
    where = study["arms"]["plain"] if group == "shape" else study.setdefault(group, {}) if group else study
    where[name] = value
    return yaml.safe_dump(study)


def values() -> Iterator[tuple[str, str, str]]:
    """Every parameter with every kind of value that it cannot have: (label, text, names in the error)."""
    for group, cls in GROUPS.items():
        where = "arms.plain" if group == "shape" else group
        for name, schema in TypeAdapter(cls).json_schema()["properties"].items():
            kinds = {one["type"]: one for one in schema.get("anyOf", [schema])}
            kind = next(kind for kind in ("array", *WRONG) if kind in kinds)
            bad = [*WRONG[kind], *(["no such choice"] if "enum" in kinds[kind] else [])]
            bad += [
                kinds[kind][key] - off
                for key, off in {"minimum": 1, "exclusiveMinimum": 0}.items()
                if key in kinds[kind]
            ]
            bad += [kinds[kind]["maximum"] + 1] if "maximum" in kinds[kind] else []
            for value in bad:
                yield f"{group}.{name}={value!r:.30}", changed(group, name, value), f"{where} {name}"
        yield f"{group}: unknown", changed(group, "learning_rat", 1), f"{where}.learning_rat"
    for group in (g for g in GROUPS if g != "shape"):
        for value in (3, "text", [1]) if group != "data" else (3, "text", [3]):
            yield f"{group}={value!r}", changed("", group, value), group


def structures() -> Iterator[tuple[str, str | bytes, str]]:
    """Files whose form is wrong: keys, names, nesting, YAML itself."""
    for name, bad in {
        "study": [3, "a/b", "../x", "", [1], "é"],
        "arms": [[], {}, 3, {"a/b": {}}, {1: {}}, {"x": 3}, {"x": [1]}],
        "seeds": ["text", [], [1, 1], [1.5], [-1], [10**30], 3],
        "notebooks": ["x", ["99"], [3], 4],
        "workers": [0, -1, 1.5, "two", True],
        "threads": [0, 1.5, "two"],
        "shape": [{"temperature": 2.0}],
        "timeout_minutes": [0, -1, math.nan, math.inf],
        "size": ["huge", 3, [1], {"a": 1}],
        "sizes": [3, "x", [1], {"a": 1}, {"a": [1]}],
        "learning_rate": [1],
        "Study": ["x"],
        "PPO": [{"lr": 0.1}],
        "run": [{}],
        1: [2],
        "": [2],
    }.items():
        for value in bad:
            yield f"{name}={value!r:.30}", yaml.safe_dump(copy.deepcopy(STUDY) | {name: value}), str(name)
    good, levels = yaml.safe_dump(STUDY), "abcdefgh"
    bomb = "a: &a [x, x, x, x, x, x, x, x]\n" + "".join(
        f"{new}: &{new} [{', '.join([f'*{old}'] * 8)}]\n" for old, new in zip(levels, levels[1:])
    )
    texts = {
        "empty": "",
        "null": "null",
        "a word": "hello",
        "a list": "- 1",
        "two documents": good + "---\n" + good,
        "open list": "a: [",
        "open quote": "a: 'x",
        "tab": "ppo:\n\tlr: 0.1",
        "colon": "a: b: c",
        "no alias": "a: *b",
        "tag": "!!python/object/apply:os.system [ls]",
        "half": good[: len(good) // 2] + "\n  - [",
        "deep": "a: " + "[" * 20_000,
        "deep map": "a: " + "{b: " * 5_000,
        "digits": "a: " + "9" * 5_000,
        "binary": b"\x00\x01\xff\xfe",
        "png": b"\x89PNG\r\n\x1a\n" + bytes(40),
        "latin": "study: é".encode("latin-1"),
        "utf-16": good.encode("utf-16"),
        "utf-32": good.encode("utf-32"),
        "zip": gzip.compress(good.encode()),
        "huge": good + "# " + "x" * 1_000_001,
        "anchor": "x: &",
        "merge": "ppo: {<<: 3}",
        "tabs": "\t\t\t",
        "list key": "? [1]\n: 2",
        "json lines": '{"a": 1}\n{"a": 2}',
        "comma": "a: {b: 1,, c: 2}",
    }
    yield from ((label, text, "s.yaml") for label, text in texts.items())
    yield "date", "a: 2001-99-99", "a is not a parameter"
    yield "twice", good + "study: other\n", "'study' is given twice"
    yield "twice inside", good + "ppo: {lr: 0.1, lr: 0.2}\n", "'lr' is given twice"
    yield "alias of itself", good + "seeds: &x [*x]\n", "s.yaml itself"
    yield "arms in arms", "study: s\narms: &x {b: *x}\n", "s.yaml itself"
    yield "bomb", bomb + "study: s\n", "s.yaml values"
    yield "bomb as a value", _bomb_in_seeds(), "s.yaml values"


def _bomb_in_seeds() -> str:
    """Ten billion seeds in a few lines, by aliases of aliases."""
    inner = "&a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"
    for new, old in zip("bcdefghij", "abcdefghi"):
        inner = f"&{new} [{inner}, {', '.join([f'*{old}'] * 9)}]"
    return f"study: s\nseeds: {inner}\n"


# ---------------------------------------------------------------------------------------------------- data


def turns(reply: str, number: int) -> str:
    return f"\n\nHuman: What of film number {number}?\n\nAssistant: {reply}"


def good_rows(name: str) -> list[dict]:
    """Rows enough that no split is empty."""
    if name == "reviews":
        words = " ".join(["film"] * 20)
        return [{"text": f"review {i} {words}", "label": str(i % 2)} for i in range(1200)]
    if name == "hh_rlhf":
        return [{"chosen": turns("Good.", i), "rejected": turns("Bad.", i)} for i in range(400)]
    return [
        {
            side: [{"role": "user", "content": f"What of film {i}?"}, {"role": "assistant", "content": side}]
            for side in ("chosen", "rejected")
        }
        for i in range(400)
    ]


def as_csv(rows: list[dict]) -> bytes:
    return "\n".join([",".join(rows[0]), *(",".join(row.values()) for row in rows), ""]).encode()


def as_lines(rows: list) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def as_parquet(rows: list[dict]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


FORMS = {
    "reviews": {"csv": as_csv},
    "hh_rlhf": {"jsonl": as_lines, "jsonl.gz": lambda rows: gzip.compress(as_lines(rows))},
    "ultrafeedback": {"json": lambda rows: json.dumps(rows).encode(), "parquet": as_parquet},
}
NOISE = {
    "empty": b"",
    "zeros": bytes(64),
    "binary": bytes(range(256)),
    "png": b"\x89PNG\r\n\x1a\n" + bytes(40),
    "a word": b"hello",
    "null": b"null\n",
    "a number": b"3\n",
    "html": b"<!doctype html><p>404</p>",
    "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "utf-16": '{"chosen": "x"}\n'.encode("utf-16"),
    "deep": b"[" * 100_000,
}


def damaged(name: str, form: str, write) -> Iterator[tuple[str, bytes]]:
    """One good file, broken in each of its ways."""
    rows = good_rows(name)
    whole = write(rows)
    yield from NOISE.items()
    yield "few rows", write(rows[:3])
    yield "other fields", write([{f"my_{key}": value for key, value in row.items()} for row in rows])
    yield "one field", write([{key: value for key, value in list(row.items())[:1]} for row in rows])
    yield "one field twice", write([dict.fromkeys(row, next(iter(row.values()))) for row in rows])
    if form != "csv":
        yield from ((f"cut at {k}/7", whole[: len(whole) * k // 7 - 3]) for k in range(1, 8))
        yield "numbers", write([{key: 3 for key in row} for row in rows])
    if form in ("jsonl", "json"):
        for k in range(4):
            at = len(whole) * k // 4 + 20
            yield f"quotes lost at {k}/4", whole[:at] + whole[at:].replace(b'"', b"", 3)
            yield f"a bad byte at {k}/4", whole[:at] + b"\xff" + whole[at:]
    if form in ("jsonl.gz", "parquet"):
        yield from ((f"last {k} bytes lost", whole[:-k]) for k in (1, 4, 8))
        yield "its end is zeros", whole[:-30] + bytes(30)
    if form == "jsonl":
        yield "a list a line", as_lines([list(row.values()) for row in rows])
        yield "not zipped as the name says", b"\x1f\x8b" + whole


def data_files() -> Iterator[tuple[str, str, str, bytes]]:
    """(label, dataset, ending, bytes)."""
    for name, forms in FORMS.items():
        for form, write in forms.items():
            for label, content in damaged(name, form, write):
                yield f"{name}.{form}: {label}", name, form, content


def marks() -> Iterator[tuple[str, str, bytes]]:
    """Files of what people marked: (label, parameter, bytes)."""
    good = b'{"text": "a bad film", "spans": [[2, 5, -1.0]]}\n'
    own = {
        "cut": good + good[:20],
        "place": good.replace(b"5", b"99"),
        "nan": good.replace(b"-1.0", b"NaN"),
        "no mark": b'{"text": "a film", "spans": []}\n',
    }
    for label, content in (NOISE | own).items():
        yield f"rationales: {label}", "attribution.rationale_path", content


assert set(GROUPS) < {field.name for field in fields(RunParams)}
