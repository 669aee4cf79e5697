"""Win rates."""

import numpy as np
import pytest

from dense_rlhf.judge import win_rate
from dense_rlhf.types import InputError


def test_win_rate_counts_a_tie_as_half():
    assert win_rate(np.array([2, 1, 1]), np.array([1, 1, 2])).tolist() == [1, 0.5, 0]


def test_win_rate_of_both_sides_sums_to_one():
    ours, theirs = np.random.default_rng(0).integers(3, size=(2, 50))
    assert np.allclose(win_rate(ours, theirs) + win_rate(theirs, ours), 1)


def test_win_rate_refuses_other_prompts():
    with pytest.raises(InputError, match="3 responses against 2"):
        win_rate(np.zeros(3), np.zeros(2))
