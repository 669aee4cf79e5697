"""AlpacaEval 2's length control, for any judge: preferences as between responses of equal length."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from dense_rlhf.evaluation.judge.interface import check_lengths
from dense_rlhf.types import InputError

if TYPE_CHECKING:
    import pandas as pd
    from numpy.random import RandomState

FOLDS = 5
INVERSE_PENALTIES = np.logspace(-4, 4, 10)
GAMED_WEIGHT = 0.2 / 2  # of each annotation of the two gamed baselines
ORDER = 123  # seed of the order in which the solver visits coefficients


def length_controlled(
    preference: np.ndarray,
    ours: Sequence[str],
    theirs: Sequence[str],
    difficulty: np.ndarray | None = None,
    gamed: pd.DataFrame | None = None,
) -> np.ndarray:
    """(N,) the preference for ours if both responses were equally long; its mean is the length-controlled win rate.

    `preference` (N,) is in [0, 1]; where NaN it is predicted, not fitted. Dubois et al. (2024, arXiv 2404.04475):
    logit P = a + b tanh(difference of characters / its standard deviation) + c difficulty, with an L1 penalty chosen
    by 5-fold cross-validation, then evaluated with b = 0. From alpaca_eval: `difficulty` (N,) is its
    instruction_difficulty (without it all instructions count alike); `gamed` its annotations of a baseline told to be
    brief or long (df_gamed.csv), which regularise b and c. The fit has no standard error: resample whole seeds.

    Raises `InputError` for lengths that disagree, numbers outside [0, 1], and fewer than five judged pairs.
    """
    preference = np.asarray(preference, float)
    given = {} if difficulty is None else {"difficulty": difficulty}
    check_lengths(preference=preference, ours=ours, theirs=theirs, **given)
    judged = ~np.isnan(preference)
    if judged.sum() < FOLDS:
        raise InputError(f"{judged.sum()} judged pairs, wanted at least {FOLDS} to control for length; judge more")
    if ((preference < 0) | (preference > 1)).any():
        raise InputError("preference holds numbers outside of [0, 1], wanted shares")
    gap = np.array([len(b) - len(a) for a, b in zip(ours, theirs)], float)
    sd = gap.std(ddof=1)
    features = _features(gap / sd if sd else gap, difficulty)
    X, y, weight = features[judged], preference[judged], np.ones(judged.sum())
    if gamed is not None:
        known = _features(gamed["std_delta_len"], None if difficulty is None else gamed["instruction_difficulty"], 0.0)
        X, y = np.concatenate([known, X]), np.concatenate([gamed["preference"], y])
        weight = np.concatenate([np.full(len(known), GAMED_WEIGHT), weight])
    with warnings.catch_warnings():  # a weak penalty can separate a fold perfectly
        warnings.filterwarnings("ignore", "Liblinear failed to converge")
        inverse_penalty = _best_penalty(X, y, weight)
    equal = features * (np.arange(features.shape[1]) > 0)  # the length term is the first
    return _fit(X, y, weight, inverse_penalty).predict_proba(equal)[:, 1]


def _features(gap: Sequence[float], difficulty: Sequence[float] | None, ours: float = 1.0) -> np.ndarray:
    """(N, 2 or 3): length, difficulty, and a constant that is 0 for a gamed baseline."""
    columns = [np.tanh(gap)] + ([] if difficulty is None else [np.asarray(difficulty, float)])
    return np.stack([*columns, np.full(len(gap), ours)], 1)


def _fit(X: np.ndarray, y: np.ndarray, weight: np.ndarray, inverse_penalty: float, order: int | RandomState = ORDER):
    """Logistic regression on shares: each row counts as y wins and 1 - y losses."""
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(
        C=inverse_penalty, l1_ratio=1, solver="liblinear", fit_intercept=False, random_state=order
    )
    won = np.repeat([1, 0], len(y))
    return model.fit(np.tile(X, (2, 1)), won, np.concatenate([y * weight, (1 - y) * weight]))


def _best_penalty(X: np.ndarray, y: np.ndarray, weight: np.ndarray) -> float:
    """The inverse penalty with the lowest log loss on held-out rows, mean over folds."""
    from sklearn.model_selection import GroupKFold

    losses = np.zeros(len(INVERSE_PENALTIES))
    for learn, held_out in GroupKFold(FOLDS).split(X, groups=np.arange(len(X))):
        order = np.random.RandomState(ORDER)  # shared by all penalties, as on scikit-learn's own path
        for i, inverse_penalty in enumerate(INVERSE_PENALTIES):
            q = _fit(X[learn], y[learn], weight[learn], inverse_penalty, order).predict_proba(X[held_out])[:, 1]
            q, p = q.clip(1e-15, 1 - 1e-15), y[held_out]
            losses[i] -= np.mean(weight[held_out] * (p * np.log(q) + (1 - p) * np.log(1 - q)))
    return INVERSE_PENALTIES[losses.argmin()]
