"""Credit becomes reward: the sum is kept, padding stays empty, baselines are one-hot shapes."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dense_rlhf.attribution import SOURCES, attribute
from dense_rlhf.masked import effective_share
from dense_rlhf.params import AttributionParams
from dense_rlhf.shaping import dense_reward, shape_diagnostics, shape_rewards
from dense_rlhf.types import NORMALISERS, Attribution, InputError, RewardShape


@pytest.fixture(scope="module")
def attributions(reward_model, rollout):
    return attribute(reward_model, rollout, list(SOURCES), AttributionParams(seed=2))


def plain(credit, rollout, source="x"):
    """An attribution of given credit (B, T), not a share."""
    credit = credit.masked_fill(~rollout.mask, 0)
    zero = torch.zeros_like(rollout.scores)
    return Attribution(source, credit, zero, rollout.scores - credit.sum(-1), 0, 0)


def check_contract(rewards, rollout):
    assert rewards.shape == rollout.mask.shape and not rewards[~rollout.mask].any()
    assert torch.allclose(rewards.sum(-1), rollout.scores, atol=2e-4)


@pytest.mark.parametrize("normalise", ["softmax", "signed"])
@pytest.mark.parametrize("source", SOURCES)
def test_every_source_sums_to_the_scores(source, normalise, attributions, rollout):
    check_contract(shape_rewards(rollout, attributions, RewardShape((source,), (1.0,), normalise)), rollout)


def test_shares_are_the_sparse_and_even_baselines_the_random_control_and_attention(attributions):
    assert {s for s, found in attributions.items() if found.is_share} == {"terminal", "uniform", "random", "attention"}


@pytest.mark.parametrize("source", ["terminal", "uniform", "random", "attention"])
def test_shares_stay_as_they_are_under_every_normaliser(source, attributions, rollout):
    for normalise in NORMALISERS:
        rewards = shape_rewards(rollout, attributions, RewardShape((source,), (1.0,), normalise))
        assert torch.equal(rewards, attributions[source].credit)


weights = st.lists(st.floats(0, 1), min_size=2, max_size=2).filter(lambda w: sum(w) > 0.1)


@given(st.integers(0, 1000), st.floats(0.01, 10), st.sampled_from(NORMALISERS), weights)
def test_any_credit_and_mixture_sums_to_the_scores(rollout, seed, size, normalise, pair):
    credit = size * torch.randn(2, *rollout.mask.shape, generator=torch.Generator().manual_seed(seed))
    if normalise == "sum":
        credit = credit.abs() + 1e-2
    given_ = {name: plain(c, rollout, name) for name, c in zip("ab", credit)}
    shape = RewardShape(("a", "b"), tuple(w / sum(pair) for w in pair), normalise, temperature=size)
    check_contract(shape_rewards(rollout, given_, shape), rollout)


def test_one_hot_terminal_is_sparse_rlhf_bit_for_bit(attributions, rollout):
    sparse = torch.zeros_like(rollout.values)
    sparse[torch.arange(len(sparse)), rollout.mask.sum(-1) - 1] = rollout.scores
    assert torch.equal(shape_rewards(rollout, attributions, RewardShape(("terminal",), (1.0,))), sparse)
    among = RewardShape(("shap", "terminal", "uniform"), (0.0, 1.0, 0.0))
    assert torch.equal(shape_rewards(rollout, attributions, among), sparse)


def test_softmax_is_the_papers_formula(attributions, rollout):
    shape = RewardShape(("shap", "lime"), (0.25, 0.75), temperature=0.5)
    rewards = shape_rewards(rollout, attributions, shape)
    for row, keep in enumerate(rollout.mask):
        mix = sum(w * (attributions[s].credit[row][keep] / 0.5).softmax(-1) for s, w in zip(*shape_parts(shape)))
        assert torch.allclose(rewards[row][keep], rollout.scores[row] * mix, atol=1e-5)


def shape_parts(shape):
    return shape.sources, shape.weights


def test_signed_keeps_differences_of_credit(rollout):
    credit = torch.randn(rollout.mask.shape, generator=torch.Generator().manual_seed(1))
    rewards = dense_reward(rollout, plain(credit, rollout), RewardShape(("x",), (1.0,), "signed"))
    for row, keep in enumerate(rollout.mask):
        assert torch.allclose(rewards[row][keep].diff(), credit[row][keep].diff(), atol=1e-5)


def test_sum_is_the_share_of_the_score(rollout):
    credit = torch.rand(rollout.mask.shape, generator=torch.Generator().manual_seed(1)) + 0.1
    shape = RewardShape(("x",), (1.0,), "sum")
    rewards = dense_reward(rollout, plain(credit, rollout), shape)
    wanted = plain(credit, rollout).credit * (rollout.scores / plain(credit, rollout).credit.sum(-1))[:, None]
    assert torch.allclose(rewards, wanted, atol=1e-5)
    negative = dense_reward(rollout, plain(-credit, rollout), shape)
    assert torch.allclose(rewards, negative, atol=1e-5)


def test_sum_refuses_mixed_signs_and_nothing(rollout):
    credit = torch.ones(rollout.mask.shape)
    credit[:, 1] = -0.5
    for bad in (credit, 0 * credit):
        with pytest.raises(InputError, match="one sign"):
            dense_reward(rollout, plain(bad, rollout), RewardShape(("x",), (1.0,), "sum"))


def test_shapes_that_disagree_raise(attributions, rollout):
    cut = replace(attributions["shap"], credit=attributions["shap"].credit[:, :-1])
    with pytest.raises(InputError, match="'shap'"):
        shape_rewards(rollout, {"shap": cut}, RewardShape(("shap",), (1.0,)))


def test_a_missing_attribution_raises_unless_its_weight_is_zero(attributions, rollout):
    shape = RewardShape(("shap", "human"), (0.5, 0.5))
    with pytest.raises(InputError, match="no attribution for human"):
        shape_rewards(rollout, attributions, shape)
    shape_rewards(rollout, attributions, replace(shape, weights=(1.0, 0.0)))


def test_effective_share_is_one_for_uniform_and_one_token_for_terminal(attributions, rollout):
    shares = {s: effective_share(attributions[s].credit, rollout.mask) for s in ("uniform", "terminal")}
    assert torch.allclose(shares["uniform"], torch.ones(len(rollout.scores)), atol=1e-5)
    assert torch.allclose(shares["terminal"], 1 / rollout.mask.sum(-1), atol=1e-5)
    found = shape_diagnostics(rollout, attributions, RewardShape(("terminal",), (1.0,)))
    assert found["ess/uniform"] == pytest.approx(1, abs=1e-5)
    assert found["ess/terminal"] == pytest.approx((1 / rollout.mask.sum(-1)).mean().item(), abs=1e-5)
    assert {f"ess/{s}" for s in SOURCES} <= set(found)


def test_the_sign_trap_is_measured(rollout):
    """Softmax times a negative score punishes every token, good ones too; signed flips none of a complete credit."""
    negative = replace(rollout, scores=-rollout.scores.abs() - 1)
    credit = plain(torch.ones(rollout.mask.shape), negative)
    shape = RewardShape(("x",), (1.0,))
    assert shape_diagnostics(negative, {"x": credit}, shape)["flipped"] == pytest.approx(1)
    complete = plain(negative.scores[:, None] / rollout.mask.sum(-1, keepdim=True) * rollout.mask, negative)
    assert shape_diagnostics(negative, {"x": complete}, replace(shape, normalise="signed"))["flipped"] == 0
