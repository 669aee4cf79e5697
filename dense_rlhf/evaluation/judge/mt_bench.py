"""MT-Bench (Zheng et al., 2023, arXiv 2306.05685): two-turn questions, each answer graded from 1 to 10 by a judge.

A folder holds its authors' files: `question.jsonl`, `judge_prompts.jsonl`, and references in `reference_answer*.jsonl`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dense_rlhf.data import hub_rows, read_rows
from dense_rlhf.evaluation.judge.templates import NoVerdict, Question
from dense_rlhf.types import InputError, Message

if TYPE_CHECKING:
    import pandas as pd

    from dense_rlhf.evaluation.judge.endpoint import Endpoint

HUB = ("HuggingFaceH4/mt_bench_prompts", "train")  # questions and references, without judge prompts
FULL = 80  # questions
REFERENCE_GUIDED = ("math", "reasoning", "coding")  # categories whose judge is shown a reference answer
TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}  # of answers; of others 0
PROMPTS = {
    (1, False): "single-v1",
    (1, True): "single-math-v1",
    (2, False): "single-v1-multi-turn",
    (2, True): "single-math-v1-multi-turn",
}  # turn, reference
RATING = re.compile(r"\[\[(\d+(?:\.\d+)?)\]\]")


@dataclass(frozen=True)
class TwoTurns:
    """Two turns of a user, and what a good assistant answers to each where the category has references."""

    id: int
    category: str
    turns: tuple[str, str]
    references: tuple[str, str] | None = None

    @property
    def temperature(self) -> float:
        """At which its answers are sampled."""
        return TEMPERATURES.get(self.category, 0.0)


def read_questions(folder: Path | str, revision: str | None = None) -> list[TwoTurns]:
    """The questions with their references; from the hub at `revision` where the folder has no `question.jsonl`.

    Raises `InputError` for a row of other fields, and for a math, reasoning or coding question without references.
    The hub's route has not been run.
    """
    path = Path(folder, "question.jsonl")
    if not path.is_file():
        rows, _ = hub_rows(HUB[0], revision, HUB[1])
        return [
            _question(row | {"question_id": row["prompt_id"], "turns": row["prompt"]}, row["reference"], HUB[0])
            for row in rows
        ]
    files = sorted(path.parent.glob("reference_answer*.jsonl"))
    references = {row.get("question_id"): _first_choice(row) for file in files for row in read_rows(file)}
    found = [_question(row, references.get(row.get("question_id"), ()), path) for row in read_rows(path)]
    if not found or len({question.id for question in found}) != len(found):
        raise InputError(f"{path}: wanted at least one question, and no question_id twice")
    return found


def _first_choice(row: Mapping) -> Sequence[str]:
    choices = row.get("choices") or [{}]
    return choices[0].get("turns", ())


def _question(row: Mapping, references: Sequence[str], where: object) -> TwoTurns:
    turns, id, category = row.get("turns"), row.get("question_id"), row.get("category")
    if not (type(id) is int and isinstance(category, str) and _two_texts(turns)):
        raise InputError(f"{where}, question_id {id!r}: wanted question_id, category and two turns of text")
    guided = category in REFERENCE_GUIDED
    if guided and not _two_texts(references):
        raise InputError(
            f"{where}, question_id {id}: {category} wants two reference answers; they are looked for in "
            "reference_answer*.jsonl beside it"
        )
    return TwoTurns(id, category, tuple(turns), tuple(references) if guided else None)


def _two_texts(found: object) -> bool:
    return isinstance(found, (list, tuple)) and len(found) == 2 and all(isinstance(t, str) and t for t in found)


def read_prompts(folder: Path | str) -> dict[str, dict]:
    """The four single-answer prompts of `judge_prompts.jsonl` by name, each with `system_prompt`, `prompt_template`."""
    path = Path(folder, "judge_prompts.jsonl")
    if not path.is_file():
        raise InputError(f"downstream.mt_bench_path: no file at {path}; wanted MT-Bench's judge prompts there")
    found = {row.get("name"): row for row in read_rows(path)}
    for name in PROMPTS.values():
        texts = [found.get(name, {}).get(key) for key in ("system_prompt", "prompt_template")]
        if not all(isinstance(text, str) for text in texts):
            raise InputError(f"{path}: no prompt {name!r} with system_prompt and prompt_template")
    return {name: found[name] for name in PROMPTS.values()}


def first_of_each_category(questions: Sequence[TwoTurns], most: int | None) -> list[TwoTurns]:
    """The first `most` questions of each category, or all of them."""
    kept: dict[str, list[TwoTurns]] = {}
    for question in questions:
        kept.setdefault(question.category, []).append(question)
    return [question for group in kept.values() for question in group[:most]]


# ---------------------------------------------------------------------------------------------------- grading


def grading(asked: TwoTurns, answers: Sequence[str], turn: int, prompts: Mapping[str, Mapping]) -> Question:
    """The chat that asks a judge to rate the answer to turn 1 or 2; the second is shown with the turn before it."""
    name = PROMPTS[turn, asked.references is not None]
    fields = {"question": asked.turns[0], "answer": answers[0]}
    fields |= {f"question_{n}": text for n, text in enumerate(asked.turns, 1)}
    fields |= {f"answer_{n}": text for n, text in enumerate(answers, 1)}
    fields |= {f"ref_answer_{n}": text for n, text in enumerate(asked.references or (), 1)}
    text = _filled(prompts[name]["prompt_template"], fields)
    return Question(
        f"MT-Bench {name}", (Message("system", prompts[name]["system_prompt"]), Message("user", text)), read_rating
    )


def _filled(template: str, fields: Mapping[str, str]) -> str:
    """The template with each {name} replaced, once: braces in an answer are text."""

    def field(match: re.Match) -> str:
        if match[1] not in fields:
            raise InputError(f"judge_prompts.jsonl asks for {{{match[1]}}}, wanted some of {', '.join(fields)}")
        return fields[match[1]]

    return re.sub(r"\{(\w+)\}", field, template)


def read_rating(reply: str) -> float:
    """The number in double brackets, as [[7]], wherever the judge wrote it.

    Raises `NoVerdict` without one, with two that differ, and outside of 1 to 10.
    """
    found = {float(number) for number in RATING.findall(reply)}
    if len(found) != 1:
        raise NoVerdict("the reply holds several ratings" if found else "the reply holds no [[rating]]")
    if not 1 <= min(found) <= 10:
        raise NoVerdict("the rating is no number from 1 to 10")
    return min(found)


def grade(
    questions: Sequence[TwoTurns], answers: Sequence[Sequence[str]], prompts: Mapping[str, Mapping], judge: Endpoint
) -> pd.DataFrame:
    """A row a question and turn: question, category, turn, answer, and its rating, NaN without a judgement."""
    import pandas as pd

    if [len(pair) for pair in answers] != [2] * len(questions):
        raise InputError(f"{len(answers)} answers to {len(questions)} questions, wanted two to each")
    rows = [(asked, pair, turn) for asked, pair in zip(questions, answers) for turn in (1, 2)]
    ratings = judge.ask([grading(*row, prompts) for row in rows])
    return pd.DataFrame(
        {
            "question": [asked.id for asked, _, _ in rows],
            "category": [asked.category for asked, _, _ in rows],
            "turn": [turn for *_, turn in rows],
            "answer": [pair[turn - 1] for _, pair, turn in rows],
            "rating": ratings,
        }
    )
