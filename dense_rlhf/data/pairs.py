"""Preference pairs: two replies to one prompt, in the layouts of HH-RLHF, UltraFeedback and trl."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from dense_rlhf.config.params import DataParams
from dense_rlhf.data.dataset import Dataset, check_unicode, count_kept, split_of
from dense_rlhf.data.rows import OTHER, file_rows, hub_rows, read_bytes
from dense_rlhf.types import InputError, Message, PreferencePair, Prompt

PAIR_SHARES = {"reward": 0.35, "gold": 0.35, "train": 0.16, "validation": 0.04, "test": 0.10}
NAMES = {"user": "Human", "assistant": "Assistant", "system": "System"}  # of roles, in text
FIELDS = ("prompt", "chosen", "rejected")
TURN = re.compile(r"(?:\r?\n){2}(Human|Assistant): ?")


def prompt_text(prompt: Prompt) -> str:
    """A prompt as plain text, dialogues in the HH-RLHF form, ready for the assistant to go on."""
    if isinstance(prompt, str):
        return prompt
    return "".join(f"\n\n{NAMES[m.role]}: {m.content}" for m in prompt) + "\n\nAssistant:"


def as_dialogue(prompt: Prompt) -> tuple[Message, ...]:
    """A prompt as its turns: text is one of the user's."""
    return (Message("user", prompt),) if isinstance(prompt, str) else prompt


# ---------------------------------------------------------------------------------------------------- one row


def preference_pair(row: dict) -> PreferencePair:
    """One row: `chosen` and `rejected` are texts or lists of {role, content}, which `prompt` precedes, or they hold it.

    A text that begins with a turn, as in HH-RLHF, is a dialogue. Raises `InputError` for a row of another form.
    """
    if isinstance(row, InputError):
        raise row
    if not isinstance(row, dict):
        raise InputError(OTHER)
    prompt, chosen, rejected = (_text_or_messages(row.get(name)) for name in FIELDS)
    if isinstance(prompt, tuple) and prompt[-1:] == (Message("assistant", ""),):  # the turn that a reply fills
        prompt = prompt[:-1]
    if isinstance(chosen, str) and isinstance(rejected, str) and prompt is not None:
        return PreferencePair(prompt, chosen, rejected)
    (asked, answer), (other, worse) = (_last_reply(_whole(prompt, side)) for side in (chosen, rejected))
    if asked != other:
        raise InputError("the prompts of the two sides differ")
    return PreferencePair(asked, answer, worse)


def _text_or_messages(given: object) -> str | tuple[Message, ...] | None:
    if isinstance(given, str):
        return parse_turns(given) if TURN.match("\n\n" + given.lstrip()) else given.strip()
    return None if given is None else _messages(given)


def _whole(prompt: str | tuple[Message, ...] | None, side: str | tuple[Message, ...] | None) -> tuple[Message, ...]:
    """The dialogue of one side, which goes on from the prompt or has it within."""
    if side is None:
        raise InputError(OTHER)
    side = parse_turns(side) if isinstance(side, str) else side
    asked = Message("user", prompt) if isinstance(prompt, str) and prompt else None
    before = (asked,) if asked else prompt or ()
    return side if side[: len(before)] == before or asked in side else before + side


def _messages(given: object) -> tuple[Message, ...]:
    if not isinstance(given, (list, tuple)) or not all(isinstance(turn, dict) for turn in given):
        raise InputError(OTHER)
    for turn in given:
        if turn.get("tool_calls") or turn.get("function_call"):
            raise InputError("a turn that calls a tool")
        if turn.get("role") not in tuple(NAMES):
            raise InputError("a role that is not user, assistant or system")
        if not isinstance(turn.get("content"), str):
            raise InputError("a turn whose content is no text")
    return tuple(Message(turn["role"], turn["content"].strip()) for turn in given)


