"""Functions on the simplex whose best weights are known, to measure how well and how surely a search finds them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

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


def _bowl(centre: np.ndarray) -> tuple[np.ndarray, Callable]:
    return centre, lambda w: -np.square(w - centre).sum(-1)


def interior(d: int, rng: np.random.Generator) -> tuple[np.ndarray, Callable]:
    """A bowl around a mixture of all sources."""
    return _bowl(rng.dirichlet(np.full(d, 5.0)))


def vertex(d: int, rng: np.random.Generator) -> tuple[np.ndarray, Callable]:
    """A bowl around one source alone."""
    return _bowl(np.eye(d)[rng.integers(d)])


def face(d: int, rng: np.random.Generator) -> tuple[np.ndarray, Callable]:
    """A bowl around a mixture of two sources; the others only harm."""
    kept = rng.choice(d, 2, replace=False)
    best = np.zeros(d)
    best[kept] = rng.dirichlet([5.0, 5.0])
    return best, lambda w: -np.square(w - best).sum(-1) - 0.5 * (1 - w[..., kept].sum(-1))


def ridge(d: int, rng: np.random.Generator) -> tuple[np.ndarray, Callable]:
    """Two sources help, in one ratio only: a ridge that rises as they displace the others."""
    (i, j), ratio = rng.choice(d, 2, replace=False), rng.uniform(0.5, 2.0)
    best = np.zeros(d)
    best[[i, j]] = np.array([ratio, 1]) / (1 + ratio)
    return best, lambda w: w[..., i] + w[..., j] - 8 * np.square(w[..., i] - ratio * w[..., j])


def tent(d: int, rng: np.random.Generator) -> tuple[np.ndarray, Callable]:
    """A cone around a mixture of two sources: regret is linear in the weight that is misplaced, not quadratic."""
    best = np.zeros(d)
    best[rng.choice(d, 2, replace=False)] = rng.dirichlet([5.0, 5.0])
    return best, lambda w: -np.abs(w - best).sum(-1)


def flat(d: int, rng: np.random.Generator) -> tuple[np.ndarray, Callable]:
    """All weights are equally good."""
    return np.full(d, 1 / d), lambda w: np.zeros(np.shape(w)[:-1])


def landscape(name: str, d: int, seed: int) -> Landscape:
    """One of `LANDSCAPES` over `d` weights; `seed` decides where its best lies. Raises `InputError` for another."""
    if name not in LANDSCAPES or d < 2:
        raise InputError(f"landscape {name!r} of {d} weights, wanted one of {', '.join(LANDSCAPES)}, of at least 2")
    rng = np.random.default_rng([seed, d])
    best, raw = LANDSCAPES[name](d, rng)
    scale = np.std(raw(np.random.default_rng(0).dirichlet(np.ones(d), 4096))) or 1.0
    return Landscape(name, tuple(best.tolist()), lambda w: raw(np.asarray(w, float)) / scale)


LANDSCAPES: dict[str, Callable] = {make.__name__: make for make in (interior, vertex, face, ridge, tent, flat)}
