"""How far a source's credit agrees with credit that is known."""

from __future__ import annotations

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dense_rlhf.additive import AdditiveJudge
from dense_rlhf.types import Rollout


def known_credit(judge: AdditiveJudge, rollout: Rollout, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """The judge's exact credit of each response token, (B, T), zero on EOS and padding."""
    credit = torch.zeros(rollout.mask.shape)
    for row, (ids, players) in enumerate(zip(rollout.responses.cpu(), rollout.players.cpu())):
        kept = ids[players].tolist()
        credit[row, : len(kept)] = torch.tensor(judge.token_credit(tokenizer, kept))
    return credit


def rank_agreement(credit: Tensor, known: Tensor, players: Tensor) -> np.ndarray:
    """Spearman correlation of `credit` with `known` (B, T) in each response, (B,).

    NaN where either is constant, as an even spread always is: it ranks nothing.
    """
    rows = []
    for a, b, keep in zip(credit.cpu(), known.cpu(), players.cpu()):
        a, b = a[keep].double().numpy(), b[keep].double().numpy()
        varied = len(a) > 1 and np.ptp(a) > 1e-9 and np.ptp(b) > 0
        rows.append(spearmanr(a, b).statistic if varied else np.nan)
    return np.array(rows)
