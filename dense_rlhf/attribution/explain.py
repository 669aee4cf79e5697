"""Explain any reward model: which parts of a response earned its score, for one prompt and one response.

    found = explain(model, tokenizer, "prompt", "response")

The model is any Hugging Face sequence classifier with one output, a decoder or an encoder.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dense_rlhf.attribution.engine import is_packed
from dense_rlhf.attribution.kinds import Designed
from dense_rlhf.attribution.removal import explain_readings
from dense_rlhf.attribution.sources import SOURCES
from dense_rlhf.config.params import AttributionParams
from dense_rlhf.data import prompt_text
from dense_rlhf.models.reward_model import RewardModel
from dense_rlhf.models.text_spans import Spans, cut, groups, homes, partition, tile, tokenise
from dense_rlhf.types import InputError, Message, Reading
from dense_rlhf.view.display import esc, heatmap, table

if TYPE_CHECKING:
    import pandas as pd
    import shap

ROLES = ("user", "assistant", "system")
SENTINEL = "\ue000reply\ue001"  # stands for the response where a chat template's text around it is wanted


@dataclass(frozen=True, repr=False)
class Explanation:
    """What each token of one response adds to its score: `score = baseline + sum(credit) + gap`.

    Shows itself in a notebook as a token heat-map and a table, elsewhere as text.
    """

    response: str
    spans: tuple[tuple[int, int], ...]  # characters of the response that each token covers, without gaps
    credit: tuple[float, ...]  # of each token, in the model's own output
    player: tuple[int, ...]  # the player that each token belongs to, numbered from 0 in order
    baseline: float  # the score without the response
    score: float  # the score of the whole
    source: str
    complete: bool  # the source claims that gap is zero
    evaluations: int  # texts that the model scored
    seconds: float
    engine: str  # packed: coalitions share what they have in common; plain: each is a text of its own
    model: str  # where its weights came from, or its class

    @property
    def gap(self) -> float:
        """What the credit leaves unexplained of score - baseline."""
        return self.score - self.baseline - sum(self.credit)

    @property
    def tokens(self) -> list[str]:
        """The text of each token; of the bytes of one character the first has it, the others have none."""
        return [self.response[start:end] for start, end in self.spans]

    @property
    def players(self) -> Spans:
        """The characters of each player."""
        number = np.array(self.player)
        return [
            (self.spans[t[0]][0], self.spans[t[-1]][1])
            for t in (np.flatnonzero(number == p) for p in range(number.max() + 1))
        ]

    @property
    def player_credit(self) -> list[float]:
        """The credit of each player, the sum of its tokens'."""
        return np.bincount(self.player, self.credit).tolist()

    @property
    def _equation(self) -> str:
        return (
            f"score {self.score:.4f} = baseline {self.baseline:.4f} + credit {sum(self.credit):.4f} "
            f"+ gap {self.gap:.1e}"
        )

    @property
    def _how(self) -> str:
        return (
            f"{self.source} on {self.model}: {self.evaluations} evaluations, {self.seconds:.2f} s, {self.engine} engine"
        )

    def to_frame(self) -> pd.DataFrame:
        """One row a token: its text, its first character and the one behind its last, its player, its credit."""
        import pandas as pd

        start, end = zip(*self.spans)
        columns = {"token": self.tokens, "start": start, "end": end, "player": self.player, "credit": self.credit}
        return pd.DataFrame(columns)

    def ranked(self, most: int = 12) -> pd.DataFrame:
        """The players that move the score most, furthest first; share is of the sum of all movements."""
        import pandas as pd

        rows = zip((self.response[a:b] for a, b in self.players), self.players, self.player_credit)
        frame = pd.DataFrame(
            [(text, f"{a}-{b}", credit) for text, (a, b), credit in rows], columns=["part", "characters", "credit"]
        )
        total = frame["credit"].abs().sum()
        frame["share"] = frame["credit"].abs() / total if total else 0.0
        return frame.sort_values("credit", key=abs, ascending=False, kind="stable").head(most)

    def to_shap(self) -> shap.Explanation:
        """One value a player, for shap's own plots (`text`, `bar`, `waterfall`).

        `data` is escaped for HTML as far as `shap.plots.text` does not do so itself, `feature_names` for matplotlib.
        """
        import shap

        texts = [self.response[a:b] for a, b in self.players]
        names = [esc(text).replace("$", r"\$") for text in texts]
        return shap.Explanation(
            values=np.array(self.player_credit),
            base_values=self.baseline,
            data=np.array([esc(text) for text in texts], dtype=object),
            feature_names=names,
            display_data=np.array([f"{a}-{b}" for a, b in self.players], dtype=object),
        )

    def __repr__(self) -> str:
        rows = self.ranked().itertuples(index=False)
        lines = [f"  {row.credit:+9.4f}  {row.part!r}" for row in rows]
        return "\n".join([self._equation, f"({self._how})", *lines])

    def _repr_html_(self) -> str:
        heat = heatmap(self.tokens, list(self.credit), "credit")
        frame = self.ranked()
        left = len(self.players) - len(frame)
        caption = "What moves the score most" + (f"; {left} more parts move it less" if left else "")
        return (
            f"<p>{esc(self._equation)}<br><small>{esc(self._how)}. Orange adds to the score, blue takes from it; "
            f"hover for the number.</small></p><table>{heat}</table>{table(frame, caption, 4).data}"
        )


