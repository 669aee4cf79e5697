"""Responses sampled token by token: one loop over a decoder, which reads the last tokens and draws the next."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from dense_rlhf.models.policy import allowed, logits_after, position_ids, tempered
from dense_rlhf.types import InputError

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
    cut: int = 0  # blocks of the model that are frozen, whose states are kept where there are any


class Drawn(NamedTuple):
    """What was sampled."""

    responses: Tensor  # (B, T) token ids, padded after EOS
    mask: Tensor  # (B, T) bool, true through EOS
    states: Tensor | None  # (B, T, hidden), the model's last before each token, zero after EOS
    trunk: Tensor | None = None  # (B, P + T - 1, hidden) above the frozen blocks, in the columns of `Responses.rows`


class Step(NamedTuple):
    """One token of each of N rows."""

    last: Tensor  # (N, hidden) states from which it was drawn
    token: Tensor  # (N,) padding for rows that had ended
    alive: Tensor  # (N,) bool, rows that go on
    sound: Tensor  # () bool, all probabilities are finite


class Decoder(Protocol):
    """Rows of prompts and responses, all that was read of them, and what is drawn after it."""

    below: Below | None

    def step(self, token: Tensor | None, at: Tensor, alive: Tensor) -> Step:
        """Read the rows' last `token` (N,), None before the first, and draw the next at `at` (N, 1) in [0, 1)."""

    def leave(self, alive: Tensor, going: int) -> Tensor | None:
        """Drop rows that have ended, of which `going` have not: the rows that stay; None where all do."""


class DynamicDecoder:
    """Over a cache that grows; rows leave once a quarter has ended."""

    def __init__(self, lm: PreTrainedModel, queries: Tensor, query_mask: Tensor, sampling: Sampling):
        self.lm, self.mask, self.rule = lm, query_mask, Rule(sampling, queries.device)
        self.below = Below(lm, sampling, query_mask) if sampling.cut else None
        self.cache, self.last = prefill(lm, queries, query_mask, sampling.max_new_tokens, self.below)
        self.rows = torch.arange(len(queries), device=queries.device)

    def step(self, token: Tensor | None, at: Tensor, alive: Tensor) -> Step:
        if token is not None:
            with _keeping(self.below, self.rows, self.mask.sum(-1)):
                self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], -1)
                self.last = read(self.lm, token[:, None], self.mask, self.cache)
        return self.rule.draw(self.lm, self.last, at, alive)

    def leave(self, alive: Tensor, going: int) -> Tensor | None:
        if going > COMPACT * len(alive):
            return None
        kept = alive.nonzero().squeeze(-1)
        self.cache.batch_select_indices(kept)
        self.mask, self.rows = self.mask[kept], self.rows[kept]
        return kept


@torch.no_grad()
def sample(
    lm: PreTrainedModel,
    queries: Tensor,
    query_mask: Tensor,
    sampling: Sampling,
    generator: torch.Generator,
    decoder: type[Decoder] = DynamicDecoder,
) -> Drawn:
    """Sample from the full softmax, T = `sampling.max_new_tokens` tokens at most.

    No top-k or top-p, so the recomputed log-probabilities are the sampler's. Rows that have ended leave the batch.
    A CPU's generator serves every device. Raises `InputError` for logits that are not finite.
    """
    B, T, rows = len(queries), sampling.max_new_tokens, torch.arange(len(queries), device=queries.device)
    responses = torch.full((B, T), sampling.pad_id, device=queries.device)
    token, alive, states = None, torch.ones_like(query_mask[:, 0]), None
    decode = decoder(lm, queries, query_mask, sampling)
    for t in range(T):
        at = torch.rand(B, 1, generator=generator, device=generator.device, dtype=torch.float64)
        last, token, going, sound = decode.step(token, at.to(queries.device)[rows], alive)
        states = last.new_zeros(B, T, last.shape[-1]) if states is None else states
        states[rows, t], responses[rows, t] = torch.where(alive[:, None], last, 0), token
        alive = going
        number, sound = torch.stack([alive.sum(), sound]).tolist()
        if not sound:
            raise InputError(f"{NOT_FINITE} for token {t} of the responses; {LOOK_AT}")
        if not number or t == T - 1:
            break
        if (kept := decode.leave(alive, number)) is not None:
            token, rows, alive = token[kept], rows[kept], alive[kept]
    return Drawn(responses, until_eos(responses, sampling.eos_ids), states, decode.below and decode.below.states)


