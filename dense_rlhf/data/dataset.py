"""What a study learns from: its texts, split by their own hash, so that no text serves two purposes."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field

from dense_rlhf.types import InputError, LabelledText, PreferencePair, Prompt


@dataclass(frozen=True)
class Dataset:
    """The texts of one study. `reward` teaches the proxy, `gold` the held-out judge, `second` another judge where there
    are labels left for one; none sees the others' rows.

    Searches choose weights on `validation_prompts`; `test_prompts`, from the rows in `test`, choose nothing.
    """

    name: str
    revision: str  # the sha256 of the file that was read, or the hub's commit
    reward: list[LabelledText] | list[PreferencePair]
    gold: list[LabelledText] | list[PreferencePair]
    train_prompts: list[Prompt]
    validation_prompts: list[Prompt]
    test: list[LabelledText] | list[PreferencePair]
    language_model: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)  # rows read, kept in each split, left out by reason
    test_prompts: list[Prompt] = field(default_factory=list)
    second: list[LabelledText] = field(default_factory=list)  # no second judge where it lacks one of the labels

    @property
    def is_pairwise(self) -> bool:
        return isinstance(self.reward[0], PreferencePair)

    def check(self, where: str) -> None:
        """Raise `InputError`, which names `where` they come from, for texts that nothing could be learned from."""
        kind = PreferencePair if self.reward and self.is_pairwise else LabelledText
        if not all(isinstance(row, LabelledText) for row in self.second):
            raise InputError(f"{where}: split 'second' wants only LabelledText; leave it empty where there is none")
        for name in ("reward", "gold", "test"):
            rows = getattr(self, name)
            if not rows or not all(isinstance(row, kind) for row in rows):
                wanted = f"at least one {kind.__name__}, and nothing else"
                raise InputError(f"{where}: split {name!r} has {len(rows)} rows, wanted {wanted}")
            labels = {row.label for row in rows} if kind is LabelledText else {0, 1}
            if len(labels) < 2 and name != "test":
                all_alike = f"all {len(rows)} texts of split {name!r} are labelled {labels.pop()}"
                raise InputError(
                    f"{where}: {all_alike}, wanted some of 0 and some of 1; give more rows, or data.labels"
                )
        if kind is PreferencePair and len(self.gold) < 2:
            raise InputError(f"{where}: split 'gold' has one pair, wanted at least two; give more rows")
        for name in ("train_prompts", "validation_prompts"):
            if not getattr(self, name):
                raise InputError(f"{where}: {name} is empty, wanted at least one prompt; {self.counts}")


def bucket(text: str) -> float:
    """A fixed pseudo-random number in [0, 1) from the text alone, so that a text's split never depends on order."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def split_of(text: str, shares: dict[str, float]) -> str:
    """The split that a text falls into, by its bucket."""
    position, edge = bucket(text), 0.0
    for name, share in shares.items():
        edge += share
        if position < edge:
            return name
    return name


def count_kept(name: str, splits: dict[str, list], counts: Counter, hint: str = "") -> None:
    """Count the rows kept; raise `InputError` where a split has none."""
    counts.update({f"kept: {split}": len(rows) for split, rows in splits.items()})
    empty = [split for split, rows in splits.items() if not rows]
    if empty:
        raise InputError(f"{name}: {counts['read']} rows leave nothing for {', '.join(empty)}: {dict(counts)}{hint}")


def check_unicode(*texts: str) -> None:
    """Raise `InputError` for text that no file can hold."""
    try:
        "".join(texts).encode()
    except UnicodeEncodeError as error:
        raise InputError("half a surrogate pair, which is no character") from error
