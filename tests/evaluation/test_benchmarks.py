"""AlpacaEval 2 and MT-Bench: files in and out, answers, prompts, ratings, and both by hand against a server of ours."""

import hashlib
import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from by_hand import compare, ratings_by_hand, recorder
from conftest import ROOT, SHARED, make_policy
from whole_runs import check_pages, run_study

from dense_rlhf.__main__ import main
from dense_rlhf.config.params import DownstreamParams, PolicyParams
from dense_rlhf.evaluation import benchmarks
from dense_rlhf.evaluation.benchmarks import (
    BenchmarkPrompts,
    answer_all,
    answers,
    caveats,
    checkpoints,
    gains_over_reference,
    judged_answers,
    over_items,
    scores,
)
from dense_rlhf.evaluation.judge import Endpoint, NoVerdict, Scored, alpaca_eval, length_controlled, mt_bench
from dense_rlhf.evaluation.judge.mt_bench import TwoTurns
from dense_rlhf.files import cache_root
from dense_rlhf.models.language_models import LanguageModel
from dense_rlhf.types import InputError, Message
from dense_rlhf.view import figures

SMALL = ROOT / "params" / "downstream"
INSTALLED = any((cache_root() / "alpaca_eval").glob("*/venv/bin/python"))


@pytest.fixture
def lm(tokenizer):
    return LanguageModel(make_policy(tokenizer, eos_share=0.001), tokenizer, "made")


@pytest.fixture
def folder(tmp_path):
    """A copy of MT-Bench's stand-in that a test may spoil."""
    for path in SMALL.glob("*.jsonl"):
        (tmp_path / path.name).write_text(path.read_text())
    return tmp_path


def canned(asked):
    """A letter or a rating that depends on what was asked; some replies are no judgement, some are cut."""
    text, letter = asked["messages"][-1]["content"], None
    number = int(hashlib.sha256(text.encode()).hexdigest(), 16)
    if "Answer B: " in text:
        letter = ["A", "B.", "neither", "(A) is better"][number % 4]
    rating = [f"Good. Rating: [[{number % 10 + 1}]]", "[[3]] or [[4]]", "[[11]]", "[[7.5]]", "fine"][number % 5]
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": letter or rating},
        "finish_reason": "length" if number % 11 == 0 else "stop",
    }
    usage = {"prompt_tokens": 5, "completion_tokens": 5, "total_tokens": 10}
    return {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice], "usage": usage}


@pytest.fixture(scope="module")
def endpoint():
    """The environment names a server of canned replies; yields what it was asked and said."""
    pytest.importorskip("openai", reason="openai is not installed: no endpoint")
    server, kept = recorder(canned)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{server.server_address[1]}/v1")
        patch.setenv("OPENAI_API_KEY", "sk-made-for-this-test")
        patch.setenv("OPENAI_MODEL", "canned")
        yield kept
    server.shutdown()


# ---------------------------------------------------------------------------------------------------- MT-Bench's files


def test_questions_come_with_references_where_their_category_wants_them():
    found = mt_bench.read_questions(SMALL)
    assert len(found) == 10 and all(len(asked.turns) == 2 for asked in found)
    assert {asked.category for asked in found if asked.references} == set(mt_bench.REFERENCE_GUIDED)
    assert len(mt_bench.first_of_each_category(found, 1)) == len({asked.category for asked in found}) < len(found)
    assert mt_bench.first_of_each_category(found, None) == sorted(
        found, key=lambda q: [p.category for p in found].index(q.category)
    )


