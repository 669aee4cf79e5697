"""Captured decoding steps: the plain loop's tokens, by operations that a CUDA graph can hold."""

import gc
import weakref
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from conftest import DEVICE, TINY, jitter
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from dense_rlhf.ppo import captured
from dense_rlhf.ppo.captured import CAPTURED, StaticDecoder
from dense_rlhf.ppo.decoding import DynamicDecoder, Sampling, sample
from dense_rlhf.types import InputError

V, PAD = 40, 0
OTHER_NAMES = {"gpt2": {"n_inner": 32}, "qwen3": {"head_dim": 8}, "mistral": {"sliding_window": None}}


def tiny(kind, **changes):
    sizes = TINY | {"num_key_value_heads": 1} if kind not in ("gpt2", "gpt_neox") else TINY
    config = CONFIG_MAPPING[kind](
        **sizes | {"vocab_size": V, "pad_token_id": PAD} | OTHER_NAMES.get(kind, {}) | changes
    )
    torch.manual_seed(0)
    return jitter(AutoModelForCausalLM.from_config(config), 0, 0.3).requires_grad_(False)


@pytest.fixture(scope="module")
def models():
    return {kind: tiny(kind) for kind in CAPTURED}


def prompts(lengths, seed=0):
    """Left-padded prompts (B, P) of these lengths, and their mask."""
    P, generator = max(lengths), torch.Generator().manual_seed(seed)
    ids = torch.randint(1, V, (len(lengths), P), generator=generator)
    mask = torch.arange(P) >= P - torch.tensor(lengths)[:, None]
    return ids.masked_fill(~mask, PAD).to(DEVICE), mask.to(DEVICE)


def both(lm, queries, sampling, seed=0):
    """What either decoder draws, and the state of its generator afterwards."""
    drawn = []
    for decoder in (DynamicDecoder, StaticDecoder):
        generator = torch.Generator().manual_seed(seed)
        drawn.append((sample(lm, *queries, sampling, generator, decoder), generator.get_state()))
    return drawn


def assert_equal(lm, queries, sampling, seed=0):
    (plain, state), (static, other) = both(lm, queries, sampling, seed)
    assert torch.equal(static.responses, plain.responses) and torch.equal(static.mask, plain.mask)
    torch.testing.assert_close(static.states, plain.states, atol=1e-5, rtol=1e-5)
    assert torch.equal(state, other)  # so that later draws are the same too
    return static


@pytest.mark.parametrize("kind", CAPTURED)
def test_tokens_are_the_plain_loops(kind, models, monkeypatch):
    """Uneven prompts, rows that end at different steps and leave, over several windows of the cache."""
    monkeypatch.setattr(captured, "WINDOW", 8)
    lengths = [1 + 3 * i % 11 for i in range(24)]
    made = assert_equal(models[kind], prompts(lengths), Sampling(20, 1.3, (1, 2, 4, 5, 6), PAD, barred=(3, 7)))
    ends = made.mask.sum(-1).sort().values
    assert ends.unique().numel() > 5 and ends[12] < ends[-2]  # half leaves, others go on


@settings(max_examples=12)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=18),
    T=st.integers(1, 8),
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    eos=st.sets(st.integers(1, V - 1), min_size=1, max_size=12),
    barred=st.sets(st.integers(1, V - 1), max_size=5),
    seed=st.integers(0, 99),
)
def test_for_any_prompts_and_ends(models, lengths, T, temperature, eos, barred, seed):
    sampling = Sampling(T, temperature, tuple(sorted(eos)), PAD, tuple(sorted(barred)))
    assert_equal(models["llama"], prompts(lengths, seed), sampling, seed)


def test_rows_leave_when_half_have_ended(models, monkeypatch):
    sizes, run = [], captured._Static.run
    monkeypatch.setattr(captured._Static, "run", lambda self, lm, b, L: sizes.append(b) or run(self, lm, b, L))
    assert_equal(models["llama"], prompts([4] * 40), Sampling(20, 1.0, (1, 2, 3, 4, 5, 6), PAD))
    assert set(sizes) <= {40, 20, 10, 5} and len(set(sizes)) > 2  # a graph for each
    assert sizes == sorted(sizes, reverse=True)


def test_the_window_grows_and_the_first_steps_pay_for_a_short_one(models, monkeypatch):
    windows, run = [], captured._Static.run
    monkeypatch.setattr(captured._Static, "run", lambda self, lm, b, L: windows.append(L) or run(self, lm, b, L))
    assert_equal(models["llama"], prompts([60] * 3), Sampling(8, 1.0, (V,), PAD))
    assert windows == [64] * 4 + [128] * 3


