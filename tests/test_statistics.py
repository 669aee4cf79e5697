"""Intervals, tests and power: against scipy and hand-made cases, then on simulated arms whose effects are known."""

import math
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from dense_rlhf.statistics import (
    FEWEST,
    Difference,
    Interval,
    arm_table,
    bootstrap,
    difference,
    hedges_g,
    holm,
    improvement,
    interquartile_mean,
    over_seeds,
    paired,
    power,
    power_within,
    seeds_needed,
    summarise,
    t_interval,
    welch,
)
from dense_rlhf.types import InputError

RNG = np.random.default_rng(0)
few = st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=8)


def covers(interval, truth):
    return interval.low <= truth <= interval.high


# ---------------------------------------------------------------------------------------------------- against scipy


@given(few)
def test_a_t_interval_is_scipys(values):
    interval = t_interval(values)
    assert interval.mean == pytest.approx(np.mean(values))
    if np.std(values) > 1e-6 * (1 + abs(np.mean(values))):
        theirs = stats.ttest_1samp(values, 0).confidence_interval(0.95)
        assert (interval.low, interval.high) == pytest.approx(tuple(theirs), rel=1e-6, abs=1e-6)


def test_differences_are_scipys():
    for n, m in ((2, 2), (3, 5), (8, 4)):
        a, b = RNG.normal(1, 1, n), RNG.normal(0, 3, m)
        apart, theirs = welch(a, b), stats.ttest_ind(a, b, equal_var=False)
        assert (apart.p, apart.df) == pytest.approx((theirs.pvalue, theirs.df))
        assert (apart.low, apart.high) == pytest.approx(tuple(theirs.confidence_interval(0.95)))
    a, b = RNG.normal(1, 1, 4), RNG.normal(0, 1, 4)
    pairs, theirs = paired(a, b), stats.ttest_rel(a, b)
    assert (pairs.p, pairs.df) == pytest.approx((theirs.pvalue, 3)) and pairs.paired and not apart.paired
    assert (pairs.low, pairs.high) == pytest.approx(tuple(theirs.confidence_interval(0.95)))


def test_one_seed_has_no_interval():
    intervals = [t_interval([2.0]), over_seeds([np.arange(5.0)]), paired([2.0], [0.0]), welch([2.0], [0.0, 0.1])]
    assert all(not i.known and i.low == -math.inf and i.high == math.inf for i in intervals)
    assert str(intervals[0]) == "2.00 [no interval]"
    for gap in intervals[2:]:
        assert gap.p == 1 and gap.df == 0 and gap.seeds == 1 and math.isnan(gap.g)
        assert gap.p_above(-9) == gap.p_below(9) == 1 and seeds_needed(gap, lambda n: 0.05) == math.inf


@given(few, few)
def test_the_test_and_the_interval_agree(a, b):
    for gap in (welch(a, b), paired(a[:2], b[:2])):
        outside = gap.low > 0 or gap.high < 0
        assert outside == (gap.p < 0.05) or min(abs(gap.low), abs(gap.high)) < 1e-6 * (1 + abs(gap.mean))


def test_seeds_that_agree_to_the_last_digit_leave_nothing_open():
    assert paired([1.0, 1.0], [1.0, 1.0]).p == 1 and paired([2.0, 2.0], [1.0, 1.0]).p == 0
    assert welch([2.0, 2.0], [1.0, 1.0]).low == 1


@pytest.mark.parametrize("bounds", [(0, 1), (0, math.inf), (-1, 1), (2, 5)], ids=str)
@pytest.mark.parametrize("spread", [1e-6, 0.1, 0.4])
@pytest.mark.parametrize("where", [0.01, 0.5, 0.9, 0.999])
def test_an_interval_keeps_within_its_bounds(bounds, spread, where):
    low, width = bounds[0], min(bounds[1], 10) - bounds[0]
    shares = where + spread * min(where, 1 - where) * np.array([-1, 1, 0.5])
    bounded, plain = t_interval(low + width * shares, bounds), t_interval(low + width * shares)
    assert bounds[0] <= bounded.low < bounded.mean < bounded.high <= bounds[1] and bounded.mean == plain.mean
    if spread < 1e-5:  # a small error is about the same on every scale
        assert (bounded.low, bounded.high) == pytest.approx((plain.low, plain.high), rel=1e-3)


