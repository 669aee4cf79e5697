"""Judgements of whole responses."""

from __future__ import annotations

import numpy as np

from dense_rlhf.types import InputError


def win_rate(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """1 where our response to a prompt (N,) scores higher, 0 where lower, 1/2 for a tie."""
    if len(ours) != len(theirs):
        raise InputError(f"{len(ours)} responses against {len(theirs)}; judge both policies on the same prompts")
    return (np.asarray(ours) > np.asarray(theirs)) + 0.5 * (np.asarray(ours) == np.asarray(theirs))
