"""Explain whatever scores texts: a served reward model, an API, any function.

explain_black_box(score, "prompt", "response")  # score(prompt, [response, ...]) gives a number each
game = black_box_game(score, "prompt", "response")  # asked once, read many times, as `game` has it
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from dense_rlhf.attribution.explain import Explanation
from dense_rlhf.attribution.game import Game, Subject, explain_game
from dense_rlhf.models.text_spans import cut, partition
from dense_rlhf.types import InputError, Reading, is_number

Score = Callable[[object, list[str]], Sequence[float]]


def explain_black_box(
    score: Score,
    prompt: object,
    response: str,
    source: str = "gaussian",
    players: str | Sequence[tuple[int, int]] = "words",
    **options,
) -> Explanation:
    """`explain` where only scores of texts are known: a text loses the characters of the players that are removed.

    `score` is called once, with the prompt as it is and each different text. `players` are words, sentences or spans;
    `options` are budgets and seed of `AttributionParams`. Raises `InputError` as `explain` and `black_box_game` do.
    """
    return explain_game(black_box_game(score, prompt, response, players), source, **options)


def black_box_game(
    score: Score, prompt: object, response: str, parts: str | Sequence[tuple[int, int]] = "words"
) -> Game:
    """The game of `response` to `prompt` whose tokens are its `parts`: words, sentences or spans of characters.

    Raises `InputError` for parts that are tokens, and, once asked, where `score` gives anything but a finite number a
    text. Its archive knows what scored it by name alone.
    """
    if not isinstance(response, str) or not response:
        raise InputError(f"response is {response!r}, wanted text that is not empty")
    if parts == "tokens":
        raise InputError("players are 'tokens', which are the model's own; wanted words, sentences or spans")
    spans = cut(response, parts) if isinstance(parts, str) else partition(parts, len(response))

    def ask(masks: np.ndarray) -> np.ndarray:
        texts = ["".join(response[a:b] for (a, b), keep in zip(spans, mask) if keep) for mask in masks]
        known = _scores(score, prompt, list(dict.fromkeys(texts)))
        return np.array([known[text] for text in texts])

    name = getattr(score, "name", "") or getattr(score, "__name__", type(score).__name__)
    subject = Subject(
        prompt,
        response,
        tuple(spans),
        Reading((), tuple(range(len(spans)))),
        removal="drop",
        output=0,
        model=name,
        engine="plain",
        text=prompt + response if isinstance(prompt, str) else "",
        read_at="what scores it",
        weights=name,
    )
    return Game(subject, ask=ask)


def _scores(score: Score, prompt: object, texts: list[str]) -> dict[str, float]:
    values = list(score(prompt, texts))
    if len(values) != len(texts) or not all(map(is_number, values)):
        wanted = f"wanted {len(texts)} finite numbers, one a text"
        raise InputError(f"score gave {len(values)} values, such as {str(values[:3])[:80]}; {wanted}")
    return dict(zip(texts, map(float, values)))
