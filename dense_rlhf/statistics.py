"""How sure a comparison of few trainings is. Seeds are the unit: a run's value is its mean over prompts, and an
interval says where the mean over seeds that were not run may lie.

Held-out prompts are the same for every run and count as fixed: no interval over seeds speaks of other prompts. What a
single run says of its own prompts or responses is what `bootstrap` is for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from dense_rlhf.types import InputError

if TYPE_CHECKING:
    import pandas as pd

ALPHA = 0.05  # intervals are at 1 - ALPHA, tests at ALPHA
FEWEST = 5  # seeds a task, below which resampling them gives no interval
Tasks = Sequence[Sequence[float]]  # of tasks (datasets), of one value a seed


@dataclass(frozen=True)
class Interval:
    """A mean (or another statistic) with its 95 % interval; without finite bounds where nothing is known of it."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.2f} " + (f"[{self.low:.2f}, {self.high:.2f}]" if self.known else "[no interval]")

    @property
    def known(self) -> bool:
        """Whether it is an interval at all: one seed has none."""
        return not (self.low == -math.inf and self.high == math.inf)

    def apart(self, other: Interval) -> bool:
        """True where the two intervals do not overlap."""
        return self.low > other.high or other.low > self.high


@dataclass(frozen=True)
class Difference(Interval):
    """Mean of ours less theirs over seeds, with its interval and a two-sided test that it is zero."""

    p: float  # 1 where nothing is known
    error: float  # standard error of the mean
    df: float  # its degrees of freedom; 0 where nothing is known
    g: float  # Hedges' g: in standard deviations of a single run, free of the bias of few
    seeds: int  # of the side that has fewer
    paired: bool


def _numbers(values: Sequence[float] | np.ndarray) -> np.ndarray:
    found = np.asarray(values, float)
    if found.ndim != 1 or not len(found) or not np.isfinite(found).all():
        raise InputError(f"an interval of nothing: {str(values)[:80]}; wanted finite numbers, one or more, in a row")
    return found


# ---------------------------------------------------------------------------------------------------- means


def t_interval(values: Sequence[float] | np.ndarray) -> Interval:
    """Mean of one value a seed, (S,), with Student's t interval; a single one has no interval.

    Exact where seeds vary normally. Raises `InputError` for none, or for a number that is not finite.
    """
    found = _numbers(values)
    return Interval(*_around(found.mean(), _error(found), len(found) - 1))


def _error(values: np.ndarray) -> float:
    """Standard error of a mean, 0 for a single value: the degrees of freedom say that it is unknown."""
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0.0


def _around(mean: float, error: float, df: float) -> tuple[float, float, float]:
    from scipy.special import stdtrit

    reach = stdtrit(df, 1 - ALPHA / 2) * error if df > 0 else math.inf
    return float(mean), float(mean - reach), float(mean + reach)


def bootstrap(
    values: Sequence[float] | np.ndarray, repeats: int = 2000, seed: int = 0, statistic: Callable = np.mean
) -> Interval:
    """Mean (or median) of one run's prompts or responses, (N,), with a percentile interval that resamples them.

    It speaks of this run on other prompts, not of other seeds.
    """
    found = _numbers(values)
    draws = statistic(np.random.default_rng(seed).choice(found, (repeats, len(found))), axis=1)
    low, high = np.quantile(draws, [ALPHA / 2, 1 - ALPHA / 2])
    return Interval(float(statistic(found)), float(low), float(high))


def over_seeds(by_seed: Sequence[Sequence[float] | np.ndarray]) -> Interval:
    """`t_interval` of each seed's mean over its prompts; `by_seed` holds one array of per-prompt values a seed."""
    return t_interval([_numbers(values).mean() for values in by_seed])


# ---------------------------------------------------------------------------------------------------- differences


def paired(ours: Sequence[float], theirs: Sequence[float]) -> Difference:
    """Mean of ours less theirs, (S,) both, by the paired t test: entry s of both is the same seed.

    Right only where a seed gives both the same prompts in the same order and the same start; else see `welch`.
    """
    a, b = _numbers(ours), _numbers(theirs)
    if len(a) != len(b):
        raise InputError(f"{len(a)} and {len(b)} seeds cannot be paired; give both the same seeds, or use welch")
    return _difference(a, b, _error(a - b), len(a) - 1, True)


def welch(ours: Sequence[float], theirs: Sequence[float]) -> Difference:
    """Mean of ours less that of theirs, of independent seeds, with degrees of freedom by Welch and Satterthwaite."""
    a, b = _numbers(ours), _numbers(theirs)
    df = 0.0
    if min(len(a), len(b)) > 1:
        va, vb = _error(a) ** 2, _error(b) ** 2
        spread = va**2 / (len(a) - 1) + vb**2 / (len(b) - 1)
        df = (va + vb) ** 2 / spread if spread > 0 else len(a) + len(b) - 2.0
    return _difference(a, b, math.hypot(_error(a), _error(b)), df, False)


