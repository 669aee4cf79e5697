"""verl's own advantages on our rewards are ours, and its own where rewards are sparse."""

import asyncio
from types import SimpleNamespace

import pytest
import torch
from trainers import asked, batch, compared, gae, mask, on_stand_ins, padded, rewards, to_go, to_go_in_group

from dense_rlhf.shaping.masked import masked_whiten
from dense_rlhf.types import InputError


@pytest.fixture(scope="module")
def verl():
    return asked("verl")


def test_the_reward_manager_writes_token_rewards(verl):
    compared(rewards(), verl["rewards"])
    assert not padded(verl["rewards"])[~mask()].any()


def test_the_agent_loop_writes_token_rewards_and_nothing_else(verl):
    assert len(verl["loops"]) == 6
    for row, loop in zip(batch()["dense"], verl["loops"], strict=True):
        assert loop["rewards"] == pytest.approx(row) and loop["score"] == pytest.approx(sum(row))
        assert loop["other fields"] == ["rm_scores"]


def test_what_the_docs_configure_is_loaded(verl):
    assert verl["configured"] == ["DenseAgentLoop", "RewardClient", "http://127.0.0.1:8700", "DenseRewardManager"]


def test_gae_is_ours(verl):
    advantages, returns = verl["dense"]["gae"]
    compared(gae(rewards()) + padded(batch()["values"]), returns)
    compared(masked_whiten(gae(rewards()), mask()), advantages)


def test_reinforce_keeps_token_rewards(verl):
    compared(to_go(rewards()), verl["dense"]["reinforce_plus_plus"][1])


@pytest.mark.parametrize("name, scale", [("dense_grpo", "sd"), ("dense_rloo", "leave_one_out")])
def test_our_group_estimators_keep_them(verl, name, scale):
    compared(to_go_in_group(rewards(), scale=scale), verl["dense"][name][0])
    torch.testing.assert_close(padded(verl["sparse"][name][0]), padded(verl["theirs"][name.split("_")[1]][0]))


@pytest.mark.parametrize("name", ["grpo", "rloo"])
def test_its_own_group_estimators_sum_them(verl, name):
    torch.testing.assert_close(padded(verl["dense"][name][0]), padded(verl["theirs"][name][0]))


def test_sparse_rewards_give_its_own_numbers(verl):
    assert verl["sparse"] == verl["theirs"] and len(verl["theirs"]) == 6


# ---------------------------------------------------------------------------------------------------- without verl


class Manager:
    def __init__(self, config, tokenizer, compute_score):
        self.compute_score = compute_score


@pytest.fixture
def adapter(monkeypatch):
    stand_ins = {
        "verl": {"DataProto": object},
        "verl__experimental__agent_loop__agent_loop": {"AgentLoopOutput": object},
        "verl__experimental__agent_loop__single_turn_agent_loop": {"SingleTurnAgentLoop": object},
        "verl__experimental__reward_loop__reward_manager__base": {"RewardManagerBase": Manager},
        "verl__trainer__ppo__core_algos": {"register_adv_est": lambda name: lambda function: function},
    }
    parents = {"__".join(name.split("__")[:n]): {} for name in stand_ins for n in range(1, name.count("__") + 1)}
    return on_stand_ins(monkeypatch, "verl", **parents | stand_ins)


DATA = SimpleNamespace(
    batch={
        "prompts": torch.tensor([[0, 5]]),
        "responses": torch.tensor([[7, 8, 0]]),
        "attention_mask": torch.tensor([[0, 1, 1, 1, 0]]),
    }
)


def config(path):
    return SimpleNamespace(reward={"custom_reward_function": {"path": path}})


def test_a_row_is_paid_where_its_tokens_are(adapter):
    asked_for = []
    manager = adapter.DenseRewardManager(
        config("a.py"), None, lambda *ids: asked_for.append(ids) or [torch.tensor([0.5, 1.0])]
    )
    score = asyncio.run(manager.run_single(DATA))["reward_score"]
    assert asked_for == [([[5]], [[7, 8]])] and score == [0.5, 1.0]
    assert manager.assemble_rm_scores(DATA, [score]).tolist() == [[0.5, 1.0, 0.0]]


def test_scores_in_place_of_token_rewards_are_refused(adapter):
    with pytest.raises(InputError, match="set reward.custom_reward_function.path"):
        adapter.DenseRewardManager.assemble_rm_scores(DATA, [1.5])
    with pytest.raises(InputError, match="custom_reward_function.path is not set"):
        adapter.DenseRewardManager(config(None), None, lambda **theirs: 0.0)  # verl's default
    manager = adapter.DenseRewardManager(config("a.py"), None, lambda *ids: [[0.5]])
    with pytest.raises(InputError, match=r"response 0 have shape \(1,\), wanted one a token, \(2,\)"):
        asyncio.run(manager.run_single(DATA))
