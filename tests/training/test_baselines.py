"""Baselines by trl: each learns, each leaves all else as it was, and summed returns cannot see a dense reward."""

import copy
import random
import tempfile
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from conftest import PROMPTS, make_policy

from dense_rlhf import ppo
from dense_rlhf.config.params import AttributionParams, PolicyParams, PPOParams
from dense_rlhf.data import Dataset
from dense_rlhf.evaluation.arms import judge_against_reference
from dense_rlhf.models.language_models import LanguageModel
from dense_rlhf.models.policy import PolicyWithValue
from dense_rlhf.models.word_judge import AdditiveJudge
from dense_rlhf.ppo.sampling import encode_prompts, prompt_batches
from dense_rlhf.training import baselines, dpo
from dense_rlhf.training.baselines import BASELINES, best_of_n, leave_one_out_to_go, normalised_to_go, train_baseline
from dense_rlhf.training.evaluate import evaluate
from dense_rlhf.training.inner_loop import Recipe, train_policy
from dense_rlhf.training.task import Task
from dense_rlhf.types import InputError, LabelledText, Message, RewardShape

PARAMS = PPOParams(updates=3, rollouts=8, max_new_tokens=6, minibatch=4, lr=1e-2)
EXPLAIN = AttributionParams(lime_samples=8)
SPARSE = RewardShape(("terminal",), (1.0,))
MIXED = RewardShape(("shap", "uniform", "terminal"), (0.5, 0.25, 0.25), "signed")
SHAPES = [SPARSE, MIXED, RewardShape(("shap",), (1.0,)), RewardShape(("random",), (1.0,))]
SUMMED, TO_GO = ("rloo", "grpo"), ("rloo_to_go", "grpo_to_go")


def make_task(tokenizer, reward_model, lm):
    text = [LabelledText("the film was good", 1)]
    data = Dataset("inline", "r0", text, text, PROMPTS * 3, PROMPTS[:4], text)
    judge = AdditiveJudge("gold", {chr(c): c / 1000 for c in range(97, 123)})
    reference = PolicyWithValue(copy.deepcopy(lm)).requires_grad_(False).eval()
    return Task(data, LanguageModel(lm, tokenizer, "m0"), reference, reward_model, judge, judge, PolicyParams())


@pytest.fixture(scope="module")
def task(tokenizer, reward_model):
    """Prompts of many lengths, and responses too."""
    return make_task(tokenizer, reward_model, make_policy(tokenizer))


def train(task, name, shape=SPARSE, params=PARAMS, seed=0, **kwargs):
    return train_baseline(task, name, Recipe(shape, params, EXPLAIN, seed), **{"group": 2} | kwargs)


@pytest.fixture
def batches(monkeypatch):
    """What the trainers put together for their loss: a rollout and trl's batch, an update."""
    seen, whole = [], baselines.OnRollouts._generate_and_score_completions

    def spy(self, inputs):
        batch = whole(self, inputs)
        seen.append((self.run.rollout, batch))
        return batch

    monkeypatch.setattr(baselines.OnRollouts, "_generate_and_score_completions", spy)
    return seen


# ---------------------------------------------------------------------------------------------------- contract


@pytest.fixture(scope="module")
def ours(task):
    return train_policy(task, Recipe(MIXED, PARAMS, EXPLAIN, 0))


@pytest.mark.parametrize("name", BASELINES)
def test_contract(task, ours, name):
    first, again, other = (train(task, name, MIXED, seed=seed) for seed in (0, 0, 1))
    pd.testing.assert_frame_equal(first.history, again.history, check_exact=True)
    assert not first.history["proxy"].equals(other.history["proxy"])
    assert np.isfinite(first.history.to_numpy()).all()
    assert set(first.history) <= set(ours.history) and list(first.seconds) == list(ours.seconds)
    assert {"update", "proxy", "gold", "kl", "length"} <= set(first.history)
    assert first.history["kl"][0] == pytest.approx(0, abs=1e-5)
    assert not torch.equal(first.policy.lm.lm_head.weight, task.reference.lm.lm_head.weight)
    assert judge_against_reference(task, first.policy, PROMPTS, PARAMS, 0)["kl"].abs().max() > 1e-3
    if name != "dpo":
        assert first.history["update"].tolist() == first.seconds["update"].tolist() == [0, 1, 2]
        assert (first.seconds.iloc[:, 1:] > 0).all(axis=None)


