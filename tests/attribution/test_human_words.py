"""Words that people marked, from a file to the credit of any response."""

import json
import math
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import RATIONALES
from hypothesis import given
from hypothesis import strategies as st

from dense_rlhf.attribution import attribute, available
from dense_rlhf.attribution.agreement import score_unit
from dense_rlhf.attribution.human_marks import MarkedText, parse_tree, text_rollout
from dense_rlhf.attribution.human_words import PRIOR, fit_words, load_rationale_judge, load_rationales
from dense_rlhf.config.params import AttributionParams
from dense_rlhf.types import InputError

PARAMS = AttributionParams(rationale_path=RATIONALES)
TREES = "(3 (2 a) (3 (4 good) (2 film)))\n(1 (2 a) (1 (0 bad) (2 film)))\n"
TOXIC = 'spans,text\n"[2, 3, 4]",a bad film\n[],a film\n'
SPANS = '{"text": "a bad film", "spans": [[2, 5, -3]]}\n{"text": "fine", "spans": []}\n'


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "content, texts, values",
    [
        (TREES, ["a good film", "a bad film"], [(0, 2, 0), (0, -2, 0)]),
        (TOXIC, ["a bad film", "a film"], [(-1,), ()]),
        (SPANS, ["a bad film", "fine"], [(-3,), ()]),
        ("\ufeff" + SPANS, ["a bad film", "fine"], [(-3,), ()]),
    ],
)
def test_a_file_is_read_as_what_it_is(content, texts, values, tmp_path):
    attribution = load_rationales(write(tmp_path / "marks", content))
    assert [one.text for one in attribution] == texts and [one.values for one in attribution] == values


@pytest.mark.parametrize(
    "bad",
    [
        "",
        "{",
        "[]",
        "7",
        '{"text": "abc"}',
        '{"spans": []}',
        '{"text": 1, "spans": []}',
        '{"text": "a", "spans": 1}',
        *(
            json.dumps({"text": "abc", "spans": [span]})
            for span in (
                [0, 4, 1],
                [-1, 2, 1],
                [2, 2, 1],
                [2, 1, 1],
                [0, 1],
                [0, 1, 1, 1],
                [0, 1, "1"],
                [0.0, 1, 1],
                [True, 2, 1],
                [0, 1, True],
                [0, 1, None],
                [0, 1, math.nan],
                [0, 1, math.inf],
                3,
                "abc",
            )
        ),
        "[" * 100_000,
    ],
)
def test_a_broken_line_is_named_by_file_and_line(bad, tmp_path):
    path = write(tmp_path / "spans.jsonl", f"{SPANS}{bad}\n{SPANS}")
    with pytest.raises(InputError, match=r"spans.jsonl, line 3: .*wanted"):
        load_rationales(path)


@pytest.mark.parametrize("content, word", [("", "spans and text"), ("[1]", "spans and text"), ("(2 a", "line 1")])
def test_a_strange_file_raises(content, word, tmp_path):
    with pytest.raises(InputError, match=word):
        load_rationales(write(tmp_path / "marks", content))


def test_a_file_without_a_mark_or_no_file_raises(tmp_path):
    with pytest.raises(InputError, match="people marked no word"):
        load_rationale_judge(write(tmp_path / "marks", '{"text": "a film !", "spans": [[7, 8, 1]]}'))
    with pytest.raises(InputError, match="no file at .*nowhere"):
        load_rationale_judge(tmp_path / "nowhere")
    with pytest.raises(InputError, match="not readable"):
        load_rationale_judge(tmp_path)


def marked(text, *spans):
    return MarkedText(text, [span[:2] for span in spans], tuple(span[2] for span in spans))


def test_the_value_of_a_word_is_its_mean_shrunk_by_how_rare_it_is():
    texts = [parse_tree("(2 (4 Good) (2 film))"), parse_tree("(2 (3 good) (2 film))"), marked("not good", (0, 3, -1))]
    weights = fit_words(texts, prior=2).weights
    assert weights == pytest.approx({"good": (2 + 1 + 0) / (3 + 2), "not": -1 / (1 + 2)}) and "film" not in weights
    assert fit_words(texts, prior=0).weights["good"] == pytest.approx(1)
    assert PRIOR > 0


