"""One way to read a dialogue as a model does: its chat template or plain text, its special tokens once, its end.

Policy prompts, reward models in studies, `explain` and judges all read through here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from os.path import commonprefix
from types import SimpleNamespace
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from dense_rlhf.data import Dataset, prompt_text
from dense_rlhf.files import content_key
from dense_rlhf.models.text_spans import Spans, overlap, solid, token_spans, tokenise
from dense_rlhf.types import InputError, LabelledText, Message, Prompt, Reading

ROLES = ("user", "assistant", "system")
SENTINEL = "\ue000reply\ue001"  # in place of the response, to see what a chat template writes around it


class Turn(SimpleNamespace):
    """A turn that only a chat template can read: content in parts, tool calls, a role of the template's own."""


def messages_of(prompt: object) -> Prompt:
    """A prompt as text, or as messages: whatever is iterable and holds mappings or objects with role and content.

    Raises `InputError` for anything else.
    """
    if isinstance(prompt, str):
        return prompt
    turns = tuple(prompt) if isinstance(prompt, Iterable) and not isinstance(prompt, (bytes, Mapping)) else ()
    if not turns:
        raise InputError(f"prompt is {str(prompt)[:80]!r}, wanted text or messages with role and content")
    return tuple(map(_message, turns))


def _message(given: object) -> Message | Turn:
    if isinstance(given, Turn):
        return given
    fields = given if isinstance(given, Mapping) else getattr(given, "__dict__", {})
    role, content = fields.get("role"), fields.get("content")
    if role not in ROLES or not isinstance(content, str):
        raise InputError(f"prompt holds {str(given)[:80]!r}, wanted a role of {', '.join(ROLES)} and content as text")
    return Message(role, content)


def templated(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Message], **options: bool) -> str:
    """The text that the chat template writes. Raises `InputError` for a dialogue that it refuses."""
    try:
        return tokenizer.apply_chat_template([vars(turn) for turn in turns], tokenize=False, **options)
    except Exception as error:  # a template may raise anything
        roles = ", ".join(turn.role for turn in turns)
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise InputError(
            f"the chat template refuses a dialogue of {roles} ({reason}); give it turns it knows"
        ) from None


