"""Coalitions in shells: different, with their complements, every player equally often."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dense_rlhf.attribution.shells import shells


def as_set(masks):
    return {mask.tobytes() for mask in masks}


@settings(deadline=None, max_examples=60)
@given(k=st.integers(1, 14), evaluations=st.integers(0, 300), more=st.integers(0, 100), seed=st.integers(0, 2**16))
def test_they_are_different_come_with_their_complements_and_more_add_to_fewer(k, evaluations, more, seed):
    masks = shells(k, evaluations, seed)
    assert not masks[0].any() and masks[1].all()
    assert len(as_set(masks)) == len(masks) == min(2 * (evaluations // 2) + 2, 2**k)
    assert as_set(~masks) == as_set(masks) <= as_set(shells(k, evaluations + more, seed))


@pytest.mark.parametrize("k", [12, 25, 64])
@pytest.mark.parametrize("whole", [1, 2, 3, 4])
def test_whole_shells_keep_every_player_equally_often_of_each_size(k, whole):
    masks = shells(k, 2 * k * whole, 0)
    sizes = masks.sum(1)
    for size in np.unique(sizes):
        assert len(set(masks[sizes == size].sum(0))) == 1
    assert len(np.unique(np.minimum(sizes, k - sizes))) == 1 + whole  # with the ends; no size twice


@pytest.mark.parametrize("k", [9, 16, 50, 300])
def test_a_shell_tells_main_effects_nearly_as_well_as_orthogonal_coalitions_would(k):
    """Its share of the precision of k orthogonal ones: least squares has variance trace(inv(X'X)), at best 1."""

    def precision(masks):
        signs = np.where(masks[: 1 + len(masks) // 2], 1.0, -1.0)  # the full coalition, then the shell
        signs[0] = 1
        return 1 / np.trace(np.linalg.pinv(signs.T @ signs))

    rng = np.random.default_rng(0)
    drawn = np.argsort(rng.random((2 * k + 2, k)), 1) < k // 2
    ours = precision(np.concatenate([np.ones((1, k), bool), shells(k, 2 * k, 0)[2:]]))
    assert 0.5 < ours <= 1.3 and ours > 2 * precision(drawn)


def test_another_seed_draws_others():
    assert as_set(shells(20, 40, 0)) != as_set(shells(20, 40, 1))


def test_numbers_of_numpy_will_do():
    made = shells.__wrapped__(np.int64(70), np.int64(140), 0)  # the cache takes them for Python's
    assert np.array_equal(made, shells.__wrapped__(70, 140, 0)) and len(made) == 142
