"""What a policy computes, which of its weights learn, and what it shares with the reference: on tiny models."""

import copy
from dataclasses import replace
from functools import cache

import pytest
import torch
import transformers
from conftest import TINY, jitter, make_policy, make_rollout
from hypothesis import given
from hypothesis import strategies as st
from peft.tuners.lora import LoraLayer
from torch.nn import functional as F

from dense_rlhf import ppo
from dense_rlhf.config.params import PolicyParams, PPOParams
from dense_rlhf.models import policy as policy_module
from dense_rlhf.models.policy import PolicyWithValue, micro_batches, trainable_copy, value_probe
from dense_rlhf.models.tiny_recipe import train_tokenizer
from dense_rlhf.ppo.learner import _losses
from dense_rlhf.ppo.rollout import appraise
from dense_rlhf.types import InputError, Responses, Rollout

PARAMS = PPOParams(updates=10, rollouts=6, max_new_tokens=8, minibatch=3, epochs=2, lr=1e-2, value_lr=1e-2)
SPLIT = {
    "Llama": {},
    "Mistral": {"sliding_window": 3},
    "Qwen3": {},
    "Qwen2": {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 2},
    "Gemma2": {"sliding_window": 3, "final_logit_softcapping": 0.5},
}
WHOLE = {"Granite": {"embedding_multiplier": 3.0, "logits_scaling": 4.0}, "GPTNeoX": {}, "Phi": {}, "Cohere2": {}}
ALL = SPLIT | WHOLE


@cache
def built(name, vocabulary, layers=4):
    """A random causal language model of another family, heads of which layers differ where the family lets them."""
    config = getattr(transformers, f"{name}Config")(
        vocab_size=vocabulary,
        **TINY | {"num_hidden_layers": layers},
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
        **ALL.get(name, {}),
    )
    return jitter(getattr(transformers, f"{name}ForCausalLM")(config), seed=0, scale=0.2).requires_grad_(False)


def gpt2(vocabulary):
    config = transformers.GPT2Config(vocab_size=vocabulary, n_embd=16, n_layer=2, n_head=2, pad_token_id=1)
    return jitter(transformers.GPT2LMHeadModel(config), seed=0)


def frozen(lm, layers=None, bf16=False):
    return PolicyWithValue(lm, layers, bf16=bf16).requires_grad_(False)


def noise_like(mask, seed=0):
    return torch.randn(mask.shape, generator=torch.Generator().manual_seed(seed)).masked_fill(~mask, 0)


def improve(policy, reference, found, params=PARAMS, learner=None, temperature=1.0):
    """One update on noise as rewards, in place; its learner and metrics."""
    read = appraise(policy, reference, found, temperature, params.micro_batch)
    learner = learner or ppo.make_learner(policy, params, 0)
    return learner, ppo.update(learner, read, noise_like(read.mask), params)


def loss_of(policy, rollout, value_coef=1.0):
    """The sum of both losses on noise for advantages, returns far from the values."""
    batch = ppo.Batch(**rollout.tensors(), advantages=noise_like(rollout.mask), returns=noise_like(rollout.mask, 1) * 9)
    return _losses(policy, batch, replace(PARAMS, value_coef=value_coef))[0]


def gradients(policy, loss):
    named = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    return dict(zip(named, torch.autograd.grad(loss, named.values(), allow_unused=True)))


def close(a, b, atol=1e-6):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


# ---------------------------------------------------------------------------------------------------- forward


@pytest.mark.parametrize("name", [*ALL, "GPT2"])
def test_log_probabilities_are_those_of_the_models_own_logits(name, rollout, tokenizer):
    """Caps and scales after the LM head included: the sampler draws from what `lm(...)` returns."""
    lm = gpt2(len(tokenizer)) if name == "GPT2" else built(name, len(tokenizer))
    with torch.no_grad():
        found = frozen(lm)(rollout, 0.7)[0]
        for row, keep in enumerate(rollout.mask):
            query, response = rollout.queries[row][rollout.query_mask[row]], rollout.responses[row][keep]
            logits = lm(input_ids=torch.cat([query, response])[None]).logits[0, len(query) - 1 : -1] / 0.7
            logits[:, tokenizer.pad_token_id] = -torch.inf
            close(found[row][keep], logits.log_softmax(-1).gather(-1, response[:, None])[:, 0], atol=1e-5)


