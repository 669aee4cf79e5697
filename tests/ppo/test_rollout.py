"""Sampling and scoring: what the sampler drew is what the training forward says it drew."""

import copy
from collections import Counter
from dataclasses import replace

import pytest
import torch
from conftest import DEVICE, PROMPTS, TINY, jitter, make_policy, make_rollout
from torch.nn import functional as F
from transformers import MistralConfig, MistralForCausalLM
from transformers.cache_utils import DynamicLayer

from dense_rlhf.config.params import PolicyParams, PPOParams
from dense_rlhf.models.dialogue import render
from dense_rlhf.models.policy import PolicyWithValue, position_ids, trainable_copy
from dense_rlhf.ppo import decoding
from dense_rlhf.ppo.rollout import appraise, response_texts
from dense_rlhf.ppo.sampling import Sampling, encode_prompts, prompt_batches, sample, sample_responses
from dense_rlhf.types import InputError, Message

SAMPLING = PPOParams(max_new_tokens=8, temperature=0.7)


def encoded(prompts, tokenizer):
    return [x.to(DEVICE) for x in encode_prompts(prompts, tokenizer)]


def draw(lm, tokenizer, seed, prompts=PROMPTS, T=8, temperature=1.0):
    generator = torch.Generator().manual_seed(seed)
    settings = Sampling(T, temperature, (tokenizer.eos_token_id,), tokenizer.pad_token_id)
    return sample(lm, *encoded(prompts, tokenizer), settings, generator)[:2]


def test_prompts_are_left_padded_and_whole(tokenizer):
    ids, mask = encode_prompts(PROMPTS, tokenizer)
    assert bool(mask[:, -1].all()) and not mask.all()
    assert [tokenizer.decode(row[keep]) for row, keep in zip(ids, mask)] == PROMPTS
    assert bool((ids[~mask] == tokenizer.pad_token_id).all())


@pytest.mark.parametrize("prompts", [["the film", ""], [""]])
def test_a_prompt_of_no_tokens_is_refused_by_name(prompts, tokenizer):
    with pytest.raises(InputError, match="prompt '' has no tokens"):
        encode_prompts(prompts, tokenizer)


def test_sampling_is_decided_by_the_generator(reference, tokenizer):
    first, again, other = (draw(reference.lm, tokenizer, seed) for seed in (0, 0, 1))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])


def test_mask_is_true_through_eos_and_padding_follows(reference, tokenizer):
    responses, mask = draw(reference.lm, tokenizer, 5, PROMPTS * 5)
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    for row, keep in zip(responses.tolist(), mask.tolist()):
        length = row.index(eos) + 1 if eos in row else len(row)
        assert keep == [t < length for t in range(len(row))]
        assert all(token == pad for token in row[length:])
    assert 3 < mask.sum(-1).float().mean() < 7  # EOS has probability about 0.2


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_sampled_frequencies_are_the_tempered_softmax(reference, tokenizer, temperature):
    N = 4000
    responses, _ = draw(reference.lm, tokenizer, 0, ["the film"] * N, T=1, temperature=temperature)
    with torch.no_grad():
        logits = reference.lm(input_ids=encoded(["the film"], tokenizer)[0]).logits[0, -1] / temperature
    logits[tokenizer.pad_token_id] = -torch.inf
    wanted, frequencies = logits.softmax(-1), torch.bincount(responses.flatten(), minlength=len(logits)) / N
    assert 0.5 * (wanted - frequencies).abs().sum() < 0.13  # total variation; N draws over 300 tokens give about 0.1
    top = wanted.topk(5).indices
    assert ((wanted - frequencies)[top].abs() < 4 * (wanted[top] / N).sqrt()).all()