def test_intervals_of_shares_and_kl_are_those_of_logit_and_logarithm():
    share, kl = t_interval([0.80, 0.88], (0, 1)), t_interval([5.92, 7.74], (0, math.inf))
    reach = stats.t.ppf(0.975, 1) * 0.04 / (0.84 * 0.16)
    expected = stats.logistic.cdf(stats.logistic.ppf(0.84) + np.array([-reach, reach]))
    assert (share.low, share.high) == pytest.approx(tuple(expected))  # plain: 0.33 to 1.35
    assert kl.low * kl.high == pytest.approx(kl.mean**2) and kl.low > 0  # plain: -4.7 to 18.4
    assert t_interval([0.2, 0.3], (0, 1)).high == pytest.approx(1 - t_interval([0.8, 0.7], (0, 1)).low)


@pytest.mark.parametrize("values", [[1.0, 1.0], [0.0, 0.0], [-0.1, 0.05], [0.5]])
def test_a_mean_at_or_beyond_a_bound_has_the_plain_interval(values):
    assert t_interval(values, (0, 1)) == t_interval(values) or len(set(values)) == 2 and sum(values) > 0


def test_shares_over_seeds_cover_at_about_their_nominal_rate():
    rng = np.random.default_rng(0)
    draws = rng.beta(16, 4, (2000, 3))
    intervals = [t_interval(row, (0, 1)) for row in draws]
    assert 0.93 < np.mean([i.low <= 0.8 <= i.high for i in intervals]) <= 0.99


def test_columns_of_judgements_know_their_bounds():
    tables = {"a": [pd.DataFrame({"win": [w] * 3, "kl": [k] * 3, "gold": [k] * 3}) for w, k in ((0.7, 1), (0.98, 12))]}
    win, kl, gold = (summarise(tables, name)["a"] for name in ("win", "kl", "gold"))
    assert 0 < win.low < win.high < 1 and kl.low > 0 > gold.low


def test_intervals_that_overlap_are_not_apart():
    assert Interval(0, -1, 1).apart(Interval(3, 2, 4)) and Interval(3, 2, 4).apart(Interval(0, -1, 1))
    assert not Interval(0, -1, 1).apart(Interval(1.5, 0.5, 2)) and not t_interval([1.0]).apart(Interval(9, 8, 10))
    assert str(Interval(0.123, -1, 1)) == "0.12 [-1.00, 1.00]"


CALLS = [t_interval, bootstrap, over_seeds, lambda x: paired(x, [1.0]), lambda x: welch([1.0], x)]
CALLS += [lambda x: interquartile_mean([x]), lambda x: improvement([x], [[1.0]])]


@pytest.mark.parametrize("nothing", [[], [np.nan], [1.0, math.inf], [[1.0]]])
@pytest.mark.parametrize("call", CALLS)
def test_an_interval_of_nothing_is_refused(call, nothing):
    if call is over_seeds and nothing == [[1.0]]:
        return  # one seed with one prompt
    with pytest.raises(InputError, match="no interval of"):
        call(nothing)


def test_other_numbers_of_seeds_and_tasks_are_refused():
    with pytest.raises(InputError, match="cannot be paired"):
        paired([1.0, 2.0], [1.0])
    with pytest.raises(InputError, match="same datasets"):
        improvement([[1.0, 2.0]], [])


# ---------------------------------------------------------------------------------------------------- correction


@given(st.lists(st.floats(0, 1), min_size=1, max_size=7))
def test_holm_is_its_definition(p):
    """Corrected below alpha: exactly those that are rejected one after the other, until the first that is not."""
    corrected, m = holm(p), len(p)
    for alpha in (0.01, 0.05, 0.3):
        rejected, rank = set(), 0
        for i in sorted(range(m), key=lambda i: p[i]):
            if p[i] * (m - rank) > alpha:
                break
            rejected.add(i)
            rank += 1
        assert {i for i in range(m) if corrected[i] <= alpha} == rejected
    assert all(a >= b for a, b in zip(corrected, p)) and holm([]) == []


def test_hedges_g_takes_the_bias_of_few_seeds_away():
    draws = RNG.normal([[1.0], [0.0]], 1.0, (4000, 2, 3))
    sizes = np.array([hedges_g(a, b) for a, b in draws])
    assert sizes.mean() == pytest.approx(1, abs=0.06)  # Cohen's d would say 1.25
    assert math.isnan(hedges_g([1.0, 1.0], [0.0, 0.0]))


# ---------------------------------------------------------------------------------------------------- simulated arms

