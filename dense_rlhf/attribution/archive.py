"""Games on disk: what was read, and the score of every coalition asked, in one sealed JSON file.

    save(game, "review.json")
    load("review.json")        # answers from the file alone
    load("review.json", game)  # the same model and text, which is asked for what the file lacks

Nothing is unpickled.
"""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import replace
from operator import index
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from dense_rlhf.attribution.game import Game, Subject
from dense_rlhf.files import finite, read_json, write_json
from dense_rlhf.models.dialogue import messages_of
from dense_rlhf.types import InputError, Reading, check_removal

FORMAT = "coalition scores 1"
IDENTITY = ("prompt", "response", "reading", "removal", "output", "weights")  # what scores depend on
PLACES = ("_name_or_path", "transformers_version")  # of a config, which say where it came from


def save(game: Game, path: Path | str) -> None:
    """Write the game's scores to `path`: for each coalition a bit a token and 8 bytes, and what was read.

    Raises `InputError` where the file cannot be written.
    """
    packed = {"coalitions": b"".join(game.scores), "scores": np.array(list(game.scores.values()), "<f8").tobytes()}
    text = {name: base64.b64encode(data).decode() for name, data in packed.items()}
    write_json(Path(path), {"format": FORMAT, "subject": _identified(game), **text}, sealed=True)


def load(path: Path | str, game: Game | None = None) -> Game:
    """The game in a file, which has no model to ask; with `game`, that one with the file's scores too.

    Raises `InputError`, which names the file, where it cannot be read, is damaged or no archive, and where `game` is of
    other weights, another text, reading, output or removal.
    """
    body = read_json(Path(path))
    if not body:
        raise InputError(f"{path} is no file; wanted an archive of coalition scores")
    try:
        given = body["subject"]
        subject, scores = _subject(body["format"], given), _scores(body, len(given["spans"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"{type(error).__name__}: {str(error)[:80]}"
        raise InputError(f"{path} is no archive of coalition scores that this release reads ({reason})") from None
    if game is None:
        return Game(subject, scores=scores)
    own = _identified(game)
    for name in IDENTITY:
        if given[name] != own[name]:
            theirs = f"its {name} is {str(given[name])[:60]!r}, the game's {str(own[name])[:60]!r}"
            raise InputError(f"{path} has scores of another game: {theirs}")
    return replace(game, scores=scores | game.scores)


def weights_sha256(model: PreTrainedModel) -> str:
    """Hash of a model's weights and buffers as they are in memory, and of its config."""
    config = {name: value for name, value in model.config.to_dict().items() if name not in PLACES}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _identified(game: Game) -> dict:
    """What a game is of, in types of JSON, the model by its weights."""
    about = finite(game.subject)
    return about if game.reward_model is None else about | {"weights": weights_sha256(game.reward_model.model)}


def _ids(numbers: list[int] | None) -> tuple[int, ...] | None:
    return None if numbers is None else tuple(map(index, numbers))


def _subject(kind: str, given: dict) -> Subject:
    """A subject from JSON. Raises ValueError, TypeError or KeyError for what is none."""
    if kind != FORMAT:
        raise ValueError(f"format {kind!r}, wanted {FORMAT!r}")
    read, response = given["reading"], given["response"]
    texts = {name: given[name] for name in ("response", "removal", "weights", "model", "engine", "text", "read_at")}
    spans = tuple((index(start), index(end)) for start, end in given["spans"])
    edges = [0, *(end for _, end in spans)]
    tokens = {name: _ids(read[name]) for name in ("prompt", "response", "suffix", "segments")}
    reading = Reading(**tokens)
    tiles = [start for start, _ in spans] == edges[:-1] and edges == sorted(edges) and edges[-1] == len(response)
    if not (tiles and len(spans) == len(reading.response) and all(isinstance(text, str) for text in texts.values())):
        raise ValueError("tokens that are not those of the response")
    check_removal(given["removal"])
    return Subject(messages_of(given["prompt"]), spans=spans, reading=reading, output=index(given["output"]), **texts)


def _scores(body: dict, tokens: int) -> dict[bytes, float]:
    """Scores by packed coalition. Raises ValueError for what was not packed so."""
    bits, values = (base64.b64decode(body[name], validate=True) for name in ("coalitions", "scores"))
    scores, width = np.frombuffer(values, "<f8"), -(-tokens // 8)
    keys = [bits[start : start + width] for start in range(0, len(bits), width)]
    if len(bits) != len(scores) * width or len(set(keys)) != len(keys) or not np.isfinite(scores).all():
        raise ValueError("scores that are not one finite number for each coalition")
    return dict(zip(keys, scores.tolist()))
