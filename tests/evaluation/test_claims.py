"""The verdicts: what the rule says of made-up differences, how often it errs, and that the page shows it."""

import math
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd
import pytest

from dense_rlhf.evaluation import claims as ask
from dense_rlhf.evaluation.claims import CONTRADICTED, EQUAL_KL, SUPPORTED, UNDECIDED, UPDATES, judge
from dense_rlhf.evaluation.findings import Arm, Finding
from dense_rlhf.report.comparison import claims_html, verdict
from dense_rlhf.statistics import Interval, paired

NOTHING = Interval(0.0, -math.inf, math.inf)
KINDS = {"sparse": "sparse", "uniform": "control", "random": "control"}
SOURCES = dict(sparse=("terminal",), uniform=("uniform",), random=("random",))
SOURCES["bo"] = ("shap", "lime", "attention", "terminal")


@dataclass(frozen=True, eq=False)
class Made(Finding):
    """A finding whose values by seed are given: yardstick -> arm -> seeds; the value loss alike at both yardsticks."""

    values: dict = field(default_factory=dict)

    def compare(self, ours, theirs, column="gold"):
        return self._less(UPDATES, ours, theirs)

    def compare_late(self, ours, theirs, column):
        return self._less("loss", ours, theirs)

    def compare_at_kl(self, ours, theirs, column="gold"):
        return self._less(EQUAL_KL if column == "gold" else "loss", ours, theirs)

    def _less(self, yardstick, ours, theirs):
        both = [self.values[yardstick].get(arm) for arm in (ours, theirs)]
        return None if both[0] is None or both[1] is None else paired(*both)


def made(updates, at_kl=None, loss=None, trials=None, baseline="sparse", shaping=None):
    """Arms with values by seed; `trials` are of arms that learned their weights."""
    seeds = tuple(range(len(next(iter(updates.values())))))
    arms = {}
    for name, by_seed in updates.items():
        gold, sources = replace(NOTHING, mean=float(np.mean(by_seed))), SOURCES.get(name, ("shap", "terminal"))
        fields = dict(trials=(trials or {}).get(name, 0), sources=sources, normalise="softmax")
        arms[name] = Arm(name, KINDS.get(name, "dense"), seeds, gold, NOTHING, **fields)
    values = {UPDATES: updates, EQUAL_KL: updates if at_kl is None else at_kl, "loss": loss or {}}
    return Made("reviews", baseline, 300, "test", {}, None, {}, shaping or {}, arms, values)


def claim_on(finding, key="1b"):
    return next(claim for claim in judge(finding) if claim.key == key)


def about(mean, seeds=5):
    """Values of seeds around a mean: the same deviations in another order for every mean."""
    return list(mean + 0.1 * np.random.default_rng([int(100 * mean) + 1000, seeds]).normal(size=seeds))


BASE = {"sparse": about(0.0), "uniform": about(0.05)}


@pytest.mark.parametrize(
    "updates, at_kl, wanted",
    [
        (BASE | {"shap": about(2.0)}, None, SUPPORTED),
        (BASE | {"shap": about(0.02)}, None, UNDECIDED),
        (BASE | {"shap": about(-2.0)}, None, CONTRADICTED),
        (BASE | {"shap": about(2.0), "lime": about(0.0)}, None, SUPPORTED),  # one arm will do
        (BASE | {"shap": about(2.0), "lime": about(-2.0)}, None, UNDECIDED),  # the arms disagree
        (BASE | {"shap": about(2.0), "uniform": about(2.0)}, None, UNDECIDED),  # so does what knows nothing of tokens
        (BASE | {"shap": about(2.0)}, BASE | {"shap": about(0.02)}, UNDECIDED),  # faster, not better at equal KL
        (BASE | {"shap": about(2.0)}, BASE | {"shap": about(-2.0)}, UNDECIDED),
        (BASE | {"shap": about(2.0)}, {}, UNDECIDED),  # no path of KL
        # contradicting needs no difference from the controls
        (BASE | {"shap": about(-2.0), "uniform": about(-2.0)}, None, CONTRADICTED),
    ],
)
def test_the_rule(updates, at_kl, wanted):
    assert claim_on(made(updates, at_kl)).verdict == wanted