class Rule:
    """How a token is drawn from states, in operations on a device that read nothing back: a graph can capture them."""

    def __init__(self, sampling: Sampling, device: torch.device):
        self.temperature, self.pad_id = sampling.temperature, sampling.pad_id
        self.barred = torch.tensor([sampling.pad_id, *sampling.barred], device=device)
        self.ends = torch.tensor(sampling.eos_ids, device=device)

    def draw(self, lm: PreTrainedModel, last: Tensor, at: Tensor, alive: Tensor) -> Step:
        """A token after each of the states `last` (N, hidden), where the distribution function exceeds `at` (N, 1)."""
        logits = allowed(tempered(logits_after(lm, last), self.temperature), self.barred)
        cdf = logits.softmax(-1).cumsum(-1, dtype=torch.float64)  # a third of multinomial's time
        total = cdf[:, -1:]
        token = torch.searchsorted(cdf, at * total, right=True).squeeze(-1)  # right: none of probability zero
        token = token.masked_fill(~alive, self.pad_id)
        return Step(last, token, alive & (token[:, None] != self.ends).all(-1), total.isfinite().all())


def until_eos(responses: Tensor, eos_ids: Sequence[int]) -> Tensor:
    """(B, T) bool: true through the first EOS of each row."""
    ended = is_eos(responses, eos_ids).long()
    return (ended.cumsum(-1) - ended) == 0


def is_eos(responses: Tensor, eos_ids: Sequence[int]) -> Tensor:
    """Which of the token ids end a response, bool of the same shape."""
    return torch.isin(responses, torch.tensor(eos_ids, device=responses.device))


# ---------------------------------------------------------------------------------------------------- reading


def read(lm: PreTrainedModel, ids: Tensor, mask: Tensor, cache: DynamicCache) -> Tensor:
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


class Below:
    """States above the frozen blocks of all that a model reads while it samples: no pass need compute them again."""

    def __init__(self, lm: PreTrainedModel, sampling: Sampling, query_mask: Tensor):
        (B, P), hidden = query_mask.shape, lm.config.hidden_size
        self.block, self.width = lm.base_model.layers[sampling.cut], P + sampling.max_new_tokens - 1
        self.whole = torch.zeros(B, self.width + 1, hidden, dtype=lm.dtype, device=query_mask.device)

    @property
    def states(self) -> Tensor:
        """(B, P + T - 1, hidden), a row's from its first token on."""
        return self.whole[:, : self.width]

    @contextmanager
    def keeping(self, rows: Tensor, first: Tensor) -> Iterator[None]:
        """Keep what is read within of `rows` (n,), from the columns `first` (n,) on; before column 0 is padding."""

        def keep(_: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
            read = inputs[0] if inputs else named["hidden_states"]
            columns = first[:, None] + torch.arange(read.shape[1], device=rows.device)
            columns = columns.where(columns >= 0, self.width).clamp(max=self.width)  # the last takes what is padding
            self.whole[rows[:, None], columns] = read.to(self.whole.dtype)

        hook = self.block.register_forward_pre_hook(keep, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()


def _keeping(below: Below | None, rows: Tensor, first: Tensor) -> AbstractContextManager:
    return nullcontext() if below is None else below.keeping(rows, first)


def keeps_all(lm: PreTrainedModel) -> bool:
    """Whether every layer's cache keeps all tokens: sliding windows keep a part, which cannot be padded."""
    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=lm.config).layers)


def prefill(
    lm: PreTrainedModel, queries: Tensor, query_mask: Tensor, more: int, below: Below | None = None
) -> tuple[DynamicCache, Tensor]:
    """Key-value cache of left-padded prompts with room for `more` tokens, and states (B, hidden) after the prompts.

    They are read in groups of similar length.
    """
    lengths, whole = query_mask.sum(-1), DynamicCache(config=lm.config)
    order, caches, last = lengths.argsort(), [], []
    if not keeps_all(lm):
        with _keeping(below, torch.arange(len(queries), device=queries.device), lengths - queries.shape[1]):
            return whole, read(lm, queries, query_mask, whole)
    for rows in order.split(PREFILL):
        P = int(lengths[rows].max())
        caches.append(DynamicCache(config=lm.config))
        with _keeping(below, rows, lengths[rows] - P):
            last.append(read(lm, queries[rows, -P:], query_mask[rows, -P:], caches[-1]))
    for i, parts in enumerate(zip(*(cache.layers for cache in caches))):
        sides = [part.keys for part in parts], [part.values for part in parts]
        padded = (torch.cat([_left_padded(x, queries.shape[1]) for x in side]) for side in sides)
        whole.layers[i : i + 1] = [_Roomy(tuple(states[order.argsort()] for states in padded), more)]
    return whole, torch.cat(last)[order.argsort()]


def _left_padded(states: Tensor, width: int) -> Tensor:
    """Keys or values (B, heads, P, size) with zeros before them, (B, heads, width, size)."""
    return F.pad(states, (0, 0, width - states.shape[2], 0))