def test_a_span_is_worth_its_value_on_each_word_it_covers():
    text = "so very good, bad"
    assert fit_words([marked(text, (3, 12, 2))], 0).weights == {"very": 2, "good": 2}
    assert fit_words([marked(text, (8, 10, 2))], 0).weights == {"good": 1}  # half of its letters
    assert fit_words([marked(text, (8, 12, 2), (3, 17, -1))], 0).weights == {"very": -1, "good": 1, "bad": -1}


words = st.sampled_from(["good", "bad", "film", "don't"])


@given(
    st.lists(st.lists(st.tuples(words, st.integers(-2, 2)), min_size=1, max_size=6), min_size=1, max_size=5),
    st.floats(0, 9),
)
def test_values_stay_within_those_given_and_mean_what_people_meant(texts, prior):
    made, values_of = [], {}
    for text in texts:
        ends = [sum(len(w) + 1 for w, _ in text[: i + 1]) - 1 for i in range(len(text))]
        made.append(marked(" ".join(w for w, _ in text), *((e - len(w), e, v) for e, (w, v) in zip(ends, text))))
        for word, value in text:
            values_of.setdefault(word, []).append(value)
    wanted = {word: sum(values) / (len(values) + prior) for word, values in values_of.items() if sum(values)}
    assert fit_words(made, prior).weights == pytest.approx(wanted)
    assert fit_words(made[::-1], prior).weights == pytest.approx(wanted)


def test_a_file_is_read_once_and_again_when_it_changes(tmp_path):
    path = write(tmp_path / "marks.jsonl", SPANS)
    first = load_rationale_judge(path)
    assert load_rationale_judge(str(path)) is first and first.weights == {"bad": -3 / (1 + PRIOR)}
    write(path, SPANS.replace("-3", "-6"))
    os.utime(path, ns=(1, 1))
    assert load_rationale_judge(path).weights == {"bad": -6 / (1 + PRIOR)}


# ---------------------------------------------------------------------------------------------------- the source


def test_every_word_of_a_new_text_has_its_value(reward_model, tokenizer):
    texts = [" a film that I loved, not slow", " nobody knows", " GOOD good"]
    rollout, weights = text_rollout(texts, tokenizer, reward_model), load_rationale_judge(RATIONALES).weights
    attribution = attribute(reward_model, rollout, ["rationale"], PARAMS)["rationale"]
    totals = [weights["loved"] + weights["slow"], 0, 2 * weights["good"]]
    assert attribution.credit.sum(-1).tolist() == pytest.approx(totals, abs=1e-6) and totals[0] > 0
    assert (
        attribution.evaluations == 0
        and attribution.gap.isnan().all()
        and not attribution.complete
        and not attribution.is_share
    )
    assert attribution.credit.dtype == rollout.scores.dtype and not attribution.credit[~rollout.mask].any()


def test_it_does_not_ask_the_reward_model(reward_model, rollout):
    other = replace(rollout, scores=torch.zeros_like(rollout.scores))
    one, two = (attribute(reward_model, r, ["rationale"], PARAMS)["rationale"].credit for r in (rollout, other))
    assert torch.equal(one, two)


def test_without_a_file_it_is_not_available(reward_model, rollout):
    assert "rationale" in available(reward_model, PARAMS) and "log_ratio" in available(reward_model)
    assert "rationale" not in available(reward_model) + available(reward_model, AttributionParams())
    assert "log_ratio" not in available(replace(reward_model, implicit=None), PARAMS)
    with pytest.raises(InputError, match="set attribution.rationale_path"):
        attribute(reward_model, rollout, ["rationale"], AttributionParams())


def test_a_unit_is_the_slope_of_the_score_on_the_sums():
    credit = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(40, generator=torch.Generator().manual_seed(1))
    scores = 3 - 0.5 * credit.sum(-1) + noise
    unit, r2 = score_unit(credit, scores)
    sums = credit.sum(-1).numpy()
    assert unit == pytest.approx(np.polyfit(sums, scores.numpy(), 1)[0], abs=1e-5)
    assert r2 == pytest.approx(np.corrcoef(sums, scores.numpy())[0, 1] ** 2, abs=1e-5)
    assert score_unit(credit, 2 * credit.sum(-1) + 1) == pytest.approx((2, 1), abs=1e-5)
    assert all(np.isnan(score_unit(0 * credit, scores)))
