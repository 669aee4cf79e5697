"""The outer loop: what is searched, what a trial is worth, when it ends early, what is kept of it."""

import itertools
import json
import math
from dataclasses import fields, replace
from functools import partial

import kill_points
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import PROMPTS
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import pearsonr
from transformers import AutoModelForCausalLM, AutoTokenizer

from dense_rlhf import ppo
from dense_rlhf.attribution import attribute
from dense_rlhf.bayesopt.ledger import Halfway, trials
from dense_rlhf.bayesopt.search import STRATEGIES, Search
from dense_rlhf.bayesopt.space import Space
from dense_rlhf.config import params
from dense_rlhf.config.params import AttributionParams, BOParams, PPOParams
from dense_rlhf.files import append_line, read_ledger, seal
from dense_rlhf.shaping.rewards import shape_rewards
from dense_rlhf.training import inner_loop, outer_loop
from dense_rlhf.training.evaluate import evaluate
from dense_rlhf.training.inner_loop import Recipe, Session, TrainedPolicy, train_policy
from dense_rlhf.training.outer_loop import OBJECTIVES, Objective, search_shape, search_space, shape_at
from dense_rlhf.types import InputError, RewardShape

PARAMS = PPOParams(updates=3, rollouts=4, max_new_tokens=6, minibatch=2, lr=1e-2)
EXPLAIN = AttributionParams(lime_samples=8)
MIXED = RewardShape(("shap", "uniform", "terminal"), (0.5, 0.25, 0.25), "signed")
PAIR = RewardShape(("shap", "terminal"), (0.5, 0.5))
BO = BOParams(trials=6, initial=1, updates=2)  # 4 anchors, one Sobol point, one of the model's


@pytest.fixture(scope="module")
def task():
    return kill_points.make_task()


def search(task, ledger, bo=BO, shape=MIXED, params=PARAMS, prompts=PROMPTS[:4], values=None):
    objective = Objective(tuple(prompts), values) if values else Objective.of(bo, prompts)
    return search_shape(task, Recipe(shape, params, EXPLAIN, 1), bo, objective, ledger)


@pytest.fixture(scope="module")
def unbroken(task, tmp_path_factory):
    path = tmp_path_factory.mktemp("search") / "trials.jsonl"
    return search(task, path), path


def begun(task, shape, seed):
    """The first two updates of a training of three."""
    session = Session(until=lambda history: len(history) == 2)
    return train_policy(task, Recipe(shape, PARAMS, EXPLAIN, seed), session)


def proposals(path):
    return [(row["point"], row["seed"]) for row in trials(path)]


# ---------------------------------------------------------------------------------------------------- what is searched


def test_a_point_of_a_plain_search_is_the_weights():
    assert search_space(MIXED, BO) == Space(3)
    assert shape_at(MIXED, BO, (0.2, 0.3, 0.5)) == replace(MIXED, weights=(0.2, 0.3, 0.5))


COMBINED = list(itertools.product({"fixed": 0, "shared": 1, "each": 3}.items(), (False, True), (0, 1, 2)))


@pytest.mark.parametrize("temperatures, signs, F", COMBINED)
def test_every_number_of_a_point_is_where_it_belongs(temperatures, signs, F):
    """Distinct numbers go in; each is found once, in its place, and nothing else of the shape has changed."""
    (temperature, n), names = temperatures, ("position", "surprisal")[:F]
    bo = replace(BO, temperature=temperature, temperature_low=0.1, temperature_high=10.0, signs=signs, features=names)
    shape = RewardShape(("a", "b", "c"), (1.0, 0.0, 0.0), temperature=0.7)
    space = search_space(shape, bo)
    low, high = math.log(0.1), math.log(10.0)
    assert space.bounds == ((low, high),) * n + ((0, 1),) * signs + ((-2.0, 2.0),) * (2 * F)
    assert space.d == 3 and space.switches == ((n,) if signs else ())
    logs, slopes = [0.1, 0.2, 0.3][:n], [0.01 * (i + 1) for i in range(2 * F)]
    for sign in (0.0, 1.0)[: signs + 1]:
        found = shape_at(shape, bo, (0.2, 0.3, 0.5, *logs, *[sign] * signs, *slopes))
        exps = tuple(math.exp(log) for log in logs)
        assert found.temperature == {"fixed": 0.7, "shared": exps[:1] and exps[0], "each": exps}[temperature]
        assert found.normalise == ("signed" if signs and sign else "softmax") and found.weights == (0.2, 0.3, 0.5)
        assert found.features == names and found.sources == shape.sources
        assert found.slopes == ((tuple(slopes[:F]), tuple(slopes[F:]), (0.0,) * F) if F else ())


