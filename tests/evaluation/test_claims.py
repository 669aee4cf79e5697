"""The claims: which arms a study compares for each, what it may not ask, and that pages say what was found."""

import math
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd
import pytest
import recompute_verdicts
from planted import ARMS, Planted, Study

from dense_rlhf.evaluation import claims as ask
from dense_rlhf.evaluation.claims import IDENTITY, NOT_ASKED, judge
from dense_rlhf.evaluation.findings import findings
from dense_rlhf.evaluation.results import CONTROL, Arm, Finding, Search
from dense_rlhf.evaluation.rule import CONTRADICTED, NO_DIFFERENCE, RULE, SUPPORTED, UNDECIDED
from dense_rlhf.evaluation.words import EQUAL_KL, UPDATES, signed
from dense_rlhf.report.comparison import claims_html, verdict
from dense_rlhf.runs import finished_runs
from dense_rlhf.statistics import Interval, paired

NOTHING = Interval(0.0, -math.inf, math.inf)
KINDS = {"sparse": "sparse", "uniform": "control", "random": "control", "shuffled": "control"}
SOURCES = {name: (name,) for name in ("uniform", "random", "shuffled")} | {"sparse": ("terminal",)}
SOURCES |= {"bo": ("shap", "lime", "attention", "terminal")}


@dataclass(frozen=True, eq=False)
class Made(Finding):
    """A finding whose values by seed are given: yardstick -> arm -> seeds; the value loss alike at both yardsticks."""

    values: dict = field(default_factory=dict)
    levels = (1.0,)

    def compare(self, ours, theirs, column="gold"):
        return self._less(UPDATES, ours, theirs)

    def compare_late(self, ours, theirs, column, scale=float):
        return self._less("loss", ours, theirs, scale)

    def compare_at_kl(self, ours, theirs, column="gold", level=None, scale=float):
        return self._less(EQUAL_KL if column == "gold" else "loss", ours, theirs, scale)

    def late(self, arm, column):
        return dict(enumerate(self.values["critic"])) if "critic" in self.values else {}

    def at(self, arm, level):
        return pd.DataFrame()

    def _less(self, yardstick, ours, theirs, scale=float):
        both = [self.values[yardstick].get(arm) for arm in (ours, theirs)]
        return None if both[0] is None or both[1] is None else paired(*([scale(v) for v in side] for side in both))


def made(updates, at_kl=None, loss=None, searches=None, **more):
    """Arms with values by seed; `searches` are those of arms that learned their weights."""
    seeds, arms = tuple(range(len(next(iter(updates.values()))))), {}
    for name, by_seed in updates.items():
        gold, sources = replace(NOTHING, mean=float(np.mean(by_seed))), SOURCES.get(name, ("shap", "terminal"))
        how = "signed" if name in ("shap-signed", "shuffled") else "softmax"
        search = (searches or {}).get(name)
        arms[name] = Arm(
            name, KINDS.get(name, "dense"), seeds, gold, NOTHING, search=search, sources=sources, normalise=how
        )
    values = {UPDATES: updates, EQUAL_KL: updates if at_kl is None else at_kl, "loss": loss or {}}
    values |= {"critic": more.pop("critic")} if "critic" in more else {}
    given = {"baseline": "sparse", "settings": {}, "shaping": {}} | more
    judged = {name: dict.fromkeys(seeds) for name in updates}
    return Made("reviews", prompts=300, table="test", judged=judged, history=None, arms=arms, values=values, **given)


def search(trials=25, number=5, strategy="gp", **more):
    return Search(number, trials, strategy, 60.0, **more)


def claim_on(finding, key="1b", where=UPDATES):
    return next(claim for claim in judge(finding) if claim.key == key and claim.where in (where, ""))


def about(mean, seeds=5, sd=0.02):
    """Values of seeds around a mean: the same deviations in another order for every mean."""
    return list(mean + sd * np.random.default_rng([int(100 * mean) + 1000, seeds]).normal(size=seeds))


BASE = {"sparse": about(0.0), "uniform": about(0.05)}


def test_each_claim_is_asked_at_equal_updates_and_at_equal_kl():
    """Faster, and no better at equal KL: the likeliest truth has two verdicts."""
    finding = made(BASE | {"shap": about(1.0)}, at_kl=BASE | {"shap": about(0.04)})
    assert claim_on(finding).verdict == SUPPORTED
    there = claim_on(finding, where=EQUAL_KL)
    assert there.verdict == NO_DIFFERENCE and "margin 0.1" in there.why and "at 1.0 nats" in there.why


