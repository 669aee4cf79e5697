"""The frontier of a training: what its policies score at a KL from the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from dense_rlhf.statistics import Difference, paired

if TYPE_CHECKING:
    import pandas as pd

WIDTH, FEWEST = 1.6, 5  # half-width of the window in sqrt(nats), and how many policies it takes in at least
DEGREE = 2


def local_fit(distance: np.ndarray, score: np.ndarray, weight: np.ndarray, at: float) -> float:
    """The score `at` a distance by local quadratic regression on distances (N,), with Epanechnikov's kernel.

    `weight` (N,) is inverse to a score's variance. Unbiased where the score is quadratic over the window (Fan and
    Gijbels, 1996); exact between fewer distances than a quadratic needs. NaN for no score.
    """
    if not len(score):
        return float("nan")
    gap = np.abs(distance - at)
    width = max(WIDTH, 1.001 * np.sort(gap)[:FEWEST].max())
    inside = gap < width
    x, root = distance[inside] - at, np.sqrt(weight[inside] * (1 - (gap[inside] / width) ** 2))
    terms = np.vander(x, min(DEGREE, len(np.unique(x)) - 1) + 1, increasing=True)
    return float(np.linalg.lstsq(terms * root[:, None], score[inside] * root, rcond=None)[0][0])


def at_kl(history: pd.DataFrame, level: float, smooth: int = 5, judged: pd.DataFrame | None = None) -> pd.DataFrame:
    """Update where running means of `smooth` updates first reach a KL (nats), interpolated linearly, and the metrics of
    the run's policies at that KL, by `local_fit` on sqrt(KL), which evens out the noise of KL and the bend of gold.

    One row per run, with columns arm and seed; runs that never reach the level are left out. `judged` has further
    policies of the runs, with columns of `history`, and `evaluations`: how many updates' batches each is worth. A
    metric is taken as a function of KL: of a run that stays at one KL it is the mean over its stay.
    """
    import pandas as pd

    rows, columns = [], [name for name in history.select_dtypes("number") if name not in ("seed", "update")]
    for (arm, seed), run in history.groupby(["arm", "seed"], sort=False):
        update = _first_reached(run.sort_values("update"), level, smooth)
        if update is None:
            continue
        ends = [] if judged is None else [judged[(judged["arm"] == arm) & (judged["seed"] == seed)]]
        policies = pd.concat([run.assign(evaluations=1.0), *(table for table in ends if len(table))])
        distance = np.sqrt(np.maximum(policies["kl"].to_numpy(float), 0))  # estimates of KL may be below 0
        weight = policies["evaluations"].to_numpy(float)
        fits = {name: _known_fit(distance, policies[name].to_numpy(float), weight, level) for name in columns}
        rows.append({"arm": arm, "seed": seed, "update": update} | fits | {"kl": level})
    return pd.DataFrame(rows, columns=["arm", "seed", "update", *columns])


def _first_reached(run: pd.DataFrame, level: float, smooth: int) -> float | None:
    """The update, between two of them linearly, at which the running mean of KL first reaches a level."""
    kl = run["kl"].rolling(smooth, min_periods=1).mean().to_numpy()
    reached = kl >= level - 1e-9
    if not reached.any():
        return None
    after = int(reached.argmax())
    updates, before = run["update"].to_numpy(float), max(0, after - 1)
    return float(np.interp(level, kl[[before, after]], updates[[before, after]])) if after else float(updates[0])


def _known_fit(distance: np.ndarray, score: np.ndarray, weight: np.ndarray, level: float) -> float:
    known = np.isfinite(distance + score)
    return local_fit(distance[known], score[known], weight[known], max(level, 0) ** 0.5)


def values_at_kl(
    history: pd.DataFrame, ours: str, theirs: str, column: str = "gold", smooth: int = 3
) -> tuple[list[float], list[float]]:
    """`column` of both arms, a value per seed, at the largest KL that both reach (`at_kl`)."""
    needed = list(dict.fromkeys(("arm", "seed", "update", "kl", column)))
    both = history.loc[history["arm"].isin((ours, theirs)), needed]
    values: tuple[list[float], list[float]] = ([], [])
    for _, runs in both.groupby("seed"):
        ends = runs.groupby("arm")["kl"].apply(lambda kl: kl.rolling(smooth, min_periods=1).mean().max())
        if len(ends) == 2:
            by_arm = at_kl(runs, ends.min(), smooth).set_index("arm")[column]
            values[0].append(float(by_arm[ours]))
            values[1].append(float(by_arm[theirs]))
    return values


def difference_at_kl(
    history: pd.DataFrame, ours: str, theirs: str, smooth: int = 3, column: str = "gold", test: Callable = paired
) -> Difference:
    """Difference of `column` at the largest KL that both arms of a seed reach, by `test`: `paired` or `welch`. Raises
    `InputError` if no seed has both arms."""
    return test(*values_at_kl(history, ours, theirs, column, smooth))
