"""Our PPO against TRL's: the PPOTrainer of TRL 1.12.0 as recorded in parity/golden.npz, and today's GRPO loss."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

from dense_rlhf import ppo
from dense_rlhf.config.params import PPOParams
from dense_rlhf.models.policy import PolicyWithValue
from dense_rlhf.shaping.masked import masked_whiten
from dense_rlhf.types import Rollout

PAD, EOS = 0, 1
CLOSE = {"atol": 1e-5, "rtol": 0}
FULL, EARLY = ("sparse", "dense"), ("early_eos", "k3")  # responses that all reach T, responses that stop at EOS
close = torch.testing.assert_close


@pytest.fixture(scope="module")
def golden():
    cases = {}
    with np.load(Path(__file__).parent / "parity" / "golden.npz") as file:
        for path in file:
            case, _, name = path.partition("/")
            array = file[path]
            cases.setdefault(case, {})[name] = json.loads(str(array)) if name == "settings" else torch.tensor(array)
    return cases


def params_of(settings):
    return PPOParams(
        updates=3,
        rollouts=8,
        max_new_tokens=settings["response_length"],
        temperature=settings["temperature"],
        epochs=settings["num_ppo_epochs"],
        minibatch=8,
        lr=settings["learning_rate"],
        kl_coef=settings["kl_coef"],
        kl_estimator=settings.get("kl_estimator", "k1"),
        gamma=settings["gamma"],
        lam=settings["lam"],
        clip=settings["cliprange"],
        value_clip=settings["cliprange_value"],
        value_coef=settings["vf_coef"],
        max_grad_norm=1e9,
        missing_eos_penalty=settings.get("missing_eos_penalty", 0.0),
    )


def rollouts_of(case):
    """Our rollouts of TRL's: its scores have the missing-EOS penalty in them already."""
    penalty = case["settings"].get("missing_eos_penalty", 0.0)
    for u, mask in enumerate(case["mask"]):
        kept = {name: case[name][u].masked_fill(~mask, 0) for name in ("logprobs", "ref_logprobs", "values")}
        queries, responses = case["queries"][u], case["responses"][u]
        ended = (responses == EOS).any(-1)
        scores = case["scores"][u] + penalty * ~ended
        yield Rollout(queries, queries != PAD, responses, mask, scores=scores, ended=ended, **kept)


def at_the_end(scores, mask):
    """`scores` (B,) on the last true position of `mask` (B, T), zero elsewhere."""
    return F.one_hot(mask.sum(-1) - 1, mask.shape[1]) * scores[:, None]


def shaped_of(case, u, rollout):
    return case["shaped"][u] if "shaped" in case else at_the_end(rollout.scores, rollout.mask)


# ---------------------------------------------------------------------------------------------------- full responses


@pytest.mark.parametrize("name", FULL)
def test_rewards_plain_and_whitened_are_those_of_trl(name, golden):
    case = golden[name]
    params = params_of(case["settings"])
    for u, rollout in enumerate(rollouts_of(case)):
        close(ppo.token_rewards(rollout, shaped_of(case, u, rollout), params), case["rewards"][u], **CLOSE)
        white = ppo.token_rewards(rollout, shaped_of(case, u, rollout), replace(params, whiten_rewards=True))
        close(white, case["whitened_rewards"][u], **CLOSE)


@pytest.mark.parametrize("name", FULL)
def test_advantages_and_returns_are_those_of_trl(name, golden):
    case = golden[name]
    for rewards, values, mask, u in zip(case["rewards"], case["values"], case["mask"], range(3)):
        advantages = ppo.gae(rewards, values, mask, case["settings"]["gamma"], case["settings"]["lam"])
        close(advantages, case["advantages"][u], **CLOSE)
        close(advantages + values, case["returns"][u], **CLOSE)
        close(masked_whiten(advantages, mask), case["white"][u], **CLOSE)


