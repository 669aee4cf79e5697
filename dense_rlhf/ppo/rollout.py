"""Rollouts: responses with scores, log-probabilities and values."""

from __future__ import annotations

import dataclasses
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dense_rlhf.models.policy import PolicyWithValue, micro_batches
from dense_rlhf.models.reward_model import RewardModel
from dense_rlhf.types import Responses, Rollout


def scored(responses: Responses, reward_model: RewardModel) -> Responses:
    """The same responses with the reward model's scores."""
    return replace(responses, scores=reward_model.score(reward_model.readings(responses)))


@torch.no_grad()
def appraise(
    policy: PolicyWithValue, reference: PolicyWithValue, responses: Responses, temperature: float, micro_batch: int = 64
) -> Rollout:
    """The responses with the policy's and the reference's log-probabilities and the policy's values.

    All by the training forward, so that the first ratio of an update is 1; or from the states of the responses, which
    are the same up to rounding, and must be of `policy`, as must their trunk. One that both policies share is computed
    once, and kept for the update.
    """
    fields = {f.name: getattr(responses, f.name) for f in dataclasses.fields(Responses)}
    if responses.trunk is None:
        fields["trunk"] = _trunk(policy, responses, micro_batch)
    texts = Responses(**fields)
    logprobs, values = _read(policy, texts, temperature, micro_batch)
    texts = replace(texts, states=None)  # the policy's alone, and only until it learns
    below = texts if policy.shares_trunk(reference) else replace(texts, trunk=None)
    ref_logprobs = logprobs if policy is reference else _read(reference, below, temperature, micro_batch)[0]
    read = dict(logprobs=logprobs, ref_logprobs=ref_logprobs, values=values)
    return Rollout(**texts.tensors(), **read, prompts=texts.prompts)


def _read(policy: PolicyWithValue, texts: Responses, temperature: float, micro_batch: int) -> tuple[Tensor, Tensor]:
    """Log-probabilities and values (B, T), in micro-batches of similar length."""
    logprobs = torch.zeros_like(texts.mask, dtype=torch.float32)
    values = torch.zeros_like(logprobs)
    for rows, part in micro_batches(texts, torch.arange(len(logprobs), device=logprobs.device), micro_batch):
        T = part.mask.shape[1]
        logprobs[rows, :T], values[rows, :T], _ = policy(part, temperature, entropies=False)
    return logprobs, values


def _trunk(policy: PolicyWithValue, texts: Responses, micro_batch: int) -> Tensor | None:
    parts = [policy.trunk(part) for part in texts.rows()[0].split(micro_batch)]
    return None if parts[0] is None else torch.cat(parts)


def response_texts(responses: Responses, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Each response as text, without EOS and padding."""
    return [tokenizer.decode(ids[keep].tolist()) for ids, keep in zip(responses.responses, responses.players)]
