"""Files: read once in every form, or refused by name and line; what a row alone is guilty of costs that row."""

import gzip
import hashlib
import json
import os
import random

import pyarrow
import pyarrow.parquet
import pytest
from made_rows import CHATS, HH_ROWS, REVIEWS, csv_text, left_out, write_rows

from dense_rlhf.config.params import DataParams
from dense_rlhf.data import DATASETS, load_data, read_rows
from dense_rlhf.types import InputError


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.json.gz", "A.JSON", "a.parquet"])
def test_rows_of_every_form(tmp_path, name):
    path = tmp_path / name
    if name.isupper():
        path.write_text(json.dumps(HH_ROWS))
    else:
        write_rows(path, HH_ROWS)
    assert read_rows(path) == HH_ROWS


def test_the_revision_is_the_hash_of_the_bytes_that_were_read(tmp_path, monkeypatch):
    """A file that another process writes meanwhile is read once."""
    for name, rows in (("reviews.csv", REVIEWS), ("hh_rlhf.jsonl", HH_ROWS)):
        path = write_rows(tmp_path / name, rows)
        monkeypatch.setattr("dense_rlhf.files.file_sha256", lambda path: pytest.fail("read twice"))
        dataset = load_data(DataParams(name.partition(".")[0], path=str(path)))
        assert dataset.revision == hashlib.sha256(path.read_bytes()).hexdigest()


