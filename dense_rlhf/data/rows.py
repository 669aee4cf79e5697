"""Rows of a file or of a hub dataset. A row that cannot be read is, in its place, the `InputError` that says why."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from dense_rlhf.types import InputError

FORMS = ("json", "jsonl", "ndjson", "parquet")
WANTED = "Wanted .json (a list), .jsonl or .parquet, the first two perhaps with .gz"
OTHER = "fields missing or of another type"  # a reason to leave a row out
MARKS = {
    "utf-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE),  # one begins as one of UTF-16
    "utf-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE),
}  # byte order marks, as no UTF-8 begins
csv.field_size_limit(2**31 - 1)  # texts are as long as they are


def read_bytes(path: str | Path) -> bytes:
    """A file, read once. Raises `InputError` where there is none, or it cannot be read."""
    try:
        if Path(path).is_file():
            return Path(path).read_bytes()
        problem = f"{path} is a folder" if Path(path).is_dir() else f"no file at {path}"
    except (OSError, ValueError) as error:
        problem = f"{str(path)[:200]} cannot be read ({getattr(error, 'strerror', None) or error})"
    raise InputError(f"data.path: {problem}; give the path of a file that exists")


def read_rows(path: str | Path) -> list[dict]:
    """All rows of a .json (a list), .jsonl or .parquet file. Raises `InputError` that names file and line or row."""
    rows = file_rows(read_bytes(path), Path(path))
    for number, row in enumerate(rows, 1):
        if isinstance(row, InputError):
            raise InputError(f"{path}, row {number}: {row}")
    return rows


def file_rows(
    content: bytes,
    path: Path,
    fields: Sequence[str] | None = None,
    encoding: str = "utf-8",
    other: Callable | None = None,
) -> list[dict | InputError]:
    """The rows in the bytes of a file, in the form that its name ends in; of a parquet file only `fields`.

    Text of any other ending goes to `other`; without it, it is JSON lines. Raises `InputError` that names the file, and
    the line if it is one.
    """
    name = path.name.lower()
    try:
        if name.endswith(".gz"):
            content, name = gzip.decompress(content), name.removesuffix(".gz")
        form = name.rpartition(".")[2]
        if form == "parquet":
            return list(_parquet(content, fields))
        text = decoded(content, encoding)
        read = _json_list if form == "json" else other if other and form not in FORMS else _json_lines
        if read is not _json_lines and not text.strip():
            raise ValueError("it is empty")
        return [row if isinstance(row, (dict, InputError)) else InputError(OTHER) for row in read(text)]
    except InputError as error:
        raise InputError(f"{path} {error}") from error
    except (ValueError, EOFError, OSError, RecursionError, zlib.error) as error:  # of text, JSON, gzip or parquet
        wanted = "" if other else f". {WANTED}"
        raise InputError(f"{path} is not readable: {' '.join(str(error).split())}{wanted}") from error


def decoded(content: bytes, encoding: str) -> str:
    """Text without a byte order mark. Raises ValueError that names the line of a byte that the encoding lacks."""
    if codecs.lookup(encoding).name == "utf-8":
        encoding = next((name for name, marks in MARKS.items() if content.startswith(marks)), "utf-8-sig")
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        byte = f"line {line} holds the byte {content[error.start]:#04x}, which is not {encoding.removesuffix('-sig')}"
        raise ValueError(f"{byte}; data.encoding names another encoding, such as cp1252 or latin-1") from error


# ---------------------------------------------------------------------------------------------------- JSON


def _object(pairs: list[tuple[str, object]]) -> dict | InputError:
    made = dict(pairs)
    return made if len(made) == len(pairs) else InputError("a field is given twice")


def _json_list(text: str) -> list[object]:
    rows = json.loads(text, object_pairs_hook=_object)
    if not isinstance(rows, list):
        raise ValueError(f"it holds one {type(rows).__name__}, wanted a list of rows")
    return rows


def _json_lines(text: str) -> Iterator[object]:
    for number, line in enumerate(io.StringIO(text, newline=None), 1):
        if line.strip():
            try:
                yield json.loads(line, object_pairs_hook=_object)
            except json.JSONDecodeError as error:  # a damaged file; what follows is JSON that Python cannot hold
                raise ValueError(f"line {number}, column {error.colno}: {error.msg}") from error
            except (ValueError, RecursionError):
                yield InputError("nested too deeply, or a number of too many digits")


# ---------------------------------------------------------------------------------------------------- parquet


def _parquet(content: bytes, fields: Sequence[str] | None) -> Iterator[dict | InputError]:
    """Rows of these fields, of those that are there. Raises ValueError for a file that has none of them."""
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(content))
        names = file.schema_arrow.names
        there = [name for name in fields or names if name in names]
        if not there or any(names.count(name) > 1 for name in there):
            raise ValueError(f"it has columns {names[:20]}, wanted {', '.join(fields or ['some'])}, none twice")
        batches = file.read(columns=there).to_batches()
    except pyarrow.ArrowException as error:
        raise ValueError(" ".join(str(error).split())) from error
    for batch in batches:
        for i in range(batch.num_rows):
            try:
                yield {name: batch.column(name)[i].as_py() for name in there}
            except (ValueError, OverflowError, pyarrow.ArrowException):
                yield InputError("no UTF-8, or a date out of range")


# ---------------------------------------------------------------------------------------------------- CSV


def csv_rows(
    text: str, separator: str, columns: tuple[str, str], is_label: Callable[[object], bool]
) -> Iterator[dict | InputError]:
    """Rows of a CSV by its header. A line whose quotes do not pair costs that line alone.

    Raises `InputError` where a column is missing or there twice. `is_label`, of the second, tells rows from prose.
    """
    lines = list(io.StringIO(text, newline=""))
    header: list[str] = []

    def is_row(line: str) -> bool:
        """Whether a line would be a row if its quotes were left out."""
        (fields,) = csv.reader([line.replace('"', "")], delimiter=separator, skipinitialspace=True)
        return bool(header) and len(fields) == len(header) and is_label(fields[header.index(columns[1])])

    for fields in _records(lines, separator, is_row):
        if not header and fields != []:
            header = fields or []
            if any(header.count(name) != 1 for name in columns):
                named = (
                    "name yours by data.text and data.label, what parts them by data.separator, or set data.encoding"
                )
                raise InputError(f"has columns {header[:20]}, wanted {' and '.join(columns)}, each once; {named}")
        elif fields is None:
            yield InputError("a stray quote")
        elif fields:
            fits = len(fields) == len(header)
            yield dict(zip(header, fields)) if fits else InputError("not as many fields as the header")


def _swallows(record: list[str], is_row: Callable[[str], bool]) -> bool:
    """Whether the lines of a record are rows rather than a text of several lines: first and last, or most of the rest.

    Where the text is the last column a first line alone looks like a row, where it is the first a last one.
    """
    if len(record) < 2:
        return False
    first, *rest, last = map(is_row, record)
    return first and last or 2 * sum(rest) > len(rest)


def _records(lines: list[str], separator: str, is_row: Callable[[str], bool]) -> Iterator[list[str] | None]:
    """The fields of each record; None for a line whose quotes do not pair."""
    at = 0
    while at < len(lines):
        start = at
        rest = (lines[i] for i in range(start, len(lines)))
        reader = csv.reader(rest, delimiter=separator, skipinitialspace=True, strict=True)
        try:
            for fields in reader:
                record = lines[at : start + reader.line_num]
                if sum(line.count('"') for line in record) % 2 or _swallows(record, is_row):
                    break
                yield fields
                at += len(record)
            else:
                return
        except csv.Error:  # what follows a closing quote is no separator, or nothing closes it
            pass
        yield None
        at += 1


# ---------------------------------------------------------------------------------------------------- the hub


def hub_rows(repository: str, revision: str | None, split: str, rows: int | None = None) -> tuple[Iterable[dict], str]:
    """All rows of a hub dataset, or the first few, at the commit that `revision` resolves to; and that commit.

    No hub was within reach where this was written, so it has run against a stand-in only.
    """
    import datasets
    import huggingface_hub

    try:
        commit = huggingface_hub.HfApi().dataset_info(repository, revision=revision).sha
        table = datasets.load_dataset(repository, revision=commit, split=split, streaming=rows is not None)
        return list(table if rows is None else table.take(rows)), commit
    except Exception as error:  # the hub's errors share no base class
        place = f"{repository} at {revision or 'its default branch'} from the hub ({type(error).__name__})"
        raise InputError(f"data.name: cannot load {place}. Without a hub, set data.path to a local file") from error
