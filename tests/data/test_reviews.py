"""Labelled texts: cleaning, splits that share nothing, labels and columns of any name, and what is refused in words."""

import random
from collections import Counter
from decimal import Decimal

import pytest
from made_rows import REVIEWS, csv_text, left_out, total, write_rows

from dense_rlhf.config.params import DataParams
from dense_rlhf.data import load_data, reviews
from dense_rlhf.types import InputError, LabelledText


def test_clean_review():
    assert reviews.clean_review(" a<br />b<br>c<br/>\n\t d  ") == "a b c d"


def test_split_counts_duplicates_and_empty_rows():
    rows = [("Good film", "1"), ("good  FILM<br>", "1"), ("<br />", "0"), ("other", "0"), ("third", "2"), ("x", None)]
    splits, counts = reviews.split_reviews(rows)
    assert sorted(r.text for part in splits.values() for r in part) == ["Good film", "other"]
    assert counts == {"read": 6, "left out: duplicate": 1, "left out: empty": 1, "left out: label is not 0 or 1": 2}


def test_split_does_not_depend_on_row_order():
    rows = [(f"review number {i}", str(i % 2)) for i in range(500)]
    splits, _ = reviews.split_reviews(rows)
    again, _ = reviews.split_reviews(random.Random(0).sample(rows, len(rows)))
    assert {name: set(part) for name, part in splits.items()} == {name: set(part) for name, part in again.items()}
    for name, share in reviews.REVIEW_SHARES.items():
        assert abs(len(splits[name]) / 500 - share) < 0.06, name


def test_review_prompts_are_the_first_words_of_long_enough_reviews():
    counts = Counter()
    texts = ["a b c d e", "a b c d", "a b c", "x y z w"]
    assert reviews.review_prompts([LabelledText(t, 1) for t in texts], 2, counts) == ["a b", "x y"]
    assert counts["left out: review too short for a prompt"] == 1 and counts["left out: prompt met before"] == 1


# ---------------------------------------------------------------------------------------------------- the default


@pytest.fixture(scope="module")
def default():
    return load_data(DataParams())


def test_reviews_share_no_text_between_splits(default):
    parts = [default.reward, default.gold, default.test]
    taught_second = {r.text.casefold() for r in default.second}
    assert len(taught_second) == len(default.second) > 4000
    texts = [r.text.casefold() for part in parts for r in part] + [t.casefold() for t in default.language_model]
    assert len(texts) == len(set(texts)) > 20_000
    assert not taught_second & {r.text.casefold() for part in parts for r in part}  # its labels are its own
    starts = {" ".join(t.split(" ")[:8]) for t in texts}  # a prompt may open a review elsewhere, but hardly ever
    assert sum(p.casefold() in starts for p in default.train_prompts) < 0.01 * len(default.train_prompts)


def test_reviews_prompts_of_train_validation_and_test_are_disjoint(default):
    splits = [default.train_prompts, default.validation_prompts, default.test_prompts]
    assert len(set().union(*splits)) == sum(map(len, splits))
    assert [len(split) > least for split, least in zip(splits, (1000, 100, 300))] == [True] * 3
    starts = {" ".join(review.text.split(" ")[:8]) for review in default.test}
    assert set(default.test_prompts) <= starts


def test_reviews_counts_add_up(default):
    assert left_out(default) == {"duplicate": 98} and default.counts["read"] == 33_530
    assert default.counts["kept: reward"] == len(default.reward) and not default.is_pairwise
    assert {r.label for r in default.reward} == {0, 1}


def test_a_prompt_of_training_is_taken_out_of_validation(tmp_path):
    """Two different reviews may open alike."""
    rows = [{"text": f"{i % 50 * (i % 3)} b c d e f g h " + f"tail {i} " * 8, "label": i % 2} for i in range(900)]
    dataset = load_data(DataParams(path=str(write_rows(tmp_path / "x.csv", rows))))
    prompts = [dataset.train_prompts, dataset.validation_prompts, dataset.test_prompts]
    assert len(set().union(*prompts)) == sum(map(len, prompts)) > 0
    assert dataset.counts["prompts left out: prompt met before"] > 0 and dataset.counts["kept: validation"] > 0


