"""The command: what it reads, what it refuses before it loads a model, and a process told to stop under load."""

import json
import os
import signal
import socket
import sys
import time
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import numpy as np
import pytest
import torch

from dense_rlhf.__main__ import main
from dense_rlhf.adapters import Scorer, dense_rewards
from dense_rlhf.adapters.client import RewardClient, RewardServerError
from dense_rlhf.adapters.serve_rewards import KEY, listening, load, read_key, read_settings
from dense_rlhf.types import InputError, RewardShape

OPTIONS = dict(shape=None, normalise=None, trainer_tokenizer=None, set=None, key_file=None, host="127.0.0.1", port=0)


@pytest.fixture(scope="module")
def folder(reward_model, tmp_path_factory):
    path = tmp_path_factory.mktemp("secret-place") / "reward"
    reward_model.model.save_pretrained(path)
    reward_model.tokenizer.save_pretrained(path)
    return path


def settings(folder, **options):
    return read_settings(Namespace(model=str(folder), **OPTIONS | options))


def test_options_and_settings_are_one(folder):
    given = settings(folder, shape="shap=0.6,uniform=0.4", normalise="signed", set=["limits.batch=8", "scale=2"])
    assert given.shape.reward_shape() == RewardShape(("shap", "uniform"), (0.6, 0.4), "signed")
    assert given.limits.batch == 8 and given.scale == 2
    own = settings(folder, shape="my.module:source=0.5,shap=0.5").shape
    assert own.sources == ("my.module:source", "shap") and own.weights == (0.5, 0.5)
    alone = settings(folder, shape="shap", set=["attribution.permutations=4"])
    assert alone.shape.reward_shape() == RewardShape(("shap",), (1.0,)) and alone.attribution.permutations == 4


@pytest.mark.parametrize(
    "options, text",
    [
        ({"shape": "shap,uniform"}, "shape.weights"),
        ({"shape": "shap=a"}, "shape.weights"),
        ({"set": ["limits.batc=1"]}, "limits.batc is not a parameter.* did you mean batch"),
        ({"set": ["limits.batch=0"]}, "limits.batch is 0, wanted a whole number of at least 1"),
        (
            {"set": ["shape.weights=learned", "shape.sources=[shap, lime]"]},
            "wanted the numbers that a search has learned",
        ),
        ({"trainer_tokenizer": "./nowhere"}, "trainer_tokenizer is './nowhere'"),
    ],
)
def test_wrong_settings_are_named(folder, options, text):
    with pytest.raises(InputError, match=text):
        settings(folder, **options)


def test_what_cannot_be_served_is_told_before_it_is(folder, tmp_path):
    with pytest.raises(InputError, match="log_ratio cannot explain"):
        load(settings(folder, shape="log_ratio"))
    with pytest.raises(InputError, match="finished reward model"):
        load(settings("scratch"))
    with pytest.raises(InputError, match="finished reward model"):
        load(settings("policy"))
    with pytest.raises(InputError, match="cannot load the tokenizer"):
        load(settings(folder, trainer_tokenizer=str(tmp_path)))


def test_a_description_has_hashes_and_no_paths(folder, tmp_path):
    marks = tmp_path / "marks.jsonl"
    marks.write_text("{}")
    scorer, about = load(settings(folder, trainer_tokenizer=str(folder), set=[f"attribution.rationale_path={marks}"]))
    assert (
        about["model"] == "reward" and about["tokenizer"] == about["trainer_tokenizer"] and len(about["served"]) == 16
    )
    assert str(tmp_path) not in json.dumps(about) and "secret-place" not in json.dumps(about)
    _, other = load(settings(folder, trainer_tokenizer=str(folder), set=["scale=2"]))
    assert other["served"] != about["served"] and other["weights"] == about["weights"]


