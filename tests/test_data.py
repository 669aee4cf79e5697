"""Datasets: cleaning, splits that share nothing, honest counts, and files that are read or refused by name."""

import gzip
import json
import random
from collections import Counter

import pytest
from conftest import SHARED

from dense_rlhf import data
from dense_rlhf.config.params import DataParams
from dense_rlhf.data import collect_pairs, hh_pair, load_data, read_rows, ultrafeedback_pair
from dense_rlhf.types import InputError, LabelledText, Message, PreferencePair


def hh_row(i, chosen="yes", rejected="no"):
    start = f"\n\nHuman: question {i}\n\nAssistant: "
    return {"chosen": start + f"{chosen} {i}", "rejected": start + f"{rejected} {i}"}


HH_ROWS = [hh_row(i) for i in range(400)]


def total(counts, start):
    return sum(n for name, n in counts.items() if name.startswith(start))


# ---------------------------------------------------------------------------------------------------- reviews


def test_clean_review():
    assert data.clean_review(" a<br />b<br>c<br/>\n\t d  ") == "a b c d"


def test_split_counts_duplicates_and_empty_rows():
    rows = [("Good film", "1"), ("good  FILM<br>", "1"), ("<br />", "0"), ("other", "0"), ("third", "2"), ("x", None)]
    splits, counts = data.split_reviews(rows)
    assert sorted(r.text for part in splits.values() for r in part) == ["Good film", "other"]
    assert counts == {"read": 6, "left out: duplicate": 1, "left out: empty": 1, "left out: label is not 0 or 1": 2}


@pytest.mark.parametrize(
    "content, message",
    [
        (b"words,stars\nx,1\n", "has columns"),
        (b"text,label\nx,1\n", "leave nothing for"),
        (b"text,label\n\xff\xfe,1\n", "not readable as CSV"),
    ],
)
def test_a_bad_csv_of_labels_is_named(tmp_path, content, message):
    path = tmp_path / "mine.csv"
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"mine.csv.*{message}"):
        load_data(DataParams(path=str(path)))


def test_split_does_not_depend_on_row_order():
    rows = [(f"review number {i}", str(i % 2)) for i in range(500)]
    splits, _ = data.split_reviews(rows)
    again, _ = data.split_reviews(random.Random(0).sample(rows, len(rows)))
    assert {name: set(part) for name, part in splits.items()} == {name: set(part) for name, part in again.items()}
    for name, share in data.REVIEW_SHARES.items():
        assert abs(len(splits[name]) / 500 - share) < 0.06, name


def test_review_prompts_are_the_first_words_of_long_enough_reviews():
    counts = Counter()
    texts = ["a b c d e", "a b c d", "a b c", "x y z w"]
    assert data.review_prompts([LabelledText(t, 1) for t in texts], 2, counts) == ["a b", "x y"]
    assert counts["left out: review too short for a prompt"] == 1 and counts["left out: prompt met before"] == 1


@pytest.fixture(scope="module")
def reviews():
    return load_data(DataParams())


def test_reviews_share_no_text_between_splits(reviews):
    parts = [reviews.reward, reviews.gold, reviews.test]
    texts = [r.text.casefold() for part in parts for r in part] + [t.casefold() for t in reviews.language_model]
    assert len(texts) == len(set(texts)) > 20_000
    starts = {" ".join(t.split(" ")[:8]) for t in texts}  # a prompt may open a review elsewhere, but hardly ever
    assert sum(p.casefold() in starts for p in reviews.train_prompts) < 0.01 * len(reviews.train_prompts)


def test_reviews_prompts_of_train_validation_and_test_are_disjoint(reviews):
    splits = [reviews.train_prompts, reviews.validation_prompts, reviews.test_prompts]
    assert len(set().union(*splits)) == sum(map(len, splits))
    assert [len(split) > least for split, least in zip(splits, (1000, 100, 300))] == [True] * 3
    starts = {" ".join(review.text.split(" ")[:8]) for review in reviews.test}
    assert set(reviews.test_prompts) <= starts


