"""A judge behind an address: a real server that answers, fails and falls silent; what was judged is kept."""

import asyncio
import json
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from chat_server import KEY, QUICK, completion, cut, drip, drop, raw, refuse, say, send, silent
from judge_server import server, start  # noqa: F401

from dense_rlhf.evaluation.judge import Endpoint, pairwise
from dense_rlhf.types import InputError

pytest.importorskip("openai", reason="openai is not installed: no endpoint")
MANY = [f"response {i}" for i in range(10)]


def compare(judge, number=1, ours=MANY):
    return judge.compare(["Say it."] * number, ours[:number], ["theirs"] * number)


def reasons(judge):
    return [failure.reason for failure in judge.failures]


# ---------------------------------------------------------------------------------------------------- judgements


def test_both_orders_are_asked_once_and_never_again(server, start):
    server.usual = say(seconds=0.01)
    judged = pairwise(start(), ["Say it."] * 4, MANY[:4], ["theirs"] * 4)
    assert judged.position_bias == 0.5 and judged.failed == 0 and len(server.asked) == 8
    again = pairwise(start(), ["Say it."] * 4, MANY[:4], ["theirs"] * 4)
    assert len(server.asked) == 8 and (again.preference == judged.preference).all()
    compare(start(), 6)
    assert len(server.asked) == 10


def test_a_question_that_comes_twice_is_asked_once(server, start):
    assert compare(start(), 3, ["same"] * 3).tolist() == [1, 1, 1] and len(server.asked) == 1


def test_another_model_template_or_setting_is_asked_anew(server, start, monkeypatch):
    compare(start())
    compare(start(temperature=0.5))
    monkeypatch.setenv("OPENAI_MODEL", "judge-2")
    compare(start())
    assert [(a["model"], a["temperature"]) for a in server.asked] == [("judge-1", 0), ("judge-1", 0.5), ("judge-2", 0)]


def test_grades_are_from_1_to_10_and_know_a_reference(server, start):
    server.script = [say("Good. [[8]]"), say("[[7.5]]"), say("[[11]]"), say("[[0]]"), say("[[seven]]"), say("[[A]]")]
    judge = start()
    judged = judge.grade(["2 + 2?"] * 6, MANY[:6], ["four", None, None, None, None, None])
    assert judged[:2].tolist() == [8, 7.5] and np.isnan(judged[2:]).all()
    assert reasons(judge) == ["the rating is no number from 1 to 10"] * 4
    texts = [asked["messages"][0]["content"] for asked in server.asked]
    assert "four" in texts[0] and "CORRECT ANSWER" in texts[0] and "CORRECT ANSWER" not in texts[1]


def test_what_is_sent_is_what_servers_of_each_kind_want(server, start):
    compare(start(limit_as="max_completion_tokens", temperature=None, reply_tokens=7))
    (asked,) = server.asked
    assert asked["path"] == "/v1/chat/completions" and asked["authorization"] == f"Bearer {KEY}"
    assert asked["max_completion_tokens"] == 7 and not {"temperature", "max_tokens"} & set(asked)


def test_it_runs_where_a_loop_runs_already(server, start):
    async def cell():
        return compare(start(), 2)

    assert asyncio.run(cell()).tolist() == [1, 1]


def test_no_more_are_under_way_than_allowed(server, start):
    server.usual = say(seconds=0.03)
    compare(start(concurrency=3), 9)
    assert server.most == 3


# ---------------------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize(
    "fault",
    [
        refuse(429),
        refuse(500),
        refuse(503),
        refuse(408),
        drop,
        cut,
        raw(b"{"),
        raw(b"{}"),
        raw(b"[1]"),
        raw(b"<html>busy</html>", "text/html"),
        raw(b'{"choices": []}'),
        raw(b'{"choices": null}'),
        raw(b'{"choices": [{"message": null}]}'),
        raw(b"\xff\xfe"),
        raw(b"[" * 100_000),
    ],
    ids=lambda fault: "",
)
def test_a_fault_that_passes_is_outlived(server, start, fault):
    server.script = [fault]
    judge = start()
    assert compare(judge).tolist() == [1] and len(server.asked) == 2 and judge.failures == []


@pytest.mark.parametrize("fault", [silent, drip])
def test_an_answer_that_does_not_end_is_not_waited_for(server, start, fault):
    server.script = [fault]
    assert compare(start(timeout=0.4, attempts=9)).tolist() == [1] and len(server.asked) >= 2


