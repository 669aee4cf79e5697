"""Judges that score each response alone: the higher score is preferred, and order cannot matter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dense_rlhf.evaluation.judge.interface import check_lengths
from dense_rlhf.types import InputError, Prompt

if TYPE_CHECKING:
    from dense_rlhf.models.reward_model import RewardModel
    from dense_rlhf.models.word_judge import AdditiveJudge


@dataclass(frozen=True)
class Scored:
    """A judge by scores in any unit. It does not grade: its scores are not from 1 to 10."""

    name: str
    score: Callable[[Sequence[Prompt], Sequence[str]], np.ndarray]  # (N,)

    def compare(self, instructions: Sequence[Prompt], first: Sequence[str], second: Sequence[str]) -> np.ndarray:
        check_lengths(instructions=instructions, first=first, second=second)
        return win_rate(self.score(instructions, first), self.score(instructions, second))


def gold_judge(gold: AdditiveJudge) -> Scored:
    """The sum of the words' scores in a response; the instruction is ignored."""
    return Scored(gold.name, lambda instructions, responses: np.array([gold.score(text) for text in responses]))


def reward_judge(model: RewardModel) -> Scored:
    """A reward model's scores for instruction and response, read as in its training on pairs."""
    from dense_rlhf.models.train_reward_model import text_readings

    def score(instructions: Sequence[Prompt], responses: Sequence[str]) -> np.ndarray:
        return model.score(text_readings(model, list(zip(instructions, responses)))).cpu().numpy()

    return Scored("reward model", score)


def win_rate(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """1 where our response to a prompt (N,) scores higher, 0 where lower, 1/2 for a tie; NaN where a score is NaN."""
    if len(ours) != len(theirs):
        raise InputError(f"{len(ours)} responses against {len(theirs)}; judge both policies on the same prompts")
    return (1 + np.sign(np.asarray(ours, float) - np.asarray(theirs, float))) / 2
