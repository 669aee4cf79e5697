"""Judgements of whole responses: win rates, and intervals that know both seeds and prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dense_rlhf.types import InputError


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval."""

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


def bootstrap(by_seed: Sequence[np.ndarray], repeats: int = 2000, seed: int = 0) -> Interval:
    """Mean over seeds with a 95 % interval that resamples seeds, then prompts within each seed (percentiles).

    `by_seed` holds one array of per-prompt values a seed. With two seeds the spread between seeds is known poorly,
    and the interval is too short for it; the reports show each seed beside it.
    """
    if not by_seed or any(len(values) == 0 for values in by_seed):
        raise InputError("an interval of nothing; wanted at least one seed with at least one value")
    rng = np.random.default_rng(seed)
    arrays = [np.asarray(values, float) for values in by_seed]
    resampled = np.stack([rng.choice(values, (repeats, len(values))).mean(1) for values in arrays])  # (S, repeats)
    picks = rng.integers(len(arrays), size=(len(arrays), repeats))
    means = resampled[picks, np.arange(repeats)].mean(0)
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(np.mean([a.mean() for a in arrays])), float(low), float(high))
