"""verl on token rewards: an agent loop and a reward manager that write them, and group estimators that keep them.

Run with verl 0.9.1; of this package's requirements it needs none that verl lacks. An agent loop pays each
response as it comes (`trainer.use_v1`, verl's default); `rewards.yaml` names it:

    - name: dense
      _target_: dense_rlhf.adapters.verl.DenseAgentLoop
      rewards: {_target_: dense_rlhf.adapters.client.RewardClient, url: "http://127.0.0.1:8700"}

    export VERL_USE_EXTERNAL_MODULES=dense_rlhf.adapters.verl    # for the estimators
    actor_rollout_ref.rollout.agent.agent_loop_config_path=rewards.yaml
    actor_rollout_ref.rollout.agent.default_agent_loop=dense
    algorithm.adv_estimator=dense_grpo    # or dense_rloo, gae, reinforce_plus_plus; not grpo, rloo, which sum rewards

Where verl runs a reward model in the trainer's own pool, a reward manager pays whole batches after the rollouts:

    reward.reward_model.enable=True  reward.reward_model.enable_resource_pool=False
    reward.reward_manager.source=importlib  reward.reward_manager.name=DenseRewardManager
    reward.reward_manager.module.path=pkg://dense_rlhf.adapters.verl
    reward.custom_reward_function.path=FILE.py  reward.custom_reward_function.name=NAME    # token rewards, as below

`rewards` is any callable of prompt_ids and response_ids that gives an array (T_i,) for each response, such as a
`RewardClient`; it is called from several threads at once.
"""

from __future__ import annotations

import asyncio
from typing import Any

import torch
from verl import DataProto
from verl.experimental.agent_loop.agent_loop import AgentLoopOutput
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop
from verl.experimental.reward_loop.reward_manager.base import RewardManagerBase
from verl.trainer.ppo.core_algos import register_adv_est

from dense_rlhf.adapters.group import group_to_go
from dense_rlhf.adapters.paid import paid
from dense_rlhf.types import InputError


class DenseOutput(AgentLoopOutput):
    """An agent loop's output that pays each token."""

    token_rewards: list[float]

    def as_dict(self) -> dict[str, Any]:
        output = super().as_dict()
        output["rm_scores"] = torch.tensor(output.pop("token_rewards"), dtype=torch.float32)
        return output


class DenseAgentLoop(SingleTurnAgentLoop):
    """verl's single turn, paid by `rewards`; with `messages` the prompt's messages are given to it too."""

    def __init__(self, *args, rewards, messages: bool = False, **kwargs):
        super().__init__(*args, **kwargs)
        self.rewards, self.messages = rewards, messages

    async def run(self, sampling_params: dict[str, Any], **kwargs) -> DenseOutput:
        output = await super().run(sampling_params, **kwargs)
        prompts = [[list(kwargs["raw_prompt"])]] if self.messages else []
        ids = [output.prompt_ids], [output.response_ids]
        (row,) = await asyncio.to_thread(paid, self.rewards, *ids, *prompts)
        fields = {name: getattr(output, name) for name in output.model_fields_set}
        return DenseOutput(**fields | {"reward_score": float(row.sum()), "token_rewards": row.tolist()})


class DenseRewardManager(RewardManagerBase):
    """Pays by `reward.custom_reward_function`; reached with a colocated reward model alone."""

    def __init__(self, config, tokenizer, compute_score, reward_router_address=None, reward_model_tokenizer=None):
        super().__init__(config, tokenizer, compute_score)
        if not (config.reward.get("custom_reward_function") or {}).get("path"):
            raise InputError("reward.custom_reward_function.path is not set; wanted the file of the token rewards")

    async def run_single(self, data: DataProto) -> dict[str, Any]:
        """The rewards of one response, as `reward_score`. Elsewhere than in `assemble_rm_scores` verl refuses them."""
        asked = data.batch["prompts"].shape[1]
        ids, kept = torch.cat([data.batch["prompts"], data.batch["responses"]], -1)[0], data.batch["attention_mask"][0]
        ids, kept = ids.cpu(), kept.bool().cpu()
        prompt, response = ids[:asked][kept[:asked]].tolist(), ids[asked:][kept[asked:]].tolist()
        (row,) = await asyncio.to_thread(paid, self.compute_score, [prompt], [response])
        return {"reward_score": row.tolist(), "reward_extra_info": {}}

    @classmethod
    def assemble_rm_scores(cls, data: DataProto, scores: list[list[float]]) -> torch.Tensor:
        """Token rewards (B, T) where verl has the score at the last token."""
        if any(not isinstance(row, list) for row in scores):
            raise InputError("the scores are verl's own, one a response; set reward.custom_reward_function.path")
        kept = data.batch["attention_mask"][:, data.batch["prompts"].shape[1] :].bool()
        rewards = torch.zeros(kept.shape, dtype=torch.float32, device=kept.device)
        for row, keep, score in zip(rewards, kept, scores, strict=True):
            row[keep] = torch.tensor(score).to(row)
        return rewards


@register_adv_est("dense_grpo")
@torch.no_grad()
def dense_grpo(token_level_rewards, response_mask, index, config=None, **_):
    """`group_to_go` by the sd of the group's scores, or by none where `algorithm.norm_adv_by_std_in_grpo` is false."""
    scale = "sd" if config is None or config.get("norm_adv_by_std_in_grpo", True) else "none"
    return (group_to_go(token_level_rewards, response_mask, index, scale),) * 2


@register_adv_est("dense_rloo")
@torch.no_grad()
def dense_rloo(token_level_rewards, response_mask, index, config=None, **_):
    """`group_to_go` against the mean of the group's other responses."""
    return (group_to_go(token_level_rewards, response_mask, index, "leave_one_out"),) * 2
