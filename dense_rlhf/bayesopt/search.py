"""Bayesian optimisation of weights on the simplex: suggest and observe. It does not know what the numbers mean."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import TYPE_CHECKING

import numpy as np

from dense_rlhf.bayesopt.space import Point, Space
from dense_rlhf.types import InputError, is_number

if TYPE_CHECKING:
    from torch import Tensor

    from dense_rlhf.bayesopt.surrogate import Surrogate

SAMPLES = 128  # of the posterior, in the acquisition function
RESTARTS = 5
PROSPECTS = 48  # of the pool


@dataclass(frozen=True)
class Noise:
    """How much one observation scatters."""

    variance: float | None  # of one observation; None if unknown
    between: float  # its part beyond the observations' own standard errors: what another seed changes
    degrees: int  # of freedom of the repeated points behind the estimate


@dataclass
class Search:
    """Maximise a noisy function over a `Space`: `suggest`, evaluate, `observe`, repeat.

    First come the `anchors`, each `replicates` times, and `initial` scrambled Sobol points; then one of `STRATEGIES`:
    the knowledge gradient of an ensemble of Gaussian processes (`gp`; `saas` and `additive` with other models), log
    noisy expected improvement of one process (`nei`, the paper's, which starts without anchors as the paper does), or
    points that need no model. With `among`, only those points are tried.
    There is no hidden state: the same settings, observations and pending points give the same suggestion, so a search
    is resumed by observing its record again.
    """

    space: Space
    strategy: str = "gp"
    initial: int = 5
    anchors: bool | None = None  # None: for every strategy but `nei`
    replicates: int = 1
    seed: int = 0
    points: list[Point] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    errors: list[float | None] = field(default_factory=list)
    among: Sequence[Point] | None = None
    _fitted: tuple[int, Surrogate] | None = field(default=None, repr=False, compare=False)

    def __post_init__(self):
        if self.strategy not in STRATEGIES:
            raise InputError(f"strategy is {self.strategy!r}, wanted one of {', '.join(STRATEGIES)}")
        if self.initial < 0 or self.replicates < 1:
            raise InputError(f"initial is {self.initial}, replicates {self.replicates}; wanted at least 0 and 1")
        if self.anchors is None:
            self.anchors = self.strategy != "nei"
        for point in self.among or ():
            self.space.check(point)

    def observe(self, point: Point, value: float, error: float | None = None) -> None:
        """Record one evaluation and, where known, its standard error.

        Raises `InputError` for a point off the space, a value that is not finite, or an error that is not above zero.
        """
        self.space.check(point)
        if not is_number(value):
            raise InputError(f"observed value is {value!r:.80}, wanted a finite number")
        if error is not None and not (is_number(error) and error > 0):
            raise InputError(f"observed standard error is {error!r:.80}, wanted a finite number above 0, or None")
        self.points.append(tuple(point))
        self.values.append(float(value))
        self.errors.append(error)

    @property
    def start(self) -> list[Point]:
        """The points tried before any model is asked: anchors, then Sobol points."""
        anchors = self.space.anchors() * self.replicates if self.anchors else []
        return [self._admitted(point) for point in anchors + self.space.sobol(self.initial, self.seed)]

    def suggest(self, pending: Sequence[Point] = ()) -> Point:
        """The point to try next while `pending` ones run or have failed; a Sobol point below two observations."""
        n, start = len(self.points) + len(pending), self.start
        strategy = self.strategy if len(self.values) > 1 else "sobol"
        return start[n] if n < len(start) else self._admitted(STRATEGIES[strategy](self, list(pending)))

    def _admitted(self, point: Point) -> Point:
        """The nearest point that may be tried."""
        if self.among is None or point in self.among:
            return point
        unit = self.space.to_unit(self.among)
        return tuple(self.among[int(np.square(unit - self.space.to_unit([point])).sum(1).argmin())])

    def incumbent(self) -> tuple[Point, float, float]:
        """The evaluated point with the highest posterior mean, that mean, and its standard deviation.

        Not the best observed value, which rewards lucky noise; nor a point whose own observations lie two standard
        errors below the model's mean, unless all do. Raises `InputError` below two observations.
        """
        mean, sd = self.posterior(self.points)
        values, noise = np.array(self.values), noise_variance(self)
        same = np.array([[a == b for b in self.points] for a in self.points])
        own, error = same @ values / same.sum(1), np.sqrt(same @ noise) / same.sum(1)
        contradicted = mean - own > 2 * error
        best = int(np.where(contradicted & ~contradicted.all(), -np.inf, mean).argmax())
        return self.points[best], float(mean[best]), float(sd[best])

    def posterior(self, points: Sequence[Point]) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation (N,) of the noise-free function at `points` (N, size)."""
        mean, _, variance = self.moments(points, points[:1])
        return mean, np.sqrt(variance)

    def joint(self, points: Sequence[Point]) -> tuple[np.ndarray, np.ndarray]:
        """Mean (N,) and covariance (N, N) of the noise-free function at `points`."""
        return self.moments(points, points)[:2]

    def moments(self, points: Sequence[Point], among: Sequence[Point]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Mean (N,) at `points`, covariance (N, M) with `among`, variance (N,), of the noise-free function."""
        return self.model().moments(self._tensor(points), self._tensor(among))

    def kinds(self) -> dict[str, float]:
        """How much the data speak for each kind of surface: the posterior shares of an ensemble's kernels.

        Raises `InputError` for a strategy whose model is no ensemble.
        """
        model = self.model()
        if not hasattr(model, "kinds"):
            raise InputError(f"strategy {self.strategy!r} has a model of one kind; wanted gp, random or sobol")
        return model.kinds()

    def noise(self) -> Noise:
        """Variance of one observation: pooled over repeated points, and at least the mean squared standard error.

        Scatter of repeats beyond their standard errors is variance between seeds, and is part of every observation.
        """
        groups = defaultdict(list)
        for i, point in enumerate(self.points):
            groups[point].append(i)
        repeated = [i for group in groups.values() if len(group) > 1 for i in group]
        degrees = len(repeated) - sum(len(group) > 1 for group in groups.values())
        squares = [error**2 if error else 0.0 for error in self.errors]
        within = float(np.mean(squares)) if squares else 0.0
        if not degrees:
            return Noise(within if squares and None not in self.errors else None, 0.0, 0)
        scatter = sum(np.var([self.values[i] for i in group]) * len(group) for group in groups.values()) / degrees
        between = max(float(scatter - np.mean([squares[i] for i in repeated])), 0.0)
        return Noise(within + between, between, degrees)

    def model(self) -> Surrogate:
        """The strategy's model, fitted to all observations."""
        if len(self.values) < 2:
            raise InputError(f"{len(self.values)} observations cannot fit a model; wanted at least 2")
        if self._fitted is None or self._fitted[0] != len(self.values):
            from dense_rlhf.bayesopt import surrogate

            model = surrogate.MODELS.get(self.strategy, surrogate.Ensemble)
            self._fitted = len(self.values), model(*self._observed(), self.seed)
        return self._fitted[1]

    def _observed(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Unit points (N, size), values (N, 1) and, if known, their variances (N, 1)."""
        import torch

        X, Y = self._tensor(self.points), torch.tensor(self.values, dtype=torch.float64)[:, None]
        noise = self.noise()
        if noise.variance is None:
            return X, Y, None
        own = [noise.variance - noise.between if e is None else e**2 for e in self.errors]
        return X, Y, torch.tensor(own, dtype=torch.float64)[:, None] + noise.between

    def _tensor(self, points: Sequence[Point]) -> Tensor:
        import torch

        return torch.from_numpy(self.space.to_unit(points))


# ---------------------------------------------------------------------------------------------------- strategies


def noise_variance(search: Search) -> np.ndarray:
    """The noise variance of each observation (N,) in the search's model."""
    return search.model().noise


def _most_telling(search: Search, pending: list[Point]) -> Point:
    """The point of a pool whose observation should raise the highest posterior mean the most.

    The knowledge gradient (Scott et al., 2011): E[max_i (mean_i + step_i z)], z normal, by Gauss-Hermite quadrature.
    Expected improvement asks where the function may be high; this asks how good the answer will be after one more
    noisy observation, so it may repeat a point. i runs over the points that can be the answer: the tried ones and the
    candidate, and at every other trial also the `PROSPECTS` of the pool, which later trials may try. Without them the
    search stays where it is; with them at each trial it never settles.
    """
    pool = search.among or _pool(search, search.seed * 1000 + len(search.points) + len(pending))
    tried = list(dict.fromkeys([*pending, *search.points]))
    points = tried + [point for point in dict.fromkeys(map(tuple, pool)) if point not in set(tried)]
    later = _prospects(search, points, len(tried)) if (len(search.points) + len(pending)) % 2 else []
    goals = [*range(len(tried)), *later]
    mean, covariance, variance = search.moments(points, [points[i] for i in goals])
    noise, running = noise_variance(search).mean(), len(set(pending))
    for i in range(running):  # will be observed: its value does not change how much
        share = covariance[:, i] / (variance[i] + noise)
        covariance, variance = covariance - np.outer(share, covariance[i]), variance - share * covariance[:, i]
    scale = np.sqrt(variance.clip(min=0) + noise)
    step, own = covariance.T / scale, variance / scale  # of each mean, when a point is observed 1 sd higher
    nodes, shares = np.polynomial.hermite_e.hermegauss(15)
    highest = [np.maximum((mean[goals, None] + step * z).max(0), mean + own * z) for z in nodes]
    best = (shares / shares.sum()) @ highest
    return points[running + int(best[running:].argmax())]


def _prospects(search: Search, points: list[Point], n: int) -> list[int]:
    """Places, from `n` on, of the `PROSPECTS` points with the highest posterior means, and of each member's highest."""
    means = search.model().means(search._tensor(points[n:]))
    highest = np.argsort(-means.mean(0))[:PROSPECTS]
    return (n + np.union1d(highest, means.argmax(1))).tolist()


def _most_promising(search: Search, pending: list[Point]) -> Point:
    """The point of the highest log noisy expected improvement (Ament et al., 2023), climbed to from Sobol points."""
    import torch
    from botorch.acquisition.logei import qLogNoisyExpectedImprovement
    from botorch.sampling import SobolQMCNormalSampler

    space, seed = search.space, search.seed * 1000 + len(search.points) + len(pending)
    X, running = search._tensor(search.points), search._tensor(pending)
    pool = search._tensor(space.sobol(512, seed))[:, None]
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numerical chatter of the inner optimiser
        torch.manual_seed(seed)
        sampler = SobolQMCNormalSampler(torch.Size([SAMPLES]), seed=seed)
        options = dict(X_pending=running if pending else None, prune_baseline=True)
        acquisition = qLogNoisyExpectedImprovement(search.model().model, X, sampler, **options)
        tops = [_climbed(acquisition, pool, space, ends) for ends in product((0.0, 1.0), repeat=len(space.switches))]
    return space.from_unit(max(tops, key=lambda top: float(top[1]))[0][0].numpy())


def _climbed(acquisition: Callable, pool: Tensor, space: Space, ends: Sequence[float]) -> tuple[Tensor, Tensor]:
    """The highest point near the best of a pool (N, 1, size), with switches held at `ends`, and its value."""
    import torch
    from botorch.optim import optimize_acqf

    fixed = {space.d + i: end for i, end in zip(space.switches, ends)}
    for column, end in fixed.items():
        pool[..., column] = end
    with torch.no_grad():
        starts = pool[acquisition(pool).topk(RESTARTS).indices]
    return optimize_acqf(
        acquisition,
        torch.stack([torch.zeros(space.size), torch.ones(space.size)]).double(),
        q=1,
        num_restarts=RESTARTS,
        batch_initial_conditions=starts,
        fixed_features=fixed or None,
        options={"maxiter": 20},
        equality_constraints=[(torch.arange(space.d), torch.ones(space.d).double(), 1.0)],
    )


def _pool(search: Search, seed: int) -> list[Point]:
    """Candidates: Sobol points, anchors, mixtures of few sources, mixtures of the five best tried points, points around
    the two best of them, and the five without some sources."""
    space, rng = search.space, np.random.default_rng(seed)
    tried = list(dict.fromkeys(search.points))
    best = space.to_unit(tried)[np.argsort(-search.posterior(tried)[0])[:5]]
    everywhere = space.sobol(256, seed) + space.anchors()
    few = rng.random((128, space.size))
    few[:, : space.d] = rng.dirichlet(np.ones(space.d), 128) * _subsets(rng, 128, space.d)
    between = rng.dirichlet(np.full(len(best), 0.5), 64) @ best
    leaders = best[rng.integers(0, min(2, len(best)), 64)]
    around = leaders + rng.uniform(0, 0.3, (64, 1)) * (space.to_unit(space.sobol(64, seed + 1)) - leaders)
    without = best[rng.integers(0, len(best), 32)]
    without[:, : space.d] *= _subsets(rng, 32, space.d)
    rows = np.concatenate([few, between, around, without])
    return everywhere + [space.from_unit(row) for row in rows if row[: space.d].any()]


def _subsets(rng: np.random.Generator, n: int, d: int) -> np.ndarray:
    """Random subsets of `d` sources, none empty: (n, d) of bool."""
    return rng.random((n, d)).argsort(1) < rng.integers(1, d + 1, (n, 1))


def _random(search: Search, pending: list[Point]) -> Point:
    n = len(search.points) + len(pending)
    return search.space.random(np.random.default_rng([search.seed, n]))


def _sobol(search: Search, pending: list[Point]) -> Point:
    n = len(search.points) + len(pending) - len(search.start) + search.initial
    return search.space.sobol(n + 1, search.seed)[n]


STRATEGIES: dict[str, Callable[[Search, list[Point]], Point]] = {
    "gp": _most_telling,
    "saas": _most_telling,
    "additive": _most_telling,
    "nei": _most_promising,
    "random": _random,
    "sobol": _sobol,
}
