"""Write a source of credit: a function from a rollout to an `Attribution`, and one line in the registry.

    python examples/write_a_source.py

In a checkout both go to the end of `dense_rlhf/attribution/sources.py`, and an arm `{sources: [surprisal]}` trains on
it; the contract tests pick it up. This one pays the tokens that the reference policy found unlikely: a guess that asks
the reward model nothing, to be held against sources that do.
"""

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
    found = attribute(task.reward_model, rollout, ["surprisal", "shap", "random"], AttributionParams())
    known = known_credit(task.gold, rollout, task.tokenizer)  # of an additive judge, so it is exact
    agreement = {}
    for name, one in found.items():
        rho = rank_agreement(one.credit, known, rollout.players)
        agreement[name] = float(rho[rho == rho].mean())  # NaN where a response ranks nothing
        print(f"{name:10s} {one.evaluations:6.1f} evaluations a response, agreement {agreement[name]:+.2f}")
    return agreement


if __name__ == "__main__":
    main()
