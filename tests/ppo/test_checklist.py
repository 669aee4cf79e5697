"""Seventeen things that an RLHF implementation gets wrong in silence, after Huang et al. (2024): one test each.

Where we depart on purpose the docstring says why. What other files prove at length is here in short.
"""

import copy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import PROMPTS, jitter, make_policy, make_rollout

from dense_rlhf import ppo
from dense_rlhf.attribution import attribute
from dense_rlhf.config.params import AttributionParams, PolicyParams, PPOParams
from dense_rlhf.config.study import load_study
from dense_rlhf.models import tiny_recipe
from dense_rlhf.models.language_models import load_tokenizer
from dense_rlhf.models.policy import PolicyWithValue, trainable_copy
from dense_rlhf.ppo import learner
from dense_rlhf.ppo.distributed import Alone
from dense_rlhf.ppo.rollout import appraise, scored
from dense_rlhf.ppo.sampling import Sampling, encode_prompts, generate, prompt_batches, sample, sample_responses
from dense_rlhf.shaping.rewards import shape_rewards
from dense_rlhf.training.inner_loop import Recipe, collect
from dense_rlhf.types import InputError, RewardShape

PARAMS = PPOParams(updates=4, rollouts=6, max_new_tokens=8, minibatch=3, epochs=2, lr=1e-2, kl_coef=0.1)
STUDIES = Path(__file__).parents[2] / "params"


def noise_like(mask, seed=0):
    return torch.randn(mask.shape, generator=torch.Generator().manual_seed(seed)).masked_fill(~mask, 0)


def improve(policy, rollout, params=PARAMS, rewards=None):
    learner = ppo.make_learner(policy, params, seed=0)
    return ppo.update(learner, rollout, noise_like(rollout.mask) if rewards is None else rewards, params)


@pytest.fixture
def fresh(policy, reference, reward_model, tokenizer):
    """A rollout of `policy` itself."""
    return make_rollout(policy, reference, reward_model, tokenizer)


@pytest.fixture
def seen(monkeypatch):
    """What each call of NAME by the learner was given: `seen(NAME)` is a list of arguments that grows."""

    def watch(name):
        calls, real = [], getattr(learner, name)
        monkeypatch.setattr(learner, name, lambda *given: calls.append(given) or real(*given))
        return calls

    return watch


def test_01_pad_is_never_eos(tokenizer, reference, tmp_path):
    """Also where a tokenizer comes with EOS for padding; and padding is neither sampled nor part of the softmax."""
    common = tiny_recipe.train_tokenizer(["the film was good"], 300)
    common.add_special_tokens({"unk_token": "<unk>"})
    common.pad_token = common.eos_token
    common.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).pad_token_id not in (None, common.eos_token_id)
    lm = copy.deepcopy(reference.lm)
    lm.lm_head.bias[tokenizer.pad_token_id] = 50.0  # all but certain, were it not ruled out
    queries, mask = encode_prompts(PROMPTS, tokenizer)
    ends = (tokenizer.eos_token_id,), tokenizer.pad_token_id
    for draw in (sample, generate):
        drawn = draw(lm, queries, mask, Sampling(8, 1.0, *ends), torch.Generator().manual_seed(0))
        assert not (drawn.responses[drawn.mask] == tokenizer.pad_token_id).any()
    lm.config.pad_token_id = None
    with pytest.raises(InputError, match="pad_token_id"):
        PolicyWithValue(lm)


