"""Functions on the simplex whose best weights are known, to measure how well and how surely a search finds them.

They are in two groups that are kept apart: `TUNING` ones, by which settings of the search may be chosen, and those of
`reported_functions`, which only show how it does on functions that it was not made for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from dense_rlhf.bayesopt.reported_functions import REPORTED, Made
from dense_rlhf.types import InputError


@dataclass(frozen=True)
class Landscape:
    """A function of weights (N, d), of standard deviation 1 over the simplex, and where it is highest."""

    name: str
    best: tuple[float, ...]
    function: Callable[[np.ndarray], np.ndarray]

    def regret(self, weights: np.ndarray) -> np.ndarray:
        """How far weights (d,) or (N, d) fall short of the best: (N,); zero everywhere on a flat landscape."""
        return self.function(np.array(self.best)) - self.function(np.asarray(weights))

    def unsearched(self) -> dict[str, float]:
        """Regret without any search: of equal weights, the best single source, and the mean of random weights."""
        d = len(self.best)
        drawn = self.regret(np.random.default_rng(0).dirichlet(np.ones(d), 1024)).mean()
        equal, best_source = self.regret(np.full(d, 1 / d)), self.regret(np.eye(d)).min()
        return {"equal weights": float(equal), "best source": float(best_source), "random weights": float(drawn)}


def _bowl(centre: np.ndarray) -> Made:
    return centre, lambda w: -np.square(w - centre).sum(-1)


def interior(d: int, rng: np.random.Generator) -> Made:
    """A bowl around a mixture of all sources."""
    return _bowl(rng.dirichlet(np.full(d, 5.0)))


def vertex(d: int, rng: np.random.Generator) -> Made:
    """A bowl around one source alone."""
    return _bowl(np.eye(d)[rng.integers(d)])


def face(d: int, rng: np.random.Generator) -> Made:
    """A bowl around a mixture of two sources; the others only harm."""
    kept = rng.choice(d, 2, replace=False)
    best = np.zeros(d)
    best[kept] = rng.dirichlet([5.0, 5.0])
    return best, lambda w: -np.square(w - best).sum(-1) - 0.5 * (1 - w[..., kept].sum(-1))


def ridge(d: int, rng: np.random.Generator) -> Made:
    """Two sources help, in one ratio only: a ridge that rises as they displace the others."""
    (i, j), ratio = rng.choice(d, 2, replace=False), rng.uniform(0.5, 2.0)
    best = np.zeros(d)
    best[[i, j]] = np.array([ratio, 1]) / (1 + ratio)
    return best, lambda w: w[..., i] + w[..., j] - 8 * np.square(w[..., i] - ratio * w[..., j])


def tent(d: int, rng: np.random.Generator) -> Made:
    """A cone around a mixture of two sources: regret is linear in the weight that is misplaced, not quadratic."""
    best = np.zeros(d)
    best[rng.choice(d, 2, replace=False)] = rng.dirichlet([5.0, 5.0])
    return best, lambda w: -np.abs(w - best).sum(-1)


def flat(d: int, rng: np.random.Generator) -> Made:
    """All weights are equally good."""
    return np.full(d, 1 / d), lambda w: np.zeros(np.shape(w)[:-1])


@lru_cache(1024)
def landscape(name: str, d: int, seed: int) -> Landscape:
    """One of `LANDSCAPES` over `d` weights; `seed` decides where its best lies. Raises `InputError` for another."""
    if name not in LANDSCAPES or d < 2:
        raise InputError(f"landscape {name!r} of {d} weights, wanted one of {', '.join(LANDSCAPES)}, of at least 2")
    best, raw = LANDSCAPES[name](d, np.random.default_rng([seed, d]))
    scale = np.std(raw(np.random.default_rng(0).dirichlet(np.ones(d), 4096))) or 1.0
    best = highest(raw, d) if best is None else best
    return Landscape(name, tuple(best.tolist()), lambda w: raw(np.asarray(w, float)) / scale)


def highest(function: Callable[[np.ndarray], np.ndarray], d: int, starts: int = 16) -> np.ndarray:
    """Where a function of weights (N, d) is highest on the simplex: (d,).

    The best of 8,192 mixtures, of all sources and of few, and of the vertices; the best `starts` of them each climb by
    moving weight from one source to another, in steps that halve where none helps, down to 1e-6. It can miss a peak
    that none of these mixtures is near.
    """
    rng = np.random.default_rng(0)
    drawn = [rng.dirichlet(np.full(d, alpha), 4096) for alpha in (1.0, 0.3)]
    points = np.concatenate([*drawn, np.eye(d)])
    points = points[np.argsort(-function(points))[:starts]]
    moves = np.array([a - b for a in np.eye(d) for b in np.eye(d) if (a != b).any()])
    values, steps = function(points), np.full(len(points), 0.1)
    while steps.max() > 1e-6:
        tried = points[:, None] + steps[:, None, None] * moves
        reached = np.where((tried >= 0).all(-1), function(tried.clip(0)), -np.inf)
        move, better = reached.argmax(1), reached.max(1) > values
        points[better], values[better] = tried[better, move[better]], reached.max(1)[better]
        steps[~better] /= 2
    return points[values.argmax()]


TUNING: dict[str, Callable[[int, np.random.Generator], Made]] = {
    make.__name__: make for make in (interior, vertex, face, ridge, tent, flat)
}
LANDSCAPES = TUNING | REPORTED
