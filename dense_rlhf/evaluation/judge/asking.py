"""Many questions, a few at a time: attempts, waits, what ends the round, and the record of every answer."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import as_completed
from dataclasses import dataclass, field
from pathlib import Path

from anyio.from_thread import start_blocking_portal

from dense_rlhf.config.params import JudgeParams
from dense_rlhf.evaluation.judge.client import Outcome
from dense_rlhf.evaluation.judge.templates import Question, possible
from dense_rlhf.files import append_line, naming, parse_line
from dense_rlhf.types import InputError

SILENT = 3  # questions in a row without any answer: the server is gone


class Record:
    """An endpoint's answers, a JSON line each, in a file at `path` that any number of processes share.

    `values` are the judgements by key; `calls` and `tokens` count all lines.

    A line holds the key, judge, model, template, reply, tokens, seconds, time, and either the `value` or the `reason`
    for having none; never the endpoint's secret key or address. Unlike a `Journal` it keeps failed attempts too.
    """

    def __init__(self, path: Path):
        self.path = path
        self.values: dict[str, float] = {}
        self.calls = self.tokens = self._read = 0
        self.refresh()

    def refresh(self) -> None:
        """Read lines that were added since, by any process. Raises `InputError` if the file is something else."""
        if not self.path.exists():
            return
        with naming(self.path, "read"), open(self.path, "rb") as file:
            file.seek(self._read)
            new = file.read()
        whole = new[: new.rfind(b"\n") + 1]  # a last line that a crash cut short is overwritten by the next
        for line in whole.splitlines():
            self._count(parse_line(line, f"a line of {self.path}"))
        self._read += len(whole)

    def _count(self, line: dict) -> None:
        key, value, tokens = (line.get(name) for name in ("key", "value", "tokens"))
        if not isinstance(key, str) or type(tokens) is not int or tokens < 0:
            raise InputError(f"{self.path} is no record of judgements; move it away, or name another file")
        if value is not None and not possible(str(line.get("template")), value):
            raise InputError(f"{self.path} holds the judgement {value!r:.80}, which no judge gave; move the file away")
        self.calls, self.tokens = self.calls + 1, self.tokens + tokens
        if value is not None:
            self.values.setdefault(key, float(value))  # the first judgement stays

    def add(self, line: dict) -> None:
        """Append a line, on disk when this returns."""
        append_line(self.path, line)
        self.refresh()


@dataclass
class Round:
    """Questions are asked until all are settled, a limit of calls or tokens is reached, or the endpoint is gone.

    `send` asks once; `about` goes into every line of the record. Another process may ask the same question meanwhile;
    the first judgement counts.
    """

    record: Record
    params: JudgeParams
    send: Callable[[Question], Awaitable[Outcome]]
    about: dict[str, str]
    under_way: int = 0
    silent: int = 0
    answered: bool = False
    quiet: float = 0.0  # until then the server asked to be left alone, in the event loop's seconds
    ended: str = ""  # why nothing more is asked
    refused: bool = False
    turns: asyncio.Semaphore = field(init=False)

    def __post_init__(self):
        self.turns = asyncio.Semaphore(self.params.concurrency)

    async def settle(self, key: str, question: Question) -> str:
        """Ask until there is an answer or no attempt remains; the reason for having no judgement, or an empty text."""
        async with self.turns:
            reason = "never asked"
            for attempt in range(self.params.attempts):
                if key in self.record.values:
                    return ""
                await asyncio.sleep(self.quiet - asyncio.get_running_loop().time())
                if blocked := self._blocked():
                    return f"{reason}: {blocked}"
                outcome = await self._ask(key, question)
                if not outcome.again:
                    break
                reason = outcome.reason
                if attempt + 1 < self.params.attempts:
                    await asyncio.sleep(self._pause(attempt, outcome.after))
            self._conclude(outcome)
            return outcome.reason

    def _blocked(self) -> str:
        """Why nothing more may be asked; empty if it may."""
        params, record = self.params, self.record
        if record.calls + self.under_way >= params.calls:
            return f"the limit of {params.calls} calls is reached; raise judge.calls"
        if record.tokens >= params.tokens:
            return f"the limit of {params.tokens} tokens is reached; raise judge.tokens"
        return self.ended

    async def _ask(self, key: str, question: Question) -> Outcome:
        self.under_way, start = self.under_way + 1, time.perf_counter()
        try:
            outcome = await self.send(question)
        finally:
            self.under_way -= 1
        self.quiet = max(self.quiet, asyncio.get_running_loop().time() + outcome.after)
        line = {"key": key} | self.about | {"template": question.template}
        line |= {"reason": outcome.reason} if outcome.value is None else {"value": outcome.value}
        cost = dict(tokens=outcome.tokens, seconds=round(time.perf_counter() - start, 3), time=time.time())
        self.record.add(line | {"reply": outcome.reply} | cost)
        return outcome

    def _pause(self, attempt: int, after: float) -> float:
        """Seconds to wait: what the server asked for, and a random share of a wait that doubles with each attempt."""
        return min(self.params.longest_wait, after + random.uniform(0, self.params.wait * 2**attempt))

    def _conclude(self, outcome: Outcome) -> None:
        """End the round if the endpoint refuses us, asks for patience or is silent."""
        self.silent = self.silent + 1 if outcome.again else 0
        self.answered |= outcome.tokens > 0
        if outcome.refused or (outcome.form and not self.answered):
            self.ended, self.refused = outcome.reason, True
        elif outcome.ends:
            self.ended = outcome.reason
        elif self.silent >= SILENT:
            self.ended = f"{SILENT} questions in a row had no answer, the last: {outcome.reason}"


def settle_all(round_: Round, questions: dict[str, Question], close: Callable, progress: Callable) -> dict[str, str]:
    """Settle every question, by key; returns the reasons of those without a judgement. `close` is awaited last.

    The event loop has a thread of its own, as a notebook's is taken; an interrupt cancels what still runs.
    """
    with start_blocking_portal() as portal:
        futures = {portal.start_task_soon(round_.settle, *item): item[0] for item in questions.items()}
        done = as_completed(futures)
        for _ in progress(range(len(futures))):
            next(done).result()
        portal.call(close)
    return {key: future.result() for future, key in futures.items() if future.result()}
