"""What is searched: points, their unit scale, and the points that a search begins with."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dense_rlhf.bayesopt.space import Space
from dense_rlhf.types import InputError

MIXED = Space(3, ((-2.0, 3.0), (0.0, 1.0)), switches=(1,))  # weights, a number, a switch
IDLE = Space(2, ((-1.0, 3.0), (0.0, 4.0)), idle=((0, 0, 0.0), (0, 0, 1.0), (1, 1, 0.0)))
spaces = st.sampled_from([Space(2), Space(5), MIXED, IDLE, Space(1, ((0.0, 9.0),)), Space(2, ((0, 1), (0, 1)), (0, 1))])


@given(spaces, st.integers(0, 10**6))
def test_every_point_that_a_space_draws_is_its_own_and_survives_the_unit_scale(space, seed):
    points = [*space.anchors(), *space.sobol(3, seed), space.random(np.random.default_rng(seed))]
    unit = space.to_unit(points)
    assert unit.shape == (len(points), space.size) and unit.min() >= 0 and unit.max() <= 1
    for point, row in zip(points, unit):
        space.check(point)
        np.testing.assert_allclose(space.from_unit(row), point, atol=1e-12)


@given(spaces, st.integers(0, 10**6))
def test_any_row_becomes_a_point(space, seed):
    """What an optimiser returns: a little outside, sums a little off, switches anywhere."""
    row = np.random.default_rng(seed).uniform(-0.01, 1.01, space.size)
    row[0] = max(row[0], 0.1)
    point = space.from_unit(row)
    space.check(point)
    assert abs(sum(point[: space.d]) - 1) < 1e-12
    assert all(point[space.d + i] == (row[space.d + i] >= 0.5) for i in space.switches)


def test_the_unit_scale_is_that_of_the_bounds():
    assert MIXED.to_unit([(0.2, 0.3, 0.5, -2.0, 1.0), (0, 0, 1, 0.5, 0)]).tolist() == [
        [0.2, 0.3, 0.5, 0, 1],
        [0, 0, 1, 0.5, 0],
    ]
    assert MIXED.from_unit(np.array([1, 1, 2, 0.8, 0.4])) == (1 / 3, 1 / 3, 1 / 3, 2.0, 0.0)


def test_idle_numbers_are_halfway():
    assert IDLE.settled((1.0, 0.0, -1.0, 4.0)) == (1, 0, 1, 2) and IDLE.settled((0.0, 1.0, -1.0, 4.0)) == (0, 1, 1, 4)
    assert IDLE.settled((0.5, 0.5, -1.0, 4.0)) == (0.5, 0.5, -1, 4)
    assert IDLE.from_unit(np.array([3, 0, 0.1, 0.9])) == IDLE.anchors()[0]


def test_sobol_points_are_uniform_on_the_simplex():
    points = np.array(Space(4).sobol(1024, 0))
    np.testing.assert_allclose(points.mean(0), 0.25, atol=0.01)
    np.testing.assert_allclose((points**2).mean(0), 2 / 20, atol=0.005)  # of Dirichlet(1, 1, 1, 1)
    again = Space(4).sobol(5, 0)
    assert again == Space(4).sobol(9, 0)[:5] and again != Space(4).sobol(5, 1)


def test_anchors_are_the_vertices_and_the_centroid_all_else_halfway():
    assert Space(3).anchors() == [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1 / 3, 1 / 3, 1 / 3)]
    assert MIXED.anchors()[0] == (1, 0, 0, 0.5, 1)
    assert Space(1, ((0, 4),)).anchors() == [(1, 2)]  # one weight has no other mixture


@pytest.mark.parametrize(
    "asked, message",
    [
        ((0,), "nothing to choose"),
        ((1,), "nothing to choose"),
        ((2, ((1, 1),)), "the lower first"),
        ((2, ((0, float("inf")),)), "finite"),
        ((2, ((0, 2),), (0,)), "switches"),
        ((2, ((0, 1),), (1,)), "switches"),
        ((2, ((0, 1),), (), ((1, 0, 0.0),)), "idle"),
        ((2, ((0, 1),), (), ((0, 2, 0.0),)), "idle"),
    ],
)
def test_a_space_that_cannot_be_searched_raises(asked, message):
    with pytest.raises(InputError, match=message):
        Space(*asked)


@pytest.mark.parametrize("point", [(0.5, 0.5, 0, 0, 0, 0), (0.5, 0.4, 0, 0, 0), (1, 0, 0, 3.1, 0), (1, 0, 0, 0, 0.5)])
def test_a_point_of_another_space_raises(point):
    with pytest.raises(InputError):
        MIXED.check(point)