@pytest.mark.parametrize("name", FULL + EARLY)
def test_losses_of_each_pass_are_those_of_trl(name, golden):
    """Where responses stop at EOS, TRL's value loss has one more position a response."""
    case = golden[name]
    settings, mask, longer = case["settings"], case["mask"], case["value_mask"]
    assert case["pg_clipfrac"][:, 1].min() > 0 and case["vf_clipfrac"].max() > 0  # both clips bind in the second pass
    for u in range(len(mask)):
        for p in range(2):
            new, values = case["new_logprobs"][u, p], case["vpred"][u, p]
            loss, cut = ppo.policy_loss(new, case["logprobs"][u], case["white"][u], mask[u], settings["cliprange"])
            close(loss / mask[u].sum(), case["pg_loss"][u, p], **CLOSE)
            close(cut / mask[u].sum(), case["pg_clipfrac"][u, p], **CLOSE)
            loss = ppo.value_loss(values, case["values"][u], case["returns"][u], longer[u], settings["cliprange_value"])
            close(loss / longer[u].sum(), case["vf_loss"][u, p], **CLOSE)


# ---------------------------------------------------------------------------------------------------- early EOS


@pytest.mark.parametrize("name", EARLY)
def test_with_values_one_step_longer_rewards_and_advantages_are_those_of_trl(name, golden):
    case = golden[name]
    settings, params, longer = case["settings"], params_of(case["settings"]), case["value_mask"][0]
    (rollout,) = rollouts_of(case)
    assert (longer.sum(-1) - rollout.mask.sum(-1)).unique().tolist() == [0, 1]
    rewards = ppo.token_rewards(rollout, torch.zeros(rollout.mask.shape), params) + at_the_end(rollout.scores, longer)
    close(rewards, case["rewards"][0], **CLOSE)
    advantages = ppo.gae(rewards, case["values"][0], longer, settings["gamma"], settings["lam"])
    close(advantages, case["advantages"][0], **CLOSE)
    close(masked_whiten(advantages, rollout.mask), case["white"][0].masked_fill(~rollout.mask, 0), **CLOSE)


def test_trl_puts_the_score_one_token_after_eos_and_we_put_it_on_eos(golden):
    case = golden["early_eos"]
    (rollout,) = rollouts_of(case)
    ours = ppo.token_rewards(rollout, at_the_end(rollout.scores, rollout.mask), params_of(case["settings"]))
    early = rollout.mask.sum(-1) < rollout.mask.shape[1]
    difference = case["rewards"][0] - ours
    moved = F.pad(at_the_end(rollout.scores, rollout.mask), (1, 0))[:, :-1] - at_the_end(rollout.scores, rollout.mask)
    close(difference, moved * early[:, None], **CLOSE)


@pytest.mark.parametrize("lam", [0.9, 0.5, 1.0])
def test_the_score_after_eos_biases_advantages_by_the_value_after_eos(lam, golden):
    """At gamma 1 by lam^k (1 - lam) (V after EOS - score), k tokens before EOS; by nothing at lam 1."""
    case = golden["early_eos"]
    (rollout,), rewards, values = rollouts_of(case), case["rewards"][0], case["values"][0]
    ours = ppo.token_rewards(rollout, at_the_end(rollout.scores, rollout.mask), params_of(case["settings"]))
    ours = ppo.gae(ours, rollout.values, rollout.mask, 1, lam)
    trl = ppo.gae(rewards, values, case["value_mask"][0], 1, lam)
    if lam == case["settings"]["lam"]:
        close(trl, case["advantages"][0], **CLOSE)
    lengths, T = rollout.mask.sum(-1), rollout.mask.shape[1]
    after = F.pad(values, (0, 1)).gather(-1, lengths[:, None])  # V after EOS
    before = (lengths[:, None] - 1 - torch.arange(T)).clamp(min=0)
    bias = lam**before * (1 - lam) * (after - rollout.scores[:, None]) * (lengths < T)[:, None]
    close((trl - ours).masked_fill(~rollout.mask, 0), bias.masked_fill(~rollout.mask, 0), **CLOSE)


# ---------------------------------------------------------------------------------------------------- updates


def learner_of(golden, settings):
    """The policy and the critic that PPOTrainer began with, and its optimizer."""
    initial, kl_coef = golden["initial"], settings["kl_coef"]
    config = LlamaConfig(**initial["settings"])
    lm = LlamaForCausalLM(config)
    lm.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
    policy = PolicyWithValue(lm, critic="separate", value_trunk=LlamaModel(config))
    vector_to_parameters(initial["policy"].clone(), lm.parameters())
    vector_to_parameters(initial["value_model"].clone(), critic(policy))
    optimizer = torch.optim.AdamW(
        policy.parameters(), settings["learning_rate"], eps=settings["adam_epsilon"], weight_decay=0
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: 1 - update / 3)
    return ppo.Learner(policy, optimizer, schedule, torch.Generator(), kl_coef)


