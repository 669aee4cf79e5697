"""The laws of over-optimisation: fitted to paths that follow them, they give back their numbers and their peak."""

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from dense_rlhf.evaluation.overoptimisation import LAWS, Law, distance, fit, fits, generalisation, law_table
from dense_rlhf.types import InputError

numbers = st.floats(0.05, 3)
D = np.linspace(0, 4, 60)


@pytest.mark.parametrize("kind", LAWS)
@given(numbers, numbers, st.floats(-2, 2))
def test_a_law_is_found_again(kind, alpha, beta, start):
    law = fit(D, Law(kind, alpha, beta, start, 1.0)(D), kind)
    assert (law.alpha, law.beta, law.start) == pytest.approx((alpha, beta, start), abs=1e-6)
    assert law.r2 == pytest.approx(1)


@pytest.mark.parametrize("kind", LAWS)
@given(numbers, numbers)
def test_the_peak_is_the_highest_point(kind, alpha, beta):
    law = Law(kind, alpha, beta, 0.5, 1.0)
    assume(law.peak < 1e6)
    around = law(law.peak * np.linspace(0.5, 1.5, 101))
    assert around.argmax() == 50 and law(np.array([0.0]))[0] == 0.5


def test_a_law_that_only_rises_has_no_peak():
    assert Law("rl", 1.0, -0.1, 0, 1).peak == Law("best_of_n", 1.0, 0.0, 0, 1).peak == math.inf
    assert Law("best_of_n", -1.0, 0.5, 0, 1).peak == 0


def test_distances_below_zero_are_zero():
    assert distance([-0.1, 0, 4]).tolist() == [0, 0, 2]


def test_too_few_points_and_other_laws_are_refused():
    for d, score in (([1, 2, 3], [1, 2, 3]), ([1, 1, 1, 1], [1, 2, 3, 4]), ([1, 2, 3, 4], [1, 2, 3])):
        with pytest.raises(InputError, match="wanted 4 or more"):
            fit(d, score)
    with pytest.raises(InputError, match="rl, best_of_n"):
        fit(D, D, "ppo")


def paths(seeds, alpha=1.0, beta=0.8, updates=60, until=3.0, noise=0.02, arm="a"):
    """Runs whose gold follows the law, while the KL grows evenly in d."""
    rows = []
    for seed in seeds:
        d = np.linspace(0, until, updates)
        gold = Law("rl", alpha, beta, 0.2, 1)(d) + np.random.default_rng(seed).normal(0, noise, updates)
        rows.append(pd.DataFrame({"arm": arm, "seed": seed, "update": range(updates), "kl": d**2, "gold": gold}))
    return pd.concat(rows, ignore_index=True)


def test_runs_are_fitted_one_by_one_and_their_peak_is_dated():
    peak = math.exp(1 / 0.8 - 1)  # 1.28 of 3.0
    fitted = fits(paths((0, 1, 2)).sample(frac=1, random_state=0))
    assert sorted(fitted["seed"]) == [0, 1, 2] and fitted["reached"].all()
    assert fitted["peak"].to_numpy() == pytest.approx(peak, abs=0.08)
    assert fitted["update"].to_numpy() == pytest.approx(59 * peak / 3, abs=5)
    (row,) = law_table(fitted).to_dict("records")
    assert row["seeds"] == 3 and row["alpha"].startswith("1.0") and "[" in row["at update"]


def test_a_peak_beyond_the_path_is_not_reached_here():
    short, long = paths((0, 1), until=1.0), paths((2,), until=3.0)
    none, one = (law_table(fits(paths_of))["at update"].item() for paths_of in (short, pd.concat([short, long])))
    assert none == "not reached here" and one.endswith("(1 of 3 seeds)")


def test_runs_too_short_for_a_law_have_no_row():
    listed = law_table(fits(paths((0,), updates=3)))
    assert listed.empty and "at update" in listed


def test_gains_are_over_the_untrained_policy_and_paired_by_seed():
    history = paths((0, 1), updates=20, noise=0)
    tables = {seed: pd.DataFrame({"gold": [1.0 + seed, 3.0 + seed], "reference_gold": [0.0, 1.0]}) for seed in (1, 0)}
    worse = {seed: table.assign(gold=table["gold"] - 0.5) for seed, table in tables.items()}
    gains = generalisation(history, {"validation": {"a": tables}, "test": {"a": worse}}, "gold")["a"]
    assert list(gains) == ["train", "validation", "test", "validation less train", "test less validation"]
    assert gains["validation"].mean == 2 and gains["test"].mean == 1.5
    assert (gains["test less validation"].low, gains["test less validation"].high) == (-0.5, -0.5)
    run = history[history["seed"] == 0]["gold"]
    assert gains["train"].mean == pytest.approx(run.tail(5).mean() - run.iloc[0])
