"""MT-Bench (Zheng et al., 2023, arXiv 2306.05685): two-turn questions, each answer graded from 1 to 10 by a judge.

Its authors' files lie in one folder: `question.jsonl`, `judge_prompts.jsonl`, and `reference_answer*.jsonl`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dense_rlhf.data import hub_rows, read_rows
from dense_rlhf.data.dataset import check_unicode
from dense_rlhf.evaluation.judge.templates import NoVerdict, Question, after_thinking
from dense_rlhf.types import InputError, Message

if TYPE_CHECKING:
    import pandas as pd

    from dense_rlhf.evaluation.judge.endpoint import Endpoint

HUB = ("HuggingFaceH4/mt_bench_prompts", "train")  # questions and references, without judge prompts
FULL = 80  # questions
REFERENCE_GUIDED = ("math", "reasoning", "coding")  # categories whose judge is shown a reference answer
TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}  # of answers; 0 for other categories
PROMPTS = {
    (1, False): "single-v1",
    (1, True): "single-math-v1",
    (2, False): "single-v1-multi-turn",
    (2, True): "single-math-v1-multi-turn",
}  # by turn, and whether there is a reference
RATING = re.compile(r"\[\[(\d+(?:\.\d+)?)\]\]")


@dataclass(frozen=True)
class TwoTurns:
    """Two turns of a user and, in some categories, a reference answer to each."""

    id: int
    category: str
    turns: tuple[str, str]
    references: tuple[str, str] | None = None

    @property
    def temperature(self) -> float:
        """The temperature at which its answers are sampled."""
        return TEMPERATURES.get(self.category, 0.0)


def read_questions(folder: Path | str, revision: str | None = None) -> list[TwoTurns]:
    """The questions with their references; from the hub at `revision` if the folder has no `question.jsonl`.

    Raises `InputError` for a row of other fields, and for a math, reasoning or coding question without references.
    Reading from the hub is untested.
    """
    path = Path(folder, "question.jsonl")
    if not path.is_file():
        rows, _ = hub_rows(HUB[0], revision, HUB[1])
        return [
            _question(row | {"question_id": row["prompt_id"], "turns": row["prompt"]}, row["reference"], HUB[0])
            for row in rows
        ]
    files = sorted(path.parent.glob("reference_answer*.jsonl"))
    answers = [(repr(row.get("question_id")), _first_choice(row)) for file in files for row in read_rows(file)]
    references = dict(answers)
    if len(references) != len(answers):
        raise InputError(f"{path.parent}/reference_answer*.jsonl: wanted no question_id twice")
    questions = [_question(row, references.get(repr(row.get("question_id"))), path) for row in read_rows(path)]
    if not questions or len({question.id for question in questions}) != len(questions):
        raise InputError(f"{path}: wanted at least one question, and no question_id twice")
    return questions


def _first_choice(row: Mapping) -> object:
    choices = row.get("choices")
    first = choices[0] if isinstance(choices, list) and choices else None
    return first.get("turns") if isinstance(first, Mapping) else None


def _question(row: Mapping, references: object, where: object) -> TwoTurns:
    turns, id, category = row.get("turns"), row.get("question_id"), row.get("category")
    if not (type(id) is int and isinstance(category, str) and _two_texts(turns)):
        raise InputError(f"{where}, question_id {id!r}: wanted question_id, category and two turns of text")
    guided, plain = category in REFERENCE_GUIDED, category.strip().lower()
    if plain != category and plain in (*REFERENCE_GUIDED, *TEMPERATURES):  # it would be judged as another
        raise InputError(f"{where}, question_id {id}: category is {category!r}, wanted {plain}")
    if guided and not _two_texts(references):
        files = "reference_answer*.jsonl in the same folder"
        raise InputError(f"{where}, question_id {id}: {category} wants two reference answers, from {files}")
    try:
        check_unicode(*turns, *(references if guided else ()))
    except InputError as error:
        raise InputError(f"{where}, question_id {id}: {error}") from None
    return TwoTurns(id, category, tuple(turns), tuple(references) if guided else None)


def _two_texts(pair: object) -> bool:
    return isinstance(pair, (list, tuple)) and len(pair) == 2 and all(isinstance(t, str) and t for t in pair)


def read_prompts(folder: Path | str) -> dict[str, dict]:
    """The four single-answer prompts of `judge_prompts.jsonl` by name, each with `system_prompt`, `prompt_template`."""
    path = Path(folder, "judge_prompts.jsonl")
    if not path.is_file():
        raise InputError(f"downstream.mt_bench_path: no file at {path}; wanted MT-Bench's judge prompts there")
    named = [(str(row.get("name")), row) for row in read_rows(path)]
    rows = dict(named)
    if len(rows) != len(named):
        raise InputError(f"{path}: wanted no name twice")
    prompts = {name: rows.get(name, {}) for name in PROMPTS.values()}
    for name, prompt in prompts.items():
        if not all(isinstance(prompt.get(key), str) for key in ("system_prompt", "prompt_template")):
            raise InputError(f"{path}: no prompt {name!r} with system_prompt and prompt_template")
    return prompts


def first_of_each_category(questions: Sequence[TwoTurns], most: int | None) -> list[TwoTurns]:
    """The first `most` questions of each category, or all of them, by category."""
    groups = {
        category: [q for q in questions if q.category == category] for category in (q.category for q in questions)
    }
    return [question for group in groups.values() for question in group[:most]]


# ---------------------------------------------------------------------------------------------------- grading


def grading(asked: TwoTurns, answers: Sequence[str], turn: int, prompts: Mapping[str, Mapping]) -> Question:
    """The chat that asks a judge to rate the answer to turn 1, or that to turn 2, shown with the turn before it."""
    name = PROMPTS[turn, asked.references is not None]
    fields = {"question": asked.turns[0], "answer": answers[0]}
    for field, texts in (("question", asked.turns), ("answer", answers), ("ref_answer", asked.references or ())):
        fields |= {f"{field}_{n}": text for n, text in enumerate(texts, 1)}
    system, text = prompts[name]["system_prompt"], _filled(prompts[name]["prompt_template"], fields)
    return Question(f"MT-Bench {name}", (Message("system", system), Message("user", text)), read_rating)


def _filled(template: str, fields: Mapping[str, str]) -> str:
    """The template with each {name} replaced once, so that braces in an answer stay text."""

    def field(match: re.Match) -> str:
        if match[1] not in fields:
            raise InputError(f"judge_prompts.jsonl asks for {{{match[1]}}}, wanted some of {', '.join(fields)}")
        return fields[match[1]]

    return re.sub(r"\{(\w+)\}", field, template)


def read_rating(reply: str) -> float:
    """The number in double brackets, as [[7]], anywhere in the reply but its thinking.

    Raises `NoVerdict` for none, for two that differ, and for a number outside 1 to 10.
    """
    ratings = {float(number) for number in RATING.findall(after_thinking(reply))}
    if len(ratings) != 1:
        raise NoVerdict("the reply holds several ratings" if ratings else "the reply holds no [[rating]]")
    if not 1 <= min(ratings) <= 10:
        raise NoVerdict("the rating is no number from 1 to 10")
    return min(ratings)


def grade(
    questions: Sequence[TwoTurns], answers: Sequence[Sequence[str]], prompts: Mapping[str, Mapping], judge: Endpoint
) -> pd.DataFrame:
    """A row a question and turn: question, category, turn, answer, and its rating, NaN without a judgement."""
    import pandas as pd

    if [len(pair) for pair in answers] != [2] * len(questions):
        raise InputError(f"{len(answers)} answers to {len(questions)} questions, wanted two to each")
    rows = [(asked, pair, turn) for asked, pair in zip(questions, answers) for turn in (1, 2)]
    ratings = judge.ask([grading(*row, prompts) for row in rows])
    table = [(asked.id, asked.category, turn, pair[turn - 1]) for asked, pair, turn in rows]
    return pd.DataFrame(table, columns=["question", "category", "turn", "answer"]).assign(rating=ratings)
