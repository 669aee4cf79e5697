"""The computed budget against what torch holds and does."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, BertConfig, LlamaConfig, Qwen3Config

from dense_rlhf import ppo
from dense_rlhf.attribution import attribute
from dense_rlhf.config.params import AttributionParams, PolicyParams, PPOParams, RewardParams, RunParams
from dense_rlhf.fingerprint import PACKAGE
from dense_rlhf.models.language_models import load_policy
from dense_rlhf.models.policy import PolicyWithValue, trainable_copy
from dense_rlhf.models.reward_model import RewardModel
from dense_rlhf.ppo.rollout import appraise
from dense_rlhf.ppo.sampling import Sampling, sample
from dense_rlhf.runner import cost, timing
from dense_rlhf.types import InputError, Rollout

SHAPE = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": True,
}
PPO = PPOParams(rollouts=6, minibatch=6, micro_batch=6, max_new_tokens=10)
P = 14
TOKENIZER = SimpleNamespace(eos_token_id=1, pad_token_id=0)
LEARNERS = [
    {},
    {"trainable_layers": 1},
    {"lora_rank": 4},
    {"lora_rank": 4, "trainable_layers": 2},
    {"critic": "separate"},
]


def run_params(**policy):
    dtype = policy.get("dtype", "float32")
    return RunParams(
        policy=PolicyParams(**policy),
        reward=RewardParams(dtype=dtype),
        ppo=PPO,
        attribution=AttributionParams(permutations=1),
    )


def empty(params, config=None):
    classifier = LlamaConfig(**SHAPE, num_labels=1)
    return cost.assemble(
        cost.empty_policy(config or LlamaConfig(**SHAPE), params.policy.dtype),
        cost.empty_classifier(classifier, params.reward.dtype),
        params,
    )


def real(params):
    """The same models with numbers in them."""
    lm = cost.AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE), dtype=getattr(torch, params.policy.dtype))
    scorer = cost.AutoModelForSequenceClassification.from_config(LlamaConfig(**SHAPE, num_labels=1)).eval()
    bf16 = params.policy.dtype == "bfloat16"
    reference = PolicyWithValue(lm, params.policy.trainable_layers, bf16=bf16).requires_grad_(False).eval()
    reader = RewardModel(scorer.requires_grad_(False), TOKENIZER, token_budget=512)
    return cost.Models(reference, trainable_copy(reference, params.policy, reader), scorer), reader


def made_up(T=PPO.max_new_tokens):
    """A rollout of full length whose prompts fill P tokens."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 300, (PPO.rollouts, P + T), generator=generator)
    zero, mask = torch.zeros(PPO.rollouts, T), torch.ones(PPO.rollouts, T, dtype=torch.bool)
    query_mask = torch.ones(PPO.rollouts, P, dtype=torch.bool)
    return Rollout(ids[:, :P], query_mask, ids[:, P:], mask, zero[:, 0], ~mask[:, 0], zero, zero, zero)


def named(needs):
    return {need.what: need.bytes for need in needs}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("policy", LEARNERS, ids=str)
def test_weights_are_those_of_the_real_models_each_stored_once(policy, dtype):
    params = run_params(dtype=dtype, **policy)
    needs, (models, _) = named(cost.weights(empty(params))), real(params)
    parts = [models.reference, models.policy, models.policy.sampling_model()]
    stored = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for m in parts for p in m.parameters()}
    scorer = sum(p.numel() for p in models.reward.parameters()) * (2 if dtype == "bfloat16" else 4)
    learns = [p for p in models.policy.parameters() if p.requires_grad]
    assert needs.pop("Adam") == 8 * sum(p.numel() for p in learns)
    assert needs.pop("reward model") == scorer
    assert sum(needs.values()) == sum(stored.values())


def test_the_shipped_policy_is_counted_from_its_config():
    lm = load_policy(PolicyParams()).model
    made = cost.empty_policy(lm.config)
    assert made.num_parameters() == lm.num_parameters() and made.device.type == "meta"
    assert cost.Sizes.of(made) == cost.Sizes.of(lm)
    assert cost.Sizes.of(lm).weights == sum(p.numel() for p in lm.base_model.layers.parameters() if p.dim() == 2)