def test_temperatures_differ(reference, tokenizer):
    """The test above tells temperatures apart: their total variation is beyond its tolerance."""
    with torch.no_grad():
        logits = reference.lm(input_ids=encoded(["the film"], tokenizer)[0]).logits[0, -1]
    shares = [(logits / temperature).softmax(-1) for temperature in (0.5, 1.0, 2.0)]
    assert all(0.5 * (a - b).abs().sum() > 0.2 for a, b in zip(shares, shares[1:]))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_equal_a_plain_forward_of_each_row_alone(policy, reference, reward_model, tokenizer, temperature):
    made = make_rollout(policy, reference, reward_model, tokenizer, temperature=temperature)
    for row in range(len(made.scores)):
        query, response = made.queries[row][made.query_mask[row]], made.responses[row][made.mask[row]]
        with torch.no_grad():
            logits = policy.lm(input_ids=torch.cat([query, response])[None]).logits[0, len(query) - 1 : -1]
        logits = logits / temperature
        logits[:, tokenizer.pad_token_id] = -torch.inf
        wanted = F.log_softmax(logits, -1).gather(-1, response[:, None]).squeeze(-1)
        assert torch.allclose(made.logprobs[row, : len(response)], wanted, atol=1e-5)
        assert torch.equal(made.logprobs[row, len(response) :], torch.zeros(8 - len(response)))
    assert torch.allclose(made.logprobs, made.ref_logprobs, atol=1e-5)  # the policy is still the reference


@pytest.mark.parametrize("critic", ["shared", "detached", "separate"])
def test_what_the_sampler_read_is_what_the_training_forward_reads(critic, reference, reward_model, tokenizer):
    policy = trainable_copy(reference, PolicyParams(critic=critic), reward_model)
    policy.value_head.weight.data.fill_(0.3)
    drawn = sample_responses(policy, PROMPTS * 3, tokenizer, SAMPLING, torch.Generator().manual_seed(0))
    assert not drawn.ended.all() and drawn.mask.sum(-1).unique().numel() > 3  # rows leave the batch
    assert not drawn.states[~drawn.mask].any() and drawn.states[drawn.mask].abs().amax(-1).all()
    read, again = (appraise(policy, reference, texts, 0.7, 4) for texts in (drawn, replace(drawn, states=None)))
    for name in ("logprobs", "values", "ref_logprobs"):
        torch.testing.assert_close(getattr(read, name), getattr(again, name), atol=1e-5, rtol=0)
    assert read.states is None  # an update reads them anew


@pytest.mark.parametrize("changes", [{"lora_rank": 2}, {"dtype": "bfloat16"}])
def test_states_of_another_arithmetic_than_the_training_forwards_are_not_kept(changes, reward_model, tokenizer):
    bf16 = "dtype" in changes
    reference = PolicyWithValue(make_policy(tokenizer).to(torch.bfloat16 if bf16 else torch.float32), bf16=bf16)
    policy = trainable_copy(reference.requires_grad_(False), PolicyParams(**changes), reward_model)
    assert sample_responses(policy, PROMPTS, tokenizer, SAMPLING, torch.Generator().manual_seed(0)).states is None


