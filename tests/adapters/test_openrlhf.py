"""OpenRLHF's own advantages on our rewards are ours, and its own where rewards are sparse."""

from types import SimpleNamespace

import pytest
import torch
from trainers import KL_COEF, asked, batch, compared, gae, mask, on_stand_ins, padded, rewards, to_go, to_go_in_group

from dense_rlhf.shaping.masked import masked_mean
from dense_rlhf.types import InputError

ESTIMATORS = "gae", "reinforce", "rloo", "reinforce_baseline", "group_norm", "dr_grpo", "flash_reinforce"


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


# ---------------------------------------------------------------------------------------------------- without OpenRLHF


@pytest.fixture
def adapter(monkeypatch):
    maker = {"RemoteExperienceMaker": object, "compute_reward": None}
    stand_ins = {"openrlhf": {}, "openrlhf__trainer": {}, "openrlhf__trainer__ppo_utils__experience_maker": maker}
    return on_stand_ins(
        monkeypatch,
        "openrlhf",
        openrlhf__trainer__ppo_utils={"experience_maker": SimpleNamespace(**maker)},
        **stand_ins,
    )


def moves(adapter, estimator, kind):
    """Of all responses as one experience."""
    maker = object.__new__(adapter.DenseExperienceMaker)
    advantage, rollout = SimpleNamespace(estimator=estimator), SimpleNamespace(n_samples_per_prompt=3)
    maker.strategy = SimpleNamespace(args=SimpleNamespace(algo=SimpleNamespace(advantage=advantage), rollout=rollout))
    experience = SimpleNamespace(action_mask=mask().long(), index=list(range(6)))
    return maker._moves([experience], [rewards(kind)])[0]


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_what_is_moved_sums_to_zero_and_a_sparse_reward_stays(adapter, estimator):
    moved = moves(adapter, estimator, "dense")
    torch.testing.assert_close(moved.sum(-1), torch.zeros(6), atol=1e-5, rtol=0)
    assert moved.abs().max() > 0.1 and not moved[~mask()].any()
    torch.testing.assert_close(moves(adapter, estimator, "sparse"), torch.zeros_like(moved), atol=1e-6, rtol=0)


def test_prompt_and_response_are_read_out_of_a_padded_sequence(adapter):
    row = SimpleNamespace(
        sequences=torch.tensor([[5, 6, 7, 8, 0]]),
        attention_mask=torch.tensor([[1, 1, 1, 1, 0]]),
        action_mask=torch.tensor([[0, 1, 1, 0]]),
    )
    assert adapter._texts(row) == [([5, 6], [7, 8])]


@pytest.mark.parametrize("acts", [[0, 0, 0, 0], [1, 0, 1, 0]])
def test_no_action_and_turns_of_tools_are_refused(adapter, acts):
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    row = SimpleNamespace(sequences=ids, attention_mask=torch.ones_like(ids), action_mask=torch.tensor([acts]))
    with pytest.raises(InputError, match="turns of tools"):
        adapter._texts(row)
