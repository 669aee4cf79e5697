"""From credit to reward: normalise each source, mix them with weights on the simplex, keep the sum.

r_t = score * sum_i w_i E_i,t with E_i = softmax(credit_i / temperature_i) over the response (Koo et al., 2025).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from dense_rlhf.shaping.features import features
from dense_rlhf.shaping.masked import effective_share, masked_mean, masked_softmax, masked_sum
from dense_rlhf.types import Attribution, InputError, RewardShape, Rollout


def dense_reward(rollout: Rollout, attribution: Attribution, shape: RewardShape) -> Tensor:
    """The rewards (B, T) of one source alone; each row sums to the score.

    - a share (terminal, uniform, random, attention) stays as it is;
    - `softmax`: score * softmax(credit / temperature), the paper's. A negative score punishes the best token most;
    - `sum`: score * credit / sum of credit, for credit of one sign; raises `InputError` on mixed signs;
    - `magnitude`: the same of |credit|, which loses the direction of each token's effect; even if all credit is zero;
    - `signed`: the credit, and the rest of the score (baseline and gap) spread evenly.
    """
    credit, mask = attribution.credit, rollout.mask
    if credit.shape != mask.shape:
        raise InputError(f"credit of {attribution.source!r} is {tuple(credit.shape)}, responses {tuple(mask.shape)}")
    if attribution.is_share:
        return credit
    scores = rollout.scores[:, None]
    if shape.normalise == "softmax":
        return scores * masked_softmax(credit / shape.temperature_of(attribution.source), mask)
    if shape.normalise == "signed":
        return _spread(rollout, credit)
    if shape.normalise == "magnitude":
        none = (credit == 0).all(-1, keepdim=True)
        credit = torch.where(none, mask.to(credit), credit.abs())
    total = masked_sum(credit, mask, -1)[:, None]
    if bool(((credit > 0).any(-1) & (credit < 0).any(-1)).any()) or bool((total == 0).any()):
        raise InputError(
            f"shape.normalise 'sum' wants credit of one sign, {attribution.source!r} has both or none; "
            "take 'signed' or 'softmax'"
        )
    return (scores * credit / total).masked_fill(~mask, 0)


def _spread(rollout: Rollout, credit: Tensor) -> Tensor:
    """`credit` (B, T) plus the rest of the score, spread evenly over the response's tokens."""
    rest = rollout.scores - masked_sum(credit, rollout.mask, -1)
    return (credit + (rest / rollout.mask.sum(-1))[:, None]).masked_fill(~rollout.mask, 0)


def token_weights(rollout: Rollout, shape: RewardShape) -> Tensor:
    """The weight of each source at each token, (B, T, K), on the simplex over K.

    w_k(t) = w_k exp(slopes_k . phi(t)) / sum_j w_j exp(slopes_j . phi(t)), phi the `FEATURES` of the shape. Weights are
    the same at every token unless the shape is contextual; a weight of zero always is.
    """
    phi = features(rollout, shape.features)
    base = phi.new_tensor(shape.weights)
    if not shape.is_contextual:
        return base.expand(*rollout.mask.shape, len(base))
    return (base.clamp(min=0).log() + phi @ phi.new_tensor(shape.slopes).T).softmax(-1)


class Shaped(NamedTuple):
    """The rewards of a rollout, and what normalisation did to its credit."""

    rewards: Tensor  # (B, T), rows sum to the scores, zero outside the mask
    diagnostics: dict[str, float]


def shaped(rollout: Rollout, attributions: Mapping[str, Attribution], shape: RewardShape) -> Shaped:
    """The weighted mean m_t = sum_k w_k(t) r_k,t of the sources' dense rewards, with diagnostics; no KL penalty yet.

    Weights that depend on the token change the sum. A `signed` shape then spreads the rest of the score evenly; any
    other rescales, r_t = score * m_t / sum of m, as its m_t have one sign.
    Diagnostics: `ess/SOURCE`, the effective share of tokens (ESS/T) that a source of weight rewards, averaged over
    responses; `flipped`, the share of tokens whose reward and weighted credit have opposite signs.
    Raises `InputError` for a weighted source without attribution, and where nothing is left to rescale to a score.
    """
    missing = [s for s in shape.weighted if s not in attributions]
    if missing:
        raise InputError(f"shape.sources: no attribution for {', '.join(missing)}; attribute these first")
    dense = {s: dense_reward(rollout, attributions[s], shape) for s in shape.weighted}
    rewards = _kept_sum(rollout, shape, _mix(rollout, shape, dense))
    credit = _mix(rollout, shape, {s: attributions[s].credit for s in shape.weighted})
    shares = {f"ess/{s}": effective_share(r, rollout.mask).nanmean().item() for s, r in dense.items()}
    flipped = masked_mean((rewards * credit < 0).float(), rollout.mask).item()
    return Shaped(rewards, shares | {"flipped": flipped})


def shape_rewards(rollout: Rollout, attributions: Mapping[str, Attribution], shape: RewardShape) -> Tensor:
    """The rewards (B, T) of `shaped`."""
    return shaped(rollout, attributions, shape).rewards


def _mix(rollout: Rollout, shape: RewardShape, parts: dict[str, Tensor]) -> Tensor:
    """sum of w_k(t) parts_k (B, T) over the sources that have weight."""
    weights = token_weights(rollout, shape).unbind(-1) if shape.is_contextual else shape.weights
    return sum(w * parts[s] for s, w in zip(shape.sources, weights) if s in shape.weighted)


def _kept_sum(rollout: Rollout, shape: RewardShape, mixed: Tensor) -> Tensor:
    """Mixed rewards (B, T) whose rows sum to the scores, also where weights depend on the token."""
    if not shape.is_contextual:
        return mixed
    if shape.normalise == "signed":
        return _spread(rollout, mixed)
    total = masked_sum(mixed, rollout.mask, -1)
    lost = (total == 0) & (rollout.scores != 0)
    if bool(lost.any()):
        raise InputError(
            f"shape.slopes leave no weight on any token that has credit in {int(lost.sum())} of "
            f"{len(lost)} responses; take slopes nearer zero"
        )
    return mixed * (rollout.scores / total.masked_fill(total == 0, 1))[:, None]
