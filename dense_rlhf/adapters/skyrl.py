"""SkyRL on token rewards: a generator that pays each token of another's responses, and estimators that keep them.

Run with SkyRL 0.4.0, whose trainer takes a list of rewards a response. In an entry point of one's own:

    class Experiment(BasePPOExp):
        def get_generator(self, cfg, tokenizer, client):
            generator = super().get_generator(cfg, tokenizer, client)
            return DenseGenerator(generator, RewardClient("http://127.0.0.1:8700"))

    trainer.algorithm.advantage_estimator="gae"    # or reinforce++, dense_grpo, dense_rloo; not grpo, rloo, maxrl

The environment's rewards are replaced. SkyRL's pass@n then counts the rewards of last tokens, and its filter of groups
without variance is passed by. Step-wise trajectories and turns of tools are refused.
"""

from __future__ import annotations

import asyncio

import torch
from skyrl.backends.skyrl_train.utils.ppo_utils import register_advantage_estimator
from skyrl.train.generators.base import GeneratorInput, GeneratorInterface, GeneratorOutput

from dense_rlhf.adapters.group import group_to_go
from dense_rlhf.adapters.paid import paid
from dense_rlhf.types import InputError


class DenseGenerator(GeneratorInterface):
    """`generator` with its rewards replaced by `rewards` of the ids; with `messages` these get the prompts' too."""

    def __init__(self, generator: GeneratorInterface, rewards, messages: bool = False):
        self.generator, self.rewards, self.messages = generator, rewards, messages

    async def generate(self, input_batch: GeneratorInput) -> GeneratorOutput:
        output = await self.generator.generate(input_batch)
        masks = output["loss_masks"]
        mixed = next((i for i, mask in enumerate(masks) if any(mask) and not all(mask)), None)
        if mixed is not None or output.get("is_last_step"):
            raise InputError(f"response {mixed or 0} has turns of tools or steps, which earn no token rewards here")
        prompts = [input_batch["prompts"]] if self.messages else []
        ids = output["prompt_token_ids"], output["response_ids"]
        output["rewards"] = [row.tolist() for row in await asyncio.to_thread(paid, self.rewards, *ids, *prompts)]
        return output


@register_advantage_estimator("dense_grpo")
@torch.no_grad()
def dense_grpo(token_level_rewards, response_mask, index, grpo_norm_by_std: bool = True, **_):
    """`group_to_go` by the sd of the group's scores, or by none where `grpo_norm_by_std` is false."""
    scale = "sd" if grpo_norm_by_std else "none"
    return (group_to_go(token_level_rewards, response_mask, index, scale),) * 2


@register_advantage_estimator("dense_rloo")
@torch.no_grad()
def dense_rloo(token_level_rewards, response_mask, index, **_):
    """`group_to_go` against the mean of the group's other responses."""
    return (group_to_go(token_level_rewards, response_mask, index, "leave_one_out"),) * 2
