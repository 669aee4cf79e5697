"""The audit of a search: on functions that are known, it says what is known and no more."""

import math
import re

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import null_space
from scipy.stats import multivariate_normal

from dense_rlhf.bayesopt import audit
from dense_rlhf.bayesopt.search import Search
from dense_rlhf.bayesopt.space import Space
from dense_rlhf.statistics import Interval
from dense_rlhf.types import InputError

BEST = np.array([0.2, 0.5, 0.3])
NAMES = ("shap", "terminal", "lime")


def bowl(points):
    """Concave, 0 at `BEST`; about 1 deep."""
    return -np.square(np.asarray(points)[:, :3] - BEST).sum(-1)


def searched(space, points, function, noise, seed=0, **settings):
    """A search that observed `function` at `points` with normal noise of a known size."""
    search, rng = Search(space, **settings), np.random.default_rng(seed)
    for point, value in zip(points, function(np.array(points))):
        search.observe(tuple(point), float(value + noise * rng.normal()), noise)
    return search


def on_simplex(d, n, function, noise, seed=0, **settings):
    """Anchors and `n` Sobol points."""
    space = Space(d)
    return searched(space, space.anchors() + space.sobol(n, seed), function, noise, seed, **settings)


def flat(points):
    return np.zeros(len(points))


@pytest.fixture(scope="module")
def known():
    """A bowl seen almost without noise."""
    return on_simplex(3, 16, bowl, 0.02)


@pytest.fixture(scope="module")
def early():
    """The same bowl after few and noisier trials."""
    return on_simplex(3, 8, bowl, 0.15, seed=1)


@pytest.fixture(scope="module")
def nothing():
    return on_simplex(3, 16, flat, 0.1)


@pytest.fixture(scope="module")
def beyond():
    """Weights and a temperature that matters."""
    space = Space(2, ((0.0, 4.0),))
    return searched(space, space.anchors() + space.sobol(9, 0), lambda p: p[:, 0] + 0.3 * p[:, 2], 0.05)


# ---------------------------------------------------------------------------------------------------- verdicts


def test_a_known_bowl_has_converged(known):
    verdict = audit.verdict(known, NAMES, "sd")
    assert verdict.kind == audit.CONVERGED and verdict.winner and verdict.more == 0
    assert verdict.p < audit.LEVEL and verdict.regret.expected <= verdict.tolerance
    assert (
        f"Converged: the best weights are expected to gain another {verdict.regret.expected:.2g} sd, " in verdict.text
    )


def test_an_early_search_needs_more_trials(early):
    verdict, n = audit.verdict(early, NAMES), len(early.values)
    assert verdict.kind == audit.MORE and verdict.regret.expected > verdict.tolerance
    exact = n * ((verdict.regret.expected / verdict.tolerance) ** 2 - 1)
    assert exact <= verdict.more < exact + 5 and verdict.text.startswith(f"Needs about {verdict.more} more trials")
    assert verdict.tolerance == max(0.25 * verdict.noise, 0.05 * verdict.regret.spread)


def test_four_trials_a_number_are_the_least_to_have_converged(known):
    sooner, enough = (audit.verdict(audit.until(known, n), NAMES) for n in (11, 12))
    assert sooner.regret.expected <= sooner.tolerance and (sooner.kind, sooner.more) == (audit.MORE, 1)
    assert f"within {sooner.tolerance:.2g} (a" in sooner.text and ", which 11 trials of 3 numbers are" in sooner.text
    assert enough.kind == audit.CONVERGED


def test_a_flat_function_has_no_winner(nothing):
    verdict = audit.verdict(nothing, NAMES)
    assert verdict.kind == audit.FLAT and not verdict.winner and verdict.p >= audit.LEVEL
    assert verdict.noise == pytest.approx(0.1) and "No winner is claimed" in verdict.text
    assert not any(name in verdict.text for name in NAMES)