def test_a_critic_and_its_trunk_come_together(tokenizer):
    lm = make_policy(tokenizer)
    for critic, trunk in (("separate", None), ("shared", lm.model), ("detached", lm.model)):
        with pytest.raises(InputError, match=critic):
            PolicyWithValue(lm, critic=critic, value_trunk=trunk)


@pytest.mark.parametrize("chunk", [1, 3, 1000])
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bfloat16"])
def test_a_chunked_lm_head_gives_the_same_outputs_and_gradients(chunk, bf16, rollout, tokenizer, monkeypatch):
    policy = PolicyWithValue(make_policy(tokenizer), bf16=bf16)
    whole, wanted = policy(rollout, 0.7), gradients(policy, loss_of(policy, rollout))
    monkeypatch.setattr(policy_module, "LOGITS", chunk * len(tokenizer))
    parts, found = policy(rollout, 0.7), gradients(policy, loss_of(policy, rollout))
    for a, b in zip(whole, parts):
        close(a, b, atol=5e-6)  # float32 log-probabilities of about 5 nats, sums in another order
    for name in wanted:  # bfloat16 sums weight gradients chunk by chunk, each rounded to 8 bits
        close(wanted[name], found[name], atol=wanted[name].abs().max().item() * (2e-2 if bf16 else 2e-6) + 1e-6)


# ---------------------------------------------------------------------------------------------------- critics


def with_values(policy):
    torch.nn.init.normal_(policy.value_head.weight, std=0.5, generator=torch.Generator().manual_seed(0))
    return policy


def test_a_shared_critic_teaches_the_trunk_and_a_detached_one_leaves_it_to_the_policy(rollout, tokenizer):
    shared, detached = (with_values(PolicyWithValue(make_policy(tokenizer), critic=c)) for c in ("shared", "detached"))
    plain = gradients(shared, loss_of(shared, rollout, value_coef=0))
    taught, apart = (gradients(policy, loss_of(policy, rollout)) for policy in (shared, detached))
    trunk = [name for name in plain if name.startswith("lm.model")]
    assert all(not torch.allclose(taught[name], plain[name], atol=1e-3) for name in trunk)
    for name in trunk + ["lm.lm_head.weight"]:
        close(apart[name], plain[name])
    close(apart["value_head.weight"], taught["value_head.weight"])
    assert apart["value_head.weight"].abs().max() > 0.1


SEPARATE = PolicyParams(critic="separate")


def test_a_separate_critic_starts_as_the_score_of_the_response_so_far(reference, reward_model, rollout):
    """Before token t: the reward model's score, read after the prompt and t tokens, without the EOS that ends them."""
    calibrated = replace(reward_model, offset=0.7, scale=0.3)
    values = trainable_copy(reference, SEPARATE, calibrated)(rollout, 1.0)[1]
    for row, keep in enumerate(rollout.mask):
        prompt, response = rollout.queries[row][rollout.query_mask[row]], rollout.responses[row][keep]
        for t in range(len(response)):
            ids = torch.cat([prompt, response[:t]])[None]
            with torch.no_grad():
                output = calibrated.read(torch.ones_like(ids).bool(), torch.tensor([ids.shape[1] - 1]), input_ids=ids)
            close(values[row, t], calibrated.calibrate(output)[0], atol=1e-5)


def test_a_separate_critic_learns_apart_from_policy_and_reward_model(reference, reward_model, rollout):
    before = copy.deepcopy(reward_model.model.state_dict())
    policy = trainable_copy(reference, SEPARATE, reward_model)
    found = gradients(policy, loss_of(policy, rollout) - loss_of(policy, rollout, value_coef=0))
    for name, gradient in found.items():
        assert (gradient is None or gradient.abs().max() < 1e-6) == name.startswith("lm."), name
    start = copy.deepcopy(policy.state_dict())
    improve(policy, reference, rollout)
    assert all(not torch.equal(start[name], now) for name, now in policy.state_dict().items())
    assert all(torch.equal(before[name], now) for name, now in reward_model.model.state_dict().items())