def test_02_prompts_are_padded_on_the_left_and_positions_count_tokens(tokenizer):
    """The sampler gives positions; the training forward has rows without left padding, so that it needs none.

    GPT-2, whose positions are absolute: near temperature 0 it says of every prompt what it says of it alone.
    """
    config = transformers.GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=2, n_head=2, pad_token_id=1)
    lm = jitter(transformers.GPT2LMHeadModel(config), seed=0, scale=0.4)
    ends = (tokenizer.eos_token_id,), tokenizer.pad_token_id
    queries, mask = encode_prompts(PROMPTS, tokenizer)
    assert mask[:, -1].all() and mask.sum(-1).unique().numel() > 2
    greedy = Sampling(6, 1e-4, *ends)
    for draw in (sample, generate):
        together = draw(lm, queries, mask, greedy, torch.Generator().manual_seed(0)).responses
        for row, prompt in zip(together, PROMPTS):
            alone = draw(lm, *encode_prompts([prompt], tokenizer), greedy, torch.Generator().manual_seed(1))
            assert torch.equal(alone.responses[0], row)
    assert len({tuple(row) for row in together.tolist()}) > 2


def test_03_temperature_divides_old_new_and_reference_logits_and_nothing_else_bends_them(
    policy, reference, reward_model, tokenizer
):
    with torch.no_grad():
        policy.lm.lm_head.weight.mul_(1.5)
    made = make_rollout(policy, reference, reward_model, tokenizer, temperature=0.5)
    hot = appraise(policy, reference, made, 1.0)
    assert (made.ref_logprobs - hot.ref_logprobs).abs().max() > 0.1 < (made.logprobs - hot.logprobs).abs().max()
    assert improve(copy.deepcopy(policy), made, replace(PARAMS, temperature=0.5))["first_ratio_error"] < 1e-5
    assert improve(copy.deepcopy(policy), made, replace(PARAMS, temperature=1.0))["first_ratio_error"] > 0.1
    lm = copy.deepcopy(reference.lm)  # an even distribution, of which top-k and top-p would leave a part
    lm.lm_head.weight.zero_(), lm.lm_head.bias.zero_()
    lm.generation_config.update(do_sample=True, top_k=5, bad_words_ids=[[7]])  # what a hub model may bring along
    queries, mask = encode_prompts(["the film"] * 400, tokenizer)
    pad_id, eos_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    for draw in (sample, generate):
        drawn = draw(
            lm, queries, mask, Sampling(20, 0.5, (eos_id,), pad_id), torch.Generator().manual_seed(0)
        ).responses
        assert set(range(len(tokenizer))) - {pad_id} <= set(drawn.flatten().tolist())
    assert lm.generation_config.top_k == 5


def test_04_a_response_stops_at_eos_and_eos_is_trained(policy, fresh):
    eos = fresh.mask & ~fresh.players
    assert torch.equal(eos.sum(-1) == 1, fresh.ended) and eos.any()
    logprobs = fresh.logprobs.clone().requires_grad_()
    ppo.policy_loss(logprobs, fresh.logprobs, torch.ones(eos.shape), fresh.mask, 0.2)[0].backward()
    assert torch.equal(logprobs.grad != 0, fresh.mask)
    improve(policy, fresh, rewards=eos.float())
    assert (policy(fresh, 1.0)[0] - fresh.logprobs)[eos].mean() > 0.01


def test_05_the_reward_model_reads_an_eos_and_its_score_has_the_references_mean_and_spread(
    reward_model, reference, tokenizer, rollout
):
    """EOS is appended to responses that lack it too, so that all are read alike.

    Zero and unit are those of the reference's own responses, not of SFT texts: these are what PPO begins with.
    """
    scores = reward_model.score(reward_model.readings(rollout))
    for row in range(len(scores)):
        text = [*rollout.queries[row][rollout.query_mask[row]], *rollout.responses[row][rollout.players[row]]]
        ids = torch.tensor([[*text, tokenizer.eos_token_id]])
        hidden = reward_model.model.model(input_ids=ids).last_hidden_state[0, -1]
        torch.testing.assert_close(scores[row], reward_model.model.score(hidden)[0], atol=1e-5, rtol=0)
    params, generator = PPOParams(max_new_tokens=8), torch.Generator().manual_seed(0)
    responses = sample_responses(reference, PROMPTS * 4, tokenizer, params, generator)
    calibrated = reward_model.calibrated(scored(responses, reward_model).scores)
    again = scored(responses, calibrated).scores
    assert abs(again.mean()) < 1e-4 and abs(again.std() - 1) < 1e-4


