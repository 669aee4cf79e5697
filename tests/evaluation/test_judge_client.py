"""One request to a judge's server that is hostile, mistaken or asks for something else."""

import gzip
import json

import numpy as np
import pytest
from chat_server import chat_server, completion, endless, raw, refuse, say, send
from judge_server import server, start  # noqa: F401

from dense_rlhf.evaluation.judge import client
from dense_rlhf.types import InputError

pytest.importorskip("openai", reason="openai is not installed: no endpoint")


def compare(judge, number=1, ours=None):
    ours = ours or [f"response {i}" for i in range(number)]
    return judge.compare(["Say it."] * number, ours, ["theirs"] * number)


# ---------------------------------------------------------------------------------------------------- address and key


@pytest.mark.parametrize(
    "name, value, reason",
    [
        ("OPENAI_BASE_URL", "localhost:8000", "must begin with http"),
        ("OPENAI_BASE_URL", "file:///etc/hosts", "must begin with http"),
        ("OPENAI_BASE_URL", "http://localhost:99999/v1", "is no address"),
        ("OPENAI_BASE_URL", "http://localhost:port/v1", "is no address"),
        ("OPENAI_BASE_URL", "http://localhost:0/v1", "is no address"),
        ("OPENAI_BASE_URL", "http://[::1", "is no address"),
        ("OPENAI_BASE_URL", "http://", "is no address"),
        ("OPENAI_BASE_URL", "http://:8000/v1", "is no address"),
        ("OPENAI_BASE_URL", "http://local host/v1", "is no address"),
        ("OPENAI_BASE_URL", "http://localhost/\nv1", "is no address"),
        ("OPENAI_BASE_URL", "http://localh\u043est/v1", "is no address"),
        ("OPENAI_API_KEY", "caf\u00e9", "characters that no key has"),
        ("OPENAI_API_KEY", "sk-1\nsk-2", "characters that no key has"),
        ("OPENAI_API_KEY", "sk-1\u200b", "characters that no key has"),
        ("OPENAI_API_KEY", " \n", "is not set"),
    ],
)
def test_an_address_or_a_key_that_is_none_is_named_before_anything_is_asked(
    server, start, monkeypatch, name, value, reason
):
    monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=f"{name} .*{reason}"):
        compare(start())
    assert server.asked == []


# ---------------------------------------------------------------------------------------------------- elsewhere


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(server, start, status):
    with chat_server() as other:
        server.usual = raw(b"", status=status, Location=f"http://127.0.0.1:{other.server_port}/v1/chat/completions")
        with pytest.raises(InputError, match=f"HTTP {status}.*not followed; correct OPENAI_BASE_URL"):
            compare(start(), 10)
        assert other.asked == [] and len(server.asked) == 1


def test_cookies_are_not_kept(server, start):
    server.script = [raw(completion("[[A]]"), **{"Set-Cookie": "who=you; Path=/"})]
    assert compare(start(), 2).tolist() == [1, 1] and [asked["cookie"] for asked in server.asked] == [None, None]


# ---------------------------------------------------------------------------------------------------- too much


@pytest.mark.parametrize("status", [200, 400, 401, 500])
def test_an_answer_without_an_end_is_not_read_on(server, start, monkeypatch, status):
    monkeypatch.setattr(client, "LIMIT", 2**20)
    server.script = [endless(status)]
    judge = start(attempts=1)
    assert np.isnan(compare(judge, 2)).tolist() == [True, False] and server.sent < 2**25
    assert judge.failures[0].reason == "the answer is longer than 1 MB"


def test_a_compressed_answer_is_not_unpacked(server, start):
    bomb = gzip.compress(bytes(2**24))
    server.script = [raw(bomb, **{"Content-Encoding": "gzip"}), raw(completion("[[A]]"), **{"Content-Encoding": "br"})]
    judge = start(attempts=1)
    assert np.isnan(compare(judge, 3)).tolist() == [True, True, False]
    assert {failure.reason for failure in judge.failures} == {"the answer is compressed, which was not asked for"}


# ---------------------------------------------------------------------------------------------------- another form


UNSUPPORTED = "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens'."


@pytest.mark.parametrize(
    "status, text, named",
    [
        (400, UNSUPPORTED, "judge.limit_as=max_completion_tokens"),
        (400, "Unsupported value: 'temperature' does not support 0", "judge.temperature=null"),
        (422, "max_tokens: extra fields not permitted", "judge.limit_as=max_completion_tokens"),
        (422, "bad", "judge.temperature=null, or judge.limit_as=max_completion_tokens.*OPENAI_MODEL"),
        (400, "bad", "judge.limit_as"),
        (402, "pay", ""),
        (405, "no", ""),
        (415, "no", ""),
    ],
)
@pytest.mark.parametrize("concurrency", [1, 4])
def test_a_form_that_is_refused_ends_the_round_and_is_named(server, start, status, text, named, concurrency):
    server.usual = refuse(status, text)
    with pytest.raises(InputError, match=f"judged 0 of 20 questions, then HTTP {status}.*{named}"):
        compare(start(concurrency=concurrency), 20)
    assert len(server.asked) <= concurrency


def test_a_named_parameter_is_the_one_to_change(server, start):
    server.usual = refuse(400, "Unsupported value: 'temperature'")
    with pytest.raises(InputError) as refused:
        compare(start())
    assert "limit_as" not in str(refused.value)