@pytest.mark.parametrize("weights", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0.5, 0.5), (0.5, 0, 0.5), (0.2, 0.8, 0)])
def test_idle_numbers_change_no_reward(weights, reward_model, rollout):
    shape = RewardShape(("shap", "lime", "leave_one_out"), (1.0, 0.0, 0.0))
    bo = replace(BO, temperature="each", features=("position", "surprisal"))
    space, found = search_space(shape, bo), attribute(reward_model, rollout, list(shape.sources), EXPLAIN)
    for seed in range(5):
        point = weights + space.random(np.random.default_rng(seed))[3:]
        settled = space.settled(point)
        assert settled != point and settled[:3] == weights
        assert torch.equal(*(shape_rewards(rollout, found, shape_at(shape, bo, p)) for p in (point, settled)))


def test_no_number_is_idle_between():
    shape = replace(MIXED, normalise="softmax")
    space = search_space(shape, replace(BO, temperature="each", features=("position",)))
    within = (0.2, 0.3, 0.5, 0.1, 0.2, 0.3, 1.0, -1.0)
    assert space.settled(within) == within


@settings(max_examples=10)
@given(
    st.builds(
        BOParams,
        temperature=st.sampled_from(params.TEMPERATURES),
        signs=st.booleans(),
        slope=st.just(1.5),
        features=st.sampled_from([(), ("position",), ("length", "ending")]),
    ),
    st.integers(0, 99),
)
def test_every_point_of_the_space_is_a_shape(bo, seed):
    space = search_space(PAIR, bo)
    for point in [*space.anchors(), *space.sobol(3, seed)]:
        shape = shape_at(PAIR, bo, point)
        if bo.temperature != "fixed":
            low, high = bo.temperature_low * (1 - 1e-9), bo.temperature_high * (1 + 1e-9)
            assert all(low <= shape.temperature_of(source) <= high for source in PAIR.sources)
        assert all(abs(slope) <= 1.5 for row in shape.slopes for slope in row)


def test_temperatures_that_change_nothing_are_not_searched():
    for normalise in ("signed", "sum"):
        with pytest.raises(InputError, match=f"bo.temperature is 'each' for an arm with normalise '{normalise}'"):
            search_space(replace(PAIR, normalise=normalise), replace(BO, temperature="each"))
    search_space(replace(PAIR, normalise="signed"), replace(BO, temperature="each", signs=True))


def test_parameters_name_what_the_registries_hold():
    assert set(params.STRATEGIES) == set(STRATEGIES) and set(params.OBJECTIVES) == set(OBJECTIVES)


# ---------------------------------------------------------------------------------------------------- what it is worth

JUDGED = pd.DataFrame({"proxy": [1.0, 2.0, 4.0], "gold": [0.5, 0.0, -1.0], "kl": [2.0, 0.0, 10.0]})


@pytest.mark.parametrize(
    "name, wanted", [("proxy", [1.0, 2.0, 4.0]), ("gold", [0.5, 0.0, -1.0]), ("penalised", [0.5, 2.0, 1.5])]
)
def test_objectives_are_a_number_a_prompt(name, wanted):
    assert OBJECTIVES[name](replace(BO, kl_weight=0.25), JUDGED).tolist() == wanted