def test_a_prompt_of_training_is_taken_out_of_validation(tmp_path):
    """Two different reviews may open alike."""
    lines = [f"a b c d e f g h tail {i} of a review that goes on and on and on,{i % 2}" for i in range(600)]
    (tmp_path / "x.csv").write_text("\n".join(["text,label", *lines]))
    found = load_data(DataParams(path=str(tmp_path / "x.csv")))
    assert found.counts["kept: validation"] > 0
    assert found.train_prompts == ["a b c d e f g h"] and found.validation_prompts == found.test_prompts == []
    assert found.counts["test prompts left out: prompt met before"] == found.counts["kept: test"]


def test_reviews_counts_add_up(reviews):
    rows = reviews.counts["left out: duplicate"] + reviews.counts.get("left out: empty", 0)
    assert reviews.counts["read"] == 33_530 == total(reviews.counts, "kept: ") + rows
    assert reviews.counts["kept: reward"] == len(reviews.reward) and not reviews.is_pairwise
    assert {r.label for r in reviews.reward} == {0, 1}


def test_reviews_refuse_a_file_of_other_columns(tmp_path):
    (tmp_path / "x.csv").write_text("review,stars\ngood,1\n")
    with pytest.raises(InputError, match="x.csv.*wanted text and label"):
        load_data(DataParams(path=str(tmp_path / "x.csv")))


# ---------------------------------------------------------------------------------------------------- preferences


def test_dialogue_is_split_at_the_last_assistant_turn():
    text = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: why?\n\nAssistant: He said Human: no.\nAssistant: yes "
    prompt, reply = data.parse_dialogue(text)
    assert prompt == (Message("user", "hi"), Message("assistant", "hello"), Message("user", "why?"))
    assert reply == "He said Human: no.\nAssistant: yes"
    assert data.prompt_text(prompt) == "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: why?\n\nAssistant:"


@pytest.mark.parametrize("text", ["", "no turns", "\n\nHuman: hi", "\n\nAssistant: a\n\nHuman: b"])
def test_dialogue_without_a_last_assistant_turn_is_refused(text):
    with pytest.raises(InputError, match="assistant"):
        data.parse_dialogue(text)


@pytest.mark.parametrize(
    "row, reason",
    [
        ({**hh_row(0), "rejected": hh_row(1)["rejected"]}, "the prompts of the two sides differ"),
        ({**hh_row(0), "chosen": "\n\nHuman: question 0\n\nAssistant:"}, "empty prompt or reply"),
        ({"chosen": "\n\nAssistant: a", "rejected": "\n\nAssistant: b"}, "empty prompt or reply"),
        ({**hh_row(0), "rejected": hh_row(0)["chosen"]}, "identical sides"),
        ({"chosen": hh_row(0)["chosen"]}, "fields missing or of another type"),
        ({**hh_row(0), "chosen": 7}, "fields missing or of another type"),
        (None, "fields missing or of another type"),
        ({**hh_row(0), "chosen": "\n\nHuman: question 0"}, "a dialogue must have turns and end with the assistant's"),
        (hh_row("long " * 100), "prompt too long"),
        (HH_ROWS[5], "duplicate"),
    ],
)
def test_a_malformed_row_is_counted_with_its_reason(row, reason):
    found = collect_pairs([*HH_ROWS, row], hh_pair, 200, "hh_rlhf", "r")
    assert found.counts[f"left out: {reason}"] == total(found.counts, "left out: ") == 1
    assert found.counts["read"] == 401 == 1 + total(found.counts, "kept: ")


def test_one_prompt_is_never_in_two_splits():
    rows = HH_ROWS + [hh_row(i, chosen="certainly") for i in range(400)]
    found = collect_pairs(rows, hh_pair, 2000, "hh_rlhf", "r")
    prompts = [{p.prompt for p in part} for part in (found.reward, found.gold, found.test)]
    prompts += [set(found.train_prompts), set(found.validation_prompts)]
    assert len(set().union(*prompts)) == sum(map(len, prompts)) == 400
    assert found.is_pairwise and set(found.test_prompts) == prompts[2]


def test_too_few_rows_for_the_splits_raise():
    with pytest.raises(InputError, match="3 rows leave nothing for"):
        collect_pairs(HH_ROWS[:3], hh_pair, 2000, "hh_rlhf", "r")


