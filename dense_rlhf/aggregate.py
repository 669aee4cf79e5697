"""How sure a comparison of few runs is, after rliable (Agarwal et al., 2021): interquartile means, probabilities of
improvement, and intervals that resample runs within each task.

A task is a dataset, a run a seed; a run's value is the mean over its prompts, which are resampled too.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dense_rlhf.judge import Interval
from dense_rlhf.types import InputError

Tasks = Sequence[Sequence[np.ndarray]]  # of runs, of per-prompt values


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
