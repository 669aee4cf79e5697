"""The two loops: `train_policy` teaches a policy with one reward shape, `search_shape` learns the shape's weights."""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from dense_rlhf import ppo
from dense_rlhf.additive import AdditiveJudge, load_gold_judge, load_lexicon
from dense_rlhf.attribution import attribute
from dense_rlhf.bayesopt import Point, Search, Space
from dense_rlhf.checkpoint import keep, resume, save_failure, save_policy
from dense_rlhf.data import Dataset, load_data
from dense_rlhf.health import Sign, diagnose
from dense_rlhf.implicit import load_implicit
from dense_rlhf.judge import length_controlled, win_rate
from dense_rlhf.judge.length_control import FOLDS
from dense_rlhf.ledger import Halfway, Ledger, lock
from dense_rlhf.models import LanguageModel, default_device, load_policy, within_memory
from dense_rlhf.params import AttributionParams, BOParams, DataParams, PolicyParams, PPOParams, RewardParams
from dense_rlhf.policy import PolicyWithValue, trainable_copy, value_probe
from dense_rlhf.ppo import Learner
from dense_rlhf.processes import Alone
from dense_rlhf.reward_model import RewardModel
from dense_rlhf.rewards import load_reward_model
from dense_rlhf.rollout import appraise, prompt_batches, respond, response_texts
from dense_rlhf.shaping import shape_diagnostics, shape_rewards
from dense_rlhf.store import content_key, package_sha256, remove_checkpoints, write_folder, write_json
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
        generator = torch.Generator().manual_seed(seed)
        with within_memory("responses are sampled and scored", "ppo.rollouts or reward.token_budget"):
            return respond(policy, self.reward_model, prompts, self.tokenizer, params, generator)

    def roll(self, policy: PolicyWithValue, prompts: Sequence[Prompt], params: PPOParams, seed: int) -> Rollout:
        """One batch of responses to `prompts`, sampled with `seed`."""
        responses = self.respond(policy, prompts, params, seed)
        with within_memory("log-probabilities are read", "ppo.micro_batch"):
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
    processes: Alone | None = None, until: Callable[[list[dict]], bool] | None = None,
) -> TrainedPolicy:  # fmt: skip
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
    return content_key([asdict(shape), *_decisive(task, params, attribution), seed, package_sha256()])


def _decisive(task: Task, params: PPOParams, attribution: AttributionParams) -> list:
    """What decides a training beside its shape, its seed and the code."""
    settings = [asdict(part) for part in (replace(params, checkpoint_every=1), attribution, task.policy)]
    proxy = task.reward_model.offset, task.reward_model.scale, str(task.reward_model.dtype)
    return [*settings, task.revisions, proxy, [str(prompt) for prompt in task.data.train_prompts]]


def _improve(
    task: Task, learner: Learner, shape: RewardShape, params: PPOParams, attribution: AttributionParams,
    prompts: Sequence[Prompt], step: int, seed: int,
) -> tuple[dict[str, float], dict[str, float]]:  # fmt: skip
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
    """`evaluate` with the reference's answers to the same prompts beside it: reference_gold, reference_proxy, win, and
    from five prompts on win_lc, the win at equal length."""
    judged, before = (evaluate(task, p, prompts, params, seed) for p in (policy, task.reference))
    win = win_rate(judged["gold"], before["gold"])
    known = {"win_lc": length_controlled(win, judged["response"], before["response"])} if len(win) >= FOLDS else {}
    return judged.assign(reference_gold=before["gold"], reference_proxy=before["proxy"], win=win, **known)


# ---------------------------------------------------------------------------------------------------- outer loop


