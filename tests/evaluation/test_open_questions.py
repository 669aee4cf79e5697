"""What the settings of a study answer: gains of one setting against those of another."""

from dataclasses import replace

import numpy as np
import planted
import pytest

from dense_rlhf.evaluation.claims import judge
from dense_rlhf.evaluation.findings import findings
from dense_rlhf.evaluation.open_questions import by_settings
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
    rows = by_settings("length", [short, lifted(base, "reviews-tokens-24", shap=9), long])
    assert [(row["at"], row["verdict"]) for row in rows] == [("equal updates", verdict), ("equal KL", verdict)]
    assert all(f"shap less sparse: gold {by:+.2f} [" in row["why"] for row in rows)  # no noise is its own
    assert all(row["dataset"] == "reviews-tokens-48" for row in rows)
    assert "nats" in rows[1]["why"] and "nats" not in rows[0]["why"]


def test_what_a_control_gains_as_well_is_not_counted(base):
    short, long = lifted(base, "reviews-tokens-12"), lifted(base, "reviews-tokens-48", shap=0.7, uniform=0.7)
    assert all(row["verdict"] != SUPPORTED for row in by_settings("length", [short, long]))


def test_a_worse_reward_model_is_asked_by_the_main_claim(base):
    worse = [lifted(base, f"reviews-labels-{n}", shap=by) for n, by in ((1, 0.7), (10, 0.0), (100, 0.0))]
    rows = by_settings("reward_model", worse)
    assert [row["dataset"] for row in rows] == ["reviews-labels-1"] * 2 + ["reviews-labels-10"] * 2
    claims = [claim for finding in worse[:2] for claim in judge(finding) if claim.key == "1b"]
    assert [row["verdict"] for row in rows] == [claim.verdict for claim in claims]
    assert rows[0]["verdict"] == SUPPORTED


def test_other_studies_and_lacking_settings_answer_nothing(base):
    only = [lifted(base, "reviews-tokens-12")]
    assert by_settings("length", only) == by_settings("kl", only) == by_settings("reward_model", only) == []