@pytest.mark.parametrize("name", BASELINES)
def test_nothing_else_changes(task, name, tmp_path, monkeypatch, capfd, recwarn, caplog):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    frozen = copy.deepcopy((task.reference.state_dict(), task.language_model.model.state_dict()))
    settings = copy.deepcopy((task.reference.lm.config.to_dict(), task.tokenizer.init_kwargs, vars(PartialState())))
    accelerated = dict(AcceleratorState._shared_state)  # whatever another test left
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    expected = torch.rand(1), np.random.rand(), random.random()
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    capfd.readouterr()
    trained = train(task, name)
    assert capfd.readouterr() == ("", "") and not recwarn.list and not caplog.records
    assert not list(tmp_path.iterdir())
    assert (torch.rand(1), np.random.rand(), random.random()) == expected
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    assert settings == (task.reference.lm.config.to_dict(), task.tokenizer.init_kwargs, vars(PartialState()))
    assert AcceleratorState._shared_state == accelerated
    for before, model in zip(frozen, (task.reference, task.language_model.model)):
        assert all(torch.equal(before[key], weight) for key, weight in model.state_dict().items())
    assert not any("forward" in vars(p.lm) for p in (trained.policy, task.reference))
    assert not trained.policy.training and not task.reference.training
    copied = copy.deepcopy(lm := trained.policy.lm)  # trl leaves a forward bound to the model that it trained
    ids = torch.arange(5)[None]
    with torch.no_grad():
        logits = lm(ids).logits
        lm.lm_head.weight.zero_()
        assert torch.equal(copied(ids).logits, logits)


def test_wrong_arguments(task):
    with pytest.raises(InputError, match="wanted one of rloo, grpo"):
        train(task, "ppo")
    for group in (1, 3):
        with pytest.raises(InputError, match=f"group is {group}"):
            train(task, "rloo", group=group)
    with pytest.raises(InputError, match="kl_coef"):
        train(task, "dpo", params=replace(PARAMS, kl_coef=0.0))
    with pytest.raises(InputError, match="n is 0"):
        best_of_n(task, PROMPTS, PARAMS, 0, 0)


@pytest.mark.parametrize("name", SUMMED)
def test_progress_sees_the_updates_and_can_cancel(task, name):
    seen = []

    def progress(steps, stop=None):
        for step in steps:
            if step == stop:
                raise KeyboardInterrupt
            seen.append(step)
            yield step
        seen.append("closed")

    train(task, name, progress=progress)
    assert seen == [0, 1, 2, "closed"]
    with pytest.raises(KeyboardInterrupt):
        train(task, name, progress=lambda steps: progress(steps, stop=1))
    assert seen[4:] == [0]


# ---------------------------------------------------------------------------------------------------- what trl is given


@pytest.mark.parametrize("name", SUMMED + TO_GO)
def test_trl_trains_on_our_rollouts(task, name, batches):
    """Token ids with EOS, prompts without special tokens, log-probabilities where trl asks for them, group by group."""
    params = replace(PARAMS, epochs=2)
    train(task, name, params=params, seed=1)
    asked = prompt_batches(task.data.train_prompts, 4, seed=1)
    for rollout, batch in batches:
        wanted = encode_prompts([prompt for prompt in next(asked) for _ in range(2)], task.tokenizer)[0]
        assert torch.equal(rollout.queries, wanted)
        T = batch["completion_ids"].shape[1]
        assert torch.equal(batch["completion_mask"].bool(), rollout.mask[:, :T]) and not rollout.mask[:, T:].any()
        assert torch.equal(batch["completion_ids"], rollout.responses[:, :T])
        assert torch.equal(batch["prompt_ids"], rollout.queries)
        assert torch.equal(batch["prompt_mask"].bool(), rollout.query_mask)
        assert torch.equal(rollout.queries[::2], rollout.queries[1::2])
        if name == "rloo":
            assert torch.equal(batch["old_logps"], rollout.logprobs.sum(-1))
        else:
            assert torch.equal(batch["old_per_token_logps"], rollout.logprobs[:, :T])
        if name.startswith("grpo"):
            assert torch.equal(batch["ref_per_token_logps"], rollout.ref_logprobs[:, :T])
    first = batches[0][0]
    prompts = [task.tokenizer.decode(ids[keep].tolist()) for ids, keep in zip(first.queries, first.query_mask)]
    ours = task.scored_responses(
        task.reference, prompts, params, seed=100_003
    )  # of the first update of PPO with this seed
    assert torch.equal(first.responses, ours.responses)
    assert len(batches) == 3 and any(rollout.ended.any() for rollout, _ in batches)
    assert batches[0][0].query_mask.sum(-1).unique().numel() > 1