def test_the_ledger_holds_what_a_trial_was_and_how_to_repeat_it(task, unbroken):
    (shape, found), path = unbroken
    rows = trials(path)
    assert [row["status"] for row in rows] == ["observed"] * 6 and len({row["point"] for row in rows[:5]}) == 5
    before = Search(Space(3), initial=1, seed=1)
    for row in rows[:5]:
        before.observe(row["point"], row["value"], row["standard_error"])
    assert rows[5]["point"] == before.suggest()  # the model's, which may try a point again
    assert [row["seed"] for row in rows] == [1001, 2001, 3001, 4001, 5001, 6001]
    assert found.values == [row["value"] for row in rows] and found.errors == [row["standard_error"] for row in rows]
    assert found.points[:4] == Space(3).anchors() and shape == replace(MIXED, weights=found.incumbent()[0])
    row = rows[5]
    trained = begun(task, replace(MIXED, weights=row["point"]), row["seed"])
    judged, before = (evaluate(task, policy, PROMPTS[:4], PARAMS, 1) for policy in (trained.policy, task.reference))
    scores = judged["proxy"].to_numpy(dtype=float)
    assert row["value"] == pytest.approx(sum(scores) / 4, rel=1e-12)
    own = 1 - pearsonr(scores, before["proxy"].to_numpy(dtype=float)).statistic  # what other weights do not share
    assert row["standard_error"] == pytest.approx(math.sqrt(own * sum((scores - scores.mean()) ** 2) / 3 / 4), rel=1e-9)
    for name in ("proxy", "gold", "kl"):
        assert row[name] == pytest.approx(judged[name].mean(), rel=1e-6)
    history = trained.history
    assert row["history"] == history["proxy"].tolist() and row["rung"] == history["proxy"][0] and row["updates"] == 2
    paid = {source for source, weight in zip(MIXED.sources, row["point"]) if weight}
    assert row["ess"] == {source: history[f"ess/{source}"].mean() for source in paid}
    assert rows[0]["ess"].keys() == {"shap"}


def test_a_trial_is_the_first_part_of_the_whole_training(task, unbroken, tmp_path):
    row = trials(unbroken[1])[0]
    whole = train_policy(task, Recipe(replace(MIXED, weights=row["point"]), PARAMS, EXPLAIN, row["seed"])).history
    assert row["history"] == whole["proxy"].tolist()[:2] and len(whole) == 3
    with pytest.raises(InputError, match="bo.updates is 4, wanted at most ppo.updates = 3"):
        search(task, tmp_path / "trials.jsonl", replace(BO, updates=4))


def test_what_all_weights_share_on_the_same_prompts_is_no_part_of_the_error(task, tmp_path):
    """A value that the reference's answers have too says nothing of the weights; one of their own says all."""
    shared, own = np.array([0.0, 1.0, 2.0, 3.0]), iter(range(99))

    def values(judged, scale):
        return shared + scale * np.roll([1.0, -1.0, 1.0, -1.0], next(own)) * np.arange(1.0, 5.0)

    for scale, low, high in ((0.0, 0.0, 1e-6), (1e-3, 1e-6, 0.1), (10.0, 5.0, 30.0)):
        path = tmp_path / f"{scale}.jsonl"
        search(task, path, replace(BO, trials=2, updates=1), values=partial(values, scale=scale))
        assert all(low <= (row["standard_error"] or 0.0) <= high for row in trials(path)), scale


def test_another_objective_another_value(task, unbroken, tmp_path):
    def length_less_kl(judged):
        return judged["response"].str.len() - judged["kl"]

    bo, first = replace(BO, trials=2), trials(unbroken[1])[0]
    search(task, tmp_path / "own.jsonl", bo, values=length_less_kl)
    search(task, tmp_path / "gold.jsonl", replace(bo, objective="gold"))
    own, gold = (trials(tmp_path / f"{name}.jsonl")[0] for name in ("own", "gold"))
    assert gold["value"] == pytest.approx(first["gold"]) and gold["proxy"] == first["proxy"]
    assert own["value"] + first["kl"] == pytest.approx(round(4 * (own["value"] + first["kl"])) / 4, abs=1e-5)
    with pytest.raises(InputError, match="another search"):
        search(task, tmp_path / "own.jsonl", bo)