def test_06_a_missing_eos_costs_where_the_response_has_not_ended(rollout):
    """By `ended`, which is what stopped the sampler; TRL asks for EOS whatever the stop token was."""
    params, nothing = replace(PARAMS, missing_eos_penalty=3.0, kl_coef=0.0), torch.zeros(rollout.mask.shape)
    rewards = ppo.token_rewards(rollout, nothing, params)
    wanted = nothing.clone()
    wanted[torch.arange(len(wanted)), rollout.mask.sum(-1) - 1] = torch.where(rollout.ended, 0.0, -3.0)
    assert torch.equal(rewards, wanted)
    flipped = ppo.token_rewards(replace(rollout, ended=~rollout.ended), nothing, params)
    assert torch.equal(flipped.sum(-1) < 0, rollout.ended)  # nothing else is asked, the tokens least of all


def test_07_the_penalty_is_k1_and_the_kl_itself_is_logged_apart(rollout, policy, seen):
    """k3 serves the metric of the step alone: as a reward it has not the gradient of the KL."""
    assert PPOParams().kl_estimator == "k1"
    ratio = rollout.logprobs - rollout.ref_logprobs
    rewards = ppo.token_rewards(rollout, torch.zeros(ratio.shape), PARAMS)
    torch.testing.assert_close(rewards, -0.1 * ratio)
    torch.testing.assert_close(ppo.sequence_kl(rollout), ratio.sum(-1))  # not times the coefficient
    assert ratio.min() < 0  # so k3 would be another
    asked = seen("kl_estimate")
    assert improve(policy, rollout)["step_kl"] > 0
    assert {given[2] for given in asked} == {"k3"}


@pytest.mark.parametrize("name", ["reviews", "smollm2", "hh_rlhf", "ultrafeedback"])
def test_08_gamma_is_one_and_lambda_is_095(name):
    params = load_study(STUDIES / f"{name}.yaml").run.ppo
    assert (params.gamma, params.lam) == (PPOParams().gamma, PPOParams().lam) == (1, 0.95)


def test_09_a_critic_of_its_own_starts_as_the_reward_model_any_other_at_zero(reference, reward_model, rollout):
    for critic in ("shared", "detached"):
        policy = trainable_copy(reference, PolicyParams(critic=critic), reward_model)
        assert policy(rollout, 1.0)[1].abs().max() == 0
    separate = trainable_copy(reference, PolicyParams(critic="separate"), reward_model)
    first = rollout.query_mask.sum(-1)
    with torch.no_grad():
        for row, value in enumerate(separate(rollout, 1.0)[1][:, 0]):
            prompt = rollout.queries[row, -first[row] :][None]
            score = reward_model.read(torch.ones_like(prompt), torch.tensor([first[row] - 1]), input_ids=prompt)
            torch.testing.assert_close(value, score[0], atol=1e-5, rtol=0)


def test_10_advantages_are_whitened_over_the_whole_batch(policy, rollout, seen):
    """Over no gather: every process holds the whole rollout, and whitens what all others whiten."""
    whitened, used = seen("masked_whiten"), seen("policy_loss")
    improve(policy, rollout, replace(PARAMS, epochs=1, minibatch=2))
    assert len(whitened) == 1 and whitened[0][0].shape == rollout.mask.shape
    parts = [advantages[mask] for _, _, advantages, mask, _ in used]
    together = torch.cat(parts)
    assert len(parts) == 3 and abs(together.mean()) < 1e-5 and abs(together.var() - 1) < 1e-4
    assert max(abs(part.mean()) for part in parts) > 0.05


