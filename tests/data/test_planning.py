"""What no policy could be trained on is refused while a study is planned, by `run` and by `check`, whoever loads it."""

import sys

import pytest
import yaml
from conftest import PROMPTS
from made_rows import HH_ROWS, REVIEWS, write_rows

from dense_rlhf.__main__ import main
from dense_rlhf.config.params import DataParams, PolicyParams, PPOParams, RunParams
from dense_rlhf.data import DATASETS, Dataset, load_data
from dense_rlhf.models.language_models import LanguageModel
from dense_rlhf.models.word_judge import AdditiveJudge
from dense_rlhf.training.task import Task, _calibrated
from dense_rlhf.types import InputError, LabelledText, PreferencePair

STUDY = {"notebooks": ["04_ppo"], "arms": {"plain": {"sources": ["terminal"]}}, "reward": {"window": 200, "batch": 8}}
LOADERS = """
import dataclasses
from dense_rlhf.data import DATASETS

def loaded(params, rows=None):
    return DATASETS["reviews"](params, rows)

def alike(params, rows=None):
    found = loaded(params)
    return dataclasses.replace(found, gold=[dataclasses.replace(one, label=1) for one in found.gold], counts={})

def changed(**fields):
    return lambda params, rows=None: dataclasses.replace(loaded(params), **fields)

no_prompts, no_rows, mixed = changed(validation_prompts=[]), changed(reward=[]), changed(test=["text"])

def broken(params, rows=None):
    return {}[params.name]

def narrow(params):
    return loaded(params)

def nothing(params, rows=None):
    return None
"""


@pytest.fixture
def plan(tmp_path, monkeypatch, capsys):
    """Runs a command on a study of this data; what it says. Nothing starts."""
    (tmp_path / "own_loaders.py").write_text(LOADERS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    monkeypatch.setattr("dense_rlhf.runner.plan._reason", lambda *_: "new")  # no notebook is read
    monkeypatch.setattr("dense_rlhf.runner.grid.run_grid", lambda *_, **__: pytest.fail("started"))

    def call(command, **data):
        (tmp_path / "s.yaml").write_text(yaml.safe_dump(STUDY | {"data": data}))
        code = main([command, "s.yaml"])
        printed = capsys.readouterr()
        return code, printed.err if command == "run" else printed.out

    yield call
    sys.modules.pop("own_loaders", None)


FEW = [row | {"text": row["text"].split(" of")[0] + " x" * 16} for row in REVIEWS]
APART = [row | {"text": " ".join(f"w{i}x{j}" for j in range(20))} for i, row in enumerate(REVIEWS)]


@pytest.mark.parametrize("command", ["run", "check"])
@pytest.mark.parametrize(
    "rows, message",
    [
        ([row | {"label": 1} for row in REVIEWS], "all texts that are kept are labelled 1"),
        ([row | {"text": f"five words of text {i}"} for i, row in enumerate(REVIEWS)], "data.prompt_words = 8"),
        (FEW[:300], "training prompts; lower it"),
        (APART, "no word is in 5 of the gold judge's"),
    ],
    ids=["one class", "short", "few", "no word twice"],
)
def test_files_are_refused_at_planning(plan, tmp_path, command, rows, message):
    write_rows(tmp_path / "r.csv", rows)
    code, printed = plan(command, path="r.csv")
    assert code == 2 and message in printed, printed
    assert command == "check" or printed.count("\n") == 1 and printed.count("r.csv") == 1


def test_pairs_that_no_window_holds_are_found_by_the_check(plan, tmp_path):
    rows = [{side: text + " and so on" * 200 for side, text in row.items()} for row in HH_ROWS]
    write_rows(tmp_path / "p.jsonl", rows)
    code, printed = plan("check", name="hh_rlhf", path="p.jsonl")
    assert code == 2 and "200 tokens hold 0 of" in printed and "reward.batch = 8; raise the window" in printed


@pytest.mark.parametrize("command", ["run", "check"])
@pytest.mark.parametrize(
    "loader, message",
    [
        ("alike", "texts of split 'gold' are labelled 1"),
        ("no_prompts", "validation_prompts is empty"),
        ("no_rows", "split 'reward' has 0 rows"),
        ("mixed", "split 'test' has 1 rows, wanted at least one LabelledText, and nothing else"),
        ("broken", "raised KeyError"),
        ("narrow", "wanted a function of (params, rows)"),
        ("nothing", "returns NoneType, wanted a Dataset"),
    ],
)
def test_own_loaders_are_held_to_the_same(plan, tmp_path, command, loader, message):
    write_rows(tmp_path / "r.csv", REVIEWS)
    code, printed = plan(command, name=f"own_loaders:{loader}", path="r.csv")
    assert code == 2 and message in printed, printed
    assert command == "check" or printed.count("\n") == 1


def test_a_loader_may_count_nothing(plan, tmp_path, monkeypatch):
    write_rows(tmp_path / "r.csv", REVIEWS)
    good = load_data(DataParams(path="r.csv"))
    bare = Dataset("bare", "r", good.reward, good.gold, good.train_prompts, good.validation_prompts, good.test)
    monkeypatch.setitem(DATASETS, "bare", lambda params, rows=None: bare)
    assert load_data(DataParams("bare")) is bare
    code, printed = plan("check", name="bare")
    assert code == 0 and "bare at r: 0 rows read, 0 left out\n" in printed


def test_one_pair_teaches_no_judge():
    pair, text = PreferencePair("a", "b", "c"), LabelledText("a", 1)
    with pytest.raises(InputError, match="here: split 'gold' has one pair"):
        Dataset("n", "r", [pair], [pair], ["a"], ["b"], [pair]).check("here")
    with pytest.raises(InputError, match="split 'gold' has 1 rows, wanted at least one PreferencePair"):
        Dataset("n", "r", [pair], [text], ["a"], ["b"], [pair]).check("here")


def test_the_check_says_what_was_left_out_and_why(plan, tmp_path):
    write_rows(tmp_path / "r.csv", [*REVIEWS, REVIEWS[0], {"text": "x", "label": "?"}])
    code, printed = plan("check", path="r.csv")
    assert code == 0 and "602 rows read, 2 left out: 1 duplicate, 1 label is not 0 or 1\n" in printed


def test_fewer_prompts_than_calibration_would_use_are_enough(tokenizer, reference, reward_model):
    text = [LabelledText("the film was good", 1)]
    data = Dataset("inline", "r0", text, text, PROMPTS, PROMPTS[:4], text)
    judge = AdditiveJudge("gold", {"good": 1.0})
    lm = LanguageModel(reference.lm, tokenizer, "m0")
    task = Task(data, lm, reference, reward_model, judge, judge, PolicyParams())
    run = RunParams(ppo=PPOParams(rollouts=4, minibatch=4, max_new_tokens=4))  # four batches of four; there are six
    assert _calibrated(task, run, iter).reward_model.scale != reward_model.scale
