"""How sure a comparison of few runs is: intervals that know both seeds and prompts, differences between arms, and,
after rliable (Agarwal et al., 2021), interquartile means and probabilities of improvement.

A task is a dataset, a run a seed; a run's value is the mean over its prompts, which are resampled too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dense_rlhf.types import InputError

if TYPE_CHECKING:
    import pandas as pd

Tasks = Sequence[Sequence[np.ndarray]]  # of runs, of per-prompt values


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


def interquartile_mean(tasks: Tasks, repeats: int = 2000, seed: int = 0) -> Interval:
    """Mean of the middle half of all runs' values, with its 95 % interval; of three runs or fewer, the plain mean."""
    drawn = [_resampled(runs, repeats, np.random.default_rng([seed, i])) for i, runs in enumerate(tasks)]
    low, high = np.quantile(_iqm(np.concatenate(drawn, 1)), [0.025, 0.975])
    return Interval(float(_iqm(_means(tasks))), float(low), float(high))


def improvement(ours: Tasks, theirs: Tasks, repeats: int = 2000, seed: int = 0) -> Interval:
    """Probability that a run of ours has a higher value than one of theirs on the same task, ties counting half.

    The mean over tasks. Raises `InputError` where the tasks are not as many.
    """
    if len(ours) != len(theirs):
        raise InputError(f"{len(ours)} and {len(theirs)} tasks; compare on the same datasets")
    sides = (ours, theirs)
    drawn = [[_resampled(runs, repeats, np.random.default_rng([seed, side, i])) for i, runs in enumerate(tasks)]
             for side, tasks in enumerate(sides)]  # fmt: skip
    known = [[_means([runs])[None] for runs in tasks] for tasks in sides]
    means, draws = (np.mean([_over(a, b) for a, b in zip(*both)], axis=0) for both in (known, drawn))
    return Interval(float(means[0]), *map(float, np.quantile(draws, [0.025, 0.975])))


def _means(tasks: Tasks) -> np.ndarray:
    if not tasks or any(len(runs) == 0 or any(len(run) == 0 for run in runs) for runs in tasks):
        raise InputError("an interval of nothing; wanted at least one run with at least one value in each task")
    return np.array([np.mean(run) for runs in tasks for run in runs])


def _resampled(runs: Sequence[np.ndarray], repeats: int, rng: np.random.Generator) -> np.ndarray:
    """(repeats, runs) values of runs drawn anew from these, each with prompts drawn anew from its own."""
    _means([runs])
    drawn = np.stack([rng.choice(np.asarray(run, float), (repeats, len(run))).mean(1) for run in runs], 1)
    picks = rng.integers(len(runs), size=drawn.shape)
    return np.take_along_axis(drawn, picks, 1)


def _iqm(values: np.ndarray) -> np.ndarray:
    """Of each row of (repeats, runs)."""
    cut = int(0.25 * values.shape[-1])
    return np.sort(values, axis=-1)[..., cut : values.shape[-1] - cut].mean(-1)


def _over(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Share of pairs (repeats, runs) x (repeats, runs) in which ours is higher, of each repeat."""
    gap = ours[:, :, None] - theirs[:, None, :]
    return ((gap > 0) + 0.5 * (gap == 0)).mean((1, 2))
