"""Shapley values given the scores of any coalitions, and how sure they are: the posterior of a Gaussian process.

The score of the players S is v(S) = f(|S|) + sum over T of c_T prod_{i in T} s_i, with s_i = 1 for those in S and -1
for the others, and independent c_T ~ N(0, scale^2 rate^|T|): interactions are the weaker the more players they take.
Terms of no player and of one have `FREE` times that variance, so that an additive game costs nothing; f, what the
number of players does whichever they are, has variance `LENGTH` scale^2. Nor are interactions all that regular: each
coalition has a value of its own, of `OWN` times the variance that they give a score. The Shapley value of i, the
integral of dv / du_i at (u, ..., u) over u from -1 to 1 (Owen, 1972), is linear in v: given scores and rate, values
and scale follow a multivariate t distribution. Which rate is not known: the posterior is the mean of those of `RATES`,
each weighed by its likelihood.

Only interactions of an odd number of players enter Shapley values and v(S) - v(complement of S). So where coalitions
come in such pairs, half their differences are all that is read. Where they do not, or are too few to tell a scale, the
likelihood is mostly of even interactions, of which odd ones may differ: there only the higher rates count.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from scipy.linalg import cho_solve, cholesky, solve_triangular
from scipy.special import comb, stdtrit

from dense_rlhf.attribution.shells import shells
from dense_rlhf.config.params import AttributionParams
from dense_rlhf.types import InputError

if TYPE_CHECKING:
    from dense_rlhf.attribution.kinds import Designed

FREE = 1e5  # how much more variance main effects have than the kernel gives them
LENGTH, OWN = 0.5, 0.02  # docs/explain.md has the responses that they were chosen on
RATES, CAUTIOUS = (0.6, 1.2, 2.4, 4.8, 9.6), (2.4, 4.8)  # over k: where differences are read, and where all scores are
FEWEST = 3  # more pairs than players from which differences alone tell the scale
MOST = 4096  # scores, or differences of scores, that are solved together: half a gigabyte
LEVEL = 0.95
NODES, WEIGHTS = np.polynomial.legendre.leggauss(16)  # for integrands near exp(RATES u)


class Estimate(NamedTuple):
    """Credit of k players; how sure it is, where that is known."""

    credit: np.ndarray  # (k,)
    half_width: np.ndarray | None = None  # (k,) of the 95 % interval of each
    settled: int | None = None  # so many players of largest |credit| have their place at that level


@dataclass(frozen=True)
class Rate:
    """What n scores, or half differences of scores, say if interactions fade at one rate."""

    operator: np.ndarray  # (k, n): credit = operator @ what is read
    factor: np.ndarray  # (n, n) lower Cholesky factor of the kernel
    log_volume: float  # the log-determinant of the kernel without main effects
    covariance: np.ndarray  # (k, k) of the credit at scale 1


@dataclass(frozen=True)
class Posterior:
    """Shapley values of k players given the scores of m coalitions."""

    masks: np.ndarray  # (m, k) bool
    pairs: np.ndarray | None  # (2, m / 2) rows of coalitions and their complements; None: all scores are read
    rates: tuple[Rate, ...]

    def __call__(self, scores: np.ndarray) -> Estimate:
        """Credit, intervals and ranking from the scores (m,)."""
        read = scores if self.pairs is None else (scores[self.pairs[0]] - scores[self.pairs[1]]) / 2
        credits = np.array([each.operator @ read for each in self.rates])
        freedom = len(read) - self.masks.shape[1] - (self.pairs is None)  # the scale follows from what is not additive
        if freedom < 1:
            return Estimate(credits.mean(0), settled=0)
        reduced = [solve_triangular(each.factor, read, lower=True) for each in self.rates]
        rounding = np.finfo(np.float32).eps * np.abs(scores).max()  # models score in single precision
        scales = np.array([one @ one / freedom for one in reduced]) + max(rounding, 1e-30) ** 2
        likely = -freedom / 2 * np.log(scales) - np.array([each.log_volume for each in self.rates]) / 2
        weights = np.exp(likely - likely.max())
        weights /= weights.sum()
        credit, apart = weights @ credits, credits - weights @ credits
        shared = sum(weight * scale * each.covariance for weight, scale, each in zip(weights, scales, self.rates))
        covariance = shared + apart.T @ (weights[:, None] * apart)
        wide, variance = stdtrit(freedom, (1 + LEVEL) / 2), np.maximum(np.diag(covariance), 0)  # by rounding below
        return Estimate(credit, wide * np.sqrt(variance), _settled(credit, covariance * wide**2))


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
    k, rates = masks.shape[1], CAUTIOUS if pairs is None else RATES
    return Posterior(masks, pairs, tuple(_at(min(rate / k, 0.9), masks, pairs) for rate in rates))


def _pairs(masks: np.ndarray) -> np.ndarray | None:
    """The rows (2, m / 2) of coalitions and of their complements, where all have theirs and they tell the scale."""
    row = {mask.tobytes(): number for number, mask in enumerate(masks)}
    pairs = [(number, row.get((~mask).tobytes(), -1)) for number, mask in enumerate(masks)]
    pairs = [pair for pair in pairs if pair[0] < pair[1]]
    m, k = masks.shape
    return np.array(pairs).T if 2 * len(pairs) == m >= 2 * (k + FEWEST) else None


def _at(rate: float, masks: np.ndarray, pairs: np.ndarray | None) -> Rate:
    """By one rate. Main effects have no share in what may be wrong: the credit has those as they are."""
    k = masks.shape[1]
    if pairs is None:
        kernel, bare = (_kernel(masks, masks, rate, free) for free in (FREE, -1))
        shared, own = (_shared(masks, rate, free) for free in (FREE, -1))
    else:
        one, other = masks[pairs]
        kernel, bare = ((_kernel(one, one, rate, f) - _kernel(one, other, rate, f)) / 2 for f in (FREE, -1))
        shared, own = ((_shared(one, rate, f) - _shared(other, rate, f)) / 2 for f in (FREE, -1))
    factor = cholesky(kernel + 1e-8 * np.eye(len(kernel)), lower=True)
    operator = cho_solve((factor, True), shared.T).T
    cross = operator @ own.T
    covariance = _prior(k, rate, -1) - cross - cross.T + operator @ bare @ operator.T
    return Rate(operator, factor, 2 * np.log(np.diag(factor)).sum() - k * np.log(rate), covariance)


# ---------------------------------------------------------------------------------------------------- covariances


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


@lru_cache(maxsize=8)
def drawn(k: int, evaluations: int, seed: int) -> Posterior:
    """The posterior from at most `evaluations` + 2 coalitions of k players in `shells`."""
    return posterior(shells(k, evaluations, seed))


@dataclass(frozen=True)
class Gaussian:
    """The source `gaussian` of `explain`: like `kinds.Designed`, and it knows how sure it is."""

    complete: bool = True

    def posterior(self, k: int, params: AttributionParams) -> Posterior:
        """Raises `InputError` below two evaluations a player."""
        if params.samples_per_token < 2:
            raise InputError("samples_per_token is 1, wanted at least 2 for gaussian; leave_one_out takes one a token")
        return drawn(k, params.samples_per_token * k, params.seed)

    def masks(self, k: int, params: AttributionParams) -> np.ndarray:
        """The coalitions (m, k) of k players, the empty and the full one first."""
        return self.posterior(k, params).masks


def estimate(source: Designed | Gaussian, k: int, params: AttributionParams, scores: np.ndarray) -> Estimate:
    """The credit of k players by a source from the scores (m,) of its coalitions."""
    if isinstance(source, Gaussian):
        return source.posterior(k, params)(scores)
    return Estimate(source.design(k, params).operator.numpy() @ scores)
