"""Made-up rows of each dataset, enough that no split is empty, and files of them."""

import gzip
import json

import pyarrow.parquet

REVIEWS = [
    {"text": f"review {i} of a {'good' if i % 2 else 'bad'} film " + "word " * 16, "label": i % 2} for i in range(600)
]


def hh_row(i, chosen="yes", rejected="no"):
    start = f"\n\nHuman: question {i}\n\nAssistant: "
    return {"chosen": start + f"{chosen} {i}", "rejected": start + f"{rejected} {i}"}


HH_ROWS = [hh_row(i) for i in range(400)]


def turns(*contents):
    """A user's turn, the assistant's, and so on."""
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def chat_row(i):
    return {"chosen": turns(f"question {i}", f"yes {i}"), "rejected": turns(f"question {i}", f"no {i}")}


CHATS = [chat_row(i) for i in range(400)]


def csv_text(rows, separator=",", end="\n"):
    """Rows without quotes, which need none."""
    lines = [separator.join(rows[0]), *(separator.join(map(str, row.values())) for row in rows)]
    return end.join([*lines, ""])


def write_rows(path, rows):
    """Rows in the form that the file's name ends in."""
    if path.name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return path
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    text = csv_text(rows) if ".csv" in path.name else json.dumps(rows) if ".jsonl" not in path.name else lines + "\n"
    path.write_bytes(gzip.compress(text.encode()) if path.name.endswith(".gz") else text.encode())
    return path


def total(counts, start):
    return sum(number for name, number in counts.items() if name.startswith(start))


def left_out(data):
    """The rows left out, by reason; every row that was read is among them or was kept."""
    counts = data.counts
    assert counts["read"] == total(counts, "kept: ") + total(counts, "left out: "), counts
    return {name.removeprefix("left out: "): n for name, n in counts.items() if name.startswith("left out: ")}