@pytest.mark.parametrize(
    "answer, reason",
    [
        (say("Both are fine."), "does not end with a verdict"),
        (say(""), "does not end with a verdict"),
        (say("[[A]] because it is better."), "does not end with a verdict"),
        (say("It says [[A]], but [[B]]"), "several verdicts"),
        (say("[[C]]"), "none of A, B and tie"),
        (say("[[a]]"), "none of A, B and tie"),
        (say("[[A]]", ended="length"), "was cut at judge.reply_tokens"),
        (say(None), "has no text"),
        (say([1]), "has no text"),
        (refuse(400), "HTTP 400"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_judgement_is_named_and_asked_again_at_the_next_start(server, start, answer, reason):
    server.script = [say("[[B]]"), answer]
    judge = start()
    judged = compare(judge, 3)
    assert judged[[0, 2]].tolist() == [0, 1] and np.isnan(judged[1]) and len(server.asked) == 3
    (failure,) = judge.failures
    assert reason in failure.reason and failure.row == 1 and failure.template == "comparison 1"
    assert reason in judge.report() and "1 without a judgement" in judge.report()
    again = start()
    assert compare(again, 3).tolist() == [0, 1, 1] and len(server.asked) == 4 and again.failures == []


def test_a_text_that_cannot_be_sent_is_named_and_the_others_are_judged(server, start):
    judge = start()
    judged = compare(judge, 3, ["half \udc00", "\u2028 and \x85", "x"])
    assert np.isnan(judged[0]) and judged[1:].tolist() == [1, 1] and len(server.asked) == 2
    assert "half a surrogate pair" in judge.report()


@pytest.mark.parametrize("after", ["nan", "-1", "soon", "Fri, 27 Nov 2015 00:00:00 GMT"])
def test_a_wait_that_is_none_is_not_waited(server, start, after):
    server.script = [refuse(429, **{"Retry-After": after})]
    assert compare(start()).tolist() == [1] and len(server.asked) == 2


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("after", ["inf", "61", "3600", "Fri, 27 Nov 2099 00:00:00 GMT"])
@pytest.mark.parametrize("concurrency", [1, 4])
def test_a_server_that_says_later_is_left_alone(server, start, status, after, concurrency):
    server.script, server.usual = [say()], refuse(status, **{"Retry-After": after})
    judge = start(concurrency=concurrency, calls=10)
    judged = compare(judge, 10)
    assert np.nansum(judged) == 1 and np.isnan(judged).sum() == 9 and len(server.asked) <= 2 * concurrency
    assert "longer than judge.longest_wait" in judge.report() and judge.record.calls == len(server.asked)
    server.usual = say()
    assert compare(start(), 10).tolist() == [1] * 10


def test_a_server_is_left_alone_by_all_as_long_as_it_asks(server, start):
    server.script = [refuse(429, **{"Retry-After": "0.3"})]
    begun = time.monotonic()
    assert compare(start(concurrency=2), 4).tolist() == [1] * 4
    assert 0.3 <= time.monotonic() - begun < 3 and server.most <= 2
    server.script = [refuse(503, **{"Retry-After": "0.3"})]
    begun = time.monotonic()
    assert compare(start(attempts=1), 10)[-1:].tolist() == [1] and time.monotonic() - begun >= 0.3


def test_attempts_end(server, start):
    server.script = [refuse(500)] * 3
    judge = start()
    assert np.isnan(compare(judge)).all() and len(server.asked) == 3 and reasons(judge) == ["HTTP 500"]


def test_a_judge_that_never_answers_is_given_up(server, start):
    server.usual = say("[[B]]")
    compare(start(), 2)
    server.usual = silent
    judge = start(timeout=0.5, attempts=2)
    judged = compare(judge, 10)
    assert len(server.asked) == 2 + 3 * 2 and judged[:2].tolist() == [0, 0] and np.isnan(judged[2:]).all()
    assert reasons(judge)[:3] == ["no answer within 0.5 s"] * 3
    assert all(reason.startswith("never asked: 3 questions in a row") for reason in reasons(judge)[3:])
    server.usual = say()
    assert compare(start(), 10).tolist() == [0, 0] + [1] * 8 and len(server.asked) == 8 + 8


def test_nobody_there_is_said(start, server, monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    judge = start()
    assert np.isnan(compare(judge)).all() and reasons(judge) == ["no connection, or one that was cut short"]


@pytest.mark.parametrize("status, variable", [(401, "OPENAI_API_KEY"), (403, "OPENAI_API_KEY"), (404, "OPENAI_MODEL")])
def test_an_endpoint_that_refuses_us_is_asked_no_more(server, start, status, variable):
    server.script = [say()] * 2 + [refuse(status)]
    with pytest.raises(InputError, match=f"judged 2 of 10 questions, then HTTP {status}.*{variable}"):
        compare(start(), 10)
    assert len(server.asked) == 3
    assert compare(start(), 10).tolist() == [1] * 10 and len(server.asked) == 3 + 8


# ---------------------------------------------------------------------------------------------------- limits, kills


@pytest.mark.parametrize("limit", [{"calls": 4}, {"tokens": 400}], ids=["calls", "tokens"])
def test_a_limit_holds_over_starts(server, start, limit):
    (name,) = limit
    judge = start(**limit)
    judged = compare(judge, 10)
    assert judged[:4].tolist() == [1] * 4 and np.isnan(judged[4:]).all() and len(server.asked) == 4
    assert reasons(judge) == [f"never asked: the limit of {limit[name]} {name} is reached; raise judge.{name}"] * 6
    assert np.isnan(compare(start(**limit), 10)[4:]).all() and len(server.asked) == 4
    assert compare(start(), 10).tolist() == [1] * 10 and len(server.asked) == 10


def test_a_limit_counts_failed_calls_and_those_under_way(server, start):
    server.script, server.usual = [refuse(500)] * 3, say(seconds=0.02)
    compare(start(calls=6, concurrency=4), 10)
    assert len(server.asked) == 6


@pytest.mark.parametrize("usage", [None, {}, [], {"total_tokens": "9"}, {"total_tokens": -9}, {"total_tokens": 10**99}])
def test_tokens_that_a_server_does_not_count_are_bytes(server, start, usage):
    server.script = [say("[[A]]", usage=usage)]
    judge = start()
    assert compare(judge).tolist() == [1]
    assert judge.record.tokens == len(server.asked[0]["messages"][0]["content"].encode()) + len("[[A]]")


def test_an_interrupt_keeps_what_was_judged(server, start, tmp_path):
    def interrupted(rows):
        for row in rows:
            yield row
            if row == 1:
                raise KeyboardInterrupt

    server.usual = say(seconds=0.02)
    judge = Endpoint(tmp_path / "run" / "judgements.jsonl", QUICK, progress=interrupted)
    with pytest.raises(KeyboardInterrupt):
        compare(judge, 10)
    asked = len(server.asked)
    assert 2 <= asked <= 4 and 2 <= len(judge.record.values) <= asked
    assert compare(start(), 10).tolist() == [1] * 10 and len(server.asked) <= 10 + 2


def test_a_killed_start_is_gone_on_with(server, start, tmp_path):
    code = (
        "import sys; from pathlib import Path; from dense_rlhf.evaluation.judge import Endpoint;"
        "from dense_rlhf.config.params import JudgeParams;"
        "judge = Endpoint(Path(sys.argv[1]), JudgeParams(concurrency=1));"
        f"judge.compare(['Say it.'] * 10, {MANY}, ['theirs'] * 10)"
    )
    server.script, server.usual = [say()] * 4, silent
    record = tmp_path / "run" / "judgements.jsonl"
    process = subprocess.Popen([sys.executable, "-c", code, str(record)])
    while len(server.asked) < 5 and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.wait()
    with open(record, "ab") as file:
        file.write(b'{"key": "cut short')
    server.usual = say("[[B]]")
    assert compare(start(), 10).tolist() == [1] * 4 + [0] * 6 and len(server.asked) == 5 + 6
    assert len([json.loads(line) for line in record.read_text().splitlines()]) == 10


def test_two_at_once_leave_whole_lines_and_agree(server, start, tmp_path):
    server.usual = say(seconds=0.005)
    judged = {}

    def work(name):
        judged[name] = compare(start(concurrency=4), 10)

    threads = [threading.Thread(target=work, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert judged["a"].tolist() == judged["b"].tolist() == [1] * 10 and 10 <= len(server.asked) <= 20
    lines = [json.loads(line) for line in (tmp_path / "run" / "judgements.jsonl").read_text().splitlines()]
    assert len(lines) == len(server.asked) and len({line["key"] for line in lines}) == 10


@pytest.mark.parametrize("text", ["[]\n", '{"event": "proposed"}\n', '{"key": 1, "tokens": 2}\n', "x\n"])
def test_a_file_of_something_else_is_refused(server, start, tmp_path, text):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "judgements.jsonl").write_text(text)
    with pytest.raises(InputError, match="judgements.jsonl"):
        start()


# ---------------------------------------------------------------------------------------------------- secrets, data


def test_the_key_is_written_nowhere(server, start, tmp_path, capfd, caplog):
    def repeat(handler):
        send(handler, 200, completion(f"Your key is {handler.headers['Authorization']}. [[B]]"))

    caplog.set_level("DEBUG")
    server.script = [repeat, refuse(500), refuse(400), refuse(413), refuse(401)]
    judge = start(attempts=1)
    with pytest.raises(InputError) as refused:
        compare(judge, 10)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    written = "".join(path.read_text() for path in files)
    shown = f"{refused.value!r} {judge!r} {vars(judge)} {judge.failures} {judge.report()} {capfd.readouterr()}"
    assert files and "Your key is" in written and judge.record.calls == 5
    assert KEY not in written + shown + caplog.text and str(server.server_port) not in written


@pytest.mark.parametrize("name", ["OPENAI_BASE_URL", "OPENAI_API_KEY", "OPENAI_MODEL"])
def test_the_environment_says_who_judges(server, start, monkeypatch, name):
    monkeypatch.delenv(name)
    with pytest.raises(InputError, match=f"{name} is not set"):
        compare(start())


def test_an_address_is_one(server, start, monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", "localhost:8000")
    with pytest.raises(InputError, match="OPENAI_BASE_URL must begin with http"):
        compare(start())