def test_told_apart_but_not_from_a_plain_mixture_is_no_winner():
    """Two sources are as good as each other and as their mixtures, the third is bad."""
    space = Space(3)
    search = searched(space, 2 * space.anchors() + space.sobol(9, 0), lambda p: p[:, 0] + p[:, 1], 0.05)
    verdict, chances = audit.verdict(search, NAMES), audit.beats(search, NAMES)
    assert verdict.kind != audit.FLAT and not verdict.winner
    assert set(verdict.unbeaten) == set(chances["against"][chances["probability"] < 0.95]) != set()
    assert "told apart (permutation test" in verdict.text and f"not from {verdict.unbeaten[0]}" in verdict.text


@pytest.mark.parametrize("name", ["known", "early", "nothing"])
def test_every_number_of_the_sentence_is_a_number_of_the_search(name, request):
    search = request.getfixturevalue(name)
    verdict, best = audit.verdict(search, NAMES), search.incumbent()[0]
    allowed = {
        f"{verdict.p:.3f}",
        f"{verdict.noise:.2g}",
        f"{verdict.tolerance:.2g}",
        f"{verdict.regret.expected:.2g}",
        f"{verdict.regret.spread:.2g}",
        str(verdict.more),
        str(len(search.values)),
        "0.05",
    }
    allowed |= {f"{w:.2f}" for w in best} | {f"{p:.2f}" for p in audit.beats(search, NAMES)["probability"].dropna()}
    numbers = re.findall(r"\d+(?:\.\d+)?(?:e-\d+)?", verdict.text)
    assert numbers and set(numbers) <= allowed
    if verdict.winner:
        assert all(f"{name} {weight:.2f}" in verdict.text for name, weight in zip(NAMES, best))


def test_a_verdict_is_the_same_twice(early):
    assert audit.verdict(early, NAMES) == audit.verdict(early, NAMES)


def test_names_must_be_one_a_weight(early):
    with pytest.raises(InputError, match="2 names for 3 weights"):
        audit.verdict(early, ("shap", "terminal"))


# ---------------------------------------------------------------------------------------------------- can it tell?


def with_values(points, values):
    search = Search(Space(len(points[0])))
    search.points, search.values = [tuple(p) for p in points], [float(v) for v in values]
    return search


def test_false_alarms_are_held_to_the_level_and_signal_is_seen():
    space, rng, alarms, seen = Space(4), np.random.default_rng(0), 0, 0
    for seed in range(80):
        points = space.anchors() + space.sobol(15, seed)
        noise = rng.normal(size=len(points))
        alarms += audit.p_flat(with_values(points, noise), repeats=99) < audit.LEVEL
        signal = np.array(points)[:, 0] / np.std(np.array(points)[:, 0])
        seen += audit.p_flat(with_values(points, 2 * signal + noise), repeats=99) < audit.LEVEL
    assert alarms <= 9  # of 80 at 5 %: more in one case of 100
    assert seen >= 72


def test_the_test_knows_no_unit_no_order_of_sources_and_no_constant(early):
    points, values = np.array(early.points), np.array(early.values)
    p = audit.p_flat(early)
    assert p < audit.LEVEL and p >= 1 / 1000
    assert audit.p_flat(with_values(points[:, [2, 0, 1]], values)) == p
    assert audit.p_flat(with_values(points, 1000 * values - 7)) == p
    assert audit.p_flat(with_values(points, -values)) == p
    assert audit.p_flat(early, seed=1) == pytest.approx(p, abs=0.02)


def test_constant_values_and_a_single_point_tell_nothing():
    points = Space(3).sobol(6, 0)
    assert audit.p_flat(with_values(points, [2.0] * 6)) == 1
    assert audit.p_flat(with_values([points[0]] * 6, range(6))) == 1


def test_repeats_of_a_point_count_as_observations():
    """Two points, five times each: apart they are told apart, mixed they are not; two values never are."""
    points = [(1.0, 0.0)] * 5 + [(0.0, 1.0)] * 5
    jitter = 0.1 * np.random.default_rng(0).normal(size=10)
    assert audit.p_flat(with_values(points, jitter + np.repeat([1, 0], 5))) < audit.LEVEL
    assert audit.p_flat(with_values(points, jitter + np.tile([1, 0], 5))) > audit.LEVEL
    assert audit.p_flat(with_values(points[4:6], [0, 1])) == 1