@pytest.mark.parametrize("seeds, wanted", [(1, UNDECIDED), (2, UNDECIDED), (3, SUPPORTED)])
def test_few_seeds_decide_little(seeds, wanted):
    """An effect of ten standard deviations: two seeds leave it open."""
    runs = {"sparse": [0.0, 0.1, 0.05], "uniform": [0.1, 0.05, 0.12], "shap": [1.0, 1.3, 1.15]}
    found = made({name: values[:seeds] for name, values in runs.items()})
    claim = claim_on(found)
    assert claim.verdict == wanted
    if seeds == 1:
        assert claim.why == "One seed has no interval." and "one seed" in verdict(found).line
    if seeds == 2:
        assert "with power 0.8" in claim.why and "p " in claim.why


def test_two_seeds_can_decide_where_the_effect_dwarfs_their_spread():
    assert claim_on(made({"sparse": [0.0, 0.001], "shap": [2.0, 2.003]})).verdict == SUPPORTED


def test_a_lower_value_loss_supports_the_first_claim_unless_an_even_spread_has_it_too():
    golds = BASE | {"shap": about(0.0)}
    cut = {"sparse": about(1.0), "uniform": about(1.0), "shap": about(0.2)}
    assert claim_on(made(golds, loss=cut), "1a").verdict == SUPPORTED
    assert claim_on(made(golds, loss=cut | {"uniform": about(0.1)}), "1a").verdict == UNDECIDED
    assert claim_on(made(golds, loss=cut | {"shap": about(3.0)}), "1a").verdict == CONTRADICTED


def test_learned_weights_meet_the_fixed_ones_that_their_search_could_have_had():
    golds = BASE | {"shap": about(1.0), "bo-shap": about(2.0)}
    claim = claim_on(made(golds, trials={"bo-shap": 25}), "2")
    assert [c.rival for c in claim.cases[0].comparisons] == ["shap", "sparse", "uniform"] and claim.verdict == SUPPORTED
    assert claim_on(made(golds | {"shap": about(3.0)}, trials={"bo-shap": 25}), "2").verdict == CONTRADICTED
    none = claim_on(made(golds), "2")
    assert none.verdict == UNDECIDED and "no arm with learned weights" in none.why


def test_other_normalisations_are_no_rivals_of_learned_weights():
    found = made(BASE | {"shap-signed": about(3.0), "bo-shap": about(1.0)}, trials={"bo-shap": 8})
    found.arms["shap-signed"] = replace(found.arms["shap-signed"], normalise="signed")
    assert [c.rival for c in claim_on(found, "2").cases[0].comparisons] == ["sparse", "uniform"]


@pytest.mark.parametrize(
    "trials, wanted, part",
    [
        ({"bo": 25, "bo-shap": 25}, SUPPORTED, "bo less bo-shap in gold"),
        ({"bo": 8, "bo-shap": 8}, UNDECIDED, "Not asked in this study"),
        ({"bo": 25}, UNDECIDED, "Not asked in this study"),
    ],
)
def test_four_sources_are_asked_about_at_enough_trials(trials, wanted, part):
    claim = claim_on(made(BASE | {"bo": about(0.5), "bo-shap": about(2.0)}, trials=trials), "3")
    assert claim.verdict == wanted and part in claim.why


@pytest.mark.parametrize(
    "shaping, wanted",
    [
        ({}, UNDECIDED),
        ({"regret": {"Shapley": 0.2}}, CONTRADICTED),
        ({"regret": {"Shapley": 0.0, "uniform": 1e-15}}, SUPPORTED),
    ],
)
def test_an_identity_is_enumerated(shaping, wanted):
    claim = claim_on(made(BASE, shaping=shaping), "4")
    assert claim.verdict == wanted and not claim.cases


