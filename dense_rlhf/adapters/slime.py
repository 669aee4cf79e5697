"""slime on token rewards: its PPO with the rewards of single tokens, as a custom advantage function.

Read at commit 00c2d6db0f23, never run with slime. In a file of one's own, here token_rewards.py:

    dense = DensePPO(RewardClient("http://127.0.0.1:8700"))

    --advantage-estimator ppo  --custom-advantage-function-path token_rewards.dense

Actor and critic both ask for the rewards, each rank of tensor parallelism too: a server remembers its answers. slime's
group estimators cannot be had so: its function sees the responses of one rank, and a group may lie on several.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dense_rlhf.adapters.paid import Rewards, paid
from dense_rlhf.types import InputError


@dataclass
class DensePPO:
    """slime's PPO advantages, A = GAE(r_t - kl_coef kl_t), `rewards` of the ids in place of a score at the last token.

    Does not handle context parallelism.
    """

    rewards: Rewards

    def __call__(self, args, rollout_data) -> None:
        """Set advantages and returns, lists of (T_i,). Raises `InputError` for another estimator and parts of rows."""
        from slime.utils.ppo_utils import get_advantages_and_returns_batch

        if args.advantage_estimator != "ppo":
            raise InputError(f"--advantage-estimator is {args.advantage_estimator}, wanted ppo")
        kl, lengths, totals = (rollout_data[name] for name in ("kl", "response_lengths", "total_lengths"))
        if [len(row) for row in kl] != list(lengths):
            raise InputError("this rank has parts of responses; wanted --context-parallel-size 1")
        texts = [row[:total].tolist() for row, total in zip(rollout_data["tokens"], totals, strict=True)]
        starts = [total - length for total, length in zip(totals, lengths, strict=True)]
        prompts = [text[:start] for text, start in zip(texts, starts)]
        rows = paid(self.rewards, prompts, [text[start:] for text, start in zip(texts, starts)])
        rewards = [torch.from_numpy(row).to(k) - args.kl_coef * k for row, k in zip(rows, kl)]
        advantages, returns = get_advantages_and_returns_batch(
            totals, lengths, rollout_data["values"], rewards, args.gamma, args.lambd
        )
        rollout_data["advantages"], rollout_data["returns"] = advantages, returns
