"""Rewards, advantages and losses of PPO as pure functions on (B, T) tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from dense_rlhf.config.params import PPOParams
from dense_rlhf.shaping.masked import masked_mean, masked_sum, masked_var, masked_whiten
from dense_rlhf.types import InputError, Rollout

# ---------------------------------------------------------------------------------------------------- rewards


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, estimator: str = "k1") -> Tensor:
    """KL(policy || reference) of each sampled token, nats, in the shape of `logprobs` (Schulman, 2020).

    With d = log pi(y_t) - log pi_ref(y_t): k1 = d is unbiased, k2 = d^2 / 2 is biased and of low variance,
    k3 = exp(-d) - 1 + d is unbiased and never negative. As a penalty in the reward only k1 has the KL's gradient.
    """
    d = logprobs - ref_logprobs
    return {"k1": lambda: d, "k2": lambda: d.square() / 2, "k3": lambda: torch.expm1(-d) + d}[estimator]()


def token_rewards(
    rollout: Rollout, shaped: Tensor, params: PPOParams, kl_coef: float | None = None, unit: float = 1.0
) -> Tensor:
    """What the policy is paid for each token, (B, T) in score units: all that is done to shaped rewards (B, T).

    r_t = clip(shaped_t / unit) - kl_coef * (log pi - log pi_ref)(y_t) - missing_eos_penalty [t is last, no EOS]

    in this order: `unit` is the sd of the scores so far, `clip_rewards` the bound (Engstrom et al., 2020); the penalty
    (Ziegler et al., 2019, eq. 2) is `params.kl_estimator`, by default at `params.kl_coef`; then the fine for a response
    without EOS (Huang et al., 2024). Last, `whiten_rewards` divides the deviations from the batch's mean by their sd.
    Zero outside the mask. Raises `InputError` as `check_rewards` does.
    """
    check_rewards(shaped, rollout.mask)
    kl = kl_estimate(rollout.logprobs, rollout.ref_logprobs, params.kl_estimator)
    rewards = clipped(shaped / unit, params.clip_rewards) - (params.kl_coef if kl_coef is None else kl_coef) * kl
    if params.missing_eos_penalty:
        last = rollout.mask.sum(-1) - 1
        rows = torch.arange(len(last), device=last.device)
        rewards[rows, last] -= params.missing_eos_penalty * (~rollout.ended).to(rewards.dtype)
    if params.whiten_rewards:
        rewards = masked_whiten(rewards, rollout.mask) + masked_mean(rewards, rollout.mask)
    return rewards.masked_fill(~rollout.mask, 0)


def check_rewards(rewards: Tensor, mask: Tensor) -> None:
    """Raise `InputError` unless `rewards` are a tensor of floating-point numbers, one for each token of `mask`."""
    if not isinstance(rewards, Tensor) or not rewards.is_floating_point():
        kind = rewards.dtype if isinstance(rewards, Tensor) else type(rewards).__name__
        raise InputError(
            f"rewards are {kind}, wanted a floating-point tensor (B, T); convert them with torch.as_tensor"
        )
    if rewards.shape != mask.shape:
        raise InputError(f"rewards are {tuple(rewards.shape)}, responses {tuple(mask.shape)}")


def clipped(rewards: Tensor, limit: float | None) -> Tensor:
    """Rewards between plus and minus `limit`; the same where it is None."""
    return rewards if limit is None else rewards.clamp(-limit, limit)


def sequence_kl(rollout: Rollout) -> Tensor:
    """Estimate (B,) of KL(policy || reference) for each response, nats: sum of log pi - log pi_ref (k1)."""
    return masked_sum(kl_estimate(rollout.logprobs, rollout.ref_logprobs), rollout.mask, -1)


# ---------------------------------------------------------------------------------------------------- losses


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    """Generalised advantage estimates (B, T), zero outside the mask (Schulman et al., 2016, eq. 16).

    A_t = sum_{l >= 0} (gamma lam)^l delta_{t+l},  delta_t = r_t + gamma V_{t+1} - V_t,  V = 0 after the last token.
    Raises `InputError` for shapes that differ, and as `check_rewards` does.
    """
    check_rewards(rewards, mask)
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
    """The negative clipped surrogate, summed over tokens, and the number of tokens where the clip binds.

    -sum_t min(rho_t A_t, clip(rho_t, 1 - clip, 1 + clip) A_t),  rho_t = pi(y_t) / pi_old(y_t): Schulman et al. (2017),
    eq. 7. All arguments are (B, T); `logprobs` and `old` are nats.
    """
    ratio = torch.exp(logprobs - old)
    plain, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)
    return masked_sum(torch.maximum(plain, clipped), mask), ((clipped > plain) & mask).sum()


def value_loss(values: Tensor, old: Tensor, returns: Tensor, mask: Tensor, clip: float) -> Tensor:
    """Half the squared error of the critic, summed over tokens, where a step beyond `old` +- clip gains nothing.

    1/2 sum_t max((V_t - R_t)^2, (V_old,t + clip(V_t - V_old,t, -clip, clip) - R_t)^2), R = `returns`, all (B, T) in
    score units (Engstrom et al., 2020, section 3).
    """
    clipped = old + (values - old).clamp(-clip, clip)
    return 0.5 * masked_sum(torch.maximum((values - returns).square(), (clipped - returns).square()), mask)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 - Var(returns - values) / Var(returns); NaN where the returns do not vary."""
    spread = masked_var(returns, mask)
    return (1 - masked_var(returns - values, mask) / spread).item() if spread > 0 else float("nan")