def test_a_reward_model_that_cannot_be_a_critic_is_refused(reference, reward_model, tokenizer):
    encoder = transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_labels=1,
        )
    )
    foreign = replace(reward_model, policy_tokenizer=train_tokenizer(["zebra"], 262))
    others = None, replace(reward_model, model=encoder), foreign
    for other in others:
        with pytest.raises(InputError, match="policy.critic is 'separate'"):
            trainable_copy(reference, SEPARATE, other)


# ---------------------------------------------------------------------------------------------------- last layers


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("name", SPLIT)
def test_trunk_and_last_layers_make_the_whole_model(name, layers, rollout, tokenizer):
    lm = built(name, len(tokenizer))
    kinds = getattr(lm.config, "layer_types", None) or []
    assert len(set(kinds)) == 2 or name not in ("Qwen2", "Gemma2")
    whole, split = frozen(lm), frozen(lm, layers)
    cached = replace(rollout, trunk=split.trunk(rollout.rows()[0]))
    for a, b, c in zip(whole(rollout, 1.0), split(rollout, 1.0), split(cached, 1.0)):
        assert torch.equal(a, b) and torch.equal(a, c)


@pytest.mark.parametrize("name", ["Granite", "GPTNeoX", "Phi"])
def test_a_model_that_is_more_than_its_layers_is_refused(name, tokenizer):
    """Granite scales embeddings, the others keep their last norm under another name."""
    lm = built(name, len(tokenizer))
    with pytest.raises(InputError, match=f"trainable_layers is 2, but {name}"):
        PolicyWithValue(lm, 2)
    trainable_copy(frozen(lm), PolicyParams(lora_rank=2))


@pytest.mark.parametrize("layers", [0, 5])
def test_there_are_no_more_layers_to_train_than_there_are(layers, tokenizer):
    with pytest.raises(InputError, match=f"trainable_layers is {layers}, but the model has 4 layers"):
        PolicyWithValue(built("Llama", len(tokenizer)), layers)


def test_a_model_without_a_list_of_layers_trains_whole(rollout, tokenizer):
    reference = frozen(gpt2(len(tokenizer)))
    with pytest.raises(InputError, match="no list of layers"):
        PolicyWithValue(reference.lm, 1)
    improve(policy := trainable_copy(reference, PolicyParams()), reference, rollout)
    assert not torch.equal(policy.lm.transformer.wte.weight, reference.lm.transformer.wte.weight)


@pytest.mark.parametrize("layers", [1, 3, 4])
def test_frozen_weights_are_the_references_own_and_nothing_of_it_changes(layers, rollout, tokenizer):
    reference = frozen(built("Llama", len(tokenizer)), layers)
    before = copy.deepcopy(reference.state_dict())
    policy = trainable_copy(reference, PolicyParams(trainable_layers=layers))
    rows = dict(reference.lm.named_parameters())
    for name, p in policy.lm.named_parameters():
        learns = ".layers." in name and int(name.split(".")[2]) >= 4 - layers
        assert p.requires_grad == learns and (p.data_ptr() != rows[name].data_ptr()) == learns, name
    alone = PolicyWithValue(copy.deepcopy(reference.lm).requires_grad_(True), layers)
    assert [p.requires_grad for p in alone.parameters()] == [p.requires_grad for p in policy.parameters()]
    improve(policy, reference, rollout)
    assert all(torch.equal(before[name], now) for name, now in reference.state_dict().items())
    changed = {name for name, p in policy.lm.named_parameters() if not torch.equal(p, rows[name])}
    assert changed == {name for name, p in policy.lm.named_parameters() if p.requires_grad}
    assert not any(p.requires_grad for p in reference.parameters())


def test_who_shares_a_trunk(tokenizer):
    reference = frozen(built("Llama", len(tokenizer)), 1)
    copies = [trainable_copy(reference, PolicyParams(trainable_layers=1, lora_rank=rank)) for rank in (None, 2)]
    assert all(a.shares_trunk(b) for a in (reference, *copies) for b in (reference, *copies))
    others = [
        trainable_copy(reference, PolicyParams(trainable_layers=2)),
        trainable_copy(reference, PolicyParams()),
        frozen(reference.lm, 1, bf16=True),
        frozen(copy.deepcopy(reference.lm), 1),
        frozen(gpt2(len(tokenizer))),
    ]
    assert not any(a.shares_trunk(b) or b.shares_trunk(a) for a in others for b in (reference, *copies))
    assert not frozen(reference.lm).shares_trunk(frozen(reference.lm))  # there is none


