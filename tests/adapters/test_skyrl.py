"""SkyRL's own advantages on our rewards are ours, and its own where rewards are sparse."""

import asyncio

import pytest
import torch
from trainers import asked, batch, compared, gae, mask, on_stand_ins, padded, rewards, to_go, to_go_in_group

from dense_rlhf.shaping.masked import masked_whiten
from dense_rlhf.types import InputError


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


# ---------------------------------------------------------------------------------------------------- without SkyRL


@pytest.fixture
def generated(monkeypatch):
    """What our generator makes of another's output, and what it asked for."""
    kinds = dict.fromkeys(("GeneratorInput", "GeneratorInterface", "GeneratorOutput"), object)
    registry = {"register_advantage_estimator": lambda name: lambda function: function}
    stand_ins = {"skyrl__train__generators__base": kinds, "skyrl__backends__skyrl_train__utils__ppo_utils": registry}
    stand_ins |= {"skyrl": {}, "skyrl__train": {}, "skyrl__train__generators": {}, "skyrl__backends": {}}
    stand_ins |= {"skyrl__backends__skyrl_train": {}, "skyrl__backends__skyrl_train__utils": {}}
    adapter, asked_for = on_stand_ins(monkeypatch, "skyrl", **stand_ins), []

    def run(output, paid, messages=False):
        class Generator:
            async def generate(self, input_batch):
                return {"prompt_token_ids": [[1], [1]], "response_ids": [[2, 3], [4]]} | output

        def token_rewards(*ids):
            asked_for.append(ids)
            return paid

        generator = adapter.DenseGenerator(Generator(), token_rewards, messages)
        return asyncio.run(generator.generate({"prompts": ["a", "b"]})), asked_for[-1]

    return run


def test_rewards_become_lists_and_the_rest_is_kept(generated):
    output = {"loss_masks": [[1, 1], [0]], "rewards": [1.0, 2.0], "stop_reasons": ["stop", "length"]}
    made, ids = generated(output, [[0.5, 0.5], [2]], messages=True)
    assert made["rewards"] == [[0.5, 0.5], [2.0]] and made["stop_reasons"] == ["stop", "length"]
    assert ids == ([[1], [1]], [[2, 3], [4]], ["a", "b"])
    assert generated(output, [[0.5, 0.5], [2]])[1] == ids[:2]


def test_turns_of_tools_steps_and_rewards_that_do_not_fit_are_refused(generated):
    with pytest.raises(InputError, match="response 0 has turns of tools"):
        generated({"loss_masks": [[1, 0], [1]]}, [])
    with pytest.raises(InputError, match="or steps"):
        generated({"loss_masks": [[1, 1], [1]], "is_last_step": [True, True]}, [])
    with pytest.raises(InputError, match=r"response 0 have shape \(1,\)"):
        generated({"loss_masks": [[1, 1], [1]]}, [[0.5], [2]])
    with pytest.raises(InputError, match="rewards of 1 responses, wanted 2"):
        generated({"loss_masks": [[1, 1], [1]]}, [[0.5, 1]])
