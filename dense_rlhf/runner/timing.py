"""Seconds of an update's steps, computed from configs alone: floating-point operations, and what keeps a card waiting.

Letters as in `cost`. A multiply-add counts as 2 operations. The tests compare the operations with what torch counts,
and the seconds of an H100 with what one H200, which has the same chip, took (benchmarks/gpu.jsonl).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dense_rlhf.attribution import SOURCES
from dense_rlhf.attribution.engine import PACKED
from dense_rlhf.attribution.kinds import Designed
from dense_rlhf.attribution.packing import pack
from dense_rlhf.attribution.removal import plan
from dense_rlhf.config.params import AttributionParams, PPOParams, RunParams
from dense_rlhf.config.parse import named
from dense_rlhf.models.policy import LOGITS
from dense_rlhf.runner.cost import Models, Sizes, adapters, bytes_of, cache, rank_of


@dataclass(frozen=True)
class Device:
    """The vendor's peak operations a second in bfloat16 and float32, and bytes a second.

    A model of hidden size `width` or more reaches the share `reached` of the peak, a narrower one (H / width)^0.8 of
    that. Python and the driver take `pass_seconds` for a pass and `layer_seconds` for each of its layers, which bounds
    small models and sampling token by token. Measured on an H200, assumed for the others.
    """

    name: str
    bf16: float
    float32: float
    bandwidth: float
    reached: float
    width: int
    pass_seconds: float
    layer_seconds: float

    def __str__(self) -> str:
        peak = f"{self.bf16 / 1e12:g} TFLOP/s in bfloat16, {self.float32 / 1e12:g} in float32"
        return f"{self.name} up to {self.reached:.0%} of {peak}, {self.bandwidth / 1e9:g} GB/s"

    def seconds(self, flops: float, s: int, hidden: int) -> float:
        """Time for dense work of numbers of s bytes."""
        share = self.reached * min(1, hidden / self.width) ** 0.8
        return flops / (share * (self.bf16 if s == 2 else self.float32))


DEVICES = (
    Device("A100", 312e12, 19.5e12, 2.0e12, 0.345, 2048, 4.5e-3, 8.7e-4),
    Device("H100", 989e12, 67e12, 3.3e12, 0.345, 2048, 4.5e-3, 8.7e-4),
    Device("CPU core", 100e9, 50e9, 10e9, 0.7, 1, 0.0, 4e-4),
)
LEARNING = 0.71  # of the share that reading reaches: autocast, and float32 logits
STARTS, STARTS_ADAPTED = 4.9, 7.4  # a layer's forward and backward under autocast, in layers that are only read


@dataclass(frozen=True)
class Work:
    """One step of an update: operations on numbers of `size` bytes, in passes that wait for one another."""

    step: str
    flops: float
    size: int
    hidden: int
    passes: int = 0
    layers: float = 0
    read: float = 0.0  # bytes that each pass reads
    again: float = 0.0  # operations among `flops` that are computed a second time
    share: float = 1.0  # of what a device reaches

    def seconds(self, device: Device) -> float:
        """The longest of arithmetic, reading memory and starting layers."""
        starting = device.pass_seconds + self.layers * device.layer_seconds
        waiting = self.passes * max(self.read / device.bandwidth, starting)
        return max(device.seconds(self.flops, self.size, self.hidden) / self.share, waiting)


def model_flops(works: Sequence[Work]) -> float:
    """Operations of an update without those that are computed again, as model FLOPs utilisation counts them.

    MFU is these over the seconds and the vendor's peak (Chowdhery et al., 2022, appendix B): for each token 2
    operations a weight forward and 4 backward, and 4 Q a layer for each token that it sees, backward twice that.
    """
    return sum(work.flops - work.again for work in works)


def vendor_peak(card: str) -> float | None:
    """Operations a second in bfloat16 of a card by the name that its driver gives; None for one not in `DEVICES`."""
    named_as = card.replace("H200", "H100").replace("CPU", "CPU core")
    return next((device.bf16 for device in DEVICES if device.name in named_as), None)


def forward(sizes: Sizes, tokens: float, context: float, layers: int | None = None) -> float:
    """Operations of one forward pass through `layers` (default all): tokens (2 W + 4 context Q n).

    `context` is the number of tokens that one attends to, hidden ones included: half the text for a causal kernel.
    """
    layers = sizes.layers if layers is None else layers
    return tokens * layers * (2 * sizes.weights / sizes.layers + 4 * context * sizes.query)


def time(models: Models, params: RunParams, P: float, sources: Sequence[str]) -> list[Work]:
    """The steps of one update with prompts of P tokens and responses of their full length, an upper bound."""
    reward, s = Sizes.of(models.reward), bytes_of(models.reward)
    tokens = params.ppo.rollouts * (P + params.ppo.max_new_tokens)
    flops = forward(reward, tokens, P + params.ppo.max_new_tokens)
    score = Work("score", flops, s, reward.hidden, passes=1, layers=reward.layers)
    explain = Work("explain", _explain(models, params, P, sources), s, reward.hidden)
    return [_sample(models, params.ppo, P), score, explain, *_learn(models, params.ppo, P)]


def _learn(models: Models, ppo: PPOParams, P: float) -> list[Work]:
    """Log-probabilities under policy and reference, whose layers below the cut are the same; then the epochs.

    The policy's states are the sampler's where those are the training forward's, and so are those above frozen layers
    where it shows them.
    """
    policy, sizes, trunk = models.policy, Sizes.of(models.reference.lm), models.policy.value_trunk
    B, T, s = ppo.rollouts, ppo.max_new_tokens, 2 if policy.bf16 else 4
    text, depth, deep = (B * (P + T - 1), (P + T) / 2), sizes.layers - policy.cut, 0
    read = 0 if ppo.sampler == "cache" else policy.cut  # frozen layers that are computed once more
    below, above = forward(sizes, *text, read), forward(sizes, *text, depth)
    head, critic = 2 * B * T * sizes.hidden * sizes.vocabulary, 0
    if trunk is not None:
        critic, deep = forward(Sizes.of(trunk), *text), Sizes.of(trunk).layers
    added = 2 * text[0] * sum(p.numel() for p in adapters(policy))
    parts, passes = math.ceil(B / ppo.micro_batch), 2 - (policy.samples_as_it_learns and ppo.sampler != "generate")
    flops, layers = below + passes * above + 2 * head + added + critic, read / passes + depth + deep / passes
    common = dict(size=s, hidden=sizes.hidden, share=LEARNING)
    probabilities = Work("log-probabilities", flops, passes=parts * passes, layers=layers, **common)
    back = 1 if rank_of(policy) else 2  # frozen maps pass gradients on and have none of their own
    again = min(ppo.micro_batch, ppo.minibatch) * T * sizes.vocabulary > LOGITS
    heads = head * (2 + again + policy.lm.get_output_embeddings().weight.requires_grad)
    flops = ppo.epochs * (above * (1 + back) + heads + 3 * (added + critic))
    starts = (STARTS_ADAPTED if rank_of(policy) else STARTS) * (depth + deep)
    twice = ppo.epochs * head * again
    return [probabilities, Work("update", flops, passes=ppo.epochs * parts, layers=starts, again=twice, **common)]


def _sample(models: Models, ppo: PPOParams, P: float) -> Work:
    """B P tokens at once, then T passes of B, each of which reads all weights and a cache of about P + T / 2 tokens."""
    sizes, B, T = Sizes.of(models.reference.lm), ppo.rollouts, ppo.max_new_tokens
    s = bytes_of(models.policy.sampling_model())
    flops = forward(sizes, B * P, P) + forward(sizes, B * T, P + T / 2) + 2 * B * T * sizes.hidden * sizes.vocabulary
    read = (sizes.weights + sizes.hidden * sizes.vocabulary) * s + cache(sizes, round(B * (P + T / 2)), s)
    return Work("sample", flops, s, sizes.hidden, T, sizes.layers, read)


PLAYER = {"tokens": 1, "words": 1.3, "sentences": 20}  # tokens of a player, about
WHOLE = {"attention": 1, "prefix": 1, "gradient_input": 3}  # forward passes over the whole responses; backward is two


def _explain(models: Models, params: RunParams, P: float, sources: Sequence[str]) -> float:
    """Operations of all sources: the tokens of the coalitions that they need, and passes over whole responses.

    Where prefixes are shared, prompts are computed once, and of the last layer only keys and values (4 H K a token),
    except where a score is read.
    """
    sizes, B, T = Sizes.of(models.reward), params.ppo.rollouts, params.ppo.max_new_tokens
    packed = models.reward.config.model_type in PACKED
    asked = {getattr(SOURCES.get(name), "source", name) for name in sources}  # what is shuffled costs as in order
    players = np.unique(np.arange(T) // PLAYER[params.attribution.players], return_inverse=True)[1]
    width = sizes.hidden if packed else None
    tokens, context, reads = coalition_tokens(players, sorted(asked), params.attribution, P, width)
    flops = forward(sizes, B * tokens, P + context)
    if tokens and packed:
        below = forward(sizes, B * tokens, P + context, sizes.layers - 1) + forward(sizes, B * P, P, sizes.layers - 1)
        keys = 4 * B * (P + tokens) * sizes.hidden * sizes.key
        flops = below + keys + forward(sizes, B * reads, P + context, 1)
    passes = sum(WHOLE.get(name, 0) for name in asked)
    passes += 3 * params.attribution.ig_steps if "integrated_gradients" in asked else 0
    return flops + passes * forward(sizes, B * (P + T), P + T)


def coalition_tokens(
    players: np.ndarray, sources: Sequence[str], params: AttributionParams, P: float, width: int | None
) -> tuple[float, float, int]:
    """Tokens to compute for the coalitions of a response, how many each sees after the prompt, and the coalitions.

    `players` (T,) is the player that each token belongs to. With `width` (the model's H) prefixes are shared, as the
    engine packs them; without, every coalition is a text with its prompt.
    """
    kinds = [(name, named(SOURCES, name, "sources")) for name in sources]
    designed = tuple((name, source) for name, source in kinds if isinstance(source, Designed))
    if not designed:
        return 0, 0, 0
    masks = plan(int(players[-1]) + 1, designed, params).masks[:, players]
    kind, T = params.removal.partition(":")[0], len(players)
    if width is None:
        lengths = P + 1 + (masks.sum(1) if kind == "drop" else np.full(len(masks), T))
        return float(lengths.sum()), float(lengths.mean() - P), len(masks)
    packs = pack(masks, 1, kind, max(width, 128 + 2 * T))
    return sum(map(len, packs)), float(np.mean([len(one) for one in packs])), len(masks)
