"""The client alone: the binary form, tries, and what it refuses to take for rewards. Servers here are scripts."""

import copy
import json
import os
import pickle
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from dense_rlhf.adapters import client as module
from dense_rlhf.adapters.client import SERVED, RewardClient, RewardServerError, pack, unpack
from dense_rlhf.types import Message

GOOD = pack({"lengths": [2]}, np.array([1.5, -2.0], np.float32))
ASKED = [[1, 2, 3]], [[4, 5]]


@contextmanager
def scripted(*answers, served="a"):
    """A server that gives these answers in turn, None hanging up, and keeps the requests."""
    waiting, requests = list(answers), []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            requests.append((self.path, dict(self.headers), body, self.client_address))
            answer = waiting.pop(0)
            if answer is None:
                self.close_connection = True
                return
            status, text, *more = answer
            self.send_response(status)
            length = len(text) if isinstance(text, bytes) else 0
            for name, value in {"Content-Length": length, SERVED: served, **dict(more)}.items():
                self.send_header(name, value)
            self.end_headers()
            with suppress(OSError):  # the client has heard enough
                for part in [text] if isinstance(text, bytes) else text:
                    self.wfile.write(part)

        do_GET = do_POST

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", requests
        server.shutdown()


@pytest.fixture
def pauses(monkeypatch):
    """The pauses that the client would have made, each at its longest."""
    made = []
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=module.time.monotonic, sleep=made.append))
    monkeypatch.setattr(module, "random", SimpleNamespace(uniform=lambda low, high: high))
    return made


@given(arrays.arrays(st.sampled_from(["<i4", "<f4"]), st.integers(0, 9)), st.dictionaries(st.text(), st.text()))
def test_what_is_packed_is_unpacked(numbers, header):
    named, same = unpack(pack(header, numbers), numbers.dtype.str)
    assert named == header and same.tobytes() == numbers.tobytes()


@given(st.binary(max_size=40))
def test_other_bytes_are_a_value_error(body):
    try:
        header, numbers = unpack(body, "<i4")
    except ValueError:
        return
    assert len(body) == 4 + int.from_bytes(body[:4], "little") + numbers.nbytes


def test_the_form_is_as_documented():
    assert pack({"a": 1}, np.array([1], ">i4")) == b'\x08\0\0\0{"a": 1}\x01\0\0\0'


def test_a_request_holds_ids_and_prompts_and_the_answer_is_cut():
    prompt, answer = [Message("user", "hi")], pack({"lengths": [2, 1]}, np.arange(3, dtype=np.float32))
    with scripted((200, answer)) as (url, requests):
        client = RewardClient(url, key="secret")
        rewards = client([[1], [2, 3]], [[4, 5], np.array([6])], ["text", prompt])
    assert [row.tolist() for row in rewards] == [[0, 1], [2]] and all(row.dtype == np.float32 for row in rewards)
    ((path, headers, body, _),) = requests
    header, ids = unpack(body, "<i4")
    assert path == "/rewards" and headers["Authorization"] == "Bearer secret" and ids.tolist() == [1, 2, 3, 4, 5, 6]
    assert header["prompts"] == ["text", [{"role": "user", "content": "hi"}]] and header["prompt_lengths"] == [1, 2]


def test_it_comes_back_when_a_full_server_says(pauses):
    full = (503, b'{"error": "full"}', ("Retry-After", "7"))
    with scripted(full, full, (200, GOOD)) as (url, requests):
        assert RewardClient(url)(*ASKED)[0].tolist() == [1.5, -2.0]
    assert pauses == [7, 7] and len({address for *_, address in requests}) == 1  # of one connection


def test_a_full_server_is_asked_within_the_time():
    with scripted((503, b'{"error": "full"}', ("Retry-After", "7"))) as (url, _):
        with pytest.raises(RewardServerError, match=r"full \(503\)") as raised:
            RewardClient(url, timeout=5)(*ASKED)
    assert raised.value.status == 503


def test_a_connection_that_was_closed_is_made_again(pauses):
    with scripted((200, GOOD), None, (200, GOOD)) as (url, requests):
        client = RewardClient(url)
        client(*ASKED)
        assert client(*ASKED)[0].tolist() == [1.5, -2.0]
    assert pauses == [0] and len(requests) == 3


def test_a_server_that_hangs_up_is_given_up(pauses):
    with scripted(*[None] * 4) as (url, requests):
        with pytest.raises(RewardServerError, match="does not answer") as raised:
            RewardClient(url, retries=3)(*ASKED)
    assert raised.value.status is None and len(requests) == 4 and pauses == pytest.approx([0, 0.3, 0.9])


@pytest.mark.parametrize("status", [400, 401, 413, 422, 500, 404])
def test_a_refusal_is_told_and_not_tried_again(status):
    with scripted((status, json.dumps({"error": "no"}).encode())) as (url, requests):
        with pytest.raises(RewardServerError, match=rf"no \({status}\)") as raised:
            RewardClient(url)(*ASKED)
    assert raised.value.status == status and len(requests) == 1


@pytest.mark.parametrize(
    "answer", [b"", b"garbage", GOOD[:-4], GOOD + b"\0" * 4, pack({"lengths": [1]}, np.zeros(2, np.float32))]
)
def test_what_are_no_rewards_of_the_request_is_refused(answer):
    with scripted((200, answer)) as (url, _):
        with pytest.raises(RewardServerError, match="gave no rewards"):
            RewardClient(url)(*ASKED)


