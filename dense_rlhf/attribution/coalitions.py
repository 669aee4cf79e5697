"""Which token subsets to score, and the linear map from their scores to credit: phi = A y.

For a fixed set of coalitions, permutation SHAP and LIME without feature selection are both linear in the scores.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Design:
    """Coalitions of k players and the operator that turns their scores into credit."""

    masks: Tensor  # (m, k) bool, row 0 empty and row 1 full
    operator: Tensor  # (k, m) float64


def _design(masks: np.ndarray, operator: np.ndarray) -> Design:
    """Put the empty and the full coalition first, and merge coalitions that occur twice."""
    k = masks.shape[1]
    ends = np.stack([np.zeros(k, bool), np.ones(k, bool)])
    unique, index = np.unique(np.concatenate([ends, masks]), axis=0, return_inverse=True)
    merged = np.zeros((k, len(unique)))
    np.add.at(merged.T, index.ravel()[2:], operator.T)
    sizes = unique.sum(1)
    order = np.lexsort([sizes, (sizes > 0) & (sizes < k)])  # empty, full, then the others by size
    return Design(torch.from_numpy(unique[order]), torch.from_numpy(merged[:, order]))


@lru_cache(maxsize=512)
def permutation_shap(k: int, permutations: int, seed: int) -> Design:
    """Shapley values by antithetic permutations, as `shap.PermutationExplainer(seed=seed)` draws and sums them.

    2 k permutations coalitions; complete for any number of them (Mitchell et al., 2022). Equal to shap 0.51 with
    an all-absent background and `max_evals = permutations * (2 k + 1)`, for the first row it explains.
    """
    rng, order = np.random.RandomState(seed), np.arange(k)
    masks, operator = [], np.zeros((k, permutations * (2 * k + 1)))
    for p in range(permutations):
        rng.shuffle(order)  # in place: each shuffle starts from the last order
        rank = np.empty(k, int)
        rank[order] = np.arange(k)
        start = p * (2 * k + 1)
        joined = rank[None] < np.arange(k + 1)[:, None]  # the first n of the order are present
        left = rank[None] >= np.arange(1, k + 1)[:, None]  # the first n have gone again
        masks.append(np.concatenate([joined, left]))
        for n, player in enumerate(order):
            np.add.at(operator[player], [start + n + 1, start + k + n], 1)  # one and the same where k = 1
            operator[player, [start + n, start + k + n + 1]] -= 1
    return _design(np.concatenate(masks), operator / (2 * permutations))


@lru_cache(maxsize=512)
def ridge_lime(k: int, samples: int, seed: int, width: float = 25.0) -> Design:
    """Weighted ridge regression on random removals, as lime 0.2's text explainer draws, weights and fits them.

    Row 0 of its sample is the full text; distance 100 (1 - cosine), weight exp(-(d / width)^2 / 2), ridge 1 with a
    free intercept, no feature selection. Not complete: credit need not sum to score minus baseline.
    """
    rng = np.random.RandomState(seed)
    sizes = rng.randint(1, k + 1, samples - 1)
    masks = np.ones((samples, k), bool)
    for row, size in enumerate(sizes, 1):
        masks[row, rng.choice(range(k), size, replace=False)] = False
    weight = np.exp(-((100 * (1 - np.sqrt(masks.mean(1))) / width) ** 2) / 2)
    centre = np.eye(samples) - weight / weight.sum()  # subtracts the weighted mean
    Z = centre @ masks
    operator = np.linalg.solve(Z.T @ (weight[:, None] * Z) + np.eye(k), (weight[:, None] * Z).T) @ centre
    return _design(masks, operator)
