"""PPO with per-token rewards: `ppo.make_learner`, `ppo.token_rewards`, `ppo.update`."""

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

__all__ = [
    "Batch",
    "Diverged",
    "Learner",
    "explained_variance",
    "gae",
    "kl_estimate",
    "make_learner",
    "policy_loss",
    "sequence_kl",
    "token_rewards",
    "update",
    "value_loss",
]
