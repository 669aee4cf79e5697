"""PPO against slow and obvious versions of itself."""

import copy
from dataclasses import replace

import pytest
import torch
from conftest import make_rollout
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from dense_rlhf import ppo
from dense_rlhf.models import PolicyWithValue, logprobs_values_entropy
from dense_rlhf.params import PPOParams
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
    found = torch.zeros_like(rewards)
    for b, length in enumerate(mask.sum(-1).tolist()):
        for t in range(length):
            for later in range(t, length):
                after = values[b, later + 1] if later + 1 < length else 0
                delta = rewards[b, later] + gamma * after - values[b, later]
                found[b, t] += (gamma * lam) ** (later - t) * delta
    return found


@given(batches(), st.floats(0, 1), st.floats(0, 1))
def test_gae_is_the_double_sum(batch, gamma, lam):
    rewards, values, _, _, mask = batch
    found = ppo.gae(rewards, values, mask, gamma, lam)
    assert torch.allclose(found, gae_by_definition(rewards, values, mask, gamma, lam), atol=1e-9)
    assert not found[~mask].any()


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
    assert loss.item() == pytest.approx(sum(losses) / len(losses), abs=1e-9)
    assert clipped.item() == pytest.approx(sum(bound) / len(bound), abs=1e-6)


@given(batches(), st.floats(0.01, 2))
def test_value_loss_takes_the_worse_of_plain_and_clipped(batch, clip):
    values, old, returns, _, mask = batch
    losses = []
    for v, o, r in zip(values[mask].tolist(), old[mask].tolist(), returns[mask].tolist()):
        near = min(max(v, o - clip), o + clip)
        losses.append(0.5 * max((v - r) ** 2, (near - r) ** 2))
    assert ppo.value_loss(values, old, returns, mask, clip).item() == pytest.approx(sum(losses) / len(losses))


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


def test_a_missing_eos_costs_at_the_last_token(rollout):
    params = replace(PARAMS, missing_eos_penalty=3.0, kl_coef=0.0)
    rewards = ppo.token_rewards(rollout, torch.zeros(rollout.mask.shape), params)
    for row, ended in enumerate(rollout.ended.tolist()):
        wanted = torch.zeros(rollout.mask.shape[1])
        wanted[rollout.mask[row].sum() - 1] = 0.0 if ended else -3.0
        assert torch.equal(rewards[row], wanted)


def test_whitened_rewards_keep_their_mean(rollout):
    shaped = torch.randn(rollout.mask.shape, generator=torch.Generator().manual_seed(0)) * 5 + 3
    rewards = ppo.token_rewards(rollout, shaped, replace(PARAMS, whiten_rewards=True, kl_coef=0.0))
    assert rewards[rollout.mask].mean().item() == pytest.approx(shaped[rollout.mask].mean().item(), abs=1e-4)
    assert rewards[rollout.mask].var().item() == pytest.approx(1, abs=1e-4)


def test_rewards_of_another_shape_raise(rollout, policy):
    with pytest.raises(InputError, match="rewards are"):
        ppo.token_rewards(rollout, torch.zeros(rollout.mask.shape)[:, :1], PARAMS)
    with pytest.raises(InputError):
        run_update(policy, rollout, torch.zeros(rollout.mask.shape)[:, :-1])


@pytest.mark.parametrize("change", [{"rollouts": 7}, {"minibatch": 4}, {"temperature": 0.0}, {"updates": 0}])
def test_params_are_checked(change):
    with pytest.raises(InputError, match="ppo."):
        replace(PARAMS, **change)


# ---------------------------------------------------------------------------------------------------- update


def run_update(policy, rollout, rewards, params=PARAMS, optimizer=None, seed=0):
    optimizer = optimizer or ppo.make_optimizer(policy, params)
    generator = torch.Generator().manual_seed(seed)
    return ppo.update(policy, optimizer, rollout, rewards, params, policy.lm.config.pad_token_id, generator)


def current(policy, rollout):
    ids, whole = torch.cat([rollout.queries, rollout.responses], -1), torch.cat([rollout.query_mask, rollout.mask], -1)
    return logprobs_values_entropy(policy, ids, whole, rollout.mask, 1.0, policy.lm.config.pad_token_id)


@pytest.fixture
def fresh(policy, reference, reward_model, tokenizer):
    """A rollout of `policy` itself, with noise as rewards."""
    made = make_rollout(policy, reference, reward_model, tokenizer)
    noise = torch.randn(made.mask.shape, generator=torch.Generator().manual_seed(2))
    return made, noise.masked_fill(~made.mask, 0)


