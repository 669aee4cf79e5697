"""A policy's responses to held-out prompts, scored."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from dense_rlhf import ppo
from dense_rlhf.config.params import PPOParams
from dense_rlhf.models.policy import PolicyWithValue
from dense_rlhf.ppo.rollout import response_texts
from dense_rlhf.training.task import Task
from dense_rlhf.types import Prompt


def evaluate(
    task: Task, policy: PolicyWithValue, prompts: Sequence[Prompt], params: PPOParams, seed: int
) -> pd.DataFrame:
    """One response to each prompt, judged: columns prompt, response, proxy (sd), gold (log-odds), kl (nats)."""
    tables = []
    for start in range(0, len(prompts), params.rollouts):
        batch = prompts[start : start + params.rollouts]
        rollout = task.roll(policy, batch, params, seed=seed * 100_003 + 50_000 + start)
        texts = response_texts(rollout, task.tokenizer)
        tables.append(
            pd.DataFrame(
                {
                    "prompt": [str(p) if isinstance(p, str) else p[-1].content for p in batch],
                    "response": texts,
                    "proxy": rollout.scores.cpu(),
                    "gold": [task.gold.score(text) for text in texts],
                    "kl": ppo.sequence_kl(rollout).cpu(),
                }
            )
        )
    return pd.concat(tables, ignore_index=True)
