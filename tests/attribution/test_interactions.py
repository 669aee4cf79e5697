"""Interactions of pairs: definitions by brute force, closed forms, games whose pairs are known, display."""

import html
from itertools import combinations
from math import comb, factorial

import numpy as np
import pytest
from games import masks_of, pairwise, shapley, subject, table_game
from hypothesis import given
from hypothesis import strategies as st

from dense_rlhf.attribution.coalitions import permutation_shap
from dense_rlhf.attribution.game import Game
from dense_rlhf.attribution.interactions import interactions
from dense_rlhf.types import InputError

SHORT = "It was not good at"  # five players


def derivative(values, i, j, inside):
    """v(T + i + j) - v(T + i) - v(T + j) + v(T)."""
    rest = sum(1 << n for n in inside)
    return values[rest | 1 << i | 1 << j] - values[rest | 1 << i] - values[rest | 1 << j] + values[rest]


def by_closed_form(values, n, weight):
    """(n, n): the sum over T without i and j of weight(|T|) times the derivative."""
    pairs = np.zeros((n, n))
    for i, j in combinations(range(n), 2):
        others = [p for p in range(n) if p not in (i, j)]
        sums = [sum(derivative(values, i, j, T) for T in combinations(others, t)) * weight(t) for t in range(n - 1)]
        pairs[i, j] = pairs[j, i] = sum(sums)
    return pairs


CLOSED = {  # Tsai et al. 2023, theorem 19 with l = 2; Grabisch and Roubens 1999; Dhamdhere et al. 2020
    "fsii": lambda n: lambda t: 6 * factorial(t + 1) * factorial(n - t - 1) / factorial(n + 1),
    "sii": lambda n: lambda t: factorial(t) * factorial(n - t - 2) / factorial(n - 1),
    "stii": lambda n: lambda t: 2 / n / comb(n - 1, t),
}


@pytest.mark.parametrize("index", CLOSED)
@given(seed=st.integers(0, 1000))
def test_an_index_is_its_closed_form(index, seed):
    values = np.random.default_rng(seed).normal(size=32)
    found = interactions(table_game(values, SHORT), "tokens", index)
    np.testing.assert_allclose(found.pairs, by_closed_form(values, 5, CLOSED[index](5)), atol=1e-9)
    assert found.evaluations == 32 and found.score == values[-1] and found.baseline == values[0]
    assert index == "sii" or found.gap == pytest.approx(0, abs=1e-9)
    if index == "sii":
        np.testing.assert_allclose(found.main, shapley(values, 5), atol=1e-9)
    if index == "stii":
        np.testing.assert_allclose(found.main, values[1 << np.arange(5)] - values[0], atol=1e-9)


@given(seed=st.integers(0, 1000))
def test_fsii_is_the_best_fit_of_all_coalitions(seed):
    values, masks = np.random.default_rng(seed).normal(size=32), masks_of(5).astype(float)
    found = interactions(table_game(values, SHORT), "tokens")
    columns = np.stack([masks[:, i] * masks[:, j] for i, j in combinations(range(5), 2)], 1)
    design, sizes = np.concatenate([masks, columns], 1), masks.sum(1).astype(int)
    weight = np.array([1 / (comb(5, s) * s * (5 - s)) if 0 < s < 5 else 1e9 for s in sizes])  # the ends hold exactly
    root = np.sqrt(weight)
    fit = np.linalg.lstsq(root[:, None] * design, root * (values - values[0]), rcond=None)[0]
    np.testing.assert_allclose(np.concatenate([found.main, found.pairs[np.triu_indices(5, 1)]]), fit, atol=1e-5)


@pytest.mark.parametrize("index", CLOSED)
def test_pairs_that_are_there_are_found(index):
    values, main, pairs = pairwise(10, np.random.default_rng(0))
    found = interactions(table_game(values), "tokens", index)
    np.testing.assert_allclose(found.pairs, pairs, atol=1e-8)
    if index != "sii":
        np.testing.assert_allclose(found.main, main, atol=1e-8)
        np.testing.assert_allclose(found.shapley, shapley(values, 10), atol=1e-8)


