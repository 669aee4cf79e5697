"""What reports conclude: intervals against hand-made cases, and a verdict that says no more than the runs do."""

import json
import math
import re
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_study import ARMS, ablation, policies, record, run
from planted import ARMS as ARMS_OF_A_FRONTIER
from planted import Study

from dense_rlhf.evaluation.claims import judge
from dense_rlhf.evaluation.findings import across, findings
from dense_rlhf.report.charts import forest, ticks, title_of
from dense_rlhf.report.comparison import ablation_page, dataset_page, verdict
from dense_rlhf.runs import RunFolder, finished_runs
from dense_rlhf.statistics import Interval, paired, welch
from dense_rlhf.view.figures import colour


def finding_of(tmp_path, seeds, **golds):
    """A study whose arms end at given gold scores, all at the same KL."""
    arms = {name: (ARMS[name][0], gold, 2.0, ARMS[name][3]) for name, gold in golds.items()}
    policies(tmp_path, "s", seeds=seeds, arms={name.replace("_", "-"): arm for name, arm in arms.items()})
    return findings(finished_runs(tmp_path / "runs" / "s"), list(arms))[0]


SEEDS = tuple(range(6))


@pytest.mark.parametrize(
    "seeds, golds, answer, part",
    [
        (SEEDS, {"sparse": 0, "uniform": 0, "shap": 2}, "yes", "shap reaches gold +"),
        ((0,), {"sparse": 0, "uniform": 0, "shap": 2}, "unclear", "one seed says nothing about other seeds"),
        (SEEDS, {"sparse": 2, "uniform": 2, "shap": 0}, "no", "it is worse"),
        (SEEDS, {"uniform": 0, "shap": 2}, "unclear", "No sparse arm"),
        (SEEDS, {"sparse": 0}, "unclear", "No dense arm"),
    ],
)
def test_the_verdict_says_no_more_than_the_runs(tmp_path, seeds, golds, answer, part):
    decided = verdict(finding_of(tmp_path, seeds, **golds))
    assert decided.answer == answer and part in decided.line
    if decided.grounds:
        assert f"{len(seeds)} seed" in decided.grounds["How sure"]


def test_differences_are_paired_where_seeds_pair(tmp_path):
    """Same seed and same parameters but the shape: pairs. Other rollouts, or none that is known: not."""
    found = finding_of(tmp_path, SEEDS, sparse=0, shap=1)
    ours, theirs = ([t["gold"].mean() for t in found.judged[arm].values()] for arm in ("shap", "sparse"))
    assert found.compare("shap", "sparse") == paired(ours, theirs) == found.arms["shap"].gain
    for change in ("ppo_rollouts: 9", None):
        for seed in SEEDS:
            path = tmp_path / "runs" / "s" / f"reviews-04_ppo-shap-seed{seed}" / "params.yaml"
            path.write_text(path.read_text() + f"\n{change}") if change else path.unlink()
        (other,) = findings(finished_runs(tmp_path / "runs" / "s"))
        assert other.compare("shap", "sparse") == welch(ours, theirs)
        assert not other.compare_at_kl("shap", "sparse").paired and found.compare_at_kl("shap", "sparse").paired


def test_test_prompts_are_judged_on_where_all_runs_have_them(tmp_path):
    assert finding_of(tmp_path, SEEDS, sparse=0, shap=1).table == "test"
    next(tmp_path.glob("runs/s/*/test.csv")).unlink()
    (found,) = findings(finished_runs(tmp_path / "runs" / "s"))
    assert found.table == "evaluation" and "validation prompts" in verdict(found).grounds["How sure"]


def test_wins_at_equal_length_are_shown_if_every_run_has_them(tmp_path):
    found = finding_of(tmp_path, SEEDS, sparse=0, shap=1)
    shap = found.arms["shap"]
    assert shap.win_lc.mean == pytest.approx(shap.win.mean) and shap.win_lc.known
    assert "win rate, equal length" in dataset_page("s", found)[0]
    path = tmp_path / "runs" / "s" / "reviews-04_ppo-shap-seed0" / f"{found.table}.csv"
    pd.read_csv(path).drop(columns="win_lc").to_csv(path, index=False)
    again = findings(finished_runs(tmp_path / "runs" / "s"), ["sparse", "shap"])[0]
    assert again.arms["shap"].win_lc is None and again.arms["sparse"].win_lc == found.arms["sparse"].win_lc