WHOLE = gzip.compress(b'{"chosen": "' + random.Random(0).randbytes(4000).hex().encode() + b'"}\n')
BAD_FILES = {
    "cut.jsonl": (b'{"chosen": "a"}\n{"chosen": ', "line 2, column"),
    "cut.jsonl.gz": (WHOLE[: len(WHOLE) // 2], "not readable"),
    "flipped.jsonl.gz": (WHOLE[:100] + bytes(50) + WHOLE[150:], "not readable"),
    "plain.jsonl.gz": (b'{"chosen": "a"}\n', "[Nn]ot a gzipped file"),
    "plain.json.gz": (b"[]", "[Nn]ot a gzipped file"),
    "list.json": (b"[1, 2", "column"),
    "one.json": (b'{"chosen": "a", "rejected": "b"}', "one dict, wanted a list of rows"),
    "lines.json": (b'{"chosen": "a"}\n{"chosen": "b"}', "Extra data: line 2"),
    "latin.jsonl": (b'{"chosen": "a"}\n{"chosen": "\xe9"}\n', "line 2 holds the byte 0xe9.*data.encoding"),
    "nul.jsonl": (b'{"chosen": "a"}\n\0\0\0\n', "line 2"),
    "not.parquet": (b"PAR1 but no table", "not readable"),
    "empty.parquet": (b"", "not readable"),
    "empty.json": (b"", "it is empty"),
    "blank.json": (b"\xef\xbb\xbf \n", "it is empty"),
    "deep.json": (b"[" * 100_000, "recursion"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_named(tmp_path, name):
    content, message = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    for read in (read_rows, lambda path: load_data(DataParams("hh_rlhf", path=str(path)))):
        with pytest.raises(InputError, match=f"{name}.*{message}"):
            read(tmp_path / name)


def test_no_line_is_no_row(tmp_path):
    (tmp_path / "empty.jsonl").write_bytes(b"\n")
    assert read_rows(tmp_path / "empty.jsonl") == []
    with pytest.raises(InputError, match="empty.jsonl: 0 rows leave nothing"):
        load_data(DataParams("hh_rlhf", path=str(tmp_path / "empty.jsonl")))


def test_rows_that_must_all_be_good_are_named(tmp_path):
    for row, message in (
        ("[1]", "fields missing or of another type"),
        ('{"a": 1, "a": 2}', "given twice"),
        ("[" * 99_999, "nested too deeply"),
    ):
        (tmp_path / "r.jsonl").write_text('{"a": 1}\n\n' + row)
        with pytest.raises(InputError, match=f"r.jsonl, row 2: .*{message}"):
            read_rows(tmp_path / "r.jsonl")


@pytest.mark.parametrize("name", DATASETS)
def test_a_path_that_is_no_file_is_named(name, tmp_path):
    (tmp_path / "folder.csv").mkdir()
    os.mkfifo(tmp_path / "pipe.csv")  # reading it would wait forever
    for file, message in (
        ("nowhere.jsonl", "no file at .*nowhere.jsonl"),
        ("folder.csv", "folder.csv is a folder"),
        ("pipe.csv", "no file at .*pipe.csv"),
        ("x" * 300, "xxx.* cannot be read .File name too long"),
        ("a.csv/b", "no file at"),
    ):
        with pytest.raises(InputError, match=f"data.path: .*{message}"):
            load_data(DataParams(name, path=str(tmp_path / file)))


def test_a_file_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    def denied(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("pathlib.Path.read_bytes", denied)  # root reads everything
    with pytest.raises(InputError, match="data.path: .*mine.csv cannot be read .Permission denied"):
        load_data(DataParams(path=str(write_rows(tmp_path / "mine.csv", REVIEWS))))


# ---------------------------------------------------------------------------------------------------- JSON


@pytest.mark.parametrize(
    "line, reason",
    [
        ('{"chosen": "a", "chosen": "b", "rejected": "c"}', "a field is given twice"),
        ('{"chosen": [{"role": "user", "role": "user"}], "rejected": []}', "fields missing or of another type"),
        ('{"chosen": NaN, "rejected": Infinity}', "fields missing or of another type"),
        ('{"a": ' + "9" * 5000 + "}", "nested too deeply, or a number of too many digits"),
        ('{"a": ' + "[" * 99_999 + "]" * 99_999 + "}", "nested too deeply, or a number of too many digits"),
        ("null", "fields missing or of another type"),
        ("{}", "fields missing or of another type"),
        ('"\\u0000"', "fields missing or of another type"),
    ],
    ids=range(8),
)
def test_a_row_of_json_that_teaches_nothing_is_counted(tmp_path, line, reason):
    path = write_rows(tmp_path / "a.jsonl", HH_ROWS)
    path.write_text("\n\r\n" + line + "\r\n" + path.read_text().replace("\n", "\r\n"))
    assert left_out(load_data(DataParams("hh_rlhf", path=str(path)))) == {reason: 1}


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_a_byte_order_mark_is_read(tmp_path, name, encoding):
    path = write_rows(tmp_path / name, HH_ROWS)
    path.write_bytes(path.read_text().encode(encoding))
    assert read_rows(path) == HH_ROWS
    assert left_out(load_data(DataParams("hh_rlhf", path=str(path)))) == {}


def test_pairs_of_another_encoding(tmp_path):
    rows = [{side: text + " café" for side, text in row.items()} for row in HH_ROWS]
    (tmp_path / "a.json").write_bytes(json.dumps(rows, ensure_ascii=False).encode("cp1252"))
    dataset = load_data(DataParams("hh_rlhf", path=str(tmp_path / "a.json"), encoding="cp1252"))
    assert dataset.reward[0].chosen.endswith("café") and left_out(dataset) == {}


# ---------------------------------------------------------------------------------------------------- parquet


def parquet(path, **columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return DataParams("hh_rlhf", path=str(path))


SIDES = {side: [row[side] for row in HH_ROWS] for side in ("chosen", "rejected")}


def test_columns_that_nobody_needs_are_not_read(tmp_path):
    dates = pyarrow.array([2**60] * 400, pyarrow.timestamp("us"))  # no year that Python has
    assert left_out(load_data(parquet(tmp_path / "a.parquet", **SIDES, date=dates))) == {}
    with pytest.raises(InputError, match="columns .'date'., wanted prompt, chosen, rejected"):
        load_data(parquet(tmp_path / "b.parquet", date=dates))


def bad_cell(values, cell):
    """The values with the first as `cell`, as text that need not be UTF-8."""
    raw = pyarrow.array([cell, *(value.encode() for value in values[1:])], pyarrow.binary())
    return pyarrow.Array.from_buffers(pyarrow.string(), len(raw), raw.buffers())


@pytest.mark.parametrize(
    "columns, lost",
    [
        (SIDES | {"chosen": [None, *SIDES["chosen"][1:]]}, {"fields missing or of another type": 1}),
        (SIDES | {"chosen": bad_cell(SIDES["chosen"], b"\xff")}, {"no UTF-8, or a date out of range": 1}),
        (SIDES | {"prompt": [3] + [None] * 399}, {"fields missing or of another type": 1}),
    ],
    ids=["nothing", "no UTF-8", "a number"],
)
def test_a_bad_cell_costs_its_row(tmp_path, columns, lost):
    assert left_out(load_data(parquet(tmp_path / "a.parquet", **columns))) == lost


@pytest.mark.parametrize(
    "columns, message",
    [
        ({"chosen": [1] * 400, "rejected": [2] * 400}, "fields missing or of another type': 400"),
        ({"chosen": [b"a"] * 400, "rejected": [b"b"] * 400}, "fields missing or of another type': 400"),
        ({"chosen": SIDES["chosen"]}, "fields missing or of another type': 400"),
        ({"chosen": [], "rejected": []}, "0 rows leave nothing"),
    ],
    ids=["numbers", "bytes", "one side", "no rows"],
)
def test_a_table_of_another_schema_is_refused(tmp_path, columns, message):
    with pytest.raises(InputError, match=f"a.parquet.*{message}"):
        load_data(parquet(tmp_path / "a.parquet", **columns))


def test_messages_with_more_fields(tmp_path):
    """In a table a field of one turn is one of all, mostly null."""
    rows = [
        {side: [turn | {"tool_calls": [{"id": "x"}] if i == 7 else None} for turn in row[side]] for side in row}
        for i, row in enumerate(CHATS)
    ]
    dataset = load_data(DataParams("ultrafeedback", path=str(write_rows(tmp_path / "a.parquet", rows))))
    assert left_out(dataset) == {"a turn that calls a tool": 1}


# ---------------------------------------------------------------------------------------------------- CSV


@pytest.mark.parametrize(
    "content, message",
    [
        (b"text,text,label\na,b,1\n", "each once"),
        (b'"text,label\n' + csv_text(REVIEWS).encode(), "columns .., wanted text and label"),
        (b"\n\n\n", "it is empty"),
        (b"text,label\n", "0 rows leave nothing"),
        (csv_text(REVIEWS).encode("utf-16-le"), "wanted text and label"),
        (b"text,label\n\xff\xfe,1\n", "line 2 holds the byte 0xff"),
        (bytes(range(256)), "line 12 holds|line 2 holds"),
    ],
)
def test_a_csv_of_something_else_is_named(tmp_path, content, message):
    (tmp_path / "mine.csv").write_bytes(content)
    with pytest.raises(InputError, match=f"mine.csv.*({message})"):
        load_data(DataParams(path=str(tmp_path / "mine.csv")))


def test_nul_characters_are_characters(tmp_path):
    (tmp_path / "r.csv").write_text(csv_text([{**REVIEWS[0], "text": "a\0b" + REVIEWS[0]["text"]}, *REVIEWS[1:]]))
    assert left_out(load_data(DataParams(path=str(tmp_path / "r.csv")))) == {}
