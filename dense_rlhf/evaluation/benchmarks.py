"""Checkpoints on AlpacaEval and MT-Bench: their answers, sampled once and kept, and what judges say of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from dense_rlhf.config.params import DownstreamParams, PolicyParams, PPOParams
from dense_rlhf.evaluation.judge import alpaca_eval, mt_bench
from dense_rlhf.evaluation.judge.length_control import FEWEST, length_controlled
from dense_rlhf.evaluation.judge.mt_bench import TwoTurns
from dense_rlhf.evaluation.judge.scored import reward_judge
from dense_rlhf.files import Journal, content_key
from dense_rlhf.models.language_models import LanguageModel, default_device, load_policy
from dense_rlhf.models.policy import PolicyWithValue
from dense_rlhf.ppo.sampling import encode_prompts, sample_responses
from dense_rlhf.statistics import Interval, bootstrap
from dense_rlhf.training.task import Task
from dense_rlhf.types import InputError, Message

REFERENCE = "reference"  # its name among the checkpoints
BATCH = 8  # dialogues answered at once
COLDEST = 1e-4  # stands in for a temperature of 0: only ties are left to chance
Dialogue = tuple[Message, ...]


def checkpoints(reference: PolicyParams, params: DownstreamParams) -> dict[str, PolicyParams]:
    """The reference policy and each of `params.checkpoints`, by name. Raises `InputError` for two of one name."""
    named = {REFERENCE: reference}
    for checkpoint in params.checkpoints:
        name = label(checkpoint)
        if name in named:
            raise InputError(f"downstream.checkpoints: two are called {name!r}; give the folders names of their own")
        named[name] = PolicyParams(name=checkpoint, dtype=reference.dtype)
    return named


def label(checkpoint: str) -> str:
    """A checkpoint's name: its folder's, or, for a folder called `policy`, that of the run around it."""
    path = Path(checkpoint)
    name = path.parent.name if path.name == "policy" and path.parent.name else path.name
    if not name.strip("."):
        raise InputError(f"downstream.checkpoints: {checkpoint!r} has no name; give the path of a folder, or a hub id")
    return name


@dataclass(frozen=True)
class BenchmarkPrompts:
    """What every checkpoint is asked: AlpacaEval's instructions and MT-Bench's questions."""

    instructions: Sequence[str]
    questions: Sequence[TwoTurns]


@dataclass(frozen=True)
class Answers:
    """What one checkpoint answered."""

    outputs: list[str]  # one to each instruction
    turns: list[tuple[str, str]]  # two to each question
    revision: str


# ---------------------------------------------------------------------------------------------------- answers


def answer_all(
    checkpoint: PolicyParams,
    prompts: BenchmarkPrompts,
    params: DownstreamParams,
    seed: int,
    ledger: Path,
    progress: Callable = iter,
) -> Answers:
    """One answer to each instruction and to each turn of each question, sampled with `seed`; see `answers`."""
    lm = load_policy(checkpoint)
    lm.model.to(default_device())
    single = [((Message("user", text),), params.temperature) for text in prompts.instructions]
    temperatures = [q.temperature for q in prompts.questions]
    opening = list(zip(map(_opening, prompts.questions), temperatures))
    replies = answers(lm, single + opening, params.max_new_tokens, seed, ledger, progress)
    outputs, first = replies[: len(single)], replies[len(single) :]
    follow_up = list(zip(map(_follow_up, prompts.questions, first), temperatures))
    second = answers(lm, follow_up, params.max_new_tokens, seed, ledger, progress)
    return Answers(outputs, list(zip(first, second)), lm.revision)


def _opening(question: TwoTurns) -> Dialogue:
    return (Message("user", question.turns[0]),)


def _follow_up(question: TwoTurns, reply: str) -> Dialogue:
    """The second turn, after the reply to the first."""
    return (*_opening(question), Message("assistant", reply), Message("user", question.turns[1]))


def answers(
    lm: LanguageModel,
    asked: Sequence[tuple[Dialogue, float]],
    max_new_tokens: int,
    seed: int,
    ledger: Path,
    progress: Callable = iter,
) -> list[str]:
    """An answer to each dialogue at its temperature, through the tokenizer's chat template if it has one.

    Each batch is a line of `ledger`, so interrupted sampling resumes after the last line. Raises `InputError` for a
    dialogue that leaves no room for an answer; nothing is cut.
    """
    journal, by_row = Journal(ledger), {}
    for rows in progress(_batches([temperature for _, temperature in asked])):
        dialogues, temperature = [asked[i][0] for i in rows], asked[rows[0]][1]
        texts = [[vars(message) for message in dialogue] for dialogue in dialogues]
        key = content_key([lm.revision, str(lm.model.dtype), texts, temperature, max_new_tokens, seed])
        sample = partial(_sampled, lm, dialogues, temperature, max_new_tokens, int(key, 16) % 2**63)
        by_row |= dict(zip(rows, journal.get_or_make(key, lambda sample=sample: {"answers": sample()})["answers"]))
    return [by_row[i] for i in range(len(asked))]


def _batches(temperatures: Sequence[float]) -> list[list[int]]:
    """Indices in batches, each of one temperature."""
    groups = [[i for i, other in enumerate(temperatures) if other == t] for t in dict.fromkeys(temperatures)]
    return [group[start : start + BATCH] for group in groups for start in range(0, len(group), BATCH)]


def _sampled(
    lm: LanguageModel, dialogues: Sequence[Dialogue], temperature: float, max_new_tokens: int, seed: int
) -> list[str]:
    room = getattr(lm.model.config, "max_position_embeddings", None)
    longest = int(encode_prompts(dialogues, lm.tokenizer)[1].sum(-1).max())
    if room and longest + max_new_tokens > room:
        raise InputError(
            f"downstream.max_new_tokens is {max_new_tokens}, after a dialogue of {longest} tokens; "
            f"the model reads {room}. Lower it, or leave the question out"
        )
    params = PPOParams(max_new_tokens=max_new_tokens, temperature=max(temperature, COLDEST))
    generator = torch.Generator().manual_seed(seed)
    sampled = sample_responses(PolicyWithValue(lm.model).eval(), dialogues, lm.tokenizer, params, generator)
    ids = [row[keep].tolist() for row, keep in zip(sampled.responses, sampled.players)]
    texts = lm.tokenizer.batch_decode(ids, skip_special_tokens=True)  # a judge's prompt is made of special tokens
    return [text.strip() for text in texts]


# ---------------------------------------------------------------------------------------------------- a task's judges


def judged_answers(
    task: Task, questions: Sequence[TwoTurns], answers: Mapping[str, Sequence[tuple[str, str]]]
) -> pd.DataFrame:
    """A row for each checkpoint, question and turn: `asked`, `answer`, `proxy` (sd), and what `Task.judge` says.

    Proxy and second judge read an answer after all that was said before it, as they read a response in training.
    """
    tables = []
    for name, turns in answers.items():
        second = [_follow_up(q, pair[0]) for q, pair in zip(questions, turns)]
        for turn, dialogues in enumerate((list(map(_opening, questions)), second), 1):
            texts = [pair[turn - 1] for pair in turns]
            about = {"question": [q.id for q in questions], "category": [q.category for q in questions], "turn": turn}
            about |= {"asked": [q.turns[turn - 1] for q in questions], "answer": texts}
            proxy = reward_judge(task.reward_model).score(dialogues, texts)
            scores = {"proxy": proxy, **task.judge(dialogues, texts)}
            tables.append(pd.DataFrame({"checkpoint": name, **about, **scores}))
    return pd.concat(tables, ignore_index=True)


def judges(judged: pd.DataFrame) -> list[str]:
    """The columns of `judged_answers` in which a higher number is a better answer."""
    return [name for name in ("proxy", "gold", "second") if name in judged]


def gains_over_reference(judged: pd.DataFrame) -> dict[str, dict[str, Interval]]:
    """For each checkpoint but the reference and each judge: the mean over questions of the score of its answers less
    that of the reference's, both turns averaged first."""
    means = judged.groupby(["checkpoint", "question"], sort=False)[judges(judged)].mean()
    others = [name for name in judged["checkpoint"].unique() if name != REFERENCE]
    apart = {name: means.loc[name] - means.loc[REFERENCE] for name in others}
    return {name: {judge: over_items(gap[judge].to_numpy()) for judge in gap} for name, gap in apart.items()}