def neighbours(n, rng):
    values, main, pairs = pairwise(n, rng)
    near = pairs * (abs(np.subtract.outer(range(n), range(n))) == 1)
    masks = masks_of(n).astype(float)
    return masks @ main + np.einsum("mi,ij,mj->m", masks, np.triu(near), masks), near


def test_the_coalitions_of_shap_tell_neighbours_and_not_all_pairs():
    values, near = neighbours(10, np.random.default_rng(1))
    full = table_game(values)
    masks = permutation_shap(10, 2, 0).masks.numpy()
    game = Game(
        full.subject, None, {bits.tobytes(): full.scores[bits.tobytes()] for bits in np.packbits(masks, axis=1)}
    )
    found = interactions(game, "tokens", within=1, samples=0)
    np.testing.assert_allclose(found.pairs, near, atol=1e-8)
    assert len(found.ranked()) == 9  # the pairs that were asked
    with pytest.raises(InputError, match="38 coalitions of 10 players do not tell"):
        interactions(game, "tokens", samples=0)
    with pytest.raises(InputError, match="lacks"):
        interactions(game, "tokens")


def test_players_of_several_tokens_share_no_pair_within():
    values, main, pairs = pairwise(10, np.random.default_rng(2))
    game = table_game(values)
    found = interactions(game, "sentences")
    group = game.players("sentences")
    own = np.eye(3)[group]
    np.testing.assert_allclose(found.pairs, own.T @ pairs @ own * (1 - np.eye(3)), atol=1e-8)
    assert found.parts == ("It was not good.", " I liked it.", " Bad end, sadly") and found.evaluations == 8


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(index="banzhaf"), "index is 'banzhaf', wanted one of fsii, sii, stii"),
        (dict(within=0), "within is 0, wanted at least 1"),
        (dict(samples=3), "samples is 3, wanted at least 18"),
        (dict(index="sii", within=1), "within and samples are options of fsii; sii reads all coalitions"),
        (dict(players=[(0, 43)]), "the response is 1 player"),
    ],
)
def test_what_cannot_be_asked_is_one_line(options, message):
    game = table_game(np.zeros(1024))
    with pytest.raises(InputError, match=message):
        interactions(game, **{"players": "tokens"} | options)


def test_a_game_without_scores_tells_no_pair():
    with pytest.raises(InputError, match="2 coalitions of 5 players do not tell 15 of 15 effects"):
        interactions(Game(subject(SHORT)), "tokens", samples=0)


def test_more_pairs_than_can_be_fitted_are_one_line():
    with pytest.raises(InputError, match="100 players have 4950 pairs, wanted at most 4096 with the players"):
        interactions(Game(subject("a" + " a" * 99)), "tokens")


def test_thirteen_players_are_too_many_for_a_definition():
    with pytest.raises(InputError, match="sii needs all coalitions of 13 players"):
        interactions(Game(subject("a" + " a" * 12)), "tokens", "sii")


def test_the_strongest_pair_is_shown_and_text_is_escaped():
    response = "It <b>not</b> good $x"
    masks, n = masks_of(4), len(subject(response).spans)
    values = 2.0 * masks[:, 0] - 3.0 * (masks[:, 1] & masks[:, 2])
    found = interactions(table_game(values[: 2**n], response), "tokens")
    first = found.ranked(1).iloc[0]
    assert (first["part"], first["with"], first["interaction"]) == (" <b>not</b>", " good", pytest.approx(-3))
    assert first["share"] == pytest.approx(1) and "-3.0000  ' <b>not</b>' with ' good'" in repr(found)
    shown = found._repr_html_()
    assert "<b>" not in shown and html.escape("<b>not</b>") in shown and "-3.00" in shown


def test_the_figure_has_alt_text_and_its_title_names_the_pair(monkeypatch):
    shown = {}
    monkeypatch.setattr("dense_rlhf.view.figures.show", lambda ax, alt: shown.update(title=ax.get_title(), alt=alt))
    values = -3.0 * (masks_of(5)[:, 2] & masks_of(5)[:, 3])
    interactions(table_game(values, SHORT), "tokens").figure()
    assert shown["title"] == "Strongest pair: 'not' with 'good', -3.00"
    assert "not with good: -3.00" in shown["alt"]
