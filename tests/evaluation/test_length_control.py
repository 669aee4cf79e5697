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
    result = metrics.get_length_controlled_winrate(frame, glm_name=model, save_weights_dir=None)
    return result["length_controlled_winrate"]


@pytest.mark.parametrize("seed, model", CASES)
def test_it_is_what_alpaca_eval_recorded(seed, model):
    assert controlled(seed, model) == pytest.approx(RECORDED[seed, model], abs=0.3)  # another penalty


@pytest.mark.parametrize("seed, model", CASES)
def test_it_is_what_alpaca_eval_computes(seed, model, tmp_path, monkeypatch):
    assert controlled(seed, model) == pytest.approx(theirs(seed, model, tmp_path, monkeypatch), abs=0.3)


def test_a_judge_that_likes_length_alone_finds_no_winner_at_equal_length():
    rng = np.random.default_rng(0)
    ours, theirs = ["x" * n for n in rng.integers(200, 400, 300)], ["x" * n for n in rng.integers(100, 300, 300)]
    gap = np.array([len(a) - len(b) for a, b in zip(ours, theirs)])
    preference = (rng.random(300) < 1 / (1 + np.exp(-4 * np.tanh(gap / gap.std())))).astype(float)
    assert preference.mean() > 0.8
    assert abs(length_controlled(preference, ours, theirs).mean() - 0.5) < 0.1


def texts(lengths):
    return ["x" * int(n) for n in lengths]


def lengths(rng, mean, normal, spread=0.5):
    """Lognormal lengths of this mean and spread (as a share of it) from standard normal numbers."""
    sd = np.sqrt(np.log(1 + spread**2))
    return np.exp(np.log(mean) - sd**2 / 2 + sd * normal).astype(int) + 1


def judged(rng, share, effect, means, N):
    """Made-up judgements whose win rate at equal length is `share`; length adds at most `effect` to the log-odds."""
    ours, theirs = (lengths(rng, mean, rng.normal(size=N)) for mean in means)
    gap = ours - theirs
    with np.errstate(divide="ignore"):
        logit = np.log(share) - np.log1p(-share) + effect * np.tanh(gap / gap.std(ddof=1))
    return (rng.random(N) < 1 / (1 + np.exp(-logit))).astype(float), texts(ours), texts(theirs)


SHARES = [0, 0.01, 0.05, 0.5, 0.95, 0.99, 1]


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("means", [(500, 500), (400, 900), (2000, 400)], ids=str)
@pytest.mark.parametrize("effect", [0, 1, 2])
def test_every_win_rate_is_found_at_every_gap_of_lengths(share, means, effect):
    rng, rates = np.random.default_rng(0), []
    for _ in range(16 if 0 < share < 1 else 1):
        preference, ours, theirs = judged(rng, share, effect, means, 800)
        rates.append(length_controlled(preference, ours, theirs).mean())
    other = length_controlled(1 - preference, theirs, ours).mean()
    assert rates[-1] + other == pytest.approx(1, abs=1e-12)
    error = 2 * np.std(rates) / np.sqrt(len(rates))
    assert abs(np.mean(rates) - share) < 0.02 + error and (share not in (0, 1) or set(rates) == {share})


@pytest.mark.parametrize("share", [0.01, 0.05, 0.5, 0.95, 0.99])
@pytest.mark.parametrize("means", [(500, 500), (400, 900), (2000, 400), (400, 2000), (8000, 400), (400, 8000)], ids=str)
@pytest.mark.parametrize("effect, most", [(1, 0.025), (2, 0.04)])
def test_the_prior_alone_moves_little(share, means, effect, most):
    """The judge's probabilities in place of its judgements, so that nothing is left to chance."""
    rng = np.random.default_rng(0)
    _, ours, theirs = judged(rng, share, effect, means, 800)
    gap = np.array([len(a) - len(b) for a, b in zip(ours, theirs)])
    logit = np.log(share) - np.log1p(-share) + effect * np.tanh(gap / gap.std(ddof=1))
    assert length_controlled(1 / (1 + np.exp(-logit)), ours, theirs).mean() == pytest.approx(share, abs=most)


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("gap", [-400, 50, 5000])
def test_a_gap_that_hardly_varies_leaves_the_win_rate(share, gap):
    """No pair is near equal length, and nothing says what length adds."""
    rng = np.random.default_rng(0)
    ours, theirs = (texts(5000 + shift + rng.normal(0, abs(gap) / 10, 800)) for shift in (gap, 0))
    preference = rng.permutation(np.arange(800) < 800 * share).astype(float)
    assert length_controlled(preference, ours, theirs).mean() == pytest.approx(share, abs=0.01)


