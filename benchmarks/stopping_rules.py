"""When to stop a search, by the rules of other projects, on our model, for `benchmarks/bayesopt.py`.

ours    `audit.verdict` says converged: the expected regret is within a quarter of one observation's sd or a
        twentieth of the posterior's range, and four trials a number of a point are through
bounds  Makarova et al. (2022), as in BoFire and optuna: the highest upper confidence bound anywhere exceeds the
        highest lower bound among tried points by no more than one observation's sd; beta is a fifth of that of
        GP-UCB (Srinivas et al., 2010) at delta 0.1; not before the fifth trial
prb     Wilson (2024), as in trieste_stopping: for one of the five tried points that are the likeliest best, the
        probability that its regret exceeds epsilon is below 0.025, by a Clopper-Pearson bound of 1,024 joint
        draws at total risk 0.025; epsilon is our tolerance
"""

from __future__ import annotations

import math

import numpy as np
from scipy.stats import beta

from dense_rlhf.bayesopt import audit
from dense_rlhf.bayesopt.search import Search, noise_variance

RULES = ("ours", "bounds", "prb")
POINTS, DRAWS = 192, 1024  # points that stand for all; joint draws
RISK = 0.025  # of the model, and again of the estimate, at Wilson's setting


def stops(search: Search, verdict: audit.Verdict) -> dict[str, bool]:
    """Whether each of `RULES` would stop the search as it stands; `verdict` is its audit."""
    tried = list(dict.fromkeys(search.points))
    everywhere = search.among[:: max(1, len(search.among) // POINTS)] if search.among else None
    mean, covariance = search.joint([*tried, *(everywhere or search.space.sobol(POINTS, search.seed))])
    return {
        "ours": verdict.kind == audit.CONVERGED,
        "bounds": bounds(mean, np.sqrt(covariance.diagonal().clip(0)), len(tried), search),
        "prb": probable(mean, covariance, len(tried), verdict.tolerance),
    }


def bounds(mean: np.ndarray, sd: np.ndarray, tried: int, search: Search) -> bool:
    """Of the posterior at points of which the first `tried` were tried."""
    n = len(search.values)
    width = math.sqrt(0.2 * 2 * math.log(search.space.d * n**2 * math.pi**2 / (6 * 0.1)))
    gap = (mean + width * sd).max() - (mean - width * sd)[:tried].max()
    return n >= 5 and bool(gap <= math.sqrt(noise_variance(search).mean()))


def probable(mean: np.ndarray, covariance: np.ndarray, tried: int, epsilon: float) -> bool:
    """Of the joint posterior at points of which the first `tried` were tried."""
    eigenvalues, vectors = np.linalg.eigh(covariance)
    factor = vectors * np.sqrt(eigenvalues.clip(min=0))
    sampled = mean + np.random.default_rng(0).standard_normal((DRAWS, len(mean))) @ factor.T
    likeliest = np.bincount(sampled[:, :tried].argmax(1), minlength=tried).argsort()[-5:]
    exceeding = (sampled.max(1, keepdims=True) - sampled[:, likeliest] > epsilon).sum(0)
    upper = beta.ppf(1 - RISK / 2 / len(likeliest), exceeding + 1, DRAWS - exceeding)
    return bool((np.nan_to_num(upper, nan=1.0) <= RISK).any())
