"""The inner loop on a task small enough to train in a second."""

from dataclasses import replace

import pandas as pd
import pytest
import torch
from conftest import PROMPTS

from dense_rlhf import ppo
from dense_rlhf.attribution import attribute
from dense_rlhf.config.params import AttributionParams, DataParams, PolicyParams, PPOParams, RewardParams, RunParams
from dense_rlhf.data import Dataset
from dense_rlhf.models.language_models import LanguageModel
from dense_rlhf.models.learned_judge import LearnedJudge
from dense_rlhf.models.word_judge import AdditiveJudge
from dense_rlhf.shaping.rewards import shape_rewards
from dense_rlhf.training.baselines import best_of_n
from dense_rlhf.training.evaluate import evaluate
from dense_rlhf.training.inner_loop import Recipe, train_policy
from dense_rlhf.training.outer_loop import Objective
from dense_rlhf.training.task import Task, _reference_scores, _second_judge, load_task
from dense_rlhf.types import InputError, LabelledText, PreferencePair, RewardShape

PARAMS = PPOParams(updates=3, rollouts=4, max_new_tokens=6, minibatch=2, lr=1e-2)
EXPLAIN = AttributionParams(lime_samples=8)
SPARSE = RewardShape(("terminal",), (1.0,))
MIXED = RewardShape(("shap", "uniform", "terminal"), (0.5, 0.25, 0.25), "signed")


@pytest.fixture(scope="module")
def task(tokenizer, reference, reward_model):
    text = [LabelledText("the film was good", 1)]
    data = Dataset("inline", "r0", text, text, PROMPTS, PROMPTS[:4], text)
    judge = AdditiveJudge("gold", {chr(c): c / 1000 for c in range(97, 123)})
    language_model = LanguageModel(reference.lm, tokenizer, "m0")
    return Task(data, language_model, reference, reward_model, judge, judge, PolicyParams())


def test_every_judged_table_shows_repetition_and_a_second_judge_where_there_is_one(task, tokenizer):
    class Second:
        params = RewardParams()

        def scores(self, prompts, texts):
            return [len(prompt) + len(text) / 1000 for prompt, text in zip(prompts, texts, strict=True)]

    judged = evaluate(task, task.reference, PROMPTS[:4], PARAMS, 0)
    assert [*judged] == ["prompt", "response", "proxy", "gold", "distinct", "repetition", "kl"]
    both = replace(task, second=Second())
    read = [len(prompt) + len(text) / 1000 for prompt, text in zip(PROMPTS[:4], judged["response"])]
    assert evaluate(both, task.reference, PROMPTS[:4], PARAMS, 0)["second"].tolist() == read
    assert both.key != task.key
    assert {"gold", "distinct", "repetition", "second"} <= set(
        train_policy(both, Recipe(SPARSE, PARAMS, EXPLAIN, 0)).history
    )


def test_the_second_judge_is_taught_while_another_process_trains_the_proxy(reward_model, monkeypatch, few_reviews):
    helps = []

    def load(*_, meanwhile, **__):
        helps.append(meanwhile)
        return reward_model

    monkeypatch.setattr("dense_rlhf.training.task.load_reward_model", load)
    monkeypatch.setattr("dense_rlhf.training.task._calibrated", lambda task, *_: task)
    monkeypatch.setattr(LearnedJudge, "model", property(lambda judge: ("taught", len(judge.examples))))
    task = load_task(RunParams(data=DataParams(path=str(few_reviews))))
    assert helps[0]() == ("taught", len(task.second.examples))


def test_pairs_have_a_second_judge_of_the_gold_pairs_where_the_proxy_starts_from_the_policy(tokenizer, reference):
    pairs = {name: [PreferencePair("the film", f"was {name}", "was bad")] * 2 for name in ("reward", "gold", "test")}
    data = Dataset("inline", "r0", **pairs, train_prompts=PROMPTS, validation_prompts=PROMPTS)
    policy = LanguageModel(reference.lm, tokenizer, "m0")
    proxy = RewardParams(name="policy", layers=2, steps=7, batch=2, window=32, labels=0.5, seed=5)
    judge = _second_judge(data, policy, proxy)
    assert judge.examples == data.gold and judge.policy is policy
    assert judge.params == replace(proxy, layers=1, labels=1.0, seed=1)
    assert _second_judge(data, policy, RewardParams()) is None  # from scratch it would learn nothing of a few pairs


