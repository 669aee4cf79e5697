"""Scores of texts by a served sequence classifier, as vLLM and SGLang serve them: what `explain_black_box` asks.

score = ServedModel("http://127.0.0.1:8000", "my-reward-model")
explain_black_box(score, "prompt", "response")
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from dense_rlhf.adapters.client import RewardClient, RewardServerError
from dense_rlhf.types import InputError, is_number

PATHS = {"/classify": "probs", "/v1/classify": "probs", "/pooling": "data", "/score": "score"}  # where a row's score is
RAW = {"use_activation": False}  # the output itself; of one output vLLM's softmax is always 1


class _JsonClient(RewardClient):
    KIND = "application/json"


class ServedModel:
    """score(prompt, responses) by the server at `url`; an answer that is not one finite number a text is refused.

    A text prompt and its response are sent as one text, or to `/score` as two; messages with role and content as a
    dialogue that the server's template writes, a request each. `output` is the score among several, `fields` go into
    each request. Raises `RewardServerError`, after as many tries as `RewardClient` makes.
    """

    def __init__(
        self,
        url: str,
        name: str,
        path: str = "/classify",
        key: str | None = None,
        output: int = 0,
        fields: Mapping[str, object] = RAW,
    ):
        if path not in PATHS:
            raise InputError(f"path is {path!r}, wanted one of {', '.join(PATHS)}")
        self.name, self.path, self.output, self.fields = name, path, output, dict(fields)
        self.batch, self._client = 64, _JsonClient(url, key)

    def __call__(self, prompt: str | Sequence[Mapping[str, object]], responses: Sequence[str]) -> np.ndarray:
        """A score for each of N responses to one prompt, (N,) float64."""
        scores = [self._ask(body, rows) for body, rows in self._requests(prompt, list(responses))]
        return np.concatenate([np.empty(0), *scores])

    def _requests(self, prompt: str | Sequence[Mapping[str, object]], responses: list[str]) -> Iterator[tuple]:
        """The bodies of all requests, and how many scores each asks for."""
        if not isinstance(prompt, str):
            if self.path == "/score":
                raise InputError("prompt is a dialogue, and /score takes two texts; take /classify")
            turns = [dict(turn) if isinstance(turn, Mapping) else vars(turn) for turn in prompt]
            for response in responses:
                yield {"messages": [*turns, {"role": "assistant", "content": response}]}, 1
            return
        for start in range(0, len(responses), self.batch):
            texts = responses[start : start + self.batch]
            pair = {"text_1": prompt, "text_2": texts}
            yield (pair if self.path == "/score" else {"input": [prompt + text for text in texts]}), len(texts)

    def _ask(self, body: dict, number: int) -> list[float]:
        sent = json.dumps({"model": self.name, **self.fields, **body}).encode()
        answer = self._client._send("POST", self.path, sent)
        try:
            rows = json.loads(answer)["data"]
            values = {row["index"]: self._value(row) for row in rows}
            if len(rows) != number or set(values) != set(range(number)) or not all(map(is_number, values.values())):
                raise ValueError(f"wanted a finite number for each of {number} texts")
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            reason = f"{type(error).__name__}: {str(error)[:100]}"
            raise RewardServerError(f"{self._client.url}{self.path} gave no scores ({reason})") from error
        return [float(values[n]) for n in range(number)]

    def _value(self, row: Mapping[str, object]) -> object:
        value = row[PATHS[self.path]]
        return value if self.path == "/score" else value[self.output]
