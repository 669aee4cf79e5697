"""Credit becomes reward: normalise each source, mix with weights on the simplex, keep the sum.

r_t = score * sum_i w_i E_i,t with E_i = softmax(credit_i / temperature) over the response (Koo et al., 2025).
"""

from __future__ import annotations

from torch import Tensor

from dense_rlhf.masked import effective_share, masked_mean, masked_softmax, masked_sum
from dense_rlhf.types import Attribution, InputError, RewardShape, Rollout


def dense_reward(rollout: Rollout, attribution: Attribution, shape: RewardShape) -> Tensor:
    """The rewards (B, T) of one source alone; each row sums to the score.

    - a share (terminal, uniform, random, attention) stays as it is;
    - `softmax`: score * softmax(credit / temperature), the paper's. A negative score punishes the best token most;
    - `sum`: score * credit / sum of credit, for credit of one sign; raises `InputError` on mixed signs;
    - `signed`: credit itself; what it leaves of the score (baseline and gap) is spread evenly.
    """
    credit, mask = attribution.credit, rollout.mask
    if credit.shape != mask.shape:
        raise InputError(f"credit of {attribution.source!r} is {tuple(credit.shape)}, responses {tuple(mask.shape)}")
    if attribution.is_share:
        return credit
    scores = rollout.scores[:, None]
    if shape.normalise == "softmax":
        return scores * masked_softmax(credit / shape.temperature, mask)
    total = masked_sum(credit, mask, -1)[:, None]
    if shape.normalise == "signed":
        return (credit + (scores - total) / mask.sum(-1, keepdim=True)).masked_fill(~mask, 0)
    if bool(((credit > 0).any(-1) & (credit < 0).any(-1)).any()) or bool((total == 0).any()):
        raise InputError(f"shape.normalise 'sum' wants credit of one sign, {attribution.source!r} has both or none; "
                         "take 'signed' or 'softmax'")  # fmt: skip
    return (scores * credit / total).masked_fill(~mask, 0)


def shape_rewards(rollout: Rollout, attributions: dict[str, Attribution], shape: RewardShape) -> Tensor:
    """Rewards (B, T): the weighted mean of the sources' dense rewards. Zero outside the mask; rows sum to the scores.

    Raises `InputError` where an attribution that the shape weights is missing. The KL penalty is a separate term.
    """
    missing = [s for s, w in zip(shape.sources, shape.weights) if w and s not in attributions]
    if missing:
        raise InputError(f"shape.sources: no attribution for {', '.join(missing)}; attribute these first")
    weighted = zip(shape.sources, shape.weights)
    return sum(w * dense_reward(rollout, attributions[s], shape) for s, w in weighted if w)


def shape_diagnostics(rollout: Rollout, attributions: dict[str, Attribution], shape: RewardShape) -> dict[str, float]:
    """What normalisation did: each source's effective share (ESS/T), and how many tokens changed sign in the mix.

    `flipped`: share of tokens whose reward has the other sign than the weighted credit itself.
    """
    found = {}
    for source, attribution in attributions.items():
        spread = effective_share(dense_reward(rollout, attribution, shape), rollout.mask)
        found[f"ess/{source}"] = spread.nanmean().item()
    rewards = shape_rewards(rollout, attributions, shape)
    credit = sum(w * attributions[s].credit for s, w in zip(shape.sources, shape.weights) if w)
    found["flipped"] = masked_mean((rewards * credit < 0).float(), rollout.mask).item()
    return found
