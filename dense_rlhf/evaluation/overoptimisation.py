"""Reward over-optimisation: what a held-out judge says while the proxy is optimised, after Gao et al. (2022, arXiv
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
LEAST = 4  # points of a path, for the law's two numbers and where it starts


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
        """The d at which the law is highest, beyond which it falls; infinite where it has none."""
        if self.beta <= 0:
            return math.inf
        if self.kind == "best_of_n":
            return max(0.0, self.alpha / (2 * self.beta))
        return math.exp(min(self.alpha / self.beta - 1, 700))


def _terms(d: np.ndarray, kind: str) -> np.ndarray:
    """(N, 2): what alpha and beta are multiplied by."""
    if kind not in LAWS:
        raise InputError(f"the law is {kind!r}, wanted one of {', '.join(LAWS)}")
    if kind == "best_of_n":
        return np.stack([d, -(d**2)], -1)
    return np.stack([d, -d * np.log(np.where(d > 0, d, 1.0))], -1)  # d log d goes to 0 with d


def distance(kl: Sequence[float] | np.ndarray) -> np.ndarray:
    """d = sqrt(KL); an estimate below 0, which sampling can give near the start, counts as 0."""
    return np.sqrt(np.maximum(np.asarray(kl, float), 0.0))


def fit(d: Sequence[float] | np.ndarray, score: Sequence[float] | np.ndarray, kind: str = "rl") -> Law:
    """The law of one run by least squares, from scores (N,) at distances (N,); where it starts is fitted too.

    Raises `InputError` for fewer than four distances.
    """
    d, score = np.asarray(d, float), np.asarray(score, float)
    apart = len(np.unique(d))
    if d.shape != score.shape or apart < LEAST:
        raise InputError(f"{apart} different distances, {score.size} scores; wanted {LEAST} or more, as many of both")
    x = np.concatenate([_terms(d, kind), np.ones((len(d), 1))], 1)
    alpha, beta, start = np.linalg.lstsq(x, score, rcond=None)[0]
    left, whole = ((score - x @ [alpha, beta, start]) ** 2).sum(), ((score - score.mean()) ** 2).sum()
    return Law(kind, float(alpha), float(beta), float(start), float(1 - left / whole) if whole > 0 else math.nan)


def fits(history: pd.DataFrame, column: str = "gold", kind: str = "rl", smooth: int = 5) -> pd.DataFrame:
    """A row a run: arm, seed, alpha, beta, start, r2, `peak` (d), `furthest` (d), `reached`, `update` of the peak.

    Fitted to running means of `smooth` updates. A peak counts as reached where the path went beyond it, at the first
    update that did; runs of fewer than four distances have no row.
    """
    import pandas as pd

    rows = []
    for (arm, seed), run in history.groupby(["arm", "seed"], sort=False):
        path = run.sort_values("update").set_index("update")[["kl", column]].rolling(smooth, min_periods=1).mean()
        path = path.dropna()
        d, updates = distance(path["kl"]), path.index.to_numpy()
        if len(np.unique(d)) < LEAST:
            continue
        law = fit(d, path[column], kind)
        beyond = d > law.peak
        rows.append(
            {
                "arm": arm,
                "seed": seed,
                "alpha": law.alpha,
                "beta": law.beta,
                "start": law.start,
                "r2": law.r2,
                "peak": law.peak,
                "furthest": float(d.max()),
                "reached": bool(beyond.any()),
                "update": float(updates[beyond.argmax()]) if beyond.any() else math.nan,
            }
        )
    columns = ["arm", "seed", "alpha", "beta", "start", "r2", "peak", "furthest", "reached", "update"]
    return pd.DataFrame(rows, columns=columns)


def law_table(found: pd.DataFrame) -> pd.DataFrame:
    """One row an arm of `fits`, as text: alpha and beta with t intervals over seeds, and where the score peaks."""
    import pandas as pd

    rows = [
        (
            arm,
            len(of),
            str(t_interval(of["alpha"])),
            str(t_interval(of["beta"])),
            f"{of['r2'].mean():.2f}",
            f"{of['furthest'].mean():.2f}",
            _peak(of, "peak"),
            _peak(of, "update"),
        )
        for arm, of in found.groupby("arm", sort=False)
    ]
    columns = ["arm", "seeds", "alpha", "beta", "R²", "sqrt(KL) reached", "peaks at sqrt(KL)", "at update"]
    return pd.DataFrame(rows, columns=columns)


def _peak(of: pd.DataFrame, column: str) -> str:
    """Where an arm peaks, over the seeds that went beyond their peak."""
    there = of[of["reached"]]
    if there.empty:
        return "not reached here"
    return str(t_interval(there[column])) + f" ({len(there)} of {len(of)} seeds)" * (len(there) < len(of))


def generalisation(
    history: pd.DataFrame, held_out: Mapping[str, Mapping[str, Mapping[int, pd.DataFrame]]], column: str, last: int = 5
) -> dict[str, dict[str, Interval]]:
    """Gain of `column` over the untrained policy on each split's prompts, and from split to split: arm -> name ->
    t interval over seeds.

    `held_out` holds, by split, arm and seed, tables of judgements with the reference's own scores beside. Training
    comes first: the mean of the `last` updates less the first one, which the untrained policy wrote.
    """
    found: dict[str, dict[str, Interval]] = {}
    for arm, runs in history.groupby("arm", sort=False):
        paths = {int(seed): run.sort_values("update")[column] for seed, run in runs.groupby("seed")}
        gains = {"train": {seed: path.tail(last).mean() - path.iloc[0] for seed, path in paths.items()}}
        for split, tables in held_out.items():
            gains[split] = {seed: (t[column] - t[f"reference_{column}"]).mean() for seed, t in tables[arm].items()}
        found[arm] = {split: t_interval(list(by_seed.values())) for split, by_seed in gains.items()}
        for (one, before), (other, after) in pairwise(gains.items()):
            both = [after[seed] - before[seed] for seed in before if seed in after]
            found[arm][f"{other} less {one}"] = t_interval(both)
    return found
