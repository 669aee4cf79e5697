"""Whatever stands among good rows: nothing raises, and every row that was read was kept or counted with its reason."""

import json
import tempfile
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from made_rows import CHATS, HH_ROWS, REVIEWS, csv_text, left_out, total

from dense_rlhf.config.params import DataParams
from dense_rlhf.data import collect_pairs, load_data, preference_pair, prompt_text

ODD = [
    "\n\nHuman: a\n\nAssistant: b",
    "Human: a\n\nAssistant: c",
    "\n\nHuman: a\n\nAssistant:",
    "\ud83d",
    " ",
    "\0",
    "1",
]
TEXTS = st.sampled_from(ODD) | st.text(st.characters(exclude_categories=()), max_size=12)
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
ROLES = st.sampled_from(["user", "assistant", "system", "tool"]) | ANYTHING
MESSAGES = st.lists(st.fixed_dictionaries({"role": ROLES, "content": TEXTS | ANYTHING}) | ANYTHING, max_size=4)
SIDES = TEXTS | MESSAGES | ANYTHING
PAIRS = st.fixed_dictionaries({}, optional={"prompt": SIDES, "chosen": SIDES, "rejected": SIDES})
HALF_GOOD = st.builds(  # two replies to one prompt, so that what is odd is odd in one place
    lambda asked, role, replies: {
        side: [*CHATS[0]["chosen"], {"role": role, "content": asked}, {"role": "assistant", "content": reply}]
        for side, reply in zip(("chosen", "rejected"), replies)
    },
    *(TEXTS, st.just("user") | ROLES, st.lists(TEXTS, min_size=2, max_size=2)),
)
ROWS = st.builds(list.__add__, st.lists(HALF_GOOD, max_size=8), st.lists(PAIRS | ANYTHING, max_size=8))
LABELLED = st.fixed_dictionaries(
    {}, optional={"text": TEXTS | ANYTHING, "label": st.sampled_from([0, 1, "0", "1"]) | ANYTHING}
)


def read(name, suffix, content):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"rows.{suffix}")
        path.write_bytes(content)
        return load_data(DataParams(name, path=str(path)))


@given(ROWS)
def test_rows_of_pairs(rows):
    for good in (HH_ROWS, CHATS):
        dataset = collect_pairs([*rows, *good], preference_pair, 2000, "pairs", "r")
        assert dataset.counts["read"] == len(rows) + 400 and sum(left_out(dataset).values()) <= len(rows)
        for pair in (*dataset.reward, *dataset.gold, *dataset.test):  # what is kept can be written, and read in turns
            assert "".join((prompt_text(pair.prompt), pair.chosen, pair.rejected)).encode()
            roles = [m.role for m in pair.prompt if m.role != "system"] if isinstance(pair.prompt, tuple) else ["user"]
            assert roles[::2] == ["user"] * len(roles[::2]) and roles[1::2] == ["assistant"] * (len(roles) // 2)


@given(ROWS)
def test_lines_and_lists_of_pairs(rows):
    lines = "\n".join(map(json.dumps, [*rows, *HH_ROWS])).encode()
    for suffix, content in (("jsonl", lines), ("json", json.dumps([*rows, *HH_ROWS]).encode())):
        dataset = read("hh_rlhf", suffix, content)
        assert dataset.counts["read"] == len(rows) + 400 and sum(left_out(dataset).values()) <= len(rows)


@given(st.lists(LABELLED | ANYTHING, max_size=20))
def test_lines_of_labelled_texts(rows):
    dataset = read("reviews", "jsonl", "\n".join(map(json.dumps, [*rows, *REVIEWS])).encode())
    assert dataset.counts["read"] == len(rows) + 600 and sum(left_out(dataset).values()) <= len(rows)


LINE = st.text(st.sampled_from('"",,ab 01;\té\0'), min_size=1, max_size=20)


@given(st.lists(st.tuples(st.integers(1, 599), LINE.filter(str.strip)), max_size=6))
def test_lines_of_a_csv(changes):
    """A bad line costs itself. Two may make a text of several lines with what is between, never of many rows."""
    lines = csv_text(REVIEWS).splitlines()
    for at, line in changes:
        lines.insert(at, line)
    dataset = read("reviews", "csv", "\n".join(lines).encode())
    kept = total(dataset.counts, "kept: ")
    assert abs(kept - 600) <= len(changes) and sum(left_out(dataset).values()) <= 2 * len(changes)
