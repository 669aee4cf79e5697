"""Judges that add up words, and the credit they give to tokens."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from dense_rlhf.models import word_judge
from dense_rlhf.models.word_judge import WORD, AdditiveJudge, repetition, train_gold_judge
from dense_rlhf.types import LabelledText, PreferencePair

WORDS = {"good": 1.5, "bad": -2.0, "naïve": 0.7, "日本": 3.0, "don't": -0.25, "é": 0.1, "film": 0.0}


def test_a_judge_adds_up_its_words_and_ignores_others():
    judge = AdditiveJudge("j", WORDS)
    assert judge.score("Good, GOOD but bad; unknown film") == pytest.approx(1.0)
    assert judge.score("goodness ungood") == 0


def test_repeating_a_good_word_raises_gold_alone():
    judge, plain, again = AdditiveJudge("j", WORDS), "a good film", "Good good, GOOD good good film"
    assert judge.score(again) == pytest.approx(5 * judge.score(plain)) and repetition(again) == pytest.approx(4 / 6)
    assert judge.distinct_score(again) == judge.distinct_score(plain) == judge.score(plain)
    assert repetition(plain) == repetition("") == repetition("?!") == 0


@given(st.lists(st.sampled_from([*WORDS, "unknown"]), max_size=9))
def test_distinct_score_is_that_of_each_word_once(words):
    judge = AdditiveJudge("j", WORDS)
    assert judge.distinct_score(" ".join(words)) == pytest.approx(judge.score(" ".join(set(words))))
    assert repetition(" ".join(words)) == pytest.approx(1 - len(set(words)) / max(len(words), 1) if words else 0)


@given(st.lists(st.one_of(st.sampled_from([*WORDS, " ", ", ", "🙂", "Good"]), st.text(max_size=4)), max_size=8))
def test_token_credit_sums_to_the_score(tokenizer, parts):
    text, judge = "".join(parts), AdditiveJudge("j", WORDS)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    credit = judge.token_credit(tokenizer, ids)
    assert len(credit) == len(ids)
    assert sum(credit) == pytest.approx(judge.score(tokenizer.decode(ids)), abs=1e-9)


@given(st.lists(st.integers(0, 299), max_size=12))
def test_token_credit_sums_to_the_score_for_any_tokens(tokenizer, ids):
    """A policy samples bytes that make no character, too."""
    judge = AdditiveJudge("j", {chr(c): c / 100 for c in range(97, 123)} | WORDS)
    assert sum(judge.token_credit(tokenizer, ids)) == pytest.approx(judge.score(tokenizer.decode(ids)), abs=1e-9)


def test_token_credit_falls_on_the_tokens_of_the_word(tokenizer):
    ids = tokenizer("the film was bad !", add_special_tokens=False)["input_ids"]
    credit = AdditiveJudge("j", WORDS).token_credit(tokenizer, ids)
    bad = [t for t, token in enumerate(ids) if "b" in (text := tokenizer.decode([token])) or "d" in text]
    assert [t for t, c in enumerate(credit) if c] == bad


GOOD, BAD = "a good and great film, I loved it", "a bad and awful film, I hated it"
LABELLED = [
    LabelledText(f"{text} {'slow' if i % 3 else 'fast'}", label)
    for i in range(8)
    for text, label in ((GOOD, 1), (BAD, 0))
]


def tfidf():
    return TfidfVectorizer(lowercase=True, token_pattern=WORD.pattern, norm=None, min_df=5)


def test_gold_judge_is_the_logistic_regression_without_its_intercept():
    judge, features = train_gold_judge(LABELLED), tfidf()
    X, y = features.fit_transform([e.text for e in LABELLED]), [e.label for e in LABELLED]
    model = LogisticRegression(C=1e-3, max_iter=500).fit(X, y)
    texts = ["good good awful", "a great slow film", "hated, HATED!"]
    wanted = model.decision_function(features.transform(texts)) - model.intercept_
    assert np.allclose([judge.score(t) for t in texts], wanted, atol=1e-9)
    assert judge.score("good great") > 0 > judge.score("bad awful")


def test_gold_judge_of_pairs_is_a_bradley_terry_model():
    pairs = [PreferencePair("p", f"{GOOD} {i % 2}", f"{BAD} {i % 3}") for i in range(12)]
    judge, features = train_gold_judge(pairs), tfidf()
    chosen, rejected = [p.chosen for p in pairs], [p.rejected for p in pairs]
    features.fit(chosen + rejected)
    difference = (features.transform(chosen) - features.transform(rejected)).toarray()
    both, won = np.concatenate([difference, -difference]), np.repeat([1, 0], len(pairs))
    model = LogisticRegression(C=5e-4, fit_intercept=False, max_iter=500).fit(both, won)  # every pair twice
    assert judge.score(pairs[0].chosen) > judge.score(pairs[0].rejected)
    margins = [judge.score(p.chosen) - judge.score(p.rejected) for p in pairs]
    assert np.allclose(margins, model.decision_function(difference), atol=1e-3)


def test_gold_judge_is_cached_whole(monkeypatch, tmp_path):
    monkeypatch.setenv("DENSE_RLHF_CACHE", str(tmp_path))
    assert word_judge.load_gold_judge(LABELLED, "r") == train_gold_judge(LABELLED)
    monkeypatch.setattr("dense_rlhf.models.word_judge.train_gold_judge", None)
    assert word_judge.load_gold_judge(LABELLED, "r").score(GOOD) > 0


def test_lexicon_holds_human_valences():
    lexicon = word_judge.load_lexicon()
    assert lexicon.score("a good film") > 0 > lexicon.score("an awful film") and len(lexicon.weights) > 7000
    assert max(map(abs, lexicon.weights.values())) <= 4
