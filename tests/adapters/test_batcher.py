"""Requests that wait are joined: each has its own rewards, and its own failure."""

import threading
import time
from contextlib import contextmanager

import numpy as np
import pytest

from dense_rlhf.adapters import Scorer, batcher, dense_rewards
from dense_rlhf.adapters.batcher import Asked, Batcher, Full, Limits, ModelFailure
from dense_rlhf.types import InputError, Message, RewardShape

SIGNED = RewardShape(("shap",), (1.0,), "signed")
POISON = 7  # a token on which the model of these tests fails


def rows(n, start=10):
    """Prompt and response ids of n responses that differ from those of another start."""
    return [np.array([3, 4 + i]) for i in range(n)], [np.array([start + i, 20, 21 + i % 3]) for i in range(n)]


@contextmanager
def gated(scorer, monkeypatch, **limits):
    """A batcher whose first batch waits for the gate, so that what is submitted before it opens is joined."""
    gate, sizes, one = threading.Event(), [], Batcher(scorer, SIGNED, Limits(**limits))

    def slow(scorer, prompt_ids, response_ids, *rest):
        assert gate.wait(30)
        sizes.append(len(response_ids))
        if any(POISON in row for row in response_ids):
            raise RuntimeError("/secret/model.py")
        return dense_rewards(scorer, prompt_ids, response_ids, *rest)

    monkeypatch.setattr(batcher, "dense_rewards", slow)
    one.start()
    try:
        yield one, gate, sizes
    finally:
        gate.set()
        assert one.close(30)


def waiting(one, *requests):
    """Submit the requests after one that holds the gate."""
    held = Asked(*rows(1, 40))
    one.submit(held)
    while one.waiting:  # until the thread has taken it
        time.sleep(0.001)
    asked = [Asked(*request) for request in requests]
    for each in asked:
        one.submit(each)
    return [held, *asked]


@pytest.fixture
def scorer(reward_model):
    return Scorer(reward_model.model, reward_model.tokenizer)


def test_what_waits_is_joined_up_to_a_batch_and_nothing_is_mixed_up(scorer, monkeypatch):
    with gated(scorer, monkeypatch, batch=4) as (one, gate, sizes):
        asked = waiting(one, *(rows(n, 50 + 10 * n) for n in (1, 2, 1, 3, 9)))
        gate.set()
        rewards = [each.rewards.result(30) for each in asked]
    assert sizes == [1, 4, 3, 4, 4, 1] and one.batches == 4 and one.waiting == 0
    for each, got in zip(asked, rewards):
        own = dense_rewards(Scorer(scorer.model, scorer.tokenizer), each.prompt_ids, each.response_ids, SIGNED)
        for row, mine in zip(got, own, strict=True):
            np.testing.assert_allclose(row, mine, atol=1e-6)


def test_a_request_that_fails_spoils_no_other(scorer, monkeypatch, caplog):
    bad = [np.array([3])], [np.array([POISON])]
    with gated(scorer, monkeypatch) as (one, gate, sizes):
        _, first, failed, unreadable, last = waiting(one, rows(2), bad, ([[3]], [[10**6]]), rows(1, 60))
        gate.set()
        assert len(first.rewards.result(30)) == 2 and len(last.rewards.result(30)) == 1
        with pytest.raises(ModelFailure) as failure:
            failed.rewards.result(30)
        with pytest.raises(InputError, match="row 0: .* has token 1000000"):
            unreadable.rewards.result(30)
    assert sizes == [1, 5, 2, 1, 1, 1] and "/secret" not in str(failure.value) and "/secret" in caplog.text


@pytest.mark.parametrize("raised", [SystemExit, MemoryError, RecursionError])
def test_whatever_a_model_raises_the_thread_goes_on(scorer, monkeypatch, raised):
    one = Batcher(scorer, SIGNED, Limits())
    one.start()
    with monkeypatch.context() as patch:
        patch.setattr(scorer.model, "forward", lambda *_, **__: (_ for _ in ()).throw(raised()))
        patch.setattr(scorer.model.base_model, "forward", scorer.model.forward)
        failed = Asked(*rows(1))
        one.submit(failed)
        with pytest.raises(ModelFailure):
            failed.rewards.result(30)
    after = Asked(*rows(1))
    one.submit(after)
    assert len(after.rewards.result(30)) == 1 and one.close(30)


