"""The two loops: `train_policy` teaches a policy with one reward shape, `search_shape` learns the shape's weights."""

from __future__ import annotations

import copy
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pandas as pd
import torch

from dense_rlhf import ppo
from dense_rlhf.additive import AdditiveJudge, load_gold_judge, load_lexicon
from dense_rlhf.attribution import attribute
from dense_rlhf.bayesopt import SimplexSearch
from dense_rlhf.data import Dataset, load_data
from dense_rlhf.implicit import load_implicit
from dense_rlhf.judge import win_rate
from dense_rlhf.models import LanguageModel, PolicyWithValue, default_device, load_policy
from dense_rlhf.params import AttributionParams, BOParams, DataParams, PolicyParams, PPOParams, RewardParams
from dense_rlhf.reward_model import RewardModel
from dense_rlhf.rewards import load_reward_model
from dense_rlhf.rollout import Responses, appraise, prompt_batches, respond, response_texts
from dense_rlhf.shaping import shape_diagnostics, shape_rewards
from dense_rlhf.store import content_key
from dense_rlhf.types import InputError, Prompt, RewardShape, Rollout

CALIBRATION_BATCHES = 4  # of rollouts by the reference; they set the zero and the unit of the score


@dataclass(frozen=True)
class Task:
    """All that stays fixed while policies are trained: data, reference policy, reward model, judges."""

    data: Dataset
    language_model: LanguageModel
    reference: PolicyWithValue
    reward_model: RewardModel
    gold: AdditiveJudge
    lexicon: AdditiveJudge
    policy: PolicyParams

    @property
    def tokenizer(self):
        return self.language_model.tokenizer

    @property
    def revisions(self) -> dict[str, str]:
        """What was read: hashes or commits of data and policy."""
        return {"data": self.data.revision, "policy": self.language_model.revision}

    def fresh_policy(self) -> PolicyWithValue:
        """A trainable copy of the reference, in float32."""
        lm = copy.deepcopy(self.language_model.model).float().requires_grad_(True)
        return PolicyWithValue(lm, self.policy.trainable_layers).to(default_device())

    def respond(self, policy: PolicyWithValue, prompts: Sequence[Prompt], params: PPOParams, seed: int) -> Responses:
        """One scored response to each prompt, sampled with `seed`."""
        generator = torch.Generator(default_device()).manual_seed(seed)
        return respond(policy, self.reward_model, prompts, self.tokenizer, params.max_new_tokens, params.temperature,
                       generator)  # fmt: skip

    def roll(self, policy: PolicyWithValue, prompts: Sequence[Prompt], params: PPOParams, seed: int) -> Rollout:
        """One batch of responses to `prompts`, sampled with `seed`."""
        responses = self.respond(policy, prompts, params, seed)
        return appraise(policy, self.reference, responses, params.temperature, self.tokenizer.pad_token_id,
                        params.micro_batch)  # fmt: skip


def load_task(
    data: DataParams, policy: PolicyParams, reward: RewardParams, params: PPOParams, progress: Callable = iter
) -> Task:
    """Read the data, load the policy, train or find the proxy reward model, centre it on the reference's responses.

    Where `reward.dpo_steps` asks for it, train or find the policy whose log-ratio is the source `log_ratio`.
    """
    dataset, language_model = load_data(data), load_policy(policy)
    reference = PolicyWithValue(language_model.model.requires_grad_(False)).to(default_device()).eval()
    reward_model = load_reward_model(dataset.reward, language_model.tokenizer, reward, dataset.revision,
                                     progress=progress)  # fmt: skip
    reward_model.model.to(default_device())
    gold = load_gold_judge(dataset.gold, dataset.revision)
    task = Task(dataset, language_model, reference, reward_model, gold, load_lexicon(), policy)
    batches = range(0, CALIBRATION_BATCHES * params.rollouts, params.rollouts)
    scores = torch.cat([task.respond(reference, dataset.train_prompts[i : i + params.rollouts], params, seed=i).scores
                        for i in batches])  # fmt: skip
    reward_model = reward_model.calibrated(scores)
    if reward.dpo_steps:
        reward_model = replace(reward_model, implicit=load_implicit(
            reference, reward_model, dataset.train_prompts, task.tokenizer, reward, params.max_new_tokens,
            progress=progress))  # fmt: skip
    return replace(task, reward_model=reward_model)


@dataclass(frozen=True)
class TrainedPolicy:
    """A policy and the record of its training, a row an update."""

    policy: PolicyWithValue
    history: pd.DataFrame


