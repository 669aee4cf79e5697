"""Where tokens lie in their text, and how credit moves from one cut of a text to another.

Cuts (tokens of two tokenizers, words, sentences, a caller's spans) are lists of (start, end) in characters.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dense_rlhf.types import InputError, Reading

Spans = list[tuple[int, int]]
CUTS = {"words": re.compile(r"\s*\S+\s*\Z|\s*\S+|\s+\Z"), "sentences": re.compile(r"(?s).+?(?:[.!?]+(?=\s)|\n+|\Z)")}


def token_spans(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> Spans:
    """The characters of `tokenizer.decode(ids)` that each token adds, in order, without gaps.

    A token that only begins a character owns it; those that complete it are empty.
    """
    ids = list(ids)
    ends = [len(tokenizer.decode(ids[: t + 1])) for t in range(len(ids))]
    for t in range(len(ends) - 2, -1, -1):  # a half character can decode to more than the whole one
        ends[t] = min(ends[t], ends[t + 1])
    return list(zip([0, *ends[:-1]], ends))


def overlap(given: Spans, onto: Spans) -> Tensor:
    """(len(given), len(onto)) float64: the share of each given span's characters that lies on each other span.

    Rows sum to one, so credit moved by `credit @ overlap` keeps its total. Raises `InputError` where a given span
    touches none.
    """
    a, b = (torch.tensor(spans, dtype=torch.float64).view(-1, 2) for spans in (given, onto))
    common = torch.minimum(a[:, None, 1], b[None, :, 1]) - torch.maximum(a[:, None, 0], b[None, :, 0])
    common = common.clamp(min=0)
    total = common.sum(-1, keepdim=True)
    if bool((total == 0).any()):
        lost = int((total.squeeze(-1) == 0).nonzero()[0])
        raise InputError(f"token {lost} at characters {given[lost]} meets no token of the other cut; the two texts "
                         "cannot be aligned")  # fmt: skip
    return common / total


def translate(
    policy: PreTrainedTokenizerBase, reward: PreTrainedTokenizerBase, prompt: Sequence[int], response: Sequence[int]
) -> Reading:
    """A policy's tokens as the tokens of a reward model with another vocabulary, aligned by characters.

    Special tokens of the policy are left out of the prompt. Raises `InputError` where the reward tokenizer reports no
    character offsets, or does not cover the response's text.
    """
    if not reward.is_fast:
        raise InputError(f"{type(reward).__name__} reports no character offsets, which another vocabulary than the "
                         "policy's needs; take a fast tokenizer")  # fmt: skip
    spans, text = token_spans(policy, response), policy.decode(list(response))
    before = reward(policy.decode(list(prompt), skip_special_tokens=True), add_special_tokens=False)["input_ids"]
    own = reward(text, add_special_tokens=False, return_offsets_mapping=True)
    offsets = [tuple(span) for span in own["offset_mapping"]]
    if text and not offsets:
        raise InputError(f"the reward model's tokenizer reads nothing in the response {text[:80]!r}")
    return Reading(tuple(before), tuple(own["input_ids"]), overlap(_solid(offsets, len(text)), spans))


def _solid(offsets: Spans, length: int) -> Spans:
    """Offsets of which none is empty: a token without a character of its own shares the one that it stands at."""
    return [(a, b) if b > a else (min(a, length - 1), min(a, length - 1) + 1) for a, b in offsets]


def cut(text: str, kind: str) -> Spans:
    """The words (with the white space before them) or sentences of a text, without gaps."""
    if kind not in CUTS:
        raise InputError(f"players are {kind!r}, wanted tokens, {', '.join(CUTS)} or spans")
    return [match.span() for match in CUTS[kind].finditer(text)]


def groups(tokens: Spans, spans: Spans) -> list[int]:
    """The span in which each token mostly lies, numbered from 0 without gaps, in order of first token.

    An empty token goes with the one before it. What no span covers is a span of its own.
    """
    found, last = [], 0
    for start, end in tokens:
        common = [min(end, b) - max(start, a) for a, b in spans]
        best = max(range(len(spans)), key=common.__getitem__, default=0)
        last = best if common and common[best] > 0 else last
        found.append(last)
    names = {name: number for number, name in enumerate(dict.fromkeys(found))}
    return [names[name] for name in found]
