"""PPO with per-token rewards (Schulman et al., 2017; the RLHF details of Huang et al., 2024).

Pure functions on (B, T) tensors, and `update`. Index t is the act of emitting response token t.
Departures from TRL's PPO: the score lands on the last token and not behind it; losses are means over the tokens of
the mini-batch, not of micro-batches; every mini-batch is an optimiser step; gradients are clipped.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dense_rlhf.masked import masked_mean, masked_sum, masked_var, masked_whiten
from dense_rlhf.models import PolicyWithValue, logprobs_values_entropy
from dense_rlhf.params import PPOParams
from dense_rlhf.types import InputError, Rollout


def token_rewards(rollout: Rollout, shaped: Tensor, params: PPOParams) -> Tensor:
    """Shaped reward, minus kl_coef * (log pi - log pi_ref) on every token, minus a penalty where EOS is missing."""
    if shaped.shape != rollout.mask.shape:
        raise InputError(f"rewards are {tuple(shaped.shape)}, responses {tuple(rollout.mask.shape)}")
    rewards = shaped - params.kl_coef * (rollout.logprobs - rollout.ref_logprobs)
    if params.missing_eos_penalty:
        last = rollout.mask.sum(-1) - 1
        rows = torch.arange(len(last), device=last.device)
        rewards[rows, last] -= params.missing_eos_penalty * (~rollout.ended).to(rewards.dtype)
    if params.whiten_rewards:
        mean = masked_mean(rewards, rollout.mask)
        rewards = masked_whiten(rewards, rollout.mask) + mean
    return rewards.masked_fill(~rollout.mask, 0)


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
    """Clipped surrogate, mean over tokens, and the share of tokens where the clip binds."""
    ratio = torch.exp(logprobs - old)
    plain, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)
    return masked_mean(torch.maximum(plain, clipped), mask), masked_mean((clipped > plain).float(), mask)


def value_loss(values: Tensor, old: Tensor, returns: Tensor, mask: Tensor, clip: float) -> Tensor:
    """Half the squared error, mean over tokens, the worse of plain and clipped to `old` +- clip."""
    clipped = old + (values - old).clamp(-clip, clip)
    return 0.5 * masked_mean(torch.maximum((values - returns).square(), (clipped - returns).square()), mask)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 - Var(returns - values) / Var(returns); NaN where the returns do not vary."""
    spread = masked_var(returns, mask)
    return (1 - masked_var(returns - values, mask) / spread).item() if spread > 0 else float("nan")


def make_optimizer(policy: PolicyWithValue, params: PPOParams) -> torch.optim.Optimizer:
    """AdamW without decay on everything that learns; the value head, which starts from zero, has its own rate."""
    trunk = [p for p in policy.lm.parameters() if p.requires_grad]
    groups = [{"params": trunk, "lr": params.lr}, {"params": policy.value_head.parameters(), "lr": params.value_lr}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-5, weight_decay=0)


def update(
    policy: PolicyWithValue, optimizer: torch.optim.Optimizer, rollout: Rollout, rewards: Tensor, params: PPOParams,
    pad_id: int, generator: torch.Generator,
) -> dict[str, float]:  # fmt: skip
    """Improve `policy` in place on one rollout with per-token rewards (B, T), and say how it went.

    Advantages are whitened over the batch. A loss or gradient that is not finite raises `InputError` before the step.
    """
    advantages = gae(rewards, rollout.values, rollout.mask, params.gamma, params.lam)
    returns = advantages + rollout.values
    white = masked_whiten(advantages, rollout.mask)
    ids = torch.cat([rollout.queries, rollout.responses], -1)
    whole = torch.cat([rollout.query_mask, rollout.mask], -1)
    logs = []
    for _ in range(params.epochs):
        for rows in torch.randperm(len(ids), generator=generator).to(ids.device).split(params.minibatch):
            logs.append(_step(policy, optimizer, rollout, ids, whole, white, returns, rows, params, pad_id))
    mean = {name: sum(log[name] for log in logs) / len(logs) for name in logs[0]}
    mean["first_ratio_error"] = logs[0]["ratio_error"]
    mean["explained_variance"] = explained_variance(rollout.values, returns, rollout.mask)
    return mean


def _step(policy, optimizer, rollout, ids, whole, advantages, returns, rows, params, pad_id) -> dict[str, float]:
    """One optimiser step on the responses `rows`, accumulated over micro-batches, token-normalised."""
    tokens, logs = rollout.mask[rows].sum(), {}
    for micro in rows.split(params.micro_batch):
        mask, old = rollout.mask[micro], rollout.logprobs[micro]
        logprobs, values, entropy = logprobs_values_entropy(
            policy, ids[micro], whole[micro], mask, params.temperature, pad_id
        )
        share = mask.sum() / tokens
        pg, clipped = policy_loss(logprobs, old, advantages[micro], mask, params.clip)
        vf = value_loss(values, rollout.values[micro], returns[micro], mask, params.value_clip)
        ((pg + params.value_coef * vf) * share).backward()
        with torch.no_grad():
            now = {
                "policy_loss": pg, "value_loss": vf, "clipped": clipped, "entropy": masked_mean(entropy, mask),
                "step_kl": masked_mean((logprobs - old).exp() - 1 - (logprobs - old), mask),
            }  # fmt: skip
            error = ((logprobs - old).exp() - 1).masked_fill(~mask, 0).abs().max().item()
        logs["ratio_error"] = max(logs.get("ratio_error", 0.0), error)
        for name, value in now.items():
            logs[name] = logs.get(name, 0.0) + (value * share).item()
    logs["grad_norm"] = torch.nn.utils.clip_grad_norm_(policy.parameters(), params.max_grad_norm).item()
    if not all(map(math.isfinite, logs.values())):
        optimizer.zero_grad()
        raise InputError(f"PPO met a number that is not finite: {logs}; lower ppo.lr or look at the rewards")
    optimizer.step()
    optimizer.zero_grad()
    return logs


def sequence_kl(rollout: Rollout) -> Tensor:
    """Estimate (B,) of KL(policy || reference) for each response, nats: sum of log pi - log pi_ref (k1)."""
    return masked_sum(rollout.logprobs - rollout.ref_logprobs, rollout.mask, -1)
