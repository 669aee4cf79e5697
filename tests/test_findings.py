"""What reports conclude: intervals against hand-made cases, and a verdict that says no more than the runs do."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_study import ARMS, ablation, policies, record, run

from dense_rlhf.report.charts import forest, ticks
from dense_rlhf.report.comparison import ablation_page, dataset_page, verdict
from dense_rlhf.report.findings import across, findings
from dense_rlhf.runs import RunFolder, finished_runs
from dense_rlhf.statistics import Interval, bootstrap, improvement, interquartile_mean
from dense_rlhf.types import InputError


def runs_of(*means, prompts=50, spread=0.1):
    rng = np.random.default_rng(0)
    return [m + spread * rng.normal(size=prompts) for m in means]


def test_interquartile_mean_drops_the_outer_quarters():
    found = interquartile_mean([runs_of(0, 1, 2, 3, 100, spread=0)])
    assert found.mean == pytest.approx(2) and found.low <= 2 <= found.high
    assert interquartile_mean([runs_of(1, 3, spread=0)]).mean == pytest.approx(2)


def test_one_task_of_few_runs_agrees_with_the_plain_bootstrap():
    runs = runs_of(0.0, 0.4, 0.8)
    ours, plain = interquartile_mean([runs]), bootstrap(runs)
    assert ours.mean == pytest.approx(plain.mean)
    assert (ours.low, ours.high) == pytest.approx((plain.low, plain.high), abs=0.12)


def test_runs_are_resampled_within_their_task():
    """A gap between tasks is no spread: however far apart, each task keeps its number of runs."""
    near = interquartile_mean([runs_of(0, 0.1, 0.2, 0.3), runs_of(0, 0.1, 0.2, 0.3)])
    far = interquartile_mean([runs_of(0, 0.1, 0.2, 0.3), runs_of(0.1, 0.2, 0.3, 0.4)])
    assert far.high - far.low < 1.5 * (near.high - near.low)


@pytest.mark.parametrize("ours, theirs, wanted", [((1, 2), (3, 4), 0), ((3, 4), (1, 2), 1), ((1, 2), (1, 2), 0.5),
                                                  ((1, 4), (2, 3), 0.5), ((2,), (1, 3, 1), 2 / 3)])  # fmt: skip
def test_probability_of_improvement_counts_pairs(ours, theirs, wanted):
    found = improvement([runs_of(*ours, spread=0)], [runs_of(*theirs, spread=0)])
    assert found.mean == pytest.approx(wanted) and 0 <= found.low <= found.high <= 1


def test_tasks_count_alike_whatever_their_runs():
    zero, one, zeros, ones = (runs_of(*means, spread=0) for means in ((0,), (1,), (0, 0, 0), (1, 1, 1)))
    assert improvement([one, zeros], [zero, ones]).mean == 0.5


def test_intervals_of_nothing_are_refused():
    for call in (lambda: interquartile_mean([[]]), lambda: interquartile_mean([[np.array([])]]),
                 lambda: improvement([[np.ones(2)]], [])):  # fmt: skip
        with pytest.raises(InputError):
            call()


def found_of(tmp_path, seeds, **golds):
    """A study whose arms end at given gold scores, all at the same KL."""
    arms = {name: (ARMS[name][0], gold, 2.0, ARMS[name][3]) for name, gold in golds.items()}
    policies(tmp_path, "s", seeds=seeds, arms={name.replace("_", "-"): arm for name, arm in arms.items()})
    return findings(finished_runs(tmp_path / "runs" / "s"), list(arms))[0]


SEEDS = tuple(range(6))


@pytest.mark.parametrize("seeds, golds, answer, part", [
    (SEEDS, {"sparse": 0, "uniform": 0, "shap": 2}, "yes", "helped: 1 of 1 dense arm is above sparse at equal KL"),
    (SEEDS, {"sparse": 0, "shap": 2}, "yes", "helped"),
    ((0, 1), {"sparse": 0, "uniform": 0, "shap": 2}, "unclear", "too few seeds"),
    (SEEDS, {"sparse": 0, "uniform": 2.5, "shap": 2}, "unclear", "uniform, which knows nothing of tokens"),
    ((0,), {"sparse": 0, "shap": 2}, "unclear", "learned faster"),
    (SEEDS, {"sparse": 2, "uniform": 2, "shap": 0}, "no", "did not help"),
    (SEEDS, {"sparse": 0, "shap": 0.01}, "unclear", "No effect"),
    (SEEDS, {"uniform": 0, "shap": 2}, "unclear", "no sparse arm"),
    (SEEDS, {"sparse": 0}, "unclear", "No dense arm"),
])  # fmt: skip
def test_the_verdict_says_no_more_than_the_runs(tmp_path, seeds, golds, answer, part):
    said = verdict(found_of(tmp_path, seeds, **golds))
    assert said.answer == answer and part in said.line
    if said.grounds:
        assert f"{len(seeds)} seed" in said.grounds["How sure"]


def test_cost_names_explaining_and_the_search(tmp_path):
    policies(tmp_path, "s", arms={name: ARMS[name] for name in ("sparse", "bo-shap")})
    run(tmp_path, "s", record("05_bayesian_optimisation-bo-shap", "05_bayesian_optimisation", arm="bo-shap")
        | {"seconds": 600.0})  # fmt: skip
    cost = verdict(findings(finished_runs(tmp_path / "runs" / "s"))[0]).grounds["At which cost"]
    assert "46 s" in cost and "1.4 times that of sparse" in cost and "10 min more, once" in cost


def test_arms_over_datasets_are_in_one_unit(tmp_path):
    policies(tmp_path, "s", ("reviews", "hh_rlhf"), arms={name: ARMS[name] for name in ("sparse", "shap-signed")})
    over = across(findings(finished_runs(tmp_path / "runs" / "s")))
    assert set(over) == {"reference", "shap-signed"}
    assert over["shap-signed"]["iqm"].low > 0 > over["reference"]["iqm"].mean


def test_runs_without_history_or_times_still_compare(tmp_path):
    policies(tmp_path, "s", arms={name: ARMS[name] for name in ("sparse", "shap")})
    for name in ("history", "seconds"):
        for path in tmp_path.glob(f"runs/s/*/{name}.csv"):
            path.unlink()
    (found,) = findings(finished_runs(tmp_path / "runs" / "s"))
    assert "unknown" in verdict(found).grounds["At which cost"] and "All numbers" in dataset_page("s", found)[0]


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
    assert "aria-label='what: &lt;a&gt; 1.00 [0.00, 2.00]'" in html and "nan" not in html
    assert forest({}, "what") == ""
