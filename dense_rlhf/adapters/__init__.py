"""Dense rewards for trainers of others: token ids in, a reward for each response token out."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dense_rlhf.adapters.rewards import Cost, Scorer, dense_rewards

__all__ = ["Cost", "Scorer", "dense_rewards"]


def __getattr__(name: str):
    """Imports on first use, so that a trainer without torch can import the client alone."""
    if name in __all__:
        return getattr(import_module("dense_rlhf.adapters.rewards"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