@pytest.mark.skipif(not (SHARED / "mt_bench").exists(), reason="no real files of MT-Bench beside the checkout")
def test_the_real_questions_are_read_and_filled_into_the_real_prompts():
    folder = SHARED / "mt_bench"
    found, prompts = mt_bench.read_questions(folder), mt_bench.read_prompts(folder)
    assert len(found) == mt_bench.FULL and sum(asked.references is not None for asked in found) == 30
    for asked in found:
        for turn in (1, 2):
            text = mt_bench.grading(asked, ("one", "two"), turn, prompts).messages[-1].content
            assert asked.turns[turn - 1] in text and not {"{question}", "{answer}"} & set(text.split())


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("question.jsonl", lambda text: text.replace('"math"', "null"), "wanted question_id, category and two turns"),
        ("question.jsonl", lambda text: text.replace('"math"', '"Math "'), "category is 'Math ', wanted math"),
        ("question.jsonl", lambda text: text.replace('"turns": ["', '"turns": ["\\ud800'), "half a surrogate pair"),
        ("question.jsonl", lambda text: text + text.splitlines()[0], "no question_id twice"),
        ("question.jsonl", lambda text: "", "at least one question"),
        ("question.jsonl", lambda text: text[:-20], "is not readable: line 10"),
        ("reference_answer.jsonl", lambda text: text + text, "no question_id twice"),
        ("reference_answer.jsonl", lambda text: "", "question_id 4: reasoning wants two reference answers"),
        ("judge_prompts.jsonl", lambda text: text + text, "no name twice"),
        ("judge_prompts.jsonl", lambda text: text.replace("single-math-v1", "other"), "no prompt 'single-math-v1'"),
        ("judge_prompts.jsonl", lambda text: text.replace('"single-v1"', '["single-v1"]'), "no prompt 'single-v1'"),
        ("question.jsonl", lambda text: text.replace('"question_id": 4', '"question_id": [4]'), "wanted question_id"),
        ("reference_answer.jsonl", lambda text: text.replace('"question_id": 4', '"question_id": {}'), "question_id 4"),
        ("reference_answer.jsonl", lambda text: re.sub('"choices": .*}', '"choices": "x"}', text), "wants two"),
        ("reference_answer.jsonl", lambda text: re.sub('"choices": .*}', '"choices": ["x"]}', text), "wants two"),
        ("reference_answer.jsonl", lambda text: re.sub('"choices": .*}', '"choices": {"a": 1}}', text), "wants two"),
    ],
)
def test_a_damaged_file_is_named(folder, name, change, message):
    (folder / name).write_text(change((folder / name).read_text()))
    with pytest.raises(InputError, match=message.replace("[", r"\[")):
        mt_bench.read_questions(folder), mt_bench.read_prompts(folder)


def test_prompts_are_looked_for_in_the_folder(tmp_path):
    with pytest.raises(InputError, match="no file at .*judge_prompts.jsonl"):
        mt_bench.read_prompts(tmp_path)


# ---------------------------------------------------------------------------------------------------- MT-Bench's judge


def test_a_judge_sees_reference_and_both_turns_where_they_belong_and_braces_stay_text():
    prompts, found = mt_bench.read_prompts(SMALL), {q.category: q for q in mt_bench.read_questions(SMALL)}
    said = ("first {question} [[9]]", "second {ref_answer_1}")
    plain, guided = found["stem"], found["coding"]
    one, two = (mt_bench.grading(plain, said, turn, prompts).messages[-1].content for turn in (1, 2))
    assert said[0] in one and said[1] not in one and plain.turns[1] not in one
    assert all(text in two for text in (*said, *plain.turns))
    one, two = (mt_bench.grading(guided, said, turn, prompts).messages[-1].content for turn in (1, 2))
    assert guided.references[0] in one and guided.references[1] not in one
    assert all(text in two for text in (*said, *guided.turns, *guided.references))
    names = {mt_bench.grading(q, said, turn, prompts).template for q in (plain, guided) for turn in (1, 2)}
    assert names == {f"MT-Bench {name}" for name in mt_bench.PROMPTS.values()}


def test_a_prompt_with_an_unknown_field_is_refused():
    prompts = {name: {"system_prompt": "", "prompt_template": "{nobody}"} for name in mt_bench.PROMPTS.values()}
    with pytest.raises(InputError, match="asks for {nobody}"):
        mt_bench.grading(mt_bench.read_questions(SMALL)[0], ("a", "b"), 1, prompts)


@pytest.mark.parametrize(
    "reply, rating",
    [
        ("Rating: [[5]]", 5),
        ("[[10]] at last", 10),
        ("[[7.5]]", 7.5),
        ("[[4]], as I said: [[4]]", 4),
        ("[[0]]", None),
        ("[[11]]", None),
        ("[[-3]]", None),
        ("[5]", None),
        ("5", None),
        ("[[five]]", None),
        ("[[3]] no, [[4]]", None),
        ("", None),
        ("[[rating]]", None),
        ("<think>[[2]]?</think> Rating: [[8]]", 8),
        ("[[2]]?</think>**[[8]]**, as it is right", 8),
        ("<think>Rating: [[2]]", None),
        ("<think>[[2]]</think>", None),
        ("【【5】】", None),
    ],
)
def test_ratings_are_read_strictly(reply, rating):
    if rating is None:
        with pytest.raises(NoVerdict):
            mt_bench.read_rating(reply)
    else:
        assert mt_bench.read_rating(reply) == rating


