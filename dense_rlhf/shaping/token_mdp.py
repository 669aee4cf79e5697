"""A token MDP small enough to enumerate: what dense rewards that keep the sum change, and what they do not.

Three questions: which response has the highest summed reward (`regret`), which one learning by return-to-go settles on
(`settled`), and which way a policy that starts from uniform is pushed (`expected_advantage`).
"""

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
        """Per-token rewards (V^T, T) that all sum to the score, from the credit of each whole response.

        Credit takes a token out by averaging over it, uniformly, whatever the policy. The rest of the score is spread
        evenly, as the shape `signed` does; softmax is the paper's, at temperature 1.
        """
        T, scores = self.length, self.scores[:, None]
        means = np.stack([self.prefix_mean(self.scores, t) for t in range(T + 1)], 1)
        shapley = np.stack([self._shapley(t) for t in range(T)], 1)
        others = [tuple(t for t in range(T) if t != out) for out in range(T)]
        left_out = scores - np.stack([self.coalition_value(rest) for rest in others], 1)
        share = np.exp(shapley - shapley.max(1, keepdims=True))
        return {
            "sparse": scores * (np.arange(T) == T - 1),
            "uniform": np.repeat(scores / T, T, 1),
            "prefix differences": self._signed(np.diff(means, axis=1)),
            "Shapley": self._signed(shapley),
            "softmax of Shapley": scores * share / share.sum(1, keepdims=True),
            "leave-one-out": self._signed(left_out),
        }

    def _signed(self, credit: np.ndarray) -> np.ndarray:
        return credit + (self.scores - credit.sum(1))[:, None] / self.length

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

    def settled(self, rewards: np.ndarray, gamma: float = 1.0) -> int:
        """Index of the response on which learning by return-to-go settles: the fixed point of policy improvement.

        Q(prefix, a) = E[sum over k >= t of gamma^(k - t) r_k | prefix, a], later tokens by the policy itself, so the
        rewards of earlier tokens, which a also changes, do not count. Policies that are greedy in Q settle after T
        improvements, from any start, last token first; so do small natural-gradient steps, pi exp(eta A), in the limit.
        Ties go the worst way.
        """
        to_go, chosen = self._to_go(rewards, gamma), np.arange(len(rewards))
        for t in reversed(range(self.length)):
            q, ahead = (x.reshape(-1, self.vocabulary) for x in (to_go[chosen, t], chosen))
            tied = q >= q.max(1, keepdims=True) - 1e-9
            worst = np.where(tied, self.scores[ahead], np.inf).argmin(1)
            chosen = ahead[np.arange(len(ahead)), worst]
        return int(chosen[0])

    def _to_go(self, rewards: np.ndarray, gamma: float) -> np.ndarray:
        """Discounted rewards from each token on, (V^T, T + 1)."""
        to_go = np.zeros((len(rewards), self.length + 1))
        for t in reversed(range(self.length)):
            to_go[:, t] = rewards[:, t] + gamma * to_go[:, t + 1]
        return to_go

    def expected_advantage(self, rewards: np.ndarray, gamma: float, lam: float) -> np.ndarray:
        """E[GAE at t | the first t + 1 tokens] with the exact value function, (V^T, T)."""
        T, to_go = self.length, self._to_go(rewards, gamma)
        values = np.stack([self.prefix_mean(to_go[:, t], t) for t in range(T + 1)], 1)
        advantage, means = np.zeros(len(rewards)), []
        for t in reversed(range(T)):
            advantage = rewards[:, t] + gamma * values[:, t + 1] - values[:, t] + gamma * lam * advantage
            means.append(self.prefix_mean(advantage, t + 1))
        return np.stack(means[::-1], 1)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Cosine of the angle between two arrays of one shape."""
    return float((a * b).sum() / np.sqrt((a**2).sum() * (b**2).sum()))