def search_space(shape: RewardShape, bo: BOParams) -> Space:
    """Points are the weights of the sources, then, where searched, log temperatures, the sign switch, and slopes.

    Slopes are a row a source, a number a feature; the last source's are zero, since only differences matter. A source
    without weight needs no numbers, and one with all weight no slopes.
    Raises `InputError` where numbers are searched that change nothing.
    """
    bo.check(shape)
    K, F = len(shape.sources), len(bo.features)
    temperatures = {"fixed": 0, "shared": 1, "each": K}[bo.temperature]
    bounds = ((math.log(bo.temperature_low), math.log(bo.temperature_high)),) * temperatures
    slopes, first = ((-bo.slope, bo.slope),) * ((K - 1) * F), temperatures + bo.signs
    idle = [(k, k, 0.0) for k in range(K) if bo.temperature == "each"]
    idle += [(first + i, i // F, value) for i in range(len(slopes)) for value in (0.0, 1.0)]
    return Space(K, bounds + ((0.0, 1.0),) * bo.signs + slopes, (temperatures,) * bo.signs, tuple(idle))


def shape_at(shape: RewardShape, bo: BOParams, point: Point) -> RewardShape:
    """The shape that a point of `search_space` stands for; what is not searched is the given shape's."""
    K, F, extras = len(shape.sources), len(bo.features), list(point[len(shape.sources) :])
    found = {"weights": tuple(point[:K])}
    if bo.temperature != "fixed":
        n = K if bo.temperature == "each" else 1
        logs, extras = extras[:n], extras[n:]
        found["temperature"] = tuple(map(math.exp, logs)) if n == K else math.exp(logs[0])
    if bo.signs:
        found["normalise"] = "signed" if extras.pop(0) else "softmax"
    if F:
        rows = [tuple(extras[i * F : (i + 1) * F]) for i in range(K - 1)]
        found |= {"features": bo.features, "slopes": (*rows, (0.0,) * F)}
    return replace(shape, **found)


def search_shape(
    task: Task, shape: RewardShape, bo: BOParams, params: PPOParams, attribution: AttributionParams,
    prompts: Sequence[Prompt], ledger: Path, seed: int, progress: Callable = iter,
    objective: Callable[[pd.DataFrame], Sequence[float]] | None = None,
) -> tuple[RewardShape, Search]:  # fmt: skip
    """Outer loop: propose a shape, train a policy from the reference, observe its score on held-out `prompts`.

    The score is `bo.objective`, or an `objective` that makes a number a prompt of the table of `evaluate`; its standard
    error is over prompts and responses, and how PPO varies from seed to seed comes on top. The weights of `shape` are
    ignored. Any number of processes may search on one `ledger` (see `dense_rlhf.ledger`); each goes on with what it
    finds there, and ends when all trials have. Returns the incumbent's shape and the search, and leaves the incumbent's
    policy in the folder `policy` beside the ledger. Raises `InputError` for the ledger of another search.
    """
    params = replace(params, updates=bo.updates)
    key = _search_key(task, shape, bo, params, attribution, prompts, seed, objective)
    empty = partial(Search, search_space(shape, bo), bo.strategy, bo.initial, bo.anchors, bo.replicates, seed)
    book = Ledger(ledger, empty, bo.trials, seed, {"search": key, "sources": list(shape.sources)})
    judge = objective or partial(OBJECTIVES[bo.objective], bo)
    trials = Trials(task, shape, bo, params, attribution, tuple(prompts), judge, book)
    search = book.run(trials.run, trials.ended, progress)
    trials.keep_incumbent(search)
    return shape_at(shape, bo, search.incumbent()[0]), search


def _search_key(
    task: Task, shape: RewardShape, bo: BOParams, params: PPOParams, attribution: AttributionParams,
    prompts: Sequence[Prompt], seed: int, objective: Callable | None,
) -> str:  # fmt: skip
    """What decides a search beside the code, which every line of its ledger names; more trials make no other search."""
    settings = [asdict(shape) | {"weights": None}, asdict(bo) | {"trials": None}, seed, list(map(str, prompts))]
    return content_key([*settings, *_decisive(task, params, attribution), getattr(objective, "__qualname__", None)])


@dataclass(frozen=True)
class Trials:
    """What a trial of a search is, and what is kept of it."""

    task: Task
    shape: RewardShape
    bo: BOParams
    params: PPOParams  # of a trial
    attribution: AttributionParams
    prompts: tuple[Prompt, ...]
    objective: Callable[[pd.DataFrame], Sequence[float]]
    book: Ledger

    def __post_init__(self):
        if len(self.prompts) < 2:
            raise InputError(f"{len(self.prompts)} held-out prompts tell no standard error; wanted at least 2")

    @property
    def policy(self) -> Path:
        """The folder of the incumbent's policy."""
        return self.book.path.with_name("policy")

    def train(self, row: dict, until: Callable[[list[dict]], bool] | None = None) -> TrainedPolicy:
        """The policy of a trial, from the reference, at its point and with its seed."""
        shape = shape_at(self.shape, self.bo, row["point"])
        return train_policy(self.task, shape, self.params, self.attribution, row["seed"], folder=self._folder(row),
                            until=until)  # fmt: skip

    def run(self, row: dict) -> tuple[dict, TrainedPolicy | None]:
        """Train and judge one trial: its event in the ledger, and its policy."""
        halfway, rung = Halfway.of(self.book.rows()), max(self.params.updates // 2, 1)
        stops = self.bo.stop_early and row["point"] not in self.book.empty().space.anchors()  # whose repeats tell noise
        until = (lambda history: len(history) == rung and halfway.stops(history[-1]["proxy"])) if stops else None
        try:
            trained = self.train(row, until)
        except ppo.Diverged as error:
            return {"event": "failed", "reason": str(error)}, None
        means, proxy = trained.history.mean(), list(trained.history["proxy"])
        ess = {name.removeprefix("ess/"): mean for name, mean in means.items() if name.startswith("ess/")}
        about = {"updates": len(proxy), "history": proxy, "rung": proxy[rung - 1], "ess": ess}
        if len(proxy) == self.params.updates:
            return {"event": "observed"} | self.judge(trained.policy, row["seed"]) | about, trained
        value, error = halfway.foretell(about["rung"])
        about |= {"value": value, "standard_error": error, "correlation": halfway.correlation}
        return {"event": "stopped"} | about, trained

    def judge(self, policy: PolicyWithValue, seed: int) -> dict[str, float | None]:
        """The value of a policy, its standard error over prompts, and the judgements that it is not made of."""
        judged = evaluate(self.task, policy, self.prompts, self.params, seed)
        each = np.asarray(self.objective(judged), dtype=float)
        if each.shape != (len(judged),):
            raise InputError(f"the objective gave shape {each.shape}, wanted a number for each of {len(judged)}")
        error, means = float(each.std(ddof=1) / len(each) ** 0.5), dict(judged[["proxy", "gold", "kl"]].mean())
        return {"value": float(each.mean()), "standard_error": error or None} | means

    def ended(self, row: dict, trained: TrainedPolicy | None) -> None:
        """Forget the checkpoints of a trial that is recorded, and keep its policy where its point leads the search."""
        remove_checkpoints(self._folder(row))
        search = self.book.replay()
        if row["status"] == "observed" and len(search.values) > 1 and search.incumbent()[0] == row["point"]:
            self._keep(row, trained)

    def keep_incumbent(self, search: Search) -> None:
        """Train the incumbent's policy again where another trial's took its place in between."""
        leads = [row for row in self.book.rows() if "value" in row and row["point"] == search.incumbent()[0]]
        leads.sort(key=lambda row: row["status"] == "observed")  # last, where there is one: it is what `ended` keeps
        with lock(self.book.folder / "policy.lock"):
            kept = self.policy / "trial.json"
            if not kept.exists() or json.loads(kept.read_text()) not in map(_identity, leads):
                self._keep(leads[-1], self.train(leads[-1]))
                remove_checkpoints(self._folder(leads[-1]))

    def _keep(self, row: dict, trained: TrainedPolicy) -> None:
        def fill(folder: Path) -> None:
            save_policy(trained.policy, self.task.tokenizer, folder)
            write_json(folder / "trial.json", _identity(row))

        write_folder(self.policy, fill)

    def _folder(self, row: dict) -> Path:
        return self.book.folder / f"{row['trial']:03d}"


def _identity(row: dict) -> dict:
    return {"point": list(row["point"])} | {name: row[name] for name in ("search", "trial", "seed")}


OBJECTIVES: dict[str, Callable[[BOParams, pd.DataFrame], pd.Series]] = {
    "proxy": lambda bo, judged: judged["proxy"], "gold": lambda bo, judged: judged["gold"],
    "penalised": lambda bo, judged: judged["proxy"] - bo.kl_weight * judged["kl"],
}  # fmt: skip
