"""Tiny stand-ins for everything that costs time: a tokenizer, a policy, a reward model and one rollout of them."""

import csv
import math
import os
from pathlib import Path

import pytest
import torch
from on_device import PRETENDED, OnDevice, pretend
from transformers import LlamaConfig, LlamaForCausalLM

from dense_rlhf.config.params import PPOParams, RewardParams
from dense_rlhf.data import REVIEWS_MEMBER, REVIEWS_WHEEL
from dense_rlhf.files import wheel_member
from dense_rlhf.models import tiny_recipe
from dense_rlhf.models.policy import PolicyWithValue
from dense_rlhf.models.reward_model import RewardModel
from dense_rlhf.models.train_reward_model import fresh_classifier
from dense_rlhf.ppo.rollout import appraise, scored
from dense_rlhf.ppo.sampling import sample_responses
from dense_rlhf.training.dpo import ImplicitReward

DEVICE = os.environ.get("DENSE_RLHF_TEST_DEVICE", "cpu")  # cuda: models and tensors that the tests make are there
if DEVICE == str(PRETENDED):
    pretend()
if DEVICE != "cpu":
    OnDevice(DEVICE).__enter__()

TINY = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)  # of a transformer
SENTENCES = [
    "the film was good and the cast was great",
    "a bad plot and a worse ending, it was awful",
    "I loved the music; the story was slow but good",
    "what a waste of time, the acting was bad",
]
PROMPTS = ["the film", "a", "I loved the music of this", "what a waste of", "the story was slow but", "bad plot"]
RATIONALES = str(Path(__file__).parent / "attribution" / "rationales.jsonl")  # some of SENTENCES, with made-up marks
SHARED = Path(__file__).parent.parent.parent / "shared" / "data"


def jitter(model: torch.nn.Module, seed: int, scale: float = 0.15) -> torch.nn.Module:
    """Fresh weights are so small that a fresh model hardly reads its input: draw larger ones."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.normal_(0, scale, generator=generator)
    return model.eval().to(DEVICE)


def make_policy(tokenizer, seed: int = 0, eos_share: float = 0.2) -> LlamaForCausalLM:
    """A random two-layer policy whose output bias makes about `eos_share` of its tokens EOS."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        **TINY,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    lm = LlamaForCausalLM(config)
    lm.lm_head = torch.nn.Linear(16, len(tokenizer), bias=True)
    torch.nn.init.zeros_(lm.lm_head.bias)
    with torch.no_grad():
        lm.lm_head.bias[tokenizer.eos_token_id] = math.log(len(tokenizer) * eos_share)
    return jitter(lm, seed)


def reviews_file(path, every):
    """Write every so many-th review to `path`: a whole run then spends its time on the run, not on reading."""
    with open(wheel_member(*REVIEWS_WHEEL, REVIEWS_MEMBER), newline="", encoding="utf-8") as source:
        rows = list(csv.reader(source))
    with open(path, "w", newline="", encoding="utf-8") as target:
        csv.writer(target).writerows(rows[:1] + rows[1::every])
    return path


@pytest.fixture(scope="session")
def few_reviews(tmp_path_factory):
    return reviews_file(tmp_path_factory.mktemp("reviews") / "reviews.csv", every=10)


@pytest.fixture(scope="session")
def tokenizer():
    return tiny_recipe.train_tokenizer(SENTENCES, 300)


@pytest.fixture(scope="session")
def reference(tokenizer):
    return PolicyWithValue(make_policy(tokenizer)).requires_grad_(False).eval()


@pytest.fixture
def policy(tokenizer):
    """Trainable, fresh for each test, equal to `reference`."""
    return PolicyWithValue(make_policy(tokenizer))


@pytest.fixture(scope="session")
def reward_model(tokenizer, reference):
    """A random proxy; its implicit reward is another's, of a policy that nobody taught."""
    params = RewardParams(hidden=16, layers=2, heads=2)
    other = PolicyWithValue(make_policy(tokenizer, seed=9)).requires_grad_(False).eval()
    return RewardModel(
        jitter(fresh_classifier(params, tokenizer), seed=1), tokenizer, implicit=ImplicitReward(other, reference, 0.1)
    )


def make_rollout(policy, reference, reward_model, tokenizer, seed=3, T=8, temperature=1.0):
    generator = torch.Generator().manual_seed(seed)
    params = PPOParams(max_new_tokens=T, temperature=temperature)
    responses = scored(sample_responses(policy, PROMPTS, tokenizer, params, generator), reward_model)
    return appraise(policy, reference, responses, temperature)


@pytest.fixture(scope="session")
def rollout(reference, reward_model, tokenizer):
    """Uneven prompts and responses of 0 to 8 tokens before EOS, one without EOS; the policy is not the reference."""
    other = PolicyWithValue(make_policy(tokenizer, seed=7))
    with torch.no_grad():
        other.value_head.weight.normal_(0, 0.3, generator=torch.Generator().manual_seed(0))
    made = make_rollout(other, reference, reward_model, tokenizer, seed=4)
    assert {0, 1, 8} < set(made.players.sum(-1).tolist()) and made.ended.any() and not made.ended.all()
    assert made.query_mask.sum(-1).unique().numel() > 2
    return made
