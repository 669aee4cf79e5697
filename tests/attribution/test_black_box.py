"""Explaining what only scores texts: parity with the model itself, one call, and what is refused."""

import numpy as np
import pytest
import torch

from dense_rlhf.attribution.black_box import explain_black_box
from dense_rlhf.attribution.explain import explain
from dense_rlhf.types import InputError

PROMPT, RESPONSE = "the film", " was good. A bad plot"


def test_a_model_behind_a_function_has_the_credit_that_it_has_itself(reward_model, tokenizer):
    model, calls = reward_model.model, []

    def score(prompt, responses):
        calls.append(responses)
        with torch.no_grad():
            return [model(torch.tensor([tokenizer(prompt + text)["input_ids"]])).logits.item() for text in responses]

    for source in ("kernel", "leave_one_out"):
        options = dict(source=source, players="words", samples_per_token=40)
        seen, own = explain_black_box(score, PROMPT, RESPONSE, **options), explain(
            model, tokenizer, PROMPT, RESPONSE, **options
        )  # fmt: skip
        assert [seen.baseline, seen.score] == pytest.approx([own.baseline, own.score], abs=1e-5)
        assert seen.player_credit == pytest.approx(own.player_credit, abs=1e-5)
        assert [seen.response[a:b] for a, b in seen.players] == [own.response[a:b] for a, b in own.players]
        assert seen.text == PROMPT + RESPONSE and seen.model == "score" and seen.complete == own.complete
    assert len(calls) == 2 and all(len(set(texts)) == len(texts) for texts in calls)


def weight(prompt, responses):
    """An additive score."""
    return np.array([text.count("good") - 2.0 * text.count("bad") + len(prompt) for text in responses])


def test_credit_of_a_sum_over_words_is_each_words_own():
    explained = explain_black_box(weight, ({"role": "user", "content": "?"},), RESPONSE, "shap")
    assert explained.credit == pytest.approx([0, 1, 0, -2, 0], abs=1e-6) and explained.text == ""
    spans = explain_black_box(weight, PROMPT, RESPONSE, "shap", [(5, 10)])
    assert spans.player_credit == pytest.approx([0, 1, -2], abs=1e-6)


@pytest.mark.parametrize(
    "match, options",
    [
        ("wanted words, sentences or spans, and drop", dict(players="tokens")),
        ("wanted words, sentences or spans, and drop", dict(removal="attention_mask")),
        ("wanted tokens, words", dict(players="letters")),
        ("wanted text that is not empty", dict(response="")),
        ("score gave 1 values", dict(score=lambda prompt, texts: [1.0])),
        ("finite numbers, one a text", dict(score=lambda prompt, texts: [float("nan")] * len(texts))),
        ("finite numbers, one a text", dict(score=lambda prompt, texts: ["1"] * len(texts))),
        ("removes tokens", dict(source="attention")),
    ],
)
def test_what_cannot_be_explained_is_refused(match, options):
    with pytest.raises(InputError, match=match):
        explain_black_box(**dict(score=weight, prompt=PROMPT, response=RESPONSE) | options)