def test_searches_tell_which_arms_learned_their_weights(tmp_path):
    policies(tmp_path, "s", arms={name: ARMS[name] for name in ("sparse", "bo-shap")})
    one = record("05_bayesian_optimisation-bo-shap", "05_bayesian_optimisation", arm="bo-shap")
    run(tmp_path, "s", one, params=["bo_trials: 25"])
    arms = findings(finished_runs(tmp_path / "runs" / "s"))[0].arms
    assert (arms["bo-shap"].trials, arms["sparse"].trials) == (25, 0)
    assert (arms["bo-shap"].search.number, arms["bo-shap"].search.seconds, arms["sparse"].search) == (1, 75, None)


def test_cost_names_explaining_and_the_search(tmp_path):
    policies(tmp_path, "s", arms={name: ARMS[name] for name in ("sparse", "bo-shap")})
    search = record("05_bayesian_optimisation-bo-shap", "05_bayesian_optimisation", arm="bo-shap")
    run(tmp_path, "s", search | {"seconds": 600.0})
    cost = verdict(findings(finished_runs(tmp_path / "runs" / "s"))[0]).grounds["Cost"]
    assert "A run takes 75 s by the clock, 46 s of it training, 30% of that explaining" in cost
    assert "1.4 times that of sparse; one search for the weights took 10 min more" in cost


def test_arms_over_datasets_are_in_one_unit(tmp_path):
    arms = {name: ARMS[name] for name in ("sparse", "shap-signed")}
    policies(tmp_path, "s", ("reviews", "hh_rlhf"), SEEDS, arms)
    over = across(findings(finished_runs(tmp_path / "runs" / "s")))
    assert set(over) == {"reference", "shap-signed"}
    assert over["shap-signed"]["iqm"].low > 0 > over["reference"]["iqm"].mean


def test_runs_without_history_or_times_still_compare(tmp_path):
    policies(tmp_path, "s", arms={name: ARMS[name] for name in ("sparse", "shap")})
    for name in ("history", "seconds"):
        for path in tmp_path.glob(f"runs/s/*/{name}.csv"):
            path.unlink()
    (found,) = findings(finished_runs(tmp_path / "runs" / "s"))
    assert "Unknown" in verdict(found).grounds["Cost"] and "All numbers" in dataset_page("s", found)[0]


def test_a_path_with_holes_costs_no_page(tmp_path):
    """A metric that is never a number leaves its comparisons open; the rest stands, and the law takes what is there."""
    policies(tmp_path, "s", arms={name: ARMS[name] for name in ("sparse", "shap")})
    for path in tmp_path.glob("runs/s/*/history.csv"):
        holes = pd.read_csv(path).assign(value_loss=np.nan)
        holes.loc[::4, "gold"] = np.nan
        holes.to_csv(path, index=False)
    (found,) = findings(finished_runs(tmp_path / "runs" / "s"))
    body, _ = dataset_page("s", found)
    assert "sqrt(KL) reached" in body and not any(case.has_interval for case in judge(found)[0].cases)


def test_an_ablation_page_holds_its_intervals_numbers_and_tables(tmp_path):
    ablation(tmp_path, "a", ("default", "λ 0"))
    long = RunFolder(tmp_path / "runs" / "a" / "ppo")
    long.save_table("long", pd.DataFrame({"x": range(500)}))
    body, listed = ablation_page("a", long)
    assert "default 0.10 [-0.10, 0.30]" in body and "the first 60 of 500 rows" in body and "gain" in listed


@given(st.floats(-1e6, 1e6), st.floats(0, 1e6))
def test_ticks_are_few_and_enclose(low, width):
    found = ticks(low, low + width)
    assert len(found) <= 7 and found[0] <= low + 1e-6 * abs(low) + 1e-9 and found == sorted(set(found))


def test_a_figure_says_itself_and_leaves_out_what_is_not_finite():
    html = forest({"<a>": Interval(1, 0, 2), "b": Interval(float("nan"), 0, 1)}, "what")
    assert "aria-label='Unclear: &lt;a&gt;. what: &lt;a&gt; 1.00 [0.00, 2.00]'" in html and "nan" not in html
    assert forest({}, "what") == ""


