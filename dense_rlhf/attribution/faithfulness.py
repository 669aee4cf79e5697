"""How faithful each source of credit is to the reward model, whose scores of other coalitions put it to the test.

Every measure is one number a response, NaN where undefined, so that intervals can resample responses. Numbers "in
score units" are in standard deviations of the reference policy's scores, to which reward models are calibrated;
none is divided by a response's own f(full) - f(empty), which may be zero.

A player's *support* is its credit times `sign`, the sign of f(full) - f(empty), and curves are `sign` times scores. So
"most supporting first" asks of every response what ERASER asks of the predicted class. A share (attention, terminal,
the controls) has no sign: its weights are its support.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from scipy.stats import kendalltau

from dense_rlhf.attribution.agreement import rank_agreement, varied
from dense_rlhf.attribution.coalitions import distinct
from dense_rlhf.attribution.engine import coalition_scores
from dense_rlhf.attribution.removal import player_groups
from dense_rlhf.config.params import AttributionParams
from dense_rlhf.models.reward_model import RewardModel
from dense_rlhf.shaping.masked import effective_share, masked_softmax
from dense_rlhf.types import Attribution, InputError, Reading, Rollout

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

RANDOM = "random order"  # the control of the curves, listed with the sources
STEPS = 10  # of the curves: 10, 20 .. 100 % of the players
MEASURES = {
    "surrogate_r2": "R² of the credits' sum on fresh coalitions",
    "surrogate_correlation": "correlation of the credits' sum with the score on fresh coalitions",
    "surrogate_beyond_size": "the same, given how many tokens are there",
    "infidelity": "squared error of what is removed (score units²; lower is better)",
    "comprehensiveness": "what removing the most supporting tokens loses (score units)",
    "sufficiency": "what the most supporting tokens alone lack (score units; lower is better)",
    "deletion": "area under deletion, below a random order's (score units)",
    "insertion": "area under insertion, above a random order's (score units)",
    "leave_one_out_tau": "Kendall's tau with leaving one out",
    "gap": "what credit leaves unexplained (score units; lower is better)",
    "relative_gap": "the same, over |score - baseline| (lower is better)",
    "evenness": "ESS/T after the paper's softmax (1 is even)",
}


@dataclass(frozen=True)
class Draws:
    """The random coalitions that a response's sources are tested on."""

    seed: int = 0
    fresh: int = 64  # random coalitions
    orders: int = 4  # random orders, whose mean curve is the control

    def __post_init__(self):
        if self.fresh < 2 or self.orders < 1:
            given = f"fresh is {self.fresh} and orders {self.orders}"
            raise InputError(f"{given}, wanted at least 2 and 1; take some 64 and 4")


# ---------------------------------------------------------------------------------------------------- coalitions


