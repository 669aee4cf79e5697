"""Explain any reward model: which parts of one response to one prompt earned its score.

    explanation = explain(model, tokenizer, "prompt", "response")

The model is any Hugging Face sequence classifier, a decoder or an encoder, with adapters or without.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dense_rlhf.attribution.coalitions import Estimate
from dense_rlhf.attribution.engine import coalition_scores, is_packed
from dense_rlhf.attribution.kinds import Designed
from dense_rlhf.attribution.reading import players_of, read, text_of, where_read, wrap
from dense_rlhf.attribution.sources import SOURCES
from dense_rlhf.config.params import AttributionParams
from dense_rlhf.models.dialogue import Reader
from dense_rlhf.models.reward_model import RewardModel
from dense_rlhf.models.text_spans import Spans
from dense_rlhf.types import InputError, Message, Reading
from dense_rlhf.view.display import heat, heat_table, table
from dense_rlhf.view.escape import esc
from dense_rlhf.view.html import part

if TYPE_CHECKING:
    import pandas as pd
    import shap


@dataclass(frozen=True, repr=False)
class Explanation:
    """What each token of one response adds to its score: `score = baseline + sum(credit) + gap`.

    A notebook shows it as a token heat-map and a table, a terminal as text.
    """

    response: str
    spans: tuple[tuple[int, int], ...]  # characters of the response that each token covers, without gaps
    credit: tuple[float, ...]  # of each token, in the unit of the model's output
    player: tuple[int, ...]  # the player that each token belongs to, numbered from 0 in order
    baseline: float  # the score without the response
    score: float  # the score of the whole
    source: str
    complete: bool  # the source claims that gap is zero
    evaluations: int  # texts that the model scored
    seconds: float
    engine: str  # packed: coalitions share common prefixes; plain: each is a text of its own
    model: str  # where its weights came from, or its class
    text: str = ""  # all that the model read, with its special tokens
    read_at: str = ""  # the token at which the score is read, or that the model pools
    half_width: tuple[float, ...] | None = None  # of the 95 % interval of each token's credit; None: not known
    settled: int | None = None  # so many of the largest credits have their rank settled at that level

    @property
    def gap(self) -> float:
        """What the credit leaves unexplained of score - baseline."""
        return self.score - self.baseline - sum(self.credit)

    @property
    def tokens(self) -> list[str]:
        """The text of each token; a character of several tokens is the first one's, and the others are empty."""
        return [self.response[start:end] for start, end in self.spans]

    @property
    def players(self) -> Spans:
        """The characters of each player."""
        own = [np.flatnonzero(np.array(self.player) == number) for number in range(max(self.player) + 1)]
        return [(self.spans[tokens[0]][0], self.spans[tokens[-1]][1]) for tokens in own]

    @property
    def player_credit(self) -> list[float]:
        """The credit of each player, the sum of its tokens'."""
        return np.bincount(self.player, self.credit).tolist()

    @property
    def player_half_width(self) -> list[float]:
        """Half the width of the 95 % interval of each player's credit; nan where it is not known."""
        return np.bincount(self.player, self.half_width or [np.nan] * len(self.player)).tolist()

    @property
    def _equation(self) -> str:
        parts = f"baseline {self.baseline:.4f} + credit {sum(self.credit):.4f} + gap {self.gap:.1e}"
        return f"score {self.score:.4f} = {parts}"

    @property
    def _how(self) -> str:
        work = f"{self.evaluations} evaluations, {self.seconds:.2f} s, {self.engine} engine"
        sure = "" if self.settled is None else f"; the order of the first {self.settled} is settled"
        return f"{self.source} on {self.model}, read at {self.read_at}: {work}{sure}"

    def to_frame(self) -> pd.DataFrame:
        """A row for each token: its text, the characters [start, end) that it covers, its player, its credit, and half
        the width of the credit's 95 % interval, nan where it is not known."""
        import pandas as pd

        start, end = zip(*self.spans)
        columns = {"token": self.tokens, "start": start, "end": end, "player": self.player, "credit": self.credit}
        return pd.DataFrame(columns | {"half_width": self.half_width or np.nan})

    def ranked(self, most: int = 12) -> pd.DataFrame:
        """The `most` players with the largest credit either way, half the width of its 95 % interval (nan where that is
        not known), and its share of the sum of all |credit|."""
        import pandas as pd

        each = zip(self.players, self.player_credit, self.player_half_width)
        rows = [(self.response[a:b], f"{a}-{b}", *sure) for (a, b), *sure in each]
        frame = pd.DataFrame(rows, columns=["part", "characters", "credit", "half_width"])
        total = frame["credit"].abs().sum()
        frame["share"] = frame["credit"].abs() / total if total else 0.0
        return frame.sort_values("credit", key=abs, ascending=False, kind="stable").head(most)

    def to_shap(self) -> shap.Explanation:
        """A value for each player, for shap's own plots (`text`, `bar`, `waterfall`).

        `data` is escaped for HTML, which `shap.plots.text` does not do itself, and `feature_names` for matplotlib.
        """
        import shap

        texts = [esc(self.response[a:b]) for a, b in self.players]
        return shap.Explanation(
            values=np.array(self.player_credit),
            base_values=self.baseline,
            data=np.array(texts, dtype=object),
            feature_names=[text.replace("$", r"\$") for text in texts],
            display_data=np.array([f"{a}-{b}" for a, b in self.players], dtype=object),
        )

    def __repr__(self) -> str:
        rows = self.ranked().itertuples(index=False)
        sure = "" if self.half_width is None else " ± {:.4f}"
        lines = [f"  {row.credit:+9.4f}{sure.format(row.half_width)}  {row.part!r}" for row in rows]
        return "\n".join([self._equation, f"({self._how})", *lines])

    def _repr_html_(self) -> str:
        line, frame = heat(self.tokens, self.credit, half_widths=self.half_width), self.ranked()
        more = len(self.players) - len(frame)
        caption = "What moves the score most" + (f"; {more} more parts move it less" if more else "")
        parts = self._equation, self._how, heat_table({"credit": line}, ""), table(frame, caption, 4).data
        return str(part("explanation", *parts))


