"""slime's custom advantage function, on a stand-in for slime whose GAE is ours. slime itself was read, not run."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from trainers import GAMMA, KL_COEF, LAM, batch, compared, gae, padded, rewards

from dense_rlhf import ppo
from dense_rlhf.adapters.slime import DensePPO
from dense_rlhf.types import InputError

ARGS = SimpleNamespace(advantage_estimator="ppo", kl_coef=KL_COEF, gamma=GAMMA, lambd=LAM)


@pytest.fixture(autouse=True)
def slime(monkeypatch):
    def advantages_and_returns(total_lengths, response_lengths, values, rewards, gamma, lambd):
        made = [
            ppo.gae(r[None], v[None], torch.ones(1, len(v), dtype=bool), gamma, lambd)[0]
            for r, v in zip(rewards, values)
        ]
        return made, [row + v for row, v in zip(made, values)]

    module = ModuleType("slime.utils.ppo_utils")
    module.get_advantages_and_returns_batch = advantages_and_returns
    for name in ("slime", "slime.utils"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "slime.utils.ppo_utils", module)


@pytest.fixture
def rollout_data():
    given = batch()
    texts = [torch.tensor(p + r) for p, r in zip(given["prompt_ids"], given["response_ids"])]
    data = {"tokens": texts, "total_lengths": [len(t) for t in texts]}
    data["response_lengths"] = [len(row) for row in given["response_ids"]]
    return data | {name: [torch.tensor(row) for row in given[name]] for name in ("kl", "values")}


def paying(prompts, responses):
    given = batch()
    assert prompts == given["prompt_ids"] and responses == given["response_ids"]
    return given["dense"]


def test_advantages_are_gae_of_token_rewards_less_kl(rollout_data):
    DensePPO(paying)(ARGS, rollout_data)
    expected = gae(rewards(kl_coef=KL_COEF))
    compared(expected, [row.tolist() for row in rollout_data["advantages"]])
    compared(expected + padded(batch()["values"]), [row.tolist() for row in rollout_data["returns"]])


def test_another_estimator_is_refused(rollout_data):
    with pytest.raises(InputError, match="grpo, wanted ppo"):
        DensePPO(paying)(SimpleNamespace(advantage_estimator="grpo"), rollout_data)


def test_parts_of_responses_are_refused(rollout_data):
    rollout_data["kl"][0] = rollout_data["kl"][0][:1]
    with pytest.raises(InputError, match="context-parallel-size 1"):
        DensePPO(paying)(ARGS, rollout_data)
