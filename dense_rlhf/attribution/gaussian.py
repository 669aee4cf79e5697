"""Shapley values given the scores of any coalitions, and how sure they are: the posterior of a Gaussian process.

The score of the players S is v(S) = f(|S|) + sum over T of c_T prod_{i in T} s_i, with s_i = 1 for those in S and -1
for the others, and independent c_T ~ N(0, scale^2 rate^|T|): interactions are the weaker the more players they take.
Terms of no player and of one have `FREE` times that variance, so that an additive game costs nothing; f, what the
number of players does whichever they are, has variance `LENGTH` scale^2. Nor are interactions all that regular: each
coalition has a value of its own, of `OWN` times the variance that they give a score. The Shapley value of i, the
integral of dv / du_i at (u, ..., u) over u from -1 to 1 (Owen, 1972), is linear in v: given scores and rate, values
and scale follow a multivariate t distribution. The credit is the mean of those of `RATES`, and so linear in the scores;
its variance is averaged over the rates too, each weighed by its likelihood. Players that matter interact more
(heredity; Chipman, 1996): a share `HEREDITY` of the variance follows the squared credit.

Only interactions of an odd number of players enter Shapley values and v(S) - v(complement of S). So where coalitions
come in such pairs, half their differences are all that is read. Where they do not, or are too few to tell a scale, the
likelihood is mostly of even interactions, of which odd ones may differ: there only `CAUTIOUS` rates count.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from scipy.linalg import cho_solve, cholesky, solve_triangular
from scipy.special import comb, stdtrit
from torch import from_numpy

from dense_rlhf.attribution.coalitions import Design, Estimate
from dense_rlhf.attribution.shells import shells
from dense_rlhf.types import InputError

FREE = 1e5  # how much more variance main effects have than the kernel gives them
LENGTH, OWN = 0.5, 0.02  # docs/explain.md has the responses that they were chosen on
RATES = 0.6, 1.2, 2.4, 4.8, 9.6  # over k: where differences are read
CAUTIOUS = 0.5, 1.0  # over the root of k, up to the last of those: where all scores are
HEREDITY = 0.25
FEWEST = 3  # more pairs than players from which differences alone tell the scale
MOST = 4096  # scores, or differences of scores, that are solved together: 0.7 gigabytes of factors
LEVEL = 0.95
NODES, WEIGHTS = np.polynomial.legendre.leggauss(16)  # for integrands near exp(RATES u)


@dataclass(frozen=True)
class Errors:
    """How far the credit may be from the Shapley values, by one rate and n scores, or half differences of scores."""

    factor: np.ndarray  # (n, n) lower Cholesky factor of their kernel
    log_volume: float  # the log-determinant of the kernel without main effects
    covariance: np.ndarray  # (k, k) of the credit at scale 1


@dataclass(frozen=True)
class Posterior:
    """Shapley values of k players given the scores of m coalitions."""

    masks: np.ndarray  # (m, k) bool
    operator: np.ndarray  # (k, m): credit = operator @ scores
    pairs: np.ndarray | None  # (2, m / 2) rows of coalitions and their complements; None: all scores are read
    errors: tuple[Errors, ...]  # of each rate

    def __call__(self, scores: np.ndarray) -> Estimate:
        """Credit, intervals and ranking from the scores (m,)."""
        credit, k = self.operator @ scores, self.masks.shape[1]
        read = scores if self.pairs is None else (scores[self.pairs[0]] - scores[self.pairs[1]]) / 2
        freedom = len(read) - k - (self.pairs is None)  # the scale follows from what is not additive
        if freedom < 1:
            return Estimate(credit, settled=0)
        reduced = [solve_triangular(each.factor, read, lower=True) for each in self.errors]
        rounding = np.finfo(np.float32).eps * np.abs(scores).max()  # models score in single precision
        scales = np.array([one @ one / freedom for one in reduced]) + max(rounding, 1e-30) ** 2
        likely = -freedom / 2 * np.log(scales) - np.array([each.log_volume for each in self.errors]) / 2
        weights = np.exp(likely - likely.max())
        shares = scales * weights / weights.sum()
        covariance = sum(share * each.covariance for share, each in zip(shares, self.errors)) * inherited(credit)
        wide, variance = stdtrit(freedom, (1 + LEVEL) / 2), np.maximum(np.diag(covariance), 0)  # by rounding below
        return Estimate(credit, wide * np.sqrt(variance), _settled(credit, covariance * wide**2))


def inherited(credit: np.ndarray) -> np.ndarray:
    """Factors (k, k) of the covariance, by which interactions follow the credit; the mean of the diagonal is 1."""
    squared = credit**2
    share = squared / squared.mean() if squared.any() else np.ones(len(credit))
    growth = np.sqrt(1 - HEREDITY + HEREDITY * share)
    return np.outer(growth, growth)


def _settled(credit: np.ndarray, spread: np.ndarray) -> int:
    """How many of the largest |credit| are above each that follows, by the interval of their difference."""
    order = np.argsort(-np.abs(credit), kind="stable")
    sign = np.sign(credit)[order]
    size, spread = np.abs(credit)[order], spread[np.ix_(order, order)] * np.outer(sign, sign)
    squared = np.diag(spread)[:, None] + np.diag(spread) - 2 * spread
    above = size[:, None] - size > np.sqrt(np.maximum(squared, 0))
    first = [bool(above[n, n + 1 :].all()) for n in range(len(size))]
    return first.index(False) if False in first else len(first)


def posterior(masks: np.ndarray) -> Posterior:
    """What the scores of different coalitions (m, k) will say; complete if the empty and the full are among them.

    Exact for additive games, and from all 2^k coalitions. Raises `InputError` for more than `MOST` to be read.
    """
    pairs = _pairs(masks)
    if (read := len(masks) if pairs is None else pairs.shape[1]) > MOST:
        what = "coalitions" if pairs is None else "pairs of coalitions"
        raise InputError(f"{read} {what}, wanted at most {MOST}; lower samples_per_token, or take source 'shap'")
    k = masks.shape[1]
    over_k = [min(rate * k**0.5, RATES[-1]) for rate in CAUTIOUS] if pairs is None else RATES
    rates = [min(rate / k, 0.9) for rate in over_k]  # at 1 none would fade
    solved = [_solved(rate, masks, pairs) for rate in rates]
    operator = np.mean([one.operator for one in solved], axis=0)
    wrong = [_wrong(operator, rate, masks, pairs) for rate in rates]
    errors = tuple(Errors(one.factor, one.log_volume, each) for one, each in zip(solved, wrong))
    if pairs is not None:
        half, operator = operator / 2, np.zeros(masks.T.shape)
        operator[:, pairs[0]], operator[:, pairs[1]] = half, -half
    return Posterior(masks, operator, pairs, errors)


def _pairs(masks: np.ndarray) -> np.ndarray | None:
    """The rows (2, m / 2) of coalitions and of their complements, where all have theirs and they tell the scale."""
    row = {mask.tobytes(): number for number, mask in enumerate(masks)}
    pairs = [(number, row.get((~mask).tobytes(), -1)) for number, mask in enumerate(masks)]
    pairs = [pair for pair in pairs if pair[0] < pair[1]]
    m, k = masks.shape
    return np.array(pairs).T if 2 * len(pairs) == m >= 2 * (k + FEWEST) else None


class Solved(NamedTuple):
    """The posterior mean by one rate, from n scores or half differences of scores."""

    operator: np.ndarray  # (k, n)
    factor: np.ndarray  # as of `Errors`
    log_volume: float


def _solved(rate: float, masks: np.ndarray, pairs: np.ndarray | None) -> Solved:
    kernel, shared = _covariances(rate, masks, pairs, FREE)
    factor = cholesky(kernel + 1e-8 * np.eye(len(kernel)), lower=True)
    log_volume = 2 * np.log(np.diag(factor)).sum() - masks.shape[1] * np.log(rate)
    return Solved(cho_solve((factor, True), shared.T).T, factor, log_volume)


def _wrong(operator: np.ndarray, rate: float, masks: np.ndarray, pairs: np.ndarray | None) -> np.ndarray:
    """The covariance (k, k) of what an operator (k, n) has wrong: not main effects, which it has as they are."""
    kernel, shared = _covariances(rate, masks, pairs, -1)
    cross = operator @ shared.T
    return _prior(masks.shape[1], rate, -1) - cross - cross.T + operator @ kernel @ operator.T


# ---------------------------------------------------------------------------------------------------- covariances


def _covariances(
    rate: float, masks: np.ndarray, pairs: np.ndarray | None, free: float
) -> tuple[np.ndarray, np.ndarray]:
    """Of what is read (n, n), and of k Shapley values with it (k, n)."""
    if pairs is None:
        return _kernel(masks, masks, rate, free), _shared(masks, rate, free)
    one, other = masks[pairs]
    kernel = (_kernel(one, one, rate, free) - _kernel(one, other, rate, free)) / 2
    return kernel, (_shared(one, rate, free) - _shared(other, rate, free)) / 2


def _kernel(one: np.ndarray, other: np.ndarray, rate: float, free: float = FREE) -> np.ndarray:
    """Of the scores of coalitions (m, k) and (n, k): (m, n). Main effects have 1 + `free` times their variance."""
    k, linear = one.shape[1], np.where(one, 1.0, -1.0) @ np.where(other, 1.0, -1.0).T
    as_many, same = one.sum(1)[:, None] == other.sum(1), linear == k
    shared = LENGTH * as_many + OWN * (1 + rate) ** k * same
    return _product(rate, (k + linear) / 2, k) + shared + free * (1 + rate * linear)


def _shared(masks: np.ndarray, rate: float, free: float = FREE) -> np.ndarray:
    """Of k Shapley values and the scores of coalitions (m, k): (k, m)."""
    k, size = masks.shape[1], masks.sum(1)
    along = _product(rate * NODES, size[:, None], k)  # the kernel to the points (u, ..., u)
    with_i, without_i = ((along / (1 + sign * rate * NODES)) @ WEIGHTS for sign in (1, -1))
    main = np.where(masks, with_i[:, None] + 2 * free, -without_i[:, None] - 2 * free)
    ends = (size == k).astype(float) - (size == 0)
    sets, others = (np.maximum(comb(k - 1, n), 1)[:, None] for n in (size - 1, size))
    weight = np.where(masks, 1 / sets, -1 / others) / k  # Shapley's
    return (rate * main + LENGTH / k * ends[:, None] + OWN * (1 + rate) ** k * weight).T


def _prior(k: int, rate: float, free: float = FREE) -> np.ndarray:
    """Of the Shapley values (k, k) before any score."""
    product, weight = rate * np.outer(NODES, NODES), np.outer(WEIGHTS, WEIGHTS)
    own = rate * (weight * (1 + product) ** (k - 1)).sum()
    two = rate * (weight * product * (1 + product) ** (k - 2)).sum()
    sets, value = 1 / comb(k - 1, np.arange(k)), OWN * (1 + rate) ** k / k**2
    apart = (k - np.arange(1, k)) / max(k - 1, 1)  # of the coalitions with one of two players, the share without both
    own, two = own + 2 * value * sets.sum(), two + value * (sets.sum() - 2 * apart @ sets[1:])
    return np.full((k, k), two + 2 * LENGTH / k**2) + np.eye(k) * (own - two + 4 * free * rate)


def _product(rate: np.ndarray | float, agree: np.ndarray, k: int) -> np.ndarray:
    """prod over k players of 1 + rate where two points agree, 1 - rate where they do not."""
    return (1 + rate) ** agree * (1 - rate) ** (k - agree)


# ---------------------------------------------------------------------------------------------------- as a source


@lru_cache(maxsize=16)  # 50 megabytes each at 512 players
def drawn(k: int, evaluations: int, seed: int) -> Posterior:
    """The posterior from at most `evaluations` + 2 coalitions of k players in `shells`.

    Raises `InputError` below two a player, but for the ends.
    """
    if evaluations < 2 * (k - 1):
        few = f"samples_per_token is {evaluations // k}, wanted at least 2 for gaussian"
        raise InputError(f"{few}; leave_one_out takes one a token")
    return posterior(shells(k, evaluations, seed))


def gaussian_shap(k: int, evaluations: int, seed: int) -> Design:
    """The coalitions of `drawn` and the operator on their scores."""
    made = drawn(k, evaluations, seed)
    return Design(from_numpy(made.masks), from_numpy(made.operator))