def test_dialogues_come_back_from_trl_as_dialogues(task, monkeypatch):
    """A reward model with a template of its own reads their turns, not the policy's rendering."""
    dialogues = [(Message("user", f"film {n}"),) for n in range(8)]
    chatty = replace(task, data=replace(task.data, train_prompts=dialogues))
    run = baselines.Run(chatty, Recipe(SPARSE, PARAMS, EXPLAIN, 0), group=2)
    asked = []
    monkeypatch.setattr(baselines, "collect", lambda task, learner, recipe, prompts, *_: asked.extend(prompts) or 1 / 0)
    texts = run.prompts()
    assert all(isinstance(text, str) and text.startswith("\n\nHuman: film ") for text in texts)
    with pytest.raises(ZeroDivisionError):
        run.collect(texts[:4])
    assert asked == [next(d for d in dialogues if f"{d[0].content}\n" in text) for text in texts[:4]]


@pytest.mark.parametrize("name", SUMMED + TO_GO)
def test_the_first_ratio_is_one(task, name):
    """Log-probabilities of the loss are the rollout's, whatever padding and order of rows trl trains on."""
    params = replace(PARAMS, minibatch=8, epochs=1, clip=1e-5)
    assert train(task, name, MIXED, params).history["clipped"].tolist() == [0, 0, 0]
    assert train(task, name, MIXED, replace(params, updates=1, minibatch=4, lr=1e-4)).history["clipped"].max() > 0


def rates(task, name, params, monkeypatch):
    """The learning rate and the KL coefficient of each update, as the rollout is drawn."""
    seen, collect = [], baselines.Run.collect

    def spy(self, prompts):
        collect(self, prompts)
        seen.append((self.learner.optimizer.param_groups[0]["lr"], self.learner.kl_coef))

    monkeypatch.setattr(baselines.Run, "collect", spy)
    return train(task, name, params=params).history, seen


@pytest.mark.parametrize("name", SUMMED)
def test_rate_and_kl_coefficient_move_as_in_ppo(task, name, monkeypatch, batches):
    params = replace(PARAMS, epochs=2, kl_target=1e-3, kl_horizon=10.0)
    history, seen = rates(task, name, params, monkeypatch)
    assert [lr for lr, _ in seen] == pytest.approx([1e-2, 0.7e-2, 0.4e-2])
    wanted = [0.05]
    for kl in history["kl"][:2]:
        wanted.append(wanted[-1] * (1 + min(max(kl / 1e-3 - 1, -0.2), 0.2) * 8 / 10))
    assert history["kl_coef"].tolist() == pytest.approx(wanted) and len(set(wanted)) == 3


@pytest.mark.parametrize("name", SUMMED)
def test_gradients_are_clipped(task, name):
    """Far under AdamW's epsilon there is no step."""
    trained = train(task, name, params=replace(PARAMS, updates=1, max_grad_norm=1e-9)).policy
    assert torch.allclose(trained.lm.lm_head.weight, task.reference.lm.lm_head.weight, atol=1e-5)


@pytest.mark.parametrize("name", SUMMED + TO_GO)
def test_micro_batches_change_nothing(task, name):
    whole, split = (
        train(task, name, MIXED, replace(PARAMS, updates=2, lr=1e-3, micro_batch=n)).policy for n in (64, 2)
    )
    for a, b in zip(whole.parameters(), split.parameters()):
        assert torch.allclose(a, b, atol=2e-5)


@pytest.mark.parametrize("name", SUMMED)
def test_advantages_of_trl(task, name, batches):
    """RLOO: score less KL against the others' mean; GRPO: whitened score."""
    train(task, name, MIXED, replace(PARAMS, kl_coef=0.5), group=4)
    for rollout, batch in batches:
        scores = rollout.scores - (0.5 * ppo.sequence_kl(rollout) if name == "rloo" else 0)
        for rows, advantages in zip(scores.split(4), batch["advantages"].split(4)):
            others = (rows.sum() - rows) / 3
            wanted = rows - others if name == "rloo" else (rows - rows.mean()) / (rows.std() + 1e-4)
            assert torch.allclose(advantages, wanted, atol=1e-5)
    assert ppo.sequence_kl(batches[-1][0]).abs().max() > 0.1