def test_two_answers_are_wanted_to_each_question():
    questions = mt_bench.read_questions(SMALL)[:2]
    with pytest.raises(InputError, match="1 answers to 2 questions, wanted two to each"):
        mt_bench.grade(questions, [("a", "b")], {}, None)


def test_scores_are_means_over_questions():
    rows = [
        (1, "math", 1, 2.0),
        (1, "math", 2, 4.0),
        (2, "math", 1, 6.0),
        (2, "math", 2, math.nan),
        (3, "stem", 1, 10.0),
        (3, "stem", 2, 8.0),
    ]
    found = scores(pd.DataFrame(rows, columns=["question", "category", "turn", "rating"]))
    assert list(found) == ["math", "stem", "all"]
    assert found["math"]["turn 1"].mean == 4 and found["math"]["turn 2"].mean == 4
    assert found["math"]["both"].mean == 4.5 and found["all"]["both"].mean == 6
    assert found["math"]["both"].low <= 4.5 <= found["math"]["both"].high and math.isinf(found["stem"]["both"].low)


def test_what_has_no_judgement_counts_nowhere():
    assert over_items([1, math.nan, 1, math.nan, 0, 0]).mean == 0.5
    nothing, single, two = (over_items(values) for values in ([math.nan], [1.0], [2.0, 2.0]))
    assert math.isnan(nothing.mean) and not nothing.known
    assert single.mean == 1 and not single.known and (two.mean, two.low, two.high) == (2, 2, 2)


# ---------------------------------------------------------------------------------------------------- AlpacaEval


def test_outputs_are_written_beside_their_instructions(tmp_path):
    rows = alpaca_eval.read_instructions(str(SMALL / "instructions.json"), 3)
    alpaca_eval.write_outputs(tmp_path / "model_outputs.json", rows, ["a", "b", "c"], "ours")
    back = json.loads((tmp_path / "model_outputs.json").read_text())
    assert [row["output"] for row in back] == ["a", "b", "c"] and {row["generator"] for row in back} == {"ours"}
    assert [row["instruction"] for row in back] == [row["instruction"] for row in rows]
    with pytest.raises(InputError, match="2 outputs for 3 instructions"):
        alpaca_eval.write_outputs(tmp_path / "x.json", rows, ["a", "b"], "ours")


@pytest.mark.parametrize(
    "rows, message",
    [
        ([], "at least one row"),
        ([{"instruction": "a", "output": "b"}], "row 1: wanted instruction, output and generator"),
        ([{"instruction": "a", "output": "b", "generator": g} for g in "xy"], "outputs of one generator"),
        ([{"instruction": 5, "output": "b", "generator": "x"}], "row 1"),
        ([{"instruction": "a", "output": "\ud800", "generator": "x"}], "row 1: half a surrogate pair"),
    ],
)
def test_rows_of_another_form_are_refused(tmp_path, rows, message):
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    with pytest.raises(InputError, match=message):
        alpaca_eval.read_instructions(str(tmp_path / "rows.json"))


def test_our_annotator_is_written_for_the_model_and_theirs_is_named(tmp_path):
    ours = Path(alpaca_eval.annotator_config(alpaca_eval.OURS, "m", tmp_path))
    assert "model_name: m" in (ours / "configs.yaml").read_text()
    assert (ours / "prompt.txt").read_text().count("{instruction}") == 1
    assert alpaca_eval.annotator_config(alpaca_eval.THEIRS, "m", tmp_path) == alpaca_eval.THEIRS
    assert alpaca_eval.annotator_config(str(ours), "m", tmp_path) == str(ours)


def leave(folder, rows):
    (folder / "annotations.json").write_text(json.dumps(rows))
    head, row = ",win_rate,standard_error,mode,avg_length,n_total", "ours,40,5,community,7,2"
    (folder / "leaderboard.csv").write_text(f"{head}\n{row}\n")


