"""Texts in which people marked words, from local files: tokens that a source of credit should find.

Nothing here is downloaded or shipped. A file is read whole or not at all.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dense_rlhf.models.dialogue import head_ids
from dense_rlhf.models.reward_model import RewardModel, padded
from dense_rlhf.models.text_spans import Spans, overlap, token_spans
from dense_rlhf.types import InputError, Rollout

LEAF = re.compile(r"\(([0-4]) ([^() ]+)\)")
ESCAPED = {"-LRB-": "(", "-RRB-": ")", "``": '"', "''": '"', "\\/": "/", "\\*": "*"}
ESCAPE = re.compile("|".join(map(re.escape, ESCAPED)))


@dataclass(frozen=True)
class MarkedText:
    """A text in which people gave values to spans of characters, and none to the rest."""

    text: str
    spans: Spans  # (start, end) in characters
    values: tuple[float, ...]  # one for each span
    label: float = float("nan")  # of the whole text, in the unit of the values

    @property
    def marked(self) -> set[int]:
        """The characters within spans whose value is not zero."""
        return {i for (start, end), value in zip(self.spans, self.values) if value for i in range(start, end)}


def read_text(path: str | Path) -> str:
    """A whole file as UTF-8 text. Raises `InputError` where it is missing or not readable."""
    try:
        return Path(path).read_bytes().decode("utf-8-sig")
    except FileNotFoundError as error:
        raise InputError(f"no file at {path}; give the path of a file that exists") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not readable as UTF-8 text: {error}") from error


def parse_tree(tree: str) -> MarkedText:
    """One tree of the Stanford Sentiment Treebank (Socher et al., 2013): words with valence -2 to 2, the root's label.

    Words are separated by one space, as the treebank splits them (`It 's a film .`), and its escapes are undone. Labels
    of phrases between word and root are dropped. Raises `InputError` where brackets and labels do not form a tree.
    """
    rest, shrunk = tree.strip(), LEAF.sub("@", tree.strip())
    while shrunk != rest:
        rest, shrunk = shrunk, re.sub(r"\([0-4](?: @)+\)", "@", shrunk)
    if rest != "@":
        raise InputError(f"{tree.strip()[:60]!r} is not one tree of (label word) and (label tree ...), labels 0 to 4")
    leaves = [(int(label) - 2.0, ESCAPE.sub(lambda m: ESCAPED[m.group()], word)) for label, word in LEAF.findall(tree)]
    ends = np.cumsum([len(word) + 1 for _, word in leaves]) - 1
    spans = [(int(end) - len(word), int(end)) for end, (_, word) in zip(ends, leaves)]
    values, words = zip(*leaves)
    return MarkedText(" ".join(words), spans, values, int(tree.strip()[1]) - 2.0)


def load_sst_trees(path: str | Path) -> list[MarkedText]:
    """`parse_tree` of every line. Raises `InputError` that names file and line."""
    trees = []
    for number, line in enumerate(read_text(path).rstrip("\n").split("\n"), 1):
        try:
            trees.append(parse_tree(line))
        except InputError as error:
            raise InputError(f"{path}, line {number}: {error}") from error
    return trees


def _runs(characters: Sequence[int]) -> Spans:
    """Numbers as spans (start, end) of consecutive ones."""
    numbers = np.unique(np.array(characters, dtype=int))
    runs = np.split(numbers, np.flatnonzero(np.diff(numbers) > 1) + 1)
    return [(int(run[0]), int(run[-1]) + 1) for run in runs if len(run)]


def load_toxic_spans(path: str | Path) -> list[MarkedText]:
    """A CSV of `text` and `spans`, the list of its toxic characters (SemEval-2021 task 5), each marked 1.

    Posts without a toxic character stay, without a span. Raises `InputError` that names file and line (the row's last).
    """
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""))
    if not {"spans", "text"} <= set(reader.fieldnames or ()):
        raise InputError(f"{path}, line 1: columns {reader.fieldnames}, wanted spans and text")
    posts = []
    for row in reader:
        try:
            characters = json.loads(row["spans"])
            valid = all(type(i) is int and 0 <= i < len(row["text"]) for i in characters)
        except (TypeError, ValueError):
            valid = False
        if not valid:
            given = f"line {reader.line_num}: spans {str(row['spans'])[:60]!r}"
            wanted = f"a list of places within its text of {len(row['text'] or '')} characters"
            raise InputError(f"{path}, {given}, wanted {wanted}")
        spans = _runs(characters)
        posts.append(MarkedText(row["text"], spans, (1.0,) * len(spans)))
    return posts


def readable(
    texts: Sequence[MarkedText], tokenizer: PreTrainedTokenizerBase, longest: int
) -> tuple[list[MarkedText], dict[str, int]]:
    """The texts of 1 to `longest` tokens that the tokenizer reproduces exactly, and counts of those left out.

    No text is cut, as its human label describes the whole.
    """
    counts, kept = Counter(read=len(texts), kept=0), []
    for marked in texts:
        ids = tokenizer(marked.text, add_special_tokens=False)["input_ids"]
        if not ids:
            counts["empty"] += 1
        elif len(ids) > longest:
            counts["too long"] += 1
        elif tokenizer.decode(ids) != marked.text:
            counts["changed by the tokenizer"] += 1
        else:
            kept.append(marked)
    counts["kept"] = len(kept)
    return kept, dict(counts)


def text_rollout(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, reward_model: RewardModel) -> Rollout:
    """Texts as responses to an empty prompt, for `attribute` to explain: no EOS, every token a player.

    `tokenizer` is the policy's, or the reward model's own where it has no `policy_tokenizer`. Log-probabilities and
    values are zero, so sources that use them mean nothing. Raises `InputError` for no text or an empty one.
    """
    ids = tokenizer(list(texts), add_special_tokens=False)["input_ids"] if len(texts) else []
    if not ids or not all(ids):
        empty = sum(not row for row in ids)
        raise InputError(f"{len(ids)} texts, {empty} of them without a token; wanted some texts, none empty")
    responses, mask = padded(ids, tokenizer.pad_token_id or 0, reward_model.model.device)
    queries, shown = padded([head_ids(tokenizer)] * len(ids), 0, mask.device)
    none, prompts = torch.zeros(mask.shape, device=mask.device), ("",) * len(ids)
    fields = queries, shown, responses, mask, none[:, 0], mask.new_zeros(len(mask)), none, none, none
    made = Rollout(*fields, prompts=prompts)
    return replace(made, scores=reward_model.score(reward_model.readings(made)))


def token_marks(texts: Sequence[MarkedText], rollout: Rollout, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """People's values on the tokens (B, T) of `text_rollout`: each span's is spread by characters, zero elsewhere.

    Raises `InputError` where the tokens do not give the text back.
    """
    marks = torch.zeros(rollout.mask.shape)
    for row, (marked, ids, keep) in enumerate(zip(texts, rollout.responses.cpu(), rollout.players.cpu(), strict=True)):
        kept = ids[keep].tolist()
        if tokenizer.decode(kept) != marked.text:
            raise InputError(f"the tokens of text {row}, {marked.text[:60]!r}, do not give it back; see `readable`")
        if marked.spans:
            share = overlap(marked.spans, token_spans(tokenizer, kept))
            marks[row, : len(kept)] = (torch.tensor(marked.values, dtype=share.dtype) @ share).to(marks)
    return marks
