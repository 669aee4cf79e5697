"""Signs that a training goes wrong although every number is finite: each is reported once, with its first update."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

KL_PER_TOKEN = 1.0  # nats; the policy is e times as sure of an average token as the reference
LEAST_ENTROPY = 0.1  # share of the first update's entropy


class KLBlowUp(UserWarning):
    """The policy is so far from the reference that the reward model reads texts unlike those it was trained on."""


class EntropyCollapse(UserWarning):
    """The policy has almost stopped exploring."""


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
    if row["entropy"] < LEAST_ENTROPY * first["entropy"]:
        share = row["entropy"] / first["entropy"]
        return f"entropy is {share:.0%} of the first update's; raise ppo.kl_coef or lower ppo.lr"
    return None


def diagnose(history: Sequence[dict[str, float]]) -> list[Sign]:
    """Each sign that a history, a row of metrics an update, has shown, at the first update with it."""
    signs: dict[str, Sign] = {}
    for row in history:
        for kind, test in SIGNS.items():
            if kind.__name__ not in signs and (text := test(history[0], row)):
                signs[kind.__name__] = Sign(int(row["update"]), kind.__name__, text)
    return sorted(signs.values())


SIGNS: dict[type[UserWarning], Callable[[dict[str, float], dict[str, float]], str | None]] = {
    KLBlowUp: _kl,
    EntropyCollapse: _entropy,
}