def test_an_objective_that_gives_one_number_is_refused(task, tmp_path):
    with pytest.raises(InputError, match=r"objective gave shape \(\), wanted a number for each of 4"):
        search(task, tmp_path / "trials.jsonl", values=lambda judged: judged["proxy"].mean())
    with pytest.raises(InputError, match="1 held-out prompts give no standard error"):
        search(task, tmp_path / "trials.jsonl", prompts=PROMPTS[:1])


def test_a_trial_of_no_number_or_one_that_diverged_is_recorded_and_not_observed(task, tmp_path, monkeypatch):
    def diverges(task, recipe, session):
        if recipe.seed == 2001:
            raise ppo.Diverged({"loss": math.nan}, None)
        return train_policy(task, recipe, session)

    monkeypatch.setattr("dense_rlhf.training.outer_loop.train_policy", diverges)
    numbers = itertools.chain([1.0, 1.5, math.nan], itertools.repeat(2.0))  # the second is the reference's
    path = tmp_path / "trials.jsonl"
    _, found = search(task, path, replace(BO, updates=1), values=lambda judged: [0.0, 1.0, 2.0, next(numbers)])
    rows = trials(path)
    assert [row["status"] for row in rows] == ["observed", "failed", "failed"] + ["observed"] * 3
    assert rows[1]["reason"] == "PPO met a number that is not finite: loss; lower ppo.lr or look at the rewards"
    assert rows[2]["reason"].startswith("its value is nan") and len(found.values) == 4
    assert [row["rng"]["pending"] for row in rows] == [[], [], [1], [1, 2], [1, 2], [1, 2]]
    assert len({row["point"] for row in rows}) == 6 and rows[0]["value"] == 1.0


def test_diverging_training_leaves_its_rollout(task, tmp_path, monkeypatch):
    def diverges(learner, rollout, rewards, params):
        raise ppo.Diverged({"a": math.inf}, rollout)

    monkeypatch.setattr(ppo, "update", diverges)
    with pytest.raises(InputError, match="3 trials failed in a row, the last: update 0: .*002/failure.safe"):
        search(task, tmp_path / "trials.jsonl")
    assert (tmp_path / "trials.d" / "001" / "failure.json").exists()


# ---------------------------------------------------------------------------------------------------- going on


@pytest.mark.parametrize("lines, cut", [(7, 0), (15, 30), (16, 0), (18, 10)])
def test_a_resumed_search_ends_as_an_unbroken_one(task, unbroken, tmp_path, lines, cut):
    """Between two trials, in the middle of a proposal, of a trial that ran, and of the last result."""
    text = "".join(unbroken[1].read_text().splitlines(keepends=True)[:lines])
    path = tmp_path / "trials.jsonl"
    path.write_text(text[: len(text) - cut])
    shape, found = search(task, path)
    assert proposals(path) == proposals(unbroken[1]) and shape == unbroken[0][0]
    assert found.values == unbroken[0][1].values and found.errors == unbroken[0][1].errors


def test_a_trial_goes_on_from_its_checkpoint(task, unbroken, tmp_path, monkeypatch):
    path, improve, steps = tmp_path / "trials.jsonl", inner_loop._improve, []

    def dies(*arguments):
        steps.append(arguments[4])
        if len(steps) == 2:
            raise KeyboardInterrupt
        return improve(*arguments)

    monkeypatch.setattr("dense_rlhf.training.inner_loop._improve", dies)
    often = replace(PARAMS, checkpoint_every=1)
    with pytest.raises(KeyboardInterrupt):
        search(task, path, params=often)
    assert list((tmp_path / "trials.d" / "000").glob("checkpoint-000001"))
    search(task, path, replace(BO, trials=2), params=often)
    assert steps[:4] == [0, 1, 1, 0] and not list((tmp_path / "trials.d").glob("*/checkpoint-*"))
    assert [row["value"] for row in trials(path)] == unbroken[0][1].values[:2]


