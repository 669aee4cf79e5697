"""Intervals, tests and power for comparisons of few trainings. Seeds are the unit: a run's value is its mean over
prompts, and an interval is for the mean over all seeds that could have been run.

Held-out prompts are the same for every run and count as fixed: intervals over seeds do not generalise to other
prompts. `bootstrap` is for the prompts or responses of a single run.
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
FEWEST = 5  # seeds per task that resampling needs for an interval
UNBOUNDED = (-math.inf, math.inf)
BOUNDS = {"win": (0.0, 1.0), "win_lc": (0.0, 1.0), "kl": (0.0, math.inf)}  # of columns of judgements
Tasks = Sequence[Sequence[float]]  # for each task (dataset), one value per seed


@dataclass(frozen=True)
class Interval:
    """A mean (or another statistic) with its 95 % interval; the bounds are infinite if it is unknown."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.2f} " + (f"[{self.low:.2f}, {self.high:.2f}]" if self.known else "[no interval]")

    @property
    def known(self) -> bool:
        """Whether the interval is known: that takes two seeds."""
        return not (self.low == -math.inf and self.high == math.inf)

    def apart(self, other: Interval) -> bool:
        """Whether the two intervals do not overlap."""
        return self.low > other.high or other.low > self.high


@dataclass(frozen=True)
class Difference(Interval):
    """Mean of ours less theirs over seeds, with its interval and a two-sided test of zero difference."""

    p: float  # 1 if unknown
    error: float  # standard error of the mean
    df: float  # degrees of freedom of `error`; 0 if unknown
    g: float  # Hedges' g: the mean in standard deviations of a single run, corrected for few seeds
    seeds: int  # of the side with fewer
    paired: bool

    def p_above(self, bound: float) -> float:
        """One-sided p of a true mean of at most `bound`; 1 if unknown."""
        return self._p_beyond(self.mean - bound)

    def p_below(self, bound: float) -> float:
        """One-sided p of a true mean of at least `bound`; 1 if unknown."""
        return self._p_beyond(bound - self.mean)

    def _p_beyond(self, gap: float) -> float:
        from scipy.special import stdtr

        if self.df <= 0:
            return 1.0
        return float(stdtr(self.df, -gap / self.error)) if self.error > 0 else float(gap <= 0)


def _numbers(values: Sequence[float] | np.ndarray) -> np.ndarray:
    array = np.asarray(values, float)
    if array.ndim != 1 or not len(array) or not np.isfinite(array).all():
        raise InputError(f"no interval of {str(values)[:80]}; wanted a flat list of one or more finite numbers")
    return array


# ---------------------------------------------------------------------------------------------------- means


def t_interval(values: Sequence[float] | np.ndarray, bounds: tuple[float, float] = (-math.inf, math.inf)) -> Interval:
    """Mean of one value per seed, (S,), with Student's t interval; unknown for a single seed.

    Exact if seeds vary normally. What has `bounds` has the t interval of the mean's logarithm (above a lower bound) or
    logit (between two), with the error that the delta method gives it; a mean that is not between them, as an estimate
    of KL can be, the plain one. Raises `InputError` for no values, or a value that is not finite.
    """
    array = _numbers(values)
    mean, error, (low, high) = float(array.mean()), _error(array), bounds
    if len(array) < 2 or not low < mean < high or bounds == UNBOUNDED:
        return Interval(*_around(mean, error, len(array) - 1))
    above, below = mean - low, high - mean
    slope = 1 / above + 1 / below  # of the logit; of the logarithm where below is infinite
    _, *ends = _around(math.log(above) - (math.log(below) if below < math.inf else 0), error * slope, len(array) - 1)
    if high == math.inf:
        return Interval(mean, *(low + math.exp(min(end, 700)) for end in ends))
    return Interval(mean, *(low + (high - low) * (1 + math.tanh(end / 2)) / 2 for end in ends))


def _error(values: np.ndarray) -> float:
    """Standard error of a mean; 0 for a single value, whose 0 degrees of freedom mark it as unknown."""
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0.0


def _around(mean: float, error: float, df: float) -> tuple[float, float, float]:
    from scipy.special import stdtrit

    reach = stdtrit(df, 1 - ALPHA / 2) * error if df > 0 else math.inf
    return float(mean), float(mean - reach), float(mean + reach)