@pytest.mark.parametrize("sampler", ["cache", "captured"])
@pytest.mark.parametrize("changes", [{}, {"lora_rank": 2}, {"dtype": "bfloat16"}], ids=["plain", "lora", "bfloat16"])
def test_what_frozen_blocks_read_while_sampling_is_not_computed_again(
    changes, sampler, reference, reward_model, tokenizer, monkeypatch
):
    params, bf16 = PolicyParams(trainable_layers=1, **changes), "dtype" in changes
    lm = copy.deepcopy(reference.lm).to(torch.bfloat16 if bf16 else torch.float32)
    frozen = PolicyWithValue(lm, 1, bf16=bf16).requires_grad_(False)
    policy = trainable_copy(frozen, params)
    settings = replace(SAMPLING, max_new_tokens=20, sampler=sampler)
    responses = sample_responses(policy, PROMPTS * 3, tokenizer, settings, torch.Generator().manual_seed(3))
    assert responses.ended.any() and len(responses.lengths.unique()) > 2, "some rows leave before others"
    if sampler == "captured":  # shows none: they are computed
        assert responses.trunk is None and appraise(policy, frozen, responses, 0.7).trunk is not None
        return
    wanted, read = policy.trunk(responses.rows()[0]), torch.arange(int(responses.lengths.max()) - 1, device=DEVICE)
    used = read < responses.lengths[:, None] - 1
    assert responses.trunk.shape == wanted.shape and responses.trunk.dtype == wanted.dtype
    torch.testing.assert_close(responses.trunk[used], wanted[used], atol=0.1 if bf16 else 1e-5, rtol=0.02)
    plain = appraise(policy, frozen, replace(responses, trunk=None, states=None), 0.7)
    monkeypatch.setattr("dense_rlhf.ppo.rollout._trunk", None)
    kept = appraise(policy, frozen, responses, 0.7)
    torch.testing.assert_close(kept.logprobs, plain.logprobs, atol=0.05 if bf16 else 1e-5, rtol=1e-3)
    torch.testing.assert_close(kept.ref_logprobs, plain.ref_logprobs, atol=0.05 if bf16 else 1e-5, rtol=1e-3)


def test_more_padding_changes_nothing(policy, rollout, tokenizer):
    policy.value_head.weight.data.fill_(0.3)
    pad = tokenizer.pad_token_id
    wide = replace(
        rollout,
        queries=F.pad(rollout.queries, (5, 0), value=pad),
        query_mask=F.pad(rollout.query_mask, (5, 0)),
        **{
            name: F.pad(getattr(rollout, name), (0, 3), value=pad if name == "responses" else 0)
            for name in ("responses", "mask", "logprobs", "ref_logprobs", "values")
        },
    )
    with torch.no_grad():
        before, after = (policy(texts, 1.0) for texts in (rollout, wide))
    for a, b in zip(before, after):
        assert torch.allclose(a, b[:, :-3], atol=1e-5) and a.abs().sum() > 1 and not b[:, -3:].any()


def test_positions_count_kept_tokens_only():
    mask = torch.tensor([[0, 0, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0]]).bool()
    assert position_ids(mask)[mask].tolist() == [0, 1, 2, 0, 1, 2]


def test_entropy_is_that_of_the_sampled_distribution(policy, rollout, tokenizer):
    with torch.no_grad():
        policy.lm.lm_head.weight.zero_()
        policy.lm.lm_head.bias.zero_()
        entropy = policy(rollout, 1.0)[2]
    wanted = torch.tensor(len(tokenizer) - 1.0).log()  # uniform over all but padding
    assert torch.allclose(entropy[rollout.mask], wanted, atol=1e-4) and not entropy[~rollout.mask].any()


def test_scores_are_those_of_prompt_and_response_without_eos(rollout, reward_model):
    for row in range(len(rollout.scores)):
        alone = torch.cat([rollout.queries[row][rollout.query_mask[row]], rollout.responses[row][rollout.players[row]]])
        wanted = reward_model.calibrate(reward_model.outputs([alone.tolist()]))
        assert abs(wanted.item() - rollout.scores[row].item()) < 1e-5


def test_ended_and_texts(rollout, tokenizer):
    eos = tokenizer.eos_token_id
    last = rollout.responses.gather(-1, rollout.mask.sum(-1, keepdim=True) - 1).squeeze(-1)
    assert torch.equal(rollout.ended, last == eos)
    texts = response_texts(rollout, tokenizer)
    assert not any("<" in text for text in texts)
    row = int(rollout.players.sum(-1).argmax())
    assert texts[row] == tokenizer.decode(rollout.responses[row][rollout.players[row]])


