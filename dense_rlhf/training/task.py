"""What stays fixed while policies are trained: data, reference policy, reward model, judges."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from dense_rlhf.config.params import DataParams, PolicyParams, PPOParams, RewardParams
from dense_rlhf.data import Dataset, load_data
from dense_rlhf.models.language_models import LanguageModel, default_device, load_policy, within_memory
from dense_rlhf.models.policy import PolicyWithValue, trainable_copy, value_probe
from dense_rlhf.models.reward_model import RewardModel
from dense_rlhf.models.train_reward_model import load_reward_model
from dense_rlhf.models.word_judge import AdditiveJudge, load_gold_judge, load_lexicon
from dense_rlhf.ppo.rollout import appraise, respond
from dense_rlhf.training.dpo import load_implicit
from dense_rlhf.types import Prompt, Responses, Rollout

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
        return {
            "data": self.data.revision,
            "policy": self.language_model.revision,
            "reward": self.reward_model.revision,
        }

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
    reward_model = load_reward_model(
        dataset.reward, language_model.tokenizer, reward, dataset.revision, progress=progress
    )
    reward_model.model.to(default_device())
    gold = load_gold_judge(dataset.gold, dataset.revision)
    task = Task(dataset, language_model, reference, reward_model, gold, load_lexicon(), policy)
    batches = range(0, CALIBRATION_BATCHES * params.rollouts, params.rollouts)
    found = [task.respond(reference, dataset.train_prompts[i : i + params.rollouts], params, seed=i) for i in batches]
    reward_model = reward_model.calibrated(torch.cat([texts.scores for texts in found]))
    probed = policy.value_start == "score" and policy.critic != "separate"
    value_head = value_probe(reference, reward_model, found) if probed else None
    if reward.dpo_steps:
        reward_model = replace(
            reward_model,
            implicit=load_implicit(
                reference,
                reward_model,
                dataset.train_prompts,
                task.tokenizer,
                reward,
                params.max_new_tokens,
                progress=progress,
            ),
        )
    return replace(task, reward_model=reward_model, value_head=value_head)
