"""Dense rewards for trainers of others: token ids in, a reward for each response token out."""

from dense_rlhf.adapters.rewards import Cost, Scorer, dense_rewards

__all__ = ["Cost", "Scorer", "dense_rewards"]
