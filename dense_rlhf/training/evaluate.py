"""A policy's responses to held-out prompts, scored."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from dense_rlhf import ppo
from dense_rlhf.config.params import PPOParams
from dense_rlhf.models.policy import PolicyWithValue
from dense_rlhf.ppo.rollout import response_texts
from dense_rlhf.training.task import Task, step_seed
from dense_rlhf.types import InputError, Prompt, Responses

HELD_OUT = 50_000  # a step no training reaches: from it on, held-out responses have their seeds


def evaluate(
    task: Task, policy: PolicyWithValue, prompts: Sequence[Prompt], params: PPOParams, seed: int
) -> pd.DataFrame:
    """One response to each prompt, judged: columns prompt, response, proxy (sd), gold (log-odds), kl (nats).

    Raises `InputError` as `check_prompts` does.
    """
    check_prompts(prompts)
    tables = []
    for start in range(0, len(prompts), params.rollouts):
        batch = prompts[start : start + params.rollouts]
        rollout = task.rollout(policy, batch, params, step_seed(seed, HELD_OUT + start))
        tables.append(judged(task, batch, rollout).assign(kl=ppo.sequence_kl(rollout).cpu()))
    return pd.concat(tables, ignore_index=True)


def check_prompts(prompts: Sequence[Prompt]) -> None:
    """Raise `InputError` for a single text in place of a list of prompts, and for an empty one."""
    if prompts is None or isinstance(prompts, str) or not len(prompts):
        raise InputError(f"prompts is {prompts!r:.60}, wanted a list of at least one")


def judged(task: Task, prompts: Sequence[Prompt], responses: Responses) -> pd.DataFrame:
    """The responses with their scores by both judges: columns prompt, response, proxy and gold."""
    texts = response_texts(responses, task.tokenizer)
    asked = [str(p) if isinstance(p, str) else p[-1].content for p in prompts]
    gold = [task.gold.score(text) for text in texts]
    return pd.DataFrame({"prompt": asked, "response": texts, "proxy": responses.scores.cpu(), "gold": gold})
