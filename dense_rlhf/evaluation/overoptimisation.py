"""Reward over-optimisation: how a held-out judge's score changes while the proxy is optimised (Gao et al., 2022, arXiv
2210.10760).

Their laws for the gain R of a score over the untrained policy, at d = sqrt(KL):

    rl           R(d) = d (alpha - beta log d), which peaks at d = exp(alpha / beta - 1)
    best_of_n    R(d) = d (alpha - beta d), which peaks at d = alpha / (2 beta)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from dense_rlhf.statistics import Interval, t_interval
from dense_rlhf.types import InputError

if TYPE_CHECKING:
    import pandas as pd

LAWS = ("rl", "best_of_n")
LEAST = 4  # distances: a law has three free numbers, alpha, beta and its start


@dataclass(frozen=True)
class Law:
    """A fitted law; `start` is the score of the untrained policy, `r2` the share of variance that it explains."""

    kind: str
    alpha: float
    beta: float
    start: float
    r2: float

    def __call__(self, d: np.ndarray) -> np.ndarray:
        """The score, not the gain, at d."""
        return self.start + _terms(np.asarray(d, float), self.kind) @ np.array([self.alpha, self.beta])

    @property
    def peak(self) -> float:
        """The d at which the law is highest; infinite if it never falls."""
        if self.beta <= 0:
            return math.inf
        if self.kind == "best_of_n":
            return max(0.0, self.alpha / (2 * self.beta))
        return math.exp(min(self.alpha / self.beta - 1, 700))


def _terms(d: np.ndarray, kind: str) -> np.ndarray:
    """(N, 2): the factors of alpha and beta."""
    if kind not in LAWS:
        raise InputError(f"the law is {kind!r}, wanted one of {', '.join(LAWS)}")
    if kind == "best_of_n":
        return np.stack([d, -(d**2)], -1)
    return np.stack([d, -d * np.log(np.where(d > 0, d, 1.0))], -1)  # d log d goes to 0 with d


def distance(kl: Sequence[float] | np.ndarray) -> np.ndarray:
    """d = sqrt(KL); negative estimates, which occur near the start, count as 0."""
    return np.sqrt(np.maximum(np.asarray(kl, float), 0.0))


def fit(d: Sequence[float] | np.ndarray, score: Sequence[float] | np.ndarray, kind: str = "rl") -> Law:
    """Fit one run's law, its start included, by least squares to scores (N,) at distances (N,).

    Raises `InputError` for fewer than four different distances.
    """
    d, score = np.asarray(d, float), np.asarray(score, float)
    different = len(np.unique(d))
    if d.shape != score.shape or different < LEAST:
        raise InputError(
            f"{different} different distances, {score.size} scores; wanted {LEAST} or more, as many of both"
        )
    x = np.concatenate([_terms(d, kind), np.ones((len(d), 1))], 1)
    alpha, beta, start = np.linalg.lstsq(x, score, rcond=None)[0]
    residual, whole = ((score - x @ [alpha, beta, start]) ** 2).sum(), ((score - score.mean()) ** 2).sum()
    return Law(kind, float(alpha), float(beta), float(start), float(1 - residual / whole) if whole > 0 else math.nan)


def fits(history: pd.DataFrame, column: str = "gold", kind: str = "rl", smooth: int = 5) -> pd.DataFrame:
    """One row per run: arm, seed, alpha, beta, start, r2, `peak` (d), `furthest` (d), `reached`, `update` of the peak.

    Fitted to running means of `smooth` updates. A peak is reached at the first update beyond it, if there is one; runs
    of fewer than four distances have no row.
    """
    import pandas as pd

    rows = []
    for (arm, seed), run in history.groupby(["arm", "seed"], sort=False):
        path = run.sort_values("update").set_index("update")[["kl", column]]
        path = path.rolling(smooth, min_periods=1).mean().dropna()
        d, updates = distance(path["kl"]), path.index.to_numpy()
        if len(np.unique(d)) < LEAST:
            continue
        law = fit(d, path[column], kind)
        beyond = d > law.peak
        update = float(updates[beyond.argmax()]) if beyond.any() else math.nan
        law_cells = law.alpha, law.beta, law.start, law.r2, law.peak
        rows.append((arm, seed, *law_cells, float(d.max()), bool(beyond.any()), update))
    columns = ["arm", "seed", "alpha", "beta", "start", "r2", "peak", "furthest", "reached", "update"]
    return pd.DataFrame(rows, columns=columns)


def law_table(fitted: pd.DataFrame) -> pd.DataFrame:
    """The rows of `fits` by arm, as text: alpha and beta with t intervals over seeds, and where the score peaks."""
    import pandas as pd

    rows = []
    for arm, runs in fitted.groupby("arm", sort=False):
        law = (str(t_interval(runs["alpha"])), str(t_interval(runs["beta"])), f"{runs['r2'].mean():.2f}")
        peak = (f"{runs['furthest'].mean():.2f}", _peak(runs, "peak"), _peak(runs, "update"))
        rows.append((arm, len(runs), *law, *peak))
    columns = ["arm", "seeds", "alpha", "beta", "R²", "sqrt(KL) reached", "peaks at sqrt(KL)", "at update"]
    return pd.DataFrame(rows, columns=columns)


def _peak(runs: pd.DataFrame, column: str) -> str:
    """Where an arm peaks, over the seeds that went beyond their peak."""
    reached = runs[runs["reached"]]
    if reached.empty:
        return "not reached here"
    return str(t_interval(reached[column], (0, math.inf))) + f" ({len(reached)} of {len(runs)} seeds)" * (
        len(reached) < len(runs)
    )


def generalisation(
    history: pd.DataFrame, held_out: Mapping[str, Mapping[str, Mapping[int, pd.DataFrame]]], column: str, last: int = 5
) -> dict[str, dict[str, Interval]]:
    """Gain of `column` over the untrained policy on each split, and its change from one split to the next:
    arm -> name -> t interval over seeds.

    `held_out` holds tables of judgements, with the reference's scores, by split, arm and seed. The first split is
    `train`: the mean of the `last` updates less the first update, whose responses the untrained policy wrote.
    """
    intervals: dict[str, dict[str, Interval]] = {}
    for arm, runs in history.groupby("arm", sort=False):
        paths = {int(seed): run.sort_values("update")[column] for seed, run in runs.groupby("seed")}
        gains = {"train": {seed: path.tail(last).mean() - path.iloc[0] for seed, path in paths.items()}}
        for split, tables in held_out.items():
            gains[split] = {seed: (t[column] - t[f"reference_{column}"]).mean() for seed, t in tables[arm].items()}
        intervals[arm] = {split: t_interval(list(by_seed.values())) for split, by_seed in gains.items()}
        for (split, before), (next_split, after) in pairwise(gains.items()):
            changes = [after[seed] - before[seed] for seed in before if seed in after]
            intervals[arm][f"{next_split} less {split}"] = t_interval(changes)
    return intervals