def test_11_a_value_beyond_its_clip_is_worth_no_more(policy, rollout, seen):
    values, old = torch.tensor([[0.1, 0.9, -0.9]], requires_grad=True), torch.zeros(1, 3)
    ppo.value_loss(values, old, returns := torch.full((1, 3), 5.0), torch.ones(1, 3).bool(), 0.2).backward()
    assert torch.equal(values.grad != 0, torch.tensor([[True, False, True]]))  # the worse of both: no free lunch below
    torch.testing.assert_close(values.grad[0, [0, 2]], (values.detach() - returns)[0, [0, 2]])
    used = seen("value_loss")
    improve(policy, rollout, replace(PARAMS, value_clip=0.3))
    assert {given[-1] for given in used} == {0.3}
    kept = torch.cat([given[1][given[3]] for given in used[:2]])  # clipped about the values of the rollout
    assert torch.equal(kept.sort()[0], rollout.values[rollout.mask].sort()[0])


def test_12_adamw_of_eps_1e5_without_decay_at_a_falling_rate_and_a_clipped_gradient(policy, rollout):
    """The rate falls linearly to a tenth and not to 0, so that the last updates of a short run still count."""
    params = replace(PARAMS, max_grad_norm=0.1, value_lr=3e-3)
    learner, rates, norms = ppo.make_learner(policy, params, 0), [], []
    assert type(learner.optimizer) is torch.optim.AdamW
    assert {(group["eps"], group["weight_decay"]) for group in learner.optimizer.param_groups} == {(1e-5, 0)}
    held = [p for group in learner.optimizer.param_groups for p in group["params"]]
    assert sorted(map(id, held)) == sorted(id(p) for p in policy.parameters() if p.requires_grad)
    norm = lambda *_: norms.append(torch.cat([p.grad.flatten() for p in held]).norm().item())  # noqa: E731
    learner.optimizer.register_step_pre_hook(norm)
    for _ in range(params.updates):
        rates.append(learner.schedule.get_last_lr())
        log = ppo.update(learner, rollout, noise_like(rollout.mask), params)
        assert log["grad_norm"] > 0.1
    assert norms == pytest.approx([0.1] * 16, rel=1e-3)  # 4 updates of 2 epochs of 2 mini-batches, a step each
    wanted = torch.tensor([1.0, 0.775, 0.55, 0.325])
    torch.testing.assert_close(torch.tensor(rates), wanted[:, None] * torch.tensor([1e-2, 3e-3]))
    assert learner.schedule.get_last_lr() == pytest.approx([1e-3, 3e-4])


@pytest.mark.parametrize("changes", [{}, {"critic": "separate"}, {"lora_rank": 2}], ids=["whole", "separate", "lora"])
def test_13_dropout_is_off(changes, reward_model, tokenizer, rollout):
    """Whatever the models' configs say and whether or not somebody put them in training mode before."""
    lm, classifier = make_policy(tokenizer).train(), copy.deepcopy(reward_model.model).train()
    for layer in (*lm.model.layers, *classifier.model.layers):
        layer.self_attn.attention_dropout = 0.5
    reference = PolicyWithValue(lm).requires_grad_(False)
    policy = trainable_copy(reference, PolicyParams(**changes), replace(reward_model, model=classifier))
    for a, b in zip(policy(rollout, 1.0), policy(rollout, 1.0)):
        assert torch.equal(a, b)