def test_signed_credit_has_to_beat_the_shuffled():
    golds = BASE | {"shap-signed": about(1.0)}
    alone = claim_on(made(golds))
    assert alone.verdict == UNDECIDED and "Not compared with shuffled" in alone.why
    assert claim_on(made(golds | {"shuffled": about(0.0)})).verdict == SUPPORTED
    placebo = claim_on(made(golds | {"shuffled": about(1.0)}))
    assert placebo.verdict == NO_DIFFERENCE and "least over shuffled: gold" in placebo.why


@pytest.mark.parametrize(
    "loss, wanted, part",
    [
        ({"shap": 0.2}, SUPPORTED, "value loss ×0.19"),
        ({"shap": 0.2, "uniform": 0.2}, NO_DIFFERENCE, "least over uniform"),
        ({"shap": 3.0}, CONTRADICTED, "×3"),
        ({"shap": 1.0}, NO_DIFFERENCE, "margin 10%"),
    ],
)
def test_the_value_loss_is_compared_as_a_ratio(loss, wanted, part):
    losses = {name: about(mean) for name, mean in ({"sparse": 1.0, "uniform": 1.0} | loss).items()}
    claim = claim_on(made(BASE | {"shap": about(0.0)}, loss=losses), "1a")
    assert claim.verdict == wanted and part in claim.why


def test_learned_weights_meet_the_fixed_ones_and_the_random_search_that_they_could_have_had():
    golds = BASE | {"shap": about(1.0), "shap-signed": about(9.0), "bo-shap": about(2.0), "drawn": about(1.5)}
    by = {"bo-shap": search(), "drawn": search(strategy="random")}
    (case,) = claim_on(made(golds, searches=by), "2").cases
    assert [c.rival for c in case.comparisons] == ["shap", "sparse", "uniform", "drawn"] and case.verdict == SUPPORTED
    assert [c.rival for c in case.comparisons if c.is_control] == ["uniform", "drawn"]
    by["drawn"] = search(9, strategy="random")  # not at equal trials
    assert "drawn" not in [c.rival for c in claim_on(made(golds, searches=by), "2").cases[0].comparisons]
    assert claim_on(made(golds | {"shap": about(3.0)}, searches={"bo-shap": search()}), "2").verdict == CONTRADICTED
    assert claim_on(made(golds), "2").verdict == NOT_ASKED
    alone = claim_on(made(BASE | {"bo-shap": about(2.0)}, searches={"bo-shap": search()}), "2")
    assert (
        alone.verdict == NOT_ASKED and "fixed, dense weights" in alone.why
    )  # it beats the sparse arm, as claim 1 says


def test_one_search_speaks_of_these_weights_only():
    golds = BASE | {"shap": about(1.0), "bo-shap": about(2.0)}
    texts = [claim_on(made(golds, searches={"bo-shap": search(number=n)}), "2").text for n in (1, 5)]
    assert texts[0].startswith("These weights, from one search") and texts[1].startswith("Learned weights")


@pytest.mark.parametrize(
    "trials, number, wanted, part",
    [
        (25, 5, SUPPORTED, "bo less bo-shap"),
        (25, 1, UNDECIDED, "Not decided: bo, bo-shap have not one search for each seed"),
        (8, 5, NOT_ASKED, "No search over 4 or more sources"),
    ],
)
def test_four_sources_are_a_question_of_searches(trials, number, wanted, part):
    by = dict.fromkeys(("bo", "bo-shap"), search(trials, number))
    claim = claim_on(made(BASE | {"bo": about(0.5), "bo-shap": about(2.0)}, searches=by), "3")
    assert claim.verdict == wanted and part in claim.why


def test_attention_meets_its_own_placebo():
    golds = BASE | {"attention": about(0.3), "placebo": about(0.3)}
    finding = made(golds)
    assert claim_on(finding, "5").verdict == NOT_ASKED
    for name, kind, sources in (("attention", "dense", ("attention",)), ("placebo", CONTROL, ("shuffled_attention",))):
        finding.arms[name] = replace(finding.arms[name], kind=kind, sources=sources)
    judge.cache_clear()
    claim = claim_on(finding, "5")
    assert claim.verdict == NO_DIFFERENCE and [c.rival for c in claim.cases[0].comparisons] == ["placebo"]


@pytest.mark.parametrize(
    "lam, critic, shap, wanted",
    [
        (1.0, 0.8, 0.0, SUPPORTED),
        (1.0, 0.8, 1.0, CONTRADICTED),
        (1.0, 0.8, -1.0, SUPPORTED),  # nor does it gain where it is worse
        (0.95, 0.8, 0.0, NOT_ASKED),
        (1.0, 0.2, 0.0, NOT_ASKED),
    ],
)
def test_what_is_left_to_gain_is_asked_at_lambda_one_with_a_good_critic(lam, critic, shap, wanted):
    settings = {name: {seed: {"ppo_lam": lam} for seed in range(5)} for name in ("sparse", "shap")}
    finding = made(BASE | {"shap": about(shap)}, settings=settings, critic=[critic] * 5)
    assert claim_on(finding, "6").verdict == wanted


