"""Which token subsets to score, and the linear map from their scores to credit: phi = A y.

For a fixed set of coalitions every additive explainer here is linear in the scores y. "Complete" means that the
credit sums to y_full - y_empty for every y.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from math import comb
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dense_rlhf.types import InputError


@dataclass(frozen=True)
class Design:
    """Coalitions of k players and the operator that turns their scores into credit."""

    masks: Tensor  # (m, k) bool, row 0 empty and row 1 full
    operator: Tensor  # (k, m) float64


class Estimate(NamedTuple):
    """Credit of k players; how sure it is, where that is known."""

    credit: np.ndarray  # (k,)
    half_width: np.ndarray | None = None  # (k,) of the 95 % interval of each
    settled: int | None = None  # so many players of largest |credit| have their place at that level


def _demand(name: str, value: int, least: int, advice: str) -> None:
    if value < least:
        raise InputError(f"{name} is {value}, wanted at least {least}; {advice}")


def _demand_players(k: int) -> None:
    _demand("k", k, 1, "leave out responses without a token to explain")


def _merge(masks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct coalitions, empty, full, then the others by size; and where each row of `masks` went."""
    k = masks.shape[1]
    ends = np.stack([np.zeros(k, bool), np.ones(k, bool)])
    packed = np.packbits(np.concatenate([ends, masks]), axis=1)  # whole rows compare as byte strings, in order
    unique, index = np.unique(packed.view(f"V{packed.shape[1]}").ravel(), return_inverse=True)
    unique = np.unpackbits(unique.view(np.uint8).reshape(len(unique), -1), axis=1, count=k).astype(bool)
    sizes = unique.sum(1)
    order = np.lexsort([sizes, (sizes > 0) & (sizes < k)])
    return unique[order], np.argsort(order)[index[2:]]


def distinct(blocks: Mapping[Hashable, np.ndarray]) -> tuple[np.ndarray, dict[Hashable, list[int]]]:
    """Each coalition of all `blocks` (m_i, k) once, in order of first use; and the rows there of each block's."""
    number: dict[bytes, int] = {}
    rows = {key: [number.setdefault(mask.tobytes(), len(number)) for mask in masks] for key, masks in blocks.items()}
    return np.frombuffer(b"".join(number), bool).reshape(len(number), -1), rows


def merged_design(masks: np.ndarray, operator: np.ndarray) -> Design:
    """A design of coalitions (m, k) and operator (k, m) in which each coalition is there once, its columns summed."""
    unique, index = _merge(masks)
    merged = np.zeros((len(unique), masks.shape[1]))
    np.add.at(merged, index, operator.T)
    return Design(torch.from_numpy(unique), torch.from_numpy(merged.T))


# ---------------------------------------------------------------------------------------------------- permutations


