"""Explain whatever scores texts: a served reward model, an API, any function.

explain_black_box(score, "prompt", "response")  # score(prompt, [response, ...]) gives a number each
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

from dense_rlhf.attribution.explain import Explanation, designed, of_tokens, removal_params
from dense_rlhf.attribution.gaussian import estimate
from dense_rlhf.models.text_spans import cut, partition
from dense_rlhf.types import InputError, is_number


def explain_black_box(
    score: Callable[[object, list[str]], Sequence[float]],
    prompt: object,
    response: str,
    source: str = "gaussian",
    players: str | Sequence[tuple[int, int]] = "words",
    **options,
) -> Explanation:
    """`explain` where only scores of texts are known: a text loses the characters of the players that are removed.

    `score` is called once, with the prompt as it is and each different text. `players` are words, sentences or spans;
    `options` are budgets and seed of `AttributionParams`. Raises `InputError` as `explain` does, for players that are
    tokens, for a removal other than `drop`, and where `score` gives anything but a finite number a text.
    """
    started = time.perf_counter()
    params, kind = removal_params(source, options), designed(source)
    if not isinstance(response, str) or not response:
        raise InputError(f"response is {response!r}, wanted text that is not empty")
    if players == "tokens" or params.removal != "drop":
        given = f"players are {players!r}, removal is {params.removal!r}"
        raise InputError(f"{given}: both need the model's tokens; wanted words, sentences or spans, and drop")
    spans = cut(response, players) if isinstance(players, str) else partition(players, len(response))
    masks = kind.design(len(spans), params).masks.numpy()
    kept = ["".join(response[a:b] for (a, b), keep in zip(spans, mask) if keep) for mask in masks]
    known = _scores(score, prompt, list(dict.fromkeys(kept)))
    values = np.array([known[text] for text in kept])
    return Explanation(
        response=response,
        spans=tuple(spans),
        baseline=values[0],
        score=values[1],
        source=source,
        complete=kind.complete,
        evaluations=len(known),
        seconds=time.perf_counter() - started,
        engine="plain",
        model=getattr(score, "name", "") or getattr(score, "__name__", type(score).__name__),
        text=prompt + response if isinstance(prompt, str) else "",
        read_at="what scores it",
        **of_tokens(estimate(kind, len(spans), params, values), np.arange(len(spans))),
    )


def _scores(score: Callable, prompt: object, texts: list[str]) -> dict[str, float]:
    values = list(score(prompt, texts))
    if len(values) != len(texts) or not all(map(is_number, values)):
        wanted = f"wanted {len(texts)} finite numbers, one a text"
        raise InputError(f"score gave {len(values)} values, such as {str(values[:3])[:80]}; {wanted}")
    return dict(zip(texts, map(float, values)))
