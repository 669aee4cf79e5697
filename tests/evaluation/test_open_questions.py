"""What a study answers: gains of one setting against those of another, of one arm against another."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import planted
import pytest

from dense_rlhf.config.study import load_study
from dense_rlhf.evaluation.claims import judge
from dense_rlhf.evaluation.findings import findings
from dense_rlhf.evaluation.open_questions import OPEN, answers
from dense_rlhf.evaluation.rule import CONTRADICTED, SUPPORTED
from dense_rlhf.runs import finished_runs

SEEDS = range(10)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """One setting: sparse and uniform rewards, and SHAP's, which gain nothing over them at one KL."""
    folder = tmp_path_factory.mktemp("open") / "runs" / "length"
    arms = {name: planted.ARMS[name] for name in ("sparse", "uniform", "shap")}
    planted.Study(folder, arms, tuple(SEEDS)).write()
    return findings(finished_runs(folder), list(arms))[0]


def lifted(base, dataset, **lifts):
    """The same study in another setting, with arms that have so much more gold, everywhere and with every seed."""
    noise = {arm: np.random.default_rng(len(arm)).normal(0, 0.02, len(SEEDS)) for arm in lifts}
    more = {arm: {seed: by + noise[arm][seed] for seed in SEEDS} for arm, by in lifts.items()}
    judged = {
        arm: {s: t.assign(gold=t["gold"] + more.get(arm, {}).get(s, 0)) for s, t in by_seed.items()}
        for arm, by_seed in base.judged.items()
    }
    added = [more.get(arm, {}).get(seed, 0) for arm, seed in zip(base.history["arm"], base.history["seed"])]
    history = base.history.assign(gold=base.history["gold"] + added)
    return replace(base, dataset=dataset, judged=judged, history=history)


@pytest.mark.parametrize("by, verdict", [(0.7, SUPPORTED), (-0.7, CONTRADICTED)])
def test_a_gain_that_grows_with_length_supports_the_question(base, by, verdict):
    short, long = lifted(base, "reviews-tokens-12", shap=0.2), lifted(base, "reviews-tokens-48", shap=0.2 + by)
    rows = answers("length", [short, lifted(base, "reviews-tokens-24", shap=9), long])
    assert [(claim.where, claim.verdict) for _, claim in rows] == [("equal updates", verdict), ("equal KL", verdict)]
    assert all(f"shap less sparse: gold {by:+.2f} [" in claim.why for _, claim in rows)  # no noise is its own
    assert all(dataset == "reviews-tokens-48" for dataset, _ in rows)
    assert "nats" in rows[1][1].why and "nats" not in rows[0][1].why


def test_what_a_control_gains_as_well_is_not_counted(base):
    short, long = lifted(base, "reviews-tokens-12"), lifted(base, "reviews-tokens-48", shap=0.7, uniform=0.7)
    assert all(claim.verdict != SUPPORTED for _, claim in answers("length", [short, long]))


def test_a_worse_reward_model_is_asked_by_the_main_claim(base):
    worse = [lifted(base, f"reviews-labels-{n}", shap=by) for n, by in ((1, 0.7), (10, 0.0), (100, 0.0))]
    rows = answers("reward_model", worse)
    assert [dataset for dataset, _ in rows] == ["reviews-labels-1"] * 2 + ["reviews-labels-10"] * 2
    claims = [claim for finding in worse[:2] for claim in judge(finding) if claim.key == "1b"]
    assert [claim.verdict for _, claim in rows] == [claim.verdict for claim in claims]
    assert rows[0][1].verdict == SUPPORTED


def test_without_a_price_of_kl_a_gain_counts_by_how_much_it_grows(base):
    free, dear = (lifted(base, f"reviews-kl-{n}", shap=by) for n, by in (("free", 0.9), ("fourfold", 0)))
    rows = answers("kl", [free, dear])
    assert [dataset for dataset, _ in rows] == ["reviews-kl-free"] * 2
    assert [claim.verdict for _, claim in rows] == [SUPPORTED] * 2


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """One reward model's credit made reward in three ways, with the controls."""
    folder = tmp_path_factory.mktemp("shapes") / "runs" / "normalisation"
    shap, signed = planted.ARMS["shap"], planted.ARMS["shap-signed"]
    arms = {name: planted.ARMS[name] for name in ("sparse", "uniform", "shuffled")}
    arms |= {"softmax-1": shap, "softmax-003": shap, "shap-signed": signed}
    planted.Study(folder, arms, tuple(SEEDS)).write()
    return findings(finished_runs(folder), list(arms))[0]


def test_signs_and_a_sharp_softmax_are_compared_with_the_papers_softmax_and_controls(shapes):
    sharp = lifted(shapes, "reviews", **{"softmax-003": 0.9})
    claims = [claim for _, claim in answers("normalisation", [sharp])]
    signs, temperature = claims[:2], claims[2:]
    assert {claim.text for claim in temperature} == {"Does a sharp softmax of credit teach more than the paper's?"}
    assert [(c.where, c.verdict) for c in temperature] == [("equal updates", SUPPORTED), ("equal KL", SUPPORTED)]
    assert all("softmax-003 less softmax-1: gold" in claim.why for claim in temperature)
    assert not any("softmax-003" in claim.why for claim in signs)


def test_what_a_control_gains_as_well_is_no_merit_of_an_arm(shapes):
    alike = lifted(shapes, "reviews", **{"softmax-003": 0.9, "uniform": 0.9})
    assert SUPPORTED not in [claim.verdict for _, claim in answers("normalisation", [alike])[2:]]


@pytest.mark.parametrize("name", OPEN)
def test_a_study_has_what_its_open_questions_name(name):
    study = load_study(Path(__file__).parents[2] / "params" / "ablations" / f"{name}.yaml")
    places = {run.where for run in study.comparisons}
    for asks in OPEN[name].values():
        named = asks.keywords
        settings = {*named.get("settings", ()), *(named[end] for end in ("low", "high") if end in named)}
        assert settings <= places
        assert {named[end] for end in ("arm", "rival") if end in named} <= set(study.arms)


def test_other_studies_and_lacking_settings_answer_nothing(base):
    only = [lifted(base, "reviews-tokens-12")]
    assert answers("length", only) == answers("kl", only) == answers("reward_model", only) == []