def test_a_switch_and_a_wide_bound_weigh_as_much_as_a_weight():
    """Points are compared on the unit scale: a temperature up to 4000 does not drown the weights."""
    values = np.random.default_rng(0).normal(size=12)
    narrow, wide = Space(2, ((0.0, 1.0),)), Space(2, ((0.0, 4000.0),))
    importances = []
    for space in (narrow, wide):
        search = Search(space)
        search.points, search.values = space.sobol(12, 0), values.tolist()
        importances.append(audit.p_flat(search))
    assert importances[0] == importances[1]


def test_the_gain_is_that_of_a_gaussian_process_over_a_constant():
    """Against the densities of the contrasts, written out, the scale at its maximum."""
    rng = np.random.default_rng(0)
    points, values = rng.random((9, 3)), rng.normal(size=9)
    kernel = np.exp(-np.square(points[:, None] - points[None]).sum(-1))
    basis = null_space(np.ones((1, 9)))
    centred, y = basis.T @ kernel @ basis, basis.T @ values
    centred *= 8 / np.trace(centred)

    def density(covariance):
        scale = y @ np.linalg.solve(covariance, y) / 8
        return multivariate_normal(cov=scale * covariance).logpdf(y)

    wanted = max(density(s * centred + (1 - s) * np.eye(8)) for s in audit.SHARES) - density(np.eye(8))
    assert audit._gain(kernel, values[None])[0] == pytest.approx(wanted)
    assert audit._gain(kernel, np.stack([values, values[::-1]])).shape == (2,)


# ---------------------------------------------------------------------------------------------------- comparisons


def test_the_chances_are_those_of_joint_draws(early):
    table, best = audit.beats(early, NAMES).set_index("against"), early.incumbent()[0]
    assert list(table.index) == ["equal weights", "shap alone", "terminal alone (sparse)", "lime alone"]
    others = list(audit.plain_mixtures(early, NAMES).values())
    mean, covariance = early.joint([best, *others])
    draws = np.random.default_rng(0).multivariate_normal(mean, covariance, 20_000)
    ahead = draws[:, :1] - draws[:, 1:]
    has_one = table["probability"].notna().to_numpy()
    assert has_one.sum() >= 3
    np.testing.assert_allclose(table["probability"][has_one], (ahead > 0).mean(0)[has_one], atol=0.015)
    np.testing.assert_allclose(table["difference"][has_one], ahead.mean(0)[has_one], atol=0.01)
    np.testing.assert_allclose(table["low"][has_one], np.quantile(ahead, 0.025, axis=0)[has_one], atol=0.03)
    np.testing.assert_allclose(table["high"][has_one], np.quantile(ahead, 0.975, axis=0)[has_one], atol=0.03)


def test_the_incumbent_is_not_compared_with_itself():
    search = on_simplex(3, 4, lambda p: np.array(p)[:, 1], 0.05)
    table = audit.beats(search, NAMES).set_index("against")
    assert search.incumbent()[0] == (0, 1, 0)
    assert table.index[table.isna().all(axis=1)].tolist() == ["terminal alone (sparse)"]
    assert table.notna().all(axis=1).sum() == 3
    assert "sparse" not in audit.verdict(search, NAMES).text.split("better than")[1]


def test_baselines_keep_what_is_searched_beyond_the_weights(beyond):
    warmth = beyond.incumbent()[0][2]
    mixtures = audit.plain_mixtures(beyond, ("a", "b"))
    assert mixtures == {"equal weights": (0.5, 0.5, warmth), "a alone": (1, 0, warmth), "b alone": (0, 1, warmth)}
    for point in mixtures.values():
        beyond.space.check(point)
    assert audit.verdict(beyond, ("a", "b")).kind in (audit.CONVERGED, audit.MORE)