@pytest.mark.parametrize("layers", [1, 2])
def test_a_reference_with_a_trunk_of_its_own_reads_that(layers, rollout, tokenizer):
    reference = frozen(built("Llama", len(tokenizer)), layers)
    policy = frozen(jitter(copy.deepcopy(reference.lm), seed=1, scale=0.2), 2)
    read = appraise(policy, reference, rollout, 1.0)
    close(read.logprobs, policy(rollout, 1.0)[0], atol=1e-5)
    close(read.ref_logprobs, reference(rollout, 1.0)[0], atol=1e-5)


@pytest.mark.parametrize("rank", [None, 2], ids=["weights", "lora"])
@pytest.mark.parametrize("name", ["Llama", "Gemma2"])
def test_an_update_over_a_cached_trunk_ends_in_the_same_weights(name, rank, rollout, tokenizer, monkeypatch):
    reference, ends = frozen(built(name, len(tokenizer)), 2), []
    for cached in (True, False):
        if not cached:
            monkeypatch.setattr("dense_rlhf.ppo.rollout._trunk", lambda *_: None)
        torch.manual_seed(0)
        policy = trainable_copy(reference, PolicyParams(trainable_layers=2, lora_rank=rank))
        assert (appraise(policy, reference, rollout, 1.0).trunk is None) != cached
        learner, _ = improve(policy, reference, rollout)
        improve(policy, reference, rollout, learner=learner)
        ends.append(policy.state_dict())
    for key in ends[0]:
        close(ends[0][key], ends[1][key])


# ---------------------------------------------------------------------------------------------------- adapters


LORA = PolicyParams(lora_rank=4, lora_alpha=8.0)


@pytest.mark.parametrize("layers", [None, 2])
@pytest.mark.parametrize("name", ["Llama", "Gemma2"])
def test_adapters_start_at_no_effect_and_alone_learn(name, layers, rollout, tokenizer):
    reference = frozen(built(name, len(tokenizer)), layers)
    before = copy.deepcopy(reference.state_dict())
    policy = trainable_copy(reference, replace(LORA, trainable_layers=layers))
    read = appraise(policy, reference, rollout, 1.0)
    assert torch.equal(read.logprobs, read.ref_logprobs) and (read.trunk is None) == (layers is None)
    learning = {name for name, p in policy.named_parameters() if p.requires_grad}
    assert learning == {name for name, _ in policy.named_parameters() if "lora_" in name or "value_head" in name}
    adapted = {int(name.split(".")[3]) for name in learning if "lora_" in name}
    assert adapted == set(range(4 - (layers or 4), 4))
    start = copy.deepcopy(policy.state_dict())
    learner, _ = improve(policy, reference, rollout)
    improve(policy, reference, rollout, learner=learner)
    assert {name for name, now in policy.state_dict().items() if not torch.equal(now, start[name])} == learning
    assert all(torch.equal(before[name], now) for name, now in reference.state_dict().items())
    assert set(before) == set(reference.state_dict())  # no adapter was put into it


def base_weights(policy):
    return {name.replace("base_layer.", ""): p for name, p in policy.lm.named_parameters() if "lora_" not in name}


def test_adapters_rest_on_the_references_own_weights(reference, rollout):
    policy = trainable_copy(reference, LORA)
    improve(policy, reference, rollout)
    assert all(base_weights(policy)[name] is p for name, p in reference.lm.named_parameters())


def test_without_its_adapters_the_policy_is_the_reference(reference, rollout):
    policy = trainable_copy(reference, LORA)
    improve(policy, reference, rollout)
    assert not torch.allclose(policy(rollout, 1.0)[0], reference(rollout, 1.0)[0], atol=1e-2)
    for module in policy.lm.modules():
        if isinstance(module, LoraLayer):
            module.enable_adapters(False)
    assert torch.equal(policy(rollout, 1.0)[0], reference(rollout, 1.0)[0])


