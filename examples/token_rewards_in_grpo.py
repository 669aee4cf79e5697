"""Token rewards in your own trl GRPO run: an advantage for each token, `(B, T)`, in place of one for each response.

    python examples/token_rewards_in_grpo.py

The three lines with `TokenGRPO` and `TokenRewards` are what you would copy; the rest is a policy, a reward model and
prompts to run them on.
"""

import argparse
import tempfile
from functools import partial

import torch
from datasets import Dataset
from trl import GRPOConfig

from dense_rlhf.adapters import Scorer, dense_rewards
from dense_rlhf.adapters.trl import TokenGRPO, TokenRewards, no_reward
from dense_rlhf.config.params import DataParams, PolicyParams, RewardParams
from dense_rlhf.data import load_data
from dense_rlhf.models.language_models import load_policy
from dense_rlhf.models.train_reward_model import load_reward_model
from dense_rlhf.types import RewardShape


def main(data: str | None = None, reward_steps: int = 500, updates: int = 8) -> TokenGRPO:
    reviews, policy = load_data(DataParams(path=data)), load_policy(PolicyParams(name="tiny"))
    judge = load_reward_model(reviews.reward, policy.tokenizer, RewardParams(steps=reward_steps), reviews.revision)
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            folder,
            max_steps=updates,
            num_generations=4,
            per_device_train_batch_size=16,
            max_completion_length=16,
            learning_rate=1e-4,
            use_cpu=not torch.cuda.is_available(),
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
            logging_steps=1,
        )
        trainer = TokenGRPO(
            policy.model,
            no_reward,
            config,
            Dataset.from_dict({"prompt": reviews.train_prompts[:256]}),
            processing_class=policy.tokenizer,
        )
        scorer = Scorer(judge.model, judge.tokenizer, adds_end=True)
        shape = RewardShape(("shap",), (1.0,), "signed")
        trainer.dense = TokenRewards(partial(dense_rewards, scorer, shape=shape))
        trainer.train()
    return trainer


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    main()
