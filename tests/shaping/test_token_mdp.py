"""Token MDPs, enumerated: rewards that keep the sum keep the best response, and not what learning settles on."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dense_rlhf.shaping.token_mdp import TokenMDP, cosine
from dense_rlhf.types import InputError

REWARDS = ("sparse", "uniform", "prefix differences", "Shapley", "softmax of Shapley", "leave-one-out")
TELESCOPE = ("sparse", "uniform", "prefix differences")  # their return-to-go ranks the next tokens as the score does
sizes = st.tuples(st.integers(2, 3), st.integers(2, 4))


def game(size, seed=0):
    vocabulary, length = size
    return TokenMDP(vocabulary, length, np.random.default_rng(seed).normal(size=vocabulary**length))


def lost(mdp, rewards):
    return mdp.scores.max() - mdp.scores[mdp.settled(rewards)]


def natural_gradient(mdp, rewards, steps, eta=0.5):
    """Probabilities (V^T,) of all responses after small steps pi <- pi exp(eta A) from uniform, by brute force."""
    V, T, responses = mdp.vocabulary, mdp.length, mdp.responses
    logits = [np.zeros((V,) * (t + 1)) for t in range(T)]
    to_go = rewards[:, ::-1].cumsum(1)[:, ::-1]
    for _ in range(steps):
        policy = [np.exp(x - x.max(-1, keepdims=True)) for x in logits]
        policy = [x / x.sum(-1, keepdims=True) for x in policy]
        each = np.stack([policy[t][tuple(responses[:, : t + 1].T)] for t in range(T)], 1)
        for t in range(T):
            q = (each[:, t + 1 :].prod(1) * to_go[:, t]).reshape((V,) * (t + 1) + (-1,)).sum(-1)
            logits[t] = logits[t] + eta * (q - (policy[t] * q).sum(-1, keepdims=True))
    return each.prod(1)


@given(sizes, st.integers(0, 99))
def test_the_best_response_by_summed_reward_is_the_best_by_score(size, seed):
    mdp = game(size, seed)
    assert tuple(mdp.rewards()) == REWARDS
    for name, rewards in mdp.rewards().items():
        assert np.allclose(rewards.sum(1), mdp.scores), name
        assert mdp.regret(rewards, 1.0) < 1e-9, name


@given(sizes, st.integers(0, 99))
def test_rewards_whose_return_to_go_telescopes_settle_on_the_best_response(size, seed):
    mdp = game(size, seed)
    rewards = mdp.rewards()
    assert {name: lost(mdp, rewards[name]) for name in TELESCOPE} == dict.fromkeys(TELESCOPE, 0)


def test_shapley_rewards_settle_on_a_worse_response_though_the_best_sum_is_the_best_score():
    mdp = TokenMDP(2, 2, np.array([1.0, 0.0, -5.0, 0.0]))
    rewards = mdp.rewards()
    by_hand = [[1.75, -0.75], [0.25, -0.25], [-2.75, -2.25], [-1.25, 1.25]]  # after a first a, b pays more than a
    assert np.allclose(rewards["Shapley"], by_hand)
    settled = {name: mdp.scores[mdp.settled(dense)] for name, dense in rewards.items()}
    assert settled == dict.fromkeys(REWARDS, 1.0) | {"Shapley": 0.0, "leave-one-out": 0.0}
    assert all(mdp.regret(dense, 1.0) == 0 for dense in rewards.values())


def test_score_lost_on_forty_games():
    """Those of notebook 03, by the fixed point itself: steps of 0.2 A that end after 300 improvements leave 0.011 for
    softmax of Shapley and 0.101 for leave-one-out."""
    rng = np.random.default_rng(0)
    games = [TokenMDP(3, 4, rng.normal(size=81)) for _ in range(40)]
    losses = np.array([[lost(mdp, rewards) for rewards in mdp.rewards().values()] for mdp in games])
    mean, share = (dict(zip(REWARDS, values.mean(0))) for values in (losses, losses > 0))
    assert max(mean[name] for name in TELESCOPE) == 0
    assert mean["Shapley"] == pytest.approx(0.017, abs=0.0005) and share["Shapley"] == 0.15
    assert mean["softmax of Shapley"] == pytest.approx(0.014, abs=0.0005) and share["softmax of Shapley"] == 0.125
    assert mean["leave-one-out"] == pytest.approx(0.094, abs=0.0005) and share["leave-one-out"] == 0.375


@pytest.mark.parametrize("name", REWARDS)
def test_small_natural_gradient_steps_settle_on_the_same_response(name):
    mdp = game((2, 3), seed=11)
    rewards = mdp.rewards()[name]
    assert (lost(mdp, rewards) > 0.1) == (name not in TELESCOPE)
    likely = natural_gradient(mdp, rewards, steps=500)
    assert likely.argmax() == mdp.settled(rewards) and likely.max() > 0.99


@given(sizes, st.integers(0, 99), st.sampled_from([0.0, 0.5, 1.0]))
def test_at_fixed_length_an_even_spread_scales_the_expected_advantage_and_keeps_its_signs(size, seed, lam):
    mdp = game(size, seed)
    rewards, T = mdp.rewards(), mdp.length
    true = mdp.expected_advantage(rewards["sparse"], 1.0, lam)
    assert np.allclose(mdp.expected_advantage(rewards["uniform"], 1.0, lam), true * (T - np.arange(T)) / T)


@given(sizes, st.integers(0, 99), st.sampled_from([0.0, 0.5, 1.0]))
def test_prefix_differences_keep_the_expected_advantage_and_shapley_values_turn_it(size, seed, lam):
    mdp = game(size, seed)
    rewards = mdp.rewards()
    true = mdp.expected_advantage(rewards["sparse"], 1.0, lam)
    assert np.allclose(true[:, 0], mdp.prefix_mean(mdp.scores, 1) - mdp.scores.mean())  # by hand: Q - V
    assert np.allclose(mdp.expected_advantage(rewards["prefix differences"], 1.0, lam), true)
    assert cosine(mdp.expected_advantage(rewards["Shapley"], 1.0, lam), true) < 1 - 1e-9


def test_discounting_changes_the_objective_of_every_dense_reward_but_an_even_one():
    mdp = game((3, 4))
    lost_at = {name: mdp.regret(rewards, 0.5) for name, rewards in mdp.rewards().items()}
    assert lost_at["sparse"] == lost_at["uniform"] == 0
    assert min(lost_at[name] for name in ("prefix differences", "Shapley", "leave-one-out")) > 0


@pytest.mark.parametrize("lam", [0.0, 0.5])
def test_with_exact_values_lambda_changes_no_expected_advantage(lam):
    mdp = game((3, 3))
    for rewards in mdp.rewards().values():
        assert np.allclose(mdp.expected_advantage(rewards, 1.0, lam), mdp.expected_advantage(rewards, 1.0, 1.0))


@given(st.integers(0, 99), st.sampled_from([1.0, 0.8]))
def test_rewards_that_are_each_tokens_own_settle_on_the_best_discounted_sum(seed, gamma):
    """Where a reward depends on the prefix alone the game is Markov, and settling is optimal."""
    mdp = game((3, 3), seed)
    own = mdp.rewards()["prefix differences"]
    assert mdp.regret(own, gamma) == pytest.approx(mdp.scores.max() - mdp.scores[mdp.settled(own, gamma)])


def test_ties_go_the_worst_way():
    mdp = TokenMDP(2, 2, np.array([3.0, 1.0, 0.0, 2.0]))
    assert mdp.settled(np.zeros((4, 2))) == 2


def test_a_score_for_each_response():
    with pytest.raises(InputError, match="wanted one for each of 8"):
        TokenMDP(2, 3, np.zeros(9))
