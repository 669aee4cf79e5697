"""Where tokens lie in their text, and how credit moves from one division of a text to another.

Cuts (tokens of two tokenizers, words, sentences, a caller's spans) are lists of (start, end) in characters.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from operator import index
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import BatchEncoding, PreTrainedTokenizerBase

from dense_rlhf.types import InputError

Spans = list[tuple[int, int]]
# Scripts that put no space between words: each character is a word, with its marks and the punctuation after it.
UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3041-\u30ff\u31f0-\u31ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003134f"
)
MARKS = (
    "\u0300-\u036f\u0e31\u0e34-\u0e3a\u0e47-\u0e4e\u0eb1\u0eb4-\u0ebc\u0ec8-\u0ece"
    "\u102b-\u103e\u17b4-\u17d3\u3099\u309a\u30fc"
)
WORD = rf"(?:[{UNSPACED}][{MARKS}]*[^\s\w\u300c\u300e\uff08\u3008\u300a\u3010\u201c\u2018(]*|[^\s{UNSPACED}]+)"
CUTS = {
    "words": re.compile(rf"\s*{WORD}\s*\Z|\s*{WORD}|\s+\Z"),
    "sentences": re.compile(
        r"""(?s).+?(?:[.!?\u2026\u061f\u06d4\u0964]+["'\u2019\u201d\u00bb)\]]*(?=\s)|"""
        r"""[\u3002\uff01\uff1f\uff61]+["'\u2019\u201d\u300d\u300f\uff09]*|\n+|\Z)"""
    ),
}


# ---------------------------------------------------------------------------------------------------- tokens


