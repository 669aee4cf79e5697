"""The rule: what it says of made-up differences, and how often whole studies err and decide, by simulation."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from dense_rlhf.evaluation import rule
from dense_rlhf.evaluation.rule import CONTRADICTED, NO_DIFFERENCE, SUPPORTED, UNDECIDED, Case, Comparison, decide
from dense_rlhf.statistics import ALPHA, Difference, paired

MARGIN = 0.1
SD, SHARED = 0.08, 0.5  # of gold over seeds, and the share of its variance that arms of a seed have in common
STUDIES = 200
DENSE, CONTROLS = ("shap", "shap-signed", "lime", "prefix-signed"), ("uniform", "random", "shuffled")
PLACES = {"1a": ("loss",), "1b": ("updates",), "1b at KL": ("low", "far")}  # question: where it is asked


def about(mean, sd=0.02, seeds=5):
    """Values of seeds with this mean and spread, exactly."""
    values = np.random.default_rng([seeds, int(1000 * (mean + 10))]).normal(size=seeds)
    return mean + sd * (values - values.mean()) / values.std(ddof=1)


def case(rivals, controls=(), wanted=1, ours=None):
    """An arm with values around 0, less rivals and controls with values around those given."""
    ours = about(0.0) if ours is None else ours
    pairs = [(f"r{i}", False, m) for i, m in enumerate(rivals)] + [(f"c{i}", True, m) for i, m in enumerate(controls)]
    known = {name: None if mean is None else paired(ours, about(mean)) for name, _, mean in pairs}
    return Case("a", tuple(Comparison(n, is_c, "gold", None, known[n]) for n, is_c, _ in pairs), wanted, MARGIN)


@pytest.mark.parametrize(
    "rivals, controls, wanted, verdict",
    [
        ([-0.3], [], 1, SUPPORTED),
        ([-0.3], [-0.3, -0.4], 1, SUPPORTED),
        ([-0.3], [-0.3, None], 1, UNDECIDED),  # a control that the study lacks
        ([-0.3], [-0.3, 0.3], 1, NO_DIFFERENCE),  # better than sparse, and a control is better still
        ([-0.3], [-0.3, 0.0], 1, NO_DIFFERENCE),  # from a control, which will do
        ([-0.3], [], -1, CONTRADICTED),
        ([0.3], [-0.3], 1, CONTRADICTED),  # that needs no control
        ([0.3, -0.3], [], 1, CONTRADICTED),  # and one rival is enough
        ([0.0], [], 1, NO_DIFFERENCE),
        ([0.0], [0.5], 1, NO_DIFFERENCE),  # a control that is better makes it no better
        ([0.0, -0.5], [], 1, NO_DIFFERENCE),  # from the best of its rivals
        ([0.04], [], 1, NO_DIFFERENCE),  # significant, and does not matter
        ([0.1], [], 1, CONTRADICTED),
        ([None], [], 1, UNDECIDED),
    ],
)
def test_four_verdicts(rivals, controls, wanted, verdict):
    assert decide([case(rivals, controls, wanted)], 5)[0].verdict == verdict


@pytest.mark.parametrize(
    "verdicts, wanted",
    [
        ([SUPPORTED, UNDECIDED, CONTRADICTED], SUPPORTED),  # that some arm does as the claim says
        ([CONTRADICTED, UNDECIDED], UNDECIDED),
        ([CONTRADICTED, NO_DIFFERENCE], CONTRADICTED),
        ([NO_DIFFERENCE, NO_DIFFERENCE], NO_DIFFERENCE),
        ([NO_DIFFERENCE, UNDECIDED], UNDECIDED),
        ([], UNDECIDED),
    ],
)
def test_a_claim_is_that_some_arm_does(verdicts, wanted):
    assert rule.overall(verdicts) == wanted


def test_one_seed_decides_nothing_and_is_no_test():
    one = case([-0.3], ours=about(0.0))
    single = Case("b", (Comparison("r", False, "gold", None, paired([1.0], [0.0])),), 1, MARGIN)
    first, second = decide([one, single], 5)
    assert (second.verdict, second.p_differs, first.tests) == (UNDECIDED, 1.0, 1)


def test_two_looks_share_the_level():
    assert rule.level(9) + rule.level(10) == pytest.approx(ALPHA) and rule.level(5) == rule.level(9) > rule.level(50)
    weak = case([-0.3], ours=about(0.0, 0.17))  # its p is between the two levels
    assert rule.level(10) < weak.differs < rule.level(5)
    assert [decide([weak], seeds)[0].verdict for seeds in (5, 10)] == [SUPPORTED, UNDECIDED]


@given(st.floats(-0.5, 0.5), st.integers(3, 30))
def test_the_three_answers_of_a_case_exclude_each_other(mean, seeds):
    """At any level: not up and down at once; and equal only where the interval of 1 - 2 alpha is within the margin."""
    one = Case(
        "a", (Comparison("r", False, "gold", None, paired(about(0, seeds=seeds), about(mean, 0.1, seeds))),), 1, 0.1
    )
    assert max(one.supports, one.opposes) == 1.0
    difference = one.comparisons[0].difference
    assert one.equals == pytest.approx(max(difference.p_above(-0.1), difference.p_below(0.1)))


def test_seeds_that_would_decide_do():
    """Of a difference as large as seen, and of one that is bounded; none where the measured one is neither."""
    (apart,), (alike,) = decide([case([-0.3], ours=about(0.0, 0.3))], 5), decide([case([0.0], ours=about(0.0, 0.2))], 5)
    assert apart.verdict == alike.verdict == UNDECIDED
    differ, same = apart.seeds_to_decide()
    assert 5 < differ < 40 and same == math.inf
    differ, same = alike.seeds_to_decide()
    assert differ == math.inf and 10 < same < 200
    rng, n = np.random.default_rng(0), int(same)
    simulated = [Case("a", (Comparison("r", False, "g", None, _drawn(rng, alike, n)),), 1, MARGIN) for _ in range(300)]
    assert np.mean([decide([one], n)[0].verdict == NO_DIFFERENCE for one in simulated]) > 0.72


def _drawn(rng, measured, seeds):
    """A difference with the measured spread, over other seeds."""
    spread = measured.comparisons[0].difference.error * math.sqrt(5)
    return paired(rng.normal(0, spread, seeds), np.zeros(seeds))


# ---------------------------------------------------------------------------------------------------- whole studies


def study(rng, gains, seeds, sd=SD):
    """Values of every arm by seed at four places: (place, arm) -> (S,); `gains` hold true values by place and arm."""
    values = {}
    for place in ("loss", "updates", "low", "far"):
        common = rng.normal(0, sd * math.sqrt(SHARED), seeds)
        for arm in ("sparse", *CONTROLS, *DENSE):
            own = rng.normal(0, sd * math.sqrt(1 - SHARED), seeds)
            values[place, arm] = gains.get(place, {}).get(arm, 0.0) + common + own
    return values


def differences(values, seeds):
    """`paired` of every arm less sparse and each control at once: (place, arm, rival) -> Difference."""
    pairs = [(p, arm, r) for p in ("loss", "updates", "low", "far") for arm in DENSE for r in ("sparse", *CONTROLS)]
    less = np.array([values[p, arm][:seeds] - values[p, r][:seeds] for p, arm, r in pairs])
    means, errors = less.mean(1), less.std(1, ddof=1) / math.sqrt(seeds)
    p = 2 * stats.t.sf(abs(means) / errors, seeds - 1)
    numbers = zip(means.tolist(), p.tolist(), errors.tolist())
    return {
        pair: Difference(m, -9, 9, q, e, seeds - 1, math.nan, seeds, True) for pair, (m, q, e) in zip(pairs, numbers)
    }


def verdicts(values, seeds):
    """By question and arm; 12 cases, each of one rival and three controls."""
    less, cases = differences(values, seeds), {}
    for question, places in PLACES.items():
        for arm in DENSE:
            known = [
                Comparison(r, r != "sparse", p, None, less[p, arm, r]) for r in ("sparse", *CONTROLS) for p in places
            ]
            cases[question, arm] = Case(arm, tuple(known), -1 if question == "1a" else 1, MARGIN)
    return dict(zip(cases, (one.verdict for one in decide(list(cases.values()), seeds))))


def everywhere(gain, arms):
    """The same advantage in every question; of the value loss, less is better."""
    return {
        place: dict.fromkeys(arms, -gain if place == "loss" else gain) for place in ("loss", "updates", "low", "far")
    }


def rate(scenario, wrong, sd=SD, looks=(5, 10), studies=STUDIES):
    """The share of simulated studies with a verdict of `wrong` at any look."""
    rng, count = np.random.default_rng(7), 0
    for _ in range(studies):
        values = study(rng, SCENARIOS[scenario], max(looks), sd)
        count += any(set(wrong) & set(verdicts(values, seeds).values()) for seeds in looks)
    return count / studies


SCENARIOS = {
    "nothing": {},
    "no better than a placebo": everywhere(0.3, ("shuffled", *DENSE)),
    "no better than sparse": everywhere(-0.3, CONTROLS),
    "by exactly the margin": everywhere(MARGIN, DENSE),
    "by exactly the margin, worse": everywhere(-MARGIN, DENSE),
    "twice the margin": {"updates": {"shap-signed": 2 * MARGIN}},
}
DECIDED = (SUPPORTED, CONTRADICTED)


def bound(studies=STUDIES):
    """What a true rate of 0.05 stays below in 99 of 100 simulations."""
    return 0.05 + 2.33 * math.sqrt(0.05 * 0.95 / studies)


@pytest.mark.parametrize("scenario", ["nothing", "no better than a placebo", "no better than sparse"])
def test_at_most_one_study_in_twenty_claims_a_difference_that_is_none(scenario):
    """Over all claims together, and over both looks of a study whose seeds were added to."""
    assert rate(scenario, DECIDED) <= bound()


@pytest.mark.parametrize("scenario", ["by exactly the margin", "by exactly the margin, worse"])
@pytest.mark.parametrize("sd", [0.02, SD])
def test_at_most_one_study_in_twenty_bounds_a_difference_of_the_margin(scenario, sd):
    assert rate(scenario, (NO_DIFFERENCE,), sd) <= bound()


def test_ten_seeds_decide_a_difference_of_twice_the_margin():
    rng, n = np.random.default_rng(3), 100
    made = [verdicts(study(rng, SCENARIOS["twice the margin"], 10), 10)["1b", "shap-signed"] for _ in range(n)]
    assert made.count(SUPPORTED) >= 0.8 * n


def test_the_simulation_would_see_a_rule_without_correction(monkeypatch):
    """So that the tests above can fail."""
    monkeypatch.setattr(rule, "holm", list)
    monkeypatch.setattr(rule, "level", lambda seeds: ALPHA)
    rng = np.random.default_rng(7)
    made = [verdicts(study(rng, SCENARIOS["by exactly the margin"], 5, 0.02), 5) for _ in range(100)]
    assert np.mean([NO_DIFFERENCE in one.values() for one in made]) > bound(100)


def test_the_rule_says_its_numbers():
    assert f"{rule.LEVELS[0]:g}" in rule.RULE and f"{rule.LEVELS[1]:g}" in rule.RULE and "Holm" in rule.RULE
