"""What the benchmarks of a GPU share: a clock, models of random weights in known shapes, one update by its steps."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig

from dense_rlhf import ppo
from dense_rlhf.attribution import attribute
from dense_rlhf.config.params import AttributionParams, PolicyParams, PPOParams, RewardParams, RunParams
from dense_rlhf.models.language_models import default_device
from dense_rlhf.models.policy import PolicyWithValue, trainable_copy
from dense_rlhf.models.reward_model import RewardModel
from dense_rlhf.ppo.rollout import appraise, scored
from dense_rlhf.ppo.sampling import SAMPLERS, Sampling
from dense_rlhf.runner import cost
from dense_rlhf.shaping.rewards import shape_rewards
from dense_rlhf.types import Reading, Responses, RewardShape

DEVICE = default_device()


def line(measure: str, case: str, **more) -> None:
    rounded = {name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in more.items()}
    print(json.dumps({"benchmark": f"gpu/{measure}", "case": case} | rounded), flush=True)


def clocked(act: Callable) -> tuple[float, float, object]:
    """Seconds, most GiB at once (0 on a CPU), and what the work returned."""
    if DEVICE.type == "cpu":
        start, result = time.perf_counter(), act()
        return time.perf_counter() - start, 0.0, result
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start, result = time.perf_counter(), act()
    torch.cuda.synchronize()
    return time.perf_counter() - start, torch.cuda.max_memory_allocated() / 2**30, result


SHAPES = {
    "135M": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
    "1B": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}  # of SmolLM2-135M, of Llama-3.2-1B, and for --quick
EOS, PAD = 0, 1
TOKENIZER = SimpleNamespace(eos_token_id=EOS, pad_token_id=PAD)


def random_model(kind: type, shape: str, **options) -> torch.nn.Module:
    ends = {"pad_token_id": PAD, "eos_token_id": EOS, "tie_word_embeddings": True}
    config = LlamaConfig(**SHAPES[shape] | ends | options)
    torch.manual_seed(0)
    with torch.device(DEVICE):
        return kind.from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False)


def random_scorer(shape: str, **options) -> RewardModel:
    return RewardModel(random_model(AutoModelForSequenceClassification, shape, num_labels=1, **options), TOKENIZER)


def random_readings(shape: str, B: int, P: int, T: int) -> list[Reading]:
    ids = torch.randint(2, SHAPES[shape]["vocab_size"], (B, P + T), generator=torch.Generator().manual_seed(0)).tolist()
    return [Reading(tuple(row[:P]), tuple(row[P:])) for row in ids]


def training(
    shape: str, reward_shape: str, params: RunParams
) -> tuple[ppo.Learner, PolicyWithValue, RewardModel, cost.Models]:
    """A learner, its reference and a reward model that reads what it writes; and all three to be counted."""
    reference = PolicyWithValue(random_model(AutoModelForCausalLM, shape), bf16=True).requires_grad_(False)
    reward_model = random_scorer(reward_shape, vocab_size=SHAPES[shape]["vocab_size"])
    learner = ppo.make_learner(trainable_copy(reference, params.policy, reward_model), params.ppo, seed=0)
    return learner, reference, reward_model, cost.Models(reference, learner.policy, reward_model.model)


def run_params(policy: dict, **given) -> RunParams:
    """Everything in bfloat16 but what learns, one permutation and its reverse; `given` sets PPO's parameters."""
    precise = {"dtype": "bfloat16"}
    return RunParams(
        policy=PolicyParams(**precise, **policy),
        reward=RewardParams(**precise),
        ppo=PPOParams(**given),
        attribution=AttributionParams(permutations=1),
    )


def random_queries(shape: str, B: int, P: int) -> Tensor:
    """Prompts (B, P) of random tokens."""
    return torch.tensor([one.prompt for one in random_readings(shape, B, P, 0)], device=DEVICE)


def one_update(
    learner: ppo.Learner, reference: PolicyWithValue, reward_model: RewardModel, queries: Tensor, params: RunParams
) -> dict[str, tuple[float, float]]:
    """Seconds and GiB of each step, in the order of a training; responses have their full length."""
    policy, T, measured = learner.policy, params.ppo.max_new_tokens, {}
    draw_from = SAMPLERS[params.ppo.sampler]

    def step(name: str, act: Callable):
        *measured[name], made = clocked(act)
        return made

    mask, generator = torch.ones_like(queries, dtype=torch.bool), torch.Generator().manual_seed(0)
    settings = queries, mask, Sampling(T, 1.0, (-1,), PAD), generator
    drawn, kept, states, _ = step("sample", lambda: draw_from(policy.sampling_model(), *settings))
    none = torch.zeros(len(queries), device=DEVICE)
    states = states if policy.samples_as_it_learns else None
    texts = Responses(queries, mask, drawn, kept, none, none.bool(), states=states)
    texts = step("score", lambda: scored(texts, reward_model))
    read = step("log-probabilities", lambda: appraise(policy, reference, texts, 1.0, params.ppo.micro_batch))
    credit = step("explain", lambda: attribute(reward_model, read, ["shap"], params.attribution))
    shaped = shape_rewards(read, credit, RewardShape(("shap",), (1.0,), "signed"))
    step("update", lambda: ppo.update(learner, read, ppo.token_rewards(read, shaped, params.ppo), params.ppo))
    return measured
