"""A token MDP small enough to enumerate: where reward shaping keeps the optimal policy, and where it does not."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from math import factorial

import numpy as np

from dense_rlhf.types import InputError


@dataclass(frozen=True)
class TokenMDP:
    """All V^T responses of T tokens under a uniform policy, with one score each.

    Index of a response: its tokens as digits in base V, so that responses with a common prefix are neighbours.
    """

    vocabulary: int
    length: int
    scores: np.ndarray  # (V^T,)

    def __post_init__(self):
        if self.scores.shape != (self.vocabulary**self.length,):
            raise InputError(f"scores are {self.scores.shape}, wanted one for each of {self.vocabulary**self.length}")

    @property
    def responses(self) -> np.ndarray:
        """(V^T, T) tokens."""
        return np.array(list(product(range(self.vocabulary), repeat=self.length)))

    def prefix_mean(self, x: np.ndarray, t: int) -> np.ndarray:
        """E[x | the first t tokens], (V^T,)."""
        groups = x.reshape(self.vocabulary**t, -1)
        return np.repeat(groups.mean(1), groups.shape[1])

    def coalition_value(self, present: tuple[int, ...]) -> np.ndarray:
        """Score of each response with the tokens outside `present` averaged out, (V^T,)."""
        axes = tuple(t for t in range(self.length) if t not in present)
        grid = self.scores.reshape((self.vocabulary,) * self.length)
        return np.broadcast_to(grid.mean(axes, keepdims=True), grid.shape).reshape(-1)

    def rewards(self) -> dict[str, np.ndarray]:
        """Per-token rewards (V^T, T) that all sum to the score: sparse, uniform, prefix differences, Shapley values."""
        T, n = self.length, len(self.scores)
        sparse = np.zeros((n, T))
        sparse[:, -1] = self.scores
        means = np.stack([self.prefix_mean(self.scores, t) for t in range(T + 1)], 1)
        prefix = np.diff(means, axis=1)
        shapley = np.stack([self._shapley(t) for t in range(T)], 1)
        base = self.scores.mean() / T  # caused by no token: spread evenly, as the shape `signed` does
        return {
            "sparse": sparse,
            "uniform": np.repeat(self.scores[:, None] / T, T, 1),
            "prefix differences": prefix + base,
            "Shapley": shapley + base,
        }

    def _shapley(self, player: int) -> np.ndarray:
        others, T, total = [t for t in range(self.length) if t != player], self.length, 0.0
        for inside in product((False, True), repeat=T - 1):
            before = tuple(t for t, kept in zip(others, inside) if kept)
            weight = factorial(len(before)) * factorial(T - len(before) - 1) / factorial(T)
            total = total + weight * (self.coalition_value((*before, player)) - self.coalition_value(before))
        return total

    def regret(self, rewards: np.ndarray, gamma: float) -> float:
        """Score lost by the response that is best for the discounted sum of `rewards`; ties go the worst way."""
        returns = rewards @ gamma ** np.arange(self.length)
        best = self.scores[returns >= returns.max() - 1e-9]
        return float(self.scores.max() - best.min())

    def expected_advantage(self, rewards: np.ndarray, gamma: float, lam: float) -> np.ndarray:
        """E[GAE at t | the first t + 1 tokens] with the exact value function, (V^T, T)."""
        T = self.length
        to_go = np.zeros((len(rewards), T + 1))
        for t in reversed(range(T)):
            to_go[:, t] = rewards[:, t] + gamma * to_go[:, t + 1]
        values = np.stack([self.prefix_mean(to_go[:, t], t) for t in range(T + 1)], 1)
        advantage, means = np.zeros(len(rewards)), []
        for t in reversed(range(T)):
            advantage = rewards[:, t] + gamma * values[:, t + 1] - values[:, t] + gamma * lam * advantage
            means.append(self.prefix_mean(advantage, t + 1))
        return np.stack(means[::-1], 1)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Cosine of the angle between two arrays of one shape."""
    return float((a * b).sum() / np.sqrt((a**2).sum() * (b**2).sum()))
