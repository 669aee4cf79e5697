"""What does a reward model like? Words by their credit, the score's variance by what earns it, two models compared.

    explained = explain_many(model, tokenizer, prompts, texts)
    scored = Scored.of(explained)
    liked(scored)  # words of the largest mean credit, chosen on half of the texts and estimated on the other

A *piece* is a word, a number, or a run of other marks. Texts of one *unit*, as two replies to one prompt, stay together
where texts are halved or resampled.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import pandas as pd
import torch
from pandas.api.typing import SeriesGroupBy
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dense_rlhf.attribution.explain import Explanation, explain_many
from dense_rlhf.attribution.human_marks import MarkedText
from dense_rlhf.config.params import AttributionParams
from dense_rlhf.data import prompt_text
from dense_rlhf.models.reward_model import RewardModel
from dense_rlhf.models.text_spans import cut, overlap, solid, tile
from dense_rlhf.models.word_judge import WORD, AdditiveJudge, load_lexicon, words_of
from dense_rlhf.statistics import ALPHA, Interval, bootstrap
from dense_rlhf.types import InputError, LabelledText, PreferencePair, Prompt

PIECE = re.compile(rf"{WORD.pattern}|[^\w\s]+|_+|\n+")
FORMULAS = """thank you, thanks, please, sorry, apologi[sz]e, my apologies, you(?:'re| are) welcome, great question,
    good question, happy to help, glad to help, i'd be happy to, i'd be glad to, hope (?:this|that) helps, let me know,
    feel free, i understand, i appreciate, as an ai, best regards, best wishes"""
FORMULA = re.compile(rf"\b(?:{'|'.join(re.split(', *', ' '.join(FORMULAS.split())))})\b", re.I)  # of politeness
MARKDOWN = re.compile(r"^\s*(?:[-*+]|\d+[.)])\s|^#+ |\*\*|`|\[[^\]\n]*\]\(", re.M)
FEWEST = 8  # units of each half that a word must be in
KINDS = ("politeness formula", "word that people mark", "other word", "number", "punctuation and format")
THIRDS = ("first third", "middle third", "last third")  # of a text
REPEATS = 2000


# ---------------------------------------------------------------------------------------------------- texts


@dataclass(frozen=True)
class Passages:
    """Texts to audit."""

    prompts: tuple[Prompt, ...]
    texts: tuple[str, ...]
    units: tuple[int, ...]  # texts of one unit stay together
    labels: tuple[int, ...]  # what people said of each: 1 good or preferred, 0 bad or not
    counts: dict[str, int]


def passages(
    examples: Sequence[LabelledText | PreferencePair], tokenizer: PreTrainedTokenizerBase, window: int, most: int
) -> Passages:
    """The first `most` examples that fit: of a labelled text its first whole sentences, of a pair both dialogues.

    `window` is the most tokens, of a dialogue with its prompt. Those of which nothing fits are left out and counted.
    """
    rows, counts = [], Counter(read=0)
    for unit, example in enumerate(examples):
        if unit - counts["left out: too long"] == most:
            break
        counts["read"] += 1
        if isinstance(example, PreferencePair):
            sides = [(example.prompt, example.chosen, unit, 1), (example.prompt, example.rejected, unit, 0)]
            fits = all(_tokens(tokenizer, prompt_text(p) + text) <= window and text for p, text, *_ in sides)
        else:
            text = _first_sentences(example.text, tokenizer, window)
            sides, fits = [("", text, unit, example.label)], bool(text)
        rows += sides if fits else []
        counts["left out: too long"] += not fits
    if not rows:
        raise InputError(f"none of {counts['read']} texts has at most {window} tokens; raise reward.window")
    return Passages(*zip(*rows), dict(counts, texts=len(rows)))


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


def _first_sentences(text: str, tokenizer: PreTrainedTokenizerBase, window: int) -> str:
    kept = ""
    for _, end in cut(text, "sentences"):
        if _tokens(tokenizer, text[:end]) > window:
            break
        kept = text[:end]
    return kept


def explained(
    model: RewardModel,
    prompts: Sequence[Prompt],
    texts: Sequence[str],
    params: AttributionParams,
    progress: Callable = iter,
) -> list[Explanation]:
    """`explain_many` of a study's reward model as studies read it, with EOS after a decoder's text."""
    options = asdict(params) | dict(end="eos", pair=model.pair, output=model.output, progress=progress)
    return explain_many(model.model, model.tokenizer, prompts, texts, "shap", **options)  # no bias at any budget


# ---------------------------------------------------------------------------------------------------- scores


@dataclass(frozen=True)
class Scored:
    """A model's scores of N texts, and what each piece of them adds.

    `pieces` has columns text, unit, piece (lower case), start, end, place (its middle, 0 to 1) and credit.
    """

    texts: tuple[str, ...]
    units: np.ndarray  # (N,)
    scores: np.ndarray  # (N,)
    pieces: pd.DataFrame

    @classmethod
    def of(cls, explanations: Sequence[Explanation], units: Sequence[int] | None = None) -> Scored:
        """A model's own explanations; the credit of a token goes to the pieces that share its characters."""
        credits = []
        for one in explanations:
            parts = tile(_spans(one.response), len(one.response))
            share = overlap(solid(list(one.spans), len(one.response)), parts)
            credits.append((torch.tensor(one.credit, dtype=share.dtype) @ share).tolist())
        return cls._made([one.response for one in explanations], [one.score for one in explanations], credits, units)

    @classmethod
    def by(cls, judge: AdditiveJudge, texts: Sequence[str], units: Sequence[int] | None = None) -> Scored:
        """A judge whose credit is known, as its score is a sum over words."""
        credits = [[judge.weights.get(text[a:b].lower(), 0.0) for a, b in _spans(text)] for text in texts]
        return cls._made(texts, [judge.score(text) for text in texts], credits, units)

    @classmethod
    def _made(
        cls, texts: Sequence[str], scores: Sequence[float], credits: Iterable, units: Sequence[int] | None
    ) -> Scored:
        units = np.arange(len(texts)) if units is None else np.asarray(units)
        rows = [
            (n, units[n], text[a:b].lower(), a, b, (a + b) / 2 / len(text), value)
            for n, (text, own) in enumerate(zip(texts, credits, strict=True))
            for (a, b), value in zip(_spans(text), own, strict=True)
        ]
        pieces = pd.DataFrame(rows, columns=["text", "unit", "piece", "start", "end", "place", "credit"])
        return cls(tuple(texts), units, np.array(scores, float), pieces)

    @property
    def standardised(self) -> Scored:
        """Scores of mean 0 and standard deviation 1, and credit in the same unit."""
        sd = self.scores.std()
        if not sd > 0:
            raise InputError(f"all {len(self.scores)} texts have the score {self.scores[0]}; there is nothing to audit")
        pieces = self.pieces.assign(credit=self.pieces["credit"] / sd)
        return replace(self, scores=(self.scores - self.scores.mean()) / sd, pieces=pieces)

    def less(self, other: Scored) -> Scored:
        """Where two models disagree: this one's standardised scores and credit less the other's, of the same texts."""
        ours, theirs = self.standardised, other.standardised
        if self.texts != other.texts:
            raise InputError("two models have scored different texts; compare them on the same ones, in one order")
        pieces = ours.pieces.assign(credit=ours.pieces["credit"] - theirs.pieces["credit"])
        return replace(ours, scores=ours.scores - theirs.scores, pieces=pieces)


def _spans(text: str) -> list[tuple[int, int]]:
    """The characters of each piece; a text without any, as of spaces alone, is one."""
    return [match.span() for match in PIECE.finditer(text)] or [(0, len(text))]


# ---------------------------------------------------------------------------------------------------- words


def phrases(scored: Scored) -> Scored:
    """The same with two adjacent words as a piece, whose credit is the sum of theirs."""
    one, after = scored.pieces, scored.pieces.shift(-1)
    words = one["piece"].str.fullmatch(WORD) & after["piece"].str.fullmatch(WORD).fillna(False).astype(bool)
    joined = one.assign(
        piece=one["piece"] + " " + after["piece"].fillna(""), end=after["end"], credit=one["credit"] + after["credit"]
    )
    return replace(scored, pieces=joined[words & (one["text"] == after["text"])])


def common(scored: Scored, fewest: int = FEWEST) -> pd.Series:
    """The pieces that are in `fewest` units of each half, by their mean credit in the first, from the largest on."""
    return _common(*_halves(scored), fewest)


def _halves(scored: Scored) -> list[SeriesGroupBy]:
    """The mean credit of each piece in each unit, by piece, of the units of even and of odd number."""
    each = scored.pieces.groupby(["piece", "unit"])["credit"].mean().reset_index()
    return [each[each["unit"] % 2 == half].groupby("piece")["credit"] for half in (0, 1)]


def _common(even: SeriesGroupBy, odd: SeriesGroupBy, fewest: int) -> pd.Series:
    first = even.agg(["mean", "size"])
    often = (first["size"] >= fewest) & (odd.size().reindex(first.index) >= fewest)
    return first[often]["mean"].sort_values(kind="stable", ascending=False)


def liked(scored: Scored, most: int = 8, fewest: int = FEWEST) -> pd.DataFrame:
    """The `most` pieces of the largest and of the smallest mean credit, with intervals that hold for all of them.

    Chosen on the units of even number, among the `common` pieces; `credit` is estimated on the others, so that the
    choice does not flatter it. A unit's value is the mean over its occurrences. Student's t, at 1 - 0.05 / rows
    (Bonferroni). Columns: piece, texts (of the estimate), chosen_by (the mean in the first half), credit (an Interval).
    Raises `InputError` where no piece is common.
    """
    even, odd = _halves(scored)
    means = _common(even, odd, fewest)
    ends = list(dict.fromkeys([*means.index[:most], *means.index[-most:]]))
    if not ends:
        raise InputError(f"no word is in {fewest} texts of each half of {len(scored.texts)}; give more texts")
    rows = []
    for piece in ends:
        values = odd.get_group(piece).to_numpy()
        rows.append((piece, len(values), means[piece], _simultaneous(values, len(ends))))
    return pd.DataFrame(rows, columns=["piece", "texts", "chosen_by", "credit"])


def _simultaneous(values: np.ndarray, number: int) -> Interval:
    """Student's t interval of a mean, one of `number` that shall all hold at once."""
    from scipy.special import stdtrit

    mean, reach = values.mean(), stdtrit(len(values) - 1, 1 - ALPHA / 2 / number) * values.std(ddof=1)
    return Interval(float(mean), *(float(mean + sign * reach / len(values) ** 0.5) for sign in (-1, 1)))


# ---------------------------------------------------------------------------------------------------- variance


def kinds(scored: Scored) -> pd.Series:
    """The kind of each piece, one of `KINDS`; words that people mark are VADER's."""
    lexicon = load_lexicon().weights
    formulas = [[match.span() for match in FORMULA.finditer(text)] for text in scored.texts]

    def kind(row: tuple) -> str:
        if any(a <= row.start < b for a, b in formulas[row.text]):
            return KINDS[0]
        if not WORD.fullmatch(row.piece):
            return KINDS[4]
        return KINDS[3] if row.piece.isdigit() else KINDS[1 if row.piece in lexicon else 2]

    return pd.Series([kind(row) for row in scored.pieces.itertuples()], index=scored.pieces.index, dtype=object)


def thirds(scored: Scored) -> pd.Series:
    """The third of its text that each piece is in, one of `THIRDS`."""
    names = np.array(THIRDS, dtype=object)
    return pd.Series(names[(scored.pieces["place"] * 3).astype(int).clip(0, 2)], index=scored.pieces.index)


def variance_shares(scored: Scored, group: pd.Series) -> dict[str, Interval]:
    """How much of the scores' variance the credit of each group of pieces makes: cov(credit, score) / var(score).

    The shares sum to one with that of `the rest`: the prompts, and what credit leaves unexplained. Below zero where a
    group evens out what the others earn. Texts of one unit are compared with each other only. 95 % percentile
    intervals, units resampled.
    """
    sums = scored.pieces.assign(group=group).pivot_table(
        index="text", columns="group", values="credit", aggfunc="sum", fill_value=0.0
    )
    sums = sums.reindex(range(len(scored.texts)), fill_value=0.0)
    sums["the rest"] = scored.scores - sums.sum(axis=1)
    x, y = _within(sums.to_numpy(), scored.units), _within(scored.scores, scored.units)
    weights = _resampled(scored.units)
    draws = _covariance(weights, x, y) / _covariance(weights, y[:, None], y)
    return {name: _percentile(draws[:, k]) for k, name in enumerate(sums.columns)}


def rank_correlation(ours: Scored, theirs: Scored) -> Interval:
    """Spearman's, of two models' scores of the same texts; units resampled, with the ranks among all texts."""
    x, y = (pd.Series(one.scores).rank().to_numpy() for one in (ours, theirs))
    weights = _resampled(ours.units)
    xy, xx, yy = (_covariance(weights, one[:, None], other)[:, 0] for one, other in ((x, y), (x, x), (y, y)))
    return _percentile(xy / np.sqrt(xx * yy))


def ordered_alike(ours: Scored, theirs: Scored | None = None) -> Interval:
    """Share of pairs whose replies two models put in one order, a tie half; of one model, in the order of people.

    95 % interval, pairs resampled. Raises `InputError` unless each unit is a pair, the reply that people prefer first.
    """
    orders = [np.sign(_margins(one)) for one in (ours, theirs) if one is not None]
    return bootstrap((1 + np.prod(orders, axis=0)) / 2)


def _margins(scored: Scored) -> np.ndarray:
    """The score of the first text of each unit less that of the second, (U,)."""
    if len(scored.units) % 2 or (scored.units[::2] != scored.units[1::2]).any():
        raise InputError(f"{len(scored.units)} texts are not two of each unit, one after the other; give pairs")
    return scored.scores[::2] - scored.scores[1::2]


def _covariance(weights: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Of each column of x (N, K) with y (N,) in every resample, (R, K)."""
    return weights @ (x * y[:, None]) - (weights @ x) * (weights @ y)[:, None]


def _within(values: np.ndarray, units: np.ndarray) -> np.ndarray:
    """Values (N, ...) less the mean of their unit where units have several texts: prompts differ, and are not asked."""
    _, number, size = np.unique(units, return_inverse=True, return_counts=True)
    if size.max() == 1:
        return values
    sums = np.zeros((len(size), *values.shape[1:]))
    np.add.at(sums, number, values)
    return values - (sums.T / size).T[number]


def _resampled(units: np.ndarray, seed: int = 0) -> np.ndarray:
    """The weight of each text in each resample of units (REPEATS + 1, N); the first is the texts as they are."""
    _, number = np.unique(units, return_inverse=True)
    rng, size = np.random.default_rng(seed), number.max() + 1
    drawn = rng.multinomial(size, np.full(size, 1 / size), REPEATS)
    counts = np.concatenate([np.ones((1, len(units))), drawn[:, number]])
    return counts / counts.sum(1, keepdims=True)


def _percentile(draws: np.ndarray) -> Interval:
    """The first draw with the interval of the others."""
    low, high = np.nanquantile(draws[1:], [ALPHA / 2, 1 - ALPHA / 2])
    return Interval(float(draws[0]), float(low), float(high))


def surface(texts: Sequence[str]) -> dict[str, pd.DataFrame]:
    """What is seen of texts without reading them, (N, F) a group, fixed before any score was looked at; and, as a
    yardstick, the sum of the valences that people gave their words."""
    groups = ("length", "format", "position", "politeness", "marked words")
    rows = [_surface(text) for text in texts]
    frames = {name: pd.DataFrame([row[name] for row in rows]) for name in groups}
    return frames | {"all but words": pd.concat([frames[name] for name in groups[:4]], axis=1)}


def _surface(text: str) -> dict[str, dict[str, float]]:
    words, marks = words_of(text), load_lexicon().weights
    number, values = max(len(words), 1), [marks.get(word, 0.0) for word in words]
    places = {sign: [n / number for n, value in enumerate(values) if sign * value > 0] for sign in (1, -1)}
    rates = {f"{mark} a word": text.count(mark) / number for mark in '!?,"(:'}
    capitals, digits = len(re.findall(r"\b[A-Z]{2,}\b", text)) / number, sum(map(str.isdigit, text)) / len(text)
    lines, markdown = np.log1p(text.count("\n")), np.log1p(len(MARKDOWN.findall(text)))
    return {
        "length": {"log words": np.log1p(len(words)), "sentences": len(cut(text, "sentences")), "letters": len(text)},
        "format": rates | dict(capitals=capitals, digits=digits, lines=lines, markdown=markdown),
        "position": {f"place of {sign}": float(np.mean(at)) if at else 0.5 for sign, at in places.items()},
        "politeness": {"formulas": np.log1p(len(FORMULA.findall(text)))},
        "marked words": {"valence": sum(values)},
    }


def predicted_shares(scored: Scored, features: Mapping[str, pd.DataFrame]) -> dict[str, Interval]:
    """How much of the scores' variance each set of features (N, F) predicts: R^2 of least squares on unseen texts.

    Fitted on the units of even number, judged on the others, whose units are resampled for the 95 % interval; below
    zero where the prediction is worse than the mean. Texts of one unit are compared with each other only.
    """
    even, shares = scored.units % 2 == 0, {}
    weights, y = _resampled(scored.units[~even]), _within(scored.scores, scored.units)
    total = _covariance(weights, y[~even, None], y[~even])[:, 0]
    for name, frame in features.items():
        X = np.column_stack([np.ones(len(y)), _within(frame.to_numpy(float), scored.units)])
        missed = y - X @ np.linalg.lstsq(X[even], y[even], rcond=None)[0]
        shares[name] = _percentile(1 - weights @ missed[~even] ** 2 / total)
    return shares


# ---------------------------------------------------------------------------------------------------- human marks


def human_marks(scored: Scored, marked: Sequence[MarkedText]) -> pd.Series:
    """What people gave each piece: the mean over its characters, zero outside of all spans."""
    by_text = []
    for text in marked:
        values = np.zeros(len(text.text))
        for (start, end), value in zip(text.spans, text.values):
            values[start:end] += value
        by_text.append(values)
    rows = scored.pieces.itertuples()
    return pd.Series([float(by_text[r.text][r.start : r.end].mean()) for r in rows], index=scored.pieces.index)


def as_rows(scored: Scored, *columns: pd.Series) -> tuple[Tensor, ...]:
    """Values of pieces as tensors (N, T), a row a text, and last which are real (N, T): the form of `agreement`."""
    place = scored.pieces.groupby("text").cumcount().to_numpy()
    text, shape = scored.pieces["text"].to_numpy(), (len(scored.texts), int(place.max()) + 1)
    tensors = []
    for values in (*columns, pd.Series(True, index=scored.pieces.index)):
        tensor = torch.zeros(shape, dtype=torch.bool if values.dtype == bool else torch.float64)
        tensor[text, place] = torch.from_numpy(values.to_numpy())
        tensors.append(tensor)
    return tuple(tensors)