# ---------------------------------------------------------------------------------------------------- inner loop


@pytest.mark.parametrize("shape", [SPARSE, MIXED], ids=["sparse", "mixed"])
def test_same_seed_same_history(task, shape):
    first, again, other = (train_policy(task, Recipe(shape, PARAMS, EXPLAIN, seed)).history for seed in (0, 0, 1))
    pd.testing.assert_frame_equal(first, again, check_exact=True)
    assert not first["proxy"].equals(other["proxy"])


def test_history_holds_a_row_an_update(task):
    trained = train_policy(task, Recipe(MIXED, PARAMS, EXPLAIN, 0))
    history = trained.history
    assert history["update"].tolist() == [0, 1, 2] and history[["proxy", "gold", "kl"]].notna().all(axis=None)
    assert history["kl"][0] == pytest.approx(0, abs=1e-5) and history["first_ratio_error"].max() < 1e-4
    assert {"ess/shap", "ess/terminal", "flipped", "residual", "explained_variance"} <= set(history)
    assert history["residual"].max() < 1e-5
    assert trained.seconds["update"].tolist() == [0, 1, 2]
    assert (trained.seconds.drop(columns="update") > 0).all(axis=None)


def test_training_moves_the_policy_and_not_the_reference(task):
    before = {name: p.clone() for name, p in task.reference.named_parameters()}
    trained = train_policy(task, Recipe(SPARSE, PARAMS, EXPLAIN, 0))
    assert all(torch.equal(before[name], p) for name, p in task.reference.named_parameters())
    assert not torch.equal(trained.policy.lm.lm_head.weight, task.language_model.model.lm_head.weight)
    assert torch.equal(task.fresh_policy().lm.lm_head.weight, task.language_model.model.lm_head.weight)


def test_the_kl_coefficient_follows_the_kl_of_every_update_and_the_share_of_clipped_rewards_is_kept(task):
    params = replace(PARAMS, kl_target=0.5, kl_horizon=8.0, scale_rewards=True, clip_rewards=0.5)
    history, wanted = train_policy(task, Recipe(SPARSE, params, EXPLAIN, 0)).history, params.kl_coef
    for kl, coefficient in zip(history["kl"], history["kl_coef"]):
        assert coefficient == pytest.approx(wanted)
        wanted *= 1 + min(max(kl / 0.5 - 1, -0.2), 0.2) * 4 / 8
    assert history["kl_coef"].nunique() == 3 and history["rewards_clipped"].max() > 0


def test_a_source_of_weight_zero_is_not_computed_and_changes_nothing(task, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "dense_rlhf.training.inner_loop.attribute", lambda *args: asked.append(list(args[2])) or attribute(*args)
    )
    among = train_policy(task, Recipe(RewardShape(("shap", "terminal"), (0.0, 1.0)), PARAMS, EXPLAIN, 0)).history
    assert asked == [["terminal"]] * 3
    pd.testing.assert_frame_equal(
        among, train_policy(task, Recipe(SPARSE, PARAMS, EXPLAIN, 0)).history, check_exact=True
    )


