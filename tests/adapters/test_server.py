"""The server over HTTP: rewards are those of direct calls, whatever other clients do; what is too much is refused."""

import http.client
import json
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import SENTENCES
from hypothesis import given, settings
from hypothesis import strategies as st

from dense_rlhf.adapters import Scorer, batcher, dense_rewards
from dense_rlhf.adapters.batcher import Batcher, Limits
from dense_rlhf.adapters.client import BINARY, RewardClient, RewardServerError, pack
from dense_rlhf.adapters.serve_rewards import listening, make_server
from dense_rlhf.models import tiny_recipe
from dense_rlhf.types import Message, RewardShape

SIGNED = RewardShape(("shap",), (1.0,), "signed")
JSON = "application/json"
SECRET = "correct-horse"


@contextmanager
def served(scorer, key=None, **limits):
    """A server in a thread of this process; ends as with SIGTERM."""
    rewards = Batcher(scorer, SIGNED, Limits(**limits))
    server, listener = make_server(rewards, {"served": "abc"}, key, ""), listening("127.0.0.1", 0)
    thread, port = threading.Thread(target=server.run, args=([listener],)), listener.getsockname()[1]
    thread.start()
    try:
        yield SimpleNamespace(url=f"http://127.0.0.1:{port}", port=port, rewards=rewards)
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive() and not rewards.is_alive()


