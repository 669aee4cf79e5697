"""The kinds of source: linear in coalition scores, a function imported when used, or a share of the score."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from dense_rlhf.config.params import AttributionParams
from dense_rlhf.types import Attribution, Rollout

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from dense_rlhf.attribution.coalitions import Design, Estimate
    from dense_rlhf.models.reward_model import RewardModel


@dataclass(frozen=True)
class Designed:
    """A source that is linear in coalition scores: a function that makes its design, and its arguments after k."""

    function: str
    arguments: Callable[[int, AttributionParams], tuple]
    complete: bool = False
    module: str = "dense_rlhf.attribution.coalitions"

    def design(self, k: int, params: AttributionParams) -> Design:
        """The coalitions of k players and the operator on their scores."""
        return getattr(import_module(self.module), self.function)(k, *self.arguments(k, params))

    def estimate(self, k: int, params: AttributionParams, scores: np.ndarray) -> Estimate:
        """The credit of k players from the scores (m,) of the design's coalitions."""
        from dense_rlhf.attribution.coalitions import Estimate

        return Estimate(self.design(k, params).operator.numpy() @ scores)


@dataclass(frozen=True)
class Gaussian(Designed):
    """The source that knows how sure it is."""

    module: str = "dense_rlhf.attribution.gaussian"

    def estimate(self, k: int, params: AttributionParams, scores: np.ndarray) -> Estimate:
        from dense_rlhf.attribution.gaussian import drawn

        return drawn(k, *self.arguments(k, params))(scores)


@dataclass(frozen=True)
class Internal:
    """A source that needs torch or more: the function at `module:function`, imported when used."""

    place: str

    def __call__(self, reward_model: RewardModel, rollout: Rollout, params: AttributionParams) -> Attribution:
        from dense_rlhf.models.language_models import within_memory

        module, _, function = self.place.partition(":")
        with within_memory(f"{function} explains", "reward.token_budget"):
            return getattr(import_module(module), function)(reward_model, rollout, params)


def share(source: str, rollout: Rollout, weights: Tensor, evaluations: float = 0) -> Attribution:
    """A distribution over the response (B, T), times the score: complete against a baseline of zero."""
    credit = (weights * rollout.scores[:, None]).masked_fill(~rollout.mask, 0)
    gap = rollout.scores - credit.sum(-1)
    return Attribution(source, credit, gap.new_zeros(gap.shape), gap, evaluations, 0.0, complete=True, is_share=True)