def test_the_title_of_a_figure_says_which_intervals_lie_on_which_side():
    shown = {
        "a": Interval(1, 0.5, 2),
        "b": Interval(-1, -2, -0.5),
        "c": Interval(1, 0, 2),
        "d": Interval(9, -np.inf, np.inf),
    }
    assert title_of(shown, 0.0) == "Above 0: a; below 0: b; unclear: c, d"
    assert title_of(shown, 0.5) == "Below 0.5: b; unclear: a, c, d"
    assert title_of({f"arm {n}": Interval(1, 0.5, 2) for n in range(4)}, 0.0) == "Above 0: 4 of 4"
    assert title_of(shown, None) == "Highest: d, 9.00"
    for alone in (False, True):
        html = forest(shown, "what", 0.5, alone)
        assert html.count("Below 0.5: b; unclear: a, c, d") == 2 and html.count("class='zero'") == 1


def test_a_method_has_one_colour_in_every_study():
    one, other = (forest({name: Interval(1, 0, 2)}, "what") for name in ("shap-signed", "shap-signed (reviews)"))
    assert colour("shap-signed") in one and colour("shap-signed") in other


@pytest.mark.parametrize("alone", [False, True])
def test_a_label_has_as_much_room_as_it_wants(alone):
    name, shown = "hh_smollm2.shap-signed-seed0 gold", {"a": Interval(1, 0, 2)}
    html, short = forest(shown | {name: Interval(1, 0, 2)}, "what", alone=alone), forest(shown, "what", alone=alone)
    ends = [float(re.search(r"text x='(\d+)' y='[\d.]+' text-anchor='end'", svg)[1]) for svg in (html, short)]
    assert f">{name}</text>" in html and ends[0] > ends[1] and ends[0] >= (5.5 if alone else 6.7) * len(name)
    assert f">{'x' * 33}…<" in forest({"x" * 99: Interval(1, 0, 2)}, "what", alone=True)


def test_one_seed_is_a_point_without_a_bar():
    html = forest({"a": Interval(1, 0, 2), "b": Interval(3, -np.inf, np.inf)}, "what")
    assert "3.00 [no interval]" in html and html.count("<circle") == 2 and html.count("stroke-linecap") == 1
    assert "inf" not in html


def test_an_ablation_of_one_seed_shows_its_points(tmp_path):
    (tmp_path / "a").mkdir()
    folder = RunFolder(tmp_path / "a")
    folder.save_metrics({"gain": {"x": vars(paired([1.0], [0.5]))}})
    assert "x 0.50 [no interval]" in ablation_page("s", folder)[0]


# ---------------------------------------------------------------------------------------------------- regimes


def test_arms_are_compared_at_a_low_kl_and_where_the_fastest_ends(tmp_path):
    """Paths of known slopes, so that values, updates and seconds at a KL are arithmetic; slow arms were trained on."""
    quiet = {name: replace(arm, spread=0.0) for name, arm in ARMS_OF_A_FRONTIER.items()}
    study = Study(tmp_path / "s", quiet, (0, 1), longer={"sparse": 90}).write()
    (found,) = findings(finished_runs(study.folder), list(quiet))
    low, far = found.levels
    assert low == pytest.approx(2.0 * 23 / 24) and far == pytest.approx(6.7 * 23 / 24)  # running means of three
    at = found.at("sparse", far)
    assert len(at) == 2 and at["update"].tolist() == pytest.approx([far / 2.0 * 24] * 2)
    assert at["seconds"].tolist() == [2.0 * (math.ceil(far / 2.0 * 24) + 1)] * 2
    assert found.at("shap-signed", far)["update"].tolist() == [23, 23] and found.at("uniform", far).empty
    assert found.compare_at_kl("shap-signed", "sparse", level=far).seeds == 2
    assert found.compare_at_kl("shap-signed", "uniform", level=far) is None
    assert found.arms["shap-signed"].gain_far == found.compare_at_kl("shap-signed", "sparse", level=far)
    assert found.arms["shap-signed"].gain_at_kl == found.compare_at_kl("shap-signed", "sparse")


@pytest.mark.parametrize("trained_on, how", [((), "with any seed"), ((0,), "with every seed"), ((0, 1), None)])
def test_the_line_says_whether_some_seeds_got_to_the_far_kl(tmp_path, trained_on, how):
    study = Study(tmp_path / "s", ARMS_OF_A_FRONTIER, (0, 1), longer={"sparse": 90}).write()
    for seed in {0, 1} - {*trained_on}:
        shutil.rmtree(study.folder / f"04_ppo-sparse-longer-seed{seed}")
    (found,) = findings(finished_runs(study.folder), list(study.arms))
    assert ("did not get to" in verdict(found).line) == bool(how) and (how or "") in verdict(found).line


