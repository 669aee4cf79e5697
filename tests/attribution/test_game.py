"""Games of tokens: each score asked once, explanations as `explain` gives them."""

from dataclasses import replace

import numpy as np
import pytest
from games import masks_of, pairwise, shapley, table_game
from test_explain import PROMPT, RESPONSE, bert, bert_tokenizer, llama  # noqa: F401

from dense_rlhf.attribution.engine import coalition_scores
from dense_rlhf.attribution.explain import explain
from dense_rlhf.attribution.game import Game, explain_game, explain_scored
from dense_rlhf.attribution.interactions import interactions
from dense_rlhf.types import InputError


@pytest.mark.parametrize("source, players", [("shap", "tokens"), ("lime", "words"), ("leave_one_out", "sentences")])
@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_a_game_is_explained_as_its_response_is(kind, source, players, request):
    tokenizer = request.getfixturevalue({"llama": "tokenizer", "bert": "bert_tokenizer"}[kind])
    model = request.getfixturevalue(kind)
    game = Game.of(model, tokenizer, PROMPT, RESPONSE, removal="attention_mask", pair=False)
    ours = explain_game(game, source, players)
    theirs = explain(model, tokenizer, PROMPT, RESPONSE, source, players, removal="attention_mask", pair=False)
    np.testing.assert_allclose(ours.credit, theirs.credit, atol=1e-6)
    for name in ("response", "spans", "player", "source", "complete", "evaluations", "engine", "text", "read_at"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.score == pytest.approx(theirs.score) and ours.baseline == pytest.approx(theirs.baseline)


def test_the_model_is_asked_once_for_each_coalition(llama, tokenizer, monkeypatch):  # noqa: F811
    asked = []
    real = Game.of(llama, tokenizer, PROMPT, RESPONSE)

    def counted(model, readings, masks, *rest):
        asked.append(len(masks[0]))
        return coalition_scores(model, readings, masks, *rest)

    monkeypatch.setattr("dense_rlhf.attribution.game.coalition_scores", counted)
    first = explain_game(real, "shap")
    assert sum(asked) == first.evaluations == len(real.scores) == len(real.coalitions(real.players("tokens")))
    assert explain_game(real, "shared_lime").evaluations <= first.evaluations
    assert explain_game(real, "shap").credit == first.credit and sum(asked) == first.evaluations
    explain_game(real, "leave_one_out")
    assert sum(asked) == len(real.scores) > first.evaluations


def test_without_a_model_what_is_lacking_is_one_line():
    game = table_game(np.zeros(2**10))
    game.scores.pop(np.packbits(np.ones(10, bool)).tobytes())
    with pytest.raises(InputError, match=r"has 1023 coalitions, of the 2 needed it lacks 1; give it the model"):
        game.ends()


def test_a_removal_that_is_not_the_games_is_refused():
    game = table_game(np.arange(2.0**10))
    assert explain_game(game, removal="drop").source == "gaussian"
    with pytest.raises(InputError, match="removal is 'attention_mask', the game's is 'drop'"):
        explain_game(game, removal="attention_mask")


def test_pairs_of_a_real_model_are_those_of_its_own_scores(bert, bert_tokenizer):  # noqa: F811
    response = " was good. A bad plot"
    game = Game.of(bert, bert_tokenizer, PROMPT, response, pair=False)
    k = game.players("words").max() + 1
    found = interactions(game, "words")
    values = game(masks_of(k)[:, game.players("words")])
    n = {name: value for name, value in zip(found.parts, range(k))}
    i, j = n[" good."], n[" bad"]
    others = [p for p in range(k) if p not in (i, j)]
    weight = {0: 6 * 1 * 24 / 720, 1: 6 * 2 * 6 / 720, 2: 6 * 6 * 2 / 720, 3: 6 * 24 * 1 / 720}  # Faith-Shap, k = 5
    total = 0.0
    for rest in range(8):
        inside = sum(1 << p for bit, p in enumerate(others) if rest >> bit & 1)
        change = values[inside | 1 << i | 1 << j] - values[inside | 1 << i] - values[inside | 1 << j] + values[inside]
        total += weight[bin(rest).count("1")] * change
    assert k == 5 and found.pairs[i, j] == pytest.approx(total, abs=1e-6) and abs(total) > 1e-4
    assert found.gap == pytest.approx(0, abs=1e-6)


def test_scores_that_other_players_asked_for_are_read_together():
    values, main, pairs = pairwise(10, np.random.default_rng(0))
    everything = table_game(values)
    game = replace(everything, scores={})
    for mask in masks_of(10)[::7]:
        key = np.packbits(mask).tobytes()
        game.scores[key] = everything.scores[key]
    ends = np.packbits(np.array([[False] * 10, [True] * 10]), axis=1)
    game.scores.update({end.tobytes(): everything.scores[end.tobytes()] for end in ends})
    explained = explain_scored(game)
    assert explained.evaluations == len(game.scores) and explained.gap == pytest.approx(0, abs=1e-6)
    sure = np.abs(np.array(explained.credit) - shapley(values, 10)) <= np.array(explained.half_width)
    assert sure.mean() >= 0.8 and explained.complete
    whole = explain_scored(everything, "sentences")
    assert whole.evaluations == 8 and whole.player_credit == pytest.approx(
        np.bincount(whole.player, shapley(values, 10))
    )