def explain(
    reward_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | Sequence[Message | Mapping[str, str]],
    response: str,
    source: str = "shap",
    players: str | None = None,
    spans: Sequence[tuple[int, int]] | None = None,
    params: AttributionParams | None = None,
    progress: Callable[[Iterator], Iterator] = iter,
) -> Explanation:
    """Which parts of `response` earned the score that `reward_model` gives it behind `prompt`.

    `prompt` is text, or the dialogue so far, which goes through the tokenizer's chat template where it has one.
    `players` are tokens, words or sentences (`params.players` where none is given), or what lies in and between the
    caller's `spans`, rising (start, end) in characters of the response. A player's credit is spread evenly over its
    tokens. Everything around the response always stays: prompt, special tokens, and the end that the model is read at
    (EOS for a decoder whose tokenizer adds no end; where padding is the same token, the model's own forward would read
    the token before it). One segment: pairs of texts are not supported. Tokens are those of the whole text, see
    `alignment.tokenise`. Raises `InputError` for a source that removes no tokens, another model than a sequence
    classifier with one output, a tokenizer without offsets, a response that is empty, too long or altered by the chat
    template, and spans that do not fit.
    """
    params, started = params or AttributionParams(), time.perf_counter()
    _check_model(reward_model)
    wrapped, reading, tokens = _read(reward_model, tokenizer, prompt, response)
    of = np.array(_players(response, tokens, players or params.players, spans))
    found = explain_readings(wrapped, [reading], [of], {source: _designed(source)}, params, progress)[source]
    if params.removal == "drop":  # else all texts are equally long
        _check_padding(wrapped, reading, found.baseline.item())
    return Explanation(
        response,
        tuple(tokens),
        tuple(found.credits[0].tolist()),
        tuple(of.tolist()),
        found.baseline.item(),
        found.scores.item(),
        source,
        _designed(source).complete,
        found.evaluations,
        time.perf_counter() - started,
        "packed" if is_packed(reward_model, _length(wrapped, reading)) else "plain",
        reward_model.name_or_path or type(reward_model).__name__,
    )


def _designed(source: str) -> Designed:
    able = [name for name, one in SOURCES.items() if isinstance(one, Designed)]
    if source not in able:
        raise InputError(f"source is {source!r}, wanted one that removes tokens: {', '.join(able)}")
    return SOURCES[source]


def _check_model(model: PreTrainedModel) -> None:
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise InputError(f"reward_model is {name}, wanted a Hugging Face sequence classifier; merge adapters first")
    if model.config.num_labels != 1:
        raise InputError(
            f"{name} has {model.config.num_labels} outputs, wanted one: load it by "
            "AutoModelForSequenceClassification, with num_labels=1 where it is yours"
        )
    if model.training:
        raise InputError(f"{name} is in training mode, its dropout would be explained too; call eval()")


