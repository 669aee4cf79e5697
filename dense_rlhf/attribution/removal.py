"""Additive explanations by removal: score the coalitions of all sources together, then a linear map for each source."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dense_rlhf.attribution.coalitions import distinct
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
    """The designs of all sources on common coalitions; without players, only the empty coalition."""
    if k == 0:
        return Plan(np.zeros((1, 0), bool), {}, {name: int(name == sources[0][0]) for name, _ in sources})
    designs = {name: source.design(k, params) for name, source in sources}
    masks, rows = distinct({name: design.masks.numpy() for name, design in designs.items()})
    uses = {name: (torch.tensor(rows[name]), design.operator) for name, design in designs.items()}
    reached = np.maximum.accumulate([max(numbers) + 1 for numbers in rows.values()])
    return Plan(masks, uses, dict(zip(rows, np.diff(reached, prepend=0).tolist())))


def player_groups(reward_model: RewardModel, reading: Reading, players: str) -> np.ndarray:
    """The player that each token of a reading belongs to (n,), numbered from 0."""
    if players == "tokens":
        return np.arange(len(reading.response))
    spans = token_spans(reward_model.tokenizer, reading.response)
    return np.array(groups(spans, cut(reward_model.tokenizer.decode(list(reading.response)), players)), dtype=int)


class Explained(NamedTuple):
    """The credit that one source gives the tokens of N readings."""

    credits: list[Tensor]  # (n_i,) for each reading's tokens, float64
    baseline: Tensor  # (N,) the scores without any response token
    evaluations: int  # for all readings, beyond those shared with sources before it
    scores: Tensor | None = None  # (N,) of the whole responses


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
    masks = [plan.masks[:, group] for plan, group in zip(plans, groups)]
    values = coalition_scores(reward_model, readings, masks, params.removal, progress)
    baseline = torch.stack([scores[0] for scores in values])
    whole = torch.stack([scores[min(1, len(scores) - 1)] for scores in values])  # the empty one, without players
    explained = {}
    for name in sources:
        credits = [_credit(plan, name, scores.double(), group) for plan, scores, group in zip(plans, values, groups)]
        explained[name] = Explained(credits, baseline, sum(plan.added[name] for plan in plans), whole)
    return explained


def explain_by_removal(
    reward_model: RewardModel,
    rollout: Rollout,
    sources: dict[str, Designed],
    params: AttributionParams,
    progress: Callable = iter,
) -> dict[str, Attribution]:
    """An attribution of a rollout by each source; the seconds are divided as the evaluations are."""
    start = time.perf_counter()
    readings = reward_model.readings(rollout)
    groups = [player_groups(reward_model, reading, params.players) for reading in readings]
    explained = explain_readings(reward_model, readings, groups, sources, params, progress)
    done = {name: in_score_units(name, rollout, readings, explained[name], sources[name].complete) for name in sources}
    total = max(sum(one.evaluations for one in explained.values()), 1)
    seconds = time.perf_counter() - start
    return {name: replace(one, seconds=seconds * explained[name].evaluations / total) for name, one in done.items()}


def _credit(plan: Plan, source: str, scores: Tensor, group: np.ndarray) -> Tensor:
    """Credit of a reading's tokens (n,) from the scores of its coalitions (m,): phi = A y, shared within a player."""
    if not len(group):
        return scores[:0]
    rows, operator = plan.uses[source]
    phi = operator.to(scores.device) @ scores[rows.to(scores.device)]
    player = torch.from_numpy(group).to(scores.device)
    return (phi / player.bincount())[player]


def in_score_units(
    source: str, rollout: Rollout, readings: Sequence[Reading], explained: Explained, complete: bool = False
) -> Attribution:
    """The readings' credit on the policy's tokens, and the gap = score - baseline - sum of credit."""
    credit, baseline = on_policy_tokens(rollout, readings, explained.credits), explained.baseline.to(rollout.scores)
    gap = rollout.scores - baseline - credit.sum(-1)
    return Attribution(source, credit, baseline, gap, explained.evaluations / len(readings), 0.0, complete)


def on_policy_tokens(rollout: Rollout, readings: Sequence[Reading], credits: Sequence[Tensor]) -> Tensor:
    """Credit of each reading's tokens (n_i,) on the policy's tokens: (B, T), zero elsewhere, same totals."""
    credit = torch.zeros(rollout.mask.shape, dtype=rollout.scores.dtype, device=rollout.scores.device)
    for row, (reading, values) in enumerate(zip(readings, credits)):
        if reading.spread is not None:
            values = values.double() @ reading.spread.to(values.device)
        credit[row, rollout.players[row]] = values.to(credit)
    return credit
