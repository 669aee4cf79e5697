"""The values that flow through a study, frozen, their shapes checked on construction.

Letters: `B` batch, `P` prompt tokens, `T` response tokens, `K` sources.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from numbers import Real
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from torch import Tensor

NORMALISERS = ("softmax", "sum", "magnitude", "signed")
REMOVALS = ("drop", "attention_mask", "replace")
SIMPLEX = 1e-6  # how far weights may be from non-negative numbers that sum to one


class InputError(ValueError):
    """Bad input: the message says what arrived, what was wanted, and what to try."""

    def _render_traceback_(self) -> list[str]:
        """What a notebook shows in place of a traceback: one line."""
        return [f"{type(self).__name__}: {one_line(str(self))}"]


def one_line(text: str) -> str:
    """The text in one line, with escapes for what a terminal would obey and nobody would see."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in " ".join(text.split()))


def nearest(name: object, known: Iterable[str], likeness: float = 0.6) -> str:
    """The one of `known` that somebody who wrote `name` most likely meant; empty where none is near."""
    by_lower = {one.lower(): one for one in known}
    close = difflib.get_close_matches(str(name)[:100].lower(), by_lower, 1, likeness)
    return by_lower[close[0]] if close else ""


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """The end of a message about an unknown name."""
    near = nearest(name, known)
    return f"; did you mean {near}?" if near else ""


@dataclass(frozen=True)
class Message:
    """One turn of a dialogue; `role` is "user", "assistant" or "system"."""

    role: str
    content: str


Prompt = str | tuple[Message, ...]  # plain text to continue, or the dialogue so far


@dataclass(frozen=True)
class PreferencePair:
    """Two replies to one prompt, of which people preferred `chosen`."""

    prompt: Prompt
    chosen: str
    rejected: str


@dataclass(frozen=True)
class LabelledText:
    """A text with a human label, 1 good, 0 bad."""

    text: str
    label: int