def fresh_coalitions(k: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` random coalitions (count, k) of k > 1 players, neither empty nor full: size uniform, then subset uniform.

    Independent of every design, though below some 8 players a design has seen most coalitions.
    """
    return rng.random((count, k)).argsort(1) < rng.integers(1, k, count)[:, None]


def removal_path(support: np.ndarray, ties: np.ndarray) -> np.ndarray:
    """Coalitions (2, STEPS + 1, k) left by deleting, and built by inserting, the most supporting players first.

    Step j has moved ceil(k j / STEPS) of them. `ties` (k,) orders those of equal support.
    """
    k = len(support)
    rank = np.argsort(np.lexsort([ties, -support]))
    moved = rank < path_counts(k)[:, None]
    return np.stack([~moved, moved])


def path_counts(k: int) -> np.ndarray:
    """How many players each step has moved, (STEPS + 1,)."""
    return -(-k * np.arange(STEPS + 1) // STEPS)


# ---------------------------------------------------------------------------------------------------- measures


def surrogate_r2(predicted: np.ndarray, scores: np.ndarray) -> float:
    """1 - mean (y - yhat)² / var y over coalitions, yhat = baseline + credit of the players present.

    At most 1; 0 is as good as the mean of y; unbounded below, so take medians. Compare with `uniform`, which knows how
    many tokens are present. NaN where scores are all equal, or credit is not in score units.
    """
    return float(1 - np.mean((scores - predicted) ** 2) / scores.var()) if varied(scores) else np.nan


def surrogate_correlation(predicted: np.ndarray, scores: np.ndarray) -> float:
    """Pearson correlation of the credit present with the score; its square is R² after the best affine fit.

    Compares sources in any unit and keeps the sign. Chance is not 0: the number of tokens present predicts much of the
    score, and an even spread knows it. NaN where either is constant.
    """
    return float(np.corrcoef(predicted, scores)[0, 1]) if varied(predicted) and varied(scores) else np.nan


def surrogate_beyond_size(predicted: np.ndarray, scores: np.ndarray, sizes: np.ndarray) -> float:
    """The same correlation, partial given the number of tokens present: 0 by chance, NaN for an even spread."""
    size, *both = (x - x.mean() for x in (sizes, predicted, scores))
    rest = [x - size * (size @ x) / (size @ size or 1.0) for x in both]
    varies = all(np.abs(r).max() > 1e-5 * np.abs(x).max() for r, x in zip(rest, both))
    return surrogate_correlation(*rest) if varies else np.nan


def infidelity(removed: np.ndarray, lost: np.ndarray) -> float:
    """E (sum of credit of removed players - (f(full) - f(S)))², Yeh et al., 2019, with removal as perturbation."""
    return float(np.mean((removed - lost) ** 2))


def aopc(full: float, curve: np.ndarray) -> float:
    """Mean of f(full) - f(x') over q = 10 .. 100 % of the players, ceil(q k) of them (DeYoung et al., 2020).

    Comprehensiveness where x' lacks the top q, sufficiency where x' is the top q. `curve` (STEPS + 1,) starts at q = 0.
    """
    return float(full - curve[1:].mean())


def area(curve: np.ndarray, k: int) -> float:
    """Area under a curve (STEPS + 1,) over the share of the k players moved, by trapezoids (Petsiuk et al., 2018)."""
    return float(np.trapezoid(curve, path_counts(k) / k))


def leave_one_out_tau(support: np.ndarray, lost: np.ndarray) -> float:
    """Kendall's tau-b of support with the score each player's removal loses; NaN where either is constant."""
    return float(kendalltau(support, lost).statistic) if varied(support) and varied(lost) else np.nan


# ---------------------------------------------------------------------------------------------------- without forwards


def completeness(attribution: Attribution, rollout: Rollout) -> dict[str, np.ndarray]:
    """|score - baseline - sum of credit| (B,), and the same over |score - baseline|.

    NaN where credit is not in score units, or (relative) the score is the baseline to 1e-6.
    """
    gap, whole = (_numpy(x.abs()) for x in (attribution.gap, rollout.scores - attribution.baseline))
    relative = np.divide(gap, whole, out=np.full_like(gap, np.nan), where=whole > 1e-6)
    return {"gap": gap, "relative_gap": relative}


def evenness(attribution: Attribution, rollout: Rollout) -> np.ndarray:
    """ESS/T (B,) of a share as it is, of any other credit after the paper's softmax: 1 is even, 1/T one token."""
    credit = attribution.credit
    weights = credit if attribution.is_share else masked_softmax(credit, rollout.mask)
    return _numpy(effective_share(weights, rollout.mask))


def seed_agreement(first: Attribution, second: Attribution, rollout: Rollout) -> np.ndarray:
    """Spearman (B,) of a source with itself under another `AttributionParams.seed`: how much of its ranking is noise.

    1 for sources without a draw. NaN where either is constant.
    """
    return rank_agreement(first.credit, second.credit, rollout.players)


def removal_agreement(by_removal: dict[str, Attribution], rollout: Rollout) -> dict[tuple[str, str], np.ndarray]:
    """Spearman (B,) of one source with itself, for each pair of ways to remove a token (drop, attention_mask, ..)."""
    pairs = combinations(by_removal, 2)
    return {(a, b): seed_agreement(by_removal[a], by_removal[b], rollout) for a, b in pairs}


# ---------------------------------------------------------------------------------------------------- gathering


class _Ground(NamedTuple):
    """Where one response's credit becomes claims about players."""

    spread: Tensor | None  # of the reward model's tokens on the policy's
    group: np.ndarray  # (n,) the player of each of the reward model's tokens
    sign: float  # of the score less the baseline


@dataclass(frozen=True)
class _Claim:
    """One source's account of a response of k players."""

    credit: np.ndarray  # (k,) NaN where not in score units
    constant: float  # the baseline, and credit of EOS
    support: np.ndarray  # (k,) in any unit

    @classmethod
    def of(cls, attribution: Attribution, row: int, players: np.ndarray, ground: _Ground) -> _Claim:
        credit, (spread, group, sign) = _numpy(attribution.credit[row]), ground
        own = credit[players] if spread is None else _read_back(spread) @ credit[players]
        phi = np.bincount(group, own)
        elsewhere = credit[~players].sum() if spread is None else credit.sum() - own.sum()
        constant = attribution.baseline[row].item() + elsewhere
        measured = phi if attribution.gap[row].isfinite() else np.full_like(phi, np.nan)
        return cls(measured, constant, np.abs(phi) if attribution.is_share else sign * phi)


@dataclass(frozen=True)
class _Case:
    """One response of k > 1 players: the sources' claims, and the coalitions that put them to the test."""

    full: float  # f(full)
    sign: float
    claims: dict[str, _Claim]
    questions: dict[Hashable, np.ndarray]  # coalitions (m, k): fresh, leave-one-out, and a path for each order

    @classmethod
    def of(
        cls, full: float, sign: float, claims: dict[str, _Claim], k: int, draws: Draws, rng: np.random.Generator
    ) -> _Case:
        questions = {"fresh": fresh_coalitions(k, draws.fresh, rng), "without": ~np.eye(k, dtype=bool)}
        ties = rng.permutation(k)
        supports = {(RANDOM, i): rng.random(k) for i in range(draws.orders)}
        supports |= {source: claim.support for source, claim in claims.items() if varied(claim.support)}
        paths = {("path", key): np.concatenate(removal_path(values, ties)) for key, values in supports.items()}
        return cls(full, sign, claims, questions | paths)

    def measures(self, y: dict[Hashable, np.ndarray]) -> dict[tuple[str, str], float]:
        """Every measure that needs forwards, by source and name, from the scores of the questions."""
        curves = {key[1]: self.sign * scores.reshape(2, -1) for key, scores in y.items() if key[0] == "path"}
        chance = np.mean([curve for key, curve in curves.items() if key[0] == RANDOM], axis=0)
        lost = self.sign * (self.full - y["without"])
        by_source = {RANDOM: self._aopc(chance)}
        for source, claim in self.claims.items():
            values = self._surrogate(claim, y["fresh"])
            values["leave_one_out_tau"] = leave_one_out_tau(claim.support, lost)
            if source in curves:
                gain = [area(curve, len(claim.support)) for curve in curves[source] - chance]
                values |= self._aopc(curves[source]) | {"deletion": -gain[0], "insertion": gain[1]}
            by_source[source] = values
        return {(source, name): value for source, values in by_source.items() for name, value in values.items()}

    def _aopc(self, curves: np.ndarray) -> dict[str, float]:
        full = self.sign * self.full
        return {"comprehensiveness": aopc(full, curves[0]), "sufficiency": aopc(full, curves[1])}

    def _surrogate(self, claim: _Claim, y: np.ndarray) -> dict[str, float]:
        present = self.questions["fresh"]
        predicted, scores = present @ claim.support, self.sign * y
        return {
            "surrogate_r2": surrogate_r2(claim.constant + present @ claim.credit, y),
            "surrogate_correlation": surrogate_correlation(predicted, scores),
            "surrogate_beyond_size": surrogate_beyond_size(predicted, scores, present.sum(1)),
            "infidelity": infidelity(~present @ claim.credit, self.full - y),
        }


def _ask(
    reward_model: RewardModel,
    readings: Sequence[Reading],
    groups: Sequence[np.ndarray],
    questions: Sequence[dict[Hashable, np.ndarray]],
    removal: str,
    progress: Callable = iter,
) -> list[dict[Hashable, np.ndarray]]:
    """Scores of each block of coalitions of players, every coalition of a response once, in one pass for all."""
    coalitions, places = zip(*map(distinct, questions)) if questions else ((), ())
    masks = [own[:, group] for own, group in zip(coalitions, groups)]
    scores = map(_numpy, coalition_scores(reward_model, readings, masks, removal, progress))
    return [{key: y[rows] for key, rows in place.items()} for y, place in zip(scores, places)]


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().double().numpy()


def _read_back(spread: Tensor) -> np.ndarray:
    """Shares (n, k) of each policy token's credit on the reward model's n tokens: columns sum to 1, or to 0."""
    shares = _numpy(spread)
    total = shares.sum(0)
    return np.divide(shares, total, out=np.zeros_like(shares), where=total > 0)


def _check(rollout: Rollout, attributions: dict[str, Attribution]) -> None:
    for source, attribution in attributions.items():
        shape, wanted = tuple(attribution.credit.shape), tuple(rollout.mask.shape)
        if shape != wanted or source == RANDOM:
            raise InputError(f"credit of {source!r} is {shape}, wanted {wanted}, and another name than {RANDOM!r}")


def faithfulness(
    reward_model: RewardModel,
    rollout: Rollout,
    attributions: dict[str, Attribution],
    params: AttributionParams,
    draws: Draws = Draws(),
    progress: Callable = iter,
) -> pd.DataFrame:
    """All `MEASURES` of all sources: columns source, measure, response, value; NaN where undefined.

    Removal and players are those of `params`. For all sources together, the reward model scores each response's fresh
    coalitions, its leave-one-outs, and 2 (STEPS - 1) coalitions of each source and of each random order; the control
    `RANDOM` has the random orders' mean comprehensiveness and sufficiency. Draws depend on their seed and the
    response's tokens only. Responses of fewer than two players need no forward. EOS is never removed. Credit is of
    the policy's tokens; a reward model of other tokens is asked about its own, on which credit is spread by characters.
    Raises `InputError` where credit has another shape.
    """
    readings = reward_model.readings(rollout)
    _check(rollout, attributions)
    groups = [player_groups(reward_model, reading, params.players) for reading in readings]
    rows = [row for row, group in enumerate(groups) if group.max(initial=0) > 0]
    asked = [readings[row] for row in rows], [groups[row] for row in rows]
    ends = [{"ends": np.array([[False], [True]]).repeat(group.max() + 1, 1)} for group in asked[1]]
    cases = []
    for row, reading, group, y in zip(rows, *asked, _ask(reward_model, *asked, ends, params.removal)):
        empty, full = y["ends"]
        sign = 1.0 if full >= empty else -1.0
        place = row, rollout.players[row].cpu().numpy(), _Ground(reading.spread, group, sign)
        claims = {source: _Claim.of(one, *place) for source, one in attributions.items()}
        rng = np.random.default_rng([draws.seed, *reading.response])
        cases.append(_Case.of(full, sign, claims, group.max() + 1, draws, rng))
    answers = _ask(reward_model, *asked, [case.questions for case in cases], params.removal, progress)
    return _frame(rollout, attributions, {row: case.measures(y) for row, case, y in zip(rows, cases, answers)})


def _frame(rollout: Rollout, attributions: dict[str, Attribution], by_row: dict[int, dict]) -> pd.DataFrame:
    """Long form of the rows' measures, with those that need no forward."""
    import pandas as pd

    B = len(rollout.scores)
    keys = [(source, name) for source in attributions for name in MEASURES]
    table = {key: np.full(B, np.nan) for key in [*keys, (RANDOM, "comprehensiveness"), (RANDOM, "sufficiency")]}
    for source, attribution in attributions.items():
        table |= {(source, name): values for name, values in completeness(attribution, rollout).items()}
        table[source, "evenness"] = evenness(attribution, rollout)
    for row, values in by_row.items():
        for key, value in values.items():
            table[key][row] = value
    frames = [
        pd.DataFrame({"source": source, "measure": name, "response": range(B), "value": values})
        for (source, name), values in table.items()
    ]
    return pd.concat(frames, ignore_index=True)
