"""Games with known values for the tests of coarse to fine, interactions and archives."""

from itertools import combinations

import numpy as np

from dense_rlhf.attribution.game import Game, Subject
from dense_rlhf.types import Reading

RESPONSE = "It was not good. I liked it. Bad end, sadly"


def subject(response=RESPONSE):
    """A subject whose tokens are the words of the response."""
    starts = [0, *(i for i, c in enumerate(response) if c == " ")]
    spans = tuple(zip(starts, [*starts[1:], len(response)]))
    reading = Reading((1,), tuple(range(2, 2 + len(spans))))
    return Subject("A film:", response, spans, reading, "drop", 0, "table", "plain", response, "the end")


def masks_of(n):
    """All coalitions of n players (2^n, n) bool; bit i of a row's number is player i."""
    return (np.arange(2**n)[:, None] >> np.arange(n) & 1).astype(bool)


def table_game(values, response=RESPONSE):
    """A game without a model, whose value of each coalition is in a table (2^n,)."""
    about = subject(response)
    keys = [bits.tobytes() for bits in np.packbits(masks_of(len(about.spans)), axis=1)]
    return Game(about, None, dict(zip(keys, map(float, values), strict=True)))


def pairwise(n, rng):
    """Values (2^n,) of a game in which players act alone and in pairs, its main effects and its pairs (n, n)."""
    masks, main, pairs = masks_of(n).astype(float), rng.normal(size=n), np.triu(rng.normal(size=(n, n)), 1)
    return masks @ main + np.einsum("mi,ij,mj->m", masks, pairs, masks), main, pairs + pairs.T


def shapley(values, n):
    """Shapley values of a table by their definition."""
    from math import factorial

    credit = np.zeros(n)
    for i in range(n):
        others = [j for j in range(n) if j != i]
        for size in range(n):
            weight = factorial(size) * factorial(n - size - 1) / factorial(n)
            for chosen in combinations(others, size):
                without = sum(1 << j for j in chosen)
                credit[i] += weight * (values[without | 1 << i] - values[without])
    return credit