def test_longer_and_common_steps_stand_beside_and_are_no_findings_of_their_own(tmp_path):
    study = Study(tmp_path / "s", ARMS_OF_A_FRONTIER, (0, 1), longer={"sparse": 90}).write()
    for path in list(study.folder.glob("04_ppo-*-seed?")):
        if "longer" not in path.name:
            there = path.with_name(path.name.replace("-seed", "-common-step-seed"))
            shutil.copytree(path, there)
            one = json.loads((there / "run.json").read_text())
            one |= {"job": there.name, "regime": "common-step", "dataset": "reviews-common-step"}
            (there / "run.json").write_text(json.dumps(one))
    (found,) = findings(finished_runs(study.folder), list(study.arms))
    assert found.common.arms.keys() == found.arms.keys() and found.common.longer is None
    assert len(found.judged["sparse"]) == 2 and found.history["update"].max() == 23
    assert "shap-signed has gold +0.2" in verdict(found).grounds["At one common step size"]
    assert "At one common step size" in dataset_page("s", found)[0]


def test_the_first_page_tells_the_step_sizes_and_what_choosing_them_took(tmp_path):
    study = Study(tmp_path / "s", ARMS_OF_A_FRONTIER, (0, 1), params={"ppo_lr": 5e-4}).write()
    grounds = verdict(*findings(finished_runs(study.folder))).grounds
    assert "Step sizes" not in grounds and "All arms have one step size, 0.0005:" in grounds["How sure"]
    assert "each arm's step size" not in grounds["How sure"]
    for arm, size in (("sparse", 5e-4), ("shap-signed", 5e-4)):
        job = f"11_step_size-{arm}"
        cost = {"trainings": 3, "updates": 36, "seconds": 60.0, "step_size": size}
        (study._folder(job) / "metrics.json").write_text(json.dumps(cost))
        study._end(study.folder / job, job, "11_step_size", {"arm": arm, "seed": 500}, "own")
    (found,) = findings(finished_runs(study.folder), list(study.arms))
    grounds = verdict(found).grounds
    words = grounds["Step sizes"]
    apart = replace(found.arms["shap-signed"], step=1e-3)
    assert "with steps of" not in verdict(found).line
    there = verdict(replace(found, arms=found.arms | {apart.name: apart}))
    assert ", with steps of 0.001 against 0.0005" in there.line
    assert "one step size" not in grounds["How sure"]
    assert "All seeds share the reward model, each arm's step size: no interval covers" in grounds["How sure"]
    assert words.startswith("sparse 0.0005, shap-signed 0.0005. ") and "6 trainings, 72 updates, 2 min in all" in words


@pytest.mark.parametrize("sign", [1, -1])
def test_a_rank_correlation_tells_whether_a_prefix_predicts_the_end(tmp_path, sign):
    """The arms' order at the end is that of their slopes, or its reverse; with two arms there is no answer."""
    arms = {name: replace(ARMS_OF_A_FRONTIER["sparse"], kl=3.0 + i, spread=0.0) for i, name in enumerate("abcd")}
    study = Study(tmp_path / "s", arms, (0, 1)).write()
    for path in study.folder.glob("*/history.csv"):
        rows = pd.read_csv(path)
        rows.assign(proxy=sign * rows["kl"]).to_csv(path, index=False)
    (made,) = findings(finished_runs(study.folder))
    assert made.rank_after(12) == Interval(sign, sign, sign) and made.rank_after(12, "unknown") is None
    assert replace(made, history=made.history[made.history["arm"] < "c"]).rank_after(12) is None


def test_what_all_seeds_share_is_said(tmp_path):
    """The explainer is drawn anew by each seed, the reward model once, unless the parameters say otherwise."""
    arms = {"sparse": ARMS_OF_A_FRONTIER["sparse"]}
    (found,) = findings(finished_runs(Study(tmp_path / "a", arms, (0, 1)).write().folder))
    assert found.drawn_once == ["the reward model"]
    fixed = Study(tmp_path / "b", arms, (0, 1), params={"attribution_seed": 0}).write()
    (found,) = findings(finished_runs(fixed.folder))
    assert found.drawn_once == ["the reward model", "the explainer's samples"]