def test_ultrafeedback_row():
    user, good, bad = ({"role": r, "content": c} for r, c in (("user", " q "), ("assistant", "a"), ("assistant", "b")))
    row = {"prompt": "q", "chosen": [user, good], "rejected": [user, bad], "score_chosen": 8.0}
    assert ultrafeedback_pair(row) == PreferencePair((Message("user", "q"),), "a", "b")
    with pytest.raises(InputError, match="differ"):
        ultrafeedback_pair({**row, "rejected": [{**user, "content": "p"}, bad]})
    for messages in ([], [user]):
        with pytest.raises(InputError, match="assistant"):
            ultrafeedback_pair({**row, "chosen": messages})


# ---------------------------------------------------------------------------------------------------- files


def write_rows(path, rows):
    if path.name.endswith(".parquet"):
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return
    lines = json.dumps(rows) if path.name.endswith(".json") else "\n".join(map(json.dumps, rows)) + "\n\n"
    (gzip.open if path.name.endswith(".gz") else open)(path, "wt").write(lines)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.parquet"])
def test_local_file_round_trip(tmp_path, name):
    write_rows(tmp_path / name, HH_ROWS)
    assert read_rows(tmp_path / name) == HH_ROWS
    found = load_data(DataParams("hh_rlhf", path=str(tmp_path / name)))
    assert found.counts["read"] == 400 == total(found.counts, "kept: ")
    assert len(found.revision) == 64  # the file's sha256


def test_local_ultrafeedback_parquet(tmp_path):
    rows = [
        {
            side: [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": side}]
            for side in ("chosen", "rejected")
        }
        for i in range(400)
    ]
    write_rows(tmp_path / "u.parquet", rows)
    found = load_data(DataParams("ultrafeedback", path=str(tmp_path / "u.parquet")))
    assert found.reward[0].chosen == "chosen" and found.reward[0].prompt[0].role == "user"
    assert total(found.counts, "kept: ") == 400


def bad_files(folder):
    whole = gzip.compress(b'{"chosen": "' + random.Random(0).randbytes(4000).hex().encode() + b'"}\n')
    contents = {
        "cut.jsonl": b'{"chosen": "a"}\n{"chosen": ',
        "cut.jsonl.gz": whole[: len(whole) // 2],
        "flipped.jsonl.gz": whole[:100] + bytes(50) + whole[150:],
        "plain.jsonl.gz": b'{"chosen": "a"}\n',
        "list.json": b"[1, 2",
        "latin.jsonl": b'{"chosen": "\xe9"}\n',
        "not.parquet": b"PAR1 but no table",
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return list(contents)


def test_a_bad_file_is_named(tmp_path):
    for name in bad_files(tmp_path):
        with pytest.raises(InputError, match=name.replace(".", r"\.")):
            read_rows(tmp_path / name)


def test_the_bad_line_is_named(tmp_path):
    bad_files(tmp_path)
    with pytest.raises(InputError, match="line 2"):
        read_rows(tmp_path / "cut.jsonl")


def test_a_json_file_that_is_no_list_of_rows_is_named(tmp_path):
    (tmp_path / "one.json").write_text('{"chosen": "a", "rejected": "b"}')
    with pytest.raises(InputError, match="one.json"):
        read_rows(tmp_path / "one.json")


@pytest.mark.parametrize("name", list(data.DATASETS))
def test_a_missing_file_is_named(name, tmp_path):
    with pytest.raises(InputError, match="nowhere.jsonl"):
        load_data(DataParams(name, path=str(tmp_path / "nowhere.jsonl")))


def test_an_unknown_dataset_and_an_unreachable_hub_raise():
    with pytest.raises(InputError, match="reviews, hh_rlhf, ultrafeedback"):
        load_data(DataParams("imdb"))
    with pytest.raises(InputError, match="data.path"):
        load_data(DataParams("hh_rlhf"))


def test_the_real_hh_rlhf_file():
    path = SHARED / "hh_rlhf" / "helpful-base-test.jsonl.gz"
    if not path.exists():
        pytest.skip(f"the real file is not here: {path}")
    found = load_data(DataParams("hh_rlhf", path=str(path), max_prompt_chars=10**6))
    left_out = {name: n for name, n in found.counts.items() if name.startswith("left out")}
    assert found.counts["read"] == 2354 == total(found.counts, "kept: ") + sum(left_out.values())
    assert left_out["left out: the prompts of the two sides differ"] == 9
    assert left_out["left out: identical sides"] == 2
    assert left_out["left out: empty prompt or reply"] == 4  # all four are empty rejected replies, no empty prompt
