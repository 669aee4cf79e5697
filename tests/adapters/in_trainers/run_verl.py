"""verl's own advantages on our token rewards, through its reward manager, and an agent loop's output."""

import asyncio
import re
import textwrap
from pathlib import Path

import common
import hydra
import numpy as np
import torch
from omegaconf import OmegaConf
from tensordict import TensorDict
from verl import DataProto
from verl.experimental.agent_loop.agent_loop import AgentLoopMetrics, AgentLoopOutput
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop
from verl.experimental.reward_loop.reward_manager.base import RewardManagerBase
from verl.trainer.config import AlgoConfig
from verl.trainer.ppo.ray_trainer import compute_advantage
from verl.trainer.ppo.reward import load_reward_manager

from dense_rlhf.adapters.verl import DenseAgentLoop, DenseRewardManager

GIVEN = common.batch()
ESTIMATORS = "gae", "reinforce_plus_plus", "grpo", "rloo", "dense_grpo", "dense_rloo"


def padded(rows, left=False):
    width = max(map(len, rows))
    return torch.tensor([[0] * (width - len(r)) * left + r + [0] * (width - len(r)) * (not left) for r in rows])


def as_verl_has_it():
    asked, answers = GIVEN["prompt_ids"], GIVEN["response_ids"]
    ones = [[[1] * len(row) for row in rows] for rows in (asked, answers)]
    mask = torch.cat([padded(ones[0], left=True), padded(ones[1])], 1)
    tensors = {"prompts": padded(asked, left=True), "responses": padded(answers), "attention_mask": mask}
    tensors |= {"response_mask": padded(ones[1]), "values": padded(GIVEN["values"])}
    names = np.array(GIVEN["groups"], dtype=object)
    return DataProto(TensorDict(tensors, batch_size=len(asked)), non_tensor_batch={"uid": names})


def advantages(rewards):
    """Advantages and returns by estimator."""
    made = {}
    for name in ESTIMATORS:
        data = as_verl_has_it()
        data.batch["token_level_rewards"] = rewards.clone()
        config = AlgoConfig(gamma=GIVEN["gamma"], lam=GIVEN["lam"], adv_estimator=name)
        compute_advantage(data, name, GIVEN["gamma"], GIVEN["lam"], config=config)
        made[name] = [data.batch["advantages"].tolist(), data.batch["returns"].tolist()]
    return made


def managed(kind):
    """Token rewards by our reward manager."""
    data, manager = as_verl_has_it(), loaded_manager()
    manager.compute_score = common.token_rewards(GIVEN, kind)

    async def scored():
        return [(await manager.run_single(data[i : i + 1]))["reward_score"] for i in range(len(data))]

    return manager.assemble_rm_scores(data, asyncio.run(scored()))


DOCS = (Path(common.__file__).parents[3] / "docs" / "trainers.md").read_text()


def loaded_manager():
    """The reward manager that verl loads with the lines of docs/trainers.md."""
    file = str(Path(common.__file__).with_name("token_rewards.py"))
    lines = re.findall(r"^    (reward\.\S+=\S+)", DOCS, re.MULTILINE)
    config = OmegaConf.from_dotlist([line.replace("token_rewards.py", file) for line in lines])
    return load_reward_manager(config, None)


def configured():
    """What verl loads with docs/trainers.md's rewards.yaml and with its lines for a reward manager."""
    text = textwrap.dedent(re.search(r"In `rewards.yaml`:\n\n((?:    .*\n)+)", DOCS)[1])
    SingleTurnAgentLoop.__init__ = lambda self, **_: None
    loop = hydra.utils.instantiate(OmegaConf.create(text)[0])
    return [*(type(one).__name__ for one in (loop, loop.rewards)), loop.rewards.url, type(loaded_manager()).__name__]


def looped(i):
    """What verl's agent-loop worker stores of response `i`."""
    ids, answer = GIVEN["prompt_ids"][i], GIVEN["response_ids"][i]
    plain = AgentLoopOutput(
        prompt_ids=ids, response_ids=answer, response_mask=[1] * len(answer), metrics=AgentLoopMetrics()
    )

    async def single_turn(self, sampling_params, **kwargs):
        return plain

    SingleTurnAgentLoop.run, SingleTurnAgentLoop.__init__ = single_turn, lambda self: None
    loop = DenseAgentLoop(rewards=common.token_rewards(GIVEN, "dense"), messages=True)
    output = asyncio.run(loop.run({}, raw_prompt=[{"role": "user", "content": "a"}]))
    fields, theirs = output.as_dict(), plain.as_dict()
    return {
        "rewards": fields["rm_scores"].tolist(),
        "score": output.reward_score,
        "other fields": sorted(set(fields) ^ set(theirs)),
    }


sums = [sum(row) for row in GIVEN["sparse"]]
theirs = RewardManagerBase.assemble_rm_scores.__func__(DenseRewardManager, as_verl_has_it(), sums)
common.answer(
    "verl",
    {
        "configured": configured(),
        "rewards": managed("dense").tolist(),
        "dense": advantages(managed("dense")),
        "sparse": advantages(managed("sparse")),
        "theirs": advantages(theirs),
        "loops": [looped(i) for i in range(len(sums))],
    },
)