def parse_turns(text: str) -> tuple[Message, ...]:
    """The turns of an HH-RLHF dialogue, whose first blank lines may be missing; none of a text without any.

    Raises `InputError` for text before the first turn.
    """
    before, *parts = TURN.split("\n\n" + text.lstrip())
    if parts and before:
        raise InputError("text before the first turn")
    return tuple(Message("user" if r == "Human" else "assistant", c.strip()) for r, c in zip(parts[::2], parts[1::2]))


def _last_reply(messages: tuple[Message, ...]) -> tuple[Prompt, str]:
    if not messages or messages[-1].role != "assistant":
        raise InputError("a dialogue must have turns and end with the assistant's")
    return messages[:-1], messages[-1].content


def _check(pair: PreferencePair, max_chars: int) -> None:
    """Raise `InputError` for a pair that teaches nothing, is too long, or that no chat template takes."""
    prompt = pair.prompt
    asked = prompt if isinstance(prompt, str) else "".join(message.content for message in prompt)
    if not (asked and pair.chosen and pair.rejected):
        raise InputError("empty prompt or reply")
    if pair.chosen == pair.rejected:
        raise InputError("identical sides")
    if len(prompt_text(prompt)) > max_chars:
        raise InputError("prompt too long")
    roles = [] if isinstance(prompt, str) else [message.role for message in prompt]
    turns = roles[roles[:1] == ["system"] :]
    if turns != [("user", "assistant")[i % 2] for i in range(len(turns))] or roles and turns[-1:] != ["user"]:
        raise InputError("user and assistant do not take turns")
    check_unicode(prompt_text(prompt), pair.chosen, pair.rejected)


# ---------------------------------------------------------------------------------------------------- all rows


def collect_pairs(
    rows: Iterable[object], parse: Callable[[dict], PreferencePair], max_chars: int, name: str, revision: str
) -> Dataset:
    """Parse rows, count those left out, and split by the hash of the prompt as a dialogue, so that none, in whatever
    layout, is in two splits."""
    splits: dict[str, list[PreferencePair]] = {split: [] for split in PAIR_SHARES}
    counts, seen = Counter(), set()
    for row in rows:
        counts["read"] += 1
        try:
            pair = parse(row)
            _check(pair, max_chars)
            asked = as_dialogue(pair.prompt)
            if replace(pair, prompt=asked) in seen:
                raise InputError("duplicate")
        except InputError as fault:
            counts[f"left out: {fault}"] += 1
        except (LookupError, TypeError, AttributeError, ValueError):  # of a parser of the user's
            counts[f"left out: {OTHER}"] += 1
        else:
            seen.add(replace(pair, prompt=asked))
            splits[split_of(prompt_text(asked), PAIR_SHARES)].append(pair)
    hint = "; wanted chosen and rejected, texts or lists of {role, content}, and perhaps prompt"
    count_kept(name, splits, counts, hint)
    taught = {split: splits[split] for split in ("reward", "gold", "test")}
    prompts = {
        f"{split}_prompts": list(dict.fromkeys(pair.prompt for pair in splits[split]))
        for split in ("train", "validation", "test")
    }
    return Dataset(name, revision, **taught, **prompts, counts=dict(counts))


def preferences(name: str, repository: str, split: str) -> Callable[[DataParams, int | None], Dataset]:
    """The loader of a hub dataset of pairs, or of a local file of any layout of `preference_pair`."""

    def load(params: DataParams, rows: int | None = None) -> Dataset:
        if params.path:
            content = read_bytes(params.path)
            read = file_rows(content, Path(params.path), FIELDS, params.encoding)
            where, revision = params.path, hashlib.sha256(content).hexdigest()
        else:
            where = repository
            read, revision = hub_rows(repository, params.revision, params.split or split, rows)
        return replace(collect_pairs(read, preference_pair, params.max_prompt_chars, where, revision), name=name)

    load.__doc__ = f"`{repository}` on the hub, or a local file of preference pairs."
    return load