# ---------------------------------------------------------------------------------------------------- the user's own


@pytest.mark.parametrize("name", ["r.csv", "r.csv.gz", "r.json", "r.json.gz", "r.jsonl", "r.jsonl.gz", "r.parquet"])
def test_labelled_texts_of_any_form(tmp_path, name):
    dataset = load_data(DataParams(path=str(write_rows(tmp_path / name, REVIEWS))))
    assert left_out(dataset) == {} and dataset.counts["read"] == 600
    assert all(("good" in review.text) == review.label for review in dataset.reward)


@pytest.mark.parametrize(
    "bad, good, labels",
    [
        ("0", "1", ()),
        ("0.0", "1.0", ()),
        (" 0", "1 ", ()),
        ("negative", "Positive", ()),
        ("False", "TRUE", ()),
        ("neg", "pos", ()),
        ("rotten", "fresh", ("rotten", "fresh")),
        ("1", "2", (1, 2)),
        ("-1", "1.0", (-1, 1)),
    ],
)
def test_labels_by_number_and_by_name(tmp_path, bad, good, labels):
    rows = [row | {"label": good if row["label"] else bad} for row in REVIEWS]
    dataset = load_data(DataParams(path=str(write_rows(tmp_path / "r.csv", rows)), labels=labels))
    assert left_out(dataset) == {}
    assert all(("good" in review.text) == review.label for review in dataset.reward + dataset.gold + dataset.test)


@pytest.mark.parametrize("good, bad", [(True, False), (1.0, 0.0), ("1", "0"), ("positive", "negative")])
@pytest.mark.parametrize("name", ["r.jsonl", "r.parquet"])
def test_labels_of_any_type(tmp_path, name, good, bad):
    rows = [row | {"label": good if row["label"] else bad} for row in REVIEWS]
    assert left_out(load_data(DataParams(path=str(write_rows(tmp_path / name, rows))))) == {}


@pytest.mark.parametrize("label, means", [(Decimal("1.00"), 1), (Decimal(0), 0), (1j, None), (b"1", None), ([1], None)])
def test_labels_of_types_that_only_tables_have(label, means):
    assert reviews.label_of(label) == means


@pytest.mark.parametrize("name", ["r.csv", "r.jsonl"])
@pytest.mark.parametrize("scale", [(0, 1, 2), (-1, 0, 1), (0, 1, 2, 3, 4), (0, 0.25, 0.5, 0.75, 1)], ids=str)
def test_numbers_of_another_scale_are_not_taken_for_good_and_bad(tmp_path, name, scale):
    """0 and 1 stand on it, and mean something else there."""
    rows = [row | {"label": scale[i % len(scale)]} for i, row in enumerate(REVIEWS)]
    path = str(write_rows(tmp_path / name, rows))
    with pytest.raises(InputError, match=f"{name}: labels are .*, wanted 0 for bad and 1 for good; data.labels="):
        load_data(DataParams(path=path))
    ends = load_data(DataParams(path=path, labels=tuple(map(str, (scale[0], scale[-1])))))
    assert left_out(ends)["label is not one of data.labels"] == 600 - 2 * 600 // len(scale)
    few = write_rows(tmp_path / name, [*REVIEWS[:-9], *({"text": f"odd {i}", "label": 7} for i in range(9))])
    assert left_out(load_data(DataParams(path=str(few)))) == {"label is not 0 or 1": 9}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_is_read(tmp_path, encoding):
    path = tmp_path / "r.csv"
    path.write_bytes(csv_text(REVIEWS).encode(encoding))
    assert left_out(load_data(DataParams(path=str(path)))) == {}