def test_a_ledger_of_other_settings_raises_and_of_fewer_trials_goes_on(task, unbroken, tmp_path):
    before = unbroken[1].read_bytes()
    others = [
        {"shape": replace(MIXED, sources=("lime", "uniform", "terminal"))},
        {"prompts": PROMPTS[1:5]},
        {"bo": replace(BO, objective="gold")},
        {"params": replace(PARAMS, lr=1e-3)},
        {"params": replace(PARAMS, updates=9)},
        {"task": replace(task, policy=params.PolicyParams(trainable_layers=1))},
    ]
    for other in others:
        with pytest.raises(InputError, match="another search"):
            search(**{"task": task, "ledger": unbroken[1]} | other)
    assert unbroken[1].read_bytes() == before
    path = tmp_path / "trials.jsonl"
    append_line(path, read_ledger(unbroken[1])[0])
    search(task, path, replace(BO, trials=3), params=replace(PARAMS, checkpoint_every=7))
    assert proposals(path) == proposals(unbroken[1])[:3]


# ---------------------------------------------------------------------------------------------------- what is kept


def weights_of(policy):
    return {name: weight.clone() for name, weight in policy.lm.state_dict().items()}


def test_the_incumbents_policy_is_kept_and_found_again(task, unbroken):
    (shape, found), path = unbroken
    kept = json.loads((path.parent / "policy" / "trial.json").read_text())
    row = trials(path)[kept["trial"]]
    assert tuple(kept["point"]) == row["point"] == found.incumbent()[0] and kept["seed"] == row["seed"]
    trained = begun(task, shape, row["seed"])
    read = AutoModelForCausalLM.from_pretrained(path.parent / "policy").state_dict()
    wanted = {name: w for name, w in weights_of(trained.policy).items() if name in read}
    assert len(wanted) > 10 and all(torch.equal(read[name], w) for name, w in wanted.items())
    assert AutoTokenizer.from_pretrained(path.parent / "policy").get_vocab() == task.tokenizer.get_vocab()
    assert not list(path.parent.glob(".policy*")) and not list(path.parent.glob("trials.d/*/checkpoint-*"))


def test_a_finished_search_trains_nothing(task, unbroken, monkeypatch):
    monkeypatch.setattr("dense_rlhf.training.outer_loop.train_policy", None)
    shape, found = search(task, unbroken[1])
    assert shape == unbroken[0][0] and len(found.values) == 6


