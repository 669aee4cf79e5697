"""The Gaussian process's Shapley values: exact where they must be, intervals that hold, rankings that settle."""

import numpy as np
import pytest
from games import masks_of, pairwise, shapley, subject, table_game
from hypothesis import given, settings
from hypothesis import strategies as st

from dense_rlhf.attribution.coalitions import leverage_shap, permutation_shap
from dense_rlhf.attribution.explain import Explanation
from dense_rlhf.attribution.game import explain_game
from dense_rlhf.attribution.gaussian import CAUTIOUS, FREE, LENGTH, OWN, RATES, drawn, inherited, posterior
from dense_rlhf.attribution.ranking import explain_until_ranked
from dense_rlhf.attribution.shells import shells
from dense_rlhf.types import InputError

SEEDS = st.integers(0, 2**16)


def interacting(k, rng, rate, even=1.0, length=0.0):
    """A table (2^k,) of a game drawn from the prior without its extra variance, and with large main effects.

    Interactions of an even number of players are `even` times as strong, a function of the number has size `length`.
    """
    sizes = masks_of(k).sum(1)  # of the sets T, numbered as coalitions are
    weights = rng.normal(size=2**k) * np.sqrt(np.where(sizes == 1, 5 * rate, rate**sizes))
    weights *= np.where(sizes % 2, 1, even)
    for player in range(k):  # the sum over T of weight_T prod_{i in T} s_i, player by player
        weights = weights.reshape(-1, 2, 2**player)
        weights = np.stack([weights[:, 0] - weights[:, 1], weights[:, 0] + weights[:, 1]], 1).ravel()
    return weights + length * rng.normal(size=k + 1)[sizes]


EXACT = np.stack([shapley(game, 8) for game in np.eye(256)], 1)  # Shapley values of a table (256,) are EXACT @ table


def rows_of(masks):
    return masks @ (1 << np.arange(masks.shape[1]))


@settings(deadline=None, max_examples=10)
@given(k=st.integers(1, 7), seed=SEEDS)
def test_from_all_coalitions_it_is_shapley_by_definition(k, seed):
    values = np.random.default_rng(seed).normal(size=2**k)
    made = posterior(masks_of(k))(values)
    assert np.allclose(made.credit, shapley(values, k), atol=1e-5)
    if k > 2:
        assert made.half_width.max() < 0.01 and np.isfinite(made.half_width).all()


@settings(deadline=None, max_examples=10)
@given(k=st.integers(2, 9), seed=SEEDS, each=st.integers(2, 8))
def test_additive_games_are_exact_and_surely_so(k, seed, each):
    rng = np.random.default_rng(seed)
    main, made = rng.normal(size=k), drawn(k, each * k, seed)
    result = made(3 + made.masks @ main)
    assert np.allclose(result.credit, main, atol=1e-3)
    if len(made.masks) > k + 1:
        assert result.half_width.max() < 0.1


@settings(deadline=None, max_examples=10)
@given(k=st.integers(2, 12), seed=SEEDS, each=st.integers(2, 8))
def test_complete_and_linear_in_scores(k, seed, each):
    made, rng = drawn(k, each * k, seed), np.random.default_rng(seed)
    assert not made.masks[0].any() and made.masks[1].all()
    one, two = rng.normal(size=(2, len(made.masks)))
    assert np.allclose(made(one).credit.sum(), one[1] - one[0], atol=1e-4)
    both = made(2 * one - two).credit
    assert np.allclose(both, 2 * made(one).credit - made(two).credit, atol=1e-8)


@settings(deadline=None, max_examples=10)
@given(k=st.integers(3, 8), seed=SEEDS)
def test_players_that_change_places_change_credits(k, seed):
    rng = np.random.default_rng(seed)
    masks, order = leverage_shap(k, 4 * k, seed).masks.numpy(), rng.permutation(k)
    scores = rng.normal(size=len(masks))
    here, there = posterior(masks)(scores), posterior(masks[:, order])(scores)
    assert np.allclose(here.credit[order], there.credit, atol=1e-6)
    assert np.allclose(here.half_width[order], there.half_width, atol=1e-6) and here.settled == there.settled


