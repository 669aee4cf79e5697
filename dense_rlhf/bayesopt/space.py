"""The search space: weights on the simplex, and further numbers within bounds."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dense_rlhf.types import InputError, check_simplex, is_number

Point = tuple[float, ...]


@dataclass(frozen=True)
class Space:
    """Points of `d` weights on the simplex, then numbers within `bounds`, of which `switches` are 0 or 1.

    A number may be idle: without effect at some value of a weight. There it is fixed at its midpoint, so that
    equivalent settings coincide. Raises `InputError` for a space with nothing to choose, or impossible bounds.
    """

    d: int
    bounds: tuple[tuple[float, float], ...] = ()
    switches: tuple[int, ...] = ()  # places in `bounds`
    idle: tuple[tuple[int, int, float], ...] = ()  # place in `bounds`, place of a weight, its value that idles it

    def __post_init__(self):
        if self.d < 1 or self.size < 2:
            raise InputError(f"a search over {self.d} weight has nothing to choose; wanted at least 2 sources")
        if not all(-math.inf < low < high < math.inf for low, high in self.bounds):
            raise InputError(f"bounds are {list(self.bounds)}, wanted pairs of finite numbers, the lower first")
        if any(self.bounds[i : i + 1] != ((0, 1),) for i in self.switches):
            raise InputError(f"switches are {list(self.switches)}, wanted places of bounds (0, 1) in {self.bounds}")
        if not all(0 <= i < len(self.bounds) and 0 <= k < self.d for i, k, _ in self.idle):
            raise InputError(f"idle is {list(self.idle)}, wanted places in {self.bounds} and among {self.d} weights")

    @property
    def size(self) -> int:
        """How many numbers a point has."""
        return self.d + len(self.bounds)

    def check(self, point: Sequence[float]) -> None:
        """Raise `InputError` for a point that is not of this space."""
        if (
            not isinstance(point, (tuple, list, np.ndarray))
            or len(point) != self.size
            or not all(map(is_number, point))
        ):
            raise InputError(f"a point is {point!r:.200}, wanted {self.size} finite numbers")
        check_simplex("weights of a point", point[: self.d], self.d)
        for number, (low, high) in zip(point[self.d :], self.bounds):
            if not low <= number <= high:
                raise InputError(f"{number} of a point is not within {low} and {high}")
        if any(point[self.d + i] not in (0, 1) for i in self.switches):
            raise InputError(f"a point is {list(point)}, wanted 0 or 1 at its switches")

    def to_unit(self, points: Sequence[Point]) -> np.ndarray:
        """Points (N, size) with every number scaled to [0, 1]."""
        low, high = self._box()
        return (np.asarray(points, float).reshape(-1, self.size) - low) / (high - low)

    def from_unit(self, unit: np.ndarray) -> Point:
        """The point of one row of `to_unit`: exactly on the simplex, switches at 0 or 1, settled."""
        low, high = self._box()
        unit = np.clip(unit, 0, 1)
        switches = [self.d + i for i in self.switches]
        unit[switches] = unit[switches] >= 0.5
        point = low + unit * (high - low)
        point[: self.d] /= point[: self.d].sum()
        return self.settled(point.tolist())

    def settled(self, point: Sequence[float]) -> Point:
        """The same point, its idle numbers at their midpoints."""
        point = list(point)
        for i, k, value in self.idle:
            if point[k] == value:
                point[self.d + i] = sum(self.bounds[i]) / 2
        return tuple(point)

    def _box(self) -> tuple[np.ndarray, np.ndarray]:
        box = np.array([*[(0.0, 1.0)] * self.d, *self.bounds])
        return box[:, 0], box[:, 1]

    def anchors(self) -> list[Point]:
        """The vertices and the centroid, other numbers at their midpoints: mixtures that any study compares."""
        rows = [*np.eye(self.d), np.full(self.d, 1 / self.d)][: self.d + (self.d > 1)]
        return [self.from_unit(np.concatenate([row, np.full(len(self.bounds), 0.5)])) for row in rows]

    def sobol(self, n: int, seed: int) -> list[Point]:
        """`n` scrambled Sobol points; gaps between sorted coordinates are uniform on the simplex."""
        from scipy.stats import qmc

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # n need not be a power of two
            cube = qmc.Sobol(max(self.size - 1, 1), seed=seed).random(n)
        return [self._spread(row) for row in cube]

    def random(self, rng: np.random.Generator) -> Point:
        """One uniform point, Dirichlet(1) on the simplex."""
        return self._spread(rng.random(self.size - 1))

    def _spread(self, cube: np.ndarray) -> Point:
        weights = np.diff(np.sort(cube[: self.d - 1]), prepend=0, append=1)
        return self.from_unit(np.concatenate([weights, cube[self.d - 1 :]]))
