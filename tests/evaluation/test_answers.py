"""Questions of ablations: decided by the rule of the claims, at equal updates and at equal KL."""

import numpy as np
import pandas as pd
import pytest

from dense_rlhf.evaluation.answers import answer_pairs, answers
from dense_rlhf.evaluation.arms import Arms
from dense_rlhf.evaluation.rule import CONTRADICTED, NO_DIFFERENCE, SUPPORTED, UNDECIDED
from dense_rlhf.statistics import paired, welch

LIFTS = {"sparse": 0.0, "placebo": 0.02, "twin": 0.0, "better": 0.6, "as good": 0.6, "worse": -0.5}
ASKED = {"better": (["sparse"], ["placebo"])}


def made(seeds=10, noise=0.02, lifts=LIFTS):
    """Arms whose gold at every update and in the end differs by a lift, all of them at one path of KL."""
    judged, rows = {"reference": [None] * seeds}, []
    for arm, lift in lifts.items():
        draws = np.random.default_rng(len(arm)).normal(lift, noise, (seeds, 13))
        judged[arm] = [pd.DataFrame({"gold": [draw[12]]}) for draw in draws]
        rows += [dict(arm=arm, seed=s, update=u, kl=u + 1.0, gold=draws[s, u]) for s in range(seeds) for u in range(12)]
    return Arms(judged, pd.DataFrame(rows), {})


def verdicts(*given, **about):
    return [row["verdict"] for row in answers("Is it better?", *given, made(**about), 0.1)]


def test_each_of_the_four_verdicts_is_reached():
    assert verdicts(ASKED) == [SUPPORTED] * 2
    assert verdicts({"worse": (["sparse"], ["placebo"])}) == [CONTRADICTED] * 2
    assert verdicts({"twin": (["sparse"], ["placebo"])}) == [NO_DIFFERENCE] * 2
    assert verdicts({"better": (["sparse"], ["as good"])}) == [NO_DIFFERENCE] * 2  # than its placebo
    assert verdicts({"twin": (["sparse"], [])}, seeds=3, noise=0.5) == verdicts(ASKED, seeds=1) == [UNDECIDED] * 2


def test_arms_that_a_seed_gives_other_prompts_are_no_pairs():
    """Two arms whose seeds are alike: pairs tell them apart, independent seeds do not."""
    arms, shift = made(), np.linspace(-1, 1, 10)
    for arm in ("sparse", "better"):
        arms.judged[arm] = [table + by for table, by in zip(arms.judged[arm], shift)]
    by_test = [answers("?", {"better": (["sparse"], [])}, arms, 0.1, test)[0]["verdict"] for test in (paired, welch)]
    assert by_test == [SUPPORTED, UNDECIDED]


def test_a_row_says_what_was_asked_where_and_why():
    at_updates, at_kl = answers("Is it better?", ASKED, made(), 0.1)
    assert (at_updates["question"], at_updates["at"], at_kl["at"]) == ("Is it better?", "equal updates", "equal KL")
    assert "better less sparse: gold +0.6" in at_updates["why"] and "10 seeds" in at_updates["why"]
    assert "nan" not in at_kl["why"]


def test_an_arm_that_is_its_rival_makes_no_difference():
    arms = made()
    arms.judged["sparse"] = arms.judged["twin"]
    assert answers("?", {"twin": (["sparse"], [])}, arms, 0.1)[0]["verdict"] == NO_DIFFERENCE


@pytest.mark.parametrize("twins, verdict", [((), SUPPORTED), (("a", "b", "c"), UNDECIDED)])
def test_the_tests_of_a_question_share_one_error_rate(twins, verdict):
    """With ten seeds, at a level of 0.01, a p of 0.003 decides where it is one of two tests, not where of eight."""
    arms = made(lifts={"sparse": 0.0, "better": 0.0} | dict.fromkeys(twins, 0.0))
    spread = np.linspace(-1, 1, 10) / np.std(np.linspace(-1, 1, 10), ddof=1)
    for arm, ends in {"sparse": 0 * spread, "better": 0.4 + 0.4 / 4 * 10**0.5 * spread}.items():  # t is 4
        arms.judged[arm] = [pd.DataFrame({"gold": [end]}) for end in ends]
    asked = {name: (["sparse"], []) for name in ("better", *twins)}
    assert answers("?", asked, arms, 0.01)[0]["verdict"] == verdict


@pytest.mark.parametrize(
    "more, noise, verdict",
    [(1.0, 0.1, SUPPORTED), (-1.0, 0.1, CONTRADICTED), (0.0, 0.1, NO_DIFFERENCE), (0.0, 2.0, UNDECIDED)],
)
def test_numbers_of_the_same_functions_are_compared_in_pairs(more, noise, verdict):
    rng = np.random.default_rng(0)
    theirs = rng.normal(0, 5, 12)
    row = answer_pairs("Is it more?", "25 trials", theirs + rng.normal(more, noise, 12), theirs, 0.25)
    assert row["verdict"] == verdict and row["at"] == "25 trials" and "12 functions" in row["why"]