def test_prompt_batches_give_every_prompt_once_an_epoch():
    prompts = [str(i) for i in range(10)]
    batches = prompt_batches(prompts, 5, seed=0)
    epochs = [next(batches) + next(batches) for _ in range(3)]
    assert all(Counter(epoch) == Counter(prompts) for epoch in epochs) and epochs[0] != epochs[1]
    again = prompt_batches(prompts, 5, seed=0)
    assert next(again) + next(again) == epochs[0]
    with pytest.raises(InputError, match="ppo.rollouts is 11"):
        next(prompt_batches(prompts, 11, seed=0))


def test_a_dialogue_goes_through_the_chat_template_where_there_is_one(tokenizer):
    dialogue = (Message("user", "hi"),)
    assert render(dialogue, tokenizer) == "\n\nHuman: hi\n\nAssistant:"
    with_template = copy.deepcopy(tokenizer)
    with_template.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
    assert render(dialogue, with_template) == "[user]hi[assistant]" and render("plain", with_template) == "plain"


@pytest.mark.parametrize("size", [1, 2, 100])
def test_how_prompts_are_read_together_changes_no_sample(reference, tokenizer, size, monkeypatch):
    wanted = draw(reference.lm, tokenizer, 5, PROMPTS * 5)
    monkeypatch.setattr(decoding, "PREFILL", size)
    assert all(torch.equal(a, b) for a, b in zip(wanted, draw(reference.lm, tokenizer, 5, PROMPTS * 5)))


def test_a_cache_with_room_holds_what_one_that_grows_holds():
    generator, grows = torch.Generator().manual_seed(0), DynamicLayer()

    def states(rows, tokens):
        return tuple(torch.randn(rows, 2, tokens, 4, generator=generator) for _ in range(2))

    prompts = states(3, 5)
    grows.update(*prompts)
    roomy = decoding._Roomy(prompts, 4)
    for kept in ([0, 1, 2], [2, 0], [0, 1], [1]):
        for cache in (grows, roomy):
            cache.batch_select_indices(torch.tensor(kept))
        new = states(len(kept), 1)
        assert all(map(torch.equal, grows.update(*new), roomy.update(*new)))
        assert roomy.get_seq_length() == grows.get_seq_length()
    with pytest.raises(RuntimeError):  # no room is left
        roomy.update(*states(1, 1))


@pytest.mark.parametrize("compact", [0.0, 1.0])
def test_rows_that_leave_the_batch_change_no_other(reference, tokenizer, compact, monkeypatch):
    wanted = draw(reference.lm, tokenizer, 5, PROMPTS * 5)
    monkeypatch.setattr(decoding, "COMPACT", compact)
    assert all(torch.equal(a, b) for a, b in zip(wanted, draw(reference.lm, tokenizer, 5, PROMPTS * 5)))


def test_a_sliding_window_is_sampled_from_as_it_reads(tokenizer):
    """Greedy by a very low temperature, against a plain forward of what was drawn."""
    config = MistralConfig(
        vocab_size=len(tokenizer),
        **TINY,
        num_key_value_heads=1,
        sliding_window=3,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    lm = jitter(MistralForCausalLM(config), seed=2, scale=0.5)
    responses, mask = draw(lm, tokenizer, 0, temperature=1e-4)
    queries, query_mask = encoded(PROMPTS, tokenizer)
    for row in range(len(PROMPTS)):
        query, response = queries[row][query_mask[row]], responses[row][mask[row]]
        with torch.no_grad():
            logits = lm(input_ids=torch.cat([query, response])[None]).logits[0, len(query) - 1 : -1]
        logits[:, tokenizer.pad_token_id] = -torch.inf
        assert torch.equal(logits.argmax(-1), response)
    policy = PolicyWithValue(lm, trainable_layers=1)
    read = sample_responses(policy, PROMPTS, tokenizer, SAMPLING, torch.Generator().manual_seed(0))
    used = torch.arange(read.trunk.shape[1], device=DEVICE) < read.lengths[:, None] - 1
    torch.testing.assert_close(read.trunk[used], policy.trunk(read.rows()[0])[used], atol=1e-5, rtol=1e-3)
