"""Signs that a training has gone wrong although every number is finite: named, once each, with the update."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

KL_PER_TOKEN = 1.0  # nats; the policy is e times as sure of an average token as the reference
ENTROPY_LEFT = 0.1  # share of the first update's entropy


class KLBlowUp(UserWarning):
    """The policy has left the reference so far that the reward model reads texts unlike those it learned from."""


class EntropyCollapse(UserWarning):
    """The policy has all but stopped to explore."""


class Sign(NamedTuple):
    """One warning of a training."""

    update: int
    name: str
    text: str

    @property
    def kind(self) -> type[UserWarning]:
        return {kind.__name__: kind for kind in SIGNS}[self.name]


def _kl(first: dict[str, float], row: dict[str, float]) -> str | None:
    per_token = row["kl"] / row["length"]
    if per_token > KL_PER_TOKEN:
        return f"KL from the reference is {per_token:.2f} nats a token; raise ppo.kl_coef or lower ppo.lr"
    return None


def _entropy(first: dict[str, float], row: dict[str, float]) -> str | None:
    if row["entropy"] < ENTROPY_LEFT * first["entropy"]:
        share = row["entropy"] / first["entropy"]
        return f"entropy is {share:.0%} of the first update's; raise ppo.kl_coef or lower ppo.lr"
    return None


def diagnose(history: Sequence[dict[str, float]]) -> list[Sign]:
    """The first time each warning held, in a history of one row of metrics an update."""
    found: dict[str, Sign] = {}
    for row in history:
        for kind, test in SIGNS.items():
            if kind.__name__ not in found and (text := test(history[0], row)):
                found[kind.__name__] = Sign(int(row["update"]), kind.__name__, text)
    return sorted(found.values())


SIGNS: dict[type[UserWarning], Callable[[dict[str, float], dict[str, float]], str | None]] = {
    KLBlowUp: _kl,
    EntropyCollapse: _entropy,
}