def _orders(k: int, permutations: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Orders (p, k) in which players join and then leave, and the coalitions on the way (p, 2 k + 1, k)."""
    rng, order = np.random.RandomState(seed), np.arange(k)
    orders = np.empty((permutations, k), int)
    for p in range(permutations):
        rng.shuffle(order)  # in place: each shuffle starts from the last order
        orders[p] = order
    rank = np.argsort(orders, 1)[:, None]
    joining = rank < np.arange(k + 1)[:, None]  # the first n of the order are present
    leaving = rank >= np.arange(1, k + 1)[:, None]  # the first n are absent again
    return orders, np.concatenate([joining, leaving], 1)


@lru_cache(maxsize=512)
def permutation_shap(k: int, permutations: int, seed: int) -> Design:
    """Shapley values by antithetic permutations, as `shap.PermutationExplainer(seed=seed)` draws and sums them.

    At most (2 k - 2) permutations + 2 coalitions; complete for any number of them (Mitchell et al., 2022). Equal to
    shap 0.51 with an all-absent background and `max_evals = permutations * (2 k + 1)`, for the first row it explains.
    Exact where players interact in pairs only.
    """
    _demand_players(k)
    _demand("permutations", permutations, 1, "take 1 for the fewest forwards")
    orders, masks = _orders(k, permutations, seed)
    operator, n = np.zeros((k, permutations * (2 * k + 1))), np.arange(k)
    for p, order in enumerate(orders):
        start = p * (2 * k + 1)
        for shift, sign in ((1, 1), (k, 1), (0, -1), (k + 1, -1)):
            operator[order, start + n + shift] += sign
    return merged_design(masks.reshape(-1, k), operator / (2 * permutations))


# ---------------------------------------------------------------------------------------------------- trees


def _leaves(start: int, stop: int, depth: int, siblings: tuple = ()) -> Iterator[tuple[int, int, tuple]]:
    """The spans on which the halving ends, left to right, each with the siblings of its path from the root."""
    if stop - start == 1 or depth == 0:
        yield start, stop, siblings
        return
    middle = (start + stop) // 2
    yield from _leaves(start, middle, depth - 1, (*siblings, (middle, stop)))
    yield from _leaves(middle, stop, depth - 1, (*siblings, (start, middle)))


@lru_cache(maxsize=64)
def owen(k: int, depth: int | None = None) -> Design:
    """Owen values on a balanced tree of adjacent tokens: a span of n splits into its first n // 2 and the rest.

    A leaf's credit is the mean of y(C + leaf) - y(C) over the 2^d unions C of the d siblings on its path (Owen,
    1977), as in `shap.PartitionExplainer` with that tree and enough evaluations. Complete. 2 + 2 sum over inner nodes
    of 2^depth coalitions: 2 + 2 (k^2 - 1) / 3 for k a power of two, so 2732 at k = 64 and 43 692 (88 MB) at 256.
    For long responses prefer a fixed `depth`: the halving stops there and the credit of a span is spread evenly over
    its tokens, from 2 + 2 (4^depth - 1) / 3 coalitions whatever k. Knows no words or sentences, only positions.
    """
    _demand_players(k)
    if depth is not None:
        _demand("depth", depth, 1, "take None to go down to single tokens")
    leaves, masks = list(_leaves(0, k, k if depth is None else depth)), []
    for start, stop, siblings in leaves:
        context = np.zeros((2 ** len(siblings), k), bool)
        for bit, (a, b) in enumerate(siblings):
            context[:, a:b] = (np.arange(len(context)) >> bit & 1)[:, None]
        masks += [context, context.copy()]
        masks[-1][:, start:stop] = True
    unique, index = _merge(np.concatenate(masks))
    operator, row = np.zeros((k, len(unique))), 0
    for start, stop, siblings in leaves:
        without, joined = index[row : row + 2 * 2 ** len(siblings)].reshape(2, -1)
        operator[start:stop, joined] += 1 / (len(joined) * (stop - start))
        operator[start:stop, without] -= 1 / (len(joined) * (stop - start))
        row += 2 * len(joined)
    return Design(torch.from_numpy(unique), torch.from_numpy(operator))


@lru_cache(maxsize=512)
def leave_one_out(k: int) -> Design:
    """What the score loses without each player: phi_i = y_full - y_(all but i).

    k + 2 coalitions (fewer where k < 3). Not complete: players that replace each other get too little, those that need
    each other too much, and y_empty is not used.
    """
    _demand_players(k)
    masks = np.concatenate([np.ones((1, k), bool), ~np.eye(k, dtype=bool)])
    return merged_design(masks, np.concatenate([np.ones((k, 1)), -np.eye(k)], 1))


# ---------------------------------------------------------------------------------------------------- least squares


def _least_squares(masks: np.ndarray, weight: np.ndarray) -> Design:
    """min over phi of sum_S w_S (y_S - y_empty - sum_{i in S} phi_i)^2, subject to sum phi = y_full - y_empty.

    phi is (y_full - y_empty) / k plus a part that sums to 0, which depends only on a mask's deviation from its mean.
    Where the sample does not determine that part (below some 4 k samples), it is the shortest of the solutions.
    """
    n, k = masks.shape
    share = masks.mean(1, keepdims=True)
    Z = masks - share
    fit = np.linalg.pinv(Z.T @ (weight[:, None] * Z), rcond=1e-10, hermitian=True) @ (weight[:, None] * Z).T
    empty, full = -1 / k - fit @ (1 - share), 1 / k - fit @ share
    ends = np.stack([np.zeros(k, bool), np.ones(k, bool)])
    return merged_design(np.concatenate([ends, masks]), np.concatenate([empty, full, fit], 1))


def _demand_samples(k: int, samples: int) -> None:
    _demand_players(k)
    advice = f"{k} players need 2 (k - 1); take more, some 10 k, or permutation_shap"
    _demand("samples", samples, 2 * (k - 1), advice)


def _subsets(k: int, size: int) -> np.ndarray:
    """All subsets of one size; of half the players, the first half of the rows holds player 0."""
    chosen = np.array(list(combinations(range(k), size)))
    masks = np.zeros((len(chosen), k), bool)
    masks[np.arange(len(chosen))[:, None], chosen] = True
    return masks


def _kernel_sample(k: int, samples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Sizes are enumerated from the ends while the budget exceeds their mass; the rest is drawn in pairs."""
    sizes, paired = np.arange(1, k // 2 + 1), (k - 1) // 2  # half of the players is its complement's size too
    mass = (k - 1) / (sizes * (k - sizes)) * np.where(sizes <= paired, 2, 1)
    mass, left = mass / mass.sum(), min(samples, 2**k - 2)
    masks, weights, done = [np.zeros((0, k), bool)], [], 0
    for size, count in [(s, comb(k, s) * (1 + (s <= paired))) for s in range(1, k // 2 + 1)]:
        if left * mass[done] / mass[done:].sum() < count * (1 - 1e-8):
            break
        subsets = _subsets(k, size)
        masks += [subsets, ~subsets] if size <= paired else [subsets]
        weights += [mass[done] / count] * count
        left, done = left - count, size
    if done < len(sizes):
        drawn = _draw_pairs(np.random.RandomState(seed), k, left, mass, done)
        masks.append(np.frombuffer(b"".join(drawn), bool).reshape(-1, k))
        weights += [mass[done:].sum() * times / sum(drawn.values()) for times in drawn.values()]
    return np.concatenate(masks), np.array(weights)


def _draw_pairs(rng: np.random.RandomState, k: int, left: int, mass: np.ndarray, done: int) -> dict[bytes, int]:
    """shap's loop, one subset and its complement at a time; how often each was drawn."""
    paired, drawn = (k - 1) // 2, {}
    chance = np.where(np.arange(len(mass)) < paired, mass / 2, mass)[done:]  # a draw there is two samples
    for size in rng.choice(len(chance), 4 * left, p=chance / chance.sum()) + done + 1:
        if left == 0:
            break
        mask = np.zeros(k, bool)
        mask[rng.permutation(k)[:size]] = True
        for key in [mask.tobytes(), (~mask).tobytes()] if size <= paired else [mask.tobytes()]:
            if key in drawn or left > 0:  # the budget may end before the last complement
                left -= key not in drawn
                drawn[key] = drawn.get(key, 0) + 1
    return drawn


@lru_cache(maxsize=512)
def kernel_shap(k: int, samples: int, seed: int) -> Design:
    """Shapley values by least squares, as `shap.KernelExplainer` draws and weights them (Lundberg and Lee, 2017).

    Weight (k - 1) / (C(k, s) s (k - s)) for size s, the sum of credit held exactly. At most `samples` + 2 coalitions;
    complete; exact from `samples` = 2^k - 2 on. Equal to shap 0.51 with `nsamples=samples, l1_reg=False` after
    `np.random.seed(seed)`; shap's own budget is 2 k + 2048. Does not select features.
    """
    _demand_samples(k, samples)
    return _least_squares(*_kernel_sample(int(k), samples, seed))  # 2^k of numpy's would overflow


def _distinct(rng: np.random.Generator, k: int, size: int, count: int) -> np.ndarray:
    """Different subsets of one size; of half the players, only those with player 0, so none is a complement."""
    half = 2 * size == k
    total = comb(k, size) // (1 + half)
    if total <= 2 * count:
        return _subsets(k, size)[rng.permutation(total)[:count]]
    subsets = np.zeros((0, k), bool)
    while len(subsets) < count:
        rows = rng.random((2 * count, k)).argsort(1) < size
        subsets = np.concatenate([subsets, np.where(half & ~rows[:, :1], ~rows, rows)])
        subsets = subsets[np.sort(np.unique(np.packbits(subsets, axis=1), axis=0, return_index=True)[1])]
    return subsets[:count]


def _leverage_sample(k: int, samples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Every size gets the same number of draws, or all its subsets if there are fewer."""
    rng, sizes = np.random.default_rng(seed), range(1, k // 2 + 1)
    share = [1 if 2 * s == k else 2 for s in sizes]  # of the sizes 1 .. k - 1, by pair {s, k - s}
    left, wanted = min(samples // 2, 2 ** (k - 1) - 1), []  # pairs of a subset and its complement
    for i, s in enumerate(sizes):
        wanted.append(min(comb(k, s) * share[i] // 2, left * share[i] / sum(share[i:])))
        left -= wanted[-1]
    edges = np.floor(np.cumsum([0, *wanted]) + rng.random()).astype(int)  # whole numbers whose means are `wanted`
    firsts = [np.zeros((0, k), bool)] + [_distinct(rng, k, s, n) for s, n in zip(sizes, np.diff(edges))]
    weight = [(k - 1) / (s * (k - s)) * pairs / 2 / mean for s, pairs, mean in zip(sizes, share, wanted)]
    firsts, weights = np.concatenate(firsts), np.repeat(weight, np.diff(edges))
    return np.concatenate([firsts, ~firsts]), np.concatenate([weights, weights])


@lru_cache(maxsize=512)
def leverage_shap(k: int, samples: int, seed: int) -> Design:
    """Shapley values by least squares on subsets drawn by leverage (Musco and Witter, ICLR 2025, arXiv 2410.01917).

    Leverage of S is 1 / C(k, |S|): uniform over sizes. Pairs {S, complement} come without replacement with chance
    p_S = min(1, c / C(k, |S|)) and weight kernel_S / p_S, kernel_S = (k - 1) / (C(k, s) s (k - s)); the sum of credit
    is held exactly. The paper draws each pair by itself; here c fixes their number, so there are 2 (samples // 2) + 2
    coalitions, or all. Complete; exact from 2^k - 2 samples on. Has no advantage below some 4 k samples.
    """
    _demand_samples(k, samples)
    return _least_squares(*_leverage_sample(int(k), samples, seed))


# ---------------------------------------------------------------------------------------------------- ridge


def _ridge(masks: np.ndarray, width: float) -> Design:
    """lime's fit: weight exp(-(d / width)^2 / 2) at distance d = 100 (1 - cosine) from the full text, ridge 1."""
    weight = np.exp(-((100 * (1 - np.sqrt(masks.mean(1))) / width) ** 2) / 2)[:, None]
    Z = masks - (weight * masks).sum(0) / weight.sum()  # weighted columns sum to 0, so y need not be centred
    return merged_design(masks, np.linalg.solve(Z.T @ (weight * Z) + np.eye(masks.shape[1]), (weight * Z).T))


@lru_cache(maxsize=512)
def ridge_lime(k: int, samples: int, seed: int, width: float = 25.0) -> Design:
    """Weighted ridge regression on random removals, as lime 0.2's text explainer draws, weights and fits them.

    At most `samples` + 1 coalitions: the full text, and others that lack 1 .. k players, uniformly. Ridge 1 with a free
    intercept, no feature selection. Not complete: credit need not sum to y_full - y_empty.
    """
    _demand_players(k)
    _demand("samples", samples, 2, "the full text is the first; take some 10 k")
    rng = np.random.RandomState(seed)
    masks = np.ones((samples, k), bool)
    for row, size in enumerate(rng.randint(1, k + 1, samples - 1), 1):
        masks[row, rng.choice(range(k), size, replace=False)] = False
    return _ridge(masks, width)


@lru_cache(maxsize=512)
def shared_lime(k: int, permutations: int, seed: int, width: float = 25.0) -> Design:
    """lime's ridge on the coalitions of `permutation_shap(k, permutations, seed)`: one set of forwards for both.

    Along a random permutation the size is uniform, and the subset uniform given its size, as in lime's sample: each
    size 0 .. k - 1 is drawn 2 `permutations` times, repeats included, and the full text is added once. Not lime's own
    numbers, as draws along one permutation are dependent. Not complete.
    """
    _demand_players(k)
    _demand("permutations", permutations, 1, "take those of permutation_shap")
    masks = _orders(k, permutations, seed)[1].reshape(-1, k)
    return _ridge(np.concatenate([np.ones((1, k), bool), masks[~masks.all(1)]]), width)
