"""Arms compared, and how a killed comparison resumes."""

from dataclasses import replace

import pandas as pd
import pytest
from conftest import PROMPTS
from test_task import EXPLAIN, MIXED, PARAMS, SPARSE, task  # noqa: F401

from dense_rlhf.config.params import RunParams
from dense_rlhf.evaluation import arms
from dense_rlhf.evaluation.arms import KEPT, judge_against_reference, recipes, train_arms
from dense_rlhf.evaluation.judge import length_controlled
from dense_rlhf.files import read_ledger
from dense_rlhf.training.evaluate import evaluate
from dense_rlhf.training.inner_loop import Recipe, train_policy

STUDY = RunParams(ppo=PARAMS, attribution=EXPLAIN)
SHAPES = {"mixed": MIXED, "sparse": SPARSE, "again": SPARSE}


@pytest.fixture(scope="module")
def compared(task, tmp_path_factory):  # noqa: F811
    path = tmp_path_factory.mktemp("arms") / "trainings.jsonl"
    return train_arms(task, recipes(SHAPES, STUDY, (0, 5)), PROMPTS[:4], path), path


def same(a, b):
    assert list(a.judged) == list(b.judged) and a.warnings == b.warnings
    pd.testing.assert_frame_equal(a.history, b.history, check_exact=True)
    for arm in a.judged:
        pd.testing.assert_frame_equal(pd.concat(a.judged[arm]), pd.concat(b.judged[arm]), check_exact=True)


def test_each_arm_is_trained_and_judged_as_alone(compared, task):  # noqa: F811
    trained, _ = compared
    assert list(trained.judged) == ["reference", *SHAPES] and {len(tables) for tables in trained.judged.values()} == {2}
    assert len(trained.history) == len(SHAPES) * 2 * PARAMS.updates
    for place, seed in enumerate((0, 5)):
        alone = train_policy(task, Recipe(MIXED, PARAMS, EXPLAIN, seed))
        judged = judge_against_reference(task, alone.policy, PROMPTS[:4], PARAMS, seed)
        table, before = trained.judged["mixed"][place], trained.judged["reference"][place]
        assert table["gold"].tolist() == judged["gold"].tolist() and table["win"].tolist() == judged["win"].tolist()
        assert before["gold"].tolist() == judged["reference_gold"].tolist() and not before["kl"].any()
        kept = trained.history.query("arm == 'mixed' and seed == @seed")[KEPT].reset_index(drop=True)
        pd.testing.assert_frame_equal(kept, alone.history[KEPT], check_exact=True)


def test_a_shape_of_two_names_is_trained_once(compared):
    trained, path = compared
    lines = read_ledger(path)
    assert len(lines) == 4 == len({line["key"] for line in lines}) and [line["seed"] for line in lines] == [0, 0, 5, 5]
    assert trained.judged["again"][1]["gold"].tolist() == trained.judged["sparse"][1]["gold"].tolist()


def test_a_comparison_that_was_killed_goes_on(compared, task, tmp_path, monkeypatch):  # noqa: F811
    whole, path = compared
    cut, trained = tmp_path / "cut.jsonl", []
    cut.write_bytes(path.read_bytes()[:-20])
    monkeypatch.setattr(arms, "train_policy", lambda *args: trained.append(args[1].seed) or train_policy(*args))
    same(whole, train_arms(task, recipes(SHAPES, STUDY, (0, 5)), PROMPTS[:4], cut))
    assert trained == [5] and cut.read_bytes().count(b"\n") == 4
    same(whole, train_arms(task, recipes(SHAPES, STUDY, (0, 5)), PROMPTS[:4], cut))
    assert trained == [5]
    sparse = {("sparse", 0): Recipe(SPARSE, PARAMS, EXPLAIN, 0)}
    faster = {key: replace(recipe, ppo=replace(PARAMS, lr=1e-3)) for key, recipe in sparse.items()}
    train_arms(task, faster, PROMPTS[:4], cut)
    train_arms(task, sparse, PROMPTS[:3], cut)
    assert trained == [5, 0, 0]


def test_wins_at_equal_length_are_told_from_five_prompts_on(task):  # noqa: F811
    few, enough = (judge_against_reference(task, task.reference, PROMPTS[:n], PARAMS, 0) for n in (4, 5))
    assert "win_lc" not in few and enough["win"].tolist() == [0.5] * 5
    assert enough["win_lc"].tolist() == pytest.approx([0.5] * 5, abs=1e-6)
    other = train_policy(task, Recipe(MIXED, PARAMS, EXPLAIN, 0))
    judged, before = (evaluate(task, p, PROMPTS, PARAMS, 0) for p in (other.policy, task.reference))
    own = judge_against_reference(task, other.policy, PROMPTS, PARAMS, 0)
    expected = length_controlled(own["win"], judged["response"], before["response"])
    assert own["win"].nunique() > 1 and own["win_lc"].tolist() == expected.tolist()