def test_regret_is_what_joint_draws_say(early, known):
    regret, sure = audit.regret(early), audit.regret(known)
    best = early.incumbent()[0]
    mean, _ = early.posterior([best, *early.space.sobol(256, 0)])
    assert regret.expected >= mean.max() - mean[0] and regret.high >= regret.expected > sure.expected > 0
    points = [best, *early.points, *early.space.anchors(), *early.space.sobol(64, 5)]
    draws = np.random.default_rng(1).multivariate_normal(*early.joint(points), 4000)
    short = draws.max(1) - draws[:, 0]
    assert regret.expected == pytest.approx(short.mean(), rel=0.2)
    assert regret.high == pytest.approx(np.quantile(short, 0.95), rel=0.2)
    assert regret.spread == pytest.approx(1.0, rel=0.4)  # the bowl is about so deep


# ---------------------------------------------------------------------------------------------------- tables


def test_the_trace_is_what_the_search_would_have_answered(early):
    path = audit.trace(early)
    assert path["n"].tolist() == list(range(4, len(early.values) + 1)) and math.isnan(path["moved"].iloc[0])
    for n in (4, 7, len(early.values)):
        row, (point, mean, sd) = path.set_index("n").loc[n], audit.until(early, n).incumbent()
        assert row["point"] == point and row["mean"] == pytest.approx(mean)
        assert row["high"] - row["mean"] == pytest.approx(1.96 * sd) == pytest.approx(row["mean"] - row["low"])
    assert len(early.values) == 12  # the search itself is left as it was
    for before, after in zip(path.itertuples(), path.iloc[1:].itertuples()):
        assert after.moved == pytest.approx(np.abs(np.subtract(before.point, after.point)).sum() / 2)


def test_leaving_one_out_is_conditioning_on_the_others(early):
    """Against Gaussian processes in numpy, the members' hyper-parameters, one observation taken away at a time."""
    from dense_rlhf.bayesopt.surrogate import _covariance

    predicted, model = audit.leave_one_out(early), early.model()
    K = _covariance(model.z, model.X, model.X).numpy()  # (members, 12, 12)
    m = np.zeros(K.shape[:2])
    center, scale = np.mean(early.values), np.std(early.values, ddof=1)
    y, noise = (np.array(early.values) - center) / scale, (0.15 / scale) ** 2
    for i in range(len(y)):
        rest = [j for j in range(len(y)) if j != i]
        gain = np.linalg.solve(K[:, rest][:, :, rest] + noise * np.eye(len(rest)), K[:, rest, i, None])[..., 0]
        means = m[:, i] + (gain * (y[rest] - m[:, rest])).sum(1)
        variances = K[:, i, i] + noise - (gain * K[:, rest, i]).sum(1)
        assert predicted["mean"][i] == pytest.approx(center + scale * means.mean(), abs=1e-4)
        assert predicted["sd"][i] == pytest.approx(scale * math.sqrt(variances.mean() + means.var()), abs=1e-4)
    np.testing.assert_allclose(predicted["z"], (predicted["observed"] - predicted["mean"]) / predicted["sd"])
    np.testing.assert_allclose(predicted["observed"], early.values)


@pytest.mark.parametrize("strategy", ["saas", "additive"])
def test_other_models_are_audited_alike(strategy):
    search = on_simplex(4, 6, lambda p: np.array(p)[:, 0], 0.05, strategy=strategy)
    left_out = audit.leave_one_out(search)
    assert left_out.shape == (11, 4) and left_out.notna().all(axis=None) and (left_out["sd"] > 0.05).all()
    np.testing.assert_allclose(audit.noise_variance(search), 0.05**2, rtol=1e-6)
    assert audit.verdict(search, ("a", "b", "c", "d")).p < audit.LEVEL


def test_unknown_noise_is_the_models_own(early):
    np.testing.assert_allclose(audit.noise_variance(early), 0.15**2)
    search = Search(early.space)
    for point, value in zip(early.points, early.values):
        search.observe(point, value)
    variance = audit.noise_variance(search)
    assert variance.shape == (12,) and np.ptp(variance) == 0 and 0.04 < math.sqrt(variance[0]) < 0.5


