"""Additive explanations by removal: score the coalitions of all sources at once, then one linear map for each."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dense_rlhf.attribution.engine import coalition_scores
from dense_rlhf.config.params import AttributionParams
from dense_rlhf.models.reward_model import RewardModel
from dense_rlhf.models.text_spans import cut, groups, token_spans
from dense_rlhf.types import Attribution, Reading, Rollout

if TYPE_CHECKING:
    from dense_rlhf.attribution.kinds import Designed


@dataclass(frozen=True)
class Plan:
    """The coalitions of k players that all sources need, each once, the empty one first."""

    masks: np.ndarray  # (m, k) bool
    uses: dict[str, tuple[Tensor, Tensor]]  # source -> its rows of `masks` (n,), and operator (k, n)
    added: dict[str, int]  # source -> coalitions that no source before it needs


@lru_cache(maxsize=512)
def plan(k: int, sources: tuple[tuple[str, Designed], ...], params: AttributionParams) -> Plan:
    """Designs of all sources on common coalitions; a response without players has its score alone."""
    if k == 0:
        return Plan(np.zeros((1, 0), bool), {}, {name: int(name == sources[0][0]) for name, _ in sources})
    numbers: dict[bytes, int] = {}
    uses, added, masks = {}, {}, []
    for name, source in sources:
        design, before = source.design(k, params), len(numbers)
        rows = []
        for mask in design.masks.numpy():
            rows.append(numbers.setdefault(mask.tobytes(), len(numbers)))
            if rows[-1] == len(masks):
                masks.append(mask)
        uses[name] = torch.tensor(rows), design.operator
        added[name] = len(numbers) - before
    return Plan(np.stack(masks), uses, added)


def player_groups(reward_model: RewardModel, reading: Reading, players: str) -> np.ndarray:
    """The player that each token of a reading belongs to (n,), numbered from 0."""
    if players == "tokens":
        return np.arange(len(reading.response))
    spans = token_spans(reward_model.tokenizer, reading.response)
    return np.array(groups(spans, cut(reward_model.tokenizer.decode(list(reading.response)), players)), dtype=int)


class Explained(NamedTuple):
    """What one source says of N readings."""

    credits: list[Tensor]  # (n_i,) of each reading's tokens, float64
    baseline: Tensor  # (N,) the scores without any response token
    scores: Tensor  # (N,) of the whole responses
    evaluations: int  # of all readings, beyond those shared with sources before it


def explain_readings(
    reward_model: RewardModel,
    readings: Sequence[Reading],
    groups: Sequence[np.ndarray],
    sources: dict[str, Designed],
    params: AttributionParams,
    progress: Callable = iter,
) -> dict[str, Explained]:
    """Explain readings whose tokens belong to the players `groups[i]` (n_i,), numbered from 0, by each source.

    A player's credit is spread evenly over its tokens. Coalitions that several sources need are scored once and
    counted for the first of them.
    """
    named = tuple(sources.items())
    plans = [plan(int(group.max(initial=-1)) + 1, named, params) for group in groups]
    masks = [one.masks[:, group] for one, group in zip(plans, groups)]
    values = coalition_scores(reward_model, readings, masks, params.removal, progress)
    baseline = torch.stack([found[0] for found in values])
    scores = torch.stack([found[min(1, len(found) - 1)] for found in values])  # without players, the empty one is all
    done = {}
    for name in sources:
        credits = [_credit(one, name, found.double(), group) for one, found, group in zip(plans, values, groups)]
        done[name] = Explained(credits, baseline, scores, sum(one.added[name] for one in plans))
    return done


def explain_by_removal(
    reward_model: RewardModel,
    rollout: Rollout,
    sources: dict[str, Designed],
    params: AttributionParams,
    progress: Callable = iter,
) -> dict[str, Attribution]:
    """An attribution of a rollout for each source; seconds are divided as evaluations are."""
    start = time.perf_counter()
    readings = reward_model.readings(rollout)
    of = [player_groups(reward_model, reading, params.players) for reading in readings]
    found = explain_readings(reward_model, readings, of, sources, params, progress)
    total, done = max(sum(one.evaluations for one in found.values()), 1), {}
    for name, one in found.items():
        credit = on_policy_tokens(rollout, readings, one.credits)
        baseline = one.baseline.to(rollout.scores)
        gap = rollout.scores - baseline - credit.sum(-1)
        done[name] = Attribution(
            name, credit, baseline, gap, one.evaluations / len(readings), 0.0, sources[name].complete
        )
    seconds = time.perf_counter() - start
    return {name: replace(one, seconds=seconds * found[name].evaluations / total) for name, one in done.items()}


def _credit(plan: Plan, source: str, scores: Tensor, group: np.ndarray) -> Tensor:
    """Credit of a reading's tokens (n,)."""
    if not len(group):
        return scores[:0]
    rows, operator = plan.uses[source]
    phi = operator.to(scores.device) @ scores[rows.to(scores.device)]
    of = torch.from_numpy(group).to(scores.device)
    return (phi / of.bincount())[of]


def on_policy_tokens(rollout: Rollout, readings: list[Reading], credits: list[Tensor]) -> Tensor:
    """Credit of each reading's tokens (n_i,) on the policy's tokens: (B, T), zero elsewhere, same totals."""
    credit = torch.zeros(rollout.mask.shape, dtype=rollout.scores.dtype, device=rollout.scores.device)
    for row, (reading, values) in enumerate(zip(readings, credits)):
        if reading.spread is not None:
            values = values.double() @ reading.spread.to(values.device)
        credit[row, rollout.players[row]] = values.to(credit)
    return credit
