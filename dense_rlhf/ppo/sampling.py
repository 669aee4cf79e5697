"""Prompts in batches, and responses sampled to them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

from dense_rlhf.config.params import PPOParams
from dense_rlhf.data import render
from dense_rlhf.models.policy import PolicyWithValue, allowed, position_ids
from dense_rlhf.types import InputError, Prompt, Responses

PREFILL = 16  # prompts of similar length read together
COMPACT = 0.75  # share of rows still being sampled at which those that have ended leave the batch


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: at most how many a response, and from which distribution."""

    max_new_tokens: int
    temperature: float  # divides the logits
    eos_id: int  # ends a response
    pad_id: int  # fills up after it, and is never drawn


def encode_prompts(prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase) -> tuple[Tensor, Tensor]:
    """Left-padded token ids (B, P) and their mask; nothing is cut. Raises `InputError` for a prompt of no tokens."""
    options = dict(add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt")
    batch = tokenizer([render(p, tokenizer) for p in prompts], **options)
    mask = batch["attention_mask"].bool()
    if mask.shape[1] == 0 or not bool(mask[:, -1].all()):
        empty = mask.any(-1).tolist().index(False)
        raise InputError(f"prompt {prompts[empty]!r} has no tokens, wanted at least one for a response to follow")
    return batch["input_ids"], mask


def prompt_batches(prompts: Sequence[Prompt], size: int, seed: int) -> Iterator[list[Prompt]]:
    """Endless batches of `size` prompts, each epoch in a fresh order, without those that do not fill a batch."""
    if len(prompts) < size:
        raise InputError(f"ppo.rollouts is {size}, but there are only {len(prompts)} training prompts; lower it")
    shuffler = random.Random(seed)
    while True:
        order = shuffler.sample(range(len(prompts)), len(prompts))
        for start in range(0, len(order) - size + 1, size):
            yield [prompts[i] for i in order[start : start + size]]


@torch.no_grad()
def sample(
    lm: PreTrainedModel, queries: Tensor, query_mask: Tensor, sampling: Sampling, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Sample from the full softmax: responses (B, T) padded after EOS, and their mask; T is `sampling.max_new_tokens`.

    No top-k or top-p, so the recomputed log-probabilities are the sampler's. Rows that have ended leave the batch.
    A CPU's generator serves every device.
    """
    T, pad_id = sampling.max_new_tokens, sampling.pad_id
    responses = torch.full((len(queries), T), pad_id, device=queries.device)
    rows, alive = torch.arange(len(queries), device=queries.device), torch.ones_like(query_mask[:, 0])
    (cache, logits), mask = _prefill(lm, queries, query_mask), query_mask
    for t in range(T):
        at = torch.rand(len(queries), 1, generator=generator, device=generator.device, dtype=torch.float64)
        at = at.to(queries.device)[rows]
        token = _draw(allowed(logits.float() / sampling.temperature, pad_id).softmax(-1), at)
        responses[rows, t] = token = torch.where(alive, token, pad_id)
        alive = alive & (token != sampling.eos_id)
        going = int(alive.sum())
        if not going or t == T - 1:
            break
        ids, mask = token[:, None], torch.cat([mask, torch.ones_like(mask[:, :1])], -1)
        if going <= COMPACT * len(rows):
            kept = alive.nonzero().squeeze(-1)
            cache.batch_select_indices(kept)
            ids, mask, rows, alive = ids[kept], mask[kept], rows[kept], alive[kept]
        logits = _read(lm, ids, mask, cache)
    return responses, until_eos(responses, sampling.eos_id)


def _read(lm: PreTrainedModel, ids: Tensor, mask: Tensor, cache: DynamicCache) -> Tensor:
    """Logits (B, V) after `ids`, which are added to the cache; `mask` covers both."""
    tokens = dict(attention_mask=mask.long(), position_ids=position_ids(mask)[:, -ids.shape[1] :])
    return lm(input_ids=ids, **tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]


def _prefill(lm: PreTrainedModel, queries: Tensor, query_mask: Tensor) -> tuple[DynamicCache, Tensor]:
    """Key-value cache of left-padded prompts, and logits (B, V) after them; read in groups of similar length."""
    lengths, whole = query_mask.sum(-1), DynamicCache(config=lm.config)
    if any(
        type(layer) is not DynamicLayer for layer in whole.layers
    ):  # sliding windows keep a part, which cannot be padded
        return whole, _read(lm, queries, query_mask, whole)
    order, caches, logits = lengths.argsort(), [], []
    for rows in order.split(PREFILL):
        P = int(lengths[rows].max())
        caches.append(DynamicCache(config=lm.config))
        logits.append(_read(lm, queries[rows, -P:], query_mask[rows, -P:], caches[-1]))
    for i, parts in enumerate(zip(*(cache.layers for cache in caches))):
        sides = [part.keys for part in parts], [part.values for part in parts]
        padded = (torch.cat([_left_padded(x, queries.shape[1]) for x in side]) for side in sides)
        whole.update(*(states[order.argsort()] for states in padded), i)
    return whole, torch.cat(logits)[order.argsort()]


def _left_padded(states: Tensor, width: int) -> Tensor:
    """Keys or values (B, heads, P, size) with zeros before them, (B, heads, width, size)."""
    return F.pad(states, (0, 0, width - states.shape[2], 0))


def _draw(probabilities: Tensor, at: Tensor) -> Tensor:
    """One index a row of (N, V), where the distribution function exceeds `at` (N, 1); a third of multinomial's time."""
    cdf = probabilities.double().cumsum(-1)
    return torch.searchsorted(cdf, at * cdf[:, -1:], right=True).squeeze(-1)  # right: never one of probability zero


def until_eos(responses: Tensor, eos_id: int) -> Tensor:
    """(B, T) bool: true through the first EOS of each row."""
    ended = (responses == eos_id).long()
    return (ended.cumsum(-1) - ended) == 0


def generate(
    lm: PreTrainedModel, queries: Tensor, query_mask: Tensor, sampling: Sampling, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """As `sample`, by transformers' own loop over a static cache, which it compiles on CUDA."""
    seed = int(torch.randint(2**31, (), generator=generator, device=generator.device))
    devices = [queries.device] if queries.is_cuda else []
    T, pad_id = sampling.max_new_tokens, sampling.pad_id
    ends = dict(eos_token_id=sampling.eos_id, pad_token_id=pad_id, suppress_tokens=[pad_id])
    softmax = dict(do_sample=True, temperature=sampling.temperature, top_k=0, top_p=1.0)
    own, lm.generation_config = lm.generation_config, GenerationConfig()  # its own may penalise or exclude tokens
    try:
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            mask, cache = query_mask.long(), "static"
            whole = lm.generate(
                queries, attention_mask=mask, max_new_tokens=T, cache_implementation=cache, **ends, **softmax
            )
    finally:
        lm.generation_config = own
    drawn = whole[:, queries.shape[1] :]
    responses = F.pad(drawn, (0, T - drawn.shape[1]), value=pad_id)
    return responses, until_eos(responses, sampling.eos_id)


def sample_responses(
    policy: PolicyWithValue,
    prompts: Sequence[Prompt],
    tokenizer: PreTrainedTokenizerBase,
    params: PPOParams,
    generator: torch.Generator,
) -> Responses:
    """A response of `policy` to each prompt, by `params.sampler`; its score is 0 until `scored`."""
    device = next(policy.parameters()).device
    queries, query_mask = (x.to(device) for x in encode_prompts(prompts, tokenizer))
    sampling = Sampling(params.max_new_tokens, params.temperature, tokenizer.eos_token_id, tokenizer.pad_token_id)
    responses, mask = SAMPLERS[params.sampler](policy.sampling_model(), queries, query_mask, sampling, generator)
    unscored, ended = torch.zeros(len(queries), device=device), (responses == sampling.eos_id).any(-1)
    return Responses(queries, query_mask, responses, mask, unscored, ended)


SAMPLERS = {"cache": sample, "generate": generate}