@pytest.mark.parametrize("layers", [None, 1])
@pytest.mark.parametrize("rank", [None, 4], ids=["weights", "lora"])
def test_the_sampling_model_is_the_policy_of_now(layers, rank, rollout, tokenizer):
    reference = frozen(make_policy(tokenizer), layers)
    policy, learner = trainable_copy(reference, PolicyParams(trainable_layers=layers, lora_rank=rank)), None
    for _ in range(2):
        learner, _ = improve(policy, reference, rollout, learner=learner)
        sampler = policy.sampling_model()
        assert not any("lora" in name for name, _ in sampler.named_parameters())
        drawn, ours, theirs = (p(rollout, 1.0)[0] for p in (PolicyWithValue(sampler), policy, reference))
        close(drawn, ours, atol=1e-5)
        assert (ours - theirs).abs().max() > 0.05
        improve(policy, reference, rollout, learner=learner)


def test_a_sampling_model_is_no_weight_of_the_policy(reference):
    policy = trainable_copy(reference, LORA)
    assert policy.sampling_model() is policy.sampling_model() is not policy.lm
    assert not {id(p) for p in policy.sampling_model().parameters() if p.requires_grad} & set(
        map(id, policy.parameters())
    )
    assert sum("q_proj" in name for name in policy.state_dict()) == 3 * 2  # base, A and B in each of two layers


# ---------------------------------------------------------------------------------------------------- bfloat16


@pytest.mark.parametrize(
    "changes", [{}, {"trainable_layers": 1}, {"lora_rank": 4}, {"lora_rank": 4, "critic": "separate"}]
)
def test_in_bfloat16_what_learns_stays_float32(changes, rollout, reward_model, tokenizer):
    reference = frozen(make_policy(tokenizer).bfloat16(), changes.get("trainable_layers"), bf16=True)
    before = copy.deepcopy(reference.state_dict())
    policy = trainable_copy(reference, PolicyParams(dtype="bfloat16", **changes), reward_model)
    for name, p in policy.named_parameters():
        assert p.dtype == (torch.float32 if p.requires_grad else torch.bfloat16), name
    assert all(x.dtype == torch.float32 for x in policy(rollout, 1.0))
    read = appraise(policy, reference, rollout, 1.0, PARAMS.micro_batch)
    apart = 0 if changes else 0.05  # float32 embeddings carry what bfloat16 ones have rounded off
    assert (read.logprobs - read.ref_logprobs).abs().max() <= apart
    assert ppo.gae(noise_like(read.mask), read.values, read.mask, 1, 0.9).dtype == torch.float32
    start = copy.deepcopy(dict(policy.named_parameters()))
    learner, log = improve(policy, reference, rollout)
    assert log["first_ratio_error"] < 0.05 and all(torch.tensor(list(log.values())).isfinite())
    states = [x for state in learner.optimizer.state.values() for x in state.values()]
    assert states and all(x.dtype == torch.float32 for x in states)
    for name, p in policy.named_parameters():
        assert p.isfinite().all() and torch.equal(p, start[name]) != p.requires_grad, name
    assert all(torch.equal(before[name], now) for name, now in reference.state_dict().items())


def test_in_bfloat16_the_ratio_is_exactly_one_on_the_same_micro_batches(rollout, tokenizer):
    reference = frozen(make_policy(tokenizer).bfloat16(), bf16=True)
    policy = trainable_copy(reference, PolicyParams(dtype="bfloat16"))
    _, log = improve(policy, reference, rollout, replace(PARAMS, minibatch=6, epochs=1, micro_batch=6))
    assert log["first_ratio_error"] == 0 and log["clipped"] == 0


