"""What checkpoints answer to instructions and two-turn questions, for judges that know nothing of their training."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from dense_rlhf.config.params import DownstreamParams, PolicyParams, PPOParams
from dense_rlhf.evaluation.judge import alpaca_eval, mt_bench
from dense_rlhf.evaluation.judge.length_control import FOLDS, length_controlled
from dense_rlhf.evaluation.judge.mt_bench import TwoTurns
from dense_rlhf.files import Journal, content_key
from dense_rlhf.models.language_models import LanguageModel, default_device, load_policy
from dense_rlhf.models.policy import PolicyWithValue
from dense_rlhf.ppo.sampling import draw, encode_prompts
from dense_rlhf.statistics import Interval, bootstrap
from dense_rlhf.types import InputError, Message

REFERENCE = "reference"  # its name among the checkpoints
BATCH = 8  # dialogues that are answered at once
COLDEST = 1e-4  # stands for a temperature of 0: only ties are drawn
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
    """A checkpoint's name: its folder's, or that of the run which holds it as `policy`."""
    path = Path(checkpoint)
    name = path.parent.name if path.name == "policy" and path.parent.name else path.name
    if not name.strip("."):
        raise InputError(f"downstream.checkpoints: {checkpoint!r} has no name; give the path of a folder, or a hub id")
    return name


@dataclass(frozen=True)
class Answers:
    """What one checkpoint said."""

    outputs: list[str]  # one to each instruction
    turns: list[tuple[str, str]]  # two to each question
    revision: str


# ---------------------------------------------------------------------------------------------------- answers


def answer_all(
    checkpoint: PolicyParams,
    instructions: Sequence[str],
    questions: Sequence[TwoTurns],
    params: DownstreamParams,
    seed: int,
    ledger: Path,
    progress: Callable = iter,
) -> Answers:
    """One answer to each instruction, and one to each turn of each question, sampled with `seed`.

    Each batch is a line of `ledger`: what was cut short goes on behind the last.
    """
    lm = load_policy(checkpoint)
    lm.model.to(default_device())
    single = [((Message("user", text),), params.temperature) for text in instructions]
    first = [((Message("user", q.turns[0]),), q.temperature) for q in questions]
    said = answers(lm, single + first, params.max_new_tokens, seed, ledger, progress)
    outputs, before = said[: len(single)], said[len(single) :]
    second = [
        ((*dialogue, Message("assistant", text), Message("user", q.turns[1])), q.temperature)
        for (dialogue, _), text, q in zip(first, before, questions)
    ]
    after = answers(lm, second, params.max_new_tokens, seed, ledger, progress)
    return Answers(outputs, list(zip(before, after)), lm.revision)


def answers(
    lm: LanguageModel,
    asked: Sequence[tuple[Dialogue, float]],
    max_new_tokens: int,
    seed: int,
    ledger: Path,
    progress: Callable = iter,
) -> list[str]:
    """An answer to each dialogue at its temperature, through the tokenizer's chat template where it has one.

    Raises `InputError` for a dialogue that leaves no room for an answer; nothing is cut.
    """
    journal, found = Journal(ledger), {}
    for rows in progress(_batches([temperature for _, temperature in asked])):
        dialogues, temperature = [asked[i][0] for i in rows], asked[rows[0]][1]
        texts = [[vars(message) for message in dialogue] for dialogue in dialogues]
        key = content_key([lm.revision, texts, temperature, max_new_tokens, seed])
        sample = partial(_sampled, lm, dialogues, temperature, max_new_tokens, int(key, 16) % 2**63)
        found |= dict(zip(rows, journal.get_or_make(key, lambda sample=sample: {"answers": sample()})["answers"]))
    return [found[i] for i in range(len(asked))]


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
            f"downstream.max_new_tokens is {max_new_tokens}, behind a dialogue of {longest} tokens; "
            f"the model reads {room}. Lower it, or leave the question out"
        )
    params = PPOParams(max_new_tokens=max_new_tokens, temperature=max(temperature, COLDEST))
    generator = torch.Generator().manual_seed(seed)
    drawn = draw(PolicyWithValue(lm.model).eval(), dialogues, lm.tokenizer, params, generator)
    texts = lm.tokenizer.batch_decode(
        [ids[keep].tolist() for ids, keep in zip(drawn.responses, drawn.players)], skip_special_tokens=True
    )  # a judge's prompt is made of such tokens
    return [text.strip() for text in texts]


# ---------------------------------------------------------------------------------------------------- numbers


def over_items(values: Sequence[float] | np.ndarray) -> Interval:
    """Mean of one run's judgements with its interval over items; those that are NaN count nowhere.

    Of one judgement there is no interval, and of none no mean.
    """
    known = np.asarray(values, float)
    known = known[~np.isnan(known)]
    if len(known) < 2:
        return Interval(float(known[0]) if len(known) else math.nan, -math.inf, math.inf)
    return bootstrap(known)


def in_words(found: Interval) -> str:
    """The mean with its interval, alone where there is none, a dash where nothing was judged."""
    if math.isnan(found.mean):
        return "–"
    return str(found) if found.known else f"{found.mean:.2f}"


def controlled_win_rate(pairs: pd.DataFrame) -> float:
    """Of AlpacaEval's annotations, in per cent: were both outputs equally long. NaN for too few to tell."""
    if pairs["preference"].notna().sum() < FOLDS:
        return math.nan
    return 100 * float(length_controlled(pairs["preference"], pairs["output_2"], pairs["output_1"]).mean())


def scores(graded: pd.DataFrame) -> dict[str, dict[str, Interval]]:
    """MT-Bench of one checkpoint: category, or `all`, then `turn 1`, `turn 2` or `both`: means of ratings.

    `both` is the mean of a question's ratings; intervals are over questions.
    """
    parts = {category: part for category, part in graded.groupby("category", sort=False)} | {"all": graded}
    turns = {
        name: {f"turn {turn}": over_items(part.loc[part["turn"] == turn, "rating"]) for turn in (1, 2)}
        for name, part in parts.items()
    }
    return {
        name: by | {"both": over_items(parts[name].groupby("question")["rating"].mean())} for name, by in turns.items()
    }


def caveats(instructions: int, questions: int, params: DownstreamParams, judge: str) -> list[str]:
    """Why scores are none of the benchmarks', a sentence each; nothing where they are run in full.

    Counts tell a part from the whole. Which judge is good enough they do not tell: AlpacaEval 2 has its own annotator,
    MT-Bench is graded by gpt-4.
    """
    found = []
    if instructions and instructions != alpaca_eval.FULL:
        found.append(f"{instructions} instructions; AlpacaEval has {alpaca_eval.FULL}.")
    if instructions and params.alpaca_annotator != alpaca_eval.THEIRS:
        found.append(f"{judge} annotates as {params.alpaca_annotator}; AlpacaEval 2 has {alpaca_eval.THEIRS}.")
    if questions and questions != mt_bench.FULL:
        found.append(f"{questions} questions of two turns; MT-Bench has {mt_bench.FULL}.")
    if questions and not judge.startswith("gpt-4"):
        found.append(f"{judge} grades; MT-Bench's scores are gpt-4's.")
    return found