def train_policy(
    task: Task, shape: RewardShape, params: PPOParams, attribution: AttributionParams, seed: int,
    progress: Callable = iter,
) -> TrainedPolicy:  # fmt: skip
    """Inner loop: sample, explain, shape, improve. Same arguments give the same history on one machine."""
    torch.manual_seed(seed)
    policy, history = task.fresh_policy(), []
    optimizer, generator = ppo.make_optimizer(policy, params), torch.Generator().manual_seed(seed)
    batches = prompt_batches(task.data.train_prompts, params.rollouts, seed)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, params.updates)
    sources = [source for source, weight in zip(shape.sources, shape.weights) if weight > 0]
    for step in progress(range(params.updates)):
        clock = [time.perf_counter()]
        rollout = task.roll(policy, next(batches), params, seed=seed * 100_003 + step)
        clock.append(time.perf_counter())
        attributions = attribute(task.reward_model, rollout, sources, attribution)
        shaped = shape_rewards(rollout, attributions, shape)
        clock.append(time.perf_counter())
        rewards = ppo.token_rewards(rollout, shaped, params)
        losses = ppo.update(policy, optimizer, rollout, rewards, params, task.tokenizer.pad_token_id, generator)
        schedule.step()
        clock.append(time.perf_counter())
        history.append(_measure(task, rollout, step) | losses | shape_diagnostics(rollout, attributions, shape)
                       | {f"seconds/{n}": b - a for n, a, b in zip(("sample", "explain", "update"), clock, clock[1:])})
    return TrainedPolicy(policy.eval(), pd.DataFrame(history))


def _measure(task: Task, rollout: Rollout, step: int) -> dict[str, float]:
    """Training metrics of one batch, before the update that it causes."""
    texts = response_texts(rollout, task.tokenizer)
    return {
        "update": step, "proxy": rollout.scores.mean().item(), "gold": sum(map(task.gold.score, texts)) / len(texts),
        "kl": ppo.sequence_kl(rollout).mean().item(), "length": rollout.mask.sum(-1).float().mean().item(),
    }  # fmt: skip


def evaluate(
    task: Task, policy: PolicyWithValue, prompts: Sequence[Prompt], params: PPOParams, seed: int
) -> pd.DataFrame:
    """One response to each prompt, judged: columns prompt, response, proxy (sd), gold (log-odds), kl (nats)."""
    tables = []
    for start in range(0, len(prompts), params.rollouts):
        batch = prompts[start : start + params.rollouts]
        rollout = task.roll(policy, batch, params, seed=seed * 100_003 + 50_000 + start)
        texts = response_texts(rollout, task.tokenizer)
        tables.append(pd.DataFrame({
            "prompt": [str(p) if isinstance(p, str) else p[-1].content for p in batch], "response": texts,
            "proxy": rollout.scores.cpu(), "gold": [task.gold.score(text) for text in texts],
            "kl": ppo.sequence_kl(rollout).cpu(),
        }))  # fmt: skip
    return pd.concat(tables, ignore_index=True)


def judge_against_reference(
    task: Task, policy: PolicyWithValue, prompts: Sequence[Prompt], params: PPOParams, seed: int
) -> pd.DataFrame:
    """`evaluate` with the reference's answers to the same prompts beside it: reference_gold, reference_proxy, win."""
    judged, before = (evaluate(task, p, prompts, params, seed) for p in (policy, task.reference))
    return judged.assign(reference_gold=before["gold"], reference_proxy=before["proxy"],
                         win=win_rate(judged["gold"], before["gold"]))  # fmt: skip


# ---------------------------------------------------------------------------------------------------- outer loop


def append_line(path: Path, event: dict) -> None:
    """Append one JSON line and force it to disk, in place of a last line that a crash cut short."""
    line = json.dumps(event, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab+") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())


def read_ledger(path: Path) -> list[dict]:
    """The complete lines of a ledger; a last line that a crash cut short is left out."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def search_shape(
    task: Task, shape: RewardShape, bo: BOParams, params: PPOParams, attribution: AttributionParams,
    prompts: Sequence[Prompt], ledger: Path, seed: int, progress: Callable = iter,
) -> tuple[RewardShape, SimplexSearch]:  # fmt: skip
    """Outer loop: propose weights, train a policy from the reference, observe its proxy score on held-out `prompts`.

    The standard error is over prompts and responses; how PPO varies from seed to seed comes on top and is not known.
    `shape` gives sources and normalisation; its weights are ignored. Every trial is a line of `ledger`, and a search
    that finds lines there goes on behind them. Returns the incumbent's shape and the search.
    """
    search, trial_params = SimplexSearch(len(shape.sources), bo.initial, seed), replace(params, updates=bo.updates)
    settings = [asdict(shape) | {"weights": None}, asdict(trial_params), asdict(attribution)]
    key = content_key([*settings, bo.initial, seed, len(prompts), task.revisions])
    for event in read_ledger(ledger):
        if event["search"] != key:
            raise InputError(f"{ledger} is of another search, of sources {event['sources']}; move it away")
        search.observe(tuple(event["weights"]), event["value"], event["standard_error"])
    for trial in progress(range(len(search.values), bo.trials)):
        weights, start = search.suggest(), time.perf_counter()
        trained = train_policy(task, replace(shape, weights=weights), trial_params, attribution, seed + 1000 * trial)
        judged = evaluate(task, trained.policy, prompts, params, seed + 1000 * trial)
        value, error = float(judged["proxy"].mean()), float(judged["proxy"].sem())
        search.observe(weights, value, error)
        append_line(ledger, {
            "search": key, "trial": trial, "sources": list(shape.sources), "weights": list(weights), "value": value,
            "standard_error": error, "gold": float(judged["gold"].mean()),
            "kl": float(judged["kl"].mean()), "seed": seed + 1000 * trial, "seconds": time.perf_counter() - start,
        })  # fmt: skip
    return replace(shape, weights=search.incumbent()[0]), search