def test_q_squared_compares_with_the_mean_of_the_others():
    y = np.array([0.0, 1.0, 5.0])
    others = np.array([3.0, 2.5, 0.5])
    assert audit.q_squared(pd.DataFrame({"observed": y, "mean": y})) == 1
    assert audit.q_squared(pd.DataFrame({"observed": y, "mean": others})) == pytest.approx(0)
    assert audit.q_squared(pd.DataFrame({"observed": y, "mean": -y})) < 0
    assert math.isnan(audit.q_squared(pd.DataFrame({"observed": [1.0, 1.0], "mean": [0.0, 1.0]})))


def test_good_predictions_are_told_from_bad_ones(known, nothing):
    good, bad = audit.leave_one_out(known), audit.leave_one_out(nothing)
    assert audit.q_squared(good) > 0.8 > 0.3 > audit.q_squared(bad)
    assert audit.coverage(good) >= 0.8 and audit.coverage(bad) >= 0.8
    assert audit.coverage(pd.DataFrame({"z": [0.0, -1.9, 2.0, -2.0]})) == 0.5


def test_phases_follow_the_start_of_the_search():
    start = Search(Space(3), initial=4).start
    search = searched(Space(3), start + Space(3).sobol(2, 9), bowl, 0.1, initial=4)
    assert audit.phases(search) == ["anchor"] * 4 + ["quasi-random"] * 4 + ["chosen"] * 2
    assert audit.phases(audit.until(search, 5)) == ["anchor"] * 4 + ["quasi-random"]
    drawn = on_simplex(3, 6, bowl, 0.1, initial=4, strategy="sobol", anchors=False)
    assert set(audit.phases(drawn)) == {"quasi-random"} and len(audit.phases(drawn)) == 10
    again = searched(Space(2), [*Space(2).anchors() * 2, (1.0, 0.0)], flat, 0.1, replicates=2, initial=0)
    assert audit.phases(again) == ["anchor"] * 6 + ["chosen"]  # a vertex once more


def test_noise_is_split_into_prompts_and_seeds(early):
    parts = audit.noise_parts(early).set_index("noise")["sd"]
    assert parts["prompts and responses"] == pytest.approx(0.15) == parts["one observation"]
    assert math.isnan(parts["another seed, beyond that"]) and "another seed" in audit.verdict(early, NAMES).text
    search, rng = Search(Space(2), replicates=10), np.random.default_rng(0)
    for point in search.start[:30]:
        search.observe(point, point[0] + 0.4 * rng.normal(), 0.3)
    table = audit.noise_parts(search).set_index("noise")
    within, between, one = table["sd"]
    assert within == pytest.approx(0.3) and one == pytest.approx(0.4, abs=0.08)
    assert one == pytest.approx(math.hypot(within, between))
    assert table["known by"].tolist()[:2] == ["standard errors of 30 trials", "27 repeats of a point"]
    assert "tried twice" not in audit.verdict(search, NAMES[:2]).text
    unknown = with_values(early.points, early.values)
    assert math.isnan(audit.noise_parts(unknown)["sd"][0]) and audit.noise_parts(unknown)["sd"][2] > 0


def test_chosen_trials_are_compared_with_quasi_random_ones():
    space = Space(2)
    points = space.anchors() + space.sobol(4, 0) + [(0.9, 0.1)] * 5
    search = searched(space, points, lambda p: 2 * p[:, 0], 0.05, initial=4)
    gain, drawn = audit.gain_over_quasi_random(search), np.array(search.values[3:7])
    chosen = np.array(search.values[7:])
    half = math.sqrt(chosen.var(ddof=1) / 5 + drawn.var(ddof=1) / 4)
    assert gain.mean == pytest.approx(chosen.mean() - drawn.mean()) and gain.low < gain.mean < gain.high
    assert gain.high - gain.mean > 1.96 * half and gain.mean - gain.low == pytest.approx(gain.high - gain.mean)
    assert audit.gain_over_quasi_random(audit.until(search, 8)) is None


