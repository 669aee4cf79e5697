"""A policy's responses to held-out prompts, scored."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pandas as pd

from dense_rlhf import ppo
from dense_rlhf.config.params import PPOParams
from dense_rlhf.data import Dataset
from dense_rlhf.files import cached_folder, write_text
from dense_rlhf.fingerprint import source_key
from dense_rlhf.models.language_models import machine
from dense_rlhf.models.policy import PolicyWithValue, state_sha256
from dense_rlhf.ppo.rollout import response_texts
from dense_rlhf.training.task import Task, step_seed
from dense_rlhf.types import InputError, Prompt, Responses

HELD_OUT = 50_000  # a step no training reaches: from it on, held-out responses have their seeds


def evaluate(
    task: Task,
    policy: PolicyWithValue,
    prompts: Sequence[Prompt],
    params: PPOParams,
    seed: int,
    stages: Path | None = None,
) -> pd.DataFrame:
    """One response to each prompt: the columns of `judged`, proxy in sd, and kl (nats).

    With `stages`, where all runs keep what they share, a policy of the same weights answers the same prompts once.
    Raises `InputError` as `check_prompts` does.
    """
    check_prompts(prompts)
    if stages is None:
        return _evaluated(task, policy, prompts, params, seed)
    sampling = [getattr(params, name) for name in SAMPLED_BY]
    asked = [[str(prompt) for prompt in prompts], sampling, seed, source_key("dense_rlhf.training.evaluate")]
    key = [task.key, state_sha256(policy), *asked, machine()]
    answers = partial(_evaluated, task, policy, prompts, params, seed)
    return _read(cached_folder("answers", key, lambda folder: _write(answers(), folder), stages))


SAMPLED_BY = ("rollouts", "max_new_tokens", "temperature", "sampler", "micro_batch")  # parameters that decide answers


def _evaluated(
    task: Task, policy: PolicyWithValue, prompts: Sequence[Prompt], params: PPOParams, seed: int
) -> pd.DataFrame:
    tables = []
    for start in range(0, len(prompts), params.rollouts):
        batch = prompts[start : start + params.rollouts]
        rollout = task.rollout(policy, batch, params, step_seed(seed, HELD_OUT + start))
        tables.append(judged(task, batch, rollout).assign(kl=ppo.sequence_kl(rollout).cpu()))
    return pd.concat(tables, ignore_index=True)


def _write(table: pd.DataFrame, folder: Path) -> None:
    columns = {name: [str(column.dtype), column.tolist()] for name, column in table.items()}
    write_text(folder / "answers.json", json.dumps(columns))


def _read(folder: Path) -> pd.DataFrame:
    columns = json.loads((folder / "answers.json").read_text(encoding="utf-8"))
    return pd.DataFrame({name: pd.Series(values, dtype=dtype) for name, (dtype, values) in columns.items()})


def held_out(data: Dataset, number: int) -> tuple[str, list[Prompt]]:
    """The prompts, `number` at most, that finished policies are judged on, after the name of their table: `test`, which
    choose nothing; a dataset that has none judges on validation prompts, `evaluation`."""
    name, prompts = ("test", data.test_prompts) if data.test_prompts else ("evaluation", data.validation_prompts)
    return name, prompts[:number]


def check_prompts(prompts: Sequence[Prompt]) -> None:
    """Raise `InputError` for a single text in place of a list of prompts, and for an empty one."""
    if prompts is None or isinstance(prompts, str) or not len(prompts):
        raise InputError(f"prompts is {prompts!r:.60}, wanted a list of at least one")


def judged(task: Task, prompts: Sequence[Prompt], responses: Responses) -> pd.DataFrame:
    """The responses with their scores: columns prompt, response, proxy, and those of `Task.judge`."""
    texts = response_texts(responses, task.tokenizer)
    asked = [str(p) if isinstance(p, str) else p[-1].content for p in prompts]
    scores = {"proxy": responses.scores.cpu()} | task.judge(prompts, texts)
    return pd.DataFrame({"prompt": asked, "response": texts} | scores)