def _difference(a: np.ndarray, b: np.ndarray, error: float, df: float, is_paired: bool) -> Difference:
    from scipy.special import stdtr

    gap = float(a.mean() - b.mean())
    p = 1.0 if df <= 0 or gap == 0 else float(2 * stdtr(df, -abs(gap) / error)) if error > 0 else 0.0
    return Difference(*_around(gap, error, df), p, error, float(df), hedges_g(a, b), min(len(a), len(b)), is_paired)


def hedges_g(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Difference in pooled standard deviations of one run, times Hedges' exact correction (1981); NaN where unknown.

    For pairs too, so that effects compare: the correction then takes the seeds as independent.
    """
    from scipy.special import gammaln

    a, b = _numbers(ours), _numbers(theirs)
    df = len(a) + len(b) - 2
    if min(len(a), len(b)) < 2:
        return math.nan
    pooled = math.sqrt(((len(a) - 1) * a.var(ddof=1) + (len(b) - 1) * b.var(ddof=1)) / df)
    correction = math.exp(gammaln(df / 2) - gammaln((df - 1) / 2)) / math.sqrt(df / 2)
    return float(correction * (a.mean() - b.mean()) / pooled) if pooled > 0 else math.nan


def holm(p: Sequence[float]) -> list[float]:
    """p-values corrected so that all tests together err at most as often as one would (Holm, 1979), in their order."""
    values = np.asarray(p, float)
    order, m = values.argsort(kind="stable"), len(values)
    stepped = np.maximum.accumulate(values[order] * (m - np.arange(m))) if m else values
    corrected = np.empty(m)
    corrected[order] = np.minimum(stepped, 1)
    return corrected.tolist()


def power(difference: float, error: float, df: float, alpha: float = ALPHA) -> float:
    """Chance that a two-sided t test with this standard error sees a true `difference`: P(|t| > c), t noncentral.

    Averaged over the spreads that may be met: scipy's noncentral t fails for effects as large as two seeds ask.
    """
    from scipy.special import ndtr, stdtrit

    shift, reach = abs(difference) / error, stdtrit(df, 1 - alpha / 2) * _spreads(df)
    return float((ndtr(shift - reach) + ndtr(-shift - reach)).mean())


@lru_cache(maxsize=16)
def _spreads(df: float, n: int = 2000) -> np.ndarray:
    """Standard errors that may be met, over the true one: n equally likely ones."""
    from scipy.special import gammaincinv

    return np.sqrt(gammaincinv(df / 2, (np.arange(n) + 0.5) / n) * 2 / df)


def detectable(found: Difference, chance: float = 0.8, tests: int = 1) -> float:
    """The difference that these seeds would have shown with this chance: "with S seeds, x would have been seen".

    Takes the spread that was met as the true one, and Holm's first step where it is one of several `tests`. Infinite
    for one seed.
    """
    from scipy.optimize import brentq

    if found.df <= 0:
        return math.inf
    alpha = ALPHA / tests
    high = 1.0
    while power(high, 1.0, found.df, alpha) < chance:
        high *= 2
    return found.error * float(brentq(lambda x: power(x, 1.0, found.df, alpha) - chance, 0, high))


# ---------------------------------------------------------------------------------------------------- over tasks


def interquartile_mean(tasks: Tasks, repeats: int = 20_000, seed: int = 0) -> Interval:
    """Mean of the middle half of all runs' values (rliable: Agarwal et al., 2021); of three or fewer, of all.

    The interval resamples seeds within each task. Percentiles are expanded for few seeds (Hesterberg, 2015), and below
    `FEWEST` in any task there is none: so few distinct resamples say nothing.
    """
    from scipy.stats import norm, t, trim_mean

    values = [_numbers(runs) for runs in tasks]
    point, few = float(trim_mean(np.concatenate(values), 0.25)), min(map(len, values))
    if few < FEWEST:
        return Interval(point, -math.inf, math.inf)
    rng = np.random.default_rng(seed)
    draws = trim_mean(np.concatenate([rng.choice(runs, (repeats, len(runs))) for runs in values], 1), 0.25, axis=1)
    tail = norm.cdf(math.sqrt(few / (few - 1)) * t.ppf(ALPHA / 2, sum(len(runs) - 1 for runs in values)))
    low, high = np.quantile(draws, [tail, 1 - tail])
    return Interval(point, float(low), float(high))


def improvement(ours: Tasks, theirs: Tasks) -> Interval:
    """Probability that a run of ours has a higher value than one of theirs on the same task, ties counting half.

    The mean over tasks, with the score interval of Newcombe (2006, method 5), which takes the variance at its own ends
    and so stays honest for few seeds and for 0 and 1. Raises `InputError` where the tasks are not as many.
    """
    from scipy.optimize import brentq
    from scipy.stats import norm

    if len(ours) != len(theirs) or not len(ours):
        raise InputError(f"{len(ours)} and {len(theirs)} tasks; compare on the same datasets, one or more")
    pairs = [(_numbers(a), _numbers(b)) for a, b in zip(ours, theirs)]
    found = float(np.mean([_wins(a, b) for a, b in pairs]))
    z2 = norm.ppf(1 - ALPHA / 2) ** 2

    def beyond(x: float) -> float:
        variance = np.mean([_wins_variance(x, len(a), len(b)) for a, b in pairs]) / len(pairs)
        return (x - found) ** 2 - z2 * variance

    low = brentq(beyond, 0, found - 1e-9) if found > 0 else 0.0  # off the point itself, which at 0 and 1 is a root
    return Interval(found, float(low), float(brentq(beyond, found + 1e-9, 1)) if found < 1 else 1.0)


def _wins(a: np.ndarray, b: np.ndarray) -> float:
    gap = a[:, None] - b[None, :]
    return float(((gap > 0) + 0.5 * (gap == 0)).mean())


def _wins_variance(x: float, m: int, n: int) -> float:
    """Variance of the share of won pairs whose probability is x, of m and n runs (Hanley and McNeil, 1982)."""
    half = (m + n) / 2 - 1
    return x * (1 - x) * (1 + half * ((1 - x) / (2 - x) + x / (1 + x))) / (m * n)


# ---------------------------------------------------------------------------------------------------- tables of runs


def summarise(evaluations: Mapping[str, Sequence[pd.DataFrame]], column: str) -> dict[str, Interval]:
    """`over_seeds` of one column for each arm; `evaluations` holds one table of per-prompt judgements a seed."""
    return {arm: over_seeds([table[column].to_numpy() for table in tables]) for arm, tables in evaluations.items()}


def arm_table(evaluations: Mapping[str, Sequence[pd.DataFrame]]) -> pd.DataFrame:
    """One row an arm: seeds, and gold score, proxy score, KL and win rate with 95 % intervals over seeds, as text."""
    import pandas as pd

    labels = {"gold": "gold (log-odds)", "proxy": "proxy (sd)", "kl": "KL (nats a response)", "win": "win rate"}
    columns = {label: summarise(evaluations, name) for name, label in labels.items()}
    rows = [
        {"arm": arm, "seeds": len(tables)} | {label: str(found[arm]) for label, found in columns.items()}
        for arm, tables in evaluations.items()
    ]
    return pd.DataFrame(rows)


def difference(ours: Sequence[pd.DataFrame], theirs: Sequence[pd.DataFrame], column: str = "gold") -> Difference:
    """`paired` means of `column` of two arms on the same prompts, both one table of judgements a seed, seeds alike."""
    if [len(table) for table in ours] != [len(table) for table in theirs]:
        raise InputError(f"{len(ours)} and {len(theirs)} seeds, or other numbers of prompts; judge both arms alike")
    return paired(*([table[column].mean() for table in tables] for tables in (ours, theirs)))


def at_kl(history: pd.DataFrame, level: float, smooth: int = 5) -> pd.DataFrame:
    """Update and metrics where each run's KL first reaches `level`: running means of `smooth` updates, on a straight
    line between two of them, so that a run in large steps is not judged at a larger KL.

    A row a run, with columns arm and seed; runs that never get there are left out.
    """
    import pandas as pd

    rows, columns = [], [name for name in history.select_dtypes("number") if name not in ("seed", "update")]
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


def values_at_kl(
    history: pd.DataFrame, ours: str, theirs: str, column: str = "gold", smooth: int = 3
) -> tuple[list[float], list[float]]:
    """`column` of both arms, a value a seed, where both paths first reach the largest KL that both know."""
    needed = list(dict.fromkeys(("arm", "seed", "update", "kl", column)))
    both = history.loc[history["arm"].isin((ours, theirs)), needed]
    values: tuple[list[float], list[float]] = ([], [])
    for _, runs in both.groupby("seed"):
        ends = runs.groupby("arm")["kl"].apply(lambda kl: kl.rolling(smooth, min_periods=1).mean().max())
        if len(ends) == 2:
            there = at_kl(runs, ends.min(), smooth).set_index("arm")[column]
            values[0].append(float(there[ours]))
            values[1].append(float(there[theirs]))
    return values


def difference_at_kl(
    history: pd.DataFrame, ours: str, theirs: str, smooth: int = 3, column: str = "gold", test: Callable = paired
) -> Difference:
    """Difference of `column` where both arms of a seed first reach the largest KL that both know; `test` is `paired`,
    or `welch` where seeds are no pairs. Raises `InputError` where no seed has both."""
    return test(*values_at_kl(history, ours, theirs, column, smooth))