def kept(policy, T):
    """Bytes that the backward pass of the trunk holds on to, parameters not counted."""
    own = {x.untyped_storage().data_ptr() for x in (*policy.parameters(), *policy.buffers())}
    held = {}

    def keep(x):
        if x.untyped_storage().data_ptr() not in own:
            held[x.untyped_storage().data_ptr()] = x, x.untyped_storage().nbytes()
        return x

    ids, _ = made_up(T).rows()
    with saved_tensors_hooks(keep, lambda x: x), policy._autocast(ids.device):
        policy._states(ids, None)
    return sum(size for _, size in held.values())


@pytest.mark.parametrize(
    "policy, tolerance",
    [({}, 0), ({"dtype": "bfloat16"}, 0), ({"lora_rank": 4}, 0), ({"dtype": "bfloat16", "lora_rank": 4}, 0.01)],
)
def test_kept_by_a_layer_is_what_autograd_saves(policy, tolerance):
    """Three layers less two, a long text less a short one: what does not grow with either drops out."""
    params, per_token = run_params(**policy), []
    for layers in (3, 2):
        shape = SHAPE | {"num_hidden_layers": layers}
        dtype = getattr(torch, params.policy.dtype)
        lm = cost.AutoModelForCausalLM.from_config(LlamaConfig(**shape), dtype=dtype)
        made = trainable_copy(PolicyWithValue(lm, bf16=dtype == torch.bfloat16).requires_grad_(False), params.policy)
        per_token.append((kept(made, 26) - kept(made, 10)) / (PPO.rollouts * 16))
    s = 2 if "dtype" in policy else 4
    estimate = cost.kept_by_layer(cost.Sizes.of(lm), s, policy.get("lora_rank", 0))
    assert estimate == pytest.approx(per_token[0] - per_token[1], rel=tolerance or 1e-9)


def test_the_cache_is_as_large_as_it_is_said_to_be():
    models, _ = real(run_params())
    with torch.no_grad():
        cache = models.reference.lm(input_ids=torch.ones(4, 9, dtype=torch.long), use_cache=True).past_key_values
    held = sum(x.untyped_storage().nbytes() for layer in cache.layers for x in (layer.keys, layer.values))
    sizes = cost.Sizes.of(models.reference.lm)
    assert cost.cache(sizes, 4 * 9, 4) == held * (sizes.layers + 1) / sizes.layers


def operations(act):
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):
        act()
    return counter.get_total_flops()


