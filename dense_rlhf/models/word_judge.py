"""Judges whose score is a sum over words, so that the credit of every token is known exactly."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import asdict, dataclass
from functools import cache

import numpy as np
from transformers import PreTrainedTokenizerBase

from dense_rlhf.files import cached_folder, content_key, write_json
from dense_rlhf.fingerprint import source_key
from dense_rlhf.models.text_spans import token_spans
from dense_rlhf.types import InputError, LabelledText, PreferencePair

WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)?")
RAREST = 5  # texts that a word of the gold judge is in


def words_of(text: str) -> list[str]:
    """A text's words in lower case, in their order."""
    return [word.group().lower() for word in WORD.finditer(text)]


def repetition(text: str) -> float:
    """The share of a text's words that occur earlier in it, in [0, 1); 0 without words. Plain prose is not at 0."""
    words = words_of(text)
    return 1 - len(set(words)) / len(words) if words else 0.0


@dataclass(frozen=True)
class AdditiveJudge:
    """A score that is a sum over words; unknown words add zero."""

    name: str
    weights: dict[str, float]  # lower-case word -> credit

    def score(self, text: str) -> float:
        """The sum of the weights of the text's words."""
        return sum(self.weights.get(word, 0.0) for word in words_of(text))

    def distinct_score(self, text: str) -> float:
        """`score` with each word counted once, so that repeating a good word gains nothing."""
        return sum(self.weights.get(word, 0.0) for word in dict.fromkeys(words_of(text)))

    def token_credit(self, tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[float]:
        """Credit of each token: a word's is spread evenly over the tokens that touch it. Sums to `score(text)`."""
        spans, credit = token_spans(tokenizer, ids), [0.0] * len(ids)
        for word in WORD.finditer(tokenizer.decode(ids)):
            weight = self.weights.get(word.group().lower(), 0.0)
            touching = [t for t, (start, end) in enumerate(spans) if start < word.end() and end > word.start()]
            for t in touching if weight else ():
                credit[t] += weight / len(touching)
        return credit


def check_words(examples: list[LabelledText] | list[PreferencePair]) -> None:
    """Raise `InputError` unless the gold judge could learn some word, as it is in enough texts."""
    met: Counter[str] = Counter()
    for example in examples:
        for text in (example.chosen, example.rejected) if isinstance(example, PreferencePair) else (example.text,):
            words = {word.group() for word in WORD.finditer(text.lower())}
            met.update(words)
            if any(met[word] >= RAREST for word in words):
                return
    raise InputError(f"no word is in {RAREST} of the gold judge's {len(examples)} texts; wanted more, or longer texts")


def train_gold_judge(examples: list[LabelledText] | list[PreferencePair], strength: float = 1e-3) -> AdditiveJudge:
    """Logistic regression on un-normalised TF-IDF of single words: labels, or differences of pairs (Bradley-Terry).

    `strength` is the inverse of the ridge penalty. Without length normalisation the log-odds are additive in words.
    Raises `InputError` where the texts share no word.
    """
    check_words(examples)
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    tfidf = TfidfVectorizer(lowercase=True, token_pattern=WORD.pattern, norm=None, min_df=RAREST)
    if isinstance(examples[0], PreferencePair):
        tfidf.fit([pair.chosen for pair in examples] + [pair.rejected for pair in examples])
        better = tfidf.transform([pair.chosen for pair in examples]) - tfidf.transform([p.rejected for p in examples])
        sign = np.where(np.arange(len(examples)) % 2, 1, -1)  # half of the differences are flipped
        X, y = better.multiply(sign[:, None]).tocsr(), sign > 0
    else:
        X, y = tfidf.fit_transform([e.text for e in examples]), [e.label for e in examples]
    model = LogisticRegression(C=strength, fit_intercept=not isinstance(examples[0], PreferencePair), max_iter=500)
    weights = model.fit(X, y).coef_[0] * tfidf.idf_
    return AdditiveJudge("gold", dict(zip(tfidf.get_feature_names_out().tolist(), weights.tolist())))


def load_gold_judge(examples: list[LabelledText] | list[PreferencePair], data_revision: str) -> AdditiveJudge:
    """`train_gold_judge`, cached by content."""
    key = {
        "data": data_revision,
        "examples": content_key([asdict(example) for example in examples]),  # one file is read in several ways
        "code": source_key("dense_rlhf.models.word_judge", "dense_rlhf.data"),
    }
    folder = cached_folder("gold", key, lambda f: write_json(f / "weights.json", train_gold_judge(examples).weights))
    return AdditiveJudge("gold", json.loads((folder / "weights.json").read_text()))


@cache
def load_lexicon() -> AdditiveJudge:
    """VADER's words with their mean human valence, -4 to 4 (Hutto & Gilbert, 2014); phrases and emoji left out."""
    import importlib.resources

    text = (importlib.resources.files("vaderSentiment") / "vader_lexicon.txt").read_text(encoding="utf-8")
    rows = (line.split("\t") for line in text.splitlines() if line.strip())
    return AdditiveJudge("lexicon", {row[0].lower(): float(row[1]) for row in rows if WORD.fullmatch(row[0])})


def judge_correct(judge: AdditiveJudge, examples: list[LabelledText] | list[PreferencePair]) -> np.ndarray:
    """Whether an additive judge agrees with people on each whole example, (N,) of bool."""
    if isinstance(examples[0], PreferencePair):
        return np.array([judge.score(e.chosen) > judge.score(e.rejected) for e in examples])
    return np.array([(judge.score(e.text) > 0) == bool(e.label) for e in examples])