@pytest.mark.parametrize("name", TO_GO)
def test_advantages_to_go_reach_the_loss(task, name, batches):
    train(task, name, SPARSE, replace(PARAMS, kl_coef=0.5, missing_eos_penalty=1.0))
    for rollout, batch in batches:
        rewards = torch.zeros_like(rollout.logprobs)
        rewards[range(8), rollout.mask.sum(-1) - 1] = rollout.scores - 1.0 * ~rollout.ended
        if name == "rloo_to_go":
            rewards -= 0.5 * (rollout.logprobs - rollout.ref_logprobs)
        estimate = leave_one_out_to_go if name == "rloo_to_go" else normalised_to_go
        wanted = estimate(rewards, rollout.mask, 2, 1.0)[:, : batch["advantages"].shape[1]]
        assert torch.allclose(batch["advantages"], wanted, atol=1e-5)


# ---------------------------------------------------------------------------------------------------- dense rewards


@pytest.mark.parametrize("name", SUMMED)
def test_summed_returns_cannot_see_where_reward_is(task, name, batches):
    """Hazard 4: the same advantages, update by update, and so the same policy, for every shape that keeps sums."""
    trained = [train(task, name, shape, replace(PARAMS, lr=1e-3)) for shape in SHAPES]
    sparse = batches[:3]
    for start in (3, 6, 9):
        for (_, dense), (_, plain) in zip(batches[start : start + 3], sparse):
            assert torch.allclose(dense["advantages"], plain["advantages"], atol=1e-4)
    for other in trained[1:]:
        assert torch.allclose(other.policy.lm.lm_head.weight, trained[0].policy.lm.lm_head.weight, atol=1e-4)


@pytest.mark.parametrize("name", TO_GO)
def test_rewards_to_go_see_where_reward_is(task, name, batches):
    for shape in SHAPES:
        train(task, name, shape, replace(PARAMS, updates=1))
    plain = batches[0][1]["advantages"]
    assert plain.dim() == 2
    assert all((dense["advantages"] - plain).abs().max() > 0.1 for _, dense in batches[1:])


def some_rewards(seed=0, B=6, T=5):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(T) < torch.randint(1, T + 1, (B, 1), generator=generator)
    return torch.randn(B, T, generator=generator).masked_fill(~mask, 0), mask


