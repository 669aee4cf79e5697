"""PPO against slow and obvious versions of itself."""

import copy
from dataclasses import replace

import pytest
import torch
from conftest import make_rollout
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from dense_rlhf import ppo
from dense_rlhf.config.params import PPOParams
from dense_rlhf.shaping.masked import masked_whiten
from dense_rlhf.types import InputError

PARAMS = PPOParams(updates=1, rollouts=6, max_new_tokens=8, minibatch=6, lr=1e-2, kl_coef=0.1)


@st.composite
def batches(draw):
    """Float64 rewards, values, log-probabilities old and new (B, T), and a mask."""
    T = draw(st.integers(1, 7))
    lengths = torch.tensor(draw(st.lists(st.integers(1, T), min_size=1, max_size=4)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    x = torch.randn(4, len(lengths), T, generator=generator, dtype=torch.float64)
    return (*x, torch.arange(T) < lengths[:, None])


# ---------------------------------------------------------------------------------------------------- pure functions


def gae_by_definition(rewards, values, mask, gamma, lam):
    advantages = torch.zeros_like(rewards)
    for b, length in enumerate(mask.sum(-1).tolist()):
        for t in range(length):
            for later in range(t, length):
                after = values[b, later + 1] if later + 1 < length else 0
                delta = rewards[b, later] + gamma * after - values[b, later]
                advantages[b, t] += (gamma * lam) ** (later - t) * delta
    return advantages


@given(batches(), st.floats(0, 1), st.floats(0, 1))
def test_gae_is_the_double_sum(batch, gamma, lam):
    rewards, values, _, _, mask = batch
    advantages = ppo.gae(rewards, values, mask, gamma, lam)
    assert torch.allclose(advantages, gae_by_definition(rewards, values, mask, gamma, lam), atol=1e-9)
    assert not advantages[~mask].any()


@given(batches())
def test_gae_at_one_is_reward_to_go_minus_value(batch):
    rewards, values, _, _, mask = batch
    rewards = rewards.masked_fill(~mask, 0)
    to_go = rewards.flip(-1).cumsum(-1).flip(-1)
    assert torch.allclose(ppo.gae(rewards, values, mask, 1, 1), (to_go - values).masked_fill(~mask, 0), atol=1e-9)


@given(batches(), st.sampled_from([0.0, 1e6, float("nan")]))
def test_padding_columns_change_nothing(batch, junk):
    rewards, values, old, new, mask = batch
    wide = [F.pad(x, (0, 3), value=junk) for x in (rewards, values, old, new)]
    wide_mask = F.pad(mask, (0, 3))
    assert torch.equal(ppo.gae(*wide[:2], wide_mask, 0.9, 0.8)[:, :-3], ppo.gae(rewards, values, mask, 0.9, 0.8))
    assert torch.allclose(
        torch.stack(ppo.policy_loss(wide[3], wide[2], wide[0], wide_mask, 0.2)),
        torch.stack(ppo.policy_loss(new, old, rewards, mask, 0.2)),
    )
    assert torch.allclose(
        ppo.value_loss(wide[1], wide[2], wide[0], wide_mask, 0.2), ppo.value_loss(values, old, rewards, mask, 0.2)
    )


def test_gae_refuses_lengths_that_disagree():
    mask = torch.ones(2, 4, dtype=torch.bool)
    for wrong in (torch.zeros(2, 3), torch.zeros(2, 1), torch.zeros(1, 4)):
        with pytest.raises(InputError):
            ppo.gae(wrong, torch.zeros(2, 4), mask, 1, 1)
        with pytest.raises(InputError):
            ppo.gae(torch.zeros(2, 4), wrong, mask, 1, 1)


@given(batches(), st.floats(0.01, 0.5))
def test_policy_loss_is_the_naive_loop(batch, clip):
    advantages, _, old, new, mask = batch
    losses, bound = [], []
    for a, o, n in zip(advantages[mask].tolist(), old[mask].tolist(), new[mask].tolist()):
        ratio = torch.tensor(n - o, dtype=torch.float64).exp().item()
        kept = min(max(ratio, 1 - clip), 1 + clip)
        losses.append(-min(ratio * a, kept * a))
        bound.append(kept * a < ratio * a)
    loss, clipped = ppo.policy_loss(new, old, advantages, mask, clip)
    assert loss.item() == pytest.approx(sum(losses), abs=1e-9) and clipped.item() == sum(bound)


@given(batches(), st.floats(0.01, 2))
def test_value_loss_takes_the_worse_of_plain_and_clipped(batch, clip):
    values, old, returns, _, mask = batch
    losses = []
    for v, o, r in zip(values[mask].tolist(), old[mask].tolist(), returns[mask].tolist()):
        near = min(max(v, o - clip), o + clip)
        losses.append(0.5 * max((v - r) ** 2, (near - r) ** 2))
    assert ppo.value_loss(values, old, returns, mask, clip).item() == pytest.approx(sum(losses))


def test_explained_variance():
    mask = torch.tensor([[True, True, True, False]])
    returns = torch.tensor([[1.0, 2.0, 4.0, 99.0]])
    assert ppo.explained_variance(returns, returns, mask) == pytest.approx(1)
    assert ppo.explained_variance(torch.zeros(1, 4), returns, mask) == pytest.approx(0)
    assert ppo.explained_variance(returns, torch.ones(1, 4), mask) != ppo.explained_variance(returns, returns, mask)


# ---------------------------------------------------------------------------------------------------- rewards


def test_the_kl_penalty_is_on_every_token(rollout):
    assert (rollout.logprobs - rollout.ref_logprobs).abs().max() > 0.01
    rewards = ppo.token_rewards(rollout, torch.full(rollout.mask.shape, 2.0), PARAMS)
    wanted = (2 - 0.1 * (rollout.logprobs - rollout.ref_logprobs)).masked_fill(~rollout.mask, 0)
    assert torch.allclose(rewards, wanted)
    kl = [sum((rollout.logprobs - rollout.ref_logprobs)[b][keep].tolist()) for b, keep in enumerate(rollout.mask)]
    assert torch.allclose(ppo.sequence_kl(rollout), torch.tensor(kl), atol=1e-5)


def test_whitened_rewards_keep_their_mean(rollout):
    shaped = torch.randn(rollout.mask.shape, generator=torch.Generator().manual_seed(0)) * 5 + 3
    rewards = ppo.token_rewards(rollout, shaped, replace(PARAMS, whiten_rewards=True, kl_coef=0.0))
    assert rewards[rollout.mask].mean().item() == pytest.approx(shaped[rollout.mask].mean().item(), abs=1e-4)
    assert rewards[rollout.mask].var().item() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(
    "kind",
    [torch.bool, torch.long, torch.complex64, Tensor.numpy, Tensor.tolist, lambda _: None, lambda _: 1.0],
    ids=["bool", "integers", "complex", "numpy", "list", "none", "number"],
)
def test_rewards_of_another_kind_are_refused_in_one_line(rollout, policy, kind):
    """Also before they can change the learner's running unit."""
    zeros = torch.zeros(rollout.mask.shape)
    rewards = zeros.to(kind) if isinstance(kind, torch.dtype) else kind(zeros)
    learner = ppo.make_learner(policy, PARAMS, 0)
    for use in (
        lambda: ppo.token_rewards(rollout, rewards, PARAMS),
        lambda: learner.pay(rollout, rewards, replace(PARAMS, scale_rewards=True)),
        lambda: ppo.update(learner, rollout, rewards, PARAMS),
        lambda: ppo.gae(rewards, rollout.values, rollout.mask, 1.0, 0.95),
    ):
        with pytest.raises(InputError, match="^rewards are .*, wanted a floating-point tensor"):
            use()
    assert learner.moments == [0.0, 0.0, 0.0]


def test_rewards_of_another_shape_raise(rollout, policy):
    with pytest.raises(InputError, match="rewards are"):
        ppo.token_rewards(rollout, torch.zeros(rollout.mask.shape)[:, :1], PARAMS)
    with pytest.raises(InputError):
        run_update(policy, rollout, torch.zeros(rollout.mask.shape)[:, :-1])


@pytest.mark.parametrize(
    "change",
    [
        {"rollouts": 7},
        {"minibatch": 4},
        {"temperature": 0.0},
        {"updates": 0},
        {"kl_target": 6.0, "kl_coef": 0.0},
        {"kl_coef": -0.1},
    ],
)
def test_params_are_checked(change):
    with pytest.raises(InputError, match="ppo."):
        replace(PARAMS, **change)


# ---------------------------------------------------------------------------------------------------- update


def run_update(policy, rollout, rewards, params=PARAMS, learner=None, seed=0):
    return ppo.update(learner or ppo.make_learner(policy, params, seed), rollout, rewards, params)


def current(policy, rollout):
    return policy(rollout, 1.0)


@pytest.fixture
def fresh(policy, reference, reward_model, tokenizer):
    """A rollout of `policy` itself, with noise as rewards."""
    made = make_rollout(policy, reference, reward_model, tokenizer)
    noise = torch.randn(made.mask.shape, generator=torch.Generator().manual_seed(2))
    return made, noise.masked_fill(~made.mask, 0)


@pytest.mark.parametrize("micro_batch", [1, 4])
def test_micro_batches_give_the_same_weights(policy, fresh, micro_batch):
    other = copy.deepcopy(policy)
    logs = run_update(policy, *fresh)
    split = run_update(other, *fresh, replace(PARAMS, micro_batch=micro_batch))
    for (name, a), (_, b) in zip(policy.named_parameters(), other.named_parameters()):
        assert torch.allclose(a, b, atol=1e-5), name
    for name in ("policy_loss", "value_loss", "entropy", "grad_norm"):
        assert logs[name] == pytest.approx(split[name], rel=1e-3, abs=1e-5), name


def test_an_update_is_decided_by_its_generator(policy, fresh):
    params, weights = replace(PARAMS, minibatch=2, epochs=2), []
    for seed in (0, 0, 1):
        twin = copy.deepcopy(policy)
        run_update(twin, *fresh, params, seed=seed)
        weights.append(twin.lm.lm_head.weight)
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_one_step_lowers_the_loss_that_it_reports(policy, fresh):
    rollout, rewards = fresh
    advantages = ppo.gae(rewards, rollout.values, rollout.mask, PARAMS.gamma, PARAMS.lam)
    white = masked_whiten(advantages, rollout.mask)
    n = int(rollout.mask.sum())
    before = ppo.policy_loss(current(policy, rollout)[0], rollout.logprobs, white, rollout.mask, 0.2)[0].item() / n
    logs = run_update(policy, rollout, rewards, replace(PARAMS, lr=1e-3))
    after = ppo.policy_loss(current(policy, rollout)[0], rollout.logprobs, white, rollout.mask, 0.2)[0].item() / n
    assert logs["policy_loss"] == pytest.approx(before, abs=1e-5) and after < before - 1e-3


@pytest.mark.parametrize("dense", [False, True], ids=["sparse", "dense"])
def test_ppo_makes_a_rewarded_token_likelier(dense, policy, reference, reward_model, tokenizer):
    """A bandit: one reward for each 'good' token in a response, at the token or all at the end."""
    wanted = tokenizer(" was", add_special_tokens=False)["input_ids"][0]
    params = replace(PARAMS, updates=1000, lr=3e-3, kl_coef=0.0, epochs=2)
    learner, shares = ppo.make_learner(policy, params, 0), []
    with torch.no_grad():
        policy.lm.lm_head.bias[wanted] = 3.0
    for step in range(25):
        rollout = make_rollout(policy, reference, reward_model, tokenizer, seed=step)
        rewards = ((rollout.responses == wanted) & rollout.mask).float()
        shares.append((rewards.sum() / rollout.mask.sum()).item())
        if not dense:
            last = F.one_hot(rollout.mask.sum(-1) - 1, rollout.mask.shape[1])
            rewards = last * rewards.sum(-1, keepdim=True)
        run_update(policy, rollout, rewards, params, learner)
    assert sum(shares[-5:]) / 5 > sum(shares[:5]) / 5 + 0.2
