"""The search over weights, as a user of vectors and floats sees it."""

import numpy as np
import pytest

from dense_rlhf.bayesopt import Search, Space
from dense_rlhf.types import InputError, check_simplex

BEST = np.array([0.15, 0.55, 0.3])


def bowl(weights):
    """Concave, its maximum 0 at `BEST`."""
    return -float(np.square(np.array(weights) - BEST).sum())


def plain(d, seed=0, **settings):
    """A search over `d` weights that begins with Sobol points alone."""
    return Search(Space(d), anchors=False, seed=seed, **settings)


def run(search, trials, function=bowl):
    for _ in range(trials):
        weights = search.suggest()
        search.observe(weights, function(weights))
    return search


@pytest.fixture(scope="module")
def searched():
    return run(plain(3, 2), 13)


def test_the_first_suggestions_are_sobol_points_of_the_seed():
    first, again, other = (run(plain(4, seed), 5, max).points for seed in (0, 0, 1))
    assert first == again != other
    noisy = run(plain(4, 0), 5, lambda weights: 7.0).points
    assert noisy == first  # whatever was observed
    assert len(set(first)) == 5


def test_every_suggestion_is_on_the_simplex(searched):
    for weights in searched.points:
        check_simplex("weights", weights, 3)
        assert isinstance(weights, tuple) and all(isinstance(w, float) for w in weights)


def test_it_comes_closer_than_the_best_sobol_point(searched):
    distance = [np.abs(np.array(weights) - BEST).max() for weights in searched.points]
    assert min(distance[5:]) < min(0.06, min(distance[:5]))
    assert np.abs(np.array(searched.incumbent()[0]) - BEST).max() < min(0.1, min(distance[:5]))


def test_it_finds_a_corner():
    search = run(plain(3, 0), 8, lambda weights: weights[2])
    assert search.incumbent()[0][2] > 0.97


def test_the_incumbent_is_an_evaluated_point_of_the_posterior(searched):
    weights, mean, sd = searched.incumbent()
    means, sds = searched.posterior(searched.points)
    assert weights in searched.points and mean == pytest.approx(means.max())
    assert sd == pytest.approx(sds[means.argmax()]) and sd > 0
    assert abs(mean - bowl(weights)) < 0.05


def test_the_incumbent_is_not_the_luckiest_observation():
    search = plain(2)
    for x in np.linspace(0, 1, 12):
        search.observe((x, 1 - x), 0.3 * np.sin(40 * x) + 2 * x)  # the slope is signal, the wiggle noise
    search.observe((0.0, 1.0), 2.4)  # luck where repeats say 0
    for _ in range(4):
        search.observe((0.0, 1.0), 0.0)
    assert max(search.values) == 2.4 and search.incumbent()[0][0] > 0.6


def test_observing_the_record_again_resumes_the_search(searched):
    resumed = plain(3, 2)
    for weights, value in zip(searched.points[:7], searched.values[:7]):
        resumed.observe(weights, value)
    assert resumed.suggest() == resumed.suggest() == searched.points[7]


def test_suggesting_leaves_the_global_generator_alone(searched):
    import torch

    torch.manual_seed(0)
    wanted = torch.rand(1)
    torch.manual_seed(0)
    searched.suggest()
    assert torch.equal(torch.rand(1), wanted)


@pytest.mark.parametrize(
    "weights, value",
    [((0.5, 0.6), 1.0), ((1.2, -0.2), 1.0), ((1.0,), 1.0), ((float("nan"), 1.0), 1.0),
     ((0.5, 0.5), float("nan")), ((0.5, 0.5), float("inf"))],
)  # fmt: skip
def test_a_bad_observation_raises_and_is_not_recorded(weights, value):
    search = plain(2)
    with pytest.raises(InputError):
        search.observe(weights, value)
    assert not search.points and not search.values


def test_too_little_to_search_or_to_fit_raises():
    with pytest.raises(InputError, match="at least 2 sources"):
        plain(1)
    search = run(plain(2), 1, max)
    with pytest.raises(InputError, match="1 observations cannot fit"):
        search.incumbent()


def test_known_noise_is_not_taken_for_signal():
    """Pure noise of a known size on a flat function: the posterior says that the weights cannot be told apart."""
    rng = np.random.default_rng(0)
    search = plain(2)
    for w in np.linspace(0, 1, 10):
        search.observe((w, 1 - w), float(rng.normal(0, 0.1)), 0.1)
    mean, sd = search.posterior(search.points)
    assert np.ptp(mean) < 2 * sd.max() and sd.min() > 0.02


@pytest.mark.parametrize("error", [0.0, -1.0, float("nan"), float("inf")])
def test_a_standard_error_is_above_zero(error):
    with pytest.raises(InputError, match="standard error"):
        plain(2).observe((0.5, 0.5), 1.0, error)
