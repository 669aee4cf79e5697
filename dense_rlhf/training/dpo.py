"""A policy trained by DPO on the reward model's preferences: its log-ratio is a reward of every token."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dense_rlhf.config.params import PPOParams, RewardParams
from dense_rlhf.files import cached_folder, content_key
from dense_rlhf.fingerprint import source_key
from dense_rlhf.models.dialogue import render, tokens_key
from dense_rlhf.models.language_models import machine
from dense_rlhf.models.policy import PolicyWithValue, state_sha256
from dense_rlhf.models.reward_model import RewardModel
from dense_rlhf.ppo.rollout import appraise, scored
from dense_rlhf.ppo.sampling import prompt_batches, sample_responses
from dense_rlhf.types import InputError, Prompt, Responses, Rollout

BATCH, LR, SAMPLED = 16, 3e-4, 64  # pairs a step; learning rate, falling to 0; prompts sampled together
QUIET = dict(
    gradient_checkpointing=False, save_strategy="no", logging_strategy="no", report_to="none", disable_tqdm=True
)


@dataclass(frozen=True)
class ImplicitReward:
    """beta (log pi - log pi_ref)(y_t | x, y_<t): the reward for which `policy` is optimal (Rafailov et al., 2023).

    Its sum is the score up to a constant of the prompt, as far as `policy` has learned it.
    """

    policy: PolicyWithValue
    reference: PolicyWithValue
    beta: float

    @cached_property
    def key(self) -> str:
        """Hash of what it says of a text, for a given reference."""
        return content_key([state_sha256(self.policy), self.beta])

    def __call__(self, rollout: Rollout) -> Tensor:
        """(B, T), beta times nats, of both policies at temperature 1; zero on EOS and padding."""
        both = appraise(self.policy, self.reference, rollout, 1.0)
        return self.beta * (both.logprobs - both.ref_logprobs).masked_fill(~rollout.players, 0)


@dataclass(frozen=True)
class Pairs:
    """Where preferences come from: `reference` responds twice to a prompt, and `reward_model` chooses."""

    reference: PolicyWithValue
    reward_model: RewardModel
    tokenizer: PreTrainedTokenizerBase
    max_new_tokens: int
    seed: int = 0

    def preferences(
        self, prompts: Sequence[Prompt], number: int, progress: Callable = iter
    ) -> list[dict[str, list[int]]]:
        """Two responses to each of `number` prompts, `chosen` the one that scores higher; ties are left out.

        Rows of token ids, `prompt_ids`, `chosen_ids` and `rejected_ids`, each response with its EOS where it has one.
        """
        generator = torch.Generator().manual_seed(self.seed)
        size, rows = min(SAMPLED, number, len(prompts)), []
        for batch in progress(list(islice(prompt_batches(prompts, size, self.seed), -(-number // size)))):
            sides = [self._respond(batch, generator) for _ in range(2)]
            asked = unpadded(sides[0].queries, sides[0].query_mask)
            scored_ids = [zip(side.scores.tolist(), unpadded(side.responses, side.mask)) for side in sides]
            for prompt_ids, one, other in zip(asked, *scored_ids):
                if one[0] != other[0]:
                    (_, chosen), (_, rejected) = (one, other) if one[0] > other[0] else (other, one)
                    rows.append({"prompt_ids": prompt_ids, "chosen_ids": chosen, "rejected_ids": rejected})
        return rows

    def _respond(self, prompts: Sequence[Prompt], generator: torch.Generator) -> Responses:
        params = PPOParams(max_new_tokens=self.max_new_tokens)  # temperature 1
        return scored(sample_responses(self.reference, prompts, self.tokenizer, params, generator), self.reward_model)


def train_dpo(
    reference: PreTrainedModel,
    rows: list[dict[str, list[int]]],
    tokenizer: PreTrainedTokenizerBase,
    steps: int,
    beta: float,
    seed: int,
) -> PreTrainedModel:
    """A copy of `reference` trained on preferences by trl's DPOTrainer. Raises `InputError` if there are none."""
    import datasets
    from trl import DPOConfig, DPOTrainer

    class OnTokens(DPOTrainer):
        """trl would tokenise the texts again and append an EOS to responses that have none."""

        def _prepare_dataset(self, dataset, *_):
            return dataset

    if not rows:
        raise InputError(
            "reward.dpo_steps: the reward model gives both responses to every prompt the same score, so "
            "there is no preference to learn; set it to 0 or train the reward model"
        )
    cpu = not torch.cuda.is_available()
    settings = dict(per_device_train_batch_size=BATCH, max_steps=steps, learning_rate=LR, beta=beta, seed=seed)
    policy, frozen = (copy.deepcopy(reference).float().requires_grad_(learns) for learns in (True, False))
    data = datasets.Dataset.from_list(rows)
    with tempfile.TemporaryDirectory() as folder:
        config = DPOConfig(folder, max_length=None, use_cpu=cpu, bf16=not cpu, **settings, **QUIET)
        OnTokens(policy, frozen, config, train_dataset=data, processing_class=tokenizer).train()
    return policy


def load_implicit(
    pairs: Pairs, prompts: Sequence[Prompt], params: RewardParams, progress: Callable = iter
) -> ImplicitReward:
    """The implicit reward after `params.dpo_steps` of DPO on `pairs` of responses to `prompts`, cached by content."""
    import trl
    from safetensors.torch import load_model, save_model

    reference, reward_model, tokenizer = pairs.reference, pairs.reward_model, pairs.tokenizer

    def build(folder: Path) -> None:
        rows = pairs.preferences(prompts, params.dpo_steps * BATCH, progress)
        policy = train_dpo(reference.lm, rows, tokenizer, params.dpo_steps, params.dpo_beta, pairs.seed)
        save_model(policy, str(folder / "model.safetensors"))

    key = {
        "reference": state_sha256(reference.lm),
        "reward": state_sha256(reward_model.model),
        "reading": [reward_model.suffix, reward_model.output, reward_model.pair, reward_model.revision],
        "policy": tokens_key(tokenizer),
        "prompts": content_key([render(prompt, tokenizer) for prompt in prompts]),
        "steps": params.dpo_steps,
        "beta": params.dpo_beta,
        "tokens": pairs.max_new_tokens,
        "seed": pairs.seed,
        "machine": machine(),
        "trl": trl.__version__,
        "code": source_key("dense_rlhf.training.dpo"),
    }
    folder, policy = cached_folder("implicit", key, build), copy.deepcopy(reference).float()
    load_model(policy.lm, str(folder / "model.safetensors"))
    return ImplicitReward(policy.requires_grad_(False).eval(), reference, params.dpo_beta)


def unpadded(ids: Tensor, mask: Tensor) -> list[list[int]]:
    """Each row's kept tokens."""
    return [row[keep].tolist() for row, keep in zip(ids, mask)]
