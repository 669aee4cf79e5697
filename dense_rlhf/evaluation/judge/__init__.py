"""Judges of whole responses: which of two is better, or how good one is.

A judge compares (`Judge`) or also grades (`Grader`); `pairwise` asks it in both orders. `gold_judge` and `reward_judge`
use the study's own scores; `Endpoint` asks any chat model behind an OpenAI-compatible address.
"""

from dense_rlhf.evaluation.judge.endpoint import Endpoint, Failure
from dense_rlhf.evaluation.judge.interface import Grader, Judge, Pairwise, pairwise
from dense_rlhf.evaluation.judge.length_control import length_controlled
from dense_rlhf.evaluation.judge.scored import Scored, gold_judge, reward_judge, win_rate
from dense_rlhf.evaluation.judge.templates import NoVerdict, Question

__all__ = ["Endpoint", "Failure", "Grader", "Judge", "NoVerdict", "Pairwise", "Question", "Scored"]
__all__ += ["gold_judge", "length_controlled", "pairwise", "reward_judge", "win_rate"]