@pytest.mark.parametrize("rank", [None, 4], ids=["weights", "lora"])
def test_in_bfloat16_the_sampling_model_follows_the_policy(rank, rollout, tokenizer):
    reference = frozen(make_policy(tokenizer).bfloat16(), bf16=True)
    policy, learner = trainable_copy(reference, PolicyParams(dtype="bfloat16", lora_rank=rank)), None
    for _ in range(2):
        learner, _ = improve(policy, reference, rollout, learner=learner)
        sampler = policy.sampling_model()
        assert {p.dtype for p in sampler.parameters()} == {torch.bfloat16}
        for name, weight in policy_module._merged(policy.lm):
            assert torch.equal(sampler.get_parameter(name), weight.bfloat16()), name
        drawn, ours, theirs = (p(rollout, 1.0)[0] for p in (frozen(sampler), policy, reference))
        assert (drawn - ours).abs().max() < 0.1 < (ours - theirs).abs().max()


# ---------------------------------------------------------------------------------------------------- invariance


@st.composite
def texts(draw):
    """A rollout of random tokens and float64 numbers, of drawn lengths, with no more padding than due."""
    sizes = draw(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 6)), min_size=2, max_size=5))
    prompts, lengths = torch.tensor(sizes).T
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    B, P, T = len(sizes), int(prompts.max()), int(lengths.max())
    query_mask, mask = torch.arange(P) >= P - prompts[:, None], torch.arange(T) < lengths[:, None]
    ids = torch.randint(2, 40, (B, P + T), generator=generator)
    numbers = torch.randn(3, B, T, generator=generator, dtype=torch.float64).masked_fill(~mask, 0)
    return Rollout(
        ids[:, :P].masked_fill(~query_mask, 1),
        query_mask,
        ids[:, P:].masked_fill(~mask, 1),
        mask,
        torch.zeros(B),
        torch.zeros(B).bool(),
        logprobs=numbers[0] - 3,
        ref_logprobs=numbers[1],
        values=numbers[2],
    )


def widened(rollout, left, right):
    pads = {"queries": (left, 0, 1), "query_mask": (left, 0, 0), "responses": (0, right, 1)}
    changed = {
        name: F.pad(x, (*(pad := pads.get(name, (0, right, 0)))[:2],), value=pad[2])
        for name, x in rollout.tensors().items()
        if x.dim() == 2
    }
    return replace(rollout, **changed)


@cache
def double_policy():
    """StableLm: its LayerNorm, unlike a Llama's, computes in the precision that it is given."""
    return with_values(PolicyWithValue(built("StableLm", 40, layers=2)).double().requires_grad_(True))


