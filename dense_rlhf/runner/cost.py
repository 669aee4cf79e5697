"""What a study will need, computed from configs alone: bytes of memory; `timing` counts operations.

Weights are counted on the meta device, in the objects that a training would make; nothing is read or allocated.
Letters: B responses of T tokens after P of prompt, L = P + T; n layers, H hidden, Q = heads x head size, K = key-value
heads x head size, M width of the feed-forward part, V vocabulary, W numbers in the layers' linear maps; s bytes of a
number, 4 or 2. A multiply-add counts as 2 operations. The tests compare all of it with what torch holds and counts;
running the steps themselves under torch's FlopCounterMode would need tensors with values, as they branch on them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel

from dense_rlhf.attribution.engine import PACKED
from dense_rlhf.config.params import PPOParams, RunParams
from dense_rlhf.models.policy import LOGITS, PolicyWithValue, trainable_copy
from dense_rlhf.models.reward_model import RewardModel

# ---------------------------------------------------------------------------------------------------- models


@dataclass(frozen=True)
class Sizes:
    """The widths of a transformer that its costs depend on."""

    layers: int
    hidden: int
    heads: int
    query: int
    key: int
    mlp: int
    vocabulary: int
    weights: int  # of the linear maps of all layers

    @classmethod
    def of(cls, model: PreTrainedModel) -> Sizes:
        """Read off a model, on the meta device or not."""
        config, base = model.config, model.base_model
        heads, hidden = config.num_attention_heads, config.hidden_size
        head = getattr(config, "head_dim", None) or hidden // heads
        key = (getattr(config, "num_key_value_heads", None) or heads) * head
        mlp = getattr(config, "intermediate_size", None) or 4 * hidden
        tables = {id(module.weight) for module in base.modules() if isinstance(module, torch.nn.Embedding)}
        linear = sum(p.numel() for p in base.parameters() if p.dim() == 2 and id(p) not in tables)
        return cls(config.num_hidden_layers, hidden, heads, heads * head, key, mlp, config.vocab_size, linear)


@dataclass(frozen=True)
class Models:
    """The models of one training, on the meta device."""

    reference: PolicyWithValue
    policy: PolicyWithValue
    reward: PreTrainedModel


def empty_policy(config: PreTrainedConfig, dtype: str = "float32") -> PreTrainedModel:
    """A causal language model of this config without values."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))


def empty_classifier(config: PreTrainedConfig, dtype: str = "float32") -> PreTrainedModel:
    """A sequence classifier of this config without values."""
    with torch.device("meta"):
        return AutoModelForSequenceClassification.from_config(config, dtype=getattr(torch, dtype))


def assemble(lm: PreTrainedModel, reward: PreTrainedModel, params: RunParams) -> Models:
    """Reference, policy and reward model as a training makes them. Raises the same `InputError`s."""
    bf16 = params.policy.dtype == "bfloat16"
    with torch.device("meta"):
        reference = PolicyWithValue(lm, params.policy.trainable_layers, bf16=bf16).requires_grad_(False)
        reader = RewardModel(reward.requires_grad_(False), None, suffix=(0,))
        return Models(reference, trainable_copy(reference, params.policy, reader), reward)


# ---------------------------------------------------------------------------------------------------- memory


@dataclass(frozen=True)
class Need:
    """Bytes of memory that are held `always`, or only while the step `when` runs."""

    what: str
    bytes: float
    when: str
    how: str  # the product that gives the bytes


def peak(needs: Sequence[Need]) -> float:
    """Bytes at the worst moment: those always held and the largest step."""
    steps: dict[str, float] = {}
    for need in needs:
        steps[need.when] = steps.get(need.when, 0) + need.bytes
    always = steps.pop("always", 0)
    return always + max(steps.values(), default=0)


def memory(models: Models, params: RunParams, P: int, token_budget: int) -> list[Need]:
    """All needs of one process that trains, with prompts of at most P tokens, in the order of the steps."""
    needs = weights(models) + sampling(models, params.ppo, P)
    return needs + reading(models, params, P, token_budget) + updating(models, params.ppo, P)


def _learning(policy: PolicyWithValue) -> list[torch.nn.Parameter]:
    return [p for p in policy.parameters() if p.requires_grad]


def weights(models: Models) -> list[Need]:
    """Numbers x their size, shared ones once. Adam keeps two float32 numbers for each that learns."""
    learning = _learning(models.policy)
    groups = {
        "reference": models.reference.parameters(),
        "policy, learns": learning,
        "policy, frozen": models.policy.parameters(),
        "copy that samples": models.policy.sampling_model().parameters(),
        "reward model": models.reward.parameters(),
    }
    needs, seen = [], set()
    for name, parameters in groups.items():
        numbers = Counter()  # of each size in bytes
        for p in parameters:
            numbers[p.element_size()] += p.numel() * (id(p) not in seen)
            seen.add(id(p))
        if size := sum(size * number for size, number in numbers.items()):
            how = " + ".join(f"{number:,} x {size}" for size, number in numbers.items() if number)
            needs.append(Need(name, size, "always", how))
    number = sum(p.numel() for p in learning)
    needs.append(Need("Adam", 8 * number, "always", f"{number:,} x 2 x 4"))
    return needs


def working_set(sizes: Sizes, tokens: int, s: int) -> float:
    """A forward pass that keeps nothing: two residual streams, queries, keys and values, gate, up and their product.

    tokens (2 H + 2 Q + 2 K + 3 M) s.
    """
    return tokens * (2 * sizes.hidden + 2 * sizes.query + 2 * sizes.key + 3 * sizes.mlp) * s