def annotations(*preferences):
    made = {"output_1": "b", "output_2": "o", "generator_2": "ours"}
    return [made | {"instruction": str(i), "preference": p} for i, p in enumerate(preferences)]


@pytest.mark.parametrize(
    "rows, board, message",
    [
        (annotations(1.0, 5.0), None, "a preference is outside of 1 to 2"),
        (annotations(1.0, "x"), None, "is damaged"),
        ([{"instruction": "a"}] * 2, None, "2 annotations, wanted 2 of ours"),
        (annotations(1.0, 2.0), ",win_rate\ntheirs,4\n", "is damaged.*KeyError"),
        (annotations(1.0, 2.0), ",win_rate\nours,many\n", "is damaged.*ValueError"),
        (annotations(1.0, 2.0), "", "is damaged.*EmptyDataError"),
        ([], None, "0 annotations, wanted 2 of ours"),
    ],
)
def test_results_of_another_form_are_one_line(tmp_path, rows, board, message):
    leave(tmp_path, rows)
    if board is not None:
        (tmp_path / "leaderboard.csv").write_text(board)
    with pytest.raises(InputError, match=message):
        alpaca_eval.read_back(tmp_path, "ours", 2)


def test_win_rate_and_annotations_are_read_back(tmp_path):
    leave(tmp_path, annotations(1.0, 1.8, None))
    board, pairs = alpaca_eval.read_back(tmp_path, "ours", 3)
    assert board == {"win_rate": 40, "standard_error": 5, "avg_length": 7, "n_total": 2}
    np.testing.assert_allclose(pairs["preference"], [0, 0.8, np.nan])
    with pytest.raises(InputError, match="3 annotations, wanted 4 of ours"):
        alpaca_eval.read_back(tmp_path, "ours", 4)


@pytest.mark.parametrize("before", ["", "-" * 280])  # where a cut would go through the key
def test_alpaca_eval_that_fails_is_one_line_without_the_key(before, tmp_path, monkeypatch):
    fake = tmp_path / "python"
    fake.write_text(f'#!/bin/sh\necho Traceback >&2; echo "{before}Error: bad key $OPENAI_API_KEY" >&2; exit 3\n')
    fake.chmod(0o755)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-made-for-this-test")
    monkeypatch.setattr(alpaca_eval, "python", lambda: fake)
    with pytest.raises(InputError) as found:
        alpaca_eval.annotate(tmp_path, "any", False)
    assert str(found.value) == f"alpaca_eval ended with code 3: {before}Error: bad key ***"


def weighted(asked):
    """A reply as AlpacaEval 2's annotator wants it: how likely the first token is m, and M."""
    text = asked["messages"][-1]["content"]
    p = (int(hashlib.sha256(text.encode()).hexdigest(), 16) % 97 + 1) / 99
    both = [{"token": token, "logprob": math.log(q), "bytes": None} for token, q in (("m", p), ("M", 1 - p))]
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": "m"},
        "finish_reason": "length",
        "logprobs": {"content": [both[0] | {"top_logprobs": both}]},
    }
    usage = {"prompt_tokens": 5, "completion_tokens": 1, "total_tokens": 6}
    return {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice], "usage": usage}