def gradients_of_update(policy, rollout, rewards, micro_batch):
    params, found = replace(PARAMS, rollouts=6, minibatch=6, epochs=1, micro_batch=micro_batch, max_grad_norm=1e9), []
    twin = copy.deepcopy(policy)
    learner = ppo.make_learner(twin, params, 0)
    learner.optimizer.register_step_pre_hook(lambda *_: found.append({n: p.grad for n, p in twin.named_parameters()}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)  # where the policy asks for float32
        ppo.update(learner, rollout, rewards, params)
    return {name: gradient.clone() for name, gradient in found[0].items() if gradient is not None}


@given(texts(), st.integers(0, 3), st.integers(0, 3), st.integers(1, 5))
def test_gradients_know_neither_padding_nor_micro_batches(rollout, left, right, micro_batch):
    """In float64, where sums in another order differ by 1e-15: to 1e-10 of the largest gradient."""
    rewards, policy = noise_like(rollout.mask).double(), double_policy()
    wanted = gradients_of_update(policy, rollout, rewards, micro_batch=8)
    found = gradients_of_update(policy, widened(rollout, left, right), F.pad(rewards, (0, right)), micro_batch)
    largest = max(gradient.abs().max().item() for gradient in wanted.values())
    assert largest > 1e-3 and all(gradient.dtype == torch.float64 for gradient in wanted.values())
    for name, gradient in wanted.items():
        close(found[name], gradient, atol=1e-10 * largest)


@given(texts(), st.integers(0, 3), st.integers(0, 3), st.data())
def test_take_keeps_rows_and_loses_only_padding(rollout, left, right, data):
    rollout = widened(rollout, left, right)
    trunk = torch.arange(len(rollout.mask) * int(rollout.lengths.max() - 1) * 2.0).view(len(rollout.mask), -1, 2)
    rollout = replace(rollout, trunk=trunk)
    rows = torch.tensor(data.draw(st.lists(st.integers(0, len(rollout.mask) - 1), min_size=1, unique=True)))
    found = rollout.take(rows)
    assert type(found) is Rollout and found.query_mask[:, 0].any() and found.mask[:, -1].any()
    L = found.trunk.shape[1]
    assert found.lengths.max() - 1 == L and torch.equal(found.trunk, trunk[rows, :L])
    for name, x in rollout.tensors().items():
        if x.dim() == 2:
            kept = getattr(found, name)
            side = x[rows, -kept.shape[1] :] if name.startswith("quer") else x[rows, : kept.shape[1]]
            assert torch.equal(kept, side), name
    lost = rollout.query_mask[rows].sum() + rollout.mask[rows].sum() - found.query_mask.sum() - found.mask.sum()
    assert lost == 0 and torch.equal(found.scores, rollout.scores[rows])


@given(texts(), st.integers(1, 6), st.data())
def test_micro_batches_hold_every_row_once_by_length(rollout, size, data):
    rows = torch.tensor(data.draw(st.lists(st.integers(0, len(rollout.mask) - 1), min_size=1, unique=True)))
    parts = list(micro_batches(rollout, rows, size))
    assert sorted(torch.cat([part for part, _ in parts]).tolist()) == sorted(rows.tolist())
    assert all(len(part) == size for part, _ in parts[:-1]) and 0 < len(parts[-1][0]) <= size
    lengths = torch.cat([some.lengths for _, some in parts])
    assert (lengths.diff() >= 0).all()
    for part, some in parts:
        wanted = rollout.take(part)
        assert all(torch.equal(x, getattr(wanted, name)) for name, x in some.tensors().items())


@given(texts())
def test_rows_stand_side_by_side_and_are_read_before_each_token(rollout):
    ids, at = rollout.rows()
    assert ids.shape[1] == rollout.lengths.max() - 1 and at.shape == rollout.mask.shape
    for row, keep in enumerate(rollout.mask):
        text = torch.cat([rollout.queries[row][rollout.query_mask[row]], rollout.responses[row][keep]])
        assert torch.equal(ids[row, : len(text) - 1], text[:-1])  # nothing is read after the last
        assert torch.equal(ids[row, at[row][keep]], text[-len(keep.nonzero()) - 1 : -1])


def test_a_trunk_of_another_length_is_refused(rollout):
    fields = {name: x for name, x in rollout.tensors().items() if name not in ("logprobs", "ref_logprobs", "values")}
    with pytest.raises(InputError, match="trunk"):
        Responses(**fields, trunk=torch.zeros(len(rollout.mask), int(rollout.lengths.max()) + 1, 4))


@pytest.mark.parametrize("layers", [None, 1])
def test_a_probed_head_says_the_score_so_far_as_far_as_the_states_know_it(tokenizer, reward_model, layers):
    """At the tokens that it was fitted on it is closer to a separate critic than their mean is."""
    reference = PolicyWithValue(make_policy(tokenizer), layers).requires_grad_(False)
    some = [make_rollout(reference, reference, reward_model, tokenizer, seed=seed) for seed in range(12)]
    head = value_probe(reference, reward_model, some)
    probed = trainable_copy(reference, PolicyParams(trainable_layers=layers))
    probed.value_head.load_state_dict(head)
    critic = trainable_copy(reference, PolicyParams(critic="separate"), reward_model)
    with torch.no_grad():
        found, wanted = (torch.cat([p(texts, 1.0)[1][texts.mask] for texts in some]) for p in (probed, critic))
    assert found.mean().item() == pytest.approx(wanted.mean().item(), abs=1e-4)  # least squares keep the mean
    assert (found - wanted).var() < 0.75 * wanted.var()
    states = torch.cat([reference.states(texts) for texts in some])
    assert torch.allclose((states @ head["weight"].T + head["bias"]).squeeze(-1), found, atol=1e-4)
    assert len(reward_model.model.state_dict()) and not any(p.requires_grad for p in reference.parameters())


def test_a_probe_needs_a_reward_model_that_reads_token_by_token(reference, reward_model, tokenizer):
    foreign = replace(reward_model, policy_tokenizer=train_tokenizer(["zebra"], 262))
    with pytest.raises(InputError, match="in the policy's own tokens"):
        value_probe(reference, foreign, [])