# ---------------------------------------------------------------------------------------------------- numbers


def over_items(values: Sequence[float] | np.ndarray) -> Interval:
    """Mean of one run's judgements, NaN left out, with its 95 % interval over items.

    A single judgement has no interval, and none at all has no mean.
    """
    judged = np.asarray(values, float)
    judged = judged[~np.isnan(judged)]
    if len(judged) < 2:
        return Interval(float(judged[0]) if len(judged) else math.nan, -math.inf, math.inf)
    return bootstrap(judged)


def controlled_win_rate(pairs: pd.DataFrame) -> float:
    """Length-controlled win rate of AlpacaEval's annotations, in per cent; NaN if too few are judged."""
    if pairs["preference"].notna().sum() < FEWEST:
        return math.nan
    return 100 * float(length_controlled(pairs["preference"], pairs["output_2"], pairs["output_1"]).mean())


def scores(graded: pd.DataFrame) -> dict[str, dict[str, Interval]]:
    """MT-Bench ratings of one checkpoint: category, or `all`, then `turn 1`, `turn 2` or `both`.

    `both` averages each question's ratings first; intervals are over questions.
    """
    parts = {category: part for category, part in graded.groupby("category", sort=False)} | {"all": graded}
    by_category = {}
    for category, part in parts.items():
        turns = {f"turn {turn}": over_items(part.loc[part["turn"] == turn, "rating"]) for turn in (1, 2)}
        by_category[category] = turns | {"both": over_items(part.groupby("question")["rating"].mean())}
    return by_category


def caveats(prompts: BenchmarkPrompts, params: DownstreamParams, judge: str) -> list[str]:
    """Why these scores are not the benchmarks' own, a sentence each; empty if both are run in full.

    A part is told from the whole by its size. AlpacaEval 2 has its own annotator; MT-Bench is graded by gpt-4.
    """
    instructions, questions = len(prompts.instructions), len(prompts.questions)
    reasons = {
        f"{instructions} instructions; AlpacaEval has {alpaca_eval.FULL}.": 0 < instructions != alpaca_eval.FULL,
        f"{judge} annotates as {params.alpaca_annotator}; AlpacaEval 2 has {alpaca_eval.THEIRS}.": instructions
        and params.alpaca_annotator != alpaca_eval.THEIRS,
        f"{questions} questions of two turns; MT-Bench has {mt_bench.FULL}.": 0 < questions != mt_bench.FULL,
        f"{judge} grades; MT-Bench's scores are gpt-4's.": questions and not judge.startswith("gpt-4"),
    }
    return [reason for reason, holds in reasons.items() if holds]
