"""Sources of credit outside the reward model: word lists, people's marks, a DPO policy's log-ratio."""

from __future__ import annotations

import torch
from torch import Tensor

from dense_rlhf.attribution.agreement import known_credit
from dense_rlhf.attribution.human_words import load_rationale_judge
from dense_rlhf.config.params import AttributionParams
from dense_rlhf.models.reward_model import RewardModel
from dense_rlhf.models.word_judge import AdditiveJudge, load_lexicon
from dense_rlhf.types import Attribution, InputError, Rollout


def lexicon(reward_model: RewardModel, rollout: Rollout, params: AttributionParams) -> Attribution:
    """How good people find each word by itself: VADER's valence, -4 to 4, spread evenly over its tokens.

    Not in score units. Does not use the reward model, and ignores negation and phrases.
    """
    return _by_words("lexicon", load_lexicon(), reward_model, rollout)


def rationale(reward_model: RewardModel, rollout: Rollout, params: AttributionParams) -> Attribution:
    """How people marked each word in other texts: its mean value in `rationale_path`, spread evenly over its tokens.

    In the unit of that file, shrunk where a word is rare, zero where it is missing. Does not use the reward model.
    Raises `InputError` without a file, or for a malformed one.
    """
    if params.rationale_path is None:
        raise InputError("rationale needs texts in which people marked words; set attribution.rationale_path to a file")
    return _by_words("rationale", load_rationale_judge(params.rationale_path), reward_model, rollout)


def _by_words(source: str, judge: AdditiveJudge, reward_model: RewardModel, rollout: Rollout) -> Attribution:
    tokenizer = reward_model.policy_tokenizer or reward_model.tokenizer
    return _in_other_units(source, known_credit(judge, rollout, tokenizer).to(rollout.scores), 0)


def log_ratio(reward_model: RewardModel, rollout: Rollout, params: AttributionParams) -> Attribution:
    """The implicit reward of a DPO policy: credit_t = beta (log pi_dpo - log pi_ref)(y_t | x, y_<t) (RTO, 2404.18922).

    Nats times beta. Runs the two policies, not the reward model; not complete, as the sum equals the score only up to
    a constant of the prompt and to what DPO has not learned. Raises `InputError` without a DPO policy.
    """
    if reward_model.implicit is None:
        raise InputError("log_ratio needs a policy trained by DPO, and there is none; set reward.dpo_steps above 0")
    credit = reward_model.implicit(rollout).to(rollout.scores).masked_fill(~rollout.players, 0)
    return _in_other_units("log_ratio", credit, 2)


def _in_other_units(source: str, credit: Tensor, evaluations: float) -> Attribution:
    zero = credit.new_zeros(len(credit))
    return Attribution(source, credit, zero, zero + torch.nan, evaluations, 0.0)