def bootstrap(
    values: Sequence[float] | np.ndarray, repeats: int = 2000, seed: int = 0, statistic: Callable = np.mean
) -> Interval:
    """Mean (or median) over one run's prompts or responses, (N,), with a percentile interval that resamples them.

    The interval is for this run on other prompts, not for other seeds.
    """
    array = _numbers(values)
    draws = statistic(np.random.default_rng(seed).choice(array, (repeats, len(array))), axis=1)
    low, high = np.quantile(draws, [ALPHA / 2, 1 - ALPHA / 2])
    return Interval(float(statistic(array)), float(low), float(high))


def over_seeds(by_seed: Sequence[Sequence[float] | np.ndarray], bounds: tuple[float, float] = UNBOUNDED) -> Interval:
    """`t_interval` of each seed's mean over its prompts; `by_seed` holds an array of values by prompt for each seed."""
    return t_interval([_numbers(values).mean() for values in by_seed], bounds)


# ---------------------------------------------------------------------------------------------------- differences


def paired(ours: Sequence[float], theirs: Sequence[float]) -> Difference:
    """Mean of ours less theirs, both (S,) in the same order of seeds, by Student's paired t test.

    For seeds that give both sides the same prompts in the same order and the same start; otherwise use `welch`.
    """
    a, b = _numbers(ours), _numbers(theirs)
    if len(a) != len(b):
        raise InputError(f"{len(a)} and {len(b)} seeds cannot be paired; give both the same seeds, or use welch")
    return _difference(a, b, _error(a - b), len(a) - 1, True)


def welch(ours: Sequence[float], theirs: Sequence[float]) -> Difference:
    """Mean of ours less mean of theirs, over independent seeds, by Welch's t test (Satterthwaite's df)."""
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
    """Difference in pooled standard deviations of one run, times Hedges' exact correction (1981); NaN if unknown.

    Treats paired seeds as independent too, so that effect sizes are comparable.
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
    """p-values, in their order, corrected to bound the chance of any false positive among all tests (Holm, 1979)."""
    values = np.asarray(p, float)
    order, m = values.argsort(kind="stable"), len(values)
    stepped = np.maximum.accumulate(values[order] * (m - np.arange(m))) if m else values
    corrected = np.empty(m)
    corrected[order] = np.minimum(stepped, 1)
    return corrected.tolist()


def power(difference: float, error: float, df: float, alpha: float = ALPHA) -> float:
    """Chance that a two-sided t test with this standard error detects a true `difference`: P(|t| > c), t noncentral.

    Averages over the distribution of the estimated standard error; scipy's noncentral t fails for the large effects
    that two seeds need.
    """
    from scipy.special import ndtr, stdtrit

    shift, reach = abs(difference) / error, stdtrit(df, 1 - alpha / 2) * _spreads(df)
    return float((ndtr(shift - reach) + ndtr(-shift - reach)).mean())


@lru_cache(maxsize=64)
def _spreads(df: float, n: int = 2000) -> np.ndarray:
    """Estimated over true standard error: n equally likely ratios."""
    from scipy.special import gammaincinv

    return np.sqrt(gammaincinv(df / 2, (np.arange(n) + 0.5) / n) * 2 / df)


def power_within(margin: float, mean: float, error: float, df: float, alpha: float = ALPHA) -> float:
    """Chance that two one-sided t tests show a true difference of `mean` to be smaller than `margin`."""
    from scipy.special import ndtr, stdtrit

    reach = stdtrit(df, 1 - alpha) * _spreads(df)
    inside = ndtr((margin - mean) / error - reach) + ndtr((margin + mean) / error - reach) - 1
    return float(np.maximum(inside, 0).mean())


SIZES = (*range(2, 21), 25, 30, 40, 50, 75, 100, 150, 200, 300, 500, 1000)  # numbers of seeds that are looked at


def seeds_needed(
    measured: Difference, level: Callable[[int], float], margin: float | None = None, chance: float = 0.8
) -> float:
    """How many seeds, of `SIZES`, would decide with this chance, were the true difference and spread as measured.

    Decide that there is a difference, or with `margin` that it is smaller; `level` gives the tests' level at a number
    of seeds. Infinite where none of `SIZES` would do.
    """
    if measured.df <= 0:
        return math.inf
    for n in SIZES:
        df, error = measured.df * (n - 1) / (measured.seeds - 1), measured.error * math.sqrt(measured.seeds / n)
        if error == 0:
            reached = 1.0 if (measured.mean != 0 if margin is None else abs(measured.mean) < margin) else 0.0
        elif margin is None:
            reached = power(measured.mean, error, df, level(n))
        else:
            reached = power_within(margin, measured.mean, error, df, level(n))
        if reached >= chance:
            return n
    return math.inf


# ---------------------------------------------------------------------------------------------------- over tasks


def interquartile_mean(tasks: Tasks, repeats: int = 20_000, seed: int = 0) -> Interval:
    """Mean of the middle half of all runs' values (rliable: Agarwal et al., 2021); of all values, if three or fewer.

    The interval resamples seeds within each task, with percentiles expanded for few seeds (Hesterberg, 2015). It is
    unknown if a task has fewer than `FEWEST` seeds, which have too few distinct resamples.
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
    """Probability that a run of ours has a higher value than one of theirs on the same task; ties count half.

    The mean over tasks, with the score interval of Newcombe (2006, method 5), which evaluates the variance at the
    bounds and so covers for few seeds and near 0 and 1. Raises `InputError` if the numbers of tasks differ.
    """
    from scipy.optimize import brentq
    from scipy.stats import norm

    if len(ours) != len(theirs) or not len(ours):
        raise InputError(f"{len(ours)} and {len(theirs)} tasks; compare on the same datasets, one or more")
    pairs = [(_numbers(a), _numbers(b)) for a, b in zip(ours, theirs)]
    share = float(np.mean([_wins(a, b) for a, b in pairs]))
    z2 = norm.ppf(1 - ALPHA / 2) ** 2

    def beyond(x: float) -> float:
        variance = np.mean([_wins_variance(x, len(a), len(b)) for a, b in pairs]) / len(pairs)
        return (x - share) ** 2 - z2 * variance

    low = brentq(beyond, 0, share - 1e-9) if share > 0 else 0.0  # not at the share itself, a root if it is 0 or 1
    return Interval(share, float(low), float(brentq(beyond, share + 1e-9, 1)) if share < 1 else 1.0)


