"""trl's GRPO on token rewards: advantages of single tokens, and with sparse rewards those of whole responses."""

from functools import partial

import numpy as np
import pytest
import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from dense_rlhf.adapters import Scorer, dense_rewards
from dense_rlhf.adapters.trl import TokenGRPO, TokenRewards, no_reward
from dense_rlhf.types import InputError, RewardShape

SIGNED = RewardShape(("shap",), (1.0,), "signed")


@pytest.fixture
def rewards(reward_model):
    return TokenRewards(partial(dense_rewards, Scorer(reward_model.model, reward_model.tokenizer), shape=SIGNED))


@pytest.fixture
def batch(rollout):
    """A rollout as trl has it."""
    return {
        "prompt_ids": rollout.queries,
        "prompt_mask": rollout.query_mask.long(),
        "completion_ids": rollout.responses,
        "completion_mask": rollout.mask.long(),
    }


def test_each_row_has_the_rewards_of_its_tokens(rewards, batch, rollout):
    paid = rewards(batch)
    assert paid.shape == rollout.mask.shape and not paid[~rollout.mask].any()
    queries = [ids[keep] for ids, keep in zip(rollout.queries, rollout.query_mask)]
    responses = [ids[keep] for ids, keep in zip(rollout.responses, rollout.mask)]
    for row, keep, own in zip(paid, rollout.mask, rewards.rewards(queries, responses)):
        np.testing.assert_array_equal(row[keep].numpy(), own)


def test_completions_that_trl_masks_whole_earn_nothing(rewards, batch):
    batch["completion_mask"][1] = 0
    paid = rewards(batch)
    assert not paid[1].any() and paid[0].any()


def test_turns_of_tools_are_refused(rewards, batch):
    with pytest.raises(InputError, match="turns of tools"):
        rewards(batch | {"tool_mask": batch["completion_mask"]})


def trained(policy, tokenizer, folder, dense, reward=no_reward, scale="group"):
    config = GRPOConfig(
        str(folder),
        max_steps=1,
        scale_rewards=scale,
        num_generations=2,
        per_device_train_batch_size=4,
        max_completion_length=6,
        learning_rate=1e-3,
        use_cpu=not torch.cuda.is_available(),
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
    )
    prompts = Dataset.from_dict({"prompt": ["the film", "a", "what a waste of", "bad plot"]})
    trainer = TokenGRPO(policy.lm, reward, config, prompts, processing_class=tokenizer)
    trainer.dense = dense
    trainer.train()
    return trainer


def test_it_trains(policy, tokenizer, tmp_path, rewards):
    before = policy.lm.lm_head.weight.detach().clone()
    trainer = trained(policy, tokenizer, tmp_path, rewards)
    (batch,) = trainer._buffered_inputs
    mask = batch["completion_mask"].bool()
    assert batch["advantages"].shape == mask.shape and not batch["advantages"][~mask].any()
    assert batch["advantages"][mask].std() > 0
    assert not torch.equal(before, policy.lm.lm_head.weight)


def test_without_token_rewards_it_does_not_start(policy, tokenizer, tmp_path):
    with pytest.raises(InputError, match="trainer.dense is not set"):
        trained(policy, tokenizer, tmp_path, None)


@pytest.mark.parametrize("scale", ["group", "none"])
def test_sparse_rewards_give_trls_own_advantages(policy, tokenizer, tmp_path, monkeypatch, scale):
    kept, scores = {}, [0.3, 1.1, -0.7, 2.0]  # of two prompts' completions, whatever they are

    def recorded(trainer):
        plain = trainer._generate_and_score_completions

        def method(self, inputs):
            batch = plain(self, inputs)
            kept[trainer] = batch["advantages"].clone(), batch["completion_mask"].bool()  # trl shuffles them next
            return batch

        monkeypatch.setattr(trainer, "_generate_and_score_completions", method)

    def at_last(prompts, responses):
        return [[0.0] * (len(ids) - 1) + [score] for ids, score in zip(responses, scores, strict=True)]

    recorded(GRPOTrainer)
    recorded(TokenGRPO)
    trained(policy, tokenizer, tmp_path, TokenRewards(at_last), lambda **_: scores, scale)
    (theirs, mask), (ours, _) = kept[GRPOTrainer], kept[TokenGRPO]
    assert theirs.shape == (4,) and theirs.abs().min() > 0.3
    torch.testing.assert_close(ours, theirs[:, None] * mask, atol=1e-5, rtol=0)


def test_a_scale_over_the_whole_batch_is_refused(policy, tokenizer, tmp_path, rewards):
    with pytest.raises(InputError, match="scale_rewards is 'batch', wanted one of group, none"):
        trained(policy, tokenizer, tmp_path, rewards, scale="batch")
