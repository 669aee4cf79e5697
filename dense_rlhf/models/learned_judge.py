"""A judge of another family than the additive ones: a transformer, of labels or pairs that the proxy never reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from transformers import PreTrainedTokenizerBase

from dense_rlhf.config.params import RewardParams
from dense_rlhf.models.language_models import LanguageModel, default_device
from dense_rlhf.models.reward_model import RewardModel
from dense_rlhf.models.train_reward_model import load_reward_model, text_readings
from dense_rlhf.types import LabelledText, PreferencePair, Prompt

SHAPE = dict(hidden=96, layers=1, heads=4, seed=1)  # not the proxy's


def judge_params(proxy: RewardParams) -> RewardParams:
    """How a judge learns next to this proxy: for as many steps, from all of its own examples, from another start.

    Where the proxy has the policy's first layers, the judge has its first one, and a head of its own.
    """
    if proxy.name == "policy":
        return replace(proxy, labels=1.0, layers=SHAPE["layers"], seed=SHAPE["seed"], dpo_steps=0)
    return RewardParams(steps=proxy.steps, **SHAPE)


@dataclass(frozen=True)
class LearnedJudge:
    """How much people like a text, or a reply to a prompt; learned from `examples` when first asked, then cached.

    Log-odds where it learned labels; where it learned pairs, a difference of two scores is one of log-odds. It shares
    no example with the proxy, but its family: a text that misleads small transformers may mislead both.
    """

    examples: list[LabelledText] | list[PreferencePair]
    policy: LanguageModel | PreTrainedTokenizerBase  # as `load_reward_model` wants it
    data_revision: str
    params: RewardParams = judge_params(RewardParams())

    @cached_property
    def model(self) -> RewardModel:
        """The trained classifier; its training leaves torch's random numbers as they were."""
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            model = load_reward_model(self.examples, self.policy, self.params, self.data_revision)
        model.model.to(default_device())
        return model

    def scores(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
        """Of each text: alone where the judge learned labels, as a reply to its prompt where it learned pairs."""
        read = prompts if isinstance(self.examples[0], PreferencePair) else [None] * len(texts)
        return self.model.score(text_readings(self.model, list(zip(read, texts, strict=True)))).tolist()
