"""Scores of many coalitions of many responses, exact and cheap.

Each prompt is computed once and its key-value cache kept; coalitions that share a prefix share its states
(`packing`); the last layer runs only where a score is read. Other models score each coalition as a text of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from dense_rlhf.attribution.packing import Pack, pack
from dense_rlhf.models.language_models import within_memory
from dense_rlhf.models.reward_model import RewardModel, batches, pad_id_of, padded
from dense_rlhf.types import InputError, Reading, check_removal

PACKED = ("llama", "mistral", "qwen2", "qwen3")  # decoders that the tests compare with their own forward and attention


def is_packed(reward_model: RewardModel, readings: Sequence[Reading], removal: str = "drop") -> bool:
    """Whether coalitions share prefixes: a tested decoder that sees the whole text, with the same end after each.

    An end of padding alone is passed over. Each coalition is then read at its own last token, which must not be padding
    nor hidden, and be there: the prompt's at least.
    """
    model = reward_model.model
    if model.config.model_type not in PACKED or not reward_model.has_head:
        return False
    longest = max((len(reward_model.whole(reading)) for reading in readings), default=0)
    window, pad = getattr(model.config, "sliding_window", None), pad_id_of(model)
    ends = {_end(reward_model, reading) for reading in readings}
    if len(ends) != 1 or (window and window < longest):
        return False
    at_last = all(one.prompt and pad not in (one.prompt[-1], *one.response) for one in readings)
    return ends != {()} or (at_last and removal == "drop")


def _end(reward_model: RewardModel, reading: Reading) -> tuple[int, ...]:
    """The suffix as far as it is read: a model passes over what it takes for padding."""
    suffix, pad = reward_model.suffix_of(reading), pad_id_of(reward_model.model)
    return suffix[: max((n + 1 for n, token in enumerate(suffix) if token != pad), default=0)]


class _Questions(NamedTuple):
    """Coalitions to score, and how their absent tokens are removed."""

    readings: Sequence[Reading]
    masks: Sequence[np.ndarray]  # (m_i, k_i) bool for each reading
    kind: str  # drop, attention_mask or replace
    replacement: int  # token id
    starts: np.ndarray  # (N + 1,) the first coalition of each reading, of all


@within_memory("coalitions are scored", "reward.token_budget")
def coalition_scores(
    reward_model: RewardModel,
    readings: Sequence[Reading],
    masks: Sequence[np.ndarray],
    removal: str = "drop",
    progress: Callable = iter,
) -> list[Tensor]:
    """Scores (m_i,) of each reading under its coalitions `masks[i]` (m_i, k_i) of bool over its response's tokens.

    `removal`: `drop` closes the gap, `attention_mask` hides the token and keeps positions, `replace:TOKEN` writes
    another token. The prompt and the suffix always stay. Memory is bounded by the model's token budget, whatever the
    batch. `progress` wraps the list of batches and may raise to cancel. Raises `InputError` where masks do not fit,
    for an unknown removal, and where a score is not finite.
    """
    for row, (reading, mask) in enumerate(zip(readings, masks, strict=True)):
        if mask.dtype != bool or mask.ndim != 2 or mask.shape[1] != len(reading.response):
            raise InputError(f"masks[{row}] is {mask.dtype} {mask.shape}, wanted bool (m, {len(reading.response)})")
    check_removal(removal)
    kind, _, token = removal.partition(":")
    replacement = _token_id(reward_model, token) if kind == "replace" else -1
    starts = np.cumsum([0, *map(len, masks)])
    outputs = torch.empty(starts[-1], device=reward_model.model.device, dtype=reward_model.dtype)
    score = _packed if is_packed(reward_model, readings, kind) else _plain
    for places, values in score(reward_model, _Questions(readings, masks, kind, replacement, starts), progress):
        outputs[torch.as_tensor(places, device=outputs.device)] = values.to(outputs.dtype)
    scores = reward_model.calibrate(outputs)
    if not bool(scores.isfinite().all()):
        bad = int((~scores.isfinite()).nonzero()[0])
        raise InputError(
            f"the reward model gave {scores[bad].item()} for a coalition of response "
            f"{np.searchsorted(starts, bad, 'right') - 1}; look at its weights and dtype"
        )
    return list(scores.tensor_split(starts[1:-1].tolist())) if len(masks) else []


def _plain(reward_model: RewardModel, asked: _Questions, progress: Callable) -> Iterator[tuple[np.ndarray, Tensor]]:
    """Every coalition as a sequence of its own: where each output belongs, and the outputs."""
    for start, reading, mask in progress(list(zip(asked.starts, asked.readings, asked.masks))):
        whole = np.array(reward_model.whole(reading), dtype=int)
        keep = np.ones((len(mask), len(whole)), bool)
        keep[:, len(reading.prompt) :][:, : mask.shape[1]] = mask
        rows, attended, segments = whole[None].repeat(len(mask), 0), None, None
        if asked.kind == "drop":
            rows = [whole[kept] for kept in keep]
        elif asked.kind == "replace":
            rows = np.where(keep, rows, asked.replacement)
        else:
            attended = keep
        if reading.segments:
            kinds = np.array(reading.segments)
            segments = [kinds[kept] for kept in keep] if asked.kind == "drop" else [kinds] * len(mask)
        yield start + np.arange(len(mask)), reward_model.read_whole(rows, attended, segments)


def _token_id(reward_model: RewardModel, token: str) -> int:
    ids = reward_model.tokenizer(token, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise InputError(f"removal 'replace:{token}' is {len(ids)} tokens of the reward model, wanted exactly one")
    return ids[0]


# ---------------------------------------------------------------------------------------------------- packed


class _Keep:
    """In place of a layer's cache: keeps the keys and values, and ends the layer there."""

    class Done(Exception):
        pass

    def __init__(self, cache):
        self.cache = cache

    def update(self, keys, values, layer, *_, **__):
        self.kept = self.cache.update(keys, values, layer)
        raise self.Done


