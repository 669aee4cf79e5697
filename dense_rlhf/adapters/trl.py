"""GRPO of trl with an advantage for each token, `(B, T)`, in place of one for each response.

    shape = RewardShape(("shap",), (1.0,), "signed")
    trainer = TokenGRPO(policy, no_reward, GRPOConfig(...), dataset, processing_class=tokenizer)
    trainer.dense = TokenRewards(partial(dense_rewards, Scorer(reward_model, tokenizer), shape=shape))
    trainer.train()

GRPO whitens summed rewards, so it cannot see where in a response a reward was paid; its loss can, where a subclass of
the trainer gives it the numbers. Run with trl 1.16. RLOO cannot, as its ratio is of whole sequences.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from trl import GRPOTrainer

from dense_rlhf.adapters.group import group_to_go
from dense_rlhf.adapters.paid import Rewards, paid
from dense_rlhf.types import InputError

SCALES = {"group": "sd", "none": "none"}  # trl's `scale_rewards` as `group_to_go` names it


def no_reward(completions: list, **_: object) -> list[float]:
    """The reward function that trl requires, where a `TokenGRPO` pays tokens."""
    return [0.0] * len(completions)


@dataclass
class TokenRewards:
    """What a `TokenGRPO` pays for each token: `rewards` of prompt and response ids, an array (T_i,) a response."""

    rewards: Rewards

    def __call__(self, batch: dict[str, Tensor]) -> Tensor:
        """Rewards (B, T) of a batch as trl has it, zero where `completion_mask` is. Does not handle tools' turns."""
        if "tool_mask" in batch:
            raise InputError("completions hold turns of tools, which earn no token rewards here; train without tools")
        asked, given = batch["prompt_mask"].bool(), batch["completion_mask"].bool()
        rows = given.any(-1).nonzero()[:, 0]  # trl masks truncated completions whole, if asked to
        prompts = [batch["prompt_ids"][i][asked[i]] for i in rows]
        responses = [batch["completion_ids"][i][given[i]] for i in rows]
        rewards = torch.zeros(given.shape, device=given.device)
        for i, row in zip(rows, paid(self.rewards, prompts, responses)):
            rewards[i, given[i]] = torch.from_numpy(row).to(rewards)
        return rewards


class TokenGRPO(GRPOTrainer):
    """GRPO whose advantages are of single tokens (`group_to_go`), paid by `dense`; of sparse rewards they are trl's.

    Each process holds whole groups of completions to a prompt.
    """

    dense: TokenRewards | None = None

    def _generate_and_score_completions(self, inputs):
        if self.dense is None:
            raise InputError("trainer.dense is not set; wanted TokenRewards(rewards) before train()")
        batch, dense = super()._generate_and_score_completions(inputs), self.dense
        group = self.num_generations if self.model.training else self.num_generations_eval
        mask = batch["completion_mask"].bool()
        if len(mask) % group:
            size = f"a process has {len(mask)} completions and a prompt {group}"
            raise InputError(f"{size}; make per_device_train_batch_size a multiple of num_generations")
        if self.scale_rewards not in SCALES:
            raise InputError(f"scale_rewards is {self.scale_rewards!r}, wanted one of {', '.join(SCALES)}")
        prompts = [row // group for row in range(len(mask))]
        batch["advantages"] = group_to_go(dense(batch), mask, prompts, SCALES[self.scale_rewards], eps=1e-4)
        return batch
