"""Functions whose best is known: that it is the best, and that a search is not given it by their scale."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dense_rlhf.bayesopt.known_functions import LANDSCAPES, landscape
from dense_rlhf.bayesopt.search import Search
from dense_rlhf.bayesopt.space import Space
from dense_rlhf.types import InputError, check_simplex

CURVED = sorted(set(LANDSCAPES) - {"flat"})
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
    assert truth.regret(points).min() >= -1e-12
    assert truth.regret(best) == 0


@pytest.mark.parametrize("name", CURVED)
@pytest.mark.parametrize("d", [2, 4, 6])
def test_a_landscape_has_unit_standard_deviation_and_its_best_alone(name, d):
    for seed in range(5):
        truth = landscape(name, d, seed)
        assert np.std(truth.function(anywhere(d, 20_000))) == pytest.approx(1, abs=0.1)
        points = anywhere(d)
        far = np.abs(points - truth.best).max(1) > 0.2
        assert truth.regret(points[far]).min() > 0.01


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
    bests = [landscape(name, 4, seed).best for seed in range(20)]
    assert len(set(bests)) >= 4 and bests == [landscape(name, 4, seed).best for seed in range(20)]
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
    """The short form of `benchmarks/bayesopt.py`, on functions that it does not report."""
    found, equal = [], []
    for seed in (100, 101):
        truth, search, noise = landscape("face", 4, seed), Search(Space(4), seed=seed), np.random.default_rng([seed, 7])
        for _ in range(20):
            point = search.suggest()
            search.observe(point, float(truth.function(np.array(point)) + noise.normal()), 1.0)
        found.append(truth.regret(search.incumbent()[0]))
        equal.append(truth.regret((0.25,) * 4))
    assert np.mean(found) < np.mean(equal) / 2