class _Give:
    """In place of a layer's cache: answers with keys and values that were kept."""

    def __init__(self, kept):
        self.kept = kept

    def update(self, *_, **__):
        return self.kept


@contextmanager
def reading_only(model: PreTrainedModel, read: Tensor) -> Iterator[None]:
    """Run the last layer for the positions `read` (B, r) only: the model's last hidden state is then (B, r, H).

    Keys and values are computed at all positions, the rest of the layer at `read`. Any decoder whose layers take
    position embeddings and a cache.
    """
    layer = model.base_model.layers[-1]
    forward = layer.forward

    def narrow(hidden: Tensor, attention_mask=None, position_embeddings=None, past_key_values=None, **options):
        keep = _Keep(past_key_values)
        options |= {"attention_mask": attention_mask, "position_embeddings": position_embeddings}
        with suppress(_Keep.Done):
            forward(hidden, **options | {"past_key_values": keep})
        if not read.shape[1]:
            return hidden[:, :0]
        rows = torch.arange(len(read), device=read.device)[:, None]
        turned = tuple(x.expand(len(read), -1, -1)[rows, read] for x in position_embeddings)
        options |= {"attention_mask": attention_mask[rows, 0, read][:, None], "position_embeddings": turned}
        return forward(hidden[rows, read], **options | {"past_key_values": _Give(keep.kept)})

    layer.forward = narrow
    try:
        yield
    finally:
        del layer.forward


class _Prompts(NamedTuple):
    """Prompts computed together: their keys and values in each layer, and which positions are real (R, P)."""

    layers: list[tuple[Tensor, Tensor]]
    real: Tensor


class _Batch(NamedTuple):
    """Packs computed together, padded to N nodes; arrays of the fields of `Pack`."""

    ids: np.ndarray  # (b, N)
    position: np.ndarray  # (b, N)
    column: np.ndarray  # (b, N)
    owner: np.ndarray  # (b, N)
    path: np.ndarray  # (b, r, width)
    read: np.ndarray  # (b, r)
    valid: np.ndarray  # (b, r) bool
    places: np.ndarray  # where the valid outputs belong


def _packed(reward_model: RewardModel, asked: _Questions, progress: Callable) -> Iterator[tuple[np.ndarray, Tensor]]:
    """Shared prefixes once, batch by batch: where each output belongs, and the outputs."""
    model, suffix = reward_model.model, _end(reward_model, asked.readings[0])
    if not suffix:  # the prompt's last token is read in place of an end that is always there
        readings = [Reading(one.prompt[:-1], (one.prompt[-1], *one.response)) for one in asked.readings]
        masks = [np.pad(mask, ((0, 0), (1, 0)), constant_values=True) for mask in asked.masks]
        asked = asked._replace(readings=readings, masks=masks)
    readings = asked.readings
    width = model.config.hidden_size  # larger packs share more and cost more attention, least for wide models
    packs = [pack(mask, len(suffix), asked.kind, max(width, 128 + 2 * mask.shape[1])) for mask in asked.masks]
    jobs = []
    for group in batches([len(reading.prompt) for reading in readings], reward_model.budget):
        items, longest = [(i, one) for i in group for one in packs[i]], len(readings[group[-1]].prompt)
        parts = batches([longest + len(one) for _, one in items], reward_model.budget)  # prompts and nodes together
        jobs += [(group, [items[n] for n in part]) for part in parts]
    current = prompts = None
    for group, items in progress(jobs):
        if group is not current:
            current, prompts = group, _read_prompts(model, [readings[i].prompt for i in group])
            row_of = {i: row for row, i in enumerate(group)}
        batch = _collate(items, asked, suffix)
        yield batch.places, _score(reward_model, prompts, [row_of[i] for i, _ in items], batch)


