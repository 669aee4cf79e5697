"""Parameters of the benchmarks: who answers what, and how a judge behind an endpoint is asked."""

from __future__ import annotations

from typing import Literal

from dense_rlhf.config.strict import Count, Many, Model, Place, Positive, Size, params


@params("judge")
class JudgeParams:
    """How an endpoint is asked to judge, and what that may cost."""

    calls: Count = 4000  # requests, including those of earlier starts on the same record
    tokens: Count = 4_000_000  # read and written, with earlier starts; requests under way when it is reached are extra
    concurrency: Count = 4  # requests under way at once
    timeout: Positive = 60.0  # seconds until an answer must be complete
    attempts: Count = 5  # requests for one judgement, while the server is busy, fails or is silent
    wait: Size = 1.0  # seconds at most before the second attempt; doubles with each; a random share of it is waited
    longest_wait: Size = 60.0  # seconds; a server that asks for more patience than this is not asked again
    temperature: Size | None = 0.0  # null: the server's own
    reply_tokens: Count = 512  # a longer reply is cut, and is no judgement
    limit_as: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"  # the request's field for reply_tokens


@params("downstream")
class DownstreamParams:
    """AlpacaEval 2 and MT-Bench: who answers what, and how the answers are annotated."""

    checkpoints: Many[Model] = ()  # folders of policies, judged next to the reference, which is `policy.name`
    alpaca_path: Place | None = None  # a JSON list of instruction, output, generator; by default the hub's
    alpaca_annotator: Model | None = "weighted_alpaca_eval_gpt4_turbo"  # its name, a folder, or endpoint; null: none
    alpaca_instructions: Count | None = None  # the first n; by default all
    mt_bench_path: Place | None = None  # a folder with MT-Bench's files; by default MT-Bench is left out
    mt_bench_questions: Count | None = None  # the first n of each category
    max_new_tokens: Count = 1024  # of an answer
    temperature: Size = 0.7  # of answers to instructions; MT-Bench has its own, by category
