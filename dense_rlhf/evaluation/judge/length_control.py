"""Length control for any judge, after AlpacaEval 2: preferences as between responses of equal length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from dense_rlhf.evaluation.judge.interface import check_lengths
from dense_rlhf.types import InputError

if TYPE_CHECKING:
    import pandas as pd

FEWEST = 5  # judged pairs
EFFECT = 5.0  # prior sd, in log-odds, of what length or difficulty adds where half is won; docs/judges.md: its choice
RARE = 1.0  # that of length where almost nothing, or almost all, is won
GAMED_WEIGHT = 0.2 / 2  # of each annotation of the two gamed baselines


def length_controlled(
    preference: np.ndarray,
    ours: Sequence[str],
    theirs: Sequence[str],
    difficulty: np.ndarray | None = None,
    gamed: pd.DataFrame | None = None,
) -> np.ndarray:
    """(N,) the preference for ours if both responses were equally long; its mean is the length-controlled win rate.

    `preference` (N,) is in [0, 1]; where NaN it is predicted, not fitted. The model of Dubois et al. (2024, arXiv
    2404.04475): logit P = a + b x + c difficulty, x = tanh(difference of characters / its standard deviation),
    evaluated with b = 0. It is fitted by its highest posterior density: `a` is free, so a side that wins nothing has 0;
    c is Normal(0, EFFECT^2); b is Normal(0, RARE^2 + (4 p (1 - p) EFFECT)^2) at a raw win rate of p, so that a few wins
    teach little, and where all differences are alike the result is p. Exchanging the sides gives one less each number.

    From alpaca_eval: `difficulty` (N,) is its instruction_difficulty (without it all instructions count alike); `gamed`
    its annotations of a baseline told to be brief or long (df_gamed.csv), which teach b and c. There is no standard
    error: resample whole seeds.

    Raises `InputError` for lengths that disagree, responses that are no text, numbers outside [0, 1], and fewer than
    five judged pairs.
    """
    preference = np.asarray(preference, float)
    given = {} if difficulty is None else {"difficulty": difficulty}
    check_lengths(preference=preference, ours=ours, theirs=theirs, **given)
    judged = ~np.isnan(preference)
    if judged.sum() < FEWEST:
        raise InputError(f"{judged.sum()} judged pairs, wanted at least {FEWEST} to control for length; judge more")
    if ((preference < 0) | (preference > 1)).any():
        raise InputError("preference holds numbers outside of [0, 1], wanted shares")
    gap = _characters(theirs, "theirs") - _characters(ours, "ours")
    y = preference[judged]
    share, other = y.mean(), (1 - y).mean()
    if min(share, other) < 1e-12:  # the best `a` is infinite
        return np.full(len(preference), share.round())
    features = _features(gap / (gap.std(ddof=1) or 1), difficulty)
    X, weight, precision = features[judged], np.ones(len(y)), np.full(features.shape[1], EFFECT**-2.0)
    precision[0], precision[-1] = 1 / (RARE**2 + (4 * (share * other) * EFFECT) ** 2), 0.0
    if gamed is not None:
        known = _features(gamed["std_delta_len"], None if difficulty is None else gamed["instruction_difficulty"], 0.0)
        X, y = np.concatenate([known, X]), np.concatenate([gamed["preference"], y])
        weight = np.concatenate([np.full(len(known), GAMED_WEIGHT), weight])
    equal = features * (np.arange(features.shape[1]) > 0)  # the length term is the first
    return (1 + np.tanh(equal @ _fit(X, y, weight, precision) / 2)) / 2


def _characters(texts: Sequence[str], side: str) -> np.ndarray:
    texts = list(texts)
    wrong = next((row for row, text in enumerate(texts) if not isinstance(text, str)), None)
    if wrong is not None:
        raise InputError(f"{side}[{wrong}] is {texts[wrong]!r:.80}, wanted a text; leave pairs without a response out")
    return np.array([len(text) for text in texts], float)


def _features(gap: Sequence[float], difficulty: Sequence[float] | None, ours: float = 1.0) -> np.ndarray:
    """(N, 2 or 3): length, difficulty, and a constant that is 0 for a gamed baseline."""
    columns = [np.tanh(gap)] + ([] if difficulty is None else [np.asarray(difficulty, float)])
    return np.stack([*columns, np.full(len(gap), ours)], 1)


def _fit(X: np.ndarray, y: np.ndarray, weight: np.ndarray, precision: np.ndarray) -> np.ndarray:
    """(K,) coefficients of a logistic regression on shares y, by Newton's method, in odd functions: exchanging sides
    changes signs alone. Raises `InputError` where it does not converge."""

    def density(theta: np.ndarray) -> float:
        eta = X @ theta
        log_2_cosh = np.abs(eta) / 2 + np.log1p(np.exp(-np.abs(eta)))
        return weight @ ((y - 0.5) * eta - log_2_cosh) - precision @ theta**2 / 2

    theta = np.zeros(X.shape[1])
    for _ in range(100):
        eta = X @ theta
        slope = X.T @ (weight * (y - 0.5 - np.tanh(eta / 2) / 2)) - precision * theta
        bend = (X.T * (weight * (1 - np.tanh(eta / 2) ** 2) / 4)) @ X + np.diag(precision)
        step, now = np.linalg.solve(bend, slope), density(theta)
        while density(theta + step) < now and np.abs(step).max() > 1e-12:
            step = step / 2
        theta = theta + step
        if np.abs(step).max() < 1e-10:
            return theta
    raise InputError("the fit of length control does not settle; judge more pairs, of which some are won and some lost")
