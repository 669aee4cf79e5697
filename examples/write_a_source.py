"""Write a source of credit: a function from a rollout to an `Attribution`.

    python examples/write_a_source.py

A study trains on it by its Python path, `{sources: [write_a_source:surprisal]}`, where this file lies in the folder
from which the study runs. In a checkout, a line in `SOURCES` of `dense_rlhf/attribution/sources.py` gives it a name,
and the contract tests pick it up. This source pays the tokens that the reference policy found unlikely: a guess without
the reward model, to be compared with sources that use it.
"""

import argparse

from dense_rlhf.attribution import SOURCES, attribute
from dense_rlhf.attribution.agreement import known_credit, rank_agreement
from dense_rlhf.attribution.kinds import share
from dense_rlhf.config.params import AttributionParams, DataParams, PPOParams, RewardParams, RunParams
from dense_rlhf.models.reward_model import RewardModel
from dense_rlhf.training.task import load_task
from dense_rlhf.types import Attribution, Rollout


def surprisal(reward_model: RewardModel, rollout: Rollout, params: AttributionParams) -> Attribution:
    """The score, shared in proportion to each token's -log p under the reference."""
    nats = (1e-6 - rollout.ref_logprobs) * rollout.mask  # (B, T), above zero also where a token was certain
    return share("surprisal", rollout, nats / nats.sum(-1, keepdim=True))


SOURCES["surprisal"] = surprisal


def main(data: str | None = None, reward_steps: int = 500, responses: int = 64) -> dict[str, float]:
    ppo = PPOParams(rollouts=responses, minibatch=responses)
    task = load_task(RunParams(data=DataParams(path=data), reward=RewardParams(steps=reward_steps), ppo=ppo))
    rollout = task.rollout(task.reference, task.data.train_prompts[:responses], ppo, seed=0)
    attributions = attribute(task.reward_model, rollout, ["surprisal", "shap", "random"], AttributionParams())
    known = known_credit(task.gold, rollout, task.tokenizer)  # exact, as the gold judge is additive
    agreement = {}
    for name, attribution in attributions.items():
        rho = rank_agreement(attribution.credit, known, rollout.players)
        agreement[name] = float(rho[rho == rho].mean())  # NaN where all tokens of a response have the same credit
        print(f"{name:10s} {attribution.evaluations:6.1f} evaluations a response, agreement {agreement[name]:+.2f}")
    return agreement


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    main()
