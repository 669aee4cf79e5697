"""Explaining what only scores texts: parity with the model itself, one call, and what is refused."""

import numpy as np
import pytest
import torch

from dense_rlhf.attribution.archive import load, save
from dense_rlhf.attribution.black_box import black_box_game, explain_black_box
from dense_rlhf.attribution.explain import explain
from dense_rlhf.attribution.game import Game, explain_game, explain_scored
from dense_rlhf.attribution.interactions import interactions
from dense_rlhf.attribution.kinds import Designed
from dense_rlhf.attribution.sources import SOURCES
from dense_rlhf.types import InputError

PROMPT, RESPONSE = "the film", " was good. A bad plot"


SOURCES_OF_SCORES = ("gaussian", "shap", "owen", "kernel", "leverage", "lime", "shared_lime", "leave_one_out")


def function_of(model, tokenizer, calls):
    """A function of texts that scores by a model, and what it was asked."""

    def score(prompt, responses):
        calls.append(responses)
        with torch.no_grad():
            return [model(torch.tensor([tokenizer(prompt + text)["input_ids"]])).logits.item() for text in responses]

    return score


@pytest.mark.parametrize("source", SOURCES_OF_SCORES)
def test_a_function_of_texts_has_the_credit_of_its_model(source, reward_model, tokenizer):
    model, calls = reward_model.model, []
    seen = explain_black_box(function_of(model, tokenizer, calls), PROMPT, RESPONSE, source, samples_per_token=4)
    own = explain(model, tokenizer, PROMPT, RESPONSE, source, "words", samples_per_token=4)
    assert [seen.baseline, seen.score] == pytest.approx([own.baseline, own.score], abs=1e-5)
    assert seen.player_credit == pytest.approx(own.player_credit, abs=1e-5)
    assert seen.player_half_width == pytest.approx(own.player_half_width, abs=1e-4, nan_ok=True)
    assert [seen.response[a:b] for a, b in seen.players] == [own.response[a:b] for a, b in own.players]
    assert seen.text == PROMPT + RESPONSE and seen.model == "score"
    assert (seen.complete, seen.evaluations) == (own.complete, own.evaluations)
    assert len(calls) == 1 and len(set(calls[0])) == len(calls[0])


def test_those_are_all_sources_that_need_only_scores():
    assert {name for name, kind in SOURCES.items() if isinstance(kind, Designed)} == set(SOURCES_OF_SCORES)


def test_a_game_of_texts_is_asked_once_and_read_many_times(reward_model, tokenizer, tmp_path):
    model, calls = reward_model.model, []
    score = function_of(model, tokenizer, calls)
    game, own = black_box_game(score, PROMPT, RESPONSE), Game.of(model, tokenizer, PROMPT, RESPONSE)
    pairs = interactions(game).pairs
    assert pairs == pytest.approx(interactions(own, "words").pairs, abs=1e-4, nan_ok=True)
    assert explain_game(game, "kernel", samples_per_token=40).evaluations == 2**5 and len(calls) == 1
    assert explain_game(game, players="sentences").evaluations == 4 and len(calls) == 1
    save(game, tmp_path / "scores.json")
    assert explain_scored(load(tmp_path / "scores.json")).credit == explain_scored(game).credit
    with pytest.raises(InputError, match="scores of another game: its weights is 'score'"):
        load(tmp_path / "scores.json", black_box_game(weight, PROMPT, RESPONSE))


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
        ("wanted words, sentences or spans", dict(players="tokens")),
        ("removal is 'attention_mask', the game's is 'drop'", dict(removal="attention_mask")),
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
