"""A judge behind an OpenAI-compatible address: a hosted model, or vLLM, llama.cpp, transformers on your machine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dense_rlhf.config.params import JudgeParams
from dense_rlhf.evaluation.judge.asking import Record, Round, settle_all
from dense_rlhf.evaluation.judge.client import MODEL, connect, send, setting
from dense_rlhf.evaluation.judge.interface import check_lengths
from dense_rlhf.evaluation.judge.templates import Question, comparison, grading
from dense_rlhf.files import content_key
from dense_rlhf.types import InputError, Prompt


@dataclass(frozen=True)
class Failure:
    """A question without a judgement: its row in the call, its template, and the reason."""

    row: int
    template: str
    reason: str


class Endpoint:
    """Asks the chat model that OPENAI_BASE_URL, OPENAI_API_KEY and OPENAI_MODEL name, and keeps every answer.

    Answers are appended to the record at `path`, so a restart after a kill, an outage or a limit asks only the rest. A
    missing judgement is NaN, and `failures` says why. `name` keeps endpoints apart whose models have the same name.
    """

    def __init__(self, path: Path, params: JudgeParams | None = None, name: str = "", progress: Callable = iter):
        self.model, self.params = setting(MODEL), params or JudgeParams()
        self.name = name or self.model
        self.record, self.progress = Record(Path(path)), progress
        self._failures: dict[str, Failure] = {}

    def compare(self, instructions: Sequence[Prompt], first: Sequence[str], second: Sequence[str]) -> np.ndarray:
        """(N,) 1 if the first response is preferred, 0 if the second, 0.5 for a tie, NaN without a judgement."""
        check_lengths(instructions=instructions, first=first, second=second)
        return self.ask([comparison(*row) for row in zip(instructions, first, second)])

    def grade(
        self, instructions: Sequence[Prompt], responses: Sequence[str], references: Sequence[str | None] | None = None
    ) -> np.ndarray:
        """(N,) from 1 to 10, NaN without a judgement."""
        references = [None] * len(responses) if references is None else references
        check_lengths(instructions=instructions, responses=responses, references=references)
        return self.ask([grading(*row) for row in zip(instructions, responses, references)])

    def ask(self, questions: Sequence[Question]) -> np.ndarray:
        """(N,) the number read from each reply, NaN without a judgement; equal questions are asked once.

        Raises `InputError` if the endpoint refuses key, model or address; earlier judgements are kept.
        """
        keys = [self._key(question) for question in questions]
        self.record.refresh()
        missing = {key: q for key, q in zip(keys, questions) if key not in self.record.values}
        reasons = self._settle(missing) if missing else {}
        for row, (key, question) in enumerate(zip(keys, questions)):
            self._failures.pop(key, None)
            if key in reasons:
                self._failures[key] = Failure(row, question.template, reasons[key])
        return np.array([self.record.values.get(key, np.nan) for key in keys])

    @property
    def failures(self) -> list[Failure]:
        """Every question to this object that has no judgement yet."""
        return list(self._failures.values())

    def report(self) -> str:
        """The cost so far, and why how many questions have no judgement."""
        reasons = Counter(failure.reason for failure in self.failures)
        why = "; ".join(f"{reason} ({count})" for reason, count in reasons.most_common())
        return (
            f"{self.record.calls} calls and {self.record.tokens} tokens on record; "
            f"{len(self.failures)} without a judgement{': ' + why if why else ''}"
        )

    def _key(self, question: Question) -> str:
        """Hash of everything that a judgement depends on."""
        messages = [[message.role, message.content] for message in question.messages]
        settings = [self.params.temperature, self.params.reply_tokens]
        return content_key([self.name, self.model, question.template, messages, settings])

    def _settle(self, questions: dict[str, Question]) -> dict[str, str]:
        client, about = connect(self.params), {"judge": self.name, "model": self.model}
        round_ = Round(
            self.record, self.params, lambda question: send(client, self.model, question, self.params), about
        )
        reasons = settle_all(round_, questions, client.close, self.progress)
        if round_.refused:
            judged = f"{len(questions) - len(reasons)} of {len(questions)} questions"
            raise InputError(f"the endpoint judged {judged}, then {round_.ended}")
        return reasons