def _check(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise InputError(f"{name} has shape {tuple(tensor.shape)}, wanted {shape}")


def check_right_padded(name: str, mask: Tensor) -> None:
    """Raise unless every row of the boolean `mask` (B, T) is true on a non-empty prefix and false after it."""
    import torch

    if mask.dtype != torch.bool or mask.dim() != 2:
        raise InputError(f"{name} is {mask.dtype} of {mask.dim()} dimensions, wanted a boolean (B, T)")
    if mask.shape[1] == 0 or not bool(mask[:, 0].all()) or bool((mask[:, 1:] & ~mask[:, :-1]).any()):
        raise InputError(f"{name} must be true through the last of at least one token and false after it, in every row")


@dataclass(frozen=True)
class Responses:
    """Scored responses, without any policy's log-probabilities."""

    queries: Tensor  # (B, P) token ids, left-padded
    query_mask: Tensor  # (B, P) bool
    responses: Tensor  # (B, T) token ids, right-padded
    mask: Tensor  # (B, T) bool, true through EOS
    scores: Tensor  # (B,) one per sequence
    ended: Tensor  # (B,) bool, the response ends with EOS
    trunk: Tensor | None = field(default=None, kw_only=True)  # (B, L, hidden) states of `rows` under what learns
    states: Tensor | None = field(default=None, kw_only=True)  # (B, T, hidden) before each token, of who sampled it
    prompts: tuple[Prompt, ...] | None = field(default=None, kw_only=True)  # (B,) of which `queries` are the tokens

    def __post_init__(self):
        if self.responses.dim() != 2 or self.queries.dim() != 2:
            raise InputError("queries and responses must be (B, P) and (B, T)")
        B, T = self.responses.shape
        _check("queries", self.queries, (B, self.queries.shape[1]))
        _check("query_mask", self.query_mask, tuple(self.queries.shape))
        for name in ("scores", "ended"):
            _check(name, getattr(self, name), (B,))
        _check("mask", self.mask, (B, T))
        check_right_padded("mask", self.mask)
        if bool((self.query_mask[:, :-1] & ~self.query_mask[:, 1:]).any()):
            raise InputError("query_mask is false after a token; wanted queries padded on the left only")
        if self.prompts is not None and len(self.prompts) != B:
            raise InputError(f"{len(self.prompts)} prompts for {B} responses, wanted one each; see `take`")
        if self.trunk is not None:
            _check("trunk", self.trunk, (B, int(self.lengths.max()) - 1, self.trunk.shape[-1]))
        if self.states is not None:
            _check("states", self.states, (B, T, self.states.shape[-1]))

    @property
    def lengths(self) -> Tensor:
        """(B,) tokens of prompt and response together."""
        return self.query_mask.sum(-1) + self.mask.sum(-1)

    def rows(self) -> tuple[Tensor, Tensor]:
        """Each prompt directly followed by its response, padded on the right: ids (B, L), and positions `at` (B, T).

        Row b, column `at[b, t]` holds the token before response token t, so the longest text lacks its last. A causal
        decoder needs no mask for them.
        Raises `InputError` for a prompt of no tokens.
        """
        import torch

        prompts = self.query_mask.sum(-1, keepdim=True)
        if not bool(prompts.all()):
            raise InputError("a prompt has no tokens, so nothing comes before its response; give it at least one")
        left = self.queries.shape[1] - prompts
        ids = torch.cat([self.queries, self.responses], -1)
        columns = left + torch.arange(int(self.lengths.max()) - 1, device=ids.device)
        at = prompts - 1 + torch.arange(self.mask.shape[1], device=ids.device)
        return ids.gather(1, columns.clamp(max=ids.shape[1] - 1)), at.clamp(max=columns.shape[1] - 1)

    @property
    def players(self) -> Tensor:
        """(B, T) bool: the tokens that attribution explains, the response without its EOS."""
        return players(self.mask, self.ended)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors, by name."""
        return {f.name: x for f in fields(self) if f.name != "prompts" and (x := getattr(self, f.name)) is not None}

    def take(self, rows: Tensor) -> Self:
        """The given rows, without the padding that they do not need."""
        P, T = (int(mask[rows].sum(-1).max()) for mask in (self.query_mask, self.mask))
        prompt = slice(self.queries.shape[1] - P, None)
        columns = {"queries": prompt, "query_mask": prompt, "trunk": slice(int(self.lengths[rows].max()) - 1)}
        whole = self.tensors().items()
        taken = {n: x[rows] if x.dim() == 1 else x[rows, columns.get(n, slice(T))] for n, x in whole}
        prompts = self.prompts and tuple(self.prompts[row] for row in rows.tolist())
        return type(self)(**taken, prompts=prompts)


@dataclass(frozen=True)
class Rollout(Responses):
    """Responses with the policy's log-probabilities and values.

    Index t is the act of emitting response token t; `values[:, t]` is the estimate before it.
    """

    logprobs: Tensor  # (B, T) nats, zero where mask is false
    ref_logprobs: Tensor  # (B, T) nats, zero where mask is false
    values: Tensor  # (B, T) score units, zero where mask is false

    def __post_init__(self):
        super().__post_init__()
        for name in ("logprobs", "ref_logprobs", "values"):
            _check(name, getattr(self, name), tuple(self.mask.shape))


@dataclass(frozen=True)
class Reading:
    """One prompt and response in the reward model's own tokens."""

    prompt: tuple[int, ...]  # never removed
    response: tuple[int, ...]  # explained
    spread: Tensor | None = None  # (len(response), k): shares of each token's credit on the policy's k tokens; None
    # where both models have the same tokens
    suffix: tuple[int, ...] | None = None  # follows the response and is never removed; None: the reward model's own
    segments: tuple[int, ...] | None = None  # of prompt, response and suffix, where the model tells several apart


def players(mask: Tensor, ended: Tensor) -> Tensor:
    """(B, T) bool: the tokens that attribution explains, responses `mask` (B, T) without EOS where `ended` (B,)."""
    import torch

    last = mask.sum(-1, keepdim=True) - 1
    return mask & ~((torch.arange(mask.shape[1], device=mask.device) == last) & ended[:, None])


@dataclass(frozen=True)
class Attribution:
    """Per-token credit from one source, before normalisation and weighting."""

    source: str
    credit: Tensor  # (B, T) score units, zero where the rollout's mask is false
    baseline: Tensor  # (B,) the score that no response token explains
    gap: Tensor  # (B,) score - baseline - credit.sum(-1); NaN where credit is not in score units
    evaluations: float  # reward-model forwards for each response, beyond those shared with sources before it
    seconds: float  # wall time for the batch
    complete: bool = False  # the source claims that gap is zero
    is_share: bool = False  # credit is a distribution over the response times the score; shaping leaves it as it is

    def __post_init__(self):
        if self.credit.dim() != 2:
            raise InputError(f"credit of {self.source!r} must be (B, T), got {tuple(self.credit.shape)}")
        for name in ("baseline", "gap"):
            _check(f"{name} of {self.source!r}", getattr(self, name), (self.credit.shape[0],))


@dataclass(frozen=True)
class RewardShape:
    """How attributions become rewards: `weights` on the simplex over `sources`, and how each source is normalised.

    With token features phi(t) in [-1, 1], slopes[k] . phi(t) is added to the log-weight of source k.
    """

    sources: tuple[str, ...]
    weights: tuple[float, ...]
    normalise: str = "softmax"
    temperature: float | tuple[float, ...] = 1.0  # of all sources, or one each
    features: tuple[str, ...] = ()
    slopes: tuple[tuple[float, ...], ...] = ()  # (K, F)

    def __post_init__(self):
        check_simplex("shape.weights", self.weights, len(self.sources))
        if len(set(self.sources)) != len(self.sources):
            raise InputError(f"shape.sources names a source twice: {list(self.sources)}")
        if self.normalise not in NORMALISERS:
            raise InputError(f"shape.normalise is {self.normalise!r}, wanted one of {', '.join(NORMALISERS)}")
        one, K = isinstance(self.temperature, (int, float)), len(self.sources)
        given = (self.temperature,) * K if one else self.temperature
        if len(given) != K or not all(0 < t < math.inf for t in given):
            raise InputError(f"shape.temperature is {self.temperature}, wanted a number above 0, or {K} of them")
        if len(set(self.features)) != len(self.features):
            raise InputError(f"shape.features names a feature twice: {list(self.features)}")
        rows, F = [list(row) for row in self.slopes], len(self.features)
        if len(rows) != (K if F else 0) or not all(len(row) == F and all(map(math.isfinite, row)) for row in rows):
            wanted = f"a row for each of {K} sources, a finite number for each of {F} features; none without features"
            raise InputError(f"shape.slopes is {rows}, wanted {wanted}")

    def temperature_of(self, source: str) -> float:
        """The temperature of one source, or the one for all. Raises `InputError` for a source that has none."""
        if isinstance(self.temperature, (int, float)):
            return self.temperature
        if source not in self.sources:
            raise InputError(f"shape.temperature: none for {source!r}, the sources are {', '.join(self.sources)}")
        return self.temperature[self.sources.index(source)]

    @property
    def weighted(self) -> tuple[str, ...]:
        """The sources that have weight."""
        return tuple(source for source, weight in zip(self.sources, self.weights) if weight > 0)

    @property
    def effective(self) -> RewardShape:
        """The shape without what changes no reward: sources without weight, equal slopes, idle temperatures."""
        kept = [k for k, weight in enumerate(self.weights) if weight != 0]
        given = [float(self.temperature_of(self.sources[k])) for k in kept] if self.normalise == "softmax" else [1.0]
        return RewardShape(
            tuple(self.sources[k] for k in kept),
            tuple(self.weights[k] for k in kept),
            self.normalise,
            tuple(given) if len(set(given)) > 1 else given[0],
            self.features if self.is_contextual else (),
            tuple(self.slopes[k] for k in kept) if self.is_contextual else (),
        )

    @property
    def is_contextual(self) -> bool:
        """Whether the weights differ from token to token: two sources with weight have different slopes."""
        return len({row for row, weight in zip(self.slopes, self.weights) if weight > 0}) > 1


def is_number(value: object) -> bool:
    """Whether a value is a finite real number, NumPy's included; no bool, and nothing too large for a float."""
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def check_simplex(name: str, weights: Sequence[float], size: int) -> None:
    """Raise `InputError` unless `weights` are `size` non-negative numbers that sum to one, to 1e-6.

    One that rounding left just below zero counts as zero.
    """
    if len(weights) != size:
        raise InputError(f"{name} has {len(weights)} numbers for {size} sources, wanted one each")
    if not all(is_number(w) and w >= -SIMPLEX for w in weights) or abs(sum(weights) - 1) > SIMPLEX:
        raise InputError(f"{name} is {list(weights)}, wanted non-negative numbers that sum to 1, to {SIMPLEX:g}")


def check_removal(removal: str) -> None:
    """Raise `InputError` for an unknown removal method."""
    kind, _, token = removal.partition(":")
    if kind not in REMOVALS or bool(token) != (kind == "replace"):
        raise InputError(f"attribution.removal is {removal!r}, wanted drop, attention_mask or replace:TOKEN")
