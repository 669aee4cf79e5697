"""The search over weights, as a user of vectors and floats sees it."""

import numpy as np
import pytest

from dense_rlhf.bayesopt.search import STRATEGIES, Search, _pool, _prospects
from dense_rlhf.bayesopt.space import Space
from dense_rlhf.types import InputError, check_simplex

BEST = np.array([0.15, 0.55, 0.3])
MIXED = Space(3, ((-2.0, 3.0), (0.0, 1.0)), switches=(1,))  # weights, a number, a switch


def bowl(weights):
    """Concave, its maximum 0 at `BEST`."""
    return -float(np.square(np.array(weights) - BEST).sum())


def plain(d, seed=0, **settings):
    """A search over `d` weights that begins with Sobol points alone."""
    return Search(Space(d), anchors=False, seed=seed, **settings)


def run(search, trials, function=bowl, error=None):
    for _ in range(trials):
        weights = search.suggest()
        search.observe(weights, function(weights), error)
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
    [
        ((0.5, 0.6), 1.0),
        ((1.2, -0.2), 1.0),
        ((1.0,), 1.0),
        ((float("nan"), 1.0), 1.0),
        ((0.5, None), 1.0),
        ((0.5, True), 1.0),
        (None, 1.0),
        ("ab", 1.0),
        *(((0.5, 0.5), value) for value in (None, True, "1", 1j, [1.0], 10**400, float("nan"), float("inf"))),
    ],
)
def test_a_bad_observation_raises_and_is_not_recorded(weights, value):
    search = plain(2)
    with pytest.raises(InputError) as refused:
        search.observe(weights, value)
    assert not search.points and not search.values and len(str(refused.value)) < 300


def test_weights_that_rounding_left_just_below_zero_are_observed():
    search = plain(3)
    search.observe((1.0, -1e-17, 0.0), np.float32(0.5), np.float64(0.1))
    assert search.values == [0.5]


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


@pytest.mark.parametrize("error", [0.0, -1.0, float("nan"), float("inf"), "0.1", True, 10**400])
def test_a_standard_error_is_above_zero(error):
    with pytest.raises(InputError, match="standard error"):
        plain(2).observe((0.5, 0.5), 1.0, error)


# ---------------------------------------------------------------------------------------------------- order of trials


def test_anchors_come_first_as_often_as_asked_then_sobol_points_whatever_is_pending():
    search = Search(Space(3), initial=5, replicates=2, seed=5)
    wanted = Space(3).anchors() * 2 + Space(3).sobol(5, 5)
    proposed = []
    while len(proposed) < len(wanted):  # every third is still running
        pending = [point for i, point in enumerate(proposed) if i % 3 == 2]
        proposed.append(search.suggest(pending))
        if len(proposed) % 3:
            search.observe(proposed[-1], 0.0)
    assert proposed == wanted == search.start


def test_the_paper_s_strategy_starts_as_the_paper_does_unless_it_is_asked_for_anchors():
    assert Search(Space(3), "nei").start == Space(3).sobol(5, 0)
    assert Search(Space(3), "nei", anchors=True).start == Search(Space(3)).start


def test_a_setting_that_means_nothing_raises():
    for settings_ in ({"strategy": "best"}, {"initial": -1}, {"replicates": 0}):
        with pytest.raises(InputError, match=f"{next(iter(settings_))} is|replicates 0"):
            Search(Space(3), **settings_)


def half_way(strategy, space=MIXED, n=7, seed=3):
    """A search past its start."""
    search, rng = Search(space, strategy, initial=2, anchors=False, seed=seed), np.random.default_rng(seed)
    for point in space.sobol(n, seed + 1):
        search.observe(point, point[0] + 0.1 * rng.standard_normal(), 0.1)
    return search


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_stays_in_the_space_and_repeats_itself(strategy):
    proposed = half_way(strategy).suggest()
    MIXED.check(proposed)
    assert proposed == half_way(strategy).suggest()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_is_pending_is_not_proposed_again(strategy):
    """A batch: every proposal knows of those that run."""
    search, batch = half_way(strategy, Space(3)), []
    for _ in range(3):
        batch.append(search.suggest(batch))
    assert len(set(batch)) == 3


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_below_two_observations_every_strategy_draws_sobol_points(strategy):
    """All that ran failed: nothing to fit."""
    search = plain(3, 1, strategy=strategy, initial=2)
    wanted = Space(3).sobol(4, 1)
    assert search.suggest(wanted[:2]) == (wanted[2] if strategy != "random" else search.suggest(wanted[:2]))
    search.observe(wanted[0], 1.0)
    assert search.suggest(wanted[1:3]) == wanted[3]


def test_a_switch_is_thrown_where_it_pays():
    space = Space(2, ((0.0, 1.0),), switches=(0,))
    search = Search(space, initial=4, seed=0)
    for _ in range(10):
        point = search.suggest()
        search.observe(point, point[0] + 2 * point[2], 0.1)
    assert search.incumbent()[0][2] == 1 and {point[2] for point in search.points} == {0, 1}


# ---------------------------------------------------------------------------------------------------- noise, posterior


def repeated(values, errors):
    """Three points, of which the first two were tried again: values a, b, c, a, b, a."""
    search, (a, b, c) = plain(3), Space(3).anchors()[:3]
    for point, value, error in zip((a, b, c, a, b, a), values, errors):
        search.observe(point, value, error)
    return search


