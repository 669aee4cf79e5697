"""Coalitions in shells: of one size each, every player kept equally often, and every two together nearly so.

A shell is a subset of k places and its rotations, a cyclic design, with the players put to the places at random. Its k
coalitions tell what each player adds, where so many are kept, nearly as precisely as any k of that size can. With their
complements interactions of two do not disturb it (a foldover; Box and Wilson, 1951). Shapley values are the mean of
that over all sizes: the sizes of Gauss's rule of three points come first, others then.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
from scipy.stats import qmc

TRIES = 300  # exchanges tried for one subset; more make no difference that shows up to 512 players


@lru_cache(maxsize=512)
def shells(k: int, evaluations: int, seed: int) -> np.ndarray:
    """At most `evaluations` + 2 different coalitions (m, k) of k players: the empty, the full, others and their
    complements, all 2^k where these are enough. More evaluations add to those of fewer."""
    rng, every = np.random.default_rng(seed), 2 ** (int(k) - 1) - 1  # 2^k of numpy's would overflow
    pairs, kept = min(evaluations // 2, every), {}
    sizes = _sizes(k)
    while len(kept) < min(pairs, every // 2):
        size = next(sizes)
        places = _rotations(k, size)[:, rng.permutation(k)]
        kept |= {_first(mask): None for mask in places[rng.permutation(k)]}
    if pairs > every // 2:  # half of all or more: sizes may be used up
        rest = np.arange(1, every + 1)[rng.permutation(every), None] >> np.arange(k) & 1 == 1
        kept |= {_first(mask): None for mask in rest}
    firsts = np.frombuffer(b"".join(kept), bool).reshape(-1, k)[:pairs]
    ends = np.stack([np.zeros(k, bool), np.ones(k, bool)])
    return np.concatenate([ends, firsts, ~firsts])


def _first(mask: np.ndarray) -> bytes:
    """The one of a coalition and its complement that keeps player 0."""
    return (mask if mask[0] else ~mask).tobytes()


def _sizes(k: int) -> Iterator[int]:
    """Of the smaller coalition of a pair: Gauss's, then ever denser between none and half (van der Corput's)."""
    for depth in (0.0, 0.6**0.5, *qmc.Halton(1, scramble=False).random(4096)[1:, 0]):
        yield max(1, round(k * (1 - depth) / 2))


@lru_cache(maxsize=1024)
def _rotations(k: int, size: int) -> np.ndarray:
    """A subset of one size of k places, turned to each of them (k, k)."""
    places = np.arange(k)
    return _even(k, size)[(places[:, None] + places) % k]


def _even(k: int, size: int) -> np.ndarray:
    """A subset (k,) whose rotations have every two places together nearly equally often: its spectrum is flat.

    One minimises sum 1 / |F|^2 over the frequencies of its Fourier transform F, the variance of main effects by least
    squares, by exchanges of a place in it for one out of it, from a random start.
    """
    rng, waves = np.random.default_rng(k), np.exp(-2j * np.pi * np.outer(np.arange(1, k // 2 + 1), np.arange(k)) / k)
    subset = rng.permutation(k) < size

    def variance(spectrum: np.ndarray) -> np.ndarray:
        return (1 / np.maximum(np.abs(spectrum) ** 2, 1e-12)).sum(0)

    spectrum = waves[:, subset].sum(1)
    least, waiting = float(variance(spectrum)), 0
    for _ in range(TRIES if 1 < size < k else 0):
        out, others = rng.choice(np.flatnonzero(subset)), np.flatnonzero(~subset)
        exchanged = (spectrum - waves[:, out])[:, None] + waves[:, others]
        variances = variance(exchanged)
        best = int(variances.argmin())
        waiting += 1
        if variances[best] < least - 1e-9:
            subset[[out, others[best]]] = False, True
            spectrum, least, waiting = exchanged[:, best], float(variances[best]), 0
        elif waiting > 2 * k:
            break
    return subset