def test_a_failure_in_a_model_is_no_fault_of_the_content(scorer, monkeypatch):
    """`RewardModel` names what torch raised, which may name files; a score that is not finite is told."""
    one = Batcher(scorer, SIGNED, Limits())
    one.start()
    with monkeypatch.context() as patch:
        patch.setattr(
            scorer.model.base_model, "forward", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("/secret/x"))
        )
        broken = Asked(*rows(1))
        one.submit(broken)
        with pytest.raises(ModelFailure, match="log says how"):
            broken.rewards.result(30)
    monkeypatch.setattr(scorer.model.score, "forward", lambda state: state[..., :1] * float("nan"))
    nan = Asked(*rows(1))
    one.submit(nan)
    with pytest.raises(InputError, match="not finite"):
        nan.rewards.result(30)
    assert one.close(30)


def test_a_large_request_names_the_part_that_fails(scorer, monkeypatch):
    prompts, responses = rows(5)
    responses[3] = np.array([10**6])
    with gated(scorer, monkeypatch, batch=2) as (one, gate, _):
        gate.set()
        asked = Asked(prompts, responses)
        one.submit(asked)
        with pytest.raises(InputError, match="in the responses from 2 on, row 1: "):
            asked.rewards.result(30)


def test_requests_with_and_without_prompts_are_not_joined(scorer, monkeypatch):
    with gated(scorer, monkeypatch) as (one, gate, sizes):
        prompts = ["the film", (Message("user", "a"),)]
        asked = waiting(one, rows(1), (*rows(2, 50), prompts), (*rows(2, 60), prompts), rows(1, 70))
        gate.set()
        assert [len(each.rewards.result(30)) for each in asked] == [1, 1, 2, 2, 1] and sizes == [1, 1, 4, 1]


def test_who_leaves_costs_nothing(scorer, monkeypatch):
    with gated(scorer, monkeypatch) as (one, gate, sizes):
        _, gone, stays = waiting(one, rows(2), rows(1, 60))
        assert gone.rewards.cancel()
        gate.set()
        assert len(stays.rewards.result(30)) == 1
    assert sizes == [1, 1] and one.waiting == 0


def test_as_many_wait_as_may(scorer, monkeypatch):
    with gated(scorer, monkeypatch, waiting=3) as (one, gate, _):
        asked = waiting(one, rows(2))
        with pytest.raises(Full, match="2 responses wait"):
            one.submit(Asked(*rows(2, 60)))
        one.submit(Asked(*rows(1, 70)))
        gate.set()
        assert len(asked[1].rewards.result(30)) == 2


def test_closing_finishes_what_waits_and_takes_no_more(scorer, monkeypatch):
    with gated(scorer, monkeypatch) as (one, gate, _):
        asked = waiting(one, rows(2), rows(1, 60))
        assert not one.close(0)
        with pytest.raises(Full, match="stopping"):
            one.submit(Asked(*rows(1, 80)))
        gate.set()
        assert one.close(30) and [len(each.rewards.result(0)) for each in asked] == [1, 2, 1]


@pytest.fixture
def patient(monkeypatch):
    """Every batch counts as one that took a minute."""
    monkeypatch.setattr(Batcher, "_seconds", property(lambda one: 60.0, lambda one, seconds: None), raising=False)


def test_a_batch_waits_for_as_many_requests_as_the_last_ones_joined(scorer, monkeypatch, patient):
    """Clients that were answered together come back one by one; one alone is not kept waiting."""
    with gated(scorer, monkeypatch, linger=1) as (one, gate, sizes):
        first = waiting(one, rows(2), rows(1, 50))
        gate.set()
        assert [len(asked.rewards.result(30)) for asked in first] == [1, 2, 1]
        again = [Asked(*rows(1, 60)), Asked(*rows(1, 70))]
        for asked in again:
            one.submit(asked)
            time.sleep(0.05)
        assert [len(asked.rewards.result(30)) for asked in again] == [1, 1] and sizes == [1, 3, 2]
        one._joined.extend([1] * 4)
        alone = Asked(*rows(1, 80))
        one.submit(alone)
        assert len(alone.rewards.result(30)) == 1


def test_closing_ends_the_wait_for_more(scorer, monkeypatch, patient):
    with gated(scorer, monkeypatch, linger=1) as (one, gate, _):
        gate.set()
        one._joined.append(9)
        asked = Asked(*rows(1))
        one.submit(asked)
        assert one.close(30) and len(asked.rewards.result(0)) == 1