def test_other_encodings_separators_and_columns(tmp_path):
    path = tmp_path / "r.csv"
    rows = [{"Label": row["label"], "Text": row["text"] + "café"} for row in REVIEWS]
    path.write_bytes(csv_text(rows, ";").encode("latin-1"))
    for given, message in (
        ({}, "line 2 holds the byte 0xe9, which is not utf-8; data.encoding names another"),
        ({"encoding": "latin-1"}, "columns .'Label;Text'., wanted text and label.*data.text.*data.separator"),
        ({"encoding": "latin-1", "separator": ";"}, "columns .'Label', 'Text'., wanted text and label"),
    ):
        with pytest.raises(InputError, match=f"r.csv.*{message}"):
            load_data(DataParams(path=str(path), **given))
    dataset = load_data(DataParams(path=str(path), encoding="latin-1", separator=";", text="Text", label="Label"))
    assert left_out(dataset) == {} and all(review.text.endswith("café") for review in dataset.reward)


def test_columns_parted_by_tabs(tmp_path):
    (tmp_path / "r.tsv").write_text(csv_text(REVIEWS, "\t"))
    assert left_out(load_data(DataParams(path=str(tmp_path / "r.tsv")))) == {}


@pytest.mark.parametrize(
    "given, message",
    [
        ({"encoding": "klingon"}, "data.encoding is 'klingon'"),
        ({"encoding": "hex"}, "data.encoding is 'hex'"),
        ({"encoding": "a\0b"}, "data.encoding is"),
        ({"separator": ""}, "data.separator is ''"),
        ({"separator": ";;"}, "data.separator is ';;'"),
        ({"separator": '"'}, "data.separator is"),
        ({"labels": ("good",)}, "data.labels is .'good'., wanted two"),
        ({"labels": (1, "1 ")}, "data.labels is .1, '1 '., wanted two"),
        ({"labels": (0, 1, 2)}, "data.labels is"),
        ({"labels": (True, False)}, "data.labels"),
    ],
)
def test_parameters_that_read_nothing(given, message):
    with pytest.raises(InputError, match=message):
        DataParams(**given)


@pytest.mark.parametrize(
    "rows, given, message",
    [
        ([{"words": "x", "stars": 1}], {}, "columns .'words', 'stars'., wanted text and label, each once"),
        ([{"text": "x", "label": 1}], {}, "leave nothing for"),
        ([row | {"label": 1} for row in REVIEWS], {}, "all texts that are kept are labelled 1.*labels are '1' .600."),
        (
            [row | {"label": row["label"] + 1} for row in REVIEWS],
            {},
            "labels are .*'2' .300.*, wanted 0 .*data.labels=",
        ),
        (
            [row | {"label": "fresh"} for row in REVIEWS],
            {},
            "leave nothing for.*labels are 'fresh' .600..*data.labels=",
        ),
        ([row | {"text": f"only five words {i} here"} for i, row in enumerate(REVIEWS)], {}, "data.prompt_words = 8"),
        (REVIEWS, {"prompt_words": 40}, "0 prompts to train and 0 to choose by.*data.prompt_words = 40"),
        ([row | {"text": row["text"] + '"'} for row in REVIEWS], {}, "leave nothing for.*a stray quote': 600"),
        (REVIEWS, {"labels": ("rotten", "fresh")}, "leave nothing for.*label is not one of data.labels"),
    ],
)
def test_what_nothing_can_be_learned_from_is_refused_in_words(tmp_path, rows, given, message):
    with pytest.raises(InputError, match=f"x.csv.*{message}"):
        load_data(DataParams(path=str(write_rows(tmp_path / "x.csv", rows)), **given))


def test_one_class_in_one_split_is_refused(tmp_path):
    gold = {review.text for review in load_data(DataParams(path=str(write_rows(tmp_path / "a.csv", REVIEWS)))).gold}
    rows = [row | {"label": 1 if row["text"].strip() in gold else row["label"]} for row in REVIEWS]
    with pytest.raises(InputError, match="b.csv: all [0-9]+ texts of split 'gold' are labelled 1"):
        load_data(DataParams(path=str(write_rows(tmp_path / "b.csv", rows))))