def test_the_quasi_random_band_holds_new_sobol_trials(known):
    band = audit.quasi_random_band(known)
    fresh = bowl(np.array(Space(3).sobol(512, 77))) + 0.02 * np.random.default_rng(1).normal(size=512)
    assert np.mean((band.low < fresh) & (fresh < band.high)) == pytest.approx(0.95, abs=0.03)
    assert band.mean == pytest.approx(fresh.mean(), abs=0.05)


def test_the_quasi_random_band_counts_noise(nothing):
    band = audit.quasi_random_band(nothing)
    assert band.high - band.low >= 2 * 1.9 * 0.1


# ---------------------------------------------------------------------------------------------------- signatures


def steps(*moved):
    return pd.DataFrame({"moved": [math.nan, *moved]})


def test_oscillation_is_movement_that_does_not_end():
    settled, restless = steps(*[0.9] * 6, 0, 0, 0), steps(*[0] * 6, 0.9, 0, 0.3)
    assert audit.oscillation(settled)[:3] == ("oscillation", False, 0)
    assert audit.oscillation(restless)[:3] == ("oscillation", True, pytest.approx(2 / 3))
    assert audit.oscillation(steps(0.9, 0.9, 0.9)).present is None
    assert audit.oscillation(steps(*[0.25] * 12)).present is False  # more than a quarter, not a quarter
    assert audit.oscillation(steps(*[0] * 6, 0, 0, 0.9)).present is False  # one jump is a correction
    assert audit.oscillation(steps(*[0] * 15, *[0.9] * 2, *[0] * 6)).present is False  # a quarter of eight
    assert audit.oscillation(steps(*[0] * 15, *[0.9] * 3, *[0] * 5)).present is True


def ledger(search, proxy, gold, ess=None):
    return [
        {"point": list(point), "proxy": float(p), "gold": float(g), "ess": ess or {}}
        for point, p, g in zip(search.points, proxy, gold)
    ]


def test_overfitting_is_gold_that_falls_as_the_proxy_rises(early):
    rising = np.arange(12.0)
    against = audit.overfitting(early, ledger(early, rising, -rising))
    along = audit.overfitting(early, ledger(early, rising, rising))
    assert against.present is True and against.number == pytest.approx(-1)
    assert along.present is False and along.number == pytest.approx(1)
    best = early.points.index(early.incumbent()[0])
    assert f"gold at the incumbent {rising[best]:.2f}, best trial 11.00" in along.text
    nine = audit.overfitting(early, ledger(early, rising, rising)[:9])
    assert "1.00 over the 5 of higher proxy" in nine.text and "nan" not in nine.text
    unrelated = [3, 9, 1, 7, 0, 11, 4, 8, 2, 10, 6, 5]
    assert audit.overfitting(early, ledger(early, rising, unrelated)).present is None
    bent = np.where(rising < 6, rising, 20 - rising)  # good until the proxy is high
    turned = audit.overfitting(early, ledger(early, rising, bent))
    assert turned.present is True and turned.number > 0


def test_many_numbers_want_many_trials_and_a_model_that_predicts(early):
    assert audit.dimension(early, -1.0).present is False  # three weights
    four = on_simplex(4, 19, lambda p: np.array(p)[:, 0], 0.1)
    assert len(four.values) == 24 and audit.dimension(four, 0.3).present is False
    assert audit.dimension(four, 0.0).present is True and audit.dimension(four, math.nan).present is True
    assert audit.dimension(audit.until(four, 23), 0.3).present is True


def test_misalignment_is_of_the_heaviest_source(known):
    source = NAMES[int(np.argmax(known.incumbent()[0]))]
    good, bad = Interval(0.4, 0.2, 0.6), Interval(0.1, -0.1, 0.3)
    assert audit.misalignment(known, NAMES, {source: good})[1:3] == (False, 0.4)
    assert audit.misalignment(known, NAMES, {source: bad}).present is True
    nothing_known = audit.misalignment(known, NAMES, {name: good for name in NAMES if name != source})
    assert nothing_known.present is None and source in nothing_known.text