def test_the_fourth_claim_is_enumerated():
    """An identity without a verdict; what learning settles on; gamma below 1."""
    bare = [claim_on(made(BASE), key) for key in ("4a", "4b", "4c")]
    assert [c.verdict for c in bare] == [IDENTITY, NOT_ASKED, NOT_ASKED]
    none, lost = ({"lost": x, "share": y, "games": 40} for x, y in ((0.0, 0.0), (0.017, 0.15)))
    shaping = {
        "settles": {"sparse": none, "uniform": none, "Shapley": lost},
        "discounted": {"sparse": none, "prefix": none},
    }
    finding = made(BASE, shaping=shaping | {"gamma": 0.8})
    b, c = (claim_on(finding, key) for key in ("4b", "4c"))
    assert b.verdict == CONTRADICTED and "Shapley 0.017 (in 15% of games). None lost by uniform" in b.why
    assert c.verdict == SUPPORTED and c.text.endswith("at gamma 0.8") and not b.cases + c.cases


def test_an_arm_that_is_another_is_asked_once():
    finding = made(BASE | {"shap": about(1.0), "bo-shap": about(1.0)}, searches={"bo-shap": search()})
    finding.arms["bo-shap"] = replace(finding.arms["bo-shap"], same_as="shap")
    assert [case.arm for case in claim_on(finding).cases] == ["shap"]
    assert claim_on(finding, "2").verdict == NO_DIFFERENCE


def test_a_study_whose_only_dense_arm_turned_out_sparse_says_so():
    finding = made(BASE | {"bo-shap": BASE["sparse"]}, searches={"bo-shap": search()})
    finding.arms["bo-shap"] = replace(finding.arms["bo-shap"], same_as="sparse")
    assert claim_on(finding).verdict == NOT_ASKED
    assert "bo-shap is sparse: its search put all weight there" in verdict(finding).line


def test_without_a_sparse_arm_nothing_is_compared():
    finding = made({"reference": about(0.0), "shap": about(2.0)}, baseline="reference")
    assert claim_on(finding).verdict == NOT_ASKED and not claim_on(finding).cases
    assert "No sparse arm" in verdict(finding).line


def test_one_seed_decides_nothing_and_two_say_how_many_would():
    one = made({"sparse": [0.0], "shap": [1.0]})
    assert claim_on(one).why == "One seed has no interval."
    two = claim_on(made({"sparse": [0.0, 0.1], "shap": [1.0, 1.3]}))
    assert two.verdict == UNDECIDED and "3 seeds would show a difference (chance 0.8)" in two.why


# ---------------------------------------------------------------------------------------------------- whole studies

LEARNED = {"params": {"bo_trials": 8, "bo_strategy": "gp", "bo_updates": 12}}
LEARNED["metrics"] = {"sources": ["shap", "terminal"], "weights": [1.0, 0.0], "ess": {"shap": 0.97}, "winner": True}


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """Signed SHAP walks three times as far along the same frontier; learned weights are SHAP's; sparse went on."""
    bo = replace(ARMS["shap"], sources=("shap", "terminal"), weights=(1.0, 0.0), same="shap", search=LEARNED)
    folder = tmp_path_factory.mktemp("planted") / "s"
    return Study(folder, ARMS | {"bo-shap": bo}, longer=dict.fromkeys(("sparse", "uniform", "shuffled"), 90)).write()


@pytest.fixture(scope="module")
def finding(planted):
    (made,) = findings(finished_runs(planted.folder), list(planted.arms))
    return made


def test_a_planted_truth_is_told(finding):
    """The study's likeliest truth: faster, and no better at equal KL, at what cost, and what no arm did."""
    told = verdict(finding)
    assert told.answer == "yes" and told.line.startswith("shap-signed reaches gold +0.2")
    assert "over sparse after equal updates, at 6.7 nats of KL against 2.0; at equal KL no difference that" in told.line
    assert "at 1.9 nats, " in told.line and "at 6.4 nats, margin 0.1)" in told.line
    assert told.grounds["Over the nearest control"].startswith("+0.2")
    assert "To 6.4 nats: shap-signed 24 updates, 60 s; sparse 78 updates, 3 min." in told.grounds["Cost"]
    assert told.grounds["What no arm is shown to do"] == "To end above sparse and every control at equal KL."
    assert "bo-shap is shap" in told.grounds["The same under two names"]
    assert "at ESS/T 0.97 is an even spread" in told.grounds["The same under two names"]
    sure = told.grounds["How sure"]
    assert "Lambda 0.95. All seeds" in sure
    assert (
        "share the reward model, the search for weights: no interval covers another draw" in sure and "5 seeds" in sure
    )


