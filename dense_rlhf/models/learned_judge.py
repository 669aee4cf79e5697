"""A judge of another family than the additive ones: a small transformer, whose labels no other model learns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from transformers import PreTrainedTokenizerBase

from dense_rlhf.config.params import RewardParams
from dense_rlhf.models.language_models import default_device
from dense_rlhf.models.reward_model import RewardModel
from dense_rlhf.models.train_reward_model import load_reward_model, text_readings
from dense_rlhf.types import LabelledText

SHAPE = dict(hidden=96, layers=1, heads=4, seed=1)  # not the proxy's


@dataclass(frozen=True)
class LearnedJudge:
    """Log-odds that people like a text; learned from `examples` when first asked, then cached by content.

    It shares no label with the proxy, but its family: a text that misleads small transformers may mislead both.
    """

    examples: list[LabelledText]
    tokenizer: PreTrainedTokenizerBase
    data_revision: str
    steps: int = RewardParams.steps  # of its training

    @cached_property
    def model(self) -> RewardModel:
        """The trained classifier; its training leaves torch's random numbers as they were."""
        params = RewardParams(steps=self.steps, **SHAPE)
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            model = load_reward_model(self.examples, self.tokenizer, params, self.data_revision)
        model.model.to(default_device())
        return model

    def scores(self, texts: Sequence[str]) -> list[float]:
        """Log-odds of each text."""
        return self.model.score(text_readings(self.model, [(None, text) for text in texts])).tolist()
