"""verl's own advantages on our rewards are ours, and its own where rewards are sparse."""

import pytest
import torch
from trainers import asked, batch, compared, gae, mask, padded, rewards, to_go, to_go_in_group

from dense_rlhf.shaping.masked import masked_whiten


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