def test_what_is_no_description_is_refused():
    with scripted((200, b"<html>"), (200, b"[1]")) as (url, _):
        for _ in range(2):
            with pytest.raises(RewardServerError, match="gave no description"):
                RewardClient(url).about()


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_rewards_that_are_not_finite_are_refused(number):
    with scripted((200, pack({"lengths": [2]}, np.array([1, number], np.float32)))) as (url, _):
        with pytest.raises(RewardServerError, match="not finite"):
            RewardClient(url)(*ASKED)


def test_an_answer_without_an_end_is_not_read_on():
    with scripted((200, b"\0" * 2**22)) as (url, _):
        with pytest.raises(RewardServerError, match=r"answers with more than \d+ bytes"):
            RewardClient(url)(*ASKED)
    with scripted((200, b"", ("Content-Length", 10**15))) as (url, _):
        with pytest.raises(RewardServerError, match="answers with more than"):
            RewardClient(url)(*ASKED)


def test_an_answer_that_drips_is_given_up_in_time():
    def slow():
        while True:
            time.sleep(0.02)
            yield b"x"

    with scripted((200, slow(), ("Content-Length", 1000))) as (url, _):
        began = time.monotonic()
        with pytest.raises(RewardServerError, match="does not answer .*within"):
            RewardClient(url, timeout=0.2, retries=0)(*ASKED)
    assert time.monotonic() - began < 10  # the whole answer takes 20 s


def test_an_answer_that_is_cut_short_is_asked_for_again(pauses):
    with scripted((200, GOOD[:-4], ("Content-Length", len(GOOD)), ("Connection", "close")), (200, GOOD)) as (url, _):
        assert RewardClient(url)(*ASKED)[0].tolist() == [1.5, -2.0]


def test_another_model_than_wanted_is_refused():
    with scripted((200, GOOD), (200, GOOD), (200, GOOD), served="b") as (url, _):
        with pytest.raises(RewardServerError, match="serves b, wanted a"):
            RewardClient(url, served="a")(*ASKED)
        client = RewardClient(url)
        client(*ASKED)
        client.served = "a"  # as if that had come first
        with pytest.raises(RewardServerError, match="serves b, wanted a"):
            client(*ASKED)
    with scripted((200, GOOD), served="") as (url, _):
        with pytest.raises(RewardServerError, match="does not say what it serves, wanted a"):
            RewardClient(url, served="a")(*ASKED)


def test_an_answer_that_comes_late_is_nobodys(monkeypatch):
    """A connection on which a call was interrupted is closed: the next call would read the last one's rewards."""
    other = pack({"lengths": [2]}, np.array([8, 9], np.float32))
    with scripted((200, other), (200, GOOD)) as (url, _):
        client = RewardClient(url)
        connection = client._connection(5)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(connection, "getresponse", Mock(side_effect=KeyboardInterrupt))
            client(*ASKED)
        assert client(*ASKED)[0].tolist() == [1.5, -2.0]


def test_threads_and_forks_have_connections_of_their_own(monkeypatch):
    client, others = RewardClient("http://127.0.0.1:1"), []
    own = client._connection(1)
    thread = threading.Thread(target=lambda: others.append(client._connection(1)))
    thread.start()
    thread.join()
    assert client._connection(1) is own is not others[0]
    monkeypatch.setattr(module, "os", SimpleNamespace(getpid=lambda: os.getpid() + 1))
    assert client._connection(1) is not own


def test_a_client_can_be_sent_to_another_process():
    client = RewardClient("http://127.0.0.1:1/base/", "secret", 3, 2, "a")
    assert pickle.dumps(client)
    same = copy.copy(client)  # made as pickle makes it
    assert (same.url, same._key, same.timeout, same.retries, same.served) == (client.url, "secret", 3, 2, "a")


@pytest.mark.parametrize(
    "url", ["127.0.0.1:8700", "ftp://host", "http://", "http://host:99999", "http://[::1", "http://me:hidden@host"]
)
def test_a_url_is_checked(url):
    with pytest.raises(ValueError, match="wanted one such as") as raised:
        RewardClient(url)
    assert "hidden" not in str(raised.value)


@pytest.mark.parametrize("key", ["two\nlines", "two words", "hidden\u20ac"])
def test_a_key_that_no_header_holds_is_refused_and_not_told(key):
    with pytest.raises(ValueError, match="key is no word of ASCII") as raised:
        RewardClient("http://127.0.0.1:1", key)
    assert key not in str(raised.value)


@pytest.mark.parametrize("prompts", ["a", [None], [5], [{"role": "user"}], [[{"content": "a"}]], [[None]]])
def test_prompts_are_checked_before_they_are_sent(prompts):
    with pytest.raises(ValueError, match="wanted texts or messages with role and content"):
        RewardClient("http://127.0.0.1:1")([[1]], [[1]], prompts)


@pytest.mark.parametrize("row", [[], [-1], [0.5], [[1]], [2**31]])
def test_ids_are_checked_before_they_are_sent(row):
    with pytest.raises(ValueError, match=r"response_ids\[1\]"):
        RewardClient("http://127.0.0.1:1")([[1], [1]], [[1], row])


def test_it_needs_python_and_numpy_alone(tmp_path):
    """In an environment without torch; also as a copy in one without the package."""
    (tmp_path / "copied.py").write_text(open(module.__file__).read())
    code = (
        "import sys; sys.path[:0] = sys.argv[1:]; sys.modules.update(dict.fromkeys(['torch', 'transformers', 'trl']));"
        "import dense_rlhf.adapters.client; sys.modules['dense_rlhf'] = None; import copied; print(copied.RewardClient)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), str(module.__file__).rpartition("/dense_rlhf/")[0]],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "copied.RewardClient" in done.stdout