@pytest.mark.parametrize("design", [permutation_shap(4, 1, 0), leverage_shap(5, 20, 0)])
def test_the_covariance_is_that_of_the_games_of_the_prior(design):
    masks = design.masks.numpy()
    k = masks.shape[1]
    made, every, sizes = posterior(masks), masks_of(k), masks_of(k).sum(1)
    signs, numbers = np.where(every, 1.0, -1.0), sizes[:, None] == np.arange(k + 1)
    terms = np.array([np.where(subset, signs, 1).prod(1) for subset in every])
    games = np.concatenate([terms, numbers.T, np.eye(2**k)]).T  # of one term each
    credit, seen = np.stack([shapley(game, k) for game in games.T], 1), games[rows_of(masks)]
    if made.pairs is not None:
        seen = (seen[made.pairs[0]] - seen[made.pairs[1]]) / 2

    def variance(rate, free):
        alone = np.full(2**k, OWN * (1 + rate) ** k)
        return np.concatenate([rate**sizes * (1 + free * (sizes < 2)), np.full(k + 1, LENGTH), alone])

    over_k = [rate * k**0.5 for rate in CAUTIOUS] if made.pairs is None else RATES
    rates = [min(rate / k, 0.9) for rate in over_k]
    means = []
    for rate, errors in zip(rates, made.errors, strict=True):
        kernel = seen * variance(rate, FREE) @ seen.T + 1e-8 * np.eye(len(seen))
        means.append(credit * variance(rate, FREE) @ seen.T @ np.linalg.inv(kernel) @ seen)
        wrong = credit - made.operator @ games[rows_of(masks)]
        assert np.allclose(errors.covariance, wrong * variance(rate, -1) @ wrong.T, atol=1e-5)
    assert np.allclose(made.operator @ games[rows_of(masks)], np.mean(means, axis=0), atol=1e-4)


def covered(games, each):
    """The share of exact values that the intervals cover, of tables (N, 2^k) at `each` evaluations a player."""
    k = int(np.log2(games.shape[1]))
    exact, inside = games @ EXACT.T, []
    for seed, (values, truth) in enumerate(zip(games, exact)):
        made = drawn(k, each * k, seed % 5)
        result = made(values[rows_of(made.masks)])
        inside.append(np.abs(result.credit - truth) <= result.half_width)
    return np.mean(inside)


@pytest.mark.parametrize("each", [2, 4, 8, 16])
def test_intervals_cover_games_of_the_prior(each):
    games = [interacting(8, np.random.default_rng(seed), 0.3) for seed in range(60)]
    assert 0.91 <= covered(np.stack(games), each) <= 0.985


@pytest.mark.parametrize("each", [4, 8, 16])
@pytest.mark.parametrize("rate, even, length", [(0.3, 0.2, 0), (0.3, 5, 0), (0.15, 1, 0), (0.7, 1, 0), (0.3, 1, 2)])
def test_intervals_cover_games_of_others(each, rate, even, length):
    games = [interacting(8, np.random.default_rng(seed), rate, even, length) for seed in range(150)]
    assert 0.91 <= covered(np.stack(games), each) <= 0.985


def test_where_no_player_has_credit_all_intervals_are_alike():
    """A game of two players, each of which matters only with the other, among others that do not."""
    signs = np.where(masks_of(6), 1.0, -1.0)
    made = drawn(6, 24, 0)
    result = made((signs[:, 0] * signs[:, 1])[rows_of(made.masks)])
    assert np.allclose(result.credit, 0, atol=1e-6) and inherited(np.zeros(6)) == pytest.approx(1)
    assert np.trace(inherited(np.arange(6.0))) == pytest.approx(6)


@pytest.mark.parametrize("design", ["shells", "one-way permutations"])
def test_intervals_cover_the_largest_credit_where_what_matters_interacts(design):
    """A score that saturates: players that matter interact with all others, those that do not with none."""
    k, inside, rng = 8, [], np.random.default_rng(0)
    for _ in range(150):
        table = np.tanh(0.4 * (np.where(masks_of(k), 1.0, -1.0) @ rng.standard_t(3, size=k)))
        orders = rng.permuted(np.tile(np.arange(k), (5, 1)), axis=1)
        chains = [order[:, None] < np.arange(k + 1) for order in orders]
        masks = shells(k, 4 * k, 0) if design == "shells" else np.unique(np.concatenate(chains, 1).T, axis=0)
        result, exact = posterior(masks)(table[rows_of(masks)]), shapley(table, k)
        top = np.abs(result.credit).argmax()
        inside.append(abs(result.credit - exact)[top] <= result.half_width[top])
    assert np.mean(inside) > 0.9


def test_an_effect_of_the_number_of_players_costs_little():
    """Less than least squares has wrong, which has no term for it."""
    k, wrong = 8, []
    made, fit = drawn(k, 4 * k, 0), leverage_shap(k, 4 * k, 0)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        main, effect = rng.normal(size=k), rng.normal(size=k + 1)
        values, exact = masks_of(k) @ main + effect[masks_of(k).sum(1)], main + (effect[k] - effect[0]) / k
        credits = made(values[rows_of(made.masks)]).credit, fit.operator.numpy() @ values[rows_of(fit.masks.numpy())]
        wrong.append([np.linalg.norm(credit - exact) for credit in credits])
    ours, theirs = np.median(wrong, axis=0)
    assert ours < 0.9 * theirs