def _wins(a: np.ndarray, b: np.ndarray) -> float:
    gap = a[:, None] - b[None, :]
    return float(((gap > 0) + 0.5 * (gap == 0)).mean())


def _wins_variance(x: float, m: int, n: int) -> float:
    """Variance of the share of won pairs, if its mean is x, for m and n runs (Hanley and McNeil, 1982)."""
    half = (m + n) / 2 - 1
    return x * (1 - x) * (1 + half * ((1 - x) / (2 - x) + x / (1 + x))) / (m * n)


# ---------------------------------------------------------------------------------------------------- tables of runs


def summarise(evaluations: Mapping[str, Sequence[pd.DataFrame]], column: str) -> dict[str, Interval]:
    """`over_seeds` of one column for each arm; `evaluations` holds a table of judgements by prompt for each seed."""
    bounds = BOUNDS.get(column, UNBOUNDED)
    return {arm: over_seeds([t[column].to_numpy() for t in tables], bounds) for arm, tables in evaluations.items()}


def arm_table(evaluations: Mapping[str, Sequence[pd.DataFrame]]) -> pd.DataFrame:
    """One row of text per arm: seeds, gold score, proxy score, KL and win rate, with 95 % intervals over seeds."""
    import pandas as pd

    labels = {"gold": "gold (log-odds)", "proxy": "proxy (sd)", "kl": "KL (nats a response)", "win": "win rate"}
    columns = {label: summarise(evaluations, name) for name, label in labels.items()}
    seeds = {"arm": list(evaluations), "seeds": [len(tables) for tables in evaluations.values()]}
    return pd.DataFrame(seeds | {label: [str(i) for i in by_arm.values()] for label, by_arm in columns.items()})


def difference(
    ours: Sequence[pd.DataFrame], theirs: Sequence[pd.DataFrame], column: str = "gold", test: Callable = paired
) -> Difference:
    """Of means of `column` on the same prompts, by `test`; a table of judgements per seed, in the same order."""
    if [len(table) for table in ours] != [len(table) for table in theirs]:
        raise InputError(f"{len(ours)} and {len(theirs)} seeds, or different numbers of prompts; judge both arms alike")
    return test(*([table[column].mean() for table in tables] for tables in (ours, theirs)))
