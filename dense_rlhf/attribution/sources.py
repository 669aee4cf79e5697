"""The sources of credit. A new one is a function here and a line in `SOURCES`; the contract tests pick it up."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from dense_rlhf.params import AttributionParams
from dense_rlhf.types import Attribution, InputError, Rollout

if TYPE_CHECKING:  # the registry is read before a study starts, so torch is imported where it is used
    from torch import Tensor

    from dense_rlhf.attribution.coalitions import Design
    from dense_rlhf.rewards import RewardModel


def _share(source: str, rollout: Rollout, share: Tensor, evaluations: float = 0) -> Attribution:
    """A distribution over the response (B, T), times the score: complete against a baseline of zero."""
    credit = (share * rollout.scores[:, None]).masked_fill(~rollout.mask, 0)
    gap = rollout.scores - credit.sum(-1)
    return Attribution(source, credit, gap.new_zeros(gap.shape), gap, evaluations, 0.0, is_share=True)


def terminal(reward_model: RewardModel, rollout: Rollout, params: AttributionParams) -> Attribution:
    """All on the last token: sparse RLHF."""
    last = rollout.mask.cumsum(-1) == rollout.mask.sum(-1, keepdim=True)
    last &= rollout.mask
    return _share("terminal", rollout, last.float())


def uniform(reward_model: RewardModel, rollout: Rollout, params: AttributionParams) -> Attribution:
    """The same on every token."""
    return _share("uniform", rollout, rollout.mask / rollout.mask.sum(-1, keepdim=True))


def random(reward_model: RewardModel, rollout: Rollout, params: AttributionParams) -> Attribution:
    """A control: shares drawn from Dirichlet(1), fresh for each batch and reproducible from its tokens."""
    import torch

    generator = torch.Generator().manual_seed(params.seed + int(rollout.responses.sum()))
    draws = torch.empty(rollout.mask.shape).exponential_(generator=generator).to(rollout.mask.device) * rollout.mask
    return _share("random", rollout, draws / draws.sum(-1, keepdim=True))


def attention(reward_model: RewardModel, rollout: Rollout, params: AttributionParams) -> Attribution:
    """Where the reward model looked: last layer, mean over heads, row of the read position (Chan et al., 2024).

    Attention on response tokens divided by its sum. It is a softmax already, so shaping applies no second one.
    """
    import torch

    ids = torch.cat([rollout.queries, rollout.responses], -1)
    keep = torch.cat([rollout.query_mask, rollout.players], -1)
    weights = reward_model.read_attention(ids, keep)[:, rollout.queries.shape[1] :]
    none = ~rollout.players.any(-1, keepdim=True)  # an EOS alone: the whole share is its own
    weights = torch.where(none, rollout.mask.float(), weights)
    return _share("attention", rollout, weights / weights.sum(-1, keepdim=True), evaluations=1)


def _additive(
    source: str, design: Callable[[int], Design], reward_model: RewardModel, rollout: Rollout
) -> Attribution:
    """Score every coalition of every response in common batches, then one matrix product for each length."""
    import torch

    from dense_rlhf.masked import masked_sum

    ids = torch.cat([rollout.queries, rollout.responses], -1)
    credit = torch.zeros_like(rollout.values, dtype=torch.float64)
    baseline, evaluations, sizes = torch.zeros_like(rollout.scores), 0, rollout.players.sum(-1)
    for k in sizes.unique().tolist():
        rows = (sizes == k).nonzero().squeeze(-1)
        if k == 0:  # an EOS alone: nothing to explain
            baseline[rows] = rollout.scores[rows]
            continue
        plan = design(k)
        y = _coalition_scores(reward_model, ids[rows], rollout.query_mask[rows], plan.masks.to(ids.device))
        credit[rows, :k] = y.double() @ plan.operator.to(y.device, torch.float64).T
        baseline[rows] = y[:, 0]
        evaluations += y.numel()
    credit = credit.to(rollout.scores.dtype)
    gap = rollout.scores - baseline - masked_sum(credit, rollout.mask, -1)
    return Attribution(source, credit, baseline, gap, evaluations / len(ids), 0.0)


def _coalition_scores(reward_model: RewardModel, ids: Tensor, query_mask: Tensor, masks: Tensor) -> Tensor:
    """Scores (R, m) of R responses of k players under the m coalitions `masks` (m, k); absent tokens are dropped."""
    import torch

    (R, P), (m, k) = query_mask.shape, masks.shape
    keep = torch.cat([query_mask[:, None].expand(R, m, P), masks[None].expand(R, m, k)], -1)
    rows = ids[:, None, : P + k].expand(R, m, P + k)
    return reward_model.score(rows.reshape(R * m, -1), keep.reshape(R * m, -1)).view(R, m)


def shap(reward_model: RewardModel, rollout: Rollout, params: AttributionParams) -> Attribution:
    """Shapley values of the response tokens, prompt fixed (Lundberg & Lee, 2017), by antithetic permutations."""
    from dense_rlhf.attribution.coalitions import permutation_shap

    return _additive("shap", lambda k: permutation_shap(k, params.permutations, params.seed), reward_model, rollout)


def lime(reward_model: RewardModel, rollout: Rollout, params: AttributionParams) -> Attribution:
    """A local weighted ridge regression on random removals, prompt fixed (Ribeiro et al., 2016)."""
    from dense_rlhf.attribution.coalitions import ridge_lime

    return _additive("lime", lambda k: ridge_lime(k, params.lime_samples, params.seed), reward_model, rollout)


def attribute(
    reward_model: RewardModel, rollout: Rollout, sources: Sequence[str], params: AttributionParams
) -> dict[str, Attribution]:
    """Explain every response of `rollout` by each source. Raises `InputError` for a source that is not known."""
    unknown = [s for s in sources if s not in SOURCES]
    if unknown:
        raise InputError(f"sources: {', '.join(map(repr, unknown))} not known, wanted some of {', '.join(SOURCES)}")
    done = {}
    for source in sources:
        start = time.perf_counter()
        done[source] = SOURCES[source](reward_model, rollout, params)
        done[source] = replace(done[source], seconds=time.perf_counter() - start)
    return done


SOURCES: dict[str, Callable[[RewardModel, Rollout, AttributionParams], Attribution]] = {
    "terminal": terminal,
    "uniform": uniform,
    "random": random,
    "attention": attention,
    "shap": shap,
    "lime": lime,
}