def test_noise_from_repeats_by_hand():
    """Squares about the means: of a (1, 4, 4) 6, of b (2, 4) 2; three degrees of freedom."""
    noise = repeated([1, 2, 9, 4, 4, 4], [None] * 6).noise()
    assert noise.degrees == 3 and noise.variance == pytest.approx(8 / 3) and noise.between == pytest.approx(8 / 3)


def test_noise_beyond_the_standard_errors_is_what_another_seed_changes():
    noise = repeated([1, 2, 9, 4, 4, 4], [1.0] * 5 + [2.0]).noise()
    assert noise.between == pytest.approx(8 / 3 - (4 + 4) / 5)
    assert noise.variance == pytest.approx((5 + 4) / 6 + noise.between)
    calm = repeated([1, 2, 9, 1, 2, 1], [1.0] * 6).noise()
    assert calm.between == 0 and calm.variance == pytest.approx(1)


def test_noise_without_repeats_is_the_standard_errors_or_not_known():
    search = plain(2)
    assert search.noise().variance is None and search.noise().degrees == 0
    search.observe((1, 0), 1.0, 0.3)
    search.observe((0, 1), 1.0, 0.4)
    assert search.noise().variance == pytest.approx((0.09 + 0.16) / 2) and search.noise().between == 0
    search.observe((0.5, 0.5), 1.0)
    assert search.noise().variance is None


def test_a_surer_observation_weighs_more():
    def means(errors):
        search = plain(2)
        for point, value, error in zip([(1, 0), (0, 1), (0.5, 0.5), (0.5, 0.5)], [0, 0, -1, 1], errors):
            search.observe(point, value, error)
        return search.posterior([(0.5, 0.5)])[0][0]

    assert means((1, 1, 0.1, 3)) < -0.1 < 0.1 < means((1, 1, 3, 0.1))


@pytest.mark.parametrize("strategy", ["gp", "nei", "saas"])
def test_the_joint_posterior_is_a_covariance_and_moments_are_parts_of_it(strategy):
    search, points = half_way(strategy, Space(3)), Space(3).sobol(6, 9)
    mean, covariance = search.joint(points)
    assert mean.shape == (6,) and np.linalg.eigvalsh(covariance).min() > -1e-9
    np.testing.assert_allclose(covariance, covariance.T)
    np.testing.assert_allclose(search.posterior(points), (mean, np.sqrt(covariance.diagonal())))
    parts = search.moments(points, points[2:4])
    for part, whole in zip(parts, (mean, covariance[:, 2:4], covariance.diagonal())):
        np.testing.assert_allclose(part, whole, atol=1e-9)
    np.testing.assert_allclose(search.model().means(search._tensor(points)).mean(0), mean, atol=1e-9)


# ---------------------------------------------------------------------------------------------------- the choice


@pytest.mark.parametrize("n", [4, 5])  # every other trial counts the prospects
def test_the_knowledge_gradient_is_the_expected_gain_of_one_more_observation(n):
    """By brute force: observe at a point, what the posterior says it may, and answer with the best of all goals."""
    search = half_way("gp", Space(2), n)
    chosen, others = search.suggest(), Space(2).anchors() + Space(2).sobol(20, 1)
    tried = list(dict.fromkeys(search.points))
    pool = _pool(search, 3000 + n)
    goals = [*tried, *(pool[i] for i in _prospects(search, pool, 0) * (n % 2))]

    def gain(point):
        mean, covariance = search.joint([*goals, point])
        step = covariance[:, -1] / np.sqrt(covariance[-1, -1] + 0.1**2)
        draws = np.random.default_rng(0).standard_normal(20_000)
        return (mean[:, None] + step[:, None] * draws).max(0).mean()

    assert gain(chosen) > 0.999 * max(gain(point) for point in others)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_only_points_among_the_given_are_tried(strategy):
    among = Space(3).sobol(40, 9)
    search = Search(Space(3), strategy, initial=2, among=among)
    for _ in range(9):
        point = search.suggest()
        assert point in among
        search.observe(point, point[0], 0.1)
    with pytest.raises(InputError, match="a point is"):
        Search(Space(3), among=[(0.5, 0.5)])


def test_the_incumbent_is_no_point_that_its_own_observations_speak_against():
    search = plain(2)
    for x in np.linspace(0, 1, 11):
        search.observe((x, 1 - x), 2 * x, 0.1)
    for _ in range(3):
        search.observe((0.97, 0.03), -3.0, 0.1)  # a hole that a smooth model bridges
    assert search.incumbent()[0] != (0.97, 0.03)


def test_candidates_are_points_of_the_space_and_lie_on_every_kind_of_face():
    for space in (Space(3), Space(4, ((-1.0, 1.0),)), Space(1, ((0.0, 1.0),))):
        candidates = _pool(half_way("gp", space, 4), 0)
        for point in candidates:
            space.check(point)
        kinds = [sum(weight > 0 for weight in point[: space.d]) for point in candidates]
        assert min(kinds.count(number) for number in range(1, space.d + 1)) > 20


def test_a_point_is_as_good_as_tried_again_where_that_tells_most():
    """Two points, far apart and close in value; nowhere else is worth a look."""
    search, rng = plain(2, 0, initial=2), np.random.default_rng(0)
    for _ in range(12):
        for point, mean in (((1.0, 0.0), 1.0), ((0.0, 1.0), 0.9), ((0.5, 0.5), -5.0)):
            search.observe(point, mean + rng.normal(), 1.0)
    assert max(search.suggest()) > 0.95