@pytest.mark.parametrize("gamma", [1.0, 0.7])
def test_leave_one_out_to_go_by_definition(gamma):
    rewards, mask = some_rewards()
    to_go = [[sum(gamma ** (s - t) * rewards[i, s] for s in range(t, 5)) for t in range(5)] for i in range(6)]
    advantages = leave_one_out_to_go(rewards, mask, 3, gamma)
    for i in range(6):
        for t in range(5):
            others = [to_go[j][t] for j in range(i // 3 * 3, i // 3 * 3 + 3) if j != i]
            wanted = to_go[i][t] - sum(others) / 2 if mask[i, t] else 0
            assert float(advantages[i, t]) == pytest.approx(float(wanted), abs=1e-5)


@pytest.mark.parametrize("gamma", [1.0, 0.7])
def test_normalised_to_go_by_definition(gamma):
    rewards, mask = some_rewards(1)
    advantages = normalised_to_go(rewards, mask, 3, gamma)
    for i in range(6):
        rows = slice(i // 3 * 3, i // 3 * 3 + 3)
        kept = rewards[rows][mask[rows]]
        white, length = (rewards[i] - kept.mean()) / kept.std(), int(mask[i].sum())
        for t in range(5):
            wanted = sum(gamma ** (s - t) * white[s] for s in range(t, length))
            assert float(advantages[i, t]) == pytest.approx(float(wanted), abs=1e-4)


def test_leave_one_out_to_go_is_unbiased_and_normalised_to_go_prices_length():
    """Each token is worth 1; with the first, a fair choice to stop there or after one more. Exhaustion over a pair.

    The expected sum over tokens of A_t grad log p, by the logit of stopping: E[return] = 2 - p falls by p (1 - p).
    """
    for estimate, wanted in ((leave_one_out_to_go, -0.25), (normalised_to_go, 0.0)):
        gradient = 0.0
        for lengths in ([1, 1], [1, 2], [2, 1], [2, 2]):
            mask = torch.arange(2) < torch.tensor(lengths)[:, None]
            advantage = float(estimate(mask.float(), mask, 2, 1.0)[0, 0])
            gradient += advantage * (0.5 if lengths[0] == 1 else -0.5) / 4
        assert gradient == pytest.approx(wanted)


def test_rloo_to_go_on_a_sparse_reward_is_rloo(tokenizer, reward_model):
    """Where no response ends early and the policy is the one that sampled: the same step."""
    task = make_task(tokenizer, reward_model, make_policy(tokenizer, eos_share=1e-9))
    params = replace(PARAMS, updates=1, minibatch=8, lr=1e-3)
    one, other = (train(task, name, params=params).policy.lm.state_dict() for name in ("rloo", "rloo_to_go"))
    assert all(torch.allclose(one[key], other[key], atol=1e-6) for key in one)
    assert not torch.allclose(one["lm_head.weight"], task.reference.lm.lm_head.weight, atol=5e-4)


# ---------------------------------------------------------------------------------------------------- a bandit


ARMS, BEST = [20, 21, 22, 23], 20


class Bandit:
    """Scores a response by the number of its best tokens."""

    def readings(self, texts):
        return [ids[keep] for ids, keep in zip(texts.responses, texts.players)]

    def score(self, readings):
        return torch.tensor([float((ids == BEST).sum()) for ids in readings])


@pytest.fixture(scope="module")
def bandit(tokenizer):
    """A policy of four tokens, three to a response."""
    lm = make_policy(tokenizer)
    with torch.no_grad():
        lm.lm_head.bias.fill_(-30)
        lm.lm_head.bias[ARMS] = 0
    return make_task(tokenizer, Bandit(), lm)


@pytest.mark.parametrize("name", BASELINES)
def test_a_rewarded_token_becomes_likelier_as_far_as_kl_allows(bandit, name, monkeypatch):
    params = replace(PARAMS, updates=16, rollouts=16, minibatch=16, max_new_tokens=3)
    monkeypatch.setattr("dense_rlhf.training.dpo.LR", 2 * params.lr)  # of DPO, which makes half as many steps
    shape = RewardShape(("uniform",), (1.0,)) if name in TO_GO else SPARSE
    free, held = (train(bandit, name, shape, replace(params, kl_coef=k), group=4).policy for k in (0.01, 10.0))
    start, end, short = (evaluate(bandit, p, PROMPTS * 8, params, 0) for p in (bandit.reference, free, held))
    assert end["proxy"].mean() > start["proxy"].mean() + 0.4
    assert name == "dpo" or short["kl"].mean() < 0.5 * end["kl"].mean()


# ---------------------------------------------------------------------------------------------------- without updates


def test_dpo_spends_as_many_rollouts_as_ppo_and_sees_each_pair_once_an_epoch(task, monkeypatch):
    asked, sample, taught, train_dpo = [], dpo.sample_responses, [], baselines.train_dpo
    monkeypatch.setattr(dpo, "sample_responses", lambda *args: asked.append(len(args[1])) or sample(*args))
    monkeypatch.setattr(baselines, "train_dpo", lambda *args: taught.append(args) or train_dpo(*args))
    train(task, "dpo", params=replace(PARAMS, updates=9, epochs=2, kl_coef=0.3))
    assert sum(asked) == 72
    reference, rows, _, steps, beta, *_ = taught[0]
    assert reference is task.reference.lm and len(rows) <= 36 and steps == 2 * len(rows) // 16 and beta == 0.3


def test_best_of_n(task):
    one, four, many = (best_of_n(task, PROMPTS, PARAMS, 0, n) for n in (1, 4, 32))
    wanted = evaluate(task, task.reference, PROMPTS, PARAMS, 0)
    pd.testing.assert_frame_equal(one, wanted.assign(kl=0.0), check_dtype=False)
    assert list(many) == list(wanted) and many["prompt"].tolist() == PROMPTS
    assert one["proxy"].mean() < four["proxy"].mean() < many["proxy"].mean()
    assert many["gold"].tolist() == [task.gold.score(text) for text in many["response"]]
    assert many["kl"].to_numpy() == pytest.approx(np.log(32) - 31 / 32)
    pd.testing.assert_frame_equal(four, best_of_n(task, PROMPTS, PARAMS, 0, 4), check_exact=True)


def test_best_of_n_is_the_best(task):
    """Of the responses that the same seed gives to the same prompts, told n times."""
    params = replace(PARAMS, rollouts=24)
    best = best_of_n(task, PROMPTS, params, 3, 4)
    every = task.scored_responses(
        task.reference, [p for p in PROMPTS for _ in range(4)], params, seed=3 * 100_003 + 50_000
    )
    assert best["proxy"].tolist() == every.scores.view(-1, 4).amax(-1).tolist()
