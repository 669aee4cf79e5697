"""The two loops: `train_policy` teaches a policy with one reward shape, `search_shape` learns the shape's weights."""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path

import pandas as pd
import torch

from dense_rlhf import ppo
from dense_rlhf.additive import AdditiveJudge, load_gold_judge, load_lexicon
from dense_rlhf.attribution import attribute
from dense_rlhf.bayesopt import SimplexSearch
from dense_rlhf.checkpoint import keep, resume, save_failure
from dense_rlhf.data import Dataset, load_data
from dense_rlhf.health import Sign, diagnose
from dense_rlhf.implicit import load_implicit
from dense_rlhf.judge import win_rate
from dense_rlhf.models import LanguageModel, default_device, load_policy
from dense_rlhf.params import AttributionParams, BOParams, DataParams, PolicyParams, PPOParams, RewardParams
from dense_rlhf.policy import PolicyWithValue, trainable_copy, value_probe
from dense_rlhf.ppo import Learner
from dense_rlhf.processes import Alone
from dense_rlhf.reward_model import RewardModel
from dense_rlhf.rewards import load_reward_model
from dense_rlhf.rollout import appraise, prompt_batches, respond, response_texts
from dense_rlhf.shaping import shape_diagnostics, shape_rewards
from dense_rlhf.store import content_key, package_sha256
from dense_rlhf.types import InputError, Prompt, Responses, RewardShape, Rollout

OTHERS = 1_000_000_007  # between the sampling seeds of two processes
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
    value_head: dict[str, torch.Tensor] | None = None  # where a shared critic starts, if not at zero

    @property
    def tokenizer(self):
        return self.language_model.tokenizer

    @property
    def revisions(self) -> dict[str, str]:
        """What was read: hashes or commits of data, policy and reward model."""
        return {"data": self.data.revision, "policy": self.language_model.revision,
                "reward": self.reward_model.revision}  # fmt: skip

    def fresh_policy(self) -> PolicyWithValue:
        """A copy of the reference that learns what `policy` says."""
        policy = trainable_copy(self.reference, self.policy, self.reward_model)
        if self.value_head is not None:
            policy.value_head.load_state_dict(self.value_head)
        return policy

    def respond(self, policy: PolicyWithValue, prompts: Sequence[Prompt], params: PPOParams, seed: int) -> Responses:
        """One scored response to each prompt, sampled with `seed`."""
        generator = torch.Generator(default_device()).manual_seed(seed)
        return respond(policy, self.reward_model, prompts, self.tokenizer, params, generator)

    def roll(self, policy: PolicyWithValue, prompts: Sequence[Prompt], params: PPOParams, seed: int) -> Rollout:
        """One batch of responses to `prompts`, sampled with `seed`."""
        responses = self.respond(policy, prompts, params, seed)
        return appraise(policy, self.reference, responses, params.temperature, params.micro_batch)


def load_task(
    data: DataParams, policy: PolicyParams, reward: RewardParams, params: PPOParams, progress: Callable = iter
) -> Task:
    """Read the data, load the policy, train or find the proxy reward model, centre it on the reference's responses.

    Where `reward.dpo_steps` asks for it, train or find the policy whose log-ratio is the source `log_ratio`.
    """
    dataset, language_model = load_data(data), load_policy(policy)
    bf16 = policy.dtype == "bfloat16"
    reference = PolicyWithValue(language_model.model, policy.trainable_layers, bf16=bf16).requires_grad_(False)
    reference = reference.to(default_device()).eval()
    reward_model = load_reward_model(dataset.reward, language_model.tokenizer, reward, dataset.revision,
                                     progress=progress)  # fmt: skip
    reward_model.model.to(default_device())
    gold = load_gold_judge(dataset.gold, dataset.revision)
    task = Task(dataset, language_model, reference, reward_model, gold, load_lexicon(), policy)
    batches = range(0, CALIBRATION_BATCHES * params.rollouts, params.rollouts)
    found = [task.respond(reference, dataset.train_prompts[i : i + params.rollouts], params, seed=i) for i in batches]
    reward_model = reward_model.calibrated(torch.cat([texts.scores for texts in found]))
    probed = policy.value_start == "score" and policy.critic != "separate"
    value_head = value_probe(reference, reward_model, found) if probed else None
    if reward.dpo_steps:
        reward_model = replace(reward_model, implicit=load_implicit(
            reference, reward_model, dataset.train_prompts, task.tokenizer, reward, params.max_new_tokens,
            progress=progress))  # fmt: skip
    return replace(task, reward_model=reward_model, value_head=value_head)


@dataclass(frozen=True)
class TrainedPolicy:
    """A policy and the record of its training."""

    policy: PolicyWithValue
    history: pd.DataFrame  # metrics, a row an update
    seconds: pd.DataFrame  # wall time, a row an update: sample, explain, learn
    warnings: list[Sign] = field(default_factory=list)


def train_policy(
    task: Task, shape: RewardShape, params: PPOParams, attribution: AttributionParams, seed: int,
    progress: Callable = iter, watch: Callable[[dict], None] | None = None, folder: Path | None = None,
    processes: Alone | None = None,
) -> TrainedPolicy:  # fmt: skip
    """Inner loop: sample, explain, shape, improve. Same arguments give the same history on one machine.

    `watch` is called with each row of metrics. A training that was cut short goes on from its checkpoint in `folder`,
    and one that meets a number that is not finite leaves its rollout there and raises `Diverged`.
    """
    torch.manual_seed(seed)
    learner = ppo.make_learner(task.fresh_policy(), params, seed, processes)
    key = _training_key(task, shape, params, attribution, seed)
    history, seconds = resume(folder, key, learner)
    batches = islice(prompt_batches(task.data.train_prompts, params.rollouts, seed), len(history), None)
    for step in progress(range(len(history), params.updates)):
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
    settings = [asdict(part) for part in (shape, replace(params, checkpoint_every=1), attribution, task.policy)]
    proxy = task.reward_model.offset, task.reward_model.scale, str(task.reward_model.dtype)
    prompts = [str(prompt) for prompt in task.data.train_prompts]
    return content_key([*settings, seed, task.revisions, proxy, prompts, package_sha256()])


def _improve(
    task: Task, learner: Learner, shape: RewardShape, params: PPOParams, attribution: AttributionParams,
    prompts: Sequence[Prompt], step: int, seed: int,
) -> tuple[dict[str, float], dict[str, float]]:  # fmt: skip
    """One update on responses to `prompts`: its metrics, and the seconds that each part took."""
    together, clock = learner.processes, [time.perf_counter()]
    policy = together.unwrap(learner.policy)
    mine = task.roll(policy, together.share(prompts), params, seed * 100_003 + step + OTHERS * together.rank)
    clock.append(time.perf_counter())
    sources = [source for source, weight in zip(shape.sources, shape.weights) if weight > 0]
    attributions = attribute(task.reward_model, mine, sources, attribution)
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
