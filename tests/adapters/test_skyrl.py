"""SkyRL's own advantages on our rewards are ours, and its own where rewards are sparse."""

import pytest
import torch
from trainers import asked, batch, compared, gae, mask, padded, rewards, to_go, to_go_in_group

from dense_rlhf.shaping.masked import masked_whiten


@pytest.fixture(scope="module")
def skyrl():
    return asked("skyrl")


def test_gae_is_ours(skyrl):
    advantages, returns = skyrl["dense"]["gae"]
    compared(gae(rewards()) + padded(batch()["values"]), returns)
    compared(masked_whiten(gae(rewards()), mask()), advantages)


def test_reinforce_keeps_token_rewards(skyrl):
    compared(to_go(rewards()), skyrl["dense"]["reinforce++"][1])


@pytest.mark.parametrize("name, scale", [("dense_grpo", "sd"), ("dense_rloo", "leave_one_out")])
def test_our_group_estimators_keep_them(skyrl, name, scale):
    compared(to_go_in_group(rewards(), scale=scale), skyrl["dense"][name][0])
    torch.testing.assert_close(padded(skyrl["sparse"][name][0]), padded(skyrl["theirs"][name.split("_")[1]][0]))


@pytest.mark.parametrize("name", ["grpo", "rloo"])
def test_its_own_group_estimators_sum_them(skyrl, name):
    torch.testing.assert_close(padded(skyrl["dense"][name][0]), padded(skyrl["theirs"][name][0]))


def test_sparse_rewards_give_its_own_numbers(skyrl):
    assert skyrl["sparse"] == skyrl["theirs"] and len(skyrl["theirs"]) == 6