REPEATS = 4000


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_intervals_over_seeds_cover_at_their_nominal_rate(seeds):
    """Of the mean, of a paired difference whose arms share half their variance, and of Welch's with unequal spread."""
    shared = RNG.normal(0, 1, (REPEATS, seeds))
    ours, theirs = shared + RNG.normal(0.5, 1, shared.shape), shared + RNG.normal(0, 1, shared.shape)
    wild = RNG.normal(0, 3, shared.shape)
    calls = lambda i: t_interval(ours[i]), lambda i: paired(ours[i], theirs[i]), lambda i: welch(ours[i], wild[i])
    rates = [np.mean([covers(call(i), 0.5) for i in range(REPEATS // 4)]) for call in calls]
    assert rates[0] == pytest.approx(0.95, abs=0.025) and rates[1] == pytest.approx(0.95, abs=0.025)
    assert 0.93 < rates[2] <= 1  # Welch's is careful where a side has two seeds


def test_resampling_two_seeds_would_not_cover():
    """Why seeds are not bootstrapped: of two, the percentile interval covers half of the time."""
    draws = RNG.normal(0, 1, (400, 2))
    rate = np.mean([covers(bootstrap(pair, repeats=200), 0) for pair in draws])
    assert rate < 0.6


def test_the_family_wise_error_holds():
    """Six arms that do nothing against one baseline: at least one false find in at most 5 %, without Holm in more."""
    arms, base = RNG.normal(0, 1, (1000, 6, 4)), RNG.normal(0, 1, (1000, 4))
    raw = stats.ttest_rel(arms, base[:, None], axis=-1).pvalue
    assert raw[0].tolist() == pytest.approx([paired(arm, base[0]).p for arm in arms[0]])
    corrected = np.array([holm(row) for row in raw])
    assert (raw < 0.05).any(1).mean() > 0.1
    assert (corrected < 0.05).any(1).mean() < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 1000)


@pytest.mark.parametrize("seeds, effect", [(2, 12.0), (3, 2.5), (5, 1.5)])
def test_power_is_the_share_of_simulated_studies_that_see_it(seeds, effect):
    gaps = RNG.normal(effect, 1, (REPEATS, seeds))
    seen = np.mean(stats.ttest_1samp(gaps, 0, axis=1).pvalue < 0.05)
    assert power(effect, 1 / math.sqrt(seeds), seeds - 1) == pytest.approx(seen, abs=0.03)


def test_power_of_no_effect_is_the_level_and_grows_with_the_effect():
    assert power(0, 1, 3) == pytest.approx(0.05, abs=1e-4)
    assert power(3, 1, 5) == pytest.approx(stats.nct.sf(stats.t.ppf(0.975, 5), 5, 3), abs=1e-4)
    assert all(a < b for a, b in pairwise(power(x, 1, 3) for x in (0, 1, 2, 4)))


@pytest.mark.parametrize("bound", [-0.4, 0.0, 0.7])
def test_one_sided_tests_are_scipys(bound):
    a, b = RNG.normal(0.3, 1, 6), RNG.normal(0, 2, 6)
    for gap, test in ((paired(a, b), stats.ttest_rel), (welch(a, b), stats.ttest_ind)):
        more = {} if gap.paired else {"equal_var": False}
        above, below = (test(a, b + bound, alternative=side, **more).pvalue for side in ("greater", "less"))
        assert (gap.p_above(bound), gap.p_below(bound)) == pytest.approx((above, below))
    same = paired([1.0, 1.0], [0.5, 0.5])
    assert (same.p_below(0.6), same.p_below(0.5), same.p_below(0.4)) == (0.0, 1.0, 1.0)


@pytest.mark.parametrize("seeds, mean, margin", [(3, 0.0, 3.0), (5, 0.5, 2.0), (10, -0.5, 1.5)])
def test_power_of_a_bound_is_the_share_of_simulated_studies_that_bound(seeds, mean, margin):
    gaps = RNG.normal(mean, 1, (REPEATS, seeds))
    sides = [
        stats.ttest_1samp(gaps, m, axis=1, alternative=s).pvalue for m, s in ((-margin, "greater"), (margin, "less"))
    ]
    seen = np.mean(np.maximum(*sides) < 0.05)
    assert power_within(margin, mean, 1 / math.sqrt(seeds), seeds - 1) == pytest.approx(seen, abs=0.03)


@pytest.mark.parametrize("margin", [None, 2.0])
def test_the_seeds_that_are_needed_are_the_fewest(margin):
    gap = paired(*(np.array([1.5, 0.7, 1.2, 0.9]), np.array([0.0, 0.3, -0.4, 0.6])))
    spread, n = gap.error * 2, seeds_needed(gap, lambda seeds: 0.01, margin)
    here = [
        power(gap.mean, spread / math.sqrt(k), k - 1, 0.01)
        if margin is None
        else power_within(margin, gap.mean, spread / math.sqrt(k), k - 1, 0.01)
        for k in (n - 1, n)
    ]
    assert here[0] < 0.8 <= here[1] and 4 < n < 21
    assert seeds_needed(gap, lambda seeds: 0.01, margin=gap.mean / 2) == math.inf


def test_the_interquartile_mean_covers_where_it_gives_an_interval():
    for seeds in (5, 10):
        draws = RNG.normal([0.0, 2.0], 1, (200, seeds, 2))
        rate = np.mean([covers(interquartile_mean(d.T, repeats=1000), 1) for d in draws])
        assert 0.91 < rate <= 1, seeds


@pytest.mark.parametrize("truth, seeds", [(0.5, 2), (0.5, 5), (0.76, 3), (0.76, 10), (0.98, 5)])
def test_the_probability_of_improvement_covers(truth, seeds):
    """Normal runs: P(X > Y) = Phi(shift / sqrt 2)."""
    shift = math.sqrt(2) * stats.norm.ppf(truth)
    draws = RNG.normal([[shift], [0.0]], 1, (500, 2, seeds))
    rate = np.mean([covers(improvement([a], [b]), truth) for a, b in draws])
    assert rate > 0.92


# ---------------------------------------------------------------------------------------------------- rliable


def test_the_interquartile_mean_drops_the_outer_quarters():
    assert interquartile_mean([[0, 1, 2, 3, 100]]).mean == pytest.approx(2)
    assert interquartile_mean([[1, 3]]).mean == pytest.approx(2)
    assert not interquartile_mean([[0.0] * FEWEST, [1.0] * (FEWEST - 1)]).known
    assert interquartile_mean([[0, 1, 2, 3, 100]]).known


def test_seeds_are_resampled_within_their_task():
    """A gap between tasks is no spread: however far apart, each task keeps its number of runs."""
    runs = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]
    near, far = (interquartile_mean([runs, [r + shift for r in runs]]) for shift in (0, 9))
    assert far.high - far.low < 1.5 * (near.high - near.low)


@pytest.mark.parametrize(
    "ours, theirs, wanted",
    [((1, 2), (3, 4), 0), ((3, 4), (1, 2), 1), ((1, 2), (1, 2), 0.5), ((1, 4), (2, 3), 0.5), ((2,), (1, 3, 1), 2 / 3)],
)
def test_probability_of_improvement_counts_pairs(ours, theirs, wanted):
    better = improvement([ours], [theirs])
    assert better.mean == pytest.approx(wanted) and 0 <= better.low < better.high <= 1
    assert covers(better, wanted) and covers(better, 0.5) == (len(ours) + len(theirs) < 8)
    other = improvement([theirs], [ours])
    assert (other.low, other.high) == pytest.approx((1 - better.high, 1 - better.low), abs=1e-6)


def test_tasks_count_alike_whatever_their_runs():
    assert improvement([[0], [1, 1, 1]], [[1], [0, 0, 0]]).mean == 0.5


# ---------------------------------------------------------------------------------------------------- prompts


def test_bootstrap_of_a_runs_prompts():
    values = RNG.normal(0, 1, 200)
    interval = bootstrap(values)
    assert interval == bootstrap(values) and interval.mean == pytest.approx(values.mean())
    assert (interval.low, interval.high) == pytest.approx(tuple(t_interval(values).__dict__.values())[1:], abs=0.03)
    assert bootstrap(values, statistic=np.median).mean == np.median(values)
    assert bootstrap(np.full(5, 2.0)) == Interval(2, 2, 2)


# ---------------------------------------------------------------------------------------------------- tables of runs


def test_a_difference_is_paired_by_seed():
    """What seeds have in common cancels; prompts are averaged first."""
    theirs = [pd.DataFrame({"gold": RNG.normal(shift, 5, 40), "kl": 0.0}) for shift in (0, 9, -9)]
    ours = [table + 0.5 for table in theirs]
    gap = difference(ours, theirs)
    assert isinstance(gap, Difference) and gap.paired and gap.seeds == 3
    assert (gap.mean, gap.low, gap.high) == pytest.approx((0.5, 0.5, 0.5))
    assert difference(theirs, ours).mean == pytest.approx(-0.5) and difference(ours, theirs, "kl").mean == 0.5
    for others in (theirs[:2], [table[1:] for table in theirs]):
        with pytest.raises(InputError, match="judge both arms alike"):
            difference(ours, others)


def test_tables_of_arms_are_over_seeds():
    tables = [pd.DataFrame({"gold": [g, g + 2], "proxy": 0.0, "kl": 1.0, "win": 0.5}) for g in (0.0, 1.0)]
    means = summarise({"a": tables, "b": tables[:1]}, "gold")
    assert means["a"] == t_interval([1.0, 2.0]) and means["b"].mean == 1 and not means["b"].known
    assert arm_table({"a": tables, "b": tables[:1]})["gold (log-odds)"].tolist() == [str(means["a"]), str(means["b"])]