def token_spans(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> Spans:
    """The characters of `tokenizer.decode(ids)` that each token adds, in order, without gaps.

    A token that only begins a character owns it; those that complete it are empty.
    """
    ids = list(ids)
    ends = _ends_by_windows(tokenizer, ids) or [len(tokenizer.decode(ids[: t + 1])) for t in range(len(ids))]
    for t in range(len(ends) - 2, -1, -1):  # a half character can decode to more than the whole one
        ends[t] = min(ends[t], ends[t + 1])
    return list(zip([0, *ends[:-1]], ends))


def _ends_by_windows(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int] | None:
    """Length of the text of every prefix, decoding only what follows the last whole characters.

    None where the pieces do not add up to the text: every prefix must then be decoded.
    """
    ends, pieces, context, fresh, known = [], [], 0, 0, ""
    for t in range(len(ids)):
        text = tokenizer.decode(ids[context : t + 1])
        ends.append((ends[fresh - 1] if fresh else 0) + len(text) - len(known))
        if text.endswith("\ufffd") and t + 1 < len(ids):  # perhaps half a character: wait for the rest
            continue
        if not text.startswith(known):
            return None
        pieces.append(text[len(known) :])
        context, fresh = fresh, t + 1  # one piece of context: some tokenizers write a text's first token differently
        known = tokenizer.decode(ids[context:fresh])
    return ends if "".join(pieces) == tokenizer.decode(ids) else None


class Sides(NamedTuple):
    """A text as tokens: the part that is explained, and those before and after it."""

    before: list[int]
    middle: list[int]
    after: list[int]
    spans: Spans  # of the middle's tokens in the middle's text
    segments: tuple[int, ...] | None = None  # of all tokens, where the tokenizer tells several apart


def tokenise(
    tokenizer: PreTrainedTokenizerBase,
    before: str,
    middle: str,
    after: str = "",
    special: bool = False,
    pair: bool = False,
) -> Sides:
    """Tokenise a text of three parts as the tokenizer does the whole, with its `special` tokens or without.

    White space at the end of `before` may join the first token of `middle`. Where any other token would straddle two
    parts, each part is tokenised by itself. As a `pair`, before and middle are two segments. Special tokens that the
    text begins with are not added again. Raises `InputError` for a tokenizer without offsets.
    """
    if not tokenizer.is_fast:
        name = type(tokenizer).__name__
        raise InputError(f"{name} reports no character offsets, which finding tokens needs; take a fast tokenizer")
    options = dict(add_special_tokens=special, return_offsets_mapping=True, return_special_tokens_mask=True)
    if pair:
        return _pair(tokenizer(before, middle, **options))
    start, stop = len(before), len(before) + len(middle)
    text = before + middle + after
    whole = tokenizer(text, **options)
    ids, added = whole["input_ids"], whole["special_tokens_mask"]
    offsets = _untrimmed(whole["offset_mapping"], added, text)
    head = next((t for t, flag in enumerate(added) if not flag), len(ids))
    tail = max(head, len(ids) - next((t for t, flag in enumerate(reversed(added)) if not flag), 0))
    core = range(head, tail)
    first = next((t for t in core if offsets[t][1] > start), tail)
    last = next((t for t in core[first - head :] if offsets[t][0] >= stop), tail)
    again = head if 0 < head <= first - head and ids[:head] == ids[head : 2 * head] else 0
    segments = _segments(whole)
    over = last > first and offsets[last - 1][1] > stop
    if over or (first < tail and text[offsets[first][0] : start].strip()):
        alone = {"add_special_tokens": False, "return_offsets_mapping": True}
        parts = [tokenizer(part, **alone) for part in (before, middle, after)]
        own = [part["input_ids"] for part in parts]
        if segments:
            segments = (*segments[:head], *sum(len(part) for part in own) * [segments[head]], *segments[tail:])
        return Sides(ids[again:head] + own[0], own[1], own[2] + ids[tail:], parts[1]["offset_mapping"], segments)
    spans = [(max(a, start) - start, b - start) for a, b in offsets[first:last]]
    return Sides(ids[again:first], ids[first:last], ids[last:], spans, segments and segments[again:])


def _pair(encoded: BatchEncoding) -> Sides:
    ids, part = encoded["input_ids"], encoded.sequence_ids()
    first = next((t for t, number in enumerate(part) if number == 1), len(ids))
    last = next((t for t in range(first, len(ids)) if part[t] != 1), len(ids))
    return Sides(ids[:first], ids[first:last], ids[last:], encoded["offset_mapping"][first:last], _segments(encoded))


def _segments(encoded: BatchEncoding) -> tuple[int, ...] | None:
    """None where all tokens are of the first segment, as models assume by themselves."""
    segments = encoded.get("token_type_ids") or ()
    return tuple(segments) if any(segments) else None


def _untrimmed(offsets: Spans, added: Sequence[int], text: str) -> Spans:
    """Offsets in which a token of white space alone, which some tokenizers trim to nothing, has its characters."""
    reached, whole = 0, []
    for (a, b), special in zip(offsets, added):
        if a == b and not special and text[reached:b].isspace():
            a = reached
        reached = max(reached, b)
        whole.append((a, b))
    return whole


def solid(offsets: Spans, length: int) -> Spans:
    """Offsets without empty ones: a token without a character of its own shares the one at its place."""
    return [(a, b) if b > a else (min(a, length - 1), min(a, length - 1) + 1) for a, b in offsets]


# ---------------------------------------------------------------------------------------------------- cuts


def overlap(given: Spans, onto: Spans) -> Tensor:
    """The share of each given span's characters that lies on each other span, (len(given), len(onto)) float64.

    Rows sum to one, so `credit @ overlap` keeps its total. Raises `InputError` for a given span that touches none.
    """
    a, b = (torch.tensor(spans, dtype=torch.float64).view(-1, 2) for spans in (given, onto))
    common = torch.minimum(a[:, None, 1], b[None, :, 1]) - torch.maximum(a[:, None, 0], b[None, :, 0])
    common = common.clamp(min=0)
    total = common.sum(-1, keepdim=True)
    if bool((total == 0).any()):
        lost = int((total.squeeze(-1) == 0).nonzero()[0])
        where = f"token {lost} at characters {given[lost]}"
        raise InputError(f"{where} meets no token of the other text; the two cannot be aligned")
    return common / total


def tile(spans: Spans, length: int) -> Spans:
    """Rising spans stretched to leave no gaps: characters that none covers go to the next span, the rest to the last.

    A span that lies within an earlier one, as the bytes of one character do, becomes empty.
    """
    ends = np.maximum.accumulate([end for _, end in spans]).tolist() if spans else []
    return list(zip([0, *ends[:-1]], [*ends[:-1], length])) if ends else []


def cut(text: str, kind: str) -> Spans:
    """The words (with the white space before them) or sentences of a text, without gaps."""
    if kind not in CUTS:
        raise InputError(f"players are {kind!r}, wanted tokens, {', '.join(CUTS)} or spans")
    return [match.span() for match in CUTS[kind].finditer(text)]


def partition(spans: Sequence[tuple[int, int]], length: int) -> Spans:
    """A caller's spans and the stretches between them: all of a text of `length` characters, in order.

    Raises `InputError` naming a span that is empty, outside the text, or overlaps the one before it.
    """
    parts, reached = [], 0
    wanted = "wanted rising (start, end) of whole numbers, not empty, not overlapping"
    if not isinstance(spans, Iterable):
        raise InputError(f"spans: {spans!r}; {wanted}")
    for span in spans:
        try:
            start, end = (index(place) for place in span if not isinstance(place, bool))
        except (TypeError, ValueError):
            raise InputError(f"spans: {span!r}; {wanted}") from None
        if not reached <= start < end <= length:
            given = f"({start}, {end}) in a text of {length} characters, after a span that ends at {reached}"
            raise InputError(f"spans: {given}; {wanted}")
        parts += [(reached, start)] * (start > reached) + [(start, end)]
        reached = end
    return parts + [(reached, length)] * (length > reached)


def homes(tokens: Spans, spans: Spans) -> list[int]:
    """The number of the span in which each token mostly lies; for a token in none, that of the token before it."""
    a, b = (np.array(cut, dtype=int).reshape(-1, 2) for cut in (tokens, spans))
    common = np.minimum(a[:, None, 1], b[None, :, 1]) - np.maximum(a[:, None, 0], b[None, :, 0])
    numbers, last = [], 0
    for shared in common:
        last = int(shared.argmax()) if shared.max(initial=0) > 0 else last
        numbers.append(last)
    return numbers


def groups(tokens: Spans, spans: Spans) -> list[int]:
    """The player of each token: the span in which it mostly lies, numbered from 0 without gaps, by first token."""
    owners = homes(tokens, spans)
    numbers = {owner: number for number, owner in enumerate(dict.fromkeys(owners))}
    return [numbers[owner] for owner in owners]