@pytest.mark.skipif(not INSTALLED, reason="alpaca_eval's environment is not made")
def test_alpaca_evals_own_annotator_and_length_control_are_read_back(tmp_path, monkeypatch):
    """Against the server's probabilities, and against our own length control with the same made-up table."""
    rng, N = np.random.default_rng(0), 40
    rows = [
        {
            "instruction": f"{(7 * i) % N}. say something",
            "output": f"b{i} " * int(rng.integers(1, 60)),
            "generator": "baseline",
        }
        for i in range(N)
    ]
    ours = [f"o{i} " * int(rng.integers(1, 60)) for i in range(N)]
    difficulty = rng.normal(size=N)
    table = pd.concat(
        [
            pd.DataFrame(
                {
                    "model": shift,
                    "index": np.arange(N),
                    "instruction_difficulty": difficulty,
                    "not_gamed_baseline": False,
                    "std_delta_len": rng.normal(shift, 0.5, N),
                    "preference": rng.beta(2 - shift, 2 + shift, N),
                }
            )
            for shift in (-0.8, 0.8)
        ]
    )
    hub = tmp_path / "hub" / "datasets--tatsu-lab--alpaca_eval"
    for path, text in (("refs/main", "0" * 40), (f"snapshots/{'0' * 40}/df_gamed.csv", table.to_csv(index=False))):
        (hub / path).parent.mkdir(parents=True, exist_ok=True)
        (hub / path).write_text(text)
    server, kept = recorder(weighted)
    for name, value in {
        "OPENAI_BASE_URL": f"http://127.0.0.1:{server.server_address[1]}/v1",
        "HF_HUB_OFFLINE": "1",
        "OPENAI_API_KEY": "any",
        "HF_HOME": str(tmp_path),
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(alpaca_eval, "FULL", N)
    board, pairs = alpaca_eval.evaluate(tmp_path / "run", rows, ours, "ours", alpaca_eval.THEIRS, "unused")
    assert list(pairs["instruction"]) == [row["instruction"] for row in rows], "difficulty goes by row"
    hand = {}
    for asked, said in kept:
        text, (m, _) = asked["messages"][-1]["content"], said["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        (i,) = [i for i in range(N) if rows[i]["output"].strip() in text and ours[i].strip() in text]
        first = text.index(ours[i].strip()) < text.index(rows[i]["output"].strip())
        hand[rows[i]["instruction"]] = math.exp(m["logprob"]) if first else 1 - math.exp(m["logprob"])
    np.testing.assert_allclose(pairs["preference"], [hand[row["instruction"]] for row in rows], atol=1e-6)
    assert board["win_rate"] == pytest.approx(100 * pairs["preference"].mean()) and board["n_total"] == N
    own = length_controlled(pairs["preference"], pairs["output_2"], pairs["output_1"], difficulty, table).mean()
    assert board["length_controlled_winrate"] == pytest.approx(100 * own, abs=0.1)
    server.shutdown()


# ---------------------------------------------------------------------------------------------------- answers


def asked(texts, temperature=0.7):
    return [((Message("user", text),), temperature) for text in texts]


def test_answers_keep_their_order_over_temperatures_and_are_drawn_once(lm, tmp_path, monkeypatch):
    dialogues = [
        pair for t in ("a", "the film", "bad plot") for temperature in (0.7, 0.0) for pair in asked([t], temperature)
    ]
    ledger, seen = tmp_path / "answers.jsonl", []
    whole = answers(lm, dialogues, 6, 0, ledger, lambda rows: seen.append(len(rows)) or rows)
    assert seen == [2] and len(whole) == 6 and len(set(whole)) > 2
    monkeypatch.setattr("dense_rlhf.evaluation.benchmarks._sampled", lambda *_: pytest.fail("drawn twice"))
    assert answers(lm, dialogues, 6, 0, ledger) == whole


@pytest.mark.parametrize(
    "change", [dict(revision="other"), dict(dtype="bfloat16"), dict(seed=1), dict(most=5)], ids=str
)
def test_whatever_decides_answers_draws_them_anew(change, lm, tmp_path, monkeypatch):
    monkeypatch.setattr("dense_rlhf.evaluation.benchmarks._sampled", lambda *_: [str(len(drawn))])
    drawn, ledger, other = [], tmp_path / "answers.jsonl", dict(revision=lm.revision, dtype="float32", seed=0, most=6)
    for given in (other, other, other | change):
        model = replace(lm, revision=given["revision"], model=lm.model.to(getattr(torch, given["dtype"])))
        drawn += [answers(model, asked(["the film"]), given["most"], given["seed"], ledger)]
    assert drawn == [["0"], ["0"], ["2"]]


def test_without_warmth_the_seed_is_nothing_with_warmth_it_is(lm, tmp_path):
    def drawn(temperature, seed):
        return answers(lm, asked(["the film", "a"], temperature), 8, seed, tmp_path / f"{temperature}{seed}.jsonl")

    assert drawn(0.0, 0) == drawn(0.0, 1) and drawn(1.0, 0) != drawn(1.0, 1)


def test_the_second_turn_follows_the_first_answer(lm, tmp_path, monkeypatch):
    told = []

    def parrot(lm, dialogues, *_):
        told.extend(dialogues)
        return [f"{len(dialogue)}: {dialogue[-1].content}" for dialogue in dialogues]

    monkeypatch.setattr("dense_rlhf.evaluation.benchmarks.load_policy", lambda _: lm)
    monkeypatch.setattr("dense_rlhf.evaluation.benchmarks._sampled", parrot)
    questions = mt_bench.read_questions(SMALL)
    prompts = BenchmarkPrompts(["hello"], questions)
    said = answer_all(PolicyParams(), prompts, DownstreamParams(), 0, tmp_path / "a.jsonl")
    assert said.outputs == ["1: hello"] and said.revision == "made"
    assert said.turns == [(f"1: {q.turns[0]}", f"3: {q.turns[1]}") for q in questions]
    assert {d[1] for d in told if len(d) == 3} == {Message("assistant", f"1: {q.turns[0]}") for q in questions}


def test_a_dialogue_that_leaves_no_room_is_refused(lm, tmp_path):
    lm.model.config.max_position_embeddings = 12
    with pytest.raises(InputError, match=r"max_new_tokens is 10, after a dialogue of \d+ tokens; the model reads 12"):
        answers(lm, asked(["the film was good"]), 10, 0, tmp_path / "a.jsonl")
    assert not (tmp_path / "a.jsonl").exists()


class HeldOut:
    """A task whose judges remember what they read, and like long answers."""

    reward_model = None

    def __init__(self, monkeypatch):
        self.read = []
        monkeypatch.setattr(benchmarks, "reward_judge", lambda model: Scored("proxy", self.proxy))

    def proxy(self, prompts, texts):
        self.read.append(prompts)
        return np.array([len(text) for text in texts])

    def judge(self, prompts, texts):
        assert prompts == self.read[-1]
        return {"gold": [-len(text) for text in texts], "repetition": [0.5 for _ in texts]}


def test_judges_read_an_answer_after_all_that_was_said(monkeypatch):
    task, questions = HeldOut(monkeypatch), [TwoTurns(7, "stem", ("one?", "two?")), TwoTurns(9, "math", ("3?", "4?"))]
    answers = {"reference": [("a", "bb"), ("", "cc")], "ours": [("aaa", "bbb"), ("d", "ddd")]}
    judged = judged_answers(task, questions, answers)
    assert [[m.content for m in dialogue] for dialogue in task.read[3]] == [["one?", "aaa", "two?"], ["3?", "d", "4?"]]
    assert [m.role for m in task.read[3][0]] == ["user", "assistant", "user"] and len(task.read[2][0]) == 1
    row = judged[(judged["checkpoint"] == "ours") & (judged["question"] == 9) & (judged["turn"] == 2)].iloc[0]
    assert (row["asked"], row["answer"], row["category"], row["proxy"], row["gold"]) == ("4?", "ddd", "math", 3, -3)
    gains = gains_over_reference(judged)
    assert gains.keys() == {"ours"} and gains["ours"].keys() == {"proxy", "gold"}
    assert gains["ours"]["proxy"].mean == ((2 + 1) / 2 + (1 + 1) / 2) / 2 == -gains["ours"]["gold"].mean
    assert gains_over_reference(judged[judged["checkpoint"] == "reference"]) == {}


def test_checkpoints_are_called_after_their_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "other").mkdir(parents=True)
    paths = ("runs/train/reviews-sparse-seed0/policy", "models/other/", "organisation/model")
    found = checkpoints(PolicyParams(dtype="bfloat16"), DownstreamParams(checkpoints=paths))
    assert list(found) == ["reference", "reviews-sparse-seed0", "other", "model"]
    assert found["model"] == PolicyParams(name="organisation/model", dtype="bfloat16")
    with pytest.raises(InputError, match="two are called 'model'"):
        checkpoints(PolicyParams(), DownstreamParams(checkpoints=("a/model", "b/model")))
    with pytest.raises(InputError, match="has no name"):
        checkpoints(PolicyParams(), DownstreamParams(checkpoints=("/",)))


def test_only_the_whole_benchmark_by_its_own_judge_has_no_caveats():
    whole = DownstreamParams()
    full, part = (BenchmarkPrompts(["say"] * i, [None] * q) for i, q in ((805, 80), (10, 10)))
    assert caveats(full, whole, "gpt-4-turbo") == [] == caveats(BenchmarkPrompts([], []), whole, "small")
    assert len(caveats(part, replace(whole, alpaca_annotator=alpaca_eval.OURS), "small")) == 4


# ---------------------------------------------------------------------------------------------------- the whole


@pytest.mark.parametrize("missing", ["OPENAI_BASE_URL", "OPENAI_API_KEY", "OPENAI_MODEL"])
def test_without_an_endpoint_nothing_starts_and_one_line_says_why(monkeypatch, capsys, missing):
    for name in ("OPENAI_BASE_URL", "OPENAI_API_KEY", "OPENAI_MODEL"):
        monkeypatch.setenv(name, "http://127.0.0.1:9/v1")
    monkeypatch.delenv(missing)
    assert main(["run", "params/downstream.yaml", "--set", "size=smoke", "--set", "study=pytest_no_endpoint"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {missing} is not set") and error.count("\n") == 1
    assert not (ROOT / "runs" / "pytest_no_endpoint").exists()


def test_questions_from_elsewhere_are_read_before_a_run_starts(folder, capsys):
    (folder / "question.jsonl").write_text('{"question_id": 1}\n')
    for place, wanted in (("null", "13_unseen_questions wants questions"), (folder, "wanted question_id, category")):
        settings = "size=smoke", "study=pytest_no_questions", f"downstream.mt_bench_path={place}"
        words = [word for setting in settings for word in ("--set", setting)]
        assert main(["run", "params/unseen_questions.yaml", *words]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: downstream.mt_bench_path") and wanted in error and error.count("\n") == 1
    assert not (ROOT / "runs" / "pytest_no_questions").exists()


def test_without_the_client_nothing_starts(monkeypatch, capsys):
    for name in ("OPENAI_BASE_URL", "OPENAI_API_KEY", "OPENAI_MODEL"):
        monkeypatch.setenv(name, "http://127.0.0.1:9/v1")
    monkeypatch.setitem(sys.modules, "openai", None)
    assert main(["run", "params/downstream.yaml", "--set", "size=smoke", "--set", "study=pytest_no_client"]) == 2
    error = capsys.readouterr().err
    assert "needs the package openai" in error and error.count("\n") == 1
    assert not (ROOT / "runs" / "pytest_no_client").exists()


def test_ratings_are_those_that_the_server_gave(endpoint, tmp_path):
    """Against what `by_hand` tells from the server's own replies: the same check as with a real server."""
    questions, prompts = mt_bench.read_questions(SMALL), mt_bench.read_prompts(SMALL)
    judge = Endpoint(tmp_path / "judgements.jsonl")
    found = mt_bench.grade(questions, [(f"one {q.id}", f"two {q.id}") for q in questions], prompts, judge)
    hand = ratings_by_hand(endpoint, {q.id: q.turns for q in questions})
    assert len(found) == len(hand) == 20 and 0 < found["rating"].notna().sum() < 20
    for row in found.itertuples():
        assert hand[row.question, row.turn] == (None if math.isnan(row.rating) else row.rating), row
    assert len(judge.failures) == found["rating"].isna().sum()


def test_the_notebook_agrees_with_the_judgements_made_by_hand(endpoint):
    left_out = [] if INSTALLED else ["downstream.alpaca_annotator=null"]
    endpoint.clear()
    runs, reports = run_study("params/downstream.yaml", "pytest_downstream", *left_out)
    run = runs["10_downstream"]
    metrics, rows = run.load_json("metrics.json"), compare(run.path, endpoint)
    assert len(rows) == 16 + (0 if left_out else 4) and all(hand == said for _, hand, said in rows)
    assert metrics["judge"] == "canned" and metrics["stand_in"] and set(metrics["rating"]) == {"reference"}
    assert "no benchmark score" in (reports / "10_downstream.html").read_text()
    check_pages(runs, reports)
    for path in [p for folder in (run.path, reports) for p in folder.rglob("*") if p.is_file()]:
        assert b"sk-made-for-this-test" not in path.read_bytes(), path
    if left_out:
        pytest.skip("alpaca_eval's environment is not made; MT-Bench alone was checked")


def test_a_radar_has_a_spoke_a_category_and_survives_what_is_not_known():
    from dense_rlhf.statistics import Interval

    ax = figures.radar(
        ["a", "b", "c"],
        {"reference": [Interval(5, 4, 6), Interval(math.nan, -math.inf, math.inf), Interval(2, -math.inf, math.inf)]},
        top=10,
    )
    assert [label.get_text() for label in ax.get_xticklabels()] == ["a", "b", "c"] and ax.get_ylim() == (0, 10)
    ax.figure.canvas.draw()