def cache(sizes: Sizes, tokens: int, s: int) -> float:
    """Keys and values of every layer, and one layer's once more while it grows: 2 K (n + 1) tokens s."""
    return 2 * sizes.key * (sizes.layers + 1) * tokens * s


def sampling(models: Models, ppo: PPOParams, P: int) -> list[Need]:
    """While all B responses are sampled at once.

    Cache at its full length L; the working set of the prompts; B V logits, each s + 4 + 4 bytes with its temperature
    and 4 + 8 + 8 for the distribution function. Captured steps keep cache and logits from update to update.
    """
    sizes, s, B = Sizes.of(models.reference.lm), bytes_of(models.policy.sampling_model()), ppo.rollouts
    L, kept = P + ppo.max_new_tokens, "always" if ppo.sampler == "captured" else "sample"
    return [
        Need("key-value cache", cache(sizes, B * L, s), kept, f"{B} x {L} tokens"),
        Need("prompts", working_set(sizes, B * P, s), "sample", f"{B} x {P} tokens"),
        Need("logits", B * sizes.vocabulary * (s + 28), kept, f"{B} x {sizes.vocabulary:,} x {s + 28}"),
    ]


def reading(models: Models, params: RunParams, P: int, token_budget: int) -> list[Need]:
    """While the reward model explains, in batches of at most `token_budget` tokens.

    A group of prompts in the cache, their copies in the batch with its own keys and values, the batch's working set,
    and the attention masks: budget x (N (1 + s) + 10 (T + 1)), with packs of N = max(H, 128 + 2 T) nodes. Models that
    are not packed need the working set only.
    """
    sizes, s, T = Sizes.of(models.reward), bytes_of(models.reward), params.ppo.max_new_tokens
    how = f"{token_budget:,} tokens"
    needs = [Need("batch of the reward model", working_set(sizes, token_budget, s), "explain", how)]
    if models.reward.config.model_type in PACKED:
        prompts = min(token_budget, params.ppo.rollouts * P)
        nodes = min(token_budget, max(sizes.hidden, 128 + 2 * T))
        kept = cache(sizes, prompts + token_budget, s)
        needs.append(Need("prompts and packs in the cache", kept, "explain", f"{prompts:,} + {how}"))
        each = nodes * (1 + s) + 10 * (T + 1)
        needs.append(Need("attention masks", token_budget * each, "explain", f"{how} x {each:,}"))
    return needs


def updating(models: Models, ppo: PPOParams, P: int) -> list[Need]:
    """While a micro-batch of b responses learns.

    Gradients, 4 bytes a number; under autocast a bfloat16 copy of each learning linear map, 2; the activations that
    the backward pass needs (`kept_by_layer`), for each layer through which gradients flow; logits of at most `LOGITS`
    numbers at once, 16 bytes each: log-probabilities, their gradient, the logits' gradient and one more while it is
    computed. The states under the layers that learn are kept for the whole batch, B L H s.
    """
    policy, L = models.policy, P + ppo.max_new_tokens
    sizes, b = Sizes.of(models.reference.lm), min(ppo.micro_batch, ppo.minibatch)
    learning = _learning(policy)
    number, matrices = sum(p.numel() for p in learning), sum(p.numel() for p in learning if p.dim() == 2)
    s = 2 if policy.bf16 else 4
    layer, layers = kept_by_layer(sizes, s, rank_of(policy)), sizes.layers - policy.cut
    logits = min(b * ppo.max_new_tokens * sizes.vocabulary, max(LOGITS, sizes.vocabulary))
    needs = [
        Need("gradients", 4 * number, "update", f"{number:,} x 4"),
        Need("activations", b * L * layers * layer, "update", f"{b} x {L} tokens x {layers} layers x {layer:,.0f}"),
        Need("logits", 16 * logits, "update", f"{logits:,} x 16"),
    ]
    if policy.bf16:
        needs.append(Need("bfloat16 of what learns", 2 * matrices, "update", f"{matrices:,} x 2"))
    if policy.cut:
        states = ppo.rollouts * L * sizes.hidden
        needs.append(Need("states under what learns", states * s, "update", f"{ppo.rollouts} x {L} x {sizes.hidden}"))
    if policy.value_trunk is not None:
        own = Sizes.of(policy.value_trunk)
        layer = kept_by_layer(own, s, 0)
        how = f"{b} x {L} tokens x {own.layers} layers x {layer:,.0f}"
        needs.append(Need("activations of the critic", b * L * own.layers * layer, "update", how))
    return needs


def kept_by_layer(sizes: Sizes, s: int, rank: int) -> float:
    """Bytes a token that a Llama-like layer keeps for its backward pass, attention by torch's fused kernels.

    2 Q + 2 K + 4 M numbers of s bytes (queries, keys, values, their output; gate, its silu, up, their product),
    4 heads + 8 for softmax and norms, and for the residual stream, its norms and the maps' inputs 24 H in float32,
    26 H under autocast. With adapters 16 H and 20 H, as frozen maps need no inputs, and 7 rank s more.
    """
    stream = {(4, False): 24, (2, False): 26, (4, True): 16, (2, True): 20}[s, rank > 0]
    numbers = 2 * sizes.query + 2 * sizes.key + 4 * sizes.mlp + 7 * rank
    return s * numbers + stream * sizes.hidden + 4 * sizes.heads + 8


def bytes_of(model: PreTrainedModel) -> int:
    return model.dtype.itemsize


def adapters(policy: PolicyWithValue) -> list[torch.nn.Parameter]:
    return [p for name, p in policy.lm.named_parameters() if "lora_" in name]


def rank_of(policy: PolicyWithValue) -> int:
    """The rank of the policy's adapters; 0 without."""
    return min((min(p.shape) for p in adapters(policy)), default=0)