def critic(policy):
    return [*policy.value_trunk.parameters(), *policy.value_head.parameters()]


@pytest.mark.parametrize("name", FULL + EARLY)
def test_log_probabilities_and_values_of_our_forward_are_those_of_trls_sampler(name, golden):
    case = golden[name]
    policy, rollout = learner_of(golden, case["settings"]).policy, next(rollouts_of(case))
    assert rollout.query_mask.sum(-1).unique().numel() > 2  # padding on the left
    with torch.no_grad():
        logprobs, values, _ = policy(rollout, case["settings"]["temperature"])
    close(logprobs, rollout.logprobs, **CLOSE)
    close(values, rollout.values, **CLOSE)


@pytest.mark.parametrize("name", FULL)
def test_updates_on_the_rollouts_of_trl_end_in_its_weights(name, golden):
    case = golden[name]
    params, learner = params_of(case["settings"]), learner_of(golden, case["settings"])
    for u, rollout in enumerate(rollouts_of(case)):
        rewards = ppo.token_rewards(rollout, shaped_of(case, u, rollout), params)
        log = ppo.update(learner, rollout, rewards, params)
        close(log["policy_loss"], case["pg_loss"][u].mean().item(), **CLOSE)
        close(log["value_loss"], case["vf_loss"][u].mean().item(), **CLOSE)
    for ours, model in ((learner.policy.lm.parameters(), "policy"), (critic(learner.policy), "value_model")):
        moved = (case[model] - golden["initial"][model]).abs()
        assert moved.median() > 5e-3
        close(parameters_to_vector(ours), case[model], **CLOSE)


def test_every_mini_batch_is_a_step_with_us_and_every_pass_with_trl(golden):
    """Two passes of two mini-batches. On the last batch of its data TRL steps after every micro-batch."""
    assert golden["mini_batches"]["steps"].tolist() == [2, 4]
    case, steps = golden["sparse"], []
    learner, rollout = learner_of(golden, case["settings"]), next(rollouts_of(case))
    learner.optimizer.register_step_post_hook(lambda *_: steps.append(1))
    params = replace(params_of(case["settings"]), minibatch=4)
    ppo.update(learner, rollout, at_the_end(rollout.scores, rollout.mask), params)
    assert len(steps) == 4


# ---------------------------------------------------------------------------------------------------- the GRPO loss


def grpo_trainer(lm, tokenizer, folder):
    """A GRPOTrainer whose loss should be PPO's: clipped, without KL term, its mean over tokens."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    args = GRPOConfig(
        folder,
        loss_type="bnpo",
        beta=0.0,
        epsilon=0.2,
        temperature=0.7,
        num_generations=2,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
    )
    data = Dataset.from_dict({"prompt": ["the film"] * 8})
    trainer = GRPOTrainer(lm, lambda completions, **_: [0.0] * len(completions), args, data, processing_class=tokenizer)
    trainer.model.eval()
    return trainer


def test_loss_and_gradient_are_those_of_trl_grpo_with_an_advantage_for_each_token(policy, rollout, tokenizer, tmp_path):
    with torch.no_grad():
        policy.lm.lm_head.bias[tokenizer.pad_token_id] = -1e4  # trl leaves padding in the softmax
        logprobs = policy(rollout, 0.7)[0]
    noise, advantages = torch.randn(2, *rollout.mask.shape, generator=torch.Generator().manual_seed(0))
    old, mask = logprobs + 0.3 * noise, rollout.mask
    twin = copy.deepcopy(policy.lm)
    theirs = grpo_trainer(twin, tokenizer, str(tmp_path))._compute_loss(
        twin,
        {
            "prompt_ids": rollout.queries,
            "prompt_mask": rollout.query_mask.long(),
            "completion_ids": rollout.responses,
            "completion_mask": mask.long(),
            "advantages": advantages,
            "old_per_token_logps": old,
        },
    )
    theirs.backward()
    total, cut = ppo.policy_loss(policy(rollout, 0.7)[0], old, advantages, mask, 0.2)
    (total / mask.sum()).backward()
    assert 0 < cut < mask.sum()
    close(total / mask.sum(), theirs, **CLOSE)
    for (name, ours), peer in zip(policy.lm.named_parameters(), twin.parameters()):
        close(ours.grad, peer.grad, **CLOSE, msg=name)
