"""Which arm `RESULTS.md` quotes for a verdict."""

import pytest

from dense_rlhf.evaluation.rule import CONTRADICTED, NO_DIFFERENCE, SUPPORTED, UNDECIDED, Case, Comparison
from dense_rlhf.report.results_claims import _quoted, few
from dense_rlhf.statistics import paired


def case(arm, by, verdict, p=0.5, wanted=1):
    """An arm that differs from sparse by so much on the mean of three seeds."""
    difference = paired([by - 0.1, by, by + 0.1], [0.0, 0.0, 0.0])
    return Case(arm, (Comparison("sparse", False, "gold", None, difference),), wanted, 0.1, p, p, verdict=verdict)


@pytest.mark.parametrize("wanted", [1, -1])
@pytest.mark.parametrize("verdict, arm", [(SUPPORTED, "most"), (NO_DIFFERENCE, "most"), (CONTRADICTED, "least")])
def test_the_arm_that_differs_most_in_the_direction_of_the_verdict_is_quoted(verdict, arm, wanted):
    cases = [case(name, wanted * by, verdict, p, wanted) for name, by, p in (("least", -0.3, 0.1), ("most", 0.4, 0.2))]
    assert _quoted(cases).arm == _quoted(cases[::-1]).arm == arm


def test_what_is_undecided_quotes_an_undecided_arm_the_nearest_to_an_answer():
    worse = case("worse", -0.5, CONTRADICTED, p=0.001)
    near, far = case("near", 0.1, UNDECIDED, p=0.06), case("far", 0.9, UNDECIDED, p=0.6)
    assert _quoted([worse, far, near]).arm == "near"
    assert _quoted([worse, case("good", 0.2, SUPPORTED), near]).arm == "good"


def test_one_seed_quotes_nothing():
    alone = Comparison("sparse", False, "gold", None, paired([0.1], [0.0]))
    assert _quoted([Case("shap", (alone,), 1, 0.1)]) is None and _quoted([]) is None


def test_a_long_list_is_cut_and_counted():
    assert few(["a", "b", "c"]) == "a, b, c" and few(["a", "b", "c", "d", "e"]) == "a, b, c and 2 more"