def test_pairs_in_place_of_labelled_texts_are_told_apart(tmp_path):
    path = write_rows(tmp_path / "p.jsonl", [{"chosen": "a", "rejected": "b"}] * 9)
    with pytest.raises(InputError, match="p.jsonl: no row has both text and label.*data.name=hh_rlhf"):
        load_data(DataParams(path=str(path)))


# ---------------------------------------------------------------------------------------------------- quotes


LINES = csv_text(REVIEWS).splitlines()


@pytest.mark.parametrize(
    "changes, lost",
    [
        ({}, {}),
        ({5: '"{}'}, {"a stray quote": 1}),  # nothing closes it
        ({5: '"{}', 300: '"{}'}, {"a stray quote": 2}),
        ({5: '"{}', 300: 'a "quoted" {}'}, {"a stray quote": 1}),
        ({5: '"{}', 300: '"of a, b" {}'}, {"a stray quote": 2}),
        ({5: '"{}', 6: '{}"'}, {"a stray quote": 2}),
        ({5: '{}"'}, {"a stray quote": 1}),
        ({5: 'a "quoted" word, {}'}, {"not as many fields as the header": 1}),
        ({5: "{},1"}, {"not as many fields as the header": 1}),
        ({5: "only"}, {"not as many fields as the header": 1}),
        ({5: ""}, {}),  # a blank line is no row
        ({600: '"{}'}, {"a stray quote": 1}),
    ],
)
def test_a_stray_quote_costs_its_line_alone(tmp_path, changes, lost):
    lines = list(LINES)
    for number, form in changes.items():
        lines[number] = form.format(lines[number])
    (tmp_path / "r.csv").write_text("\n".join(lines))
    dataset = load_data(DataParams(path=str(tmp_path / "r.csv")))
    assert left_out(dataset) == lost and dataset.counts["read"] == 600 - list(changes.values()).count("")


@pytest.mark.parametrize(
    "first, last, lost",
    [
        ('"{}', '{}",1', {"a stray quote": 2}),
        ('"junk', '{}",1', {"a stray quote": 2}),
        ('"junk', 'junk"', {"a stray quote": 2}),
        ('"{}', '{}","1"', {"a stray quote": 2}),
    ],
)
def test_a_quote_that_another_closes_swallows_nothing(tmp_path, first, last, lost):
    lines = list(LINES)
    lines[5] = first.format(lines[5])
    lines[300] = last.format(lines[300].partition(",")[0])
    (tmp_path / "r.csv").write_text("\n".join(lines))
    dataset = load_data(DataParams(path=str(tmp_path / "r.csv")))
    assert left_out(dataset) == lost and dataset.counts["read"] == 600


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("columns", [("text", "label"), ("label", "text")])
def test_quoted_texts_keep_line_breaks_separators_and_quotes(tmp_path, columns, end):
    values = [
        {"text": f'"{i}, ""so"" he said,{end}{row["text"]}{end},1{end}end"', "label": row["label"]}
        for i, row in enumerate(REVIEWS)
    ]
    lines = [",".join(columns), *(",".join(str(row[name]) for name in columns) for row in values)]
    (tmp_path / "r.csv").write_bytes(end.join(lines).encode())
    dataset = load_data(DataParams(path=str(tmp_path / "r.csv")))
    assert left_out(dataset) == {} and dataset.counts["read"] == 600
    assert all(', "so" he said, review ' in row.text and row.text.endswith(" ,1 end") for row in dataset.reward)


def test_spaces_before_a_quote_and_long_texts(tmp_path):
    lines = ['"text", "label"', *(f'"{row["text"]}", "{row["label"]}"' for row in REVIEWS)]
    lines[1] = f'"{"long " * 100_000}", "1"'
    (tmp_path / "r.csv").write_text("\n".join(lines))
    dataset = load_data(DataParams(path=str(tmp_path / "r.csv")))
    assert left_out(dataset) == {} and total(dataset.counts, "kept: ") == 600