@pytest.mark.parametrize("wins", range(21))
def test_few_wins_of_few_pairs_are_alike_for_both_sides(wins):
    rng = np.random.default_rng(0)
    ours, theirs = (texts(rng.integers(10, 300, 20)) for _ in range(2))
    preference = rng.permutation(np.arange(20) < wins).astype(float)
    one, other = length_controlled(preference, ours, theirs), length_controlled(1 - preference, theirs, ours)
    assert one + other == pytest.approx(np.ones(20), abs=1e-12) and abs(one.mean() - wins / 20) < 0.2


@pytest.mark.parametrize("gap", [0, 1, 700])
def test_one_length_for_all_leaves_the_win_rate(gap):
    """Nothing says what length adds; least of all that the win rate is due to it."""
    preference = np.array([1.0] * 3 + [0.5] * 4 + [0.0] * 9)
    rate = length_controlled(preference, ["x" * (100 + gap)] * 16, ["y" * 100] * 16)
    assert rate.mean() == pytest.approx(preference.mean(), abs=1e-6)


def test_a_length_that_decides_alone_has_an_answer():
    ours, theirs = ["xxx"] * 9 + ["x"] * 9, ["xx"] * 18
    assert length_controlled(np.repeat([1.0, 0.0], 9), ours, theirs).mean() == pytest.approx(0.5, abs=1e-9)


# alpaca_eval's published fits of weak models on its leaderboard, not among those on which the prior was tuned: what
# length, difficulty and the model add to the log-odds; mean length; length-controlled win rate in per cent
WEAK = {
    "alpaca-7b_concise": (2.099, 0.895, -3.882, 351, 4.47),
    "pythia-12b-mix-sft": (1.800, 0.972, -4.094, 913, 4.22),
    "falcon-40b-instruct": (1.885, 0.965, -3.716, 662, 5.61),
    "vicuna-7b": (1.756, 0.996, -3.619, 1044, 6.28),
    "alpaca-farm-ppo-human": (1.964, 1.048, -3.680, 803, 6.42),
    "guanaco-7b": (1.577, 0.896, -4.412, 1364, 2.87),
}


def weak_model(rng, length, difficulty, model, mean, N=805):
    """Judgements of a model with such a fit against gpt-4's 2,049 characters, which are fewer for easy instructions."""
    ease, own, rest = rng.normal(size=(3, N))
    reference = -0.4 * ease + np.sqrt(1 - 0.4**2) * rest
    ours, theirs = lengths(rng, mean, 0.3 * reference + np.sqrt(1 - 0.3**2) * own, 0.6), lengths(rng, 2049, reference)
    gap = ours - theirs
    logit = model + difficulty * (1.85 * ease - 0.31) + length * np.tanh(gap / gap.std(ddof=1))
    return (rng.random(N) < 1 / (1 + np.exp(-logit))).astype(float), texts(ours), texts(theirs)


def test_weak_models_stand_where_the_leaderboard_has_them():
    """Where they hardly ever write as much as the reference, and win least where it writes most."""
    rng = np.random.default_rng(0)
    gaps = [
        100 * np.mean([length_controlled(*weak_model(rng, *fit)).mean() for _ in range(8)]) - wanted
        for *fit, wanted in WEAK.values()
    ]
    assert np.abs(gaps).mean() < 2, gaps


def test_equal_lengths_leave_the_win_rate():
    rng = np.random.default_rng(0)
    preference = rng.random(100)
    assert length_controlled(preference, ["x"] * 100, ["y"] * 100).mean() == pytest.approx(preference.mean(), abs=1e-3)


def test_what_was_not_judged_is_predicted_and_teaches_nothing():
    preference, ours, theirs, difficulty, _ = annotations(0)
    known = np.where(np.isnan(preference), 0.5, preference)
    known[:20] = np.nan
    rate = length_controlled(known, ours, theirs, difficulty)
    assert ((rate > 0) & (rate < 1)).all() and len(rate) == 200
    assert rate[:20].std() > 0


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


@pytest.mark.parametrize("value", [None, float("nan"), 3, b"x", ["x"]])
@pytest.mark.parametrize("side", ["ours", "theirs"])
def test_a_response_that_is_no_text_is_refused(value, side):
    given = {"ours": ["x"] * 10, "theirs": ["xy"] * 10}
    given[side][7] = value
    with pytest.raises(InputError, match=rf"{side}\[7\] is .*wanted a text"):
        length_controlled(np.linspace(0, 1, 10), **given)
