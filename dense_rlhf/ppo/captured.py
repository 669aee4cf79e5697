"""Sampling over a static cache, each decoding step one captured CUDA graph: a GPU then waits for no Python.

Graphs are captured when a size of batch is first met, in a fraction of a second, and replayed in all later updates.
On a CPU the same steps run as they are. No card has run this yet.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import StaticLayer

from dense_rlhf.ppo.decoding import Rule, Sampling, Step, keeps_all, prefill
from dense_rlhf.types import InputError

CAPTURED = ("llama", "mistral", "qwen2", "qwen3", "gpt2", "gpt_neox")  # that the tests compare with the plain loop
WINDOW = 64  # tokens by which the part of the cache that a step attends to grows
FEWEST = 8  # rows; a smaller batch takes no less time


class _Slots(StaticLayer):
    """A layer's keys and values (b, heads, L, size), written in place at the slot (1,) that all layers share."""

    def __init__(self, keys: Tensor, values: Tensor, slot: Tensor):
        super().__init__(keys.shape[2])
        self.keys, self.values, self.slot, self.is_initialized = keys, values, slot, True

    def update(self, keys: Tensor, values: Tensor, *_, **__) -> tuple[Tensor, Tensor]:
        self.keys.index_copy_(2, self.slot, keys)
        self.values.index_copy_(2, self.slot, values)
        return self.keys, self.values


class _Static:
    """What the steps of one model read and write, at addresses that stay, for at most B rows of L tokens.

    A step changes nothing that it reads but the slot that it fills, always with the same: it may be run again.
    """

    def __init__(self, lm: PreTrainedModel, cache: DynamicCache, shape: tuple[int, int], sampling: Sampling):
        (B, L), new = shape, partial(torch.zeros, device=lm.device)
        self.shape, self.sampling, self.weights = shape, sampling, _addresses(lm)
        self.rule = Rule(sampling, lm.device)
        size = lambda x: (B, x.shape[1], L, x.shape[3])  # noqa: E731
        self.layers = [tuple(x.new_zeros(size(x)) for x in (one.keys, one.values)) for one in cache.layers]
        self.ids, self.position, self.slot = (new(n, dtype=torch.long) for n in ((B, 1), (B, 1), (1,)))
        self.at, self.was_alive = new(B, 1, dtype=torch.float64), new(B, dtype=torch.bool)
        self.unseen = new(B, 1, 1, L, dtype=lm.dtype)  # added to attention's logits: 0 or -inf
        last, token, alive = new(B, lm.config.hidden_size, dtype=lm.dtype), new(B, dtype=torch.long), self.was_alive
        self.made = Step(last, token, alive.clone(), new((), dtype=torch.bool))
        self.graphs: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}

    def fits(self, lm: PreTrainedModel, shape: tuple[int, int], sampling: Sampling) -> bool:
        """Whether steps that were captured are those of this model, of these sizes and this distribution."""
        large = all(own >= wanted for own, wanted in zip(self.shape, shape))
        same = replace(sampling, max_new_tokens=self.sampling.max_new_tokens) == self.sampling
        return large and same and self.weights == _addresses(lm)

    def run(self, lm: PreTrainedModel, b: int, L: int) -> Step:
        """One step of the first b rows over the first L slots; its tensors are overwritten by the next."""
        if lm.device.type != "cuda":
            self.step(lm, b, L)
        else:
            if (b, L) not in self.graphs:
                self.graphs[b, L] = self._capture(lm, b, L)
            self.graphs[b, L].replay()
        return Step(*(x[:b] if x.dim() else x for x in self.made))

    def step(self, lm: PreTrainedModel, b: int, L: int) -> None:
        """Reads a token of each row and draws the next: nothing here may ask the device for a value."""
        cache = Cache(layers=[_Slots(keys[:b, :, :L], values[:b, :, :L], self.slot) for keys, values in self.layers])
        tokens = dict(attention_mask=self.unseen[:b, ..., :L], position_ids=self.position[:b])
        read = lm.base_model(input_ids=self.ids[:b], **tokens, past_key_values=cache, use_cache=True)
        made = self.rule.draw(lm, read.last_hidden_state[:, -1], self.at[:b], self.was_alive[:b])
        for kept, one in zip(self.made, made):
            (kept[:b] if kept.dim() else kept).copy_(one)

    def _capture(self, lm: PreTrainedModel, b: int, L: int) -> torch.cuda.CUDAGraph:
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(stream):
                for _ in range(2):  # libraries make their workspaces
                    self.step(lm, b, L)
            torch.cuda.current_stream().wait_stream(stream)
            pool = next(iter(self.graphs.values())).pool() if self.graphs else None  # one runs at a time
            with torch.cuda.graph(graph, pool=pool):
                self.step(lm, b, L)
        except RuntimeError as error:
            name = type(lm).__name__
            raise InputError(f"ppo.sampler: a step of {name} cannot be captured ({error}); take 'cache'") from error
        return graph


