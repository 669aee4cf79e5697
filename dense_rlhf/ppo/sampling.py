"""Prompts in batches, and responses sampled to them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

from dense_rlhf.config.params import PPOParams
from dense_rlhf.models.dialogue import messages_of, prompt_ids, turn_ends
from dense_rlhf.models.policy import PolicyWithValue, allowed, logits_after, position_ids, tempered
from dense_rlhf.models.reward_model import longest_text, padded
from dense_rlhf.types import InputError, Prompt, Responses

PREFILL = 16  # prompts of similar length read together
NOT_FINITE, LOOK_AT = "the policy's probabilities are not finite", "look at its weights, its dtype and ppo.temperature"
COMPACT = 0.75  # share of rows still being sampled at which those that have ended leave the batch


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: at most how many a response, and from which distribution."""

    max_new_tokens: int
    temperature: float  # divides the logits
    eos_ids: tuple[int, ...]  # each ends a response
    pad_id: int  # fills up after it, and is never drawn
    barred: tuple[int, ...] = ()  # never drawn either


class Drawn(NamedTuple):
    """What was sampled."""

    responses: Tensor  # (B, T) token ids, padded after EOS
    mask: Tensor  # (B, T) bool, true through EOS
    states: Tensor | None  # (B, T, hidden), the model's last before each token, zero after EOS


def encode_prompts(prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase) -> tuple[Tensor, Tensor]:
    """Left-padded token ids (B, P) and their mask; nothing is cut. Raises `InputError` as `prompt_ids` does."""
    ids = prompt_ids(prompts, tokenizer)
    if not ids:
        raise InputError("prompts is empty, wanted at least one")
    return padded(ids, tokenizer.pad_token_id or 0, torch.device("cpu"), left=True)


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
) -> Drawn:
    """Sample from the full softmax, T = `sampling.max_new_tokens` tokens at most.

    No top-k or top-p, so the recomputed log-probabilities are the sampler's. Rows that have ended leave the batch.
    A CPU's generator serves every device. Raises `InputError` for logits that are not finite.
    """
    T, pad_id, eos = sampling.max_new_tokens, sampling.pad_id, torch.tensor(sampling.eos_ids, device=queries.device)
    responses = torch.full((len(queries), T), pad_id, device=queries.device)
    rows, alive = torch.arange(len(queries), device=queries.device), torch.ones_like(query_mask[:, 0])
    (cache, last), mask = _prefill(lm, queries, query_mask, T), query_mask
    states = last.new_zeros(len(queries), T, last.shape[-1])
    for t in range(T):
        states[rows, t] = torch.where(alive[:, None], last, 0)
        at = torch.rand(len(queries), 1, generator=generator, device=generator.device, dtype=torch.float64)
        at = at.to(queries.device)[rows]
        logits = tempered(logits_after(lm, last), sampling.temperature)
        token, sound = _draw(allowed(logits, pad_id, *sampling.barred).softmax(-1), at)
        responses[rows, t] = token = torch.where(alive, token, pad_id)
        alive = alive & ~torch.isin(token, eos)
        going, sound = torch.stack([alive.sum(), sound]).tolist()
        if not sound:
            raise InputError(f"{NOT_FINITE} for token {t} of the responses; {LOOK_AT}")
        if not going or t == T - 1:
            break
        ids, mask = token[:, None], torch.cat([mask, torch.ones_like(mask[:, :1])], -1)
        if going <= COMPACT * len(rows):
            kept = alive.nonzero().squeeze(-1)
            cache.batch_select_indices(kept)
            ids, mask, rows, alive = ids[kept], mask[kept], rows[kept], alive[kept]
        last = _read(lm, ids, mask, cache)
    return Drawn(responses, until_eos(responses, sampling.eos_ids), states)


def _read(lm: PreTrainedModel, ids: Tensor, mask: Tensor, cache: DynamicCache) -> Tensor:
    """The last states (B, hidden) after `ids`, which are added to the cache; `mask` covers both."""
    tokens = dict(attention_mask=mask.long(), position_ids=position_ids(mask)[:, -ids.shape[1] :])
    return lm.base_model(input_ids=ids, **tokens, past_key_values=cache, use_cache=True).last_hidden_state[:, -1]


class _Roomy(DynamicLayer):
    """A layer's keys and values with room for those of more tokens: written in place, where all would be copied."""

    def __init__(self, states: tuple[Tensor, Tensor], more: int):
        super().__init__()
        self.lazy_initialization(*states)
        self.rooms = [F.pad(x, (0, 0, 0, more)) for x in states]
        self._show(states[0].shape[2])

    def _show(self, length: int) -> None:
        self.keys, self.values = (room[:, :, :length] for room in self.rooms)

    def update(self, keys: Tensor, values: Tensor, *_, **__) -> tuple[Tensor, Tensor]:
        start, more = self.keys.shape[2], keys.shape[2]
        for room, states in zip(self.rooms, (keys, values)):
            room.narrow(2, start, more).copy_(states)  # raises where there is no room
        self._show(start + more)
        return self.keys, self.values

    def batch_select_indices(self, kept: Tensor) -> None:
        self.rooms = [room[kept] for room in self.rooms]
        self._show(self.keys.shape[2])


