"""A task: data, reference policy, reward model and judges, which stay fixed while policies are trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from dense_rlhf import ppo
from dense_rlhf.config.params import PolicyParams, PPOParams, RewardParams, RunParams
from dense_rlhf.data import Dataset, load_data
from dense_rlhf.files import cached_folder, content_key
from dense_rlhf.fingerprint import source_key
from dense_rlhf.models.dialogue import tokens_key, without_refused
from dense_rlhf.models.language_models import LanguageModel, default_device, load_policy, machine, within_memory
from dense_rlhf.models.learned_judge import LearnedJudge, judge_params
from dense_rlhf.models.policy import PolicyWithValue, trainable_copy, value_probe
from dense_rlhf.models.reward_model import RewardModel
from dense_rlhf.models.train_reward_model import load_reward_model
from dense_rlhf.models.word_judge import AdditiveJudge, load_gold_judge, load_lexicon, repetition
from dense_rlhf.ppo.rollout import scored
from dense_rlhf.training.dpo import Pairs, load_implicit
from dense_rlhf.types import Prompt, Responses, Rollout

CALIBRATION_BATCHES = 4  # of responses by the reference, which set the zero and the unit of the score


def step_seed(seed: int, step: int) -> int:
    """The seed of the sampler at one step of the training with this `seed`."""
    return seed * 100_003 + step


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
    value_head: dict[str, torch.Tensor] | None = None  # initial weights of a shared critic, if not zero
    second: LearnedJudge | None = None  # where there is something for it to learn

    @property
    def tokenizer(self):
        return self.language_model.tokenizer

    @property
    def revisions(self) -> dict[str, str]:
        """Hashes or commits of data, policy and reward model."""
        read = {"data": self.data, "policy": self.language_model, "reward": self.reward_model}
        return {name: part.revision for name, part in read.items()}

    @cached_property
    def key(self) -> str:
        """Hash of all that is fixed; `machine` is not."""
        proxy, implicit, head = self.reward_model, self.reward_model.implicit, self.value_head or {}
        read = [proxy.offset, proxy.scale, str(proxy.dtype), proxy.token_budget, proxy.suffix, proxy.output, proxy.pair]
        tokens = [tokens_key(self.tokenizer), tokens_key(proxy.tokenizer), proxy.policy_tokenizer is None]
        learned = [implicit and implicit.key, {name: x.tolist() for name, x in head.items()}]
        texts = [[str(prompt) for prompt in self.data.train_prompts], self.gold.weights]
        texts.append(self.second and asdict(self.second.params))
        return content_key([self.revisions, asdict(self.policy), read, tokens, learned, texts])

    def judge(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> dict[str, list[float]]:
        """What held-out judges say of each response: `gold`, `distinct` (gold with each word counted once) and, where
        there is a second judge, `second`, all log-odds; `repetition`, the share of words that occur earlier in it."""
        judgements = {
            "gold": [self.gold.score(text) for text in texts],
            "distinct": [self.gold.distinct_score(text) for text in texts],
            "repetition": [repetition(text) for text in texts],
        }
        return judgements if self.second is None else judgements | {"second": self.second.scores(prompts, texts)}

    def fresh_policy(self) -> PolicyWithValue:
        """A copy of the reference whose trainable weights are those that `self.policy` names."""
        policy = trainable_copy(self.reference, self.policy, self.reward_model)
        if self.value_head is not None:
            policy.value_head.load_state_dict(self.value_head)
        return policy

    def scored_responses(
        self, policy: PolicyWithValue, prompts: Sequence[Prompt], params: PPOParams, seed: int
    ) -> Responses:
        """One scored response to each prompt, sampled with `seed`."""
        generator = torch.Generator().manual_seed(seed)
        with within_memory("responses are sampled and scored", "ppo.rollouts or reward.token_budget"):
            responses = ppo.sample_responses(policy, prompts, self.tokenizer, params, generator)
            return scored(responses, self.reward_model)

    def rollout(self, policy: PolicyWithValue, prompts: Sequence[Prompt], params: PPOParams, seed: int) -> Rollout:
        """Scored responses to `prompts`, sampled with `seed`, with the log-probabilities and values of `policy`."""
        responses = self.scored_responses(policy, prompts, params, seed)
        with within_memory("log-probabilities are read", "ppo.micro_batch"):
            return ppo.appraise(policy, self.reference, responses, params.temperature, params.micro_batch)


def load_task(params: RunParams, progress: Callable = iter) -> Task:
    """Read the data, load the policy, train or read the proxy reward model, calibrate it on the reference's responses.

    With `reward.dpo_steps`, also train or read the policy whose log-ratio is the source `log_ratio`.
    """
    dataset, language_model = load_data(params.data), load_policy(params.policy)
    bf16, layers = params.policy.dtype == "bfloat16", params.policy.trainable_layers
    reference = PolicyWithValue(language_model.model, layers, bf16=bf16).requires_grad_(False)
    reference = reference.to(default_device()).eval()
    tokenizer, revision = language_model.tokenizer, dataset.revision
    dataset = without_refused(dataset, {"the policy": tokenizer})
    second = _second_judge(dataset, language_model, params.reward)
    reward = dataset.reward, language_model, params.reward, revision
    reward_model = load_reward_model(*reward, progress=progress, meanwhile=lambda: second and second.model)
    reward_model.model.to(default_device())
    dataset = without_refused(dataset, {"the reward model": reward_model.tokenizer})
    gold = load_gold_judge(dataset.gold, revision)
    judges = dict(gold=gold, lexicon=load_lexicon(), second=second)
    task = Task(dataset, language_model, reference, reward_model, policy=params.policy, **judges)
    return _calibrated(task, params, progress)


def _second_judge(dataset: Dataset, policy: LanguageModel, proxy: RewardParams) -> LearnedJudge | None:
    """A judge of the labels left for it. Pairs leave none: it learns from the gold judge's, where a start is known that
    needs few of them, the policy."""
    if proxy.name == "policy" and dataset.is_pairwise:
        return LearnedJudge(dataset.gold, policy, dataset.revision, judge_params(proxy))
    if len({review.label for review in dataset.second}) == 2:
        return LearnedJudge(dataset.second, policy.tokenizer, dataset.revision, judge_params(proxy))
    return None


def _calibrated(task: Task, params: RunParams, progress: Callable) -> Task:
    """The task with what the reference's responses decide: unit of the score, start of the critic, implicit reward."""
    probed = params.policy.value_start == "score" and params.policy.critic != "separate"
    read = _reference_scores(task, params.ppo, probed)
    prompts, reward_model = task.data.train_prompts, task.reward_model.calibrated(read.pop("scores"))
    if params.reward.dpo_steps:
        pairs = Pairs(task.reference, reward_model, task.tokenizer, params.ppo.max_new_tokens)
        reward_model = replace(reward_model, implicit=load_implicit(pairs, prompts, params.reward, progress))
    return replace(task, reward_model=reward_model, value_head=read or None)


def _reference_scores(task: Task, params: PPOParams, probed: bool) -> dict[str, torch.Tensor]:
    """`scores` (N,) of the reference's responses and, where `probed`, weights of a value head; cached by content."""
    size, prompts, reference = params.rollouts, task.data.train_prompts, task.reference

    def build(folder: Path) -> None:
        starts = range(0, min(CALIBRATION_BATCHES * size, len(prompts)), size)
        batches = [task.scored_responses(reference, prompts[i : i + size], params, seed=i) for i in starts]
        read = {"scores": torch.cat([batch.scores for batch in batches])}
        if probed:
            read |= value_probe(reference, task.reward_model.calibrated(read["scores"]), batches)
        save_file({name: x.cpu() for name, x in read.items()}, folder / "read.safetensors")

    sampling = [size, params.max_new_tokens, params.temperature, params.sampler]
    key = [task.key, sampling, probed, source_key("dense_rlhf.training.task"), machine()]
    device = default_device()
    read = load_file(cached_folder("calibration", key, build) / "read.safetensors")
    return {name: x.to(device) for name, x in read.items()}