def test_the_shape_terminal_trains_as_sparse_ppo_bit_for_bit(task):
    """The same rollout, once with a hand-made sparse reward and once through `shape_rewards`."""
    rollout = task.rollout(task.reference, PROMPTS, PARAMS, seed=0)
    sparse = torch.zeros_like(rollout.values)
    sparse[torch.arange(len(sparse)), rollout.mask.sum(-1) - 1] = rollout.scores
    shaped = shape_rewards(rollout, attribute(task.reward_model, rollout, ["terminal"], EXPLAIN), SPARSE)
    weights = []
    for rewards in (sparse, shaped):
        torch.manual_seed(0)
        learner = ppo.make_learner(task.fresh_policy(), PARAMS, seed=0)
        ppo.update(learner, rollout, ppo.token_rewards(rollout, rewards, PARAMS), PARAMS)
        weights.append(learner.policy.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_evaluate_judges_one_response_a_prompt(task):
    table = evaluate(task, task.reference, PROMPTS, PARAMS, seed=0)
    assert table["prompt"].tolist() == PROMPTS
    assert table["gold"].tolist() == [task.gold.score(text) for text in table["response"]]
    assert table["kl"].abs().max() < 1e-5 and table["proxy"].nunique() > 1
    pd.testing.assert_frame_equal(table, evaluate(task, task.reference, PROMPTS, PARAMS, seed=0), check_exact=True)


def test_the_scores_of_the_reference_are_sampled_once(task, tmp_path, monkeypatch):
    monkeypatch.setenv("DENSE_RLHF_CACHE", str(tmp_path))
    alone, probed = (_reference_scores(task, PARAMS, probe) for probe in (False, True))
    assert len(alone["scores"]) == len(PROMPTS) and torch.equal(alone["scores"], probed["scores"])
    monkeypatch.setattr(Task, "scored_responses", None)
    again = _reference_scores(replace(task), replace(PARAMS, lr=0.5), True)
    assert again.keys() == {"scores", "weight", "bias"} and all(
        torch.equal(again[name], probed[name]) for name in again
    )
    for other, params in (
        (task, replace(PARAMS, temperature=0.5)),
        (replace(task, data=replace(task.data, train_prompts=PROMPTS[1:])), PARAMS),
    ):
        with pytest.raises(TypeError):
            _reference_scores(other, params, True)


def test_the_same_answers_are_judged_once_for_all_runs(task, tmp_path, monkeypatch):
    fresh = evaluate(task, task.reference, PROMPTS, PARAMS, seed=0)
    first = evaluate(task, task.reference, PROMPTS, PARAMS, 0, tmp_path)
    steeper = replace(PARAMS, lr=0.5)  # is no part of an answer
    with monkeypatch.context() as patch:
        patch.setattr(Task, "rollout", None)
        read = evaluate(replace(task), task.reference, PROMPTS, steeper, 0, tmp_path)
    for table in (first, read):
        pd.testing.assert_frame_equal(fresh, table, check_exact=True)
    other = train_policy(task, Recipe(SPARSE, PARAMS, EXPLAIN, 0)).policy
    for given in (
        (other, PROMPTS, PARAMS, 0),
        (task.reference, PROMPTS, PARAMS, 1),
        (task.reference, PROMPTS[1:], PARAMS, 0),
    ):
        pd.testing.assert_frame_equal(evaluate(task, *given), evaluate(task, *given, tmp_path), check_exact=True)
    assert len(list((tmp_path / "answers").glob("[!.]*"))) == 4
    judge = replace(task, gold=AdditiveJudge("gold", {"film": 1.0}))
    assert evaluate(judge, task.reference, PROMPTS, PARAMS, 0, tmp_path)["gold"].tolist() != fresh["gold"].tolist()


@pytest.mark.parametrize(
    "prompts", [[], None, "a single text", [None], [7]], ids=["none", "null", "text", "no text", "7"]
)
@pytest.mark.parametrize(
    "use",
    [
        lambda task, prompts: task.rollout(task.reference, prompts, PARAMS, 0),
        lambda task, prompts: evaluate(task, task.reference, prompts, PARAMS, 0),
        lambda task, prompts: best_of_n(task, prompts, PARAMS, 0),
        lambda task, prompts: Objective(prompts, len),
    ],
    ids=["rollout", "evaluate", "best of n", "objective"],
)
def test_what_is_no_list_of_prompts_is_refused_in_one_line(task, use, prompts):
    with pytest.raises(InputError, match="prompt"):
        use(task, prompts)
