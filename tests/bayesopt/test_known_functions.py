"""Functions whose best is known: that it is the best, and that a search is not given it by their scale."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dense_rlhf.bayesopt.known_functions import LANDSCAPES, TUNING, highest, landscape
from dense_rlhf.bayesopt.reported_functions import REPORTED
from dense_rlhf.bayesopt.search import Search
from dense_rlhf.bayesopt.space import Space
from dense_rlhf.types import InputError, check_simplex

CURVED = sorted(set(LANDSCAPES) - {"flat"})
SEARCHED = {"matern", "two_peaks", "saturating", "rippled"}  # their best is searched for
LEVEL = {"step", "one_source", "rippled", "matern", "two_peaks", "exclusive"}  # good also far from their best
seeds, sizes = st.integers(0, 200), st.integers(2, 6)


def anywhere(d, n=2000, alpha=1.0):
    return np.random.default_rng(1).dirichlet(np.full(d, alpha), n)


@given(st.sampled_from(sorted(LANDSCAPES)), sizes, seeds)
def test_nothing_on_the_simplex_is_above_the_best(name, d, seed):
    truth = landscape(name, d, seed)
    check_simplex("best", truth.best, d)
    best = np.array(truth.best)
    near = [(1 - step) * best + step * anywhere(d, 50) for step in (1e-3, 1e-2, 0.1)]
    points = np.concatenate([anywhere(d), anywhere(d, alpha=0.3), np.eye(d), *near])
    assert truth.regret(points).min() >= (-1e-12 if name not in SEARCHED else -1e-3)
    assert truth.regret(best) == 0


@pytest.mark.parametrize("name", CURVED)
@pytest.mark.parametrize("d", [2, 4, 6])
def test_a_landscape_has_unit_standard_deviation_and_its_best_alone(name, d):
    for seed in range(2):
        truth, points = landscape(name, d, seed), anywhere(d, 20_000)
        edges = [(1 - t) * a + t * b for a in np.eye(d) for b in np.eye(d) for t in (0.1, 0.3, 0.5)]
        assert np.std(truth.function(points)) == pytest.approx(1, abs=0.1)
        assert truth.regret(np.concatenate([points, edges])).min() >= -1e-3
        far = np.abs(points - truth.best).max(1) > 0.2
        assert name in LEVEL or truth.regret(points[far]).min() > 0.01


def test_groups_are_apart_and_every_landscape_is_in_one():
    assert not set(TUNING) & set(REPORTED) and set(TUNING) | set(REPORTED) == set(LANDSCAPES)
    assert {"matern", "powers", "bump", "two_peaks"} <= set(REPORTED)


@pytest.mark.parametrize("name", ["interior", "face", "tent", "powers", "bump", "saturating", "log_ratio", "tempered"])
@pytest.mark.parametrize("d", [2, 4, 6])
def test_the_climb_ends_where_the_best_is_known_to_be(name, d):
    for seed in range(3):
        truth = landscape(name, d, seed)
        assert abs(truth.regret(highest(truth.function, d))) < 1e-3


def test_the_process_has_the_covariance_that_its_name_says():
    """Matern 5/2 at distance 0.45: (1 + r + r^2 / 3) exp(-r), r the root of 5."""
    pair = np.array([[0.45 / np.sqrt(2), 0.0, 1 - 0.45 / np.sqrt(2)], [0.0, 0.45 / np.sqrt(2), 1 - 0.45 / np.sqrt(2)]])
    drawn = np.array([REPORTED["matern"](3, np.random.default_rng(seed))[1](pair) for seed in range(2000)])
    root = np.sqrt(5)
    assert np.corrcoef(drawn.T)[0, 1] == pytest.approx((1 + root + 5 / 3) * np.exp(-root), abs=0.05)


def test_where_the_best_lies_is_what_the_name_says():
    for seed in range(10):
        inside, corner, edge, ridge, tent = (
            np.array(landscape(name, 4, seed).best) for name in ("interior", "vertex", "face", "ridge", "tent")
        )
        assert inside.min() > 0 and sorted(corner) == [0, 0, 0, 1]
        assert (edge > 0).sum() == (ridge > 0).sum() == (tent > 0).sum() == 2
        assert 1 / 3 - 1e-9 <= ridge.max() / ridge.sum() <= 2 / 3 + 1e-9  # one to two at most


def test_a_flat_landscape_is_zero_everywhere():
    truth = landscape("flat", 4, 0)
    assert not truth.function(anywhere(4)).any() and not truth.regret(anywhere(4)).any()


@pytest.mark.parametrize("name", CURVED)
def test_seeds_move_the_best_and_repeat_it(name):
    bests = [landscape(name, 4, seed).best for seed in range(8)]
    landscape.cache_clear()
    assert len(set(bests)) >= 2 and bests[:2] == [landscape(name, 4, seed).best for seed in range(2)]
    points = anywhere(4, 5)
    np.testing.assert_array_equal(landscape(name, 4, 3).function(points), landscape(name, 4, 3).function(points))


def test_one_point_or_many():
    truth, points = landscape("ridge", 3, 0), anywhere(3, 7)
    assert truth.function(points).shape == (7,) and np.shape(truth.function(points[0])) == ()
    assert truth.regret(points)[2] == truth.regret(tuple(points[2]))


@pytest.mark.parametrize("name, d", [("bowl", 3), ("", 3), ("face", 1), ("flat", 0)])
def test_another_name_or_too_few_weights_raise(name, d):
    with pytest.raises(InputError, match=f"landscape '{name}' of {d} weights"):
        landscape(name, d, 0)


def test_a_search_falls_short_by_less_than_half_of_what_equal_weights_do():
    """The short form of `benchmarks/bayesopt.py`, on a function that it does not report."""
    truth, search, noise = landscape("face", 3, 100), Search(Space(3), seed=100), np.random.default_rng([100, 7])
    for _ in range(12):
        point = search.suggest()
        search.observe(point, float(truth.function(np.array(point)) + 0.5 * noise.normal()), 0.5)
    assert truth.regret(search.incumbent()[0]) < truth.regret((1 / 3,) * 3) / 2