def test_a_policy_that_another_took_the_place_of_is_trained_again(task, unbroken, tmp_path, monkeypatch):
    """None is there, or another trial's, or a damaged one; all end in the bytes that the unbroken search left."""
    path = tmp_path / "trials.jsonl"
    path.write_bytes(unbroken[1].read_bytes())
    best, asked = json.loads((unbroken[1].parent / "policy" / "trial.json").read_text()), []

    def counted(task, recipe, session):
        asked.append(recipe.seed)
        return train_policy(task, recipe, session)

    monkeypatch.setattr("dense_rlhf.training.outer_loop.train_policy", counted)
    search(task, path)
    kept = tmp_path / "policy" / "trial.json"
    kept.write_text(json.dumps(best | {"trial": best["trial"] + 1}))
    seal(kept.parent)
    search(task, path)
    weights = kept.with_name("model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    with pytest.warns(UserWarning, match="model.safetensors is not as it was written, so the policy is trained again"):
        search(task, path)
    assert asked == [best["seed"]] * 3 and json.loads(kept.read_text()) == best
    for name in ("model.safetensors", "tokenizer.json", "trial.json"):
        assert (tmp_path / "policy" / name).read_bytes() == (unbroken[1].parent / "policy" / name).read_bytes()


def test_the_policy_is_saved_when_its_trial_takes_the_lead(task, tmp_path, monkeypatch):
    """Every trial's point leads in turn but the third's; nothing is trained twice."""

    def incumbent(found):
        return found.points[-2 if len(found.points) == 3 else -1], 0.0, 1.0

    monkeypatch.setattr(Search, "incumbent", incumbent)
    saved, asked = [], []
    monkeypatch.setattr("dense_rlhf.training.outer_loop.save_policy", lambda policy, *_: saved.append(policy))
    monkeypatch.setattr(
        "dense_rlhf.training.outer_loop.train_policy", lambda *a: (asked.append(a[1].seed), train_policy(*a))[1]
    )
    search(task, tmp_path / "trials.jsonl", replace(BO, trials=4, updates=1))
    assert len(saved) == 2 and asked == [1001, 2001, 3001, 4001]
    assert json.loads((tmp_path / "policy" / "trial.json").read_text())["trial"] == 3


# ---------------------------------------------------------------------------------------------------- early stopping


def test_until_ends_a_training_and_leaves_it_the_same(task, tmp_path):
    whole = train_policy(task, Recipe(MIXED, PARAMS, EXPLAIN, 0))
    asked = []

    def until(rows):
        asked.append(len(rows))
        return len(rows) == 2

    short = train_policy(task, Recipe(MIXED, PARAMS, EXPLAIN, 0), Session(until=until))
    assert asked == [0, 1, 2]
    pd.testing.assert_frame_equal(short.history, whole.history[:2], check_exact=True)
    often = replace(PARAMS, checkpoint_every=1)
    for _ in range(2):  # the second finds the checkpoint of the first and ends at once
        again = train_policy(task, Recipe(MIXED, often, EXPLAIN, 0), Session(folder=tmp_path, until=until))
        pd.testing.assert_frame_equal(again.history, whole.history[:2], check_exact=True)
    on = train_policy(task, Recipe(MIXED, often, EXPLAIN, 0), Session(folder=tmp_path))
    pd.testing.assert_frame_equal(on.history, whole.history, check_exact=True)


EARLY = BOParams(trials=16, initial=4, updates=4, stop_early=True, strategy="sobol")  # 3 anchors
LONG = replace(PARAMS, updates=4)


def staged(monkeypatch, rung, end):
    """Trainings whose batches score `rung(w)` halfway, and policies that score `end(w)` at the end."""
    lengths = []

    def train(task, recipe, session):
        rows, weight = [], recipe.shape.weights[0]
        while len(rows) < recipe.ppo.updates and not (session.until and session.until(rows)):
            proxy = rung(weight) if len(rows) == 1 else -9.0
            rows.append({"update": len(rows), "proxy": proxy, "ess/shap": 0.5})
        lengths.append(len(rows))
        return TrainedPolicy(weight, pd.DataFrame(rows), pd.DataFrame())

    def judge(task, policy, prompts, params, seed):
        spread, before = np.array([-0.1, 0.1, -0.2, 0.2]), np.array([1.0, 1.0, -1.0, -1.0])  # share nothing
        proxy = before if policy is task.reference else end(policy) + spread
        return pd.DataFrame({"proxy": proxy, "gold": 0.0, "kl": 0.0})

    monkeypatch.setattr("dense_rlhf.training.outer_loop.train_policy", train)
    monkeypatch.setattr("dense_rlhf.training.outer_loop.evaluate", judge)
    monkeypatch.setattr("dense_rlhf.training.outer_loop.save_policy", lambda *_: None)
    return lengths


def test_a_stopped_trial_is_worth_what_halfway_predicts(task, tmp_path, monkeypatch):
    def end(w):
        return 2 * w + 0.3 * math.sin(9 * w)

    lengths = staged(monkeypatch, lambda w: w, end)
    path = tmp_path / "trials.jsonl"
    _, found = search(task, path, EARLY, PAIR, LONG)
    rows, stopped = trials(path), 0
    for i, row in enumerate(rows):
        before = [r for r in rows[:i] if r["status"] == "observed"]
        x, y = (np.array([r[name] for r in before]) for name in ("rung", "value"))
        low = i >= 5 and row["point"][0] < np.median(x)
        assert row["status"] == ("stopped" if low else "observed") and row["updates"] == (2 if low else 4)
        if low:
            stopped += 1
            assert pd.Series(x).corr(pd.Series(y), "spearman") == pytest.approx(row["correlation"])
            (slope, cut), covariance = np.polyfit(x, y, 1, cov=True)  # scaled by the residuals over n - 2
            residual = ((y - cut - slope * x) ** 2).sum() / (len(x) - 2)
            at = np.array([row["rung"], 1.0])
            assert row["value"] == pytest.approx(slope * row["rung"] + cut)
            assert row["standard_error"] == pytest.approx(math.sqrt(residual + at @ covariance @ at))
            assert "gold" not in row
        else:
            assert row["value"] == pytest.approx(end(row["point"][0])) and row["standard_error"] < 0.1
    assert stopped >= 3 and lengths[:16] == [row["updates"] for row in rows] and len(found.values) == 16


def test_a_stopped_incumbent_is_trained_to_its_end(task, tmp_path, monkeypatch):
    lengths = staged(monkeypatch, lambda w: w, lambda w: 2 * w)
    path = tmp_path / "trials.jsonl"
    search(task, path, EARLY, PAIR, LONG)
    stopped = next(row for row in trials(path) if row["status"] == "stopped")
    monkeypatch.setattr(Search, "incumbent", lambda found: (stopped["point"], 0.0, 1.0))
    del lengths[:]
    search(task, path, EARLY, PAIR, LONG)
    assert lengths == [4] and json.loads((tmp_path / "policy" / "trial.json").read_text())["trial"] == stopped["trial"]


@pytest.mark.parametrize("case", ["halfway tells nothing", "not asked for"])
def test_nothing_stops_where_nothing_is_predicted(task, tmp_path, monkeypatch, case):
    blind = case == "halfway tells nothing"
    staged(monkeypatch, lambda w: math.cos(40 * w) if blind else w, lambda w: w)
    search(task, tmp_path / "trials.jsonl", EARLY if blind else replace(EARLY, stop_early=False), PAIR, LONG)
    assert {row["status"] for row in trials(tmp_path / "trials.jsonl")} == {"observed"}


def test_anchors_are_never_stopped_for_their_repeats_tell_the_noise(task, tmp_path, monkeypatch):
    staged(monkeypatch, lambda w: w, lambda w: 2 * w)
    search(task, tmp_path / "trials.jsonl", replace(EARLY, replicates=3), PAIR, LONG)
    rows = trials(tmp_path / "trials.jsonl")
    assert rows[7]["point"] == (0.0, 1.0) and Halfway.of(rows[:7]).stops(0.0)
    assert {row["status"] for row in rows[:9]} == {"observed"} and any(row["status"] == "stopped" for row in rows[9:])


def test_every_parameter_of_the_search_is_in_its_key(task, tmp_path):
    """Whatever of `bo` is another makes another search, but for the number of trials."""
    other = {
        "initial": 2,
        "updates": 5,
        "anchors": False,
        "replicates": 2,
        "strategy": "sobol",
        "objective": "gold",
        "kl_weight": 0.2,
        "stop_early": True,
        "temperature": "each",
        "temperature_low": 0.02,
        "temperature_high": 2.0,
        "signs": True,
        "features": ("position",),
        "slope": 1.0,
        "trials": 7,
    }
    assert other.keys() == {field.name for field in fields(BOParams)}
    bo = replace(BO, initial=3, updates=4)
    changes = [replace(bo, **{name: value}) for name, value in other.items()]
    recipe, objective = Recipe(PAIR, PARAMS, EXPLAIN, 1), Objective.of(bo, PROMPTS)
    keys = {outer_loop._search_key(task, recipe, one, objective) for one in [bo, *changes]}
    assert len(keys) == len(other)