def test_14_every_epoch_has_a_fresh_order_and_every_process_samples_with_its_own_seed(policy, rollout, seen):
    """The order of mini-batches has one seed in all processes, since these share every mini-batch."""
    used = seen("micro_batches")
    improve(policy, rollout, replace(PARAMS, epochs=4))
    orders = [torch.cat([used[i][1], used[i + 1][1]]).tolist() for i in range(0, 8, 2)]
    assert len(used) == 8 and all(sorted(order) == list(range(6)) for order in orders)
    assert len(set(map(tuple, orders))) == 4
    prompts = [str(i) for i in range(8)]
    batches = prompt_batches(prompts, 4, seed=0)
    first, second = (next(batches) + next(batches) for _ in range(2))
    assert sorted(first) == sorted(second) == prompts and first != second

    def seed_of(rank, step, seed):
        def rollout(policy, prompts, params, seed):
            raise StopIteration(seed)

        class Process(Alone):
            pass

        Process.rank = rank
        alone = SimpleNamespace(processes=Process(), policy=None)
        with pytest.raises(StopIteration) as stopped:
            collect(SimpleNamespace(rollout=rollout), alone, Recipe(None, PARAMS, None, seed), prompts, step)
        return stopped.value.value

    seeds = {seed_of(rank, step, seed) for rank in range(8) for step in range(20) for seed in range(5)}
    assert len(seeds) == 8 * 20 * 5


@pytest.mark.parametrize("changes", [{}, {"critic": "detached"}, {"lora_rank": 2}, {"trainable_layers": 1}])
def test_15_on_the_first_pass_the_ratio_is_one_and_nothing_is_clipped(changes, reward_model, tokenizer):
    reference = PolicyWithValue(make_policy(tokenizer), changes.get("trainable_layers")).requires_grad_(False)
    policy = trainable_copy(reference, PolicyParams(**changes), reward_model)
    made = make_rollout(policy, reference, reward_model, tokenizer)
    again, still = appraise(policy, reference, made, 1.0), replace(PARAMS, epochs=1, lr=1e-9)
    for rollout in (made, again):  # of the sampler's states, and of the training forward
        parts = improve(copy.deepcopy(policy), rollout, still)
        assert parts["first_ratio_error"] < 1e-5 and parts["clipped"] == 0  # float32 sums in another order
    same = improve(policy, again, replace(PARAMS, minibatch=6, epochs=1))
    assert same["first_ratio_error"] == same["clipped"] == same["step_kl"] == 0
    assert improve(policy, make_rollout(reference, reference, reward_model, tokenizer))["first_ratio_error"] > 1e-3


def test_16_metrics_are_over_tokens_and_know_nothing_of_padding(policy, rollout):
    n, entropy = rollout.mask.sum().item(), policy(rollout, 1.0)[2].detach()
    junk = {
        name: getattr(rollout, name).masked_fill(~rollout.mask, float("nan"))
        for name in ("logprobs", "ref_logprobs", "values")
    }
    spoilt = replace(rollout, **junk)
    rewards = ppo.token_rewards(spoilt, noise_like(rollout.mask).masked_fill(~rollout.mask, float("nan")), PARAMS)
    clean = ppo.token_rewards(rollout, noise_like(rollout.mask), PARAMS)
    params, twin = replace(PARAMS, minibatch=6, epochs=1), copy.deepcopy(policy)
    log = improve(policy, rollout, params, clean)
    assert improve(twin, spoilt, params, rewards) == log and torch.equal(
        ppo.sequence_kl(spoilt), ppo.sequence_kl(rollout)
    )
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), twin.parameters()))
    assert log["entropy"] == pytest.approx(entropy[rollout.mask].sum().item() / n, rel=1e-5)
    assert 0 < log["clipped"] < 1 and log["step_kl"] > 0


@pytest.mark.parametrize("normalise", ["softmax", "signed"])
def test_17_shaped_rewards_sum_to_the_score(normalise, reward_model, rollout):
    """And what is left over is logged with every update as `residual`."""
    shape = RewardShape(("shap", "lime", "uniform", "terminal"), (0.4, 0.3, 0.2, 0.1), normalise)
    attributions = attribute(reward_model, rollout, list(shape.sources), AttributionParams(lime_samples=8))
    shaped = shape_rewards(rollout, attributions, shape)
    torch.testing.assert_close(shaped.sum(-1), rollout.scores, atol=1e-5, rtol=0)
    assert not shaped[~rollout.mask].any()