def render(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> str:
    """A prompt as this tokenizer's models expect it: dialogues through its chat template where it has one."""
    prompt = messages_of(prompt)
    if isinstance(prompt, str) or not tokenizer.chat_template:
        return prompt_text(prompt)
    return templated(tokenizer, prompt, add_generation_prompt=True)


def without_refused(dataset: Dataset, tokenizers: dict[str, PreTrainedTokenizerBase]) -> Dataset:
    """The dataset less dialogues that a chat template refuses, counted by the template's reason.

    `tokenizers` by whose they are. A template is asked once about each sequence of roles.
    """
    counts, reasons = dict(dataset.counts), {(): None}

    def refused(prompt: Prompt) -> str | None:
        roles = () if isinstance(prompt, str) else tuple(turn.role for turn in prompt)
        if roles not in reasons:
            reasons[roles] = _refusal(prompt, tokenizers)
        return reasons[roles]

    def kept(rows: list) -> list:
        sound = []
        for row in rows:
            asked = "" if isinstance(row, LabelledText) else getattr(row, "prompt", row)
            if reason := refused(asked):
                counts[f"left out: {reason}"] = counts.get(f"left out: {reason}", 0) + 1
            else:
                sound.append(row)
        return sound

    splits = ("reward", "gold", "second", "test", "train_prompts", "validation_prompts", "test_prompts")
    rows = {split: kept(getattr(dataset, split)) for split in splits}
    if emptied := [split for split in splits if getattr(dataset, split) and not rows[split]]:
        raise InputError(f"{dataset.name}: nothing is left for {', '.join(emptied)}: {counts}")
    return replace(dataset, **rows, counts=counts)


def _refusal(prompt: tuple[Message, ...], tokenizers: dict[str, PreTrainedTokenizerBase]) -> str | None:
    for owner, tokenizer in tokenizers.items():
        try:
            render(prompt, tokenizer)
            frame(tokenizer, prompt)
        except InputError as error:
            return f"{owner}: {error}"
    return None


# ---------------------------------------------------------------------------------------------------- prompts


def prompt_ids(prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The tokens that a policy continues: its special tokens at the start once, none at the end.

    Raises `InputError` for a prompt of no tokens or of another type, and for one that the chat template refuses.
    """
    if isinstance(prompts, str | None):
        raise InputError(f"prompts is {prompts!r:.60}, one text or none; wanted a list of them")
    rows = []
    for prompt in prompts:
        plain = isinstance(prompt, str) or not tokenizer.chat_template
        read = _encoded(tokenizer, render(prompt, tokenizer), add_special_tokens=plain)
        ids, added = read["input_ids"], read["special_tokens_mask"] if plain else [0] * len(read["input_ids"])
        head, tail = _ends(added)
        rows.append(ids[head if _twice(ids, head) else 0 : tail])
        if not rows[-1]:
            raise InputError(f"prompt {prompt!r} has no tokens, wanted at least one for a response to follow")
    return rows


def head_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens that begin a plain text."""
    read = _encoded(tokenizer, "a")
    return read["input_ids"][: _ends(read["special_tokens_mask"])[0]]


def _encoded(tokenizer: PreTrainedTokenizerBase, text: str, **options: bool) -> Mapping:
    try:
        return tokenizer(text, return_special_tokens_mask=True, **options)
    except (TypeError, UnicodeError) as error:
        raise InputError(f"{text[:60]!r} is not valid Unicode (a lone surrogate?); decode it anew") from error


def _ends(added: Sequence[int]) -> tuple[int, int]:
    """Where the tokens that no tokenizer added begin and end."""
    own = [t for t, flag in enumerate(added) if not flag]
    return (own[0], own[-1] + 1) if own else (len(added), len(added))


def _twice(ids: Sequence[int], head: int) -> bool:
    """Whether a text that was rendered before begins with the tokens that the tokenizer adds."""
    return 0 < head and ids[:head] == ids[head : 2 * head]


def turn_ends(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids that end a reply: EOS, and the first special token that the chat template writes after one."""
    ends = {tokenizer.eos_token_id} - {None}
    if tokenizer.chat_template:
        after = tokenizer(frame(tokenizer, (Message("user", "a"),)).after, add_special_tokens=False)["input_ids"]
        ends |= {*[token for token in after if token in tokenizer.added_tokens_decoder][:1]}
    return ends


def tokens_key(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of how a tokenizer reads texts and dialogues."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = sorted(tokenizer.get_vocab().items()) if backend is None else backend.to_str()
    return content_key([rules, tokenizer.chat_template, tokenizer.special_tokens_map])


# ---------------------------------------------------------------------------------------------------- readings


class Frame(NamedTuple):
    """What stands around a response in the text that a model reads."""

    before: str
    after: str
    special: bool  # the tokenizer adds its special tokens


def frame(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> Frame:
    """The text around a response to `prompt`. Raises `InputError` for a template that refuses or drops the reply."""
    if isinstance(prompt, str):
        return Frame(prompt, "", True)
    if not tokenizer.chat_template:
        return Frame(prompt_text(prompt), "", True)
    parts = templated(tokenizer, (*prompt, Message("assistant", SENTINEL))).split(SENTINEL)
    if len(parts) != 2:
        advice = "wanted once; take another template"
        raise InputError(f"the chat template does not keep the response: it writes it {len(parts) - 1} times, {advice}")
    return Frame(*parts, False)


def kept_of(
    response: str, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[Message], around: Frame
) -> tuple[str, str]:
    """What the chat template writes before the part of a response that it keeps, and that part.

    Some templates drop white space, others rewrite what a model thought. Raises `InputError` where nothing is kept.
    """
    text = templated(tokenizer, (*prompt, Message("assistant", response))) if response else around.before + around.after
    body = text.removesuffix(around.after)
    if body.startswith(around.before) and (kept := body.removeprefix(around.before)) in response:
        return around.before, kept
    kept = commonprefix([body[::-1], response.rstrip()[::-1]])[::-1]
    if not kept or body + around.after != text:
        advice = "wanted at least its end; take another template"
        raise InputError(f"the chat template writes something else than the response {response[:80]!r}, {advice}")
    return body.removesuffix(kept), kept


@dataclass(frozen=True)
class Reader:
    """How a reward model reads a prompt and a response as text.

    A dialogue goes through the chat template where there is one, any other text gets the tokenizer's own special
    tokens, once. With `pair` the two are segments, as `tokenizer(prompt, response)` makes them. With `ends`, EOS
    follows where nothing else does: so decoders are trained.
    """

    tokenizer: PreTrainedTokenizerBase
    pair: bool = False
    ends: bool = True

    def read(self, prompt: Prompt, response: str) -> tuple[Reading, Spans]:
        """The tokens, and the characters of the response that the tokenizer says each of its tokens covers.

        Raises `InputError` for text that is not valid Unicode, and for a tokenizer without offsets.
        """
        prompt = messages_of(prompt)
        before, after, special = around = self._frame(prompt)
        kept = response
        if not special:
            before, kept = kept_of(response, self.tokenizer, prompt, around)
        if not isinstance(prompt, str) and special and not self.pair and kept[:1].strip():
            before += " "  # a reply that is written out after "Assistant:"
        try:
            sides = tokenise(self.tokenizer, before, kept, after, special, self.pair)
        except (TypeError, UnicodeError) as error:
            raise InputError("prompt or response is not valid Unicode (a lone surrogate?); decode it anew") from error
        eos = self.tokenizer.eos_token_id
        suffix = sides.after or [eos] * (self.ends and eos is not None)
        segments = sides.segments and (*sides.segments, *sides.segments[-1:] * (len(suffix) - len(sides.after)))
        at = response.rfind(kept)
        spans = [(a + at, b + at) for a, b in sides.spans]
        return Reading(tuple(sides.before), tuple(sides.middle), None, tuple(suffix), segments), spans

    def _frame(self, prompt: Prompt) -> Frame:
        if not self.pair or isinstance(prompt, str):
            return frame(self.tokenizer, prompt)
        if len(prompt) != 1:
            raise InputError(f"a dialogue of {len(prompt)} turns is no pair of texts; wanted text, or one user's turn")
        return Frame(prompt[0].content, "", True)

    def translate(
        self, policy: PreTrainedTokenizerBase, query: Sequence[int], response: Sequence[int], prompt: Prompt | None
    ) -> Reading:
        """A policy's tokens as this model's, aligned by characters.

        The prompt is `prompt`, or the text of `query` without the policy's special tokens; in the response they are
        read as text. A response of which nothing is read has no token to earn credit.
        """
        special = set(policy.all_special_ids)
        query = [token for token in query if token not in special]
        both = [*query, *response]  # together: some tokenizers drop the space before a text's first token
        text, spans = policy.decode(both), token_spans(policy, both)[len(query) :]
        start = spans[0][0] if spans else len(text)
        reading, covered = self.read(text[:start] if prompt is None else prompt, text[start:])
        onto = [(a - start, b - start) for a, b in spans]
        spread = overlap(solid(covered, len(text) - start), onto)
        return replace(reading, spread=None if torch.equal(spread, torch.eye(len(onto)).double()) else spread)
