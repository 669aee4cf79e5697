"""Parameters of judging, read as those of `params`: how an endpoint is asked, and which benchmarks are run."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dense_rlhf.types import InputError

REPLY_LIMITS = ("max_tokens", "max_completion_tokens")


@dataclass(frozen=True)
class JudgeParams:
    """How an endpoint is asked to judge, and what that may cost."""

    calls: int = 4000  # requests; earlier starts on the same record count
    tokens: int = 4_000_000  # read and written; earlier starts count. What is under way when it is reached comes on top
    concurrency: int = 4  # requests under way at once
    timeout: float = 60.0  # seconds until an answer must be whole
    attempts: int = 5  # requests for one judgement, where the server is busy, fails or is silent
    wait: float = 1.0  # seconds before the second attempt at most; doubles with each, a random share of it is waited
    longest_wait: float = 60.0  # seconds; a server that asks for more patience than this is not asked again
    temperature: float | None = 0.0  # none: the server's own
    reply_tokens: int = 512  # a longer reply is cut, and no judgement
    limit_as: str = "max_tokens"  # the field that says so; or max_completion_tokens, for models that want that

    def __post_init__(self):
        for name in ("calls", "tokens", "concurrency", "timeout", "attempts", "reply_tokens"):
            if not getattr(self, name) > 0:
                raise InputError(f"judge.{name} is {getattr(self, name)}, wanted above 0")
        if min(self.wait, self.longest_wait, self.temperature or 0) < 0:
            raise InputError(
                f"judge.wait, longest_wait, temperature: {self.wait}, {self.longest_wait}, "
                f"{self.temperature}; wanted 0 or more"
            )
        if self.limit_as not in REPLY_LIMITS:
            raise InputError(f"judge.limit_as is {self.limit_as!r}, wanted one of {', '.join(REPLY_LIMITS)}")


@dataclass(frozen=True)
class DownstreamParams:
    """AlpacaEval 2 and MT-Bench: who answers what, and how the answers are annotated."""

    checkpoints: tuple[str, ...] = ()  # folders of policies, judged beside the reference, which is `policy.name`
    alpaca_path: str | None = None  # a JSON list of instruction, output, generator; the hub's where none is given
    alpaca_annotator: str | None = "weighted_alpaca_eval_gpt4_turbo"  # its name, a folder, or ours: endpoint; none:
    # AlpacaEval is left out
    alpaca_instructions: int | None = None  # the first n; all where none is given
    mt_bench_path: str | None = None  # a folder with MT-Bench's files; left out where none is given
    mt_bench_questions: int | None = None  # the first n of each category
    max_new_tokens: int = 1024  # of an answer
    temperature: float = 0.7  # of answers to instructions; MT-Bench has its own, by category

    def __post_init__(self):
        for name in ("alpaca_instructions", "mt_bench_questions", "max_new_tokens"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise InputError(f"downstream.{name} is {getattr(self, name)}, wanted at least 1")
        if not 0 <= self.temperature < math.inf:
            raise InputError(f"downstream.temperature is {self.temperature}, wanted 0 or more")