def explain(
    reward_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | Sequence[Message | Mapping[str, str]],
    response: str,
    source: str = "gaussian",
    players: str | Sequence[tuple[int, int]] = "tokens",
    **options,
) -> Explanation:
    """Which parts of `response` earned the score that `reward_model` gives it after `prompt`.

    `prompt` is text, or the dialogue so far, which goes through the tokenizer's chat template where it has one.
    `players` are tokens, words, sentences, or spans: rising (start, end) in characters of the response, the text
    between them being players too. A player's credit is spread evenly over its tokens. `options` are fields of
    `AttributionParams` (budgets, removal, seed); `output`, the score among several outputs; `pair`, whether the model
    reads `tokenizer(prompt, response)` as two segments; `end`, which is "eos" where EOS shall follow a decoder's text
    to which tokenizer and template add no end; `progress`, which wraps the batches and may raise to cancel.

    The score is that of `model(**tokenizer(prompt + response))`, or of the templated dialogue. Everything around the
    response always stays: prompt, special tokens, EOS where `end` adds it. Each text is read where the model's own
    forward reads it. Tokens are those of the whole text; where one would lie in prompt and response, a warning says
    that the two are read apart. Raises `InputError` for a source that removes no tokens, a model that is not a sequence
    classifier, a tokenizer without offsets, a response that is empty, too long or altered by the chat template, a
    decoder's text of which nothing would be left, and spans that do not fit.
    """
    one = [(prompt, response, players)]
    return _explain(reward_model, tokenizer, one, source, options)[0]


