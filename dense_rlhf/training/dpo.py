"""A policy taught by DPO to prefer what the reward model prefers: its log-ratio is a reward of every token."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dense_rlhf.config.params import PPOParams, RewardParams
from dense_rlhf.data import render
from dense_rlhf.files import cached_folder, content_key
from dense_rlhf.fingerprint import source_key
from dense_rlhf.models.policy import PolicyWithValue
from dense_rlhf.models.reward_model import RewardModel
from dense_rlhf.ppo.rollout import appraise, respond
from dense_rlhf.ppo.sampling import prompt_batches
from dense_rlhf.types import InputError, Prompt, Rollout

BATCH, LR, SAMPLED = 16, 3e-4, 64  # pairs a step; learning rate, falling to 0; prompts sampled together


@dataclass(frozen=True)
class ImplicitReward:
    """beta (log pi - log pi_ref)(y_t | x, y_<t): the reward for which `policy` is optimal (Rafailov et al., 2023).

    Equal to a score up to a constant of the prompt, as far as `policy` learned it.
    """

    policy: PolicyWithValue
    reference: PolicyWithValue
    beta: float

    def __call__(self, rollout: Rollout) -> Tensor:
        """(B, T), beta times nats, of both policies at temperature 1; zero on EOS and padding."""
        read = appraise(self.policy, self.reference, rollout, 1.0)
        return self.beta * (read.logprobs - read.ref_logprobs).masked_fill(~rollout.players, 0)


def preferences(
    reference: PolicyWithValue,
    reward_model: RewardModel,
    prompts: Sequence[Prompt],
    tokenizer: PreTrainedTokenizerBase,
    pairs: int,
    T: int,
    seed: int,
    progress: Callable = iter,
) -> list[dict[str, list[int]]]:
    """Two responses of the reference to each of `pairs` prompts, `chosen` the one that scores higher; ties left out.

    Rows of token ids, `prompt_ids`, `chosen_ids` and `rejected_ids`, each response with its EOS where it has one.
    """
    generator = torch.Generator().manual_seed(seed)
    params = PPOParams(max_new_tokens=T)  # temperature 1
    size, rows = min(SAMPLED, pairs, len(prompts)), []
    for batch in progress(list(islice(prompt_batches(prompts, size, seed), -(-pairs // size)))):
        sides = [respond(reference, reward_model, batch, tokenizer, params, generator) for _ in range(2)]
        better = (sides[0].scores > sides[1].scores).tolist()
        texts = [[ids[keep].tolist() for ids, keep in zip(side.responses, side.mask)] for side in sides]
        queries = [ids[keep].tolist() for ids, keep in zip(sides[0].queries, sides[0].query_mask)]
        for i in (sides[0].scores != sides[1].scores).nonzero().squeeze(-1).tolist():
            chosen, rejected = (texts[0][i], texts[1][i]) if better[i] else (texts[1][i], texts[0][i])
            rows.append({"prompt_ids": queries[i], "chosen_ids": chosen, "rejected_ids": rejected})
    return rows


def train_dpo(
    reference: PreTrainedModel,
    rows: list[dict[str, list[int]]],
    tokenizer: PreTrainedTokenizerBase,
    steps: int,
    beta: float,
    seed: int,
    folder: Path,
) -> PreTrainedModel:
    """A copy of `reference` trained on preferences by trl's DPOTrainer; `folder` is its to write in.

    Raises `InputError` where there is no preference.
    """
    import datasets
    from trl import DPOConfig, DPOTrainer

    class OnTokens(DPOTrainer):
        """trl would tokenise the texts anew and put an EOS behind responses that have none."""

        def _prepare_dataset(self, dataset, *_):
            return dataset

    if not rows:
        raise InputError(
            "reward.dpo_steps: the reward model gives both responses to every prompt the same score, so "
            "there is no preference to learn; set it to 0 or train the reward model"
        )
    cpu = not torch.cuda.is_available()
    config = DPOConfig(
        str(folder / "trainer"),
        per_device_train_batch_size=BATCH,
        max_steps=steps,
        seed=seed,
        learning_rate=LR,
        beta=beta,
        max_length=None,
        use_cpu=cpu,
        bf16=not cpu,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    policy, frozen = (copy.deepcopy(reference).float().requires_grad_(learns) for learns in (True, False))
    data = datasets.Dataset.from_list(rows)
    OnTokens(policy, frozen, config, train_dataset=data, processing_class=tokenizer).train()
    return policy


def load_implicit(
    reference: PolicyWithValue,
    reward_model: RewardModel,
    prompts: Sequence[Prompt],
    tokenizer: PreTrainedTokenizerBase,
    params: RewardParams,
    T: int,
    seed: int = 0,
    progress: Callable = iter,
) -> ImplicitReward:
    """The implicit reward after `params.dpo_steps` of DPO on responses of at most T tokens, cached by content."""
    import trl
    from safetensors.torch import load_model, save_model

    def build(folder: Path) -> None:
        rows = preferences(reference, reward_model, prompts, tokenizer, params.dpo_steps * BATCH, T, seed, progress)
        policy = train_dpo(reference.lm, rows, tokenizer, params.dpo_steps, params.dpo_beta, seed, folder)
        save_model(policy, str(folder / "model.safetensors"))

    key = {
        "reference": _weights_sha256(reference.lm),
        "reward": _weights_sha256(reward_model.model),
        "suffix": reward_model.suffix,
        "prompts": content_key([render(prompt, tokenizer) for prompt in prompts]),
        "steps": params.dpo_steps,
        "beta": params.dpo_beta,
        "tokens": T,
        "seed": seed,
        "torch": torch.__version__,
        "trl": trl.__version__,
        "code": source_key("dense_rlhf.training.dpo"),
    }
    folder, policy = cached_folder("implicit", key, build), copy.deepcopy(reference).float()
    load_model(policy.lm, str(folder / "model.safetensors"))
    return ImplicitReward(policy.requires_grad_(False).eval(), reference, params.dpo_beta)


def _weights_sha256(model: PreTrainedModel) -> str:
    digest = hashlib.sha256()
    for name, weight in model.state_dict().items():
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        digest.update(weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