def test_a_key_comes_from_a_file_or_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv(KEY, raising=False)
    assert read_key(None) is None
    monkeypatch.setenv(KEY, "from-environment")
    assert read_key(None) == "from-environment"
    file = tmp_path / "key"
    file.write_text("from-file\n")
    assert read_key(str(file)) == "from-file"
    for text in ("", "two words", "schlüssel"):
        file.write_text(text)
        with pytest.raises(InputError, match="holds no key; wanted one word") as raised:
            read_key(str(file))
        assert not text or text not in str(raised.value)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="holds no key"):
        read_key(str(file))
    with pytest.raises(InputError, match="cannot be read"):
        read_key(str(tmp_path / "missing"))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3", "gpu7"])
def test_an_address_that_others_reach_wants_a_key(folder, monkeypatch, capsys, host):
    monkeypatch.delenv(KEY, raising=False)
    assert main(["serve-rewards", str(folder), "--host", host]) == 2
    assert f"--host {host} can be reached from elsewhere; give --key-file" in capsys.readouterr().err


def test_a_port_in_use_is_told(folder, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["serve-rewards", str(folder), "--port", str(taken.getsockname()[1])]) == 2
    assert "cannot be served at: Address already in use" in capsys.readouterr().err


@contextmanager
def process(*command):
    """The command in a process of its own, a fork, as importing takes seconds: its id and its output."""
    read, write = os.pipe()
    if not (pid := os.fork()):
        code = 70
        try:
            sys.stdout = sys.stderr = open(write, "w", buffering=1)
            torch.set_num_threads(1)  # those of the parent did not come along
            code = main([*command])
        finally:
            os._exit(code)
    os.close(write)
    try:
        with open(read) as output:
            yield pid, output
    finally:
        with suppress(ProcessLookupError, ChildProcessError):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def test_an_answer_is_sent_at_once():
    """Headers and body are two packets: the second would wait for the client to acknowledge the first."""
    with listening("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        with listener.accept()[0] as connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_told_to_stop_under_load_it_finishes_what_it_took(folder, reward_model):
    """Every call ends in rewards of its own content, or in an error of the connection; none in other rewards."""
    with process("serve-rewards", str(folder), "--shape", "shap", "--port", "0") as (pid, output):
        client, answers = RewardClient(output.readline().split(" at ")[1].split()[0], retries=1), {}

        def ask(first):
            for n in range(first, first + 200):
                request = [[3, 4 + n % 7]], [[5 + n // 200, 20 + n % 200, 21, 22, 23]]
                try:
                    answers[n] = request, client(*request)
                except RewardServerError as error:
                    assert error.status in (None, 503)
                    return
                if n == 5:
                    os.kill(pid, signal.SIGTERM)

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(ask, range(0, 1600, 200)))
        assert output.read() == "stopped\n" and os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert 5 < len(answers) < 1600
    every = [[request[part][0] for request, _ in answers.values()] for part in (0, 1)]
    own = dense_rewards(Scorer(reward_model.model, reward_model.tokenizer), *every, RewardShape(("shap",), (1.0,)))
    for (_, (row,)), mine in zip(answers.values(), own, strict=True):
        np.testing.assert_allclose(row, mine, atol=1e-6)


@pytest.mark.parametrize("ends", [True, False], ids=["ends soon after", "never ends"])
def test_what_takes_longer_than_it_may_ends_it_with_an_error(folder, tmp_path, monkeypatch, ends):
    end = tmp_path / "end"

    def slow(*_):
        while not end.exists():
            time.sleep(0.01)

    monkeypatch.setattr("dense_rlhf.adapters.batcher.dense_rewards", slow)
    with process("serve-rewards", str(folder), "--port", "0", "--set", "limits.stop=1") as (pid, output):
        client = RewardClient(output.readline().split(" at ")[1].split()[0], timeout=60, retries=0)
        with ThreadPoolExecutor(1) as pool:
            lost = pool.submit(client, [[1]], [[2]])
            while "dense_rlhf_held_bytes 0.0" in client._send("GET", "/metrics").decode():
                time.sleep(0.01)
            os.kill(pid, signal.SIGTERM)
            with pytest.raises(RewardServerError):
                lost.result(60)
        if ends:
            end.touch()
        assert "requests were not finished within limits.stop = 1 seconds" in output.read()
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1
