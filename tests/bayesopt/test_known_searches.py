"""Trials against the number of sources: searches of known functions, and what is read off them."""

import numpy as np
import pandas as pd
import pytest

from dense_rlhf.bayesopt import audit
from dense_rlhf.bayesopt.known_functions import LANDSCAPES, landscape
from dense_rlhf.bayesopt.known_searches import (
    Case,
    Experiment,
    calibration,
    cases,
    common,
    curve,
    gain,
    needed,
    run_searches,
    search_known,
)
from dense_rlhf.bayesopt.search import Search
from dense_rlhf.bayesopt.space import Space
from dense_rlhf.config import params
from dense_rlhf.config.params import DimensionParams
from dense_rlhf.files import read_ledger
from dense_rlhf.types import InputError

SMALL = DimensionParams(d=(2, 3), trials=6, seeds=1, landscapes=("powers", "flat"), strategies=("gp", "sobol"))


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    path = tmp_path_factory.mktemp("dimension") / "searches.jsonl"
    return run_searches(cases(SMALL), path), path


def test_parameters_know_all_landscapes():
    assert set(params.LANDSCAPES) == set(LANDSCAPES)


@pytest.mark.parametrize(
    "wrong",
    [
        {"d": (2,)},
        {"d": (1, 2)},
        {"trials": 1},
        {"landscapes": ("hill",)},
        {"landscapes": ("flat",)},
        {"seeds": 0},
        {"strategies": ("sobol",)},
        {"strategies": ("gp", "tpe")},
        {"sources": ("shap", "terminal")},
        {"snr": ()},
        {"snr": (0.0,)},
        {"goal": 0.0},
        {"rival_trials": 1},
        {"rival_seeds": -1},
    ],
)
def test_what_cannot_be_asked_is_refused(wrong):
    with pytest.raises(InputError, match="dimension."):
        DimensionParams(**wrong)


def test_seeds_are_outermost_and_only_the_audit_is_asked_about_flat_ones():
    planned = cases(DimensionParams(seeds=2, snr=(1.0, 0.5)))
    assert len(planned) == len(set(planned)) == 2 * 7 * (2 * (5 * 3 + 1) + 5 * 3)
    assert {(case.trials, case.seed) for case in planned if case.strategy in ("saas", "additive", "nei")} == {(40, 0)}
    assert [case.seed for case in planned] == sorted(case.seed for case in planned)
    assert {case.strategy for case in planned if case.landscape == "flat"} == {"gp"}


def test_a_search_answers_with_its_incumbent_or_its_best_observation():
    rows = {
        row["method"]: row["regret"] for row in search_known(Case("face", 3, 1.0, "sobol", 4, 12)) if row["n"] == 12
    }
    truth, search = landscape("face", 3, 4), Search(Space(3), "sobol", seed=4)
    noise = np.random.default_rng([4, 7]).standard_normal(12)
    for n in range(12):
        point = search.suggest()
        search.observe(point, float(truth.function(np.array(point)) + noise[n]), 1.0)
    assert rows == {
        "sobol": pytest.approx(float(truth.regret(np.array(search.points[np.argmax(search.values)])))),
        "gp on sobol": pytest.approx(float(truth.regret(np.array(search.incumbent()[0])))),
    }


def test_more_signal_means_less_regret():
    loud, clear = (search_known(Case("interior", 3, snr, "sobol", 0, 30))[-1]["regret"] for snr in (0.02, 50.0))
    assert clear < loud


def test_every_search_is_a_line_and_its_audit_a_verdict(searched):
    every, path = searched
    lines = read_ledger(path)
    assert len(lines) == len({line["key"] for line in lines}) == len(cases(SMALL)) == 6
    assert set(every["method"]) == {"gp", "sobol", "gp on sobol"} and (every["n"] == 6).all()
    heard = every[every["method"] == "gp"]
    assert heard["kind"].isin([audit.CONVERGED, audit.MORE, audit.FLAT]).all() and heard["seen"].ge(0).all()
    assert (every.loc[every["landscape"] == "flat", "regret"] == 0).all() and every["regret"].ge(0).all()
    assert every[every["method"] != "gp"]["kind"].isna().all()


