"""PPO with per-token rewards (Schulman et al., 2017; the RLHF details of Huang et al., 2024).

Index t of (B, T) tensors is the act of emitting response token t. The pure functions are in `ppo.losses`.
`Learner.pay` turns shaped rewards into what the policy is paid; `update` learns from it.
Departures from TRL's PPO: the score lands on the last token and not after it; losses are means over the tokens of
the mini-batch, not of micro-batches; every mini-batch is an optimiser step; gradients are clipped; EOS is trained.
"""

from __future__ import annotations

import ctypes
import math
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dense_rlhf.config.params import PPOParams
from dense_rlhf.models.language_models import within_memory
from dense_rlhf.models.policy import PolicyWithValue, micro_batches
from dense_rlhf.ppo.distributed import Alone
from dense_rlhf.ppo.losses import (
    check_rewards,
    clipped,
    explained_variance,
    gae,
    kl_estimate,
    policy_loss,
    token_rewards,
    value_loss,
)
from dense_rlhf.shaping.masked import masked_mean, masked_sum, masked_whiten
from dense_rlhf.types import InputError, Rollout


class Diverged(InputError):
    """Training met a number that is not finite: `metrics` of the offending step, and the `rollout` it was on."""

    def __init__(self, metrics: dict[str, float], rollout: Rollout, text: str = ""):
        self.metrics, self.rollout = metrics, rollout
        bad = ", ".join(name for name, value in metrics.items() if not math.isfinite(value))
        super().__init__(text or f"PPO met a number that is not finite: {bad}; lower ppo.lr or look at the rewards")


@dataclass
class Learner:
    """A policy in training, with the state that decides its next update."""

    policy: PolicyWithValue
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    generator: torch.Generator  # of the order of responses in mini-batches
    kl_coef: float
    moments: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])  # of all scores: number, mean, squares
    processes: Alone = field(default_factory=Alone)

    def pay(
        self, rollout: Rollout, shaped: Tensor, params: PPOParams, kl_in_loss: bool = False
    ) -> tuple[Tensor, dict[str, float]]:
        """`token_rewards` (B, T) of shaped ones at the current unit and KL coefficient; no penalty if the loss has it.

        Also what is logged: the coefficient, the largest |sum of shaped rewards - score|, the share clipped.
        """
        check_rewards(shaped, rollout.mask)
        unit = self.unit(rollout.scores, params)
        rewards = token_rewards(rollout, shaped, params, 0.0 if kl_in_loss else self.kl_coef, unit)
        residual = (shaped.sum(-1) - rollout.scores).abs().max().item()
        whole = shaped / unit
        cut = clipped(whole, params.clip_rewards) != whole
        share = (cut.sum() / (whole != 0).sum().clamp(min=1)).item()
        return rewards, {"kl_coef": self.kl_coef, "residual": residual, "rewards_clipped": share}

    def unit(self, scores: Tensor, params: PPOParams) -> float:
        """With `scale_rewards` the sd of all scores so far, these (N,) included; 1 without, or without any spread.

        Running mean and squares after Chan et al. (1983).
        """
        if not params.scale_rewards:
            return 1.0
        n, mean, squares = self.moments
        new, precise = len(scores), scores.double()
        delta, total = precise.mean().item() - mean, n + new
        squares += precise.var(correction=0).item() * new + delta**2 * n * new / total
        self.moments = [total, mean + delta * new / total, squares]
        return math.sqrt(squares / (total - 1)) if squares > 0 else 1.0

    def follow_kl(self, kl: float, params: PPOParams) -> None:
        """Move `kl_coef` towards the KL (nats a response) that `params` wants (Ziegler et al., 2019)."""
        if params.kl_target is not None:
            error = min(max(kl / params.kl_target - 1, -0.2), 0.2)
            self.kl_coef *= 1 + error * params.rollouts / params.kl_horizon