def _collate(items: list[tuple[int, Pack]], asked: _Questions, suffix: tuple[int, ...]) -> _Batch:
    """Packs, each with the number of its reading, as padded arrays."""
    b, N, (r, width) = len(items), max(len(one) for _, one in items), np.max([one.path.shape for _, one in items], 0)
    nodes = np.zeros((4, b, N), int)
    batch = _Batch(
        *nodes,
        np.full((b, r, width), -1),
        np.zeros((b, r), int),
        np.zeros((b, r), bool),
        np.concatenate([asked.starts[i] + one.coalition for i, one in items]),
    )
    for row, (i, one) in enumerate(items):
        n, (m, columns) = len(one), one.path.shape
        tokens = np.array([*asked.readings[i].response, *suffix], dtype=int)[one.column]
        nodes[:, row, :n] = np.where(one.absent, asked.replacement, tokens), one.position, one.column, one.owner
        batch.path[row, :m, :columns] = one.path
        batch.read[row, :m], batch.valid[row, :m] = one.read, True
    return batch


def visible(path: Tensor, owner: Tensor, column: Tensor) -> Tensor:
    """Which nodes each node of packs sees, (b, N, N) bool: itself and its ancestors. Arguments as in `Pack`, batched.

    Made only when it is used, as it alone grows with N^2.
    """
    b, N = owner.shape
    past = path.gather(1, owner[..., None].expand(-1, -1, path.shape[-1]))
    later = torch.arange(path.shape[-1], device=path.device) > column[..., None]
    past.masked_fill_(later | (past < 0), N)  # all that it does not see goes to one extra column
    sees = torch.zeros(b, N, N + 1, dtype=torch.bool, device=path.device).scatter_(-1, past, True)[..., :N]
    sees.diagonal(dim1=1, dim2=2).fill_(True)  # padding sees itself, so that its softmax is not empty
    return sees


@torch.no_grad()
def _read_prompts(model: PreTrainedModel, prompts: Sequence[tuple[int, ...]]) -> _Prompts:
    ids, real = padded(prompts, 0, model.device, left=True)
    cache, P = DynamicCache(), ids.shape[1]
    if P:
        square = torch.ones(P, P, dtype=torch.bool, device=ids.device)
        seen = square.tril() & real[:, None] | square.tril().triu()  # padding sees itself
        with reading_only(model, ids[:, :0]):
            _trunk(model, ids, seen, (real.cumsum(-1) - 1).clamp(min=0), cache)
    return _Prompts([(layer.keys, layer.values) for layer in cache.layers if P], real)


@torch.no_grad()
def _score(reward_model: RewardModel, prompts: _Prompts, rows: list[int], batch: _Batch) -> Tensor:
    """Raw outputs of the valid reads of one batch whose packs follow the prompts `rows`."""
    model, cache = reward_model.model, DynamicCache()
    device = model.device
    rows = torch.tensor(rows, device=device)
    for number, (keys, values) in enumerate(prompts.layers):
        cache.update(keys[rows], values[rows], number)
    ids, position, column, owner, path, read, valid = (torch.from_numpy(x).to(device) for x in batch[:7])
    real = prompts.real[rows]
    seen = torch.cat([real[:, None].expand(-1, ids.shape[1], -1), visible(path, owner, column)], -1)
    with reading_only(model, read):
        hidden = _trunk(model, ids, seen, position + real.sum(-1, keepdim=True), cache)
    return model.score(hidden[valid])[..., reward_model.output]


def _trunk(model: PreTrainedModel, ids: Tensor, seen: Tensor, position: Tensor, cache: DynamicCache) -> Tensor:
    """Last hidden state of tokens (b, N), which see P cached ones and each other where `seen` (b, N, P + N)."""
    bias = torch.zeros(seen.shape, device=ids.device, dtype=model.dtype).masked_fill_(~seen, -torch.inf)
    return model.base_model(
        input_ids=ids, attention_mask=bias[:, None], position_ids=position, past_key_values=cache, use_cache=True
    ).last_hidden_state