def test_a_comparison_that_was_killed_goes_on(searched, tmp_path, monkeypatch):
    every, path = searched
    cut, ran = tmp_path / "cut.jsonl", []
    cut.write_bytes(path.read_bytes()[:-20])
    monkeypatch.setattr(
        "dense_rlhf.bayesopt.known_searches.search_known", lambda *args: ran.append(args) or search_known(*args)
    )
    pd.testing.assert_frame_equal(every, run_searches(cases(SMALL), cut), check_exact=True)
    assert len(ran) == 1 and len(read_ledger(cut)) == 6
    again = [{k: v for k, v in line.items() if k != "seconds"} for line in read_ledger(cut)]
    assert again == [{k: v for k, v in line.items() if k != "seconds"} for line in read_ledger(path)]


def rows(values, method="gp", d=2):
    """One row a function and checkpoint, of regrets by function."""
    return pd.DataFrame(
        [
            {"d": d, "snr": 1.0, "method": method, "function": name, "n": n, "regret": value}
            for name, path in values.items()
            for n, value in path.items()
        ]
    )


def test_trials_to_a_goal_are_read_between_checkpoints():
    falls = rows({"a": {10: 1.0, 20: 0.5, 30: 0.1}, "b": {10: 1.0, 20: 0.5, 30: 0.3}})
    assert needed(falls, 0.5).mean == 20 and needed(falls, 0.35).mean == 25 and needed(falls, 2.0).mean == 10
    never = needed(falls, 0.05)
    assert never.mean == never.high == np.inf
    one = needed(falls, 0.2)
    assert one.mean == 30 and 25 < one.low < 30 and one.high == np.inf
    assert [i.mean for i in curve(falls)] == pytest.approx([1.0, 0.5, 0.2])


def test_a_goal_that_was_lost_again_is_not_reached():
    lucky = rows({"a": {10: 0.1, 20: 0.6, 30: 0.4}})
    assert needed(lucky, 0.5).mean == 25 and needed(lucky, 0.2).mean == np.inf


def test_methods_are_compared_on_the_same_functions():
    ours, theirs = {"a": {10: 0.0}, "b": {10: 5.0}}, {"b": {10: 6.0}, "a": {10: 1.0}}
    interval = gain(pd.concat([rows(ours), rows(theirs, "sobol")]), 10, "gp", "sobol")
    assert (interval.mean, interval.low, interval.high) == (1.0, 1.0, 1.0)


def test_methods_are_shown_where_all_were_asked():
    both = pd.concat([rows({"a": {10: 0.0, 20: 0.0}, "b": {10: 5.0}}), rows({"a": {10: 1.0}}, "saas")])
    assert common(both)[["function", "n", "method"]].values.tolist() == [["a", 10, "gp"], ["a", 10, "saas"]]


def test_flat_functions_have_no_regret_and_functions_are_named_by_seed(searched):
    every, _ = searched
    assert every.loc[every["landscape"] != "flat", "function"].unique().tolist() == ["powers0"]
    assert set(every["function"]) == {"powers0", "flat0"}


def test_a_searched_function_belongs_to_one_group(searched):
    groups = searched[0].groupby("landscape")["group"].unique().map(list).to_dict()
    assert groups == {"powers": ["reported"], "flat": ["tuning"]}


def test_an_expected_regret_is_compared_with_the_true_one_by_its_size():
    audits = pd.DataFrame({"expected": [0.1, 0.4, 0.2, 0.3], "regret": [0.2, 0.8, 0.4, 0.6]})
    table = calibration(audits, bins=2)
    assert table["expected"].tolist() == pytest.approx([0.15, 0.35, 0.25]) and table["audits"].tolist() == [2, 2, 4]
    np.testing.assert_allclose(table["regret"], 2 * table["expected"])
    assert (table["low"] < table["regret"]).all() and (table["regret"] < table["high"]).all()
    assert calibration(audits[:1])["regret"].tolist() == [0.2, 0.2]  # a single audit has no interval


def test_every_method_meets_the_same_noise():
    first, second = Experiment("face", 3, 2.0, 1), Experiment("face", 3, 2.0, 1)
    points = Space(3).sobol(4, 0)
    whole = np.random.default_rng([1, 7]).standard_normal(4) / 2.0
    assert [first(point) for point in points] == [second(point) for point in points]
    assert first.values == [float(first.truth.function(np.array(p))) + e for p, e in zip(points, whole)]
    assert first.regret(first.best_observed()) >= 0 and first.points == points
