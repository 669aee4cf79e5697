"""Coarse to fine: totals hold at any budget, parts sum to wholes, exact for pairs, only what matters is split."""

import numpy as np
import pytest
from games import RESPONSE, masks_of, pairwise, table_game
from hypothesis import given
from hypothesis import strategies as st
from test_explain import PROMPT, build

from dense_rlhf.attribution.coarse_to_fine import coarse_to_fine
from dense_rlhf.attribution.explain import explain
from dense_rlhf.attribution.game import Game, explain_scored
from dense_rlhf.types import InputError

LEAST = 6  # evaluations of the three sentences


@given(seed=st.integers(0, 500), budget=st.integers(LEAST, 30), permutations=st.integers(1, 2))
def test_totals_hold_and_the_budget_too(seed, budget, permutations):
    values = np.random.default_rng(seed).normal(size=2**10)
    budget = max(budget, 4 * permutations + 2)
    explained = coarse_to_fine(table_game(values), budget, permutations, seed)
    assert explained.gap == pytest.approx(0, abs=1e-9) and explained.complete
    assert explained.evaluations <= budget and explained.baseline == values[0] and explained.score == values[-1]
    assert "".join(explained.tokens) == RESPONSE
    assert len(explained.players) <= 10


@given(seed=st.integers(0, 500), budget=st.integers(LEAST, 20))
def test_exact_where_tokens_act_in_pairs(seed, budget):
    values, main, pairs = pairwise(10, np.random.default_rng(seed))
    explained = coarse_to_fine(table_game(values), budget, seed=seed)
    exact = main + pairs.sum(1) / 2
    np.testing.assert_allclose(explained.player_credit, np.bincount(explained.player, exact), atol=1e-9)


@given(seed=st.integers(0, 500))
def test_parts_sum_to_what_the_whole_had(seed):
    game = table_game(np.random.default_rng(seed).normal(size=2**10))
    coarse, fine = (coarse_to_fine(game, budget, seed=seed) for budget in (LEAST, 20))
    assert coarse.players == [(0, 16), (16, 28), (28, 43)] and max(fine.player) == 9
    np.testing.assert_allclose(np.bincount(coarse.player, fine.credit), coarse.player_credit, atol=1e-9)


def test_only_what_matters_is_split():
    masks = masks_of(10)
    game = table_game(3.0 * (masks[:, 2] & masks[:, 3]) + 0.01 * masks.sum(1))
    explained = coarse_to_fine(game, 10)
    parts = [RESPONSE[a:b] for a, b in explained.players]
    assert parts == ["It was", " not", " good.", " I liked it.", " Bad end, sadly"]
    assert explained.player_credit == pytest.approx([0.02, 1.51, 1.51, 0.03, 0.03])


def test_a_word_is_parted_once_it_is_a_player(tokenizer):
    game = Game.of(build("Llama", tokenizer), tokenizer, PROMPT, " unwatchable acting. The end was good.")
    words, tokens = (np.flatnonzero(np.diff(game.players(kind))).tolist() for kind in ("words", "tokens"))
    for budget in (*range(6, 30, 12), 1000):
        edges = np.flatnonzero(np.diff(coarse_to_fine(game, budget).player)).tolist()
        for edge in set(edges) - set(words):
            around = [max((w for w in words if w < edge), default=-1), min((w for w in words if w > edge), default=-1)]
            assert all(w in edges for w in around if w >= 0)
    assert edges == tokens


def test_its_scores_give_its_players_intervals():
    values, main, pairs = pairwise(10, np.random.default_rng(0))
    game = table_game(values)
    coarse = coarse_to_fine(game, 14)
    sure = explain_scored(game, coarse.players)
    assert len(coarse.players) == 7 and sure.player == coarse.player and sure.evaluations == 2**7
    np.testing.assert_allclose(sure.player_credit, coarse.player_credit, atol=1e-6)
    assert len(sure.half_width) == 10 and np.isfinite(sure.half_width).all()


def test_a_budget_below_the_sentences_is_one_line():
    with pytest.raises(InputError, match="evaluations are 5, wanted at least 6, for 3 sentences"):
        coarse_to_fine(table_game(np.zeros(1024)), 5)


def test_a_real_model_is_asked_for_a_fifth(tokenizer):
    model, response = build("Llama", tokenizer), " was good. A bad plot, and awful acting. The end was good." * 2
    game = Game.of(model, tokenizer, PROMPT, response)
    explained = coarse_to_fine(game)
    tokens = explain(model, tokenizer, PROMPT, response)
    assert 5 * len(game.scores) <= tokens.evaluations and explained.evaluations >= len(game.scores)
    assert explained.score == pytest.approx(tokens.score) and abs(explained.gap) < 1e-6
    assert coarse_to_fine(Game.of(model, tokenizer, PROMPT, response)).credit == explained.credit  # the seed decides