def keep_freed_memory() -> None:
    """Let this process reuse memory that it has freed: new pages, which Linux clears first, are 5 % of an update.

    Blocks up to 32 MiB, by glibc's mallopt; elsewhere nothing changes.
    """
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        for threshold, value in ((-3, 2**25), (-1, 2**31 - 1)):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
            mallopt(threshold, value)


def make_learner(policy: PolicyWithValue, params: PPOParams, seed: int, processes: Alone | None = None) -> Learner:
    """AdamW without decay on everything that learns, its rate falling linearly; the value head has its own rate."""
    keep_freed_memory()
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
    """A rollout with the targets of the losses."""

    advantages: Tensor  # (B, T), whitened
    returns: Tensor  # (B, T) score units


@within_memory("the policy learns", "ppo.micro_batch")
def update(learner: Learner, rollout: Rollout, rewards: Tensor, params: PPOParams) -> dict[str, float]:
    """Improve the policy in place on one rollout with per-token rewards (B, T); returns the metrics of the update.

    Advantages are whitened over the batch. A reward, loss or gradient that is not finite raises `Diverged` before it
    reaches a weight. Every process holds the whole rollout and computes its share of each mini-batch.
    """
    check_rewards(rewards, rollout.mask)
    if not rewards.isfinite().all():
        raise Diverged({"reward": rewards.sum().item()}, rollout)
    advantages = gae(rewards, rollout.values, rollout.mask, params.gamma, params.lam)
    returns, white = advantages + rollout.values, masked_whiten(advantages, rollout.mask)
    batch, logs = Batch(**rollout.tensors(), advantages=white, returns=returns), []
    for _ in range(params.epochs):
        for rows in torch.randperm(len(rewards), generator=learner.generator).split(params.minibatch):
            logs.append(_step(learner, batch, rows.to(rewards.device), params))
    learner.schedule.step()
    means = {name: sum(log[name] for log in logs) / len(logs) for name in logs[0]}
    explained = explained_variance(rollout.values, returns, rollout.mask)
    means |= {"first_ratio_error": logs[0]["ratio_error"], "explained_variance": explained}
    to_go = gae(rewards, torch.zeros_like(rewards), rollout.mask, 1.0, 1.0)  # no bootstrap, which flatters a bad critic
    means["value_error_mc"] = masked_mean((rollout.values - to_go).square(), rollout.mask).item()
    return means | {"explained_variance_mc": explained_variance(rollout.values, to_go, rollout.mask)}


SUMMED = ("policy_loss", "value_loss", "clipped", "entropy", "step_kl")


def _step(learner: Learner, batch: Batch, rows: Tensor, params: PPOParams) -> dict[str, float]:
    """One optimiser step on the responses `rows`: each loss is a mean over all their tokens, in all processes."""
    mine, tokens, logs = learner.processes.share(rows), batch.mask[rows].sum(), []
    waiting = len(mine)
    for part, micro in micro_batches(batch, mine, params.micro_batch):
        loss, log = _losses(learner.policy, micro, params)
        waiting -= len(part)
        learner.processes.backward(learner.policy, loss / tokens, last=not waiting)
        logs.append(log)
    norm = learner.processes.clip(learner.policy, learner.optimizer, params.max_grad_norm)
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
    """The loss of a micro-batch, summed over tokens, and its log: the largest |ratio - 1|, then sums of `SUMMED`."""
    mask, old = batch.mask, batch.logprobs
    logprobs, values, entropy = policy(batch, params.temperature)
    pg, bound = policy_loss(logprobs, old, batch.advantages, mask, params.clip)
    vf = value_loss(values, batch.values, batch.returns, mask, params.value_clip)
    with torch.no_grad():
        step_kl = masked_sum(kl_estimate(old, logprobs, "k3"), mask)
        error = torch.expm1(logprobs - old).masked_fill(~mask, 0).abs().max()
        log = torch.stack([error, pg, vf, bound.to(pg.dtype), masked_sum(entropy, mask), step_kl])
    return pg + params.value_coef * vf, log