def test_evenness_is_a_mean_over_the_trials_that_paid_a_source(early):
    trials = ledger(early, range(12), range(12), {"shap": 0.5, "terminal": 0.1})
    trials[0]["ess"] = {"shap": 1.0}
    table = audit.evenness(early, NAMES, trials).set_index("source")
    assert table["ESS/T"]["shap"] == pytest.approx(6.5 / 12) and table["ESS/T"]["terminal"] == pytest.approx(0.1)
    assert math.isnan(table["ESS/T"]["lime"])
    here = trials[early.points.index(early.incumbent()[0])]
    here["ess"] = {"shap": 0.7, "lime": 0.2}
    table = audit.evenness(early, NAMES, trials).set_index("source")
    assert table["at the incumbent"]["shap"] == 0.7 and table["at the incumbent"]["lime"] == 0.2


def even(**shares):
    return pd.DataFrame([(s, v, v) for s, v in shares.items()], columns=["source", "ESS/T", "at the incumbent"])


def test_sources_that_are_even_spreads_are_named():
    assert audit.sameness(even(shap=0.99, terminal=0.05))[1:3] == (True, 0.99)
    assert audit.sameness(even(shap=0.6, terminal=0.05))[1:3] == (False, 0.6)
    assert audit.sameness(even(uniform=1.0, shap=0.6)).present is False  # it says so
    assert audit.sameness(even(shap=math.nan)).present is None
    assert "shap 0.60" in audit.sameness(even(shap=0.6)).text


def test_every_signature_has_a_named_result(known):
    trials = ledger(known, known.values, known.values, {"shap": 0.5})
    checks = audit.checks(known, NAMES, trials, audit.trace(known), audit.leave_one_out(known))
    assert [check.name for check in checks] == [
        "oscillation",
        "reward overfitting",
        "too many dimensions",
        "misaligned explanations",
        "even in all but name",
    ]
    assert [check.present for check in checks] == [False, False, False, None, False]
    assert all(check.text for check in checks)


def test_the_smallest_search_is_audited(early):
    """Two trials: nothing is known, everything is said, nothing fails."""
    search = audit.until(early, 2)
    left_out = audit.leave_one_out(search)
    verdict = audit.verdict(search, NAMES)
    assert verdict.kind == audit.FLAT and verdict.p == 1 and len(audit.trace(search)) == 1
    checks = audit.checks(search, NAMES, ledger(search, [0, 1], [0, 1]), audit.trace(search), left_out)
    assert [check.present for check in checks] == [None, None, False, None, None]


pairs = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=6, max_size=20).filter(
    lambda verdict: all(len(set(column)) > 1 for column in zip(*verdict))
)


@given(pairs)
def test_rank_correlation_has_no_order_and_turns_with_its_sign(verdict):
    a, b = zip(*verdict)
    rho, turned = audit.rank_correlation(a, b), audit.rank_correlation(a, [-y for y in b])
    assert -1 <= rho.low <= rho.mean + 1e-3 and rho.mean - 1e-3 <= rho.high <= 1
    assert audit.rank_correlation(b, a).mean == pytest.approx(rho.mean)
    assert (turned.mean, turned.low) == (pytest.approx(-rho.mean), pytest.approx(-rho.high))


def test_rank_correlation_is_as_sure_as_fieller_says():
    """By hand: twelve pairs, atanh(rho) within 1.96 sqrt(1.06 / 9)."""
    correlation = audit.rank_correlation(range(12), [3, 9, 1, 7, 0, 11, 4, 8, 2, 10, 6, 5])
    half = (math.atanh(correlation.high) - math.atanh(correlation.low)) / 2
    assert half == pytest.approx(0.6727, abs=1e-4)
    assert math.isnan(audit.rank_correlation(range(5), range(5)).low)
    assert math.isnan(audit.rank_correlation(range(9), [1] * 9).mean)


@given(st.integers(0, 99))
def test_moved_weight_is_a_distance(seed):
    a, b, c = Space(3).sobol(3, seed)
    search = Search(Space(3))
    assert audit.moved(search, a, a) == 0 and 0 < audit.moved(search, a, b) == audit.moved(search, b, a) <= 1
    assert audit.moved(search, a, c) <= audit.moved(search, a, b) + audit.moved(search, b, c) + 1e-12
