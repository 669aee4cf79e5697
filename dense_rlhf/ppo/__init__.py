"""PPO with token rewards: `make_learner`; then in turn `sample_responses`, `appraise`, `token_rewards`, `update`."""

from dense_rlhf.ppo.learner import Batch, Diverged, Learner, make_learner, update
from dense_rlhf.ppo.losses import (
    explained_variance,
    gae,
    kl_estimate,
    policy_loss,
    sequence_kl,
    token_rewards,
    value_loss,
)
from dense_rlhf.ppo.rollout import appraise
from dense_rlhf.ppo.sampling import sample_responses

__all__ = ["Batch", "Diverged", "Learner", "appraise", "explained_variance", "gae", "kl_estimate", "make_learner"]
__all__ += ["policy_loss", "sample_responses", "sequence_kl", "token_rewards", "update", "value_loss"]
