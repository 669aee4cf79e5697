"""The audit of a reward model: credit of words, choice and estimate apart, shares of variance, two models."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from dense_rlhf.attribution.explain import Explanation
from dense_rlhf.attribution.human_marks import MarkedText
from dense_rlhf.evaluation import reward_audit as audit
from dense_rlhf.evaluation.reward_audit import Scored
from dense_rlhf.models.word_judge import AdditiveJudge
from dense_rlhf.types import InputError, LabelledText, PreferencePair

JUDGE = AdditiveJudge("made", {"good": 1.0, "bad": -2.0, "film": 0.25})
WORDS = np.array("good bad film the a plot it was and of".split())


def made_texts(number, seed=0, longest=12):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(4, longest))) + "." for _ in range(number)]


def explanation(text, spans, credit):
    tokens = dict(spans=tuple(spans), credit=tuple(credit), player=tuple(range(len(spans))))
    about = dict(source="shap", complete=True, evaluations=1, seconds=0.0, engine="plain", model="made")
    return Explanation(response=text, baseline=0.5, score=0.5 + sum(credit), **tokens, **about)


# ---------------------------------------------------------------------------------------------------- texts


def test_a_passage_is_whole_sentences_and_a_pair_is_one_unit(tokenizer):
    texts = ["the film was good. the cast was great. a bad plot", "a bad plot and a worse ending, it was awful. good"]
    sizes = [len(tokenizer(text[: text.index(".") + 1])["input_ids"]) for text in texts]
    chosen = audit.passages([LabelledText(text, 1) for text in texts], tokenizer, sizes[0], 9)
    assert chosen.texts == ("the film was good.",) and chosen.labels == (1,) and sizes[1] > sizes[0]
    assert chosen.counts == {"read": 2, "left out: too long": 1, "texts": 1}
    pairs = [PreferencePair(f"film {n}", "good", "bad") for n in range(3)]
    chosen = audit.passages(pairs, tokenizer, 20, 2)
    assert chosen.texts == ("good", "bad") * 2 and chosen.units == (0, 0, 1, 1) and chosen.labels == (1, 0) * 2
    with pytest.raises(InputError, match="none of 3 texts has at most 1 tokens; raise reward.window"):
        audit.passages(pairs, tokenizer, 1, 9)


# ---------------------------------------------------------------------------------------------------- scores


@given(st.text("ab \n.!_é\U0001f642'", min_size=1, max_size=30), st.integers(0, 9))
def test_credit_of_tokens_moves_to_pieces_and_keeps_its_total(text, seed):
    rng = np.random.default_rng(seed)
    ends = sorted({*rng.integers(0, len(text) + 1, 4).tolist(), len(text)} - {0})
    spans = list(zip([0, *ends[:-1]], ends))
    credit = rng.normal(size=len(spans)).tolist()
    scored = Scored.of([explanation(text, spans, credit)])
    assert scored.pieces["credit"].sum() == pytest.approx(sum(credit))
    assert scored.pieces["place"].between(0, 1).all() and (scored.pieces["start"] < scored.pieces["end"]).all()
    covered = "".join(text[a:b] for a, b in zip(scored.pieces["start"], scored.pieces["end"]))
    assert covered.replace(" ", "") == text.replace(" ", "") or not text.strip(" ")


def test_a_token_of_two_words_is_shared_by_characters():
    scored = Scored.of([explanation("so good", [(0, 1), (1, 7)], (1.0, 6.0))])
    assert dict(zip(scored.pieces["piece"], scored.pieces["credit"])) == pytest.approx({"so": 2.0, "good": 5.0})


def test_a_judges_credit_adds_up_to_its_score():
    scored = Scored.by(JUDGE, made_texts(20))
    assert scored.pieces.groupby("text")["credit"].sum().to_numpy() == pytest.approx(scored.scores)


def test_models_are_compared_in_their_own_standard_deviations():
    texts = made_texts(40)
    ours = Scored.by(JUDGE, texts)
    scaled = Scored.by(AdditiveJudge("scaled", {word: 7 * w for word, w in JUDGE.weights.items()}), texts)
    assert np.abs(ours.less(scaled).scores).max() < 1e-12 and ours.less(scaled).pieces["credit"].abs().max() < 1e-12
    other = Scored.by(AdditiveJudge("other", {"good": 1.0, "plot": 1.0}), texts)
    gap = ours.less(other)
    assert gap.scores == pytest.approx(-other.less(ours).scores)
    assert audit.liked(gap, most=1)["piece"].iloc[-1] in ("plot", "bad")
    with pytest.raises(InputError, match="scored different texts"):
        ours.less(Scored.by(JUDGE, texts[::-1]))
    with pytest.raises(InputError, match="nothing to audit"):
        ours.less(Scored.by(AdditiveJudge("none", {}), texts))


# ---------------------------------------------------------------------------------------------------- words


def test_words_that_earn_and_cost_are_named_with_what_they_earn():
    words = audit.liked(Scored.by(JUDGE, made_texts(60)), most=2)
    assert words["piece"].iloc[0] == "good" and words["piece"].iloc[-1] == "bad"
    assert [words["credit"].iloc[row].mean for row in (0, -1)] == pytest.approx([1.0, -2.0])


def test_chance_is_rarely_taken_for_a_liking():
    """A model that pays for nothing: all rows of a table hold at once, and the choice does not flatter them."""
    scored, rng = Scored.by(JUDGE, made_texts(60)), np.random.default_rng(0)
    drawn = (scored.pieces.assign(credit=rng.normal(size=len(scored.pieces))) for _ in range(50))
    tables = [audit.liked(replace(scored, pieces=pieces), most=3) for pieces in drawn]
    assert sum(any(i.low > 0 or i.high < 0 for i in table["credit"]) for table in tables) <= 7  # 2.5 are expected
    chosen, estimated = np.mean([(table["chosen_by"].iloc[0], table["credit"].iloc[0].mean) for table in tables], 0)
    assert chosen > 0.15 and abs(estimated) < 0.08


def test_words_of_few_texts_are_left_out():
    texts = [*made_texts(40), "splendid good", "splendid bad"]
    assert "splendid" not in set(audit.liked(Scored.by(JUDGE, texts), fewest=2)["piece"])
    with pytest.raises(InputError, match="no word is in 50 texts of each half of 42"):
        audit.liked(Scored.by(JUDGE, texts), fewest=50)


def test_words_may_be_common_where_no_two_together_are():
    words = "a b c d e f g h".split()
    texts = [f"good {word} film {word}" for word in words for _ in range(2)]
    scored = Scored.by(JUDGE, texts)
    assert set(audit.common(scored, fewest=3).index) == {"good", "film"}
    assert not len(audit.common(audit.phrases(scored), fewest=3))


def test_phrases_are_adjacent_words_of_one_text():
    joined = audit.phrases(Scored.by(JUDGE, ["good film, bad plot", "it"])).pieces
    assert joined["piece"].tolist() == ["good film", "bad plot"] and joined["credit"].tolist() == [1.25, -2.0]


# ---------------------------------------------------------------------------------------------------- variance


def test_shares_of_variance_sum_to_one_and_are_covariances():
    scored = Scored.by(JUDGE, made_texts(50))
    groups = scored.pieces["piece"].where(scored.pieces["piece"].isin(["good", "bad"]), "others")
    shares = audit.variance_shares(scored, groups)
    assert sum(share.mean for share in shares.values()) == pytest.approx(1)
    sums = scored.pieces[groups == "bad"].groupby("text")["credit"].sum().reindex(range(50), fill_value=0.0)
    by_hand = np.cov(sums, scored.scores, ddof=0)[0, 1] / scored.scores.var()
    assert shares["bad"].mean == pytest.approx(by_hand) and shares["bad"].low < by_hand < shares["bad"].high
    assert abs(shares["the rest"].mean) < 1e-9
    assert sum(s.mean for s in audit.variance_shares(scored, audit.thirds(scored)).values()) == pytest.approx(1)


def test_replies_to_one_prompt_are_compared_with_each_other():
    """What a prompt adds to both changes no share, neither of credit nor of what is seen."""
    texts, units = made_texts(80), np.repeat(range(40), 2)
    scored = Scored.by(JUDGE, texts, units)
    shifted = replace(scored, scores=scored.scores + 9 * np.random.default_rng(0).normal(size=40)[units])
    features = audit.surface(texts)
    for measure in (
        lambda one: audit.variance_shares(one, one.pieces["piece"]),
        lambda one: audit.predicted_shares(one, features),
    ):
        for name, share in measure(scored).items():
            assert (share.mean, share.low, share.high) == pytest.approx(tuple(vars(measure(shifted)[name]).values()))


def test_units_are_resampled_whole():
    """Each text twice, as a unit, tells no more than once."""
    texts, judges = made_texts(40), (JUDGE, AdditiveJudge("other", {"good": 1.0, "plot": 1.0}))
    once = [Scored.by(judge, texts) for judge in judges]
    twice = [Scored.by(judge, [t for t in texts for _ in (0, 1)], np.repeat(range(40), 2)) for judge in judges]
    one, two = audit.rank_correlation(*once), audit.rank_correlation(*twice)
    assert (
        one.mean == pytest.approx(spearmanr(once[0].scores, once[1].scores).statistic) and one.low < one.mean < one.high
    )
    assert (two.mean, two.low, two.high) == pytest.approx(
        (one.mean, one.low, one.high), abs=0.02
    )  # ties have ranks alike


def test_kinds_are_told_apart():
    scored = Scored.by(JUDGE, ["Thank you so much! 12 great films"])
    kinds = dict(zip(scored.pieces["piece"], audit.kinds(scored)))
    assert kinds["thank"] == kinds["you"] == "politeness formula" and kinds["!"] == "punctuation and format"
    assert kinds["12"] == "number" and kinds["great"] == "word that people mark" and kinds["films"] == "other word"


def test_what_is_seen_without_reading_predicts_a_score_of_length_and_no_other():
    scored = Scored.by(JUDGE, made_texts(200, longest=30))
    features = audit.surface(scored.texts)
    words = np.array([len(text.split()) for text in scored.texts], float)
    shares = audit.predicted_shares(replace(scored, scores=words), features)
    assert shares["length"].low > 0.95 < shares["all but words"].low and shares["politeness"].mean < 0.05
    nothing = audit.predicted_shares(replace(scored, scores=np.random.default_rng(1).normal(size=200)), features)
    assert all(share.low < 0.02 for share in nothing.values())
    assert shares["length"].low <= shares["length"].mean <= shares["length"].high


@pytest.mark.parametrize("text", [" ", "\x00", "\u202e.", "**a**\n- b\n# c", "<script>", "$$"])
def test_any_text_has_finite_features(text):
    frames = audit.surface([text, "plain"])
    assert all(np.isfinite(frame.to_numpy(float)).all() for frame in frames.values())


# ---------------------------------------------------------------------------------------------------- human marks


def test_peoples_marks_fall_on_pieces_by_characters():
    scored = Scored.by(JUDGE, ["good film", "bad"])
    marks = audit.human_marks(
        scored, [MarkedText("good film", [(0, 4), (5, 7)], (2.0, 1.0)), MarkedText("bad", [], ())]
    )
    assert marks.tolist() == [2.0, 0.5, 0.0]
    credit, values, real = audit.as_rows(scored, scored.pieces["credit"], marks)
    assert credit.tolist() == [[1.0, 0.25], [-2.0, 0.0]] and real.tolist() == [[True, True], [True, False]]
    assert isinstance(marks, pd.Series) and values.shape == real.shape


def test_two_models_order_pairs_alike_as_often_as_counted_by_hand():
    def pairs(*margins):
        scores = np.array([score for margin in margins for score in (margin, 0.0)])
        texts = tuple(f"text {n}" for n in range(len(scores)))
        return Scored(texts, np.repeat(np.arange(len(margins)), 2), scores, pd.DataFrame())

    ours, theirs = pairs(1.0, 2.0, -1.0, 0.0), pairs(0.1, -0.1, -5.0, 3.0)
    assert audit.ordered_alike(ours).mean == pytest.approx((1 + 1 + 0 + 0.5) / 4)
    assert audit.ordered_alike(ours, theirs).mean == pytest.approx((1 + 0 + 1 + 0.5) / 4)
    assert audit.ordered_alike(theirs, ours) == audit.ordered_alike(ours, theirs)
    for units in ([0, 0, 1], [0, 1, 1, 0]):
        with pytest.raises(InputError, match="give pairs"):
            audit.ordered_alike(Scored(("t",) * len(units), np.array(units), np.zeros(len(units)), pd.DataFrame()))