def asked(server, body, kind=JSON, path="/rewards", method="POST", **headers):
    """Status and parsed JSON of one request."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    connection.request(method, path, body, {"Content-Type": kind} | headers)
    answer = connection.getresponse()
    text = answer.read()
    connection.close()
    return answer.status, json.loads(text) if answer.headers["Content-Type"] == JSON else text


def metric(server, name):
    _, text = asked(server, None, path="/metrics", method="GET")
    return float(re.search(rf"^{re.escape(name)} (.+)$", text.decode(), re.M)[1])


def until(condition):
    """Wait for what the server does by itself a moment later."""
    for _ in range(3000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not happen")


def rows(n, start=0):
    """Responses of uneven lengths, each of which differs from every other."""
    responses = [[10 + (start + i) // 200, 10 + (start + i) % 200, *range(20, 20 + i % 5)] for i in range(n)]
    return [[3, 4 + i % 3] for i in range(n)], responses


def direct(scorer, *request):
    return dense_rewards(
        Scorer(scorer.model, scorer.tokenizer, scorer.trainer_tokenizer), *request[:2], SIGNED, *request[2:]
    )


def same(rewards, own, atol=1e-6):
    """Joined responses are padded otherwise, which changes the last digit."""
    for row, mine in zip(rewards, own, strict=True):
        np.testing.assert_allclose(row, mine, rtol=0, atol=atol)


@pytest.fixture(scope="module")
def scorer(reward_model):
    return Scorer(reward_model.model, reward_model.tokenizer)


@pytest.fixture(scope="module")
def server(scorer):
    with served(scorer, body=1, responses=64, tokens=64) as one:
        yield one


@pytest.fixture
def gate(monkeypatch):
    """Closed, the model waits; whatever the test does, it is opened in the end."""
    opened = threading.Event()

    def slow(*request):
        assert opened.wait(30)
        return dense_rewards(*request)

    monkeypatch.setattr(batcher, "dense_rewards", slow)
    yield opened
    opened.set()


def test_rewards_are_those_of_a_direct_call_to_the_last_bit(server, scorer):
    request = rows(5)
    own, client = direct(scorer, *request), RewardClient(server.url)
    status, answer = asked(server, json.dumps({"prompt_ids": request[0], "response_ids": request[1]}))
    assert status == 200
    same(answer["rewards"], own, 0)
    same(client(*request), own, 0)
    assert client(*rows(0)) == [] and client.served == "abc" and client.about() == {"served": "abc"}


def test_another_tokenizer_on_the_trainers_side(reward_model, tokenizer):
    other = tiny_recipe.train_tokenizer([s.upper() + s for s in SENTENCES], 280)
    scorer = Scorer(reward_model.model, tokenizer, other)
    ids = [other("the film")["input_ids"]] * 2, [other(text)["input_ids"] for text in (" was good", " was a bad plot")]
    prompts = ["the film", (Message("user", "the film"),)]
    with served(scorer) as one:
        client = RewardClient(one.url)
        same(client(*ids), direct(scorer, *ids), 0)
        same(client(*ids, prompts), direct(scorer, *ids, prompts), 0)
        messages = [{"role": "user", "content": "the film"}]
        body = {"prompt_ids": ids[0], "response_ids": ids[1], "prompts": ["the film", messages]}
        same(asked(one, json.dumps(body))[1]["rewards"], direct(scorer, *ids, prompts), 0)


def test_sixty_four_clients_each_get_their_own(server, scorer):
    requests = [rows(1 + n % 3, start=10 * n + 100) for n in range(64)]
    client, together = RewardClient(server.url), threading.Barrier(64, timeout=30)

    def ask(request):
        together.wait()
        return client(*request)

    before = server.rewards.batches
    with ThreadPoolExecutor(64) as pool:
        answers = list(pool.map(ask, requests))
    every = [sum((request[part] for request in requests), []) for part in (0, 1)]
    own = iter(direct(scorer, *every))
    for answer in answers:
        same(answer, [next(own) for _ in answer])
    assert server.rewards.batches - before < 64 and server.rewards.waiting == 0


def test_who_disconnects_is_left_out_and_the_others_go_on(server, scorer, gate):
    first, others = rows(1, 900), rows(2, 910)
    batches, responses = server.rewards.batches, metric(server, "dense_rlhf_responses_total")
    body = pack({"prompt_lengths": [1], "response_lengths": [2]}, np.array([1, 299, 298], np.int32))
    head = f"POST /rewards HTTP/1.1\r\nHost: a\r\nContent-Type: {BINARY}\r\nContent-Length: {len(body)}\r\n\r\n"
    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(RewardClient(server.url), *first)
        until(lambda: server.rewards.batches > batches)
        held = metric(server, "dense_rlhf_held_bytes")
        for part in (body, body[:9]):  # one who waits for rewards, one in the middle of a body
            with socket.create_connection(("127.0.0.1", server.port)) as gone:
                gone.sendall(head.encode() + part)
                until(lambda: metric(server, "dense_rlhf_held_bytes") > held)
                until(lambda: server.rewards.waiting == 1)  # of who waits
            until(lambda: metric(server, "dense_rlhf_held_bytes") == held)
        two = pool.submit(RewardClient(server.url), *others)
        until(lambda: server.rewards.waiting == 3)
        gate.set()
        same([*one.result(30), *two.result(30)], [*direct(scorer, *first), *direct(scorer, *others)])
    assert metric(server, "dense_rlhf_responses_total") - responses == 3


@pytest.mark.parametrize("kind", [JSON, BINARY])
@settings(max_examples=40)
@given(
    body=st.one_of(
        st.binary(max_size=60),
        st.builds(pack, st.just({"prompt_lengths": [1], "response_lengths": [1]}), st.just(np.zeros(3, np.int32))),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.just("prompt_ids"),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(st.sampled_from(["prompt_ids", "response_ids", "prompts", "a"]), inner, max_size=3)
            ),
        ).map(lambda value: json.dumps(value).encode()),
        st.builds(
            lambda *parts: pack(dict(zip(("prompt_lengths", "response_lengths", "prompts"), parts[:3])), parts[3]),
            st.lists(st.integers(-1, 3), max_size=2) | st.just(5),
            st.lists(st.integers(-1, 3), max_size=2),
            st.none() | st.lists(st.text(max_size=2, alphabet="a\ud800é") | st.none(), max_size=2),
            st.lists(st.integers(-1, 310), max_size=6).map(lambda ids: np.array(ids, np.int32)),
        ),
    )
)
def test_garbage_is_refused_in_one_line(server, kind, body):
    status, answer = asked(server, body, kind)
    assert status in (200, 400, 422) and (status == 200 or list(answer) == ["error"] and len(answer["error"]) < 600)


@settings(max_examples=20)
@given(st.binary(max_size=80), st.booleans())
def test_what_is_no_http_ends_its_connection_alone(server, noise, begins):
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(b"POST /rewards HTTP/1.1\r\n" * begins + noise + b"\r\n\r\n")
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(4096):
            pass
    assert asked(server, None, path="/health", method="GET") == (200, {"status": "ok"})


BODY = {"prompt_ids": [[1]], "response_ids": [[1, 2]]}


@pytest.mark.parametrize(
    "change, status, text",
    [
        ({"response_ids": [[1]] * 2}, 422, "1 prompt_ids, 2 response_ids; wanted one each a response"),
        ({"prompts": []}, 422, "1 prompt_ids, 1 response_ids, 0 prompts"),
        ({"prompts": [None]}, 422, "wanted text or messages with role and content"),
        ({"prompts": ["\ud800"]}, 400, "the body cannot be read as application/json"),
        ({"response_ids": [[]]}, 422, r"response_ids\[0\] is \[\], wanted a list of at least 1"),
        ({"response_ids": [[1.5]]}, 422, r"response_ids\[0\]\[0\] is 1.5 \(a number\), wanted a whole number"),
        ({"response_ids": [[True]]}, 422, "wanted a whole number"),
        ({"response_ids": [[-100]]}, 422, "wanted a whole number of at least 0"),
        ({"response_ids": [[2**31]]}, 422, "wanted a number below"),
        ({"response_ids": [[10**6]]}, 422, "has 300 embeddings, but the text has token 1000000"),
        ({"response_ids": [[1] * 65]}, 422, "response_ids has a row of 65 tokens, wanted at most 64"),
        ({"prompt_ids": [[1] * 65]}, 422, "prompt_ids has a row of 65 tokens"),
        ({"prompt_ids": [[1]] * 65, "response_ids": [[1]] * 65}, 422, "65 responses in one request, wanted at most 64"),
        ({"response_id": [[1]]}, 422, "response_id is not a parameter; .* did you mean response_ids"),
    ],
)
def test_bad_input_is_named(server, change, status, text):
    given_status, answer = asked(server, json.dumps(BODY | change))
    assert given_status == status and re.search(text, answer["error"]), answer


def test_a_field_that_is_given_twice_is_refused(server):
    for body in (
        '{"prompt_ids": [[1]], "prompt_ids": [[2]], "response_ids": [[3]]}',
        '{"prompt_ids": [[1]], "response_ids": [[3]], "prompts": [[{"role": "user", "content": "", "content": "a"}]]}',
    ):
        status, answer = asked(server, body)
        assert status == 400 and "is given twice" in answer["error"], answer
    header = b'{"prompt_lengths": [2], "prompt_lengths": [1], "response_lengths": [1]}'
    status, answer = asked(server, len(header).to_bytes(4, "little") + header + bytes(8), BINARY)
    assert status == 400 and "is given twice" in answer["error"], answer


def test_other_refusals(server):
    body = json.dumps(BODY)
    assert asked(server, body, "text/plain")[0] == 415
    assert asked(server, iter([body.encode()]), **{"Transfer-Encoding": "chunked"})[0] == 411
    assert asked(server, None, path="/", method="GET")[0] == 404 and asked(server, None, method="GET")[0] == 405
    assert asked(server, b"[" * 100_000)[0] == 400
    assert asked(server, pack({"response_lengths": [1]}, np.zeros(2, np.int32)), BINARY) == (
        422,
        {"error": "2 token ids arrived, wanted 1, as the header's lengths say"},
    )
    with pytest.raises(RewardServerError, match="wanted at most 1 MiB") as raised:
        RewardClient(server.url)([[1]], [[1] * 300_000])
    assert raised.value.status == 413


def test_a_reward_model_that_fails_fails_alone(server, scorer, monkeypatch):
    """Its text, which may name files, stays in the log."""
    with monkeypatch.context() as patch:
        patch.setattr(
            scorer.model.base_model, "forward", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("/secret/x"))
        )
        status, answer = asked(server, json.dumps({"prompt_ids": [[9]], "response_ids": [[9, 9, 8]]}))
    assert (status, answer["error"]) == (500, "the reward model failed on this request; the server's log says how")
    same(RewardClient(server.url)([[9]], [[9, 9, 8]]), direct(scorer, [[9]], [[9, 9, 8]]), 0)


def test_a_key_is_asked_for_and_never_told(scorer, caplog):
    caplog.set_level(0)
    with served(scorer, key=SECRET) as one:
        for headers in (
            {},
            {"Authorization": "Bearer other"},
            {"Authorization": SECRET},
            {"Authorization": "Bearer \xe9"},
        ):
            for method, path in (("POST", "/rewards"), ("GET", "/about"), ("GET", "/metrics")):
                status, answer = asked(one, b"{}" * (method == "POST"), path=path, method=method, **headers)
                assert status == 401 and SECRET not in str(answer)
        assert asked(one, None, path="/health", method="GET")[0] == 200
        assert len(RewardClient(one.url, SECRET)(*rows(2))) == 2
        with pytest.raises(RewardServerError, match="no key, or another"):
            RewardClient(one.url, "other")(*rows(2))
    assert SECRET not in caplog.text


def test_a_full_server_says_when_to_come_back_and_the_client_does(scorer, gate):
    with served(scorer, waiting=2, held=1, body=1) as one, ThreadPoolExecutor(3) as pool:
        client = RewardClient(one.url)
        first = pool.submit(client, *rows(1, 700))
        until(lambda: one.rewards.batches)
        second = pool.submit(client, *rows(2, 710))
        until(lambda: one.rewards.waiting == 2)
        request = rows(1, 720)
        status, answer = asked(one, json.dumps({"prompt_ids": request[0], "response_ids": request[1]}))
        assert (status, answer) == (503, {"error": "2 responses wait; ask again"})
        third = pool.submit(client, *request)
        until(lambda: metric(one, 'dense_rlhf_requests_total{status="503"}') >= 2)
        gate.set()
        same([*first.result(30), *second.result(30), *third.result(30)], [
            *direct(scorer, *rows(1, 700)), *direct(scorer, *rows(2, 710)), *direct(scorer, *request)
        ])  # fmt: skip


SLOW = f"POST /rewards HTTP/1.1\r\nHost: a\r\nContent-Type: {BINARY}\r\nContent-Length: {2**20}\r\n\r\n".encode()


def test_bodies_are_bounded_in_bytes_before_they_are_read(scorer):
    with served(scorer, held=1, body=1) as one:
        with socket.create_connection(("127.0.0.1", one.port), timeout=30) as slow:
            slow.sendall(SLOW)
            until(lambda: metric(one, "dense_rlhf_held_bytes") == 2**20)
            status, answer = asked(one, json.dumps(BODY))
            assert status == 503 and answer["error"] == "1.0 MiB of requests wait; ask again"
        until(lambda: metric(one, "dense_rlhf_held_bytes") == 0)
        assert asked(one, json.dumps(BODY))[0] == 200


def test_a_body_that_does_not_arrive_is_given_up(scorer):
    with served(scorer, upload=0.05) as one:
        with socket.create_connection(("127.0.0.1", one.port), timeout=30) as slow:
            slow.sendall(SLOW)
            assert b" 408 " in slow.recv(4096)
        assert metric(one, "dense_rlhf_held_bytes") == 0


def test_metrics_count(scorer):
    with served(scorer) as one:
        client, request = RewardClient(one.url), rows(3, 800)
        before = metric(one, "dense_rlhf_evaluations_total")
        client(*request), client(*request)
        assert metric(one, 'dense_rlhf_requests_total{status="200"}') == 2
        assert metric(one, "dense_rlhf_request_seconds_count") == 2 and metric(one, "dense_rlhf_batches_total") == 2
        assert metric(one, "dense_rlhf_evaluations_total") - before > 3