def test_without_a_sparse_arm_nothing_is_compared():
    found = made({"reference": about(0.0), "shap": about(2.0)}, baseline="reference")
    assert claim_on(found).verdict == UNDECIDED and not claim_on(found).cases


def test_p_is_the_largest_of_an_answer_and_corrected_over_all_answers():
    golds = BASE | {"shap": about(2.0), "lime": about(0.3), "owen": about(0.1)}
    cases = claim_on(made(golds)).cases
    raw = [case.raw_p for case in cases]
    worst = max(d.p for one in cases[0].comparisons for d in (one.updates, one.at_kl))
    assert raw[0] == worst and cases[0].tests == 3
    assert [case.p for case in cases] == pytest.approx(ask.holm(raw))


EFFECTS = {"none": (0, 0), "faster, but alike at equal KL": (30, 0), "better at both": (30, 30)}


@pytest.mark.parametrize("effect", EFFECTS)
def test_how_often_a_study_decides_and_errs(effect):
    """Three dense arms, two controls, four seeds; one arm has the effect. At most one study in twenty errs."""
    rng, gains, decided, n = np.random.default_rng(0), EFFECTS[effect], [], 60
    for _ in range(n):
        draws = {name: rng.normal(0, 1, (3, 4)) for name in ("sparse", "uniform", "random", "shap", "lime", "owen")}
        updates, at_kl, loss = ({name: drawn[i] for name, drawn in draws.items()} for i in range(3))
        for by, gain in zip((updates, at_kl), gains):
            by["shap"] = by["shap"] + gain
        found = made(updates, at_kl, loss)
        decided.append({claim.key: claim.verdict for claim in judge(found) if claim.key != "4"})
    wrong = sum(any(verdict != UNDECIDED for verdict in by.values()) for by in decided)
    if min(gains) > 0:
        assert sum(by["1b"] == SUPPORTED for by in decided) > 0.9 * n
    else:
        assert wrong <= 0.05 * n + 3 * math.sqrt(0.05 * 0.95 * n)


# ---------------------------------------------------------------------------------------------------- the page


def test_every_comparison_stands_in_the_table_controls_marked():
    listed = pd.DataFrame(ask.rows(judge(made(BASE | {"shap": about(2.0), "lime": about(0.0)}))), columns=ask.HEAD)
    assert listed[listed["claim"] == "1b"]["less"].tolist() == ["sparse", "uniform (control)"] * 2
    first = listed[listed["claim"] == "1b"].iloc[0]
    assert first["verdict"] == SUPPORTED and first["pairs"] == "paired" and first["seeds"] == "5"
    assert first[UPDATES].startswith("+") and "[" in first[EQUAL_KL] and float(first["p (Holm)"]) < 0.05


def test_the_page_states_the_rule_and_the_numbers():
    found = made(BASE | {"shap": about(2.0)})
    html = claims_html(found)
    assert "must be below 0.05" in html and "300 held-out prompts each: test prompts" in html
    assert ask.signed(found.compare("shap", "sparse")) in html and "uniform (control)" in html


@pytest.mark.parametrize(
    "shap, answer, part",
    [
        (about(2.0), "yes", "shap ended above sparse and every control"),
        (about(-2.0), "no", "shap ended below sparse"),
        (about(0.02), "unclear", "none of 1 dense arms"),
    ],
)
def test_the_answer_is_the_claims(shap, answer, part):
    found = made(BASE | {"shap": shap})
    found.arms["shap"] = replace(found.arms["shap"], gain=found.compare("shap", "sparse"))
    decided = verdict(found)
    assert decided.answer == answer and part in decided.line
    assert [claim["key"] for claim in decided.claims] == ["1a", "1b", "2", "3", "4"]
    assert "after Holm" in decided.grounds["How sure"] and "5 seeds" in decided.grounds["How sure"]


def test_a_search_that_chose_a_fixed_arm_says_so():
    runs = about(1.0)
    claim = claim_on(made(BASE | {"shap": runs, "bo-shap": runs}, trials={"bo-shap": 8}), "2")
    assert claim.verdict == UNDECIDED and "bo-shap and shap are the same in every seed" in claim.why