def _check_padding(wrapped: RewardModel, reading: Reading, baseline: float) -> None:
    """Raise where the prompt's score depends on the longer texts in its batch: the model pools at the padding."""
    alone = wrapped.score([Reading(reading.prompt, ())]).item()
    if abs(alone - baseline) > torch.finfo(wrapped.model.dtype).eps ** 0.5 * max(1.0, abs(alone)):
        raise InputError(
            f"{type(wrapped.model).__name__} scores the prompt {alone:.4f} alone, {baseline:.4f} beside "
            "longer texts: it reads the padding; wanted a model that does not"
        )


def _read(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: object, response: str
) -> tuple[RewardModel, Reading, Spans]:
    """The model behind its suffix, what it reads, and the characters of each response token."""
    if not isinstance(response, str) or not response:
        raise InputError(f"response is {response!r}, wanted text that is not empty")
    before, behind, special = _around(tokenizer, prompt, response)
    try:
        sides = tokenise(tokenizer, before, response, behind, special)
    except (TypeError, UnicodeError) as error:
        raise InputError("prompt or response is not valid Unicode (a lone surrogate?); decode it anew") from error
    if not sides.middle:
        raise InputError(f"the tokenizer reads nothing in the response {response[:80]!r}; wanted text that it knows")
    wrapped = RewardModel(model, tokenizer, suffix=tuple(sides.behind))
    reading = Reading(tuple(sides.before), tuple(sides.middle))
    length, most = _length(wrapped, reading), _most_tokens(model)
    if length > most:
        raise InputError(
            f"prompt, response and end are {length} tokens, {type(model).__name__} reads at most {most}; "
            "shorten the prompt or the response"
        )
    return wrapped, reading, tile(sides.spans, len(response))


def _length(wrapped: RewardModel, reading: Reading) -> int:
    return len(reading.prompt) + len(reading.response) + len(wrapped.suffix)


def _most_tokens(model: PreTrainedModel) -> float:
    """Tokens that fit the model's positions; RoBERTa's begin behind its padding id."""
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None) or float("inf")
    places = getattr(getattr(model.base_model, "embeddings", None), "position_embeddings", None)
    padding = getattr(places, "padding_idx", None)
    return most if padding is None else most - padding - 1


def _around(tokenizer: PreTrainedTokenizerBase, prompt: object, response: str) -> tuple[str, str, bool]:
    """The text before and behind the response, and whether the tokenizer adds its special tokens to it."""
    if isinstance(prompt, str):
        return prompt, "", True
    messages = [_message(one) for one in prompt] if isinstance(prompt, Sequence) else []
    if not messages:
        raise InputError(f"prompt is {prompt!r}, wanted text or messages with role and content")
    if not tokenizer.chat_template:
        return prompt_text(tuple(messages)) + " ", "", True

    def render(text: str) -> str:
        turns = [vars(one) for one in (*messages, Message("assistant", text))]
        return tokenizer.apply_chat_template(turns, tokenize=False)

    parts, whole = render(SENTINEL).split(SENTINEL), render(response)
    if len(parts) != 2 or whole != response.join(parts):
        raise InputError(
            f"the chat template does not keep the response {response[:80]!r} as it is, exactly once; "
            "strip white space around it and markers that the template reads"
        )
    return *parts, False


def _message(given: object) -> Message:
    role, content = (
        (given.get("role"), given.get("content"))
        if isinstance(given, Mapping)
        else (getattr(given, "role", None), getattr(given, "content", None))
    )
    if role not in ROLES or not isinstance(content, str):
        raise InputError(f"prompt holds {str(given)[:80]!r}, wanted a role of {', '.join(ROLES)} and content as text")
    return Message(role, content)


def _players(response: str, tokens: Spans, kind: str, spans: Sequence[tuple[int, int]] | None) -> list[int]:
    """The player of each token, numbered from 0."""
    if spans is None:
        return list(range(len(tokens))) if kind == "tokens" else groups(tokens, cut(response, kind))
    parts = partition(spans, len(response))
    owned = {parts[home] for home in homes(tokens, parts)}
    lost = [span for span in map(tuple, spans) if span not in owned]
    if lost:
        raise InputError(f"spans: {lost[0]} ({response[slice(*lost[0])]!r}) is the smaller part of a token; widen it")
    return groups(tokens, parts)