def _prefill(lm: PreTrainedModel, queries: Tensor, query_mask: Tensor, more: int) -> tuple[DynamicCache, Tensor]:
    """Key-value cache of left-padded prompts with room for `more` tokens, and states (B, hidden) after the prompts.

    They are read in groups of similar length.
    """
    lengths, whole = query_mask.sum(-1), DynamicCache(config=lm.config)
    if any(
        type(layer) is not DynamicLayer for layer in whole.layers
    ):  # sliding windows keep a part, which cannot be padded
        return whole, _read(lm, queries, query_mask, whole)
    order, caches, last = lengths.argsort(), [], []
    for rows in order.split(PREFILL):
        P = int(lengths[rows].max())
        caches.append(DynamicCache(config=lm.config))
        last.append(_read(lm, queries[rows, -P:], query_mask[rows, -P:], caches[-1]))
    for i, parts in enumerate(zip(*(cache.layers for cache in caches))):
        sides = [part.keys for part in parts], [part.values for part in parts]
        padded = (torch.cat([_left_padded(x, queries.shape[1]) for x in side]) for side in sides)
        whole.layers[i : i + 1] = [_Roomy(tuple(states[order.argsort()] for states in padded), more)]
    return whole, torch.cat(last)[order.argsort()]


def _left_padded(states: Tensor, width: int) -> Tensor:
    """Keys or values (B, heads, P, size) with zeros before them, (B, heads, width, size)."""
    return F.pad(states, (0, 0, width - states.shape[2], 0))


def _draw(probabilities: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
    """One index a row of (N, V), where the distribution function exceeds `at` (N, 1), and whether all are finite.

    A third of multinomial's time.
    """
    cdf = probabilities.cumsum(-1, dtype=torch.float64)
    total = cdf[:, -1:]
    return torch.searchsorted(cdf, at * total, right=True).squeeze(-1), total.isfinite().all()  # right: none of zero


def until_eos(responses: Tensor, eos_ids: Sequence[int]) -> Tensor:
    """(B, T) bool: true through the first EOS of each row."""
    ended = _is_eos(responses, eos_ids).long()
    return (ended.cumsum(-1) - ended) == 0


def generate(
    lm: PreTrainedModel, queries: Tensor, query_mask: Tensor, sampling: Sampling, generator: torch.Generator
) -> Drawn:
    """As `sample`, by transformers' own loop over a static cache, which it compiles on CUDA; without states."""
    seed = int(torch.randint(2**31, (), generator=generator, device=generator.device))
    devices = [queries.device] if queries.is_cuda else []
    T, pad_id = sampling.max_new_tokens, sampling.pad_id
    ends = dict(eos_token_id=list(sampling.eos_ids), pad_token_id=pad_id, suppress_tokens=[pad_id, *sampling.barred])
    softmax = dict(do_sample=True, temperature=sampling.temperature, top_k=0, top_p=1.0)
    own, lm.generation_config = lm.generation_config, GenerationConfig()  # its own may penalise or exclude tokens
    try:
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            mask, cache = query_mask.long(), "static"
            whole = lm.generate(
                queries, attention_mask=mask, max_new_tokens=T, cache_implementation=cache, **ends, **softmax
            )
    except RuntimeError as error:
        if "probability tensor" not in str(error):
            raise
        raise InputError(f"{NOT_FINITE}; {LOOK_AT}") from error
    finally:
        lm.generation_config = own
    drawn = whole[:, queries.shape[1] :]
    responses = F.pad(drawn, (0, T - drawn.shape[1]), value=pad_id)
    return Drawn(responses, until_eos(responses, sampling.eos_ids), None)


def sampling_of(lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, params: PPOParams) -> Sampling:
    """How `params` sample from a model: a reply ends at every token that ends one for its own generation or template.

    Ids that no token has are barred: many models have more logits than tokens.
    """
    own = lm.generation_config.eos_token_id if lm.generation_config is not None else None
    eos = turn_ends(tokenizer) | ({*own} if isinstance(own, (list, tuple)) else {own}) - {None}
    if not eos:
        raise InputError("policy.name: neither its tokenizer nor its generation_config says which token ends a reply")
    if tokenizer.pad_token_id in eos:
        token = tokenizer.pad_token
        raise InputError(
            f"policy.name: its padding token {token!r} also ends a reply; give its tokenizer another pad_token"
        )
    ids = range(lm.config.get_text_config().vocab_size)
    barred = sorted({*ids} - {*tokenizer.get_vocab().values()}) if len(ids) > len(tokenizer) else ()
    return Sampling(
        params.max_new_tokens, params.temperature, tuple(sorted(eos)), tokenizer.pad_token_id, tuple(barred)
    )


def sample_responses(
    policy: PolicyWithValue,
    prompts: Sequence[Prompt],
    tokenizer: PreTrainedTokenizerBase,
    params: PPOParams,
    generator: torch.Generator,
) -> Responses:
    """A response of `policy` to each prompt, by `params.sampler`; its score is 0 until `scored`.

    Its states are kept where they are the training forward's.
    """
    device, lm = next(policy.parameters()).device, policy.sampling_model()
    queries, query_mask = (x.to(device) for x in encode_prompts(prompts, tokenizer))
    sampling, longest = sampling_of(lm, tokenizer, params), longest_text(lm)
    if queries.shape[1] + params.max_new_tokens > longest:
        asked = f"a prompt of {queries.shape[1]} tokens and ppo.max_new_tokens = {params.max_new_tokens}"
        raise InputError(f"{asked} are more than the policy's {longest}; lower data.max_prompt_chars or the tokens")
    drawn = SAMPLERS[params.sampler](lm, queries, query_mask, sampling, generator)
    unscored, ended = torch.zeros(len(queries), device=device), _is_eos(drawn.responses, sampling.eos_ids).any(-1)
    more = {"states": drawn.states if policy.samples_as_it_learns else None}
    more["prompts"] = tuple(map(messages_of, prompts))
    return Responses(queries, query_mask, drawn.responses, drawn.mask, unscored, ended, **more)


def _is_eos(responses: Tensor, eos_ids: Sequence[int]) -> Tensor:
    return torch.isin(responses, torch.tensor(eos_ids, device=responses.device))


SAMPLERS = {"cache": sample, "generate": generate}
