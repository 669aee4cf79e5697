"""Intervals and differences."""

import numpy as np
import pandas as pd
import pytest

from dense_rlhf.statistics import Interval, bootstrap, difference, difference_at_kl
from dense_rlhf.types import InputError


def test_bootstrap_is_ordered_and_its_mean_is_the_mean_of_seeds():
    seeds = [np.array([0.0, 1.0]), np.array([1.0, 1.0, 1.0, 5.0])]
    found = bootstrap(seeds)
    assert found.mean == pytest.approx((0.5 + 2) / 2)
    assert found.low < found.mean < found.high
    assert found == bootstrap(seeds)


def test_bootstrap_of_constants_has_no_width():
    assert bootstrap([np.full(5, 2.0)] * 3) == Interval(2, 2, 2)


def test_bootstrap_covers_the_truth():
    rng, covered = np.random.default_rng(0), 0
    for repeat in range(100):
        seeds = [rng.normal(shift, 1, 40) for shift in rng.normal(0, 0.3, 8)]
        found = bootstrap(seeds, repeats=400, seed=repeat)
        covered += found.low <= 0 <= found.high
    assert 85 <= covered <= 100  # 95 % nominally, a little less with eight seeds


def test_bootstrap_knows_that_seeds_differ():
    rng = np.random.default_rng(0)
    apart = bootstrap([rng.normal(mean, 0.1, 50) for mean in (-1, 1, 0, 2)])
    alike = bootstrap([rng.normal(0.5, 0.1, 50) for _ in range(4)])
    assert apart.high - apart.low > 5 * (alike.high - alike.low)


@pytest.mark.parametrize("nothing", [[], [np.array([])], [np.ones(2), np.array([])]])
def test_bootstrap_of_nothing_raises(nothing):
    with pytest.raises(InputError, match="nothing"):
        bootstrap(nothing)


def test_intervals_that_overlap_are_not_apart():
    assert Interval(0, -1, 1).apart(Interval(3, 2, 4)) and Interval(3, 2, 4).apart(Interval(0, -1, 1))
    assert not Interval(0, -1, 1).apart(Interval(1.5, 0.5, 2))
    assert str(Interval(0.123, -1, 1)) == "0.12 [-1.00, 1.00]"


def test_a_difference_is_paired_by_seed_and_prompt():
    """What prompts and seeds have in common cancels."""
    rng = np.random.default_rng(0)
    theirs = [pd.DataFrame({"gold": rng.normal(shift, 5, 40), "kl": 0.0}) for shift in (0, 9, -9)]
    ours = [table + 0.5 for table in theirs]
    found = difference(ours, theirs)
    assert (found.mean, found.low, found.high) == pytest.approx((0.5, 0.5, 0.5))
    assert difference(theirs, ours).mean == pytest.approx(-0.5) and difference(ours, theirs, "kl").mean == 0.5
    with pytest.raises(InputError, match="judge both arms alike"):
        difference(ours, theirs[:2])
    with pytest.raises(InputError, match="judge both arms alike"):
        difference(ours, [table[1:] for table in theirs])


def path(arm, seed, kl, gold):
    return pd.DataFrame({"arm": arm, "seed": seed, "update": range(len(kl)), "kl": kl, "gold": gold, "proxy": 0.0})


def test_a_difference_at_kl_is_at_the_largest_that_both_know():
    fast, slow = path("fast", 0, [0, 2, 4, 8], [0, 2, 4, 8]), path("slow", 0, [0, 1, 2, 4], [0.0, 0.5, 1, 2])
    other = path("other", 0, [0, 1, 1, 1], [0, 9, 9, 9])
    found = difference_at_kl(pd.concat([fast, slow, other]), "fast", "slow", smooth=1)
    assert (found.mean, found.low, found.high) == (2, 2, 2)  # at 4 nats: 4 against 2
    again = [fast.assign(seed=1), path("slow", 1, [0, 1, 2, 2], [0.0, 0.5, 2, 2])]
    both = difference_at_kl(pd.concat([fast, slow, *again]), "fast", "slow", smooth=1)
    assert both.mean == pytest.approx(1) and both.low == pytest.approx(0) and both.high == pytest.approx(2)
    assert difference_at_kl(pd.concat([fast, slow]), "slow", "fast", smooth=1).mean == -2
