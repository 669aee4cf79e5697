"""Functions on the simplex that are only reported: no setting of the search was chosen by how it does on them.

Each maker takes the number of weights and a random generator, and returns the function of weights (..., d) and where it
is highest, None where that has no closed form. One that a setting was chosen by moves to `known_functions.TUNING`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Made = tuple[np.ndarray | None, Callable[[np.ndarray], np.ndarray]]
FEATURES = 256  # random Fourier features of a process


def _apart(d: int, rng: np.random.Generator, n: int) -> np.ndarray:
    """Of 32 draws, the `n` mixtures (n, d) of all sources whose closest two are furthest apart."""
    drawn = rng.dirichlet(np.full(d, 1.5), (32, n))
    gaps = [min(np.linalg.norm(a - b) for i, a in enumerate(row) for b in row[:i]) for row in drawn]
    return drawn[int(np.argmax(gaps))]


def _distance(w: np.ndarray, centre: np.ndarray) -> np.ndarray:
    return np.linalg.norm(w - centre, axis=-1)


def matern(d: int, rng: np.random.Generator) -> Made:
    """A draw of a Matern 5/2 process of length-scale 0.45, by random Fourier features (Rahimi & Recht, 2007).

    Its spectrum is a t distribution of 5 degrees of freedom.
    """
    scale = np.sqrt(5 / rng.chisquare(5, FEATURES)) / 0.45
    frequencies = rng.standard_normal((d, FEATURES)) * scale
    phases, heights = rng.uniform(0, 2 * np.pi, FEATURES), rng.standard_normal(FEATURES)
    return None, lambda w: np.cos(w @ frequencies + phases) @ heights


def powers(d: int, rng: np.random.Generator) -> Made:
    """A product of powers (Cobb & Douglas, 1928), w_1^a_1 ... w_d^a_d: zero without any one source."""
    a = rng.dirichlet(np.full(d, 2.0))
    return a, lambda w: np.exp(np.log(np.maximum(w, 1e-300)) @ a)


def bump(d: int, rng: np.random.Generator) -> Made:
    """A Gaussian bump of width 0.2 around a mixture of all sources, and nothing elsewhere."""
    centre = rng.dirichlet(np.full(d, 5.0))
    return centre, lambda w: np.exp(-0.5 * (_distance(w, centre) / 0.2) ** 2)


def two_peaks(d: int, rng: np.random.Generator) -> Made:
    """Two bumps far apart; the lower is wider, and 0.6 to 0.9 as high."""
    high, low = _apart(d, rng, 2)
    height, width = rng.uniform(0.6, 0.9), rng.uniform(0.2, 0.35)

    def function(w: np.ndarray) -> np.ndarray:
        first = np.exp(-0.5 * (_distance(w, high) / 0.18) ** 2)
        return first + height * np.exp(-0.5 * (_distance(w, low) / width) ** 2)

    return None, function


def scarcest(d: int, rng: np.random.Generator) -> Made:
    """What is scarcest for a recipe decides (Leontief): the least of w_i / a_i."""
    a = rng.dirichlet(np.full(d, 3.0))
    return a, lambda w: (w / a).min(-1)


def saturating(d: int, rng: np.random.Generator) -> Made:
    """Diminishing returns of each source, which add up."""
    gains, scales = rng.dirichlet(np.full(d, 1.5)), rng.uniform(0.05, 0.5, d)
    return None, lambda w: (1 - np.exp(-w / scales)) @ gains


def spike(d: int, rng: np.random.Generator) -> Made:
    """A pointed peak at a mixture of two sources, falling off in all directions and less and less."""
    best = np.zeros(d)
    best[rng.choice(d, 2, replace=False)] = rng.dirichlet([3.0, 3.0])
    return best, lambda w: np.exp(-_distance(w, best) / 0.25)


def step(d: int, rng: np.random.Generator) -> Made:
    """Two levels with a steep, straight step between them: a third to two thirds of all weights are about the best."""
    slope = rng.standard_normal(d)
    threshold = np.quantile(rng.dirichlet(np.ones(d), 512) @ slope, rng.uniform(1 / 3, 2 / 3))
    return np.eye(d)[slope.argmax()], lambda w: np.tanh((w @ slope - threshold) / (0.1 * np.ptp(slope)))


def log_ratio(d: int, rng: np.random.Generator) -> Made:
    """A bowl in Aitchison's (1982) log ratios of weights, each raised by 0.02: it is the steepest near zero weights."""
    best = rng.dirichlet(np.full(d, 2.0))

    def centred(w: np.ndarray) -> np.ndarray:
        logs = np.log(w + 0.02)
        return logs - logs.mean(-1, keepdims=True)

    return best, lambda w: -np.square(centred(w) - centred(best)).sum(-1)


def rippled(d: int, rng: np.random.Generator) -> Made:
    """A slope with ripples across another direction, a third as strong."""
    slope, across = rng.standard_normal((2, d))
    slope, across = slope - slope.mean(), across - across.mean()
    slope, across = slope / np.linalg.norm(slope), across / np.linalg.norm(across)
    phase = rng.uniform(0, 2 * np.pi)
    return None, lambda w: w @ slope + 0.1 * np.sin(w @ across * 2 * np.pi / 0.35 + phase)


def one_source(d: int, rng: np.random.Generator) -> Made:
    """One source decides, and has an optimum: t exp(1 - t) of its weight over the best one; the others are alike."""
    i, peak = rng.integers(d), rng.uniform(0.15, 0.6)
    best = np.full(d, (1 - peak) / (d - 1))
    best[i] = peak
    return best, lambda w: w[..., i] / peak * np.exp(1 - w[..., i] / peak)


def exclusive(d: int, rng: np.random.Generator) -> Made:
    """Sources disturb one another: each alone is a local maximum, one of them the best."""
    heights = rng.uniform(0.5, 1.0, d)
    heights[rng.integers(d)] = 1.1
    return np.eye(d)[heights.argmax()], lambda w: (heights * np.square(w)).max(-1)


def tempered(d: int, rng: np.random.Generator) -> Made:
    """A slope and a reward for variety, u . w + T times the entropy of w; the best is the softmax of u / T."""
    u, temperature = rng.standard_normal(d), 0.5
    best = np.exp(u / temperature)

    def function(w: np.ndarray) -> np.ndarray:
        return w @ u - temperature * (w * np.log(np.maximum(w, 1e-300))).sum(-1)

    return best / best.sum(), function


REPORTED: dict[str, Callable[[int, np.random.Generator], Made]] = {
    make.__name__: make
    for make in (
        *(matern, powers, bump, two_peaks, scarcest, saturating, spike),
        *(step, log_ratio, rippled, one_source, exclusive, tempered),
    )
}
