"""Human marks on some texts, averaged by word, score the words of any other text, such as a policy's.

The unit is the file's. A word's meaning in context is lost in the mean.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from dense_rlhf.attribution.human_marks import MarkedText, load_sst_trees, load_toxic_spans, read_text
from dense_rlhf.models.word_judge import WORD, AdditiveJudge
from dense_rlhf.types import InputError

PRIOR = 2.0  # extra occurrences of value zero that every word starts with


def load_rationales(path: str | Path) -> list[MarkedText]:
    """The texts of a file with the values that people gave their words, good ones above zero.

    The file's first character gives its format: `{` lines of `load_spans`; `(` trees of the Stanford Sentiment
    Treebank; else a CSV of toxic spans, each of value -1. Raises `InputError` that names file and line.
    """
    start = read_text(path).lstrip()[:1]
    if start == "{":
        return load_spans(path)
    if start == "(":
        return load_sst_trees(path)
    return [replace(text, values=tuple(-value for value in text.values)) for text in load_toxic_spans(path)]


def load_spans(path: str | Path) -> list[MarkedText]:
    """JSON lines {"text": ..., "spans": [[start, end, value], ...]}: characters, and the value of each word in them.

    Raises `InputError` that names file and line.
    """
    texts = []
    for number, line in enumerate(read_text(path).rstrip("\n").split("\n"), 1):
        try:
            row = json.loads(line)
            text, spans = row["text"], [tuple(span) for span in row["spans"]]
            valid = isinstance(text, str) and all(_is_span(span, len(text)) for span in spans)
        except (TypeError, ValueError, KeyError, RecursionError):
            valid = False
        if not valid:
            wanted = '{"text": ..., "spans": [[start, end, value], ...]}, places within the text and finite values'
            raise InputError(f"{path}, line {number}: {line[:60]!r}, wanted {wanted}")
        texts.append(MarkedText(text, [span[:2] for span in spans], tuple(float(span[2]) for span in spans)))
    return texts


def _is_span(span: tuple, length: int) -> bool:
    whole = len(span) == 3 and all(type(place) is int for place in span[:2]) and type(span[2]) in (int, float)
    return whole and 0 <= span[0] < span[1] <= length and math.isfinite(span[2])


def fit_words(texts: Sequence[MarkedText], prior: float = PRIOR) -> AdditiveJudge:
    """The mean human value of each word, shrunk to zero where it is rare.

    weight = sum of its values / (occurrences + prior): the posterior mean of normal values whose variance is `prior`
    times as large within a word as between words. An occurrence's value is the mean over its characters, zero outside
    all spans; overlapping spans add up.
    """
    sums, counts = defaultdict(float), defaultdict(int)
    for marked in texts:
        by_character = np.zeros(len(marked.text))
        for (start, end), value in zip(marked.spans, marked.values):
            by_character[start:end] += value
        for word in WORD.finditer(marked.text):
            sums[word.group().lower()] += float(by_character[word.start() : word.end()].mean())
            counts[word.group().lower()] += 1
    return AdditiveJudge("rationale", {word: sums[word] / (counts[word] + prior) for word in sums if sums[word]})


def load_rationale_judge(path: str | Path) -> AdditiveJudge:
    """`fit_words` of a file, cached until the file changes. Raises `InputError` where no word of it is marked."""
    written = Path(path).stat().st_mtime_ns if Path(path).is_file() else None
    return _load_judge(str(path), written)


@lru_cache(maxsize=4)
def _load_judge(path: str, written: int | None) -> AdditiveJudge:
    judge = fit_words(load_rationales(path))
    if not judge.weights:
        raise InputError(f"{path}: people marked no word of its texts; give a file with marks")
    return judge
