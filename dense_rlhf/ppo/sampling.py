"""Prompts in batches, and responses sampled to them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from dense_rlhf.config.params import PPOParams
from dense_rlhf.models.dialogue import messages_of, prompt_ids, turn_ends
from dense_rlhf.models.policy import PolicyWithValue
from dense_rlhf.models.reward_model import longest_text, padded
from dense_rlhf.ppo.captured import StaticDecoder
from dense_rlhf.ppo.decoding import LOOK_AT, NOT_FINITE, Drawn, Sampling, is_eos, sample, until_eos
from dense_rlhf.types import InputError, Prompt, Responses


def encode_prompts(prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase) -> tuple[Tensor, Tensor]:
    """Left-padded token ids (B, P) and their mask; nothing is cut. Raises `InputError` as `prompt_ids` does."""
    ids = prompt_ids(prompts, tokenizer)
    if not ids:
        raise InputError("prompts is empty, wanted at least one")
    return padded(ids, tokenizer.pad_token_id or 0, torch.device("cpu"), left=True)


def prompt_batches(prompts: Sequence[Prompt], size: int, seed: int) -> Iterator[list[Prompt]]:
    """Endless batches of `size` prompts, each epoch in a fresh order, without those that do not fill a batch."""
    if len(prompts) < size:
        raise InputError(f"ppo.rollouts is {size}, but there are only {len(prompts)} training prompts; lower it")
    shuffler = random.Random(seed)
    while True:
        order = shuffler.sample(range(len(prompts)), len(prompts))
        for start in range(0, len(order) - size + 1, size):
            yield [prompts[i] for i in order[start : start + size]]


def generate(
    lm: PreTrainedModel, queries: Tensor, query_mask: Tensor, sampling: Sampling, generator: torch.Generator
) -> Drawn:
    """As `sample`, by transformers' own loop over a static cache, which it compiles on CUDA; without states."""
    seed = int(torch.randint(2**31, (), generator=generator, device=generator.device))
    devices = [queries.device] if queries.is_cuda else []
    T, pad_id = sampling.max_new_tokens, sampling.pad_id
    ends = dict(eos_token_id=list(sampling.eos_ids), pad_token_id=pad_id, suppress_tokens=[pad_id, *sampling.barred])
    softmax = dict(do_sample=True, temperature=sampling.temperature, top_k=0, top_p=1.0)
    own, lm.generation_config = lm.generation_config, GenerationConfig()  # its own may penalise or exclude tokens
    try:
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            mask, cache = query_mask.long(), "static"
            whole = lm.generate(
                queries, attention_mask=mask, max_new_tokens=T, cache_implementation=cache, **ends, **softmax
            )
    except RuntimeError as error:
        if "probability tensor" not in str(error):
            raise
        raise InputError(f"{NOT_FINITE}; {LOOK_AT}") from error
    finally:
        lm.generation_config = own
    drawn = whole[:, queries.shape[1] :]
    responses = F.pad(drawn, (0, T - drawn.shape[1]), value=pad_id)
    return Drawn(responses, until_eos(responses, sampling.eos_ids), None)


def sampling_of(lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, params: PPOParams) -> Sampling:
    """How `params` sample from a model: a reply ends at every token that ends one for its own generation or template.

    Ids that no token has are barred: many models have more logits than tokens.
    """
    own = lm.generation_config.eos_token_id if lm.generation_config is not None else None
    eos = turn_ends(tokenizer) | ({*own} if isinstance(own, (list, tuple)) else {own}) - {None}
    if not eos:
        raise InputError("policy.name: neither its tokenizer nor its generation_config says which token ends a reply")
    if tokenizer.pad_token_id in eos:
        token = tokenizer.pad_token
        raise InputError(
            f"policy.name: its padding token {token!r} also ends a reply; give its tokenizer another pad_token"
        )
    ids = range(lm.config.get_text_config().vocab_size)
    barred = sorted({*ids} - {*tokenizer.get_vocab().values()}) if len(ids) > len(tokenizer) else ()
    return Sampling(
        params.max_new_tokens, params.temperature, tuple(sorted(eos)), tokenizer.pad_token_id, tuple(barred)
    )


def sample_responses(
    policy: PolicyWithValue,
    prompts: Sequence[Prompt],
    tokenizer: PreTrainedTokenizerBase,
    params: PPOParams,
    generator: torch.Generator,
) -> Responses:
    """A response of `policy` to each prompt, by `params.sampler`; its score is 0 until `scored`.

    Its states are kept where they are the training forward's; those above frozen blocks where the sampler shows them.
    """
    device, lm = next(policy.parameters()).device, policy.sampling_model()
    queries, query_mask = (x.to(device) for x in encode_prompts(prompts, tokenizer))
    sampling, longest = sampling_of(lm, tokenizer, params), longest_text(lm)
    if queries.shape[1] + params.max_new_tokens > longest:
        asked = f"a prompt of {queries.shape[1]} tokens and ppo.max_new_tokens = {params.max_new_tokens}"
        raise InputError(f"{asked} are more than the policy's {longest}; lower data.max_prompt_chars or the tokens")
    sampling = replace(sampling, cut=policy.cut)
    drawn = SAMPLERS[params.sampler](lm, queries, query_mask, sampling, generator)
    unscored, ended = torch.zeros(len(queries), device=device), is_eos(drawn.responses, sampling.eos_ids).any(-1)
    more = {"states": drawn.states if policy.samples_as_it_learns else None}
    more["prompts"] = tuple(map(messages_of, prompts))
    if drawn.trunk is not None:
        more["trunk"] = drawn.trunk[:, : int((query_mask.sum(-1) + drawn.mask.sum(-1)).max()) - 1]
    return Responses(queries, query_mask, drawn.responses, drawn.mask, unscored, ended, **more)


SAMPLERS = {"cache": sample, "captured": partial(sample, decoder=StaticDecoder), "generate": generate}