def test_weights_that_change_in_place_are_read_and_those_that_move_are_captured_anew():
    lm, queries, sampling = tiny("llama"), prompts([5, 3, 4]), Sampling(9, 1.0, (1,), PAD)
    assert_equal(lm, queries, sampling)
    first = captured._STATIC[lm]
    lm.lm_head.weight.neg_()
    assert_equal(lm, queries, sampling, seed=1)
    assert captured._STATIC[lm] is first
    lm.lm_head.weight.data = lm.lm_head.weight.data.clone()
    assert_equal(lm, queries, sampling, seed=2)
    assert captured._STATIC[lm] is not first


@pytest.mark.parametrize(
    "change, again",
    [
        ({}, True),
        ({"lengths": [2, 2]}, True),
        ({"T": 5}, True),
        ({"lengths": [3] * 7}, False),
        ({"lengths": [62, 3], "T": 4}, False),
        ({"temperature": 0.5}, False),
    ],
    ids=str,
)
def test_what_was_captured_serves_what_fits_it(change, again):
    lm, base = tiny("llama"), {"lengths": [5, 3, 4], "T": 6, "temperature": 1.0}
    kept = []
    for asked in (base, base | change, base, base | change):
        assert_equal(lm, prompts(asked["lengths"]), Sampling(asked["T"], asked["temperature"], (1,), PAD))
        kept.append(captured._STATIC[lm])
    assert (kept[1] is kept[0]) == again
    assert (kept[3] is kept[2] is kept[1]) == ("temperature" not in change)  # what is made anew serves both


def test_what_was_captured_goes_with_its_model():
    lm = tiny("llama")
    assert_equal(lm, prompts([2, 3]), Sampling(4, 1.0, (1,), PAD))
    static = weakref.ref(captured._STATIC[lm])
    del lm
    gc.collect()
    assert static() is None


def test_numbers_that_are_not_finite_end_it_and_do_not_stay(models):
    lm, queries, sampling = tiny("llama"), prompts([5, 3]), Sampling(6, 1.0, (1,), PAD)
    bias = lm.model.norm.weight
    sound = bias.clone()
    bias.fill_(torch.nan)
    with pytest.raises(InputError, match="not finite for token 0"):
        sample(lm, *queries, sampling, torch.Generator(), StaticDecoder)
    bias.copy_(sound)
    assert_equal(lm, queries, sampling)


@pytest.mark.parametrize("kind, changes", [("mistral", {"sliding_window": 8}), ("opt", {"ffn_dim": 32})])
def test_an_architecture_that_no_test_compares_is_refused(kind, changes):
    with pytest.raises(InputError, match=f"policy.name is a {kind}; wanted one of llama"):
        sample(tiny(kind, **changes), *prompts([3]), Sampling(3, 1.0, (1,), PAD), torch.Generator(), StaticDecoder)


class Capturing(TorchDispatchMode):
    """Refuses what a CUDA graph cannot hold: values read back, and numbers that come from Python or the CPU."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **kwargs or {})
        name = function.overloadpacket.__name__
        assert name not in ("lift_fresh", "_local_scalar_dense", "nonzero", "unique", "equal"), name
        for x in args:
            assert not isinstance(x, torch.Tensor) or x.device.type == "meta" or not x.dim(), (name, x.device)
            assert not isinstance(x, torch.Tensor) or x.device.type == "meta" or name != "_to_copy", name
        return made


class Remembered(NamedTuple):
    """Keys and values of a layer, of a prompt of three tokens."""

    keys: torch.Tensor
    values: torch.Tensor


@pytest.mark.parametrize("kind", CAPTURED)
def test_a_step_asks_nothing_of_the_device(kind, models):
    """On tensors without values, which torch cannot read back, and does not mix with others."""
    config = models[kind].config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    with torch.device("meta"), torch.no_grad():
        lm = AutoModelForCausalLM.from_config(config).eval()
        layers = [Remembered(*torch.zeros(2, 2, heads, 3, 8, device="meta"))] * 2
        static = captured._Static(lm, SimpleNamespace(layers=layers), (2, 64), Sampling(9, 0.7, (1, 2), PAD, (3,)))
        with Capturing():
            static.step(lm, 2, 64)
        assert static.made.token.device.type == "meta"
