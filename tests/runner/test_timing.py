"""Seconds and memory that `check` says, against what one H200 took."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import LlamaConfig

from dense_rlhf.config.params import AttributionParams, PolicyParams, PPOParams, RewardParams, RunParams
from dense_rlhf.runner import cost, timing

H100 = next(device for device in timing.DEVICES if device.name == "H100")
LINES = [json.loads(one) for one in (Path(__file__).parents[2] / "benchmarks" / "gpu.jsonl").read_text().splitlines()]
COMMON = {"pad_token_id": 1, "tie_word_embeddings": True}
SMALL = dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, vocab_size=49152)
LARGE = dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, vocab_size=128256)
SHAPES = {"135M": SMALL | {"num_key_value_heads": 3}, "1B": LARGE | {"num_key_value_heads": 8}}
RUNS = {
    "135M, all weights": ("135M", "135M", {}),
    "1B, LoRA": ("1B", "135M", {"lora_rank": 32}),
    "1B explains": ("1B", "1B", {"lora_rank": 32}),
}
P, TOKEN_BUDGET = 128, 65536


def run_params(policy, **changes):
    ppo = PPOParams(rollouts=64, minibatch=32, micro_batch=16, max_new_tokens=128, **changes)
    precise = {"dtype": "bfloat16"}
    attribution = AttributionParams(permutations=1)
    return RunParams(
        policy=PolicyParams(**precise, **policy), reward=RewardParams(**precise), ppo=ppo, attribution=attribution
    )


@pytest.fixture(scope="module")
def counted():
    """Models on the meta device, and parameters, of each run."""
    made = {}
    for name, (shape, reward, policy) in RUNS.items():
        params, vocabulary = run_params(policy), {"vocab_size": SHAPES[shape]["vocab_size"]}
        scorer = cost.empty_classifier(LlamaConfig(**SHAPES[reward] | vocabulary, **COMMON, num_labels=1), "bfloat16")
        lm = cost.empty_policy(LlamaConfig(**SHAPES[shape], **COMMON), "bfloat16")
        made[name] = cost.assemble(lm, scorer, params), params
    return made


def seconds(counted, name, step):
    models, params = counted[name]
    return next(work.seconds(H100) for work in timing.time(models, params, P, ["shap"]) if work.step == step)


def took(measure, case, step=None):
    """The only line of this measure whose case begins so; explanations a response, the samplers' last round."""
    lines = [one for one in LINES if one["benchmark"] == f"gpu/{measure}" and one["case"].startswith(case)]
    return next(one["ours"] for one in lines if one.get("step") == step)


FITTED = [
    ("135M, all weights", "sample", took("update", "135M", "sample")),
    ("1B, LoRA", "sample", took("update", "1B", "sample")),
    ("135M, all weights", "score", took("update", "135M", "score")),
    ("1B, LoRA", "score", took("update", "1B", "score")),
    ("135M, all weights", "explain", 64 * took("explain", "135M")),
    ("1B explains", "explain", 64 * took("explain", "1B")),
    ("1B, LoRA", "log-probabilities", took("update", "1B", "log-probabilities")),
    ("135M, all weights", "update", took("update", "135M", "update")),
    ("1B, LoRA", "update", took("update", "1B", "update")),
]
JUDGED = [
    ("135M, all weights", "sample", took("sampler", "135M")),
    ("135M, all weights", "explain", took("update", "135M", "explain")),
    ("1B, LoRA", "explain", took("update", "1B", "explain")),
    ("135M, all weights", "log-probabilities", took("update", "135M", "log-probabilities")),
]


@pytest.mark.parametrize("name, step, measured", FITTED + JUDGED, ids=lambda x: x if isinstance(x, str) else "")
def test_seconds_are_within_a_fifth_of_those_on_a_card(name, step, measured, counted):
    """Those that the constants were fitted to, and four that were not looked at for it. No third shape was ever run."""
    assert seconds(counted, name, step) == pytest.approx(measured, rel=0.2)


@pytest.mark.parametrize("name, case", [("135M, all weights", "135M"), ("1B, LoRA", "1B")])
def test_memory_at_the_worst_moment_is_within_a_twentieth(name, case, counted):
    """Nothing in it was fitted to the card."""
    models, params = counted[name]
    gib = max(one["gib"] for one in LINES if one["benchmark"] == "gpu/update" and one["case"].startswith(case))
    assert cost.peak(cost.memory(models, params, P, TOKEN_BUDGET)) / 2**30 == pytest.approx(gib, rel=0.05)


def test_what_is_computed_twice_is_no_model_flop(counted):
    models, params = counted["1B, LoRA"]
    wide = replace(params, ppo=replace(params.ppo, micro_batch=32))  # its logits no longer fit one pass
    narrow, again = (timing.time(models, one, P, ["shap"]) for one in (params, wide))
    assert sum(work.flops for work in again) > sum(work.flops for work in narrow)
    assert timing.model_flops(again) == timing.model_flops(narrow) == sum(work.flops for work in narrow)


def test_the_vendors_peak_goes_by_the_chip():
    assert timing.vendor_peak("NVIDIA H200") == timing.vendor_peak("NVIDIA H100 80GB HBM3") == 989e12
    assert timing.vendor_peak("NVIDIA A100-SXM4-80GB") == 312e12 and timing.vendor_peak("RTX 4090") is None