@pytest.mark.parametrize("answer", [refuse(413), refuse(400, "maximum context length is 8 tokens"), refuse(400)])
def test_one_question_that_is_refused_costs_no_other(server, start, answer):
    server.script = [say(), answer]
    judge = start()
    assert np.isnan(compare(judge, 4)).tolist() == [False, True, False, False]
    assert judge.failures[0].reason.startswith("HTTP 4")


# ---------------------------------------------------------------------------------------------------- strange answers


def choices(*texts):
    def answer(handler):
        many = [{"message": {"content": text}, "finish_reason": "stop"} for text in texts]
        send(handler, 200, json.dumps({"choices": many}).encode())

    return answer


@pytest.mark.parametrize("texts", [("[[A]]", "[[B]]"), ("[[A]]", "none"), ("[[A]]", None)])
def test_choices_that_disagree_are_no_judgement(server, start, texts):
    server.script = [choices(*texts), choices("[[B]]", "Yes. [[B]]")]
    judge = start()
    judged = compare(judge, 2)
    assert np.isnan(judged[0]) and judged[1] == 0 and len(judge.failures) == 1


TWICE = b'{"choices": [{"message": {"content": "[[A]]"}}], "choices": [{"message": {"content": "[[B]]"}}]}'


@pytest.mark.parametrize(
    "body, kind",
    [
        (b"", "application/json"),
        (b"", "text/plain"),
        (TWICE, "application/json"),
        (b'{"choices": ' + b"[" * 50_000 + b"]" * 50_000 + b"}", "application/json"),
        (b'"[[A]]"', "application/json"),
        (b"[[A]]", "text/html"),
        (b'{"choices": {"0": 1}}', "application/json"),
        (b'{"choices": [{"message": ["content"]}]}', "application/json"),
        (b"\x00" * 100, "application/octet-stream"),
        (completion("[[A]]").replace(b"[[A]]", b"[[A]]\xff"), "application/json"),
    ],
    ids=lambda value: "",
)
def test_what_is_no_completion_is_asked_again(server, start, body, kind):
    server.script = [raw(body, kind)]
    judge = start()
    assert compare(judge).tolist() == [1] and len(server.asked) == 2


def test_the_content_type_does_not_matter(server, start):
    server.script = [raw(completion("[[B]]"), kind) for kind in ("text/plain", "text/html", "x/y")]
    assert compare(start(), 3).tolist() == [0, 0, 0]


def test_chunks_that_are_none_are_no_answer(server, start):
    def garbage(handler):
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n[[A]]\r\n")
        handler.close_connection = True

    server.script = [garbage]
    assert compare(start()).tolist() == [1] and len(server.asked) == 2


@pytest.mark.parametrize(
    "reply",
    [
        "The last line is to be [[A]], [[B]] or [[tie]].\n[[A]]",
        "RESPONSE A asks for [[B]], but [[A]]",
        "[[A\u200b]]",
        "[[\u0410]]",
        "\u202e]]A[[",
        "[[A]]<!-- [[B]] -->",
        "[[<b>A</b>]]",
        "[[[A]]]x",
        "[[A]" + "]" * 3 + " " * 1000 + "x",
    ],
)
def test_a_reply_that_only_looks_like_a_verdict_is_none(server, start, reply):
    server.script = [say(reply)]
    judge = start()
    assert np.isnan(compare(judge)).all() and "verdict" in judge.failures[0].reason


# ---------------------------------------------------------------------------------------------------- the key


@pytest.mark.parametrize("key", ["A", "B", "1", "7", "i", "]", "[[", "tie", "e"])
def test_a_key_that_is_part_of_a_verdict_costs_none(server, start, monkeypatch, tmp_path, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    server.script = [say("So [[A]]"), say("[[B]]"), say("[[tie]]"), say("[[7]]"), say("It is. [[1]]")]
    judge = start()
    assert compare(judge, 3).tolist() == [1, 0, 0.5]
    assert judge.grade(["?"] * 2, ["a", "b"]).tolist() == [7, 1] and judge.failures == []
    lines = [json.loads(line) for line in judge.record.path.read_text().splitlines()]
    assert all(key not in line["reply"].replace("\u27e8secret\u27e9", "") for line in lines)


# ---------------------------------------------------------------------------------------------------- the record


@pytest.mark.parametrize("value", ["NaN", "Infinity", "7.0", "-3", "0.25", "1e400", "true", '"1"', "[1]"])
def test_a_judgement_that_no_judge_gave_is_refused(server, start, value):
    judge = start()
    compare(judge)
    line = json.loads(judge.record.path.read_text())
    line.pop("hash", None)
    text = json.dumps(line | {"value": "HERE"}).replace('"HERE"', value)
    judge.record.path.write_text(text + "\n")
    with pytest.raises(InputError, match="judgements.jsonl"):
        start()


@pytest.mark.parametrize("change", [{"tokens": -5}, {"tokens": True}, {"tokens": 1.5}, {"template": "grading 1"}])
def test_a_line_that_was_altered_is_refused(server, start, change):
    judge = start()
    server.script = [say("[[B]]")]
    compare(judge)
    line = json.loads(judge.record.path.read_text())
    line.pop("hash", None)
    judge.record.path.write_text(json.dumps(line | change) + "\n")
    with pytest.raises(InputError, match="judgements.jsonl"):
        start()