def explain_many(
    reward_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | Sequence[Message | Mapping[str, str]]],
    responses: Sequence[str],
    source: str = "gaussian",
    players: str = "tokens",
    **options,
) -> list[Explanation]:
    """`explain` for N responses to N prompts, in common batches; `seconds` is shared as the evaluations are.

    Raises `InputError` as `explain` does, with the number of the row, before anything is scored.
    """
    if any(isinstance(each, str | Mapping) or not hasattr(each, "__len__") for each in (prompts, responses)):
        given = " and ".join(type(each).__name__ for each in (prompts, responses))
        raise InputError(f"prompts and responses are {given}, wanted two lists of the same length")
    if len(prompts) != len(responses):
        raise InputError(f"{len(prompts)} prompts and {len(responses)} responses, wanted as many")
    if not isinstance(players, str):
        raise InputError("players are spans, which fit one response; wanted tokens, words or sentences")
    rows = [(prompt, response, players) for prompt, response in zip(prompts, responses)]
    return _explain(reward_model, tokenizer, rows, source, options) if rows else []


def _explain(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[tuple], source: str, options: dict
) -> list[Explanation]:
    """An explanation of each row: a prompt, a response and its players."""
    started, progress = time.perf_counter(), options.pop("progress", iter)
    how = {name: options.pop(name) for name in ("output", "pair", "end") if name in options}
    params, kind = removal_params(source, options), designed(source)
    wrapped, reader = wrap(model, tokenizer, **how)
    readings, spans, groups = zip(*(_row(wrapped, reader, i if rows[1:] else None, *row) for i, row in enumerate(rows)))
    sizes = [int(group.max()) + 1 for group in groups]
    masks = [kind.design(k, params).masks.numpy()[:, group] for k, group in zip(sizes, groups)]
    values = coalition_scores(wrapped, readings, masks, params.removal, progress)
    scores = [each.double().cpu().numpy() for each in values]
    estimates = [kind.estimate(k, params, each) for k, each in zip(sizes, scores)]
    seconds = (time.perf_counter() - started) / sum(map(len, masks))
    return [
        Explanation(
            response=response,
            spans=tuple(spans[i]),
            baseline=scores[i][0],
            score=scores[i][1],
            source=source,
            complete=kind.complete,
            evaluations=len(masks[i]),
            seconds=seconds * len(masks[i]),
            engine="packed" if is_packed(wrapped, readings, params.removal) else "plain",
            model=wrapped.model.name_or_path or type(wrapped.model).__name__,
            text=text_of(wrapped, readings[i]),
            read_at=where_read(wrapped, readings[i]),
            **of_tokens(estimates[i], groups[i]),
        )
        for i, (_, response, _) in enumerate(rows)
    ]


def of_tokens(estimate: Estimate, player: np.ndarray) -> dict[str, object]:
    """The fields of an `Explanation` that an estimate gives; a player's credit and interval are shared evenly."""
    share = 1 / np.bincount(player)[player]
    known = estimate.half_width is not None
    return {
        "player": tuple(player.tolist()),
        "credit": tuple((estimate.credit[player] * share).tolist()),
        "half_width": tuple((estimate.half_width[player] * share).tolist()) if known else None,
        "settled": estimate.settled,
    }


def _row(
    wrapped: RewardModel,
    reader: Reader,
    number: int | None,
    prompt: object,
    response: str,
    players: str | Sequence[tuple[int, int]],
) -> tuple[Reading, Spans, np.ndarray]:
    """What the model reads, the characters of each response token and its player; errors name the row, if numbered."""
    try:
        reading, tokens = read(wrapped, reader, prompt, response)
        return reading, tokens, np.array(players_of(response, tokens, players))
    except InputError as error:
        raise InputError(f"{'' if number is None else f'row {number}: '}{error}") from None


def designed(source: str) -> Designed:
    """The source of a name; `InputError` for one that does not remove tokens."""
    able = {name: kind for name, kind in SOURCES.items() if isinstance(kind, Designed)}
    if source not in able:
        raise InputError(f"source is {source!r}, wanted one that removes tokens: {', '.join(able)}")
    return able[source]


def removal_params(source: str, options: dict) -> AttributionParams:
    """The budgets of a source; `InputError` for the budget of another."""
    if source == "gaussian" and "permutations" in options:
        raise InputError("permutations are the budget of source 'shap'; gaussian's is samples_per_token")
    return AttributionParams(**options)
