"""A served reward model: requests as vLLM takes them, and answers that are no scores."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from dense_rlhf.adapters.client import RewardServerError
from dense_rlhf.adapters.served_model import ServedModel
from dense_rlhf.attribution.black_box import explain_black_box
from dense_rlhf.types import InputError, Message

PROMPT, RESPONSE = "the film", " was good. A bad plot"


def good_and_bad(text):
    return text.count("good") - 2.0 * text.count("bad")


def answer(path, body):
    """What a server says of a request, in another order than asked."""
    if "messages" in body:
        texts = [" ".join(turn["content"] for turn in body["messages"])]
    else:
        texts = body["text_2"] if path == "/score" else body["input"]
    rows = []
    for index, text in enumerate(texts):
        value = good_and_bad(text)
        field = {"/score": {"score": value}, "/pooling": {"data": [9.0, value]}}.get(path, {"probs": [9.0, value]})
        rows.append({"index": index, **field})
    return json.dumps({"data": rows[::-1]}).encode()


@contextmanager
def server(reply=answer):
    requests = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append((self.path, self.headers, body))
            text = reply(self.path, body)
            self.send_response(200)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as one:
        threading.Thread(target=one.serve_forever, args=(0.01,), daemon=True).start()
        try:
            yield f"http://127.0.0.1:{one.server_port}", requests
        finally:
            one.shutdown()


@pytest.mark.parametrize("path", ["/classify", "/v1/classify", "/pooling", "/score"])
def test_a_served_model_is_explained(path):
    with server() as (url, requests):
        score = ServedModel(url, "made", path, key="secret", output=1)
        explained = explain_black_box(score, PROMPT, RESPONSE, "shap")
    assert explained.credit == pytest.approx([0, 1, 0, -2, 0], abs=1e-6) and explained.model == "made"
    asked, headers, body = requests[0]
    assert (
        asked == path and headers["Content-Type"] == "application/json" and headers["Authorization"] == "Bearer secret"
    )
    assert body["model"] == "made" and body["use_activation"] is False and len(requests) == 1


def test_many_texts_are_asked_in_batches_and_dialogues_one_by_one():
    with server() as (url, requests):
        score = ServedModel(url, "made", output=1, fields={})
        texts = [" good" * (n % 3) + str(n) for n in range(150)]
        assert score(PROMPT, texts).tolist() == [n % 3 for n in range(150)] and len(requests) == 3
        assert score(PROMPT, []).tolist() == []
        parts = [{"role": "user", "content": "hi"}, Message("assistant", "well"), {"role": "tool", "content": "3"}]
        assert score(parts, ["bad", "good"]).tolist() == [-2, 1]
    turns = requests[-1][2]["messages"]
    assert [turn["role"] for turn in turns] == ["user", "assistant", "tool", "assistant"] and len(requests) == 5


@pytest.mark.parametrize(
    "text",
    [
        "no JSON",
        "[]",
        "null",
        '{"data": []}',
        '{"data": [{"index": 0, "probs": [1.0]}, {"index": 0, "probs": [1.0]}]}',
        '{"data": [{"index": 0, "probs": [1.0]}, {"index": 2, "probs": [1.0]}]}',
        '{"data": [{"index": 0, "probs": [1.0]}, {"index": 1, "probs": []}]}',
        '{"data": [{"index": 0, "probs": [1.0]}, {"index": 1, "probs": [NaN]}]}',
        '{"data": [{"index": 0, "probs": [1.0]}, {"index": 1, "probs": ["1"]}]}',
        '{"data": [{"index": 0, "probs": [1.0]}, {"index": 1, "probs": [true]}]}',
        '{"data": [{"index": 0, "probs": [1.0]}, {"index": 1, "probs": {"0": 1}}]}',
        '{"data": [{"index": 0, "probs": [1.0]}, {"index": [1], "probs": [1.0]}]}',
        '{"data": [{"index": 0, "probs": [1.0]}, 1]}',
        "[" * 100_000,
    ],
)
def test_an_answer_that_is_no_scores_is_refused(text):
    with server(lambda *_: text.encode()) as (url, _), pytest.raises(RewardServerError, match="gave no scores"):
        ServedModel(url, "made")(PROMPT, ["a", "b"])


def test_an_answer_without_end_is_not_read_on():
    with server(lambda *_: b" " * 2**22) as (url, _), pytest.raises(RewardServerError, match="answers with more than"):
        ServedModel(url, "made")(PROMPT, ["a"])


def test_what_cannot_be_asked_is_refused():
    with pytest.raises(InputError, match="path is '/chat', wanted one of /classify"):
        ServedModel("http://127.0.0.1:1", "made", "/chat")
    with pytest.raises(InputError, match="/score takes two texts"):
        ServedModel("http://127.0.0.1:1", "made", "/score")([Message("user", "hi")], ["a"])