def test_shells_tell_more_than_coalitions_drawn_by_leverage():
    wrong = []
    for seed in range(40):
        values = interacting(8, np.random.default_rng(seed), 0.3)
        made = [posterior(masks) for masks in (shells(8, 30, seed), leverage_shap(8, 30, seed).masks.numpy())]
        wrong.append([np.linalg.norm(one(values[rows_of(one.masks)]).credit - EXACT @ values) for one in made])
    ours, theirs = np.median(wrong, axis=0)
    assert ours < 0.8 * theirs


def test_what_is_settled_is_in_order():
    right = []
    for seed in range(40):
        values = interacting(8, np.random.default_rng(seed), 0.3)
        made = drawn(8, 64, seed)
        result, exact = made(values[rows_of(made.masks)]), EXACT @ values
        here, there = (np.argsort(-np.abs(credit))[: result.settled].tolist() for credit in (result.credit, exact))
        right.append(here == there)
    assert np.mean(right) >= 0.9


def test_a_game_without_difference_has_nothing_settled():
    made = drawn(6, 24, 0)(np.full(len(drawn(6, 24, 0).masks), 2.0))
    assert made.settled == 0 and np.allclose(made.credit, 0, atol=1e-6)


# ---------------------------------------------------------------------------------------------------- until ranked


def test_it_stops_when_the_order_is_settled():
    n = len(subject().spans)
    game = table_game(masks_of(n) @ np.arange(n, 0, -1.0) ** 2)
    explained = explain_until_ranked(game, top=3)
    assert explained.settled >= 3 and explained.evaluations <= 4 * n + 2
    assert explained.ranked(3).characters.tolist() == [f"{a}-{b}" for a, b in explained.players[:3]]


def test_it_says_when_the_budget_ends():
    n = len(subject().spans)
    tied = table_game(masks_of(n) @ np.ones(n))
    explained = explain_until_ranked(tied, top=2, most=8)
    assert explained.settled < 2 and explained.evaluations <= 8 * n and "first 0 is settled" in repr(explained)


def test_it_takes_more_for_a_closer_race():
    n, rng = len(subject().spans), np.random.default_rng(1)
    noise = pairwise(n, rng)[0] + rng.normal(size=2**n)
    easy, hard = (
        explain_until_ranked(table_game(masks_of(n) @ (np.arange(n, 0, -1.0) * gap) + noise), top=2)
        for gap in (50.0, 0.5)
    )
    assert easy.evaluations < hard.evaluations


@pytest.mark.parametrize("wrong", [{"top": 0}, {"top": 99}, {"most": 3}])
def test_what_cannot_be_ranked_is_refused(wrong):
    n = len(subject().spans)
    with pytest.raises(InputError, match="top is .* wanted 1 to"):
        explain_until_ranked(table_game(np.zeros(2**n)), **wrong)


# ---------------------------------------------------------------------------------------------------- shown


def test_intervals_are_in_tables_text_and_heat_map():
    n, rng = len(subject().spans), np.random.default_rng(0)
    game = table_game(pairwise(n, rng)[0] + rng.normal(size=2**n) / 3)
    sure, unsure = explain_game(game), explain_game(game, "shap")
    assert isinstance(sure, Explanation) and unsure.half_width is None and unsure.settled is None
    assert sure.to_frame()["half_width"].tolist() == list(sure.half_width)
    first, width = sure.ranked().iloc[0], max(sure.half_width)
    assert f"± {first.half_width:.4f}" in repr(sure) and f"± {width:.3f}" in sure._repr_html_()
    assert f"the order of the first {sure.settled} is settled" in repr(sure)
    assert np.isnan(unsure.ranked()["half_width"]).all() and "±" not in repr(unsure) + unsure._repr_html_()


def test_credit_that_may_be_zero_is_grey():
    n, rng = len(subject().spans), np.random.default_rng(3)
    game = table_game(masks_of(n)[:, 0] * 20.0 + rng.normal(size=2**n))
    explained = explain_game(game, samples_per_token=3)
    grey = sum(abs(c) <= h for c, h in zip(explained.credit, explained.half_width))
    assert 0 < grey < n and explained._repr_html_().count("rgba(128,128,128") == grey


def test_the_budget_of_another_source_is_refused():
    with pytest.raises(InputError, match="permutations are the budget of source 'shap'"):
        explain_game(table_game(np.zeros(2 ** len(subject().spans))), permutations=4)
    with pytest.raises(InputError, match="samples_per_token is 1"):
        explain_game(table_game(np.zeros(2 ** len(subject().spans))), samples_per_token=1)
    with pytest.raises(InputError, match="coalitions, wanted at most"):
        posterior(np.zeros((9000, 3), bool))
