"""Shapley values given the scores of any coalitions, and how sure they are: the posterior of a Gaussian process.

The score of the players S is v(S) = sum over T of c_T prod_{i in T} s_i, with s_i = 1 for those in S and -1 for the
others, and independent c_T ~ N(0, scale^2 rate^|T|): interactions are the weaker the more players they take. Terms of
no player and of one have `FREE` times that variance, so that an additive game costs nothing. All terms together are the
kernel prod_i (1 + rate s_i t_i). The Shapley value of i, the integral of dv / du_i at (u, ..., u) over u from -1 to 1
(Owen, 1972), is linear in v: given scores, values and scale follow a multivariate t distribution.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from scipy.linalg import cho_solve, cholesky, solve_triangular
from scipy.special import stdtrit
from torch import from_numpy

from dense_rlhf.attribution.coalitions import Design, leverage_shap, permutation_shap
from dense_rlhf.config.params import AttributionParams
from dense_rlhf.types import InputError

if TYPE_CHECKING:
    from dense_rlhf.attribution.kinds import Designed

FREE = 1e5  # how much more variance main effects have than the kernel gives them
INTERACTIONS = 2.4  # rate = this / k, chosen on 70 responses to the reviews proxy, see docs/explain.md
MOST = 8192  # coalitions solved together, half a gigabyte
LEVEL = 0.95
NODES, WEIGHTS = np.polynomial.legendre.leggauss(16)  # for integrands near exp(INTERACTIONS u)


class Estimate(NamedTuple):
    """Credit of k players; how sure it is, where that is known."""

    credit: np.ndarray  # (k,)
    half_width: np.ndarray | None = None  # (k,) of the 95 % interval of each
    settled: int | None = None  # so many players of largest |credit| have their place at that level


@dataclass(frozen=True)
class Posterior:
    """Shapley values of k players given the scores of m coalitions."""

    masks: np.ndarray  # (m, k) bool
    operator: np.ndarray  # (k, m): credit = operator @ scores
    factor: np.ndarray  # (m, m) lower Cholesky factor of the kernel
    covariance: np.ndarray  # (k, k) of the credit at scale 1

    def __call__(self, scores: np.ndarray) -> Estimate:
        """Credit, intervals and ranking from the scores (m,)."""
        m, k = self.masks.shape
        credit, freedom = self.operator @ scores, m - k - 1  # the scale follows from what is not additive
        if freedom < 1:
            return Estimate(credit, settled=0)
        reduced = solve_triangular(self.factor, scores, lower=True)
        wide = stdtrit(freedom, (1 + LEVEL) / 2) * np.sqrt(reduced @ reduced / freedom)
        variance = np.maximum(np.diag(self.covariance), 0)  # rounding may leave it below
        return Estimate(credit, wide * np.sqrt(variance), self._settled(credit, wide))

    def _settled(self, credit: np.ndarray, wide: float) -> int:
        """How many of the largest |credit| are above each that follows, by the interval of their difference."""
        order = np.argsort(-np.abs(credit), kind="stable")
        sign = np.sign(credit)[order]
        size, cov = np.abs(credit)[order], self.covariance[np.ix_(order, order)] * np.outer(sign, sign)
        variance = np.diag(cov)[:, None] + np.diag(cov) - 2 * cov
        above = size[:, None] - size > wide * np.sqrt(np.maximum(variance, 0))
        first = [bool(above[n, n + 1 :].all()) for n in range(len(size))]
        return first.index(False) if False in first else len(first)


def posterior(masks: np.ndarray) -> Posterior:
    """What the scores of different coalitions (m, k) will say; complete if the empty and the full are among them.

    Exact for additive games, and from all 2^k coalitions. Raises `InputError` for more than `MOST`.
    """
    m, k = masks.shape
    if m > MOST:
        raise InputError(f"{m} coalitions, wanted at most {MOST}; lower samples_per_token, or take source 'shap'")
    rate, signs = min(INTERACTIONS / k, 0.5), np.where(masks, 1.0, -1.0)
    linear = signs @ signs.T
    kernel = _product(rate, (k + linear) / 2, k) + FREE * (1 + rate * linear)
    factor = cholesky(kernel + 1e-8 * np.eye(m), lower=True)
    along = _product(rate * NODES, masks.sum(1)[:, None], k)  # the kernel to the points (u, ..., u)
    with_i, without_i = ((along / (1 + sign * rate * NODES)) @ WEIGHTS for sign in (1, -1))
    shared = rate * signs * (np.where(masks, with_i[:, None], without_i[:, None]) + 2 * FREE)
    operator = cho_solve((factor, True), shared).T
    return Posterior(masks, operator, factor, _prior(k, rate) - operator @ shared)


def _product(rate: np.ndarray | float, agree: np.ndarray, k: int) -> np.ndarray:
    """prod over k players of 1 + rate where two points agree, 1 - rate where they do not."""
    return (1 + rate) ** agree * (1 - rate) ** (k - agree)


def _prior(k: int, rate: float) -> np.ndarray:
    """Covariance (k, k) of the Shapley values before any score."""
    product, weight = rate * np.outer(NODES, NODES), np.outer(WEIGHTS, WEIGHTS)
    own = rate * (weight * (1 + product) ** (k - 1)).sum()
    two = rate * (weight * product * (1 + product) ** (k - 2)).sum()
    return np.full((k, k), two) + np.eye(k) * (own - two + 4 * FREE * rate)


# ---------------------------------------------------------------------------------------------------- as a source


@lru_cache(maxsize=8)
def drawn(k: int, evaluations: int, seed: int) -> Posterior:
    """The posterior from at most `evaluations` + 2 coalitions of k players, the empty and the full one first.

    Below three a player they are those of one antithetic permutation, else drawn by leverage; all, where these are
    enough. Raises `InputError` below two a player.
    """
    few = evaluations < 3 * k
    return posterior((permutation_shap(k, 1, seed) if few else leverage_shap(k, evaluations, seed)).masks.numpy())


@dataclass(frozen=True)
class Gaussian:
    """The source `gaussian` of `explain`: like `kinds.Designed`, and it knows how sure it is."""

    complete: bool = True

    def posterior(self, k: int, params: AttributionParams) -> Posterior:
        if params.samples_per_token < 2:
            raise InputError("samples_per_token is 1, wanted at least 2 for gaussian; leave_one_out takes one a token")
        return drawn(k, params.samples_per_token * k, params.seed)

    def design(self, k: int, params: AttributionParams) -> Design:
        """The coalitions of k players and the operator on their scores."""
        made = self.posterior(k, params)
        return Design(from_numpy(made.masks), from_numpy(made.operator))


def estimate(source: Designed | Gaussian, k: int, params: AttributionParams, scores: np.ndarray) -> Estimate:
    """The credit of k players by a source from the scores (m,) of its coalitions."""
    if isinstance(source, Gaussian):
        return source.posterior(k, params)(scores)
    return Estimate(source.design(k, params).operator.numpy() @ scores)