_STATIC: WeakKeyDictionary[PreTrainedModel, _Static] = WeakKeyDictionary()  # graphs outlive an update


def _addresses(lm: PreTrainedModel) -> tuple[int, ...]:
    return tuple(x.data_ptr() for x in (*lm.parameters(), *lm.buffers()))


class StaticDecoder:
    """As `DynamicDecoder`, over a cache of fixed size; rows that have ended leave when half of the batch has.

    Raises `InputError` for an architecture whose steps no test compares, and for layers that do not keep all tokens.
    """

    below = None  # a replayed graph calls no hook

    def __init__(self, lm: PreTrainedModel, queries: Tensor, query_mask: Tensor, sampling: Sampling):
        if lm.config.model_type not in CAPTURED or not keeps_all(lm):
            known = f"policy.name is a {lm.config.model_type}; wanted one of {', '.join(CAPTURED)}, without windows"
            raise InputError(f"ppo.sampler is 'captured', but {known}; take 'cache'")
        (self.b, self.length), self.lm = queries.shape, lm
        cache, self.last = prefill(lm, queries, query_mask, 0)
        shape = self.b, _rounded(self.length + sampling.max_new_tokens)
        static = _STATIC.get(lm)
        if static is None or not static.fits(lm, shape, sampling):
            if static is not None:
                shape = tuple(map(max, shape, static.shape))  # or batches of two kinds would capture in turns
            static = _STATIC[lm] = None  # its memory first
            static = _STATIC[lm] = _Static(lm, cache, shape, sampling)
        self.static = static
        for kept, read in zip(static.layers, cache.layers):
            for whole, states in zip(kept, (read.keys, read.values)):
                whole.zero_()  # what is not finite would show through a mask
                whole[: self.b, :, : self.length] = states
        static.unseen.fill_(-torch.inf)
        static.unseen[: self.b, 0, 0, : self.length].masked_fill_(query_mask, 0)
        static.position[: self.b, 0] = query_mask.sum(-1)

    def step(self, token: Tensor | None, at: Tensor, alive: Tensor) -> Step:
        static, b = self.static, self.b
        if token is None:
            return static.rule.draw(self.lm, self.last, at, alive)
        static.ids[:b, 0], static.at[:b], static.was_alive[:b] = token, at, alive
        static.slot.fill_(self.length)
        static.unseen[..., self.length] = 0
        self.length += 1
        made = static.run(self.lm, b, min(_rounded(self.length), static.shape[1]))
        static.position += 1
        return made._replace(alive=made.alive.clone())  # asked for once more, after the next step

    def leave(self, alive: Tensor, going: int) -> Tensor | None:
        fewer = self.b
        while fewer > FEWEST and going <= -(-fewer // 2):
            fewer = -(-fewer // 2)
        if fewer == self.b:
            return None
        kept, static, self.b = (~alive).long().argsort(stable=True)[:fewer], self.static, fewer
        for x in (*(x for layer in static.layers for x in layer), static.unseen, static.position):
            x[:fewer] = x[kept]
        return kept


def _rounded(length: int) -> int:
    return -(-length // WINDOW) * WINDOW
