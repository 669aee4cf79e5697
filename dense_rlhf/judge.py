"""Judgements of whole responses: win rates, and intervals that know both seeds and prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dense_rlhf.types import InputError

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Interval:
    """A mean (or another statistic) with its 95 % interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.2f} [{self.low:.2f}, {self.high:.2f}]"

    def apart(self, other: Interval) -> bool:
        """True where the two intervals do not overlap."""
        return self.low > other.high or other.low > self.high


def win_rate(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """1 where our response to a prompt (N,) scores higher, 0 where lower, 1/2 for a tie."""
    if len(ours) != len(theirs):
        raise InputError(f"{len(ours)} responses against {len(theirs)}; judge both policies on the same prompts")
    return (np.asarray(ours) > np.asarray(theirs)) + 0.5 * (np.asarray(ours) == np.asarray(theirs))


def bootstrap(
    by_seed: Sequence[np.ndarray], repeats: int = 2000, seed: int = 0, statistic: Callable = np.mean
) -> Interval:
    """Mean over seeds with a 95 % interval that resamples seeds, then prompts within each seed (percentiles).

    `statistic` (mean or median) is of the prompts of one seed; `by_seed` holds one array of per-prompt values a seed.
    With two seeds the spread between seeds is known poorly, and the interval is too short for it; the reports show each
    seed beside it.
    """
    if not by_seed or any(len(values) == 0 for values in by_seed):
        raise InputError("an interval of nothing; wanted at least one seed with at least one value")
    rng = np.random.default_rng(seed)
    arrays = [np.asarray(values, float) for values in by_seed]
    draws = (rng.choice(values, (repeats, len(values))) for values in arrays)
    resampled = np.stack([statistic(draw, axis=1) for draw in draws])  # (S, repeats)
    picks = rng.integers(len(arrays), size=(len(arrays), repeats))
    means = resampled[picks, np.arange(repeats)].mean(0)
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(np.mean([statistic(a) for a in arrays])), float(low), float(high))


def summarise(evaluations: dict[str, list[pd.DataFrame]], column: str) -> dict[str, Interval]:
    """The interval of one column for each arm; `evaluations` holds one table of per-prompt judgements a seed."""
    return {arm: bootstrap([table[column].to_numpy() for table in tables]) for arm, tables in evaluations.items()}


def arm_table(evaluations: dict[str, list[pd.DataFrame]]) -> pd.DataFrame:
    """One row an arm: seeds, and gold score, proxy score, KL and win rate with 95 % intervals as text."""
    import pandas as pd

    labels = {"gold": "gold (log-odds)", "proxy": "proxy (sd)", "kl": "KL (nats a response)", "win": "win rate"}
    columns = {label: summarise(evaluations, name) for name, label in labels.items()}
    rows = [{"arm": arm, "seeds": len(tables)} | {label: str(found[arm]) for label, found in columns.items()}
            for arm, tables in evaluations.items()]  # fmt: skip
    return pd.DataFrame(rows)


def gold_at_kl(history: pd.DataFrame, level: float, smooth: int = 5) -> pd.DataFrame:
    """Update, gold and proxy score where each run's KL first reaches `level`: running means of `smooth` updates, on a
    straight line between two of them, so that a run in large steps is not judged at a larger KL."""
    import pandas as pd

    rows, columns = [], ["kl", "gold", "proxy"]
    for (arm, seed), run in history.groupby(["arm", "seed"], sort=False):
        run = run.sort_values("update")
        path = run[columns].rolling(smooth, min_periods=1).mean().assign(update=run["update"])
        reached = (path["kl"] >= level - 1e-9).to_numpy()
        if reached.any():
            after = path.iloc[reached.argmax()]
            before = path.iloc[max(0, reached.argmax() - 1)]
            rise = after["kl"] - before["kl"]
            share = (level - before["kl"]) / rise if rise > 0 else 1.0
            rows.append({"arm": arm, "seed": seed} | dict(before + share * (after - before)))
    return pd.DataFrame(rows, columns=["arm", "seed", "update", *columns])


def difference(ours: Sequence[pd.DataFrame], theirs: Sequence[pd.DataFrame], column: str = "gold") -> Interval:
    """Mean of `column` of one arm less that of another on the same prompts, both one table of judgements a seed."""
    if [len(table) for table in ours] != [len(table) for table in theirs]:
        raise InputError(f"{len(ours)} and {len(theirs)} seeds, or other numbers of prompts; judge both arms alike")
    return bootstrap([a[column].to_numpy() - b[column].to_numpy() for a, b in zip(ours, theirs)])


def difference_at_kl(history: pd.DataFrame, ours: str, theirs: str, smooth: int = 3) -> Interval:
    """Gold of arm `ours` less that of `theirs` where both paths first reach the largest KL that both know.

    A value a seed: with one seed the interval has no width.
    """
    gaps = []
    for _, both in history[history["arm"].isin((ours, theirs))].groupby("seed"):
        ends = both.groupby("arm")["kl"].apply(lambda kl: kl.rolling(smooth, min_periods=1).mean().max())
        gold = gold_at_kl(both, ends.min(), smooth).set_index("arm")["gold"]
        gaps.append(np.array([gold[ours] - gold[theirs]]))
    return bootstrap(gaps)
