"""The inner loop: train a policy with one reward shape."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path

import pandas as pd
import torch

from dense_rlhf import ppo
from dense_rlhf.attribution import attribute
from dense_rlhf.config.params import AttributionParams, PPOParams
from dense_rlhf.files import content_key
from dense_rlhf.fingerprint import source_key
from dense_rlhf.models.policy import PolicyWithValue
from dense_rlhf.ppo.checkpoint import keep, resume, save_failure
from dense_rlhf.ppo.distributed import Alone
from dense_rlhf.ppo.learner import Learner
from dense_rlhf.ppo.rollout import response_texts
from dense_rlhf.ppo.sampling import prompt_batches
from dense_rlhf.ppo.warnings import Sign, diagnose
from dense_rlhf.shaping.rewards import shape_diagnostics, shape_rewards
from dense_rlhf.training.task import Task
from dense_rlhf.types import Prompt, RewardShape, Rollout

OTHERS = 1_000_000_007  # between the sampling seeds of two processes


@dataclass(frozen=True)
class TrainedPolicy:
    """A policy and the record of its training."""

    policy: PolicyWithValue
    history: pd.DataFrame  # metrics, a row an update
    seconds: pd.DataFrame  # wall time, a row an update: sample, explain, learn
    warnings: list[Sign] = field(default_factory=list)


def train_policy(
    task: Task,
    shape: RewardShape,
    params: PPOParams,
    attribution: AttributionParams,
    seed: int,
    progress: Callable = iter,
    watch: Callable[[dict], None] | None = None,
    folder: Path | None = None,
    processes: Alone | None = None,
    until: Callable[[list[dict]], bool] | None = None,
) -> TrainedPolicy:
    """Inner loop: sample, explain, shape, improve. Same arguments give the same history on one machine.

    `watch` is called with each row of metrics. A training that was cut short goes on from its checkpoint in `folder`,
    and one that meets a number that is not finite leaves its rollout there and raises `Diverged`. `until` is asked
    before every update, with the rows so far, whether to end there; where and why is no part of a checkpoint.
    """
    torch.manual_seed(seed)
    learner = ppo.make_learner(task.fresh_policy(), params, seed, processes)
    key = _training_key(task, shape, params, attribution, seed)
    history, seconds = resume(folder, key, learner)
    batches = islice(prompt_batches(task.data.train_prompts, params.rollouts, seed), len(history), None)
    for step in progress(range(len(history), params.updates)):
        if until and until(history):
            break
        try:
            row, took = _improve(task, learner, shape, params, attribution, next(batches), step, seed)
        except ppo.Diverged as error:
            raise save_failure(folder, step, error, learner.processes) from None
        history.append(row)
        seconds.append({"update": step} | took)
        signs = [sign for sign in diagnose(history) if sign.update == step]
        for sign in signs:
            warnings.warn(f"update {step}: {sign.text}", sign.kind, stacklevel=2)
        if watch:
            watch(row | took | {"warnings": ", ".join(sign.name for sign in signs)})
        if (step + 1) % params.checkpoint_every == 0 or step + 1 == params.updates:
            keep(folder, key, learner, history, seconds)
    policy = learner.processes.unwrap(learner.policy).eval()
    return TrainedPolicy(policy, pd.DataFrame(history), pd.DataFrame(seconds), diagnose(history))


def _training_key(task: Task, shape: RewardShape, params: PPOParams, attribution: AttributionParams, seed: int) -> str:
    """What decides a training: a checkpoint of another is not resumed."""
    return content_key(
        [asdict(shape), *_decisive(task, params, attribution), seed, source_key("dense_rlhf.training.inner_loop")]
    )


def _decisive(task: Task, params: PPOParams, attribution: AttributionParams) -> list:
    """What decides a training beside its shape, its seed and the code."""
    settings = [asdict(part) for part in (replace(params, checkpoint_every=1), attribution, task.policy)]
    proxy = task.reward_model.offset, task.reward_model.scale, str(task.reward_model.dtype)
    return [*settings, task.revisions, proxy, [str(prompt) for prompt in task.data.train_prompts]]


def _improve(
    task: Task,
    learner: Learner,
    shape: RewardShape,
    params: PPOParams,
    attribution: AttributionParams,
    prompts: Sequence[Prompt],
    step: int,
    seed: int,
) -> tuple[dict[str, float], dict[str, float]]:
    """One update on responses to `prompts`: its metrics, and the seconds that each part took."""
    together, clock = learner.processes, [time.perf_counter()]
    policy = together.unwrap(learner.policy)
    mine = task.roll(policy, together.share(prompts), params, seed * 100_003 + step + OTHERS * together.rank)
    clock.append(time.perf_counter())
    attributions = attribute(task.reward_model, mine, list(shape.weighted), attribution)
    shaped = shape_rewards(mine, attributions, shape)
    diagnostics = together.average(shape_diagnostics(mine, attributions, shape))
    clock.append(time.perf_counter())
    rollout, shaped = together.gather(mine, shaped)
    scaled, clipped = learner.scaled(shaped, rollout.scores, params)
    rewards = ppo.token_rewards(rollout, scaled, params, learner.kl_coef)
    losses = ppo.update(learner, rollout, rewards, params)
    clock.append(time.perf_counter())
    row = _measure(task, rollout, step) | losses | diagnostics
    row |= {"kl_coef": learner.kl_coef, "residual": (shaped.sum(-1) - rollout.scores).abs().max().item()}
    row |= {"rewards_clipped": clipped}
    learner.follow_kl(row["kl"], params)
    return row, {name: b - a for name, a, b in zip(("sample", "explain", "learn"), clock, clock[1:])}


def _measure(task: Task, rollout: Rollout, step: int) -> dict[str, float]:
    """Training metrics of one batch, before the update that it causes."""
    texts = response_texts(rollout, task.tokenizer)
    return {
        "update": step,
        "proxy": rollout.scores.mean().item(),
        "gold": sum(map(task.gold.score, texts)) / len(texts),
        "kl": ppo.sequence_kl(rollout).mean().item(),
        "length": rollout.mask.sum(-1).float().mean().item(),
    }
