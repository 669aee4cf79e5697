"""Sample responses, recompute their log-probabilities with the training forward, score them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from dense_rlhf.data import prompt_text
from dense_rlhf.models import PolicyWithValue, allowed, logprobs_values_entropy, position_ids
from dense_rlhf.reward_model import RewardModel
from dense_rlhf.types import InputError, Prompt, Rollout, players


def render(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> str:
    """A prompt as this policy wants it: dialogues through its chat template where it has one."""
    if isinstance(prompt, str) or not tokenizer.chat_template:
        return prompt_text(prompt)
    messages = [vars(message) for message in prompt]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def encode_prompts(prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase) -> tuple[Tensor, Tensor]:
    """Left-padded token ids (B, P) and their mask; nothing is cut."""
    batch = tokenizer(
        [render(p, tokenizer) for p in prompts], add_special_tokens=False, padding=True, padding_side="left",
        return_tensors="pt",
    )  # fmt: skip
    return batch["input_ids"], batch["attention_mask"].bool()


def prompt_batches(prompts: Sequence[Prompt], size: int, seed: int) -> Iterator[list[Prompt]]:
    """Endless batches of `size` prompts, each epoch in a fresh order; the few that fill no batch wait for the next."""
    if len(prompts) < size:
        raise InputError(f"ppo.rollouts is {size}, but there are only {len(prompts)} training prompts; lower it")
    shuffler = random.Random(seed)
    while True:
        order = shuffler.sample(range(len(prompts)), len(prompts))
        for start in range(0, len(order) - size + 1, size):
            yield [prompts[i] for i in order[start : start + size]]


@torch.no_grad()
def sample(
    lm: PreTrainedModel, queries: Tensor, query_mask: Tensor, T: int, temperature: float, eos_id: int, pad_id: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Sample at most T tokens a row from the full softmax: responses (B, T) padded after EOS, and their mask.

    Logits are divided by `temperature`; no top-k or top-p, so the recomputed log-probabilities are the sampler's.
    `pad_id` itself is never sampled.
    """
    mask, cache, ids = query_mask, DynamicCache(config=lm.config), queries
    responses = torch.full((len(queries), T), pad_id, device=queries.device)
    alive = torch.ones(len(queries), dtype=torch.bool, device=queries.device)
    for t in range(T):
        out = lm(
            input_ids=ids, attention_mask=mask.long(), position_ids=position_ids(mask)[:, -ids.shape[1] :],
            past_key_values=cache, use_cache=True, logits_to_keep=1,
        )  # fmt: skip
        probabilities = allowed(out.logits[:, -1].float() / temperature, pad_id).softmax(-1)
        token = _draw(probabilities, generator)
        responses[:, t] = torch.where(alive, token, pad_id)
        alive = alive & (token != eos_id)
        if not bool(alive.any()):
            break
        ids = torch.where(alive, token, pad_id)[:, None]
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], -1)
    ended = (responses == eos_id).long()
    return responses, (ended.cumsum(-1) - ended) == 0


def _draw(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """One index a row of (B, V) by inverting the distribution function; a third of multinomial's time."""
    cdf = probabilities.double().cumsum(-1)
    at = torch.rand(len(cdf), 1, generator=generator, device=cdf.device, dtype=torch.float64) * cdf[:, -1:]
    return torch.searchsorted(cdf, at, right=True).squeeze(-1)  # right: an entry of probability zero is never hit


@dataclass(frozen=True)
class Responses:
    """Scored responses, before any policy has been asked how likely they are."""

    queries: Tensor  # (B, P)
    query_mask: Tensor  # (B, P)
    responses: Tensor  # (B, T)
    mask: Tensor  # (B, T)
    scores: Tensor  # (B,)
    ended: Tensor  # (B,)

    @property
    def players(self) -> Tensor:
        """(B, T) bool: the response without its EOS."""
        return players(self.mask, self.ended)


def respond(
    policy: PolicyWithValue, reward_model: RewardModel, prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase,
    T: int, temperature: float, generator: torch.Generator,
) -> Responses:  # fmt: skip
    """Sample a response to each prompt and score it."""
    device = next(policy.parameters()).device
    queries, query_mask = (x.to(device) for x in encode_prompts(prompts, tokenizer))
    pad_id, eos_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    responses, mask = sample(policy.lm, queries, query_mask, T, temperature, eos_id, pad_id, generator)
    found = Responses(queries, query_mask, responses, mask, queries.new_zeros(len(queries), dtype=torch.float32),
                      (responses == eos_id).any(-1))  # fmt: skip
    return replace(found, scores=reward_model.score(reward_model.readings(found)))


@torch.no_grad()
def appraise(
    policy: PolicyWithValue, reference: PolicyWithValue, found: Responses, temperature: float, pad_id: int,
    micro_batch: int = 64,
) -> Rollout:  # fmt: skip
    """Log-probabilities of policy and reference and the policy's values, by the training forward."""
    ids = torch.cat([found.queries, found.responses], -1)
    whole = torch.cat([found.query_mask, found.mask], -1)

    def read(model: PolicyWithValue) -> tuple[Tensor, Tensor]:
        chunks = zip(ids.split(micro_batch), whole.split(micro_batch), found.mask.split(micro_batch))
        parts = [logprobs_values_entropy(model, *chunk, temperature, pad_id)[:2] for chunk in chunks]
        return tuple(torch.cat(part) for part in zip(*parts))

    logprobs, values = read(policy)
    ref_logprobs = logprobs if policy is reference else read(reference)[0]
    return Rollout(found.queries, found.query_mask, found.responses, found.mask, logprobs, ref_logprobs, values,
                   found.scores, found.ended)  # fmt: skip


def response_texts(rollout: Rollout, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Each response as text, without EOS and padding."""
    return [tokenizer.decode(ids[keep].tolist()) for ids, keep in zip(rollout.responses, rollout.players)]