def test_the_ratio_is_one_on_the_first_pass(policy, fresh):
    logs = run_update(policy, *fresh)
    assert logs["first_ratio_error"] < 1e-5  # float32 sums in another order
    assert logs["clipped"] == 0 and abs(logs["step_kl"]) < 1e-6
    again = run_update(policy, *fresh)  # the policy has moved on
    assert again["first_ratio_error"] > 1e-3


def test_the_ratio_is_exactly_one_on_the_same_batch(policy, fresh):
    rollout, _ = fresh
    with torch.no_grad():
        assert torch.equal(current(policy, rollout)[0], rollout.logprobs)


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
    white = ppo.masked_whiten(advantages, rollout.mask)
    before = ppo.policy_loss(current(policy, rollout)[0], rollout.logprobs, white, rollout.mask, 0.2)[0].item()
    logs = run_update(policy, rollout, rewards, replace(PARAMS, lr=1e-3))
    after = ppo.policy_loss(current(policy, rollout)[0], rollout.logprobs, white, rollout.mask, 0.2)[0].item()
    assert logs["policy_loss"] == pytest.approx(before, abs=1e-5) and after < before - 1e-3


def test_eos_and_every_response_token_get_gradient_and_padding_none(rollout, policy):
    logprobs = current(policy, rollout)[0].detach().requires_grad_()
    advantages = torch.ones(rollout.mask.shape)
    ppo.policy_loss(logprobs, logprobs.detach(), advantages, rollout.mask, 0.2)[0].backward()
    assert torch.equal(logprobs.grad != 0, rollout.mask)


def test_a_rewarded_eos_becomes_likelier(policy, fresh):
    rollout, _ = fresh
    eos = rollout.mask & ~rollout.players
    before = current(policy, rollout)[0][eos].mean().item()
    run_update(policy, rollout, eos.float())
    assert current(policy, rollout)[0][eos].mean().item() > before + 0.01


def test_a_nan_reward_raises_and_leaves_the_policy_as_it_was(policy, fresh):
    rollout, rewards = fresh
    before, optimizer = copy.deepcopy(policy.state_dict()), ppo.make_optimizer(policy, PARAMS)
    bad = rewards.clone()
    bad[2, 0] = float("nan")
    with pytest.raises(InputError, match="not finite"):
        run_update(policy, rollout, bad, optimizer=optimizer)
    assert all(torch.equal(before[name], now) for name, now in policy.state_dict().items())
    run_update(policy, rollout, rewards, optimizer=optimizer)  # nothing of it stays in the gradients
    assert all(p.isfinite().all() for p in policy.parameters())


def test_only_the_last_layers_learn_where_asked(policy, fresh):
    partial = PolicyWithValue(copy.deepcopy(policy.lm), trainable_layers=1)
    before = copy.deepcopy(partial.state_dict())
    run_update(partial, *fresh)
    changed = {name for name, now in partial.state_dict().items() if not torch.equal(now, before[name])}
    assert changed and all("layers.1." in name or "value_head" in name for name in changed)
    for layers in (0, 3):
        with pytest.raises(InputError, match="trainable_layers"):
            PolicyWithValue(copy.deepcopy(policy.lm), trainable_layers=layers)


@pytest.mark.parametrize("dense", [False, True], ids=["sparse", "dense"])
def test_ppo_makes_a_rewarded_token_likelier(dense, policy, reference, reward_model, tokenizer):
    """A bandit: one reward for each 'good' token in a response, at the token or all at the end."""
    wanted = tokenizer(" was", add_special_tokens=False)["input_ids"][0]
    params = replace(PARAMS, lr=3e-3, kl_coef=0.0, epochs=2)
    optimizer, shares = ppo.make_optimizer(policy, params), []
    with torch.no_grad():
        policy.lm.lm_head.bias[wanted] = 3.0
    for step in range(25):
        rollout = make_rollout(policy, reference, reward_model, tokenizer, seed=step)
        rewards = ((rollout.responses == wanted) & rollout.mask).float()
        shares.append((rewards.sum() / rollout.mask.sum()).item())
        if not dense:
            last = F.one_hot(rollout.mask.sum(-1) - 1, rollout.mask.shape[1])
            rewards = last * rewards.sum(-1, keepdim=True)
        run_update(policy, rollout, rewards, params, optimizer, seed=step)
    assert sum(shares[-5:]) / 5 > sum(shares[:5]) / 5 + 0.2
