"""OpenRLHF's own advantages on our rewards are ours, and its own where rewards are sparse."""

import pytest
from trainers import KL_COEF, asked, batch, compared, gae, mask, padded, rewards, to_go, to_go_in_group

from dense_rlhf.shaping.masked import masked_mean


@pytest.fixture(scope="module")
def openrlhf():
    return asked("openrlhf")


def centred(advantages):
    """As OpenRLHF ends some estimators, where it is told not to divide by the sd."""
    return advantages - masked_mean(advantages, mask())


def test_gae_is_ours(openrlhf):
    advantages, returns = openrlhf["dense"]["gae"]
    compared(gae(rewards(kl_coef=KL_COEF)) + padded(batch()["values"]), returns)
    compared(centred(gae(rewards(kl_coef=KL_COEF))), advantages)


def test_reinforce_is_the_reward_to_go(openrlhf):
    compared(to_go(rewards(kl_coef=KL_COEF)), openrlhf["dense"]["reinforce"][1])


@pytest.mark.parametrize(
    "name, scale",
    [("rloo", "leave_one_out"), ("group_norm", "sd"), ("dr_grpo", "none"), ("reinforce_baseline", "none")],
)
def test_group_estimators_compare_rewards_to_go(openrlhf, name, scale):
    penalty = to_go(-KL_COEF * padded(batch()["kl"]))
    compared(to_go_in_group(rewards(), scale=scale, eps=1e-9) + penalty, openrlhf["dense"][name][1])


@pytest.mark.parametrize("case", ["", ", clipped and penalised"])
def test_sparse_rewards_give_its_own_numbers(openrlhf, case):
    ours, theirs = openrlhf[f"sparse{case}"], openrlhf[f"theirs{case}"]
    assert len(theirs) == 7 and ours.keys() == theirs.keys()
    for name in theirs:
        for one, other in zip(ours[name], theirs[name], strict=True):
            compared(padded(other), one)


def test_its_command_gets_our_experience_maker(openrlhf):
    assert openrlhf["installed"] == "DenseExperienceMaker"