def test_the_claims_of_a_planted_truth(finding):
    verdicts = {(c.key, c.where): c.verdict for c in judge(finding)}
    assert verdicts["1b", UPDATES] == SUPPORTED and verdicts["1b", EQUAL_KL] == NO_DIFFERENCE
    assert verdicts["2", UPDATES] == verdicts["2", EQUAL_KL] == NO_DIFFERENCE
    assert verdicts["1a", UPDATES] == SUPPORTED and verdicts["3", ""] == NOT_ASKED
    rank = finding.rank_after(12)
    assert rank.mean > 0.3 and f"proxy after 12 updates, where a trial ends, with gold at the end: {rank}" in next(
        c.why for c in judge(finding) if c.key == "2"
    )
    late = next(c.why for c in judge(finding) if c.key == "1a")
    assert "Explained variance of returns-to-go, late in training: shap-signed 0.7" in late


def test_verdicts_can_be_computed_again_with_scipy_alone(planted, finding):
    again = recompute_verdicts.verdicts(planted.folder)
    assert again == {(c.key, c.where): c.verdict for c in judge(finding) if c.cases} and len(again) == 6


def test_other_studies_are_computed_again_too(tmp_path):
    """Without pairs and longer trainings, at lambda 1, with several searches and a placebo that is as good."""
    four = Planted(("shap", "lime", "attention", "terminal"), (0.25,) * 4, kl=2.0, edge=-0.3, searches=3)
    two = Planted(("shap", "terminal"), (0.5, 0.5), kl=2.5, searches=3)
    more = {"params": {"bo_trials": 25}, "metrics": {}}
    arms = ARMS | {"bo": replace(four, search=more), "bo-shap": replace(two, search=more)}
    arms |= {name: Planted((name,), edge=edge) for name, edge in (("attention", 0.3), ("shuffled_attention", 0.0))}
    arms["shuffled"] = replace(ARMS["shuffled"], kl=6.6)
    arms["sparse"] = replace(ARMS["sparse"], loss=0.3)
    study = Study(tmp_path / "s", arms, (0, 1, 2), params={"ppo_lam": 1.0, "evaluation_margin": 0.2}).write()
    (tmp_path / "s" / "04_ppo-shap-seed0" / "params.yaml").write_text("shape_sources: [shap]\nppo_rollouts: 9")
    (made,) = findings(finished_runs(study.folder), list(arms))
    ours = {(c.key, c.where): c.verdict for c in judge(made) if c.cases}
    assert recompute_verdicts.verdicts(study.folder) == ours
    assert {key for key, _ in ours} == {"1a", "1b", "2", "3", "5", "6"} and len(set(ours.values())) > 1
    assert made.arms["shuffled_attention"].kind == CONTROL
    assert not made.compare("shap", "sparse").paired and made.margin == 0.2


# ---------------------------------------------------------------------------------------------------- the page


def test_every_comparison_stands_in_the_table_controls_marked():
    listed = pd.DataFrame(ask.rows(judge(made(BASE | {"shap": about(2.0), "lime": about(0.0)}))), columns=ask.HEAD)
    updates = listed[(listed["claim"] == "1b") & (listed["at"] == UPDATES)]
    assert updates["less"].tolist() == ["sparse", "uniform (control)"] * 2
    first = updates.iloc[0]
    assert first["verdict"] == SUPPORTED and first["seeds"] == "5 paired" and first["difference"].startswith("+")


def test_the_page_states_the_rule_and_the_numbers():
    finding = made(BASE | {"shap": about(2.0)})
    html = claims_html(finding)
    assert RULE[:60] in html and "300 held-out prompts each: test prompts" in html
    assert signed(finding.compare("shap", "sparse")) in html and "uniform (control)" in html


@pytest.mark.parametrize(
    "shap, answer, part",
    [
        (about(2.0), "yes", "shap reaches gold +1.99"),
        (about(-2.0), "no", "it is worse"),
        (about(0.02), "no", "no difference that matters"),
        (about(0.15, sd=0.2), "unclear", "undecided"),
        ([2.0], "unclear", "one seed says nothing about other seeds"),
    ],
)
def test_the_answer_is_the_claims(shap, answer, part):
    finding = made({name: values[: len(shap)] for name, values in BASE.items()} | {"shap": shap})
    finding.arms["shap"] = replace(finding.arms["shap"], gain=finding.compare("shap", "sparse"))
    decided = verdict(finding)
    assert decided.answer == answer and part in decided.line
    assert {claim["key"] for claim in decided.claims} == {"1a", "1b", "2", "3", "4a", "4b", "4c", "5", "6"}
    assert f"{len(shap)} seed" in decided.grounds["How sure"]