SMOLLM2 = dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9)
CONFIGS = {
    "tiny": AutoConfig.from_pretrained(PACKAGE / "models" / "tiny_policy"),
    "SmolLM2-135M": LlamaConfig(**SMOLLM2, num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True),
    "wide heads": Qwen3Config(**SHAPE, head_dim=32),
    "encoder": BertConfig(**SMOLLM2 | {"num_hidden_layers": 3}),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_forward_pass_is_what_torch_counts_on_the_meta_device(name):
    """An encoder's pooler reads one position of each text, but its weights count for all."""
    model, b, L = cost.empty_classifier(CONFIGS[name]), 4, 100
    seen = {} if name == "encoder" else {"attention_mask": torch.zeros(b, 1, L, L, device="meta"), "use_cache": False}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.base_model(input_ids=torch.empty(b, L, dtype=torch.long, device="meta"), **seen)
    rel = 0.05 if name == "encoder" else 1e-12
    assert timing.forward(cost.Sizes.of(model), b * L, L) == pytest.approx(counter.get_total_flops(), rel=rel)


@pytest.mark.parametrize("policy", LEARNERS, ids=str)
def test_operations_are_those_that_torch_counts(policy):
    """Nearly: torch counts the half of causal attention that is not computed; merged adapters are its too."""
    params, rollout = run_params(**policy), made_up()
    work = {step.step: step.flops for step in timing.time(empty(params), params, P, ["shap"])}
    models, reader = real(params)
    assert reader.has_head  # asked before operations are counted
    generator, learner = torch.Generator(), ppo.make_learner(models.policy, PPO, 0)
    prompts = rollout.queries, rollout.query_mask, Sampling(PPO.max_new_tokens, 1.0, (-1,), 0), generator
    readings, states = reader.readings(rollout), torch.zeros(*rollout.mask.shape, SHAPE["hidden_size"])
    texts = replace(rollout, trunk=models.policy.trunk(rollout.rows()[0]))  # as the sampler keeps it
    texts = replace(texts, states=states) if models.policy.samples_as_it_learns else texts
    counted = {
        "sample": operations(lambda: sample(models.policy.sampling_model(), *prompts)),
        "score": operations(lambda: reader.score(readings)),
        "explain": operations(lambda: attribute(reader, rollout, ["shap"], params.attribution)),
        "log-probabilities": operations(lambda: appraise(models.policy, models.reference, texts, 1.0, 6)),
        "update": operations(
            lambda: ppo.update(
                learner, appraise(models.policy, models.reference, texts, 1.0, 6), torch.ones(rollout.mask.shape), PPO
            )
        ),
    }
    counted["update"] -= counted["log-probabilities"]
    for step, flops in counted.items():
        assert work[step] == pytest.approx(flops, rel=0.08), step


def test_words_make_fewer_coalitions_than_tokens_and_sources_that_ask_nothing_cost_nothing():
    params = run_params()
    explain = lambda p, *sources: {w.step: w.flops for w in timing.time(empty(params), p, P, sources)}["explain"]  # noqa: E731
    by_words = replace(params, attribution=AttributionParams(permutations=1, players="words"))
    assert 0 < explain(by_words, "shap") < explain(params, "shap") < explain(params, "shap", "attention")
    assert explain(params, "shuffled") == explain(params, "shap")
    assert explain(params, "terminal", "uniform") == 0


def test_the_peak_is_what_stays_and_the_largest_step():
    need = lambda when, size: cost.Need("", size, when, "")  # noqa: E731
    assert cost.peak([need("always", 3), need("a", 1), need("a", 2), need("b", 2.5)]) == 6
    assert cost.peak([need("always", 3)]) == 3


def test_states_are_kept_and_fewer_activations_where_few_layers_learn():
    whole, cut = (named(cost.memory(empty(p), p, P, 512)) for p in (run_params(), run_params(trainable_layers=1)))
    assert cut["activations"] * 3 == whole["activations"]
    assert cut["states under what learns"] == 6 * 24 * 64 * 4 and "states under what learns" not in whole


def test_captured_steps_keep_what_they_write():
    params = run_params()
    held = [
        {need.what for need in cost.sampling(empty(params), replace(PPO, sampler=name), P) if need.when == "always"}
        for name in ("cache", "captured")
    ]
    assert held == [set(), {"key-value cache", "logits"}]


def test_widths_of_a_head_that_is_not_hidden_over_heads():
    config = Qwen3Config(**SHAPE, head_dim=32)
    sizes = cost.Sizes.of(cost.empty_policy(config))
    assert (sizes.query, sizes.key, sizes.hidden) == (128, 64, 64)
    with pytest.raises(InputError, match="trainable_layers is 9"):
        empty(run_params(trainable_layers=9))


def test_an_update_needs_what_it_is_said_to(tokenizer):
    """Peak resident memory of an update in a process of its own, within a third."""
    code = """
import ctypes, sys, torch
sys.path[:0] = sys.argv[1:]
torch.set_num_threads(1)
import test_cost as t
from dense_rlhf import ppo
from dense_rlhf.runner import cost
status = lambda key: next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) * 1024
t.SHAPE |= {"hidden_size": 512, "intermediate_size": 1376, "vocab_size": 4096}
params = t.run_params()
needs = cost.memory(t.empty(params), params, t.P, 512)
models, _ = t.real(params)
rollout, rewards = t.made_up(), torch.ones(t.PPO.rollouts, t.PPO.max_new_tokens)
learner = ppo.make_learner(models.policy, t.PPO, 0)
ctypes.CDLL("libc.so.6").mallopt(-3, 65536)  # what is freed goes back
ppo.update(learner, rollout, rewards, t.PPO)  # makes the optimiser's state
learner.optimizer.zero_grad()
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
ppo.update(learner, rollout, rewards, t.PPO)
said = sum(need.bytes for need in needs if need.when == "update")
print(said / (status("VmHWM") - before))
"""
    if sys.platform != "linux":
        pytest.skip("reads /proc")
    here = Path(__file__).parent
    done = subprocess.run([sys.executable, "-c", code, here, here.parent], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 0.75 < float(done.stdout.split()[-1]) < 1.35, done.stdout
