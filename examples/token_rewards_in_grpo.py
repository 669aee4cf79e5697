"""Token rewards in your own trl GRPO run: an advantage for each token, `(B, T)`, in place of one for each response.

    python examples/token_rewards_in_grpo.py

GRPO whitens summed rewards, so it cannot see where in a response a reward was paid; its loss can, where a subclass of
the trainer gives it the numbers. `TokenGRPO` and `token_rewards` are what you would copy; the rest is a policy, a
reward model and prompts to run them on.
"""

import argparse
import tempfile

import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from dense_rlhf.attribution import attribute
from dense_rlhf.config.params import AttributionParams, DataParams, PolicyParams, RewardParams
from dense_rlhf.data import load_data
from dense_rlhf.models.language_models import load_policy
from dense_rlhf.models.reward_model import RewardModel
from dense_rlhf.models.train_reward_model import load_reward_model
from dense_rlhf.ppo.rollout import scored
from dense_rlhf.shaping.rewards import shape_rewards
from dense_rlhf.training.baselines import normalised_to_go
from dense_rlhf.types import Responses, RewardShape

SHAPE = RewardShape(("shap",), (1.0,), "signed")


def token_rewards(judge: RewardModel, batch: dict[str, torch.Tensor], eos: int) -> torch.Tensor:
    """Rewards (B, T) of a batch as trl has it: signed Shapley values, which sum to the reward model's score."""
    ids, mask = batch["completion_ids"], batch["completion_mask"].bool()
    ended = ids.gather(1, mask.sum(-1, keepdim=True) - 1).squeeze(1) == eos
    unscored = Responses(batch["prompt_ids"], batch["prompt_mask"].bool(), ids, mask, torch.zeros(len(ids)), ended)
    responses = scored(unscored, judge)
    return shape_rewards(responses, attribute(judge, responses, SHAPE.sources, AttributionParams()), SHAPE)


class TokenGRPO(GRPOTrainer):
    """GRPO whose advantages come from rewards of single tokens."""

    judge: RewardModel

    def _generate_and_score_completions(self, inputs):
        batch = super()._generate_and_score_completions(inputs)
        rewards = token_rewards(self.judge, batch, self.processing_class.eos_token_id)
        mask = batch["completion_mask"].bool()
        batch["advantages"] = normalised_to_go(rewards, mask, self.num_generations, gamma=1.0)
        return batch


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
            lambda completions, **_: [0.0] * len(completions),  # trl requires one; token rewards come later
            config,
            Dataset.from_dict({"prompt": reviews.train_prompts[:256]}),
            processing_class=policy.tokenizer,
        )
        trainer.judge = judge
        trainer.train()
    return trainer


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    main()
