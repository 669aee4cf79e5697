"""What real surfaces look like: values of policies that were trained at points of the simplex, some with several seeds.

`surfaces.csv` holds trainings on reviews; `benchmarks/surface.py` ran or gathered them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.optimize import brentq
from scipy.stats import f

from dense_rlhf.bayesopt.known_functions import LANDSCAPES
from dense_rlhf.statistics import Interval
from dense_rlhf.types import InputError

MEASURED = Path(__file__).with_name("surfaces.csv")
SOURCES = ("shap", "terminal", "lime", "attention")
SIGNALS = np.geomspace(0.25, 8, 11)  # sd of a function over the points, in sd of one observation


class Layout(NamedTuple):
    """Observations by point: points (P, d), how often each was tried, and their means (P,)."""

    points: np.ndarray
    counts: np.ndarray
    means: np.ndarray


@dataclass(frozen=True)
class Surface:
    """Values (N,) of N trainings, each with a seed of its own, at points (N, d), of which some are the same.

    Raises `InputError` for fewer than three points, or no repeats.
    """

    points: np.ndarray
    values: np.ndarray

    def __post_init__(self):
        P, N = len(self.layout.points), len(self.values)
        if P < 3 or P == N:
            raise InputError(f"{N} trainings at {P} points, wanted at least 3 points, and some of them repeated")

    @cached_property
    def layout(self) -> Layout:
        points, place, counts = np.unique(self.points, axis=0, return_inverse=True, return_counts=True)
        return Layout(points, counts, np.bincount(place.ravel(), self.values) / counts)

    @property
    def within(self) -> float:
        """Sum of squares about the points' means, of N - P degrees of freedom."""
        return float(np.square(self.values).sum() - self.layout.counts @ np.square(self.layout.means))

    @property
    def noise(self) -> float:
        """Standard deviation of one observation: how another seed changes it, pooled over the repeated points."""
        return math.sqrt(self.within / (len(self.values) - len(self.layout.points)))


def measured(table: pd.DataFrame | None = None) -> dict[str, Surface]:
    """The surfaces of `surfaces.csv` by name: of proxy and gold, by normaliser, of the first two sources and of all
    four, where there are repeats."""
    table, made = pd.read_csv(MEASURED) if table is None else table, {}
    for normalise, rows in table.groupby("normalise"):
        for d in (2, len(SOURCES)):
            here = rows[(rows[list(SOURCES[d:])] == 0).all(axis=1)]
            points = here[list(SOURCES[:d])].to_numpy()
            if 3 <= len(np.unique(points, axis=0)) < len(points):
                named = {f"{measure}, {normalise}, {d} sources": here[measure] for measure in ("proxy", "gold")}
                made |= {name: Surface(points, values.to_numpy()) for name, values in named.items()}
    return made


def signal_to_noise(surface: Surface) -> Interval:
    """Sd between points over the sd of one observation, with its 95 % interval, exact for normal effects of points.

    Wald's (1940) for unequal counts: the variance ratio at which the weighted variance of means is a quantile of F.
    """
    _, counts, means = surface.layout
    P, N, noise = len(means), len(surface.values), surface.noise

    def spread(ratio: float) -> float:
        weights = counts / (1 + counts * ratio)
        return float(weights @ np.square(means - weights @ means / weights.sum()) / (P - 1)) / noise**2

    def reaching(level: float) -> float:
        return math.sqrt(brentq(lambda ratio: spread(ratio) - level, 0, 1e6)) if spread(0) > level else 0.0

    low, high = f.ppf([0.025, 0.975], P - 1, N - P)
    return Interval(*map(reaching, (1.0, high, low)))


@lru_cache
def _known_shapes(points: tuple[tuple[float, ...], ...], draws: int) -> dict[str, np.ndarray]:
    at, made = np.array(points), {}
    for name, make in LANDSCAPES.items():
        rngs = (np.random.default_rng([seed, at.shape[1]]) for seed in range(draws if name != "flat" else 1))
        made[name] = np.array([make(at.shape[1], rng)[1](at) for rng in rngs])
    return made


def known_shapes(points: np.ndarray, draws: int = 1024) -> dict[str, np.ndarray]:
    """Values (draws, P) at points (P, d) of as many functions of each kind of `LANDSCAPES`; of `flat` one."""
    return _known_shapes(tuple(map(tuple, np.asarray(points).tolist())), draws)


def resemblance(surface: Surface, shapes: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The posterior share of each kind of function, all alike before: which one would give such values?

    A kind's evidence is the mean, over its functions (values (S, P) of `shapes` at the points of `surface.layout`) and
    over `SIGNALS`, of the likelihood of a constant plus the function, scaled to that sd, plus normal noise of unknown
    variance (Jeffreys' prior). It compares these kinds alone: the likeliest may still be far from the surface.
    """
    _, counts, means = surface.layout
    y, evidence = means - counts @ means / counts.sum(), {}
    for name, values in shapes.items():
        unit = values / np.maximum(values.std(1, keepdims=True), 1e-12)
        unit = unit - (unit @ counts / counts.sum())[:, None]
        b = surface.noise * SIGNALS[:, None]
        between = counts @ np.square(y) - 2 * b * (unit @ (counts * y)) + b**2 * (np.square(unit) @ counts)
        logs = -0.5 * (len(surface.values) - 1) * np.log(surface.within + between)
        evidence[name] = np.logaddexp.reduce(logs, axis=None) - math.log(logs.size)
    top = max(evidence.values())
    shares = {name: math.exp(log - top) for name, log in evidence.items()}
    return {name: share / sum(shares.values()) for name, share in shares.items()}
