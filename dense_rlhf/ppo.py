"""PPO with per-token rewards (Schulman et al., 2017; the RLHF details of Huang et al., 2024).

Pure functions on (B, T) tensors, then `Learner` and `update`. Index t is the act of emitting response token t.
The per-token reward enters in `token_rewards`: one shaped reward a token, less the KL penalty.
Departures from TRL's PPO: the score lands on the last token and not behind it; losses are means over the tokens of
the mini-batch, not of micro-batches; every mini-batch is an optimiser step; gradients are clipped; EOS is trained.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dense_rlhf.masked import masked_mean, masked_sum, masked_var, masked_whiten
from dense_rlhf.models import within_memory
from dense_rlhf.params import PPOParams
from dense_rlhf.policy import PolicyWithValue, micro_batches
from dense_rlhf.processes import Alone
from dense_rlhf.types import InputError, Rollout

# ---------------------------------------------------------------------------------------------------- rewards


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, estimator: str = "k1") -> Tensor:
    """KL(policy || reference) of each sampled token, nats, same shape (Schulman, 2020).

    With d = log pi - log pi_ref: k1 = d is unbiased, k2 = d^2 / 2 is biased and varies little, k3 = exp(-d) - 1 + d
    is unbiased and never negative. As a penalty in the reward only k1 has the gradient of the KL.
    """
    d = logprobs - ref_logprobs
    return {"k1": lambda: d, "k2": lambda: d.square() / 2, "k3": lambda: torch.expm1(-d) + d}[estimator]()


def token_rewards(rollout: Rollout, shaped: Tensor, params: PPOParams, kl_coef: float | None = None) -> Tensor:
    """Shaped rewards (B, T) minus `kl_coef` times the KL of every token, minus a penalty where EOS is missing.

    `params.kl_coef` where no other is given. Raises `InputError` for rewards of another shape than the responses.
    """
    if shaped.shape != rollout.mask.shape:
        raise InputError(f"rewards are {tuple(shaped.shape)}, responses {tuple(rollout.mask.shape)}")
    kl = kl_estimate(rollout.logprobs, rollout.ref_logprobs, params.kl_estimator)
    rewards = shaped - (params.kl_coef if kl_coef is None else kl_coef) * kl
    if params.missing_eos_penalty:
        last = rollout.mask.sum(-1) - 1
        rows = torch.arange(len(last), device=last.device)
        rewards[rows, last] -= params.missing_eos_penalty * (~rollout.ended).to(rewards.dtype)
    if params.whiten_rewards:
        rewards = masked_whiten(rewards, rollout.mask) + masked_mean(rewards, rollout.mask)
    return rewards.masked_fill(~rollout.mask, 0)


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


# ---------------------------------------------------------------------------------------------------- learning


class Diverged(InputError):
    """Training met a number that is not finite: `metrics` of the offending step, and the `rollout` it was on."""

    def __init__(self, metrics: dict[str, float], rollout: Rollout, text: str = ""):
        self.metrics, self.rollout = metrics, rollout
        bad = ", ".join(name for name, value in metrics.items() if not math.isfinite(value))
        super().__init__(text or f"PPO met a number that is not finite: {bad}; lower ppo.lr or look at the rewards")


@dataclass
class Learner:
    """A policy in training, with all that decides what its next update does."""

    policy: PolicyWithValue
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    generator: torch.Generator  # of the order of responses in mini-batches
    kl_coef: float
    moments: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])  # of all scores: number, mean, squares
    processes: Alone = field(default_factory=Alone)

    def scaled(self, shaped: Tensor, scores: Tensor, params: PPOParams) -> tuple[Tensor, float]:
        """Shaped rewards (B, T) over the running sd of all scores (N,) so far, clipped; and the share clipped.

        Both only where `params` asks (Engstrom et al., 2020). Running mean and squares after Chan et al. (1983).
        """
        if params.scale_rewards:
            n, mean, squares = self.moments
            new, its = len(scores), scores.double()
            delta, total = its.mean().item() - mean, n + new
            squares += its.var(correction=0).item() * new + delta**2 * n * new / total
            self.moments = [total, mean + delta * new / total, squares]
            if squares > 0:
                shaped = shaped / math.sqrt(squares / (total - 1))
        if params.clip_rewards is None:
            return shaped, 0.0
        clipped = shaped.clamp(-params.clip_rewards, params.clip_rewards)
        return clipped, ((clipped != shaped).sum() / (shaped != 0).sum().clamp(min=1)).item()

    def follow_kl(self, kl: float, params: PPOParams) -> None:
        """Move `kl_coef` towards the KL (nats a response) that `params` wants (Ziegler et al., 2019)."""
        if params.kl_target is not None:
            error = min(max(kl / params.kl_target - 1, -0.2), 0.2)
            self.kl_coef *= 1 + error * params.rollouts / params.kl_horizon


def make_learner(policy: PolicyWithValue, params: PPOParams, seed: int, processes: Alone | None = None) -> Learner:
    """AdamW without decay on everything that learns, its rate falling linearly; the value head has its own rate."""
    trunk = [p for name, p in policy.named_parameters() if p.requires_grad and "value_head" not in name]
    groups = [{"params": trunk, "lr": params.lr}, {"params": policy.value_head.parameters(), "lr": params.value_lr}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-5, weight_decay=0, fused=True)
    processes = processes or Alone()
    policy, optimizer = processes.prepare(policy, optimizer)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, params.updates)
    generator = torch.Generator().manual_seed(seed)
    return Learner(policy, optimizer, schedule, generator, params.kl_coef, processes=processes)


@dataclass(frozen=True)
class Batch(Rollout):
    """A rollout with what the losses want."""

    advantages: Tensor  # (B, T), whitened
    returns: Tensor  # (B, T) score units


@within_memory("the policy learns", "ppo.micro_batch")
def update(learner: Learner, rollout: Rollout, rewards: Tensor, params: PPOParams) -> dict[str, float]:
    """Improve the policy in place on one rollout with per-token rewards (B, T), and say how it went.

    Advantages are whitened over the batch. A reward, loss or gradient that is not finite raises `Diverged` before it
    reaches a weight. Every process holds the whole rollout and computes its share of each mini-batch.
    """
    if not rewards.isfinite().all():
        raise Diverged({"reward": rewards.sum().item()}, rollout)
    advantages = gae(rewards, rollout.values, rollout.mask, params.gamma, params.lam)
    returns, white = advantages + rollout.values, masked_whiten(advantages, rollout.mask)
    batch, logs = Batch(**rollout.tensors(), advantages=white, returns=returns), []
    for _ in range(params.epochs):
        for rows in torch.randperm(len(rewards), generator=learner.generator).split(params.minibatch):
            logs.append(_step(learner, batch, rows.to(rewards.device), params))
    learner.schedule.step()
    found = {name: sum(log[name] for log in logs) / len(logs) for name in logs[0]}
    found["first_ratio_error"] = logs[0]["ratio_error"]
    found["explained_variance"] = explained_variance(rollout.values, returns, rollout.mask)
    return found


SUMMED = ("policy_loss", "value_loss", "clipped", "entropy", "step_kl")


def _step(learner: Learner, batch: Batch, rows: Tensor, params: PPOParams) -> dict[str, float]:
    """One optimiser step on the responses `rows`: each loss is a mean over all their tokens, in all processes."""
    mine, tokens, logs = learner.processes.share(rows), batch.mask[rows].sum(), []
    left = len(mine)
    for part, micro in micro_batches(batch, mine, params.micro_batch):
        loss, log = _losses(learner.policy, micro, params)
        left -= len(part)
        learner.processes.backward(learner, loss / tokens, last=left == 0)
        logs.append(log)
    norm = learner.processes.clip(learner, params.max_grad_norm)
    largest, *sums = learner.processes.total(torch.stack(logs)).tolist()
    log = {name: value / tokens.item() for name, value in zip(SUMMED, sums)}
    log |= {"ratio_error": largest, "grad_norm": float(norm)}
    if not all(map(math.isfinite, log.values())):
        learner.optimizer.zero_grad()
        raise Diverged(log, batch)
    learner.optimizer.step()
    learner.optimizer.zero_grad()
    return log


def _losses(policy: PolicyWithValue, batch: Batch, params: PPOParams) -> tuple[Tensor, Tensor]:
    """The summed loss of a micro-batch, and what is logged of it: the largest |ratio - 1|, then sums of `SUMMED`."""
    mask, old = batch.mask, batch.logprobs
    logprobs, values, entropy = policy(batch, params.temperature)
    pg, clipped = policy_loss(logprobs, old, batch.advantages, mask, params.clip)
    vf = value_loss(values, batch.values, batch.returns, mask, params.value_clip)
    with torch.no_grad():
        step_kl = masked_sum(kl_estimate(old, logprobs, "k3"), mask)
        error = torch.expm1(logprobs - old).masked_fill(~mask, 0).abs().max()
        log = torch.stack([error, pg, vf, clipped.to(pg.dtype), masked_sum(entropy, mask), step_kl])
    return pg + params.value_coef * vf, log
