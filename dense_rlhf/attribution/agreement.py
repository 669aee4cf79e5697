"""How far a source's credit agrees with credit, or with marked tokens, that are known. All measures: (B,)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dense_rlhf.models.word_judge import AdditiveJudge
from dense_rlhf.types import Rollout


def known_credit(judge: AdditiveJudge, rollout: Rollout, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """The judge's exact credit of each response token, (B, T), zero on EOS and padding."""
    credit = torch.zeros(rollout.mask.shape)
    for row, (ids, players) in enumerate(zip(rollout.responses.cpu(), rollout.players.cpu())):
        kept = ids[players].tolist()
        credit[row, : len(kept)] = torch.tensor(judge.token_credit(tokenizer, kept))
    return credit


def score_unit(credit: Tensor, scores: Tensor) -> tuple[float, float]:
    """Score units in one unit of `credit` (B, T), and R^2: least squares of the scores (B,) on each response's sum.

    score_b = a + unit * sum_t credit_b,t. NaN where the sums, or the scores, are all the same.
    """
    x, y = (values - values.mean() for values in (credit.double().sum(-1), scores.double()))
    return float(x @ y / (x @ x)), float((x @ y) ** 2 / ((x @ x) * (y @ y)))


def varied(values: np.ndarray) -> bool:
    """Whether values (n,) differ by more than the rounding of float32."""
    return len(values) > 1 and bool(np.ptp(values) > 1e-5 * np.abs(values).max() + 1e-9)


def _rows(*tensors: Tensor, players: Tensor) -> Iterator[list[np.ndarray]]:
    """The players' part of tensors (B, T), response by response, float64."""
    for keep, *row in zip(players.cpu(), *(x.cpu() for x in tensors)):
        yield [x[keep].double().numpy() for x in row]


def rank_agreement(credit: Tensor, known: Tensor, players: Tensor) -> np.ndarray:
    """Spearman correlation of `credit` with `known` (B, T) in each response, (B,).

    NaN where either is constant, as an even spread always is.
    """
    pairs = _rows(credit, known, players=players)
    return np.array([spearmanr(a, b).statistic if varied(a) and varied(b) else np.nan for a, b in pairs])


def average_precision(credit: Tensor, positive: Tensor, players: Tensor) -> np.ndarray:
    """Area under precision and recall of finding the `positive` tokens (B, T) by highest credit.

    Even credit gets the share of positives; random orders of few tokens get more, so compare with the source `random`.
    NaN where no player is positive, or every one. Give `-credit` where low credit should find them (bad words).
    """
    from sklearn.metrics import average_precision_score

    pairs = ((a, b > 0) for a, b in _rows(credit, positive, players=players))
    return np.array([average_precision_score(b, a) if 0 < b.sum() < len(b) else np.nan for a, b in pairs])
