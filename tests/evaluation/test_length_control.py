"""The length-controlled win rate: alpaca_eval's own on the same annotations, and what it is for."""

import numpy as np
import pandas as pd
import pytest

from dense_rlhf.evaluation.judge.length_control import length_controlled
from dense_rlhf.types import InputError

# Recorded with this file's `annotations` from alpaca_eval 0.6.6, scikit-learn 1.9.1, Python 3.11: `theirs(...)` below
RECORDED = {  # noreg and v1 know the difficulty, v1 the gamed baselines; per cent
    (0, "length_controlled_minimal"): 39.306567,
    (0, "length_controlled_noreg"): 39.107897,
    (0, "length_controlled_v1"): 39.341472,
    (1, "length_controlled_minimal"): 53.490821,
    (1, "length_controlled_noreg"): 53.647928,
    (1, "length_controlled_v1"): 53.808806,
    (2, "length_controlled_minimal"): 34.013812,
    (2, "length_controlled_noreg"): 33.924187,
    (2, "length_controlled_v1"): 34.173443,
    (3, "length_controlled_minimal"): 43.011674,
    (3, "length_controlled_noreg"): 43.101573,
    (3, "length_controlled_v1"): 43.170321,
}


def annotations(seed, N=200):
    """Made-up judgements of N pairs that like length: preference, ours, theirs, difficulty, and gamed baselines."""
    rng = np.random.default_rng(seed)
    ours, theirs = (["x" * n for n in rng.integers(20, 2000, N)] for _ in range(2))
    gap = np.array([len(a) - len(b) for a, b in zip(ours, theirs)])
    difficulty = rng.normal(size=N)
    logit = rng.normal(scale=0.5) + 1.5 * np.tanh(gap / gap.std()) - 0.6 * difficulty + rng.normal(size=N)
    preference = 1 / (1 + np.exp(-2 * logit))
    preference[rng.random(N) < 0.1] = 0.5
    preference[rng.random(N) < 0.05] = np.nan
    return preference, ours, theirs, difficulty, gamed(rng, difficulty)


def gamed(rng, difficulty):
    """Made-up annotations of two baselines, one brief and one long, as df_gamed.csv has them."""
    tables = [
        pd.DataFrame(
            {
                "model": name,
                "index": np.arange(len(difficulty)),
                "instruction_difficulty": difficulty,
                "std_delta_len": rng.normal(shift, 0.5, len(difficulty)),
                "not_gamed_baseline": False,
                "preference": rng.beta(2 - shift, 2 + shift, len(difficulty)),
            }
        )
        for name, shift in (("brief", 0.8), ("long", -0.8))
    ]
    return pd.concat(tables, ignore_index=True)


MODELS = {
    "length_controlled_minimal": [],
    "length_controlled_noreg": ["difficulty"],
    "length_controlled_v1": ["difficulty", "gamed"],
}
CASES = [(seed, model) for seed in range(4) for model in MODELS]


def controlled(seed, model):
    preference, ours, theirs, difficulty, table = annotations(seed)
    given = {"difficulty": difficulty, "gamed": table}
    return 100 * length_controlled(preference, ours, theirs, **{name: given[name] for name in MODELS[model]}).mean()


def theirs(seed, model, tmp_path, monkeypatch):
    """What alpaca_eval computes of the same annotations, with our made-up table where it would ask the hub."""
    metrics = pytest.importorskip(
        "alpaca_eval.metrics.glm_winrate", reason="alpaca_eval is not installed: its numbers were recorded"
    )
    preference, ours, baseline, _, table = annotations(seed)
    table.to_csv(tmp_path / "gamed.csv", index=False)
    monkeypatch.setattr(metrics, "hf_hub_download", lambda **_: str(tmp_path / "gamed.csv"))
    frame = pd.DataFrame(
        {
            "preference": 1 + preference,
            "output_1": baseline,
            "output_2": ours,
            "index": np.arange(len(ours)),
            "generator_1": "baseline",
            "generator_2": "ours",
            "annotator": "made up",
        }
    )
    found = metrics.get_length_controlled_winrate(frame, glm_name=model, save_weights_dir=None)
    return found["length_controlled_winrate"]


@pytest.mark.parametrize("seed, model", CASES)
def test_it_is_what_alpaca_eval_recorded(seed, model):
    assert controlled(seed, model) == pytest.approx(RECORDED[seed, model], abs=0.1)


@pytest.mark.parametrize("seed, model", CASES)
def test_it_is_what_alpaca_eval_computes(seed, model, tmp_path, monkeypatch):
    assert controlled(seed, model) == pytest.approx(theirs(seed, model, tmp_path, monkeypatch), abs=0.1)


def test_a_judge_that_likes_length_alone_finds_no_winner_at_equal_length():
    rng = np.random.default_rng(0)
    ours, theirs = ["x" * n for n in rng.integers(200, 400, 300)], ["x" * n for n in rng.integers(100, 300, 300)]
    gap = np.array([len(a) - len(b) for a, b in zip(ours, theirs)])
    preference = (rng.random(300) < 1 / (1 + np.exp(-4 * np.tanh(gap / gap.std())))).astype(float)
    assert preference.mean() > 0.8
    assert abs(length_controlled(preference, ours, theirs).mean() - 0.5) < 0.1


def test_sides_are_alike():
    preference, ours, theirs, difficulty, _ = annotations(0)
    one = length_controlled(preference, ours, theirs, difficulty)
    assert one + length_controlled(1 - preference, theirs, ours, difficulty) == pytest.approx(np.ones(200), abs=2e-3)


def test_equal_lengths_leave_the_win_rate():
    rng = np.random.default_rng(0)
    preference = rng.random(100)
    assert length_controlled(preference, ["x"] * 100, ["y"] * 100).mean() == pytest.approx(preference.mean(), abs=1e-3)


def test_what_was_not_judged_is_foretold_and_teaches_nothing():
    preference, ours, theirs, difficulty, _ = annotations(0)
    known = np.where(np.isnan(preference), 0.5, preference)
    known[:20] = np.nan
    found = length_controlled(known, ours, theirs, difficulty)
    assert ((found > 0) & (found < 1)).all() and len(found) == 200
    assert found[:20].std() > 0


@pytest.mark.parametrize(
    "preference, message",
    [
        ([1.0] * 4 + [np.nan] * 6, "4 judged pairs, wanted at least 5"),
        ([1.0] * 9 + [1.1], "outside of"),
        ([1.0] * 9, "wanted one of each"),
    ],
)
def test_bad_judgements_are_refused(preference, message):
    with pytest.raises(InputError, match=message):
        length_controlled(np.array(preference), ["x"] * 10, ["xy"] * 10)
