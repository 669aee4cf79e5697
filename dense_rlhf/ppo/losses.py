"""Rewards, advantages and losses of PPO as pure functions on (B, T) tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from dense_rlhf.config.params import PPOParams
from dense_rlhf.masked import masked_mean, masked_sum, masked_var, masked_whiten
from dense_rlhf.types import InputError, Rollout

# ---------------------------------------------------------------------------------------------------- rewards


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, estimator: str = "k1") -> Tensor:
    """KL(policy || reference) of each sampled token, nats, same shape (Schulman, 2020).

    With d = log pi - log pi_ref: k1 = d is unbiased, k2 = d^2 / 2 is biased and varies little, k3 = exp(-d) - 1 + d
    is unbiased and never negative. As a penalty in the reward only k1 has the gradient of the KL.
    """
    d = logprobs - ref_logprobs
    return {"k1": lambda: d, "k2": lambda: d.square() / 2, "k3": lambda: torch.expm1(-d) + d}[estimator]()


def token_rewards(
    rollout: Rollout, shaped: Tensor, params: PPOParams, kl_coef: float | None = None, unit: float = 1.0
) -> Tensor:
    """What the policy is paid for each token, (B, T): all that is done to shaped rewards (B, T), in this order.

    1. divided by `unit`, the running sd of the scores, and clipped to +-`clip_rewards` (Engstrom et al., 2020);
    2. minus `kl_coef`, by default `params.kl_coef`, times `kl_estimate` (Ziegler et al., 2019, eq. 2);
    3. minus `missing_eos_penalty` on the last token of a response without EOS (Huang et al., 2024);
    4. with `whiten_rewards` centred and divided by their sd over the batch, then their mean is added again.

    Raises `InputError` for rewards of another shape than the responses.
    """
    if shaped.shape != rollout.mask.shape:
        raise InputError(f"rewards are {tuple(shaped.shape)}, responses {tuple(rollout.mask.shape)}")
    kl = kl_estimate(rollout.logprobs, rollout.ref_logprobs, params.kl_estimator)
    rewards = clipped(shaped / unit, params.clip_rewards) - (params.kl_coef if kl_coef is None else kl_coef) * kl
    if params.missing_eos_penalty:
        last = rollout.mask.sum(-1) - 1
        rows = torch.arange(len(last), device=last.device)
        rewards[rows, last] -= params.missing_eos_penalty * (~rollout.ended).to(rewards.dtype)
    if params.whiten_rewards:
        rewards = masked_whiten(rewards, rollout.mask) + masked_mean(rewards, rollout.mask)
    return rewards.masked_fill(~rollout.mask, 0)


def clipped(rewards: Tensor, limit: float | None) -> Tensor:
    """Rewards between plus and minus `limit`; the same where it is None."""
    return rewards if limit is None else rewards.clamp(-limit, limit)


def sequence_kl(rollout: Rollout) -> Tensor:
    """Estimate (B,) of KL(policy || reference) for each response, nats: sum of log pi - log pi_ref (k1)."""
    return masked_sum(kl_estimate(rollout.logprobs, rollout.ref_logprobs), rollout.mask, -1)


# ---------------------------------------------------------------------------------------------------- losses


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    """Generalised advantage estimates (B, T) (Schulman et al., 2016), zero outside the mask.

    A_t = sum_l (gamma lam)^l (r_{t+l} + gamma V_{t+l+1} - V_{t+l}), with V = 0 after the last token.
    """
    if not rewards.shape == values.shape == mask.shape:
        shapes = ", ".join(str(tuple(x.shape)) for x in (rewards, values, mask))
        raise InputError(f"rewards, values and mask have shapes {shapes}; wanted the same")
    values = values.masked_fill(~mask, 0)
    advantages, carried = torch.zeros_like(rewards), torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        after = values[:, t + 1] if t + 1 < rewards.shape[1] else torch.zeros_like(carried)
        delta = rewards[:, t] + gamma * after - values[:, t]
        carried = torch.where(mask[:, t], delta + gamma * lam * carried, 0)
        advantages[:, t] = carried
    return advantages


def policy_loss(logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """Clipped surrogate, summed over tokens, and the number of tokens where the clip binds."""
    ratio = torch.exp(logprobs - old)
    plain, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)
    return masked_sum(torch.maximum(plain, clipped), mask), ((clipped > plain) & mask).sum()


def value_loss(values: Tensor, old: Tensor, returns: Tensor, mask: Tensor, clip: float) -> Tensor:
    """Half the squared error, summed over tokens, the worse of plain and clipped to `old` +- clip."""
    clipped = old + (values - old).clamp(-clip, clip)
    return 0.5 * masked_sum(torch.maximum((values - returns).square(), (clipped - returns).square()), mask)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 - Var(returns - values) / Var(returns); NaN where the returns do not vary."""
    spread = masked_var(returns, mask)
    return (1 - masked_var(returns - values, mask) / spread).item() if spread > 0 else float("nan")
