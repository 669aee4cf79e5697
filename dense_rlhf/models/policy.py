"""The policy: a causal language model with its critic, and which of their weights are trained."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator
from operator import itemgetter
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from dense_rlhf.config.params import PolicyParams
from dense_rlhf.models.reward_model import RewardModel
from dense_rlhf.types import InputError, Responses

RIDGE = 0.3  # penalty of the value probe, in mean squares of a state; the best from 0.001 to 10 on fresh responses
LOGITS = 2**28  # numbers in one pass through the LM head; more are computed in parts, twice


def position_ids(mask: Tensor) -> Tensor:
    """Positions (B, L) that count kept tokens only, so that padding on the left changes nothing."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def allowed(logits: Tensor, barred: Tensor) -> Tensor:
    """Logits (..., V) in place with the ids `barred` (n,) ruled out, for sampler and loss alike: padding, no token."""
    with torch.no_grad():  # their probability is 0, and so is their gradient
        return logits.index_fill_(-1, barred, torch.finfo(logits.dtype).min)  # finite: its p log p is 0


def tempered(logits: Tensor, temperature: float) -> Tensor:
    """Logits in float32, divided by the temperature; at 1 without a copy of them."""
    return logits.float() if temperature == 1 else logits.float() / temperature


class PolicyWithValue(nn.Module):
    """A causal language model and a float32 value head, zero at the start.

    The head reads the policy's own hidden states (critic `shared`; `detached`: without gradient into them), or those
    of `value_trunk`, a decoder of the same tokens. With `trainable_layers` only the last n blocks are trained; those
    below are the `trunk`. `bf16` computes under autocast; softmax and values stay float32.
    """

    def __init__(
        self,
        lm: PreTrainedModel,
        trainable_layers: int | None = None,
        critic: str = "shared",
        value_trunk: PreTrainedModel | None = None,
        bf16: bool = False,
    ):
        super().__init__()
        if (critic == "separate") != (value_trunk is not None):
            raise InputError(f"the critic is {critic!r}: a separate one needs a value_trunk, any other has none")
        if lm.config.pad_token_id is None:
            raise InputError("the model's config has no pad_token_id; give it a token that is not EOS")
        for model in filter(None, (lm, value_trunk)):
            model.eval()  # dropout would make old and new log-probabilities those of two policies
        self.lm, self.critic, self.value_trunk, self.bf16 = lm, critic, value_trunk, bf16
        read = lm if value_trunk is None else value_trunk
        self.value_head = nn.Linear(read.config.hidden_size, 1, device=read.device, dtype=torch.float32)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)
        self.cut = 0 if trainable_layers is None else _cut(lm, trainable_layers)
        if self.cut and not _splits(lm, self.cut):
            raise InputError(
                f"policy.trainable_layers is {trainable_layers}, but {type(lm).__name__} is more than its "
                "layers one after another; leave it out, or take policy.lora_rank"
            )
        if trainable_layers is not None:
            lm.requires_grad_(False)
            lm.base_model.layers[self.cut :].requires_grad_(True)
        self._sampler: list[PreTrainedModel] = []  # a list, so that its weights are not this module's

    @property
    def pad_id(self) -> int:
        return self.lm.config.pad_token_id

    def forward(
        self, texts: Responses, temperature: float, entropies: bool = True
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Log-probabilities (nats), values and entropies (B, T) of the responses, zero where there is no token.

        The one forward for old, new and reference log-probabilities; only tokens of responses reach the LM head.
        Entropies, a pass over all logits, can be left out. `texts.trunk` and `texts.states`, if given, are this
        policy's and are not computed again.
        """
        (ids, at), acts = texts.rows(), texts.mask
        with self._autocast(ids.device):
            states = self._before(texts, ids, at)
            logprobs, *entropy = self._read_out(states[acts], texts.responses[acts], temperature, entropies)
            values = self._values(states, ids, at)
        place = torch.zeros_like(acts, dtype=logprobs.dtype)
        read = [place.masked_scatter(acts, x) for x in (logprobs, *entropy)]
        return read[0], values.masked_fill(~acts, 0), read[1] if entropies else None

    def states(self, texts: Responses) -> Tensor:
        """What a shared value head reads, (N, hidden) float32, of every token of the responses in turn."""
        ids, at = texts.rows()
        with torch.no_grad(), self._autocast(ids.device):
            return self._before(texts, ids, at)[texts.mask].float()

    def shares_trunk(self, other: PolicyWithValue) -> bool:
        """Whether `trunk` is the same for both, weight by weight."""
        if not self.cut or (self.cut, self.bf16) != (other.cut, other.bf16):
            return False
        return all(p is q for p, q in zip(_below(self.lm, self.cut), _below(other.lm, other.cut)))

    def trunk(self, ids: Tensor) -> Tensor | None:
        """States (B, L, hidden) of rows of `ids` below the trained layers; None without a frozen trunk."""
        if not self.cut:
            return None
        with torch.no_grad(), self._autocast(ids.device):
            return _run(_blocks(self.lm.base_model, 0, self.cut), input_ids=ids)

    def _before(self, texts: Responses, ids: Tensor, at: Tensor) -> Tensor:
        """States (B, T, hidden) before each token is emitted, at the columns `at` (B, T) of `ids` (B, L)."""
        return _at(self._states(ids, texts.trunk), at) if texts.states is None else texts.states

    def _states(self, ids: Tensor, trunk: Tensor | None) -> Tensor:
        if not self.cut:
            return _run(self.lm.base_model, input_ids=ids)
        below = self.trunk(ids) if trunk is None else trunk
        return _run(_blocks(self.lm.base_model, self.cut, None), inputs_embeds=below)

    def _values(self, states: Tensor, ids: Tensor, at: Tensor) -> Tensor:
        if self.critic == "detached":
            states = states.detach()
        elif self.value_trunk is not None:
            states = _at(_run(self.value_trunk, input_ids=ids), at)
        with torch.autocast(states.device.type, enabled=False):
            return self.value_head(states.float()).squeeze(-1)

    def _read_out(self, states: Tensor, targets: Tensor, temperature: float, entropies: bool) -> tuple[Tensor, ...]:
        """Log-probabilities, and entropies where asked for, (N,) of `targets` (N,) after `states` (N, hidden)."""
        pad_id = torch.tensor([self.pad_id], device=states.device)

        def part(states: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
            logp = F.log_softmax(allowed(tempered(logits_after(self.lm, states), temperature), pad_id), -1)
            read = (logp.gather(-1, targets[:, None]).squeeze(-1),)
            if not entropies:
                return read
            with torch.no_grad(), torch.autocast(logp.device.type, enabled=False):  # reported, never trained on
                return *read, -torch.linalg.vecdot(logp.exp(), logp)

        size = max(1, LOGITS // self.lm.config.vocab_size)
        if len(states) <= size:
            return part(states, targets)
        chunks = zip(states.split(size), targets.split(size))
        return tuple(map(torch.cat, zip(*(checkpoint(part, *chunk, use_reentrant=False) for chunk in chunks))))

    def _autocast(self, device: torch.device) -> torch.autocast:
        return torch.autocast(device.type, torch.bfloat16, enabled=self.bf16)

    # ------------------------------------------------------------------------------------------------ sampling

    @property
    def samples_as_it_learns(self) -> bool:
        """Whether what samples has the weights and the arithmetic of the training forward."""
        return not self._sampler and not self.bf16

    def sample_from_a_copy(self) -> None:
        """Keep a whole plain copy to sample from, for weights that are cast, adapted or sharded in training."""
        if not self._sampler:
            self._sampler.append(copy.deepcopy(self.lm).requires_grad_(False))

    @torch.no_grad()
    def sampling_model(self) -> PreTrainedModel:
        """A model that samples from this policy without adapters or casts: itself, or a copy brought up to date."""
        for sampler in self._sampler:
            for name, weight in _merged(self.lm):
                sampler.get_parameter(name).copy_(weight.full_tensor() if isinstance(weight, DTensor) else weight)
            return sampler
        return self.lm


def state_sha256(model: nn.Module) -> str:
    """Hash of all weights and buffers that are saved, with their names, shapes and types."""
    digest = hashlib.sha256()
    for name, weight in model.state_dict().items():
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        digest.update(weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _cut(lm: PreTrainedModel, trainable: int) -> int:
    blocks = getattr(lm.base_model, "layers", None)
    if blocks is None or not 1 <= trainable <= len(blocks):
        depth = "no list of layers" if blocks is None else f"{len(blocks)} layers"
        raise InputError(f"policy.trainable_layers is {trainable}, but the model has {depth}")
    return len(blocks) - trainable


def _below(lm: PreTrainedModel, cut: int) -> Iterator[nn.Parameter]:
    yield from lm.get_input_embeddings().parameters()
    yield from lm.base_model.layers[:cut].parameters()


def _run(base: nn.Module, **tokens: Tensor) -> Tensor:
    return base(use_cache=False, **tokens).last_hidden_state


@torch.no_grad()
def _splits(lm: PreTrainedModel, cut: int) -> bool:
    """Whether the layers below and above `cut` compose to the model: not if it scales embeddings or has more norms."""
    if lm.device.type == "meta":  # nothing to compare; the model is only counted
        return True
    ids = torch.arange(6, device=lm.device)[None] % lm.config.vocab_size
    try:
        below = _run(_blocks(lm.base_model, 0, cut), input_ids=ids)
        above = _run(_blocks(lm.base_model, cut, None), inputs_embeds=below)
    except Exception:  # every architecture fails in its own way
        return False
    return torch.allclose(above, _run(lm.base_model, input_ids=ids), rtol=1e-2, atol=1e-3)


def logits_after(lm: PreTrainedModel, states: Tensor) -> Tensor:
    """Logits (N, V) of states (N, hidden) by the model's own forward: some scale or cap the output of their head."""
    part = copy.copy(lm)
    part._modules = dict(lm._modules, **{lm.base_model_prefix: _Precomputed()})
    return type(lm).forward(part, inputs_embeds=states[None], use_cache=False).logits.squeeze(0)


class _Precomputed(nn.Module):
    """Stand-in trunk that returns precomputed states."""

    @property
    def decoder(self) -> nn.Module:
        return self  # OPT and XGLM ask a part of their trunk

    def forward(self, *_, inputs_embeds: Tensor, **__) -> tuple:
        return _States([inputs_embeds])


class _States(tuple):
    """A trunk's output; every field but `last_hidden_state` is None."""

    last_hidden_state = property(itemgetter(0))

    def __getattr__(self, name: str) -> None:
        return None


def _at(states: Tensor, at: Tensor) -> Tensor:
    """States (B, T, hidden) at the columns `at` (B, T) of states (B, L, hidden)."""
    return states.gather(1, at[..., None].expand(-1, -1, states.shape[-1]))


def _blocks(base: PreTrainedModel, start: int, stop: int | None) -> PreTrainedModel:
    """The model with only some of its blocks, from states to states; the final norm only after the last."""
    part = copy.copy(base)
    part._modules = dict(base._modules, layers=base.layers[start:stop])
    part.config = copy.copy(base.config)
    part.config.num_hidden_layers = len(part.layers)
    if getattr(base.config, "layer_types", None):
        part.config.layer_types = base.config.layer_types[start:stop]
    if stop is not None:
        part._modules["norm"] = nn.Identity()
    return part


def _merged(lm: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Names and values of the trained weights, adapters added to the weights that they adapt."""
    from peft.tuners.lora import LoraLayer

    adapted = {name: module for name, module in lm.named_modules() if isinstance(module, LoraLayer)}
    for name, module in adapted.items():
        yield f"{name}.weight", module.base_layer.weight + module.get_delta_weight("default")
    if not adapted:
        yield from ((name, p) for name, p in lm.named_parameters() if p.requires_grad)


# ---------------------------------------------------------------------------------------------------- what learns


def trainable_copy(
    reference: PolicyWithValue, params: PolicyParams, reward_model: RewardModel | None = None
) -> PolicyWithValue:
    """A policy equal to `reference` whose trained weights are those that `params` names; frozen ones are shared.

    Trained weights are float32, adapters start at zero effect (Hu et al., 2021). A separate critic starts as
    `reward_model`, so its first value is the score of the response so far. Raises `InputError` if it cannot.
    """
    bf16, source = params.dtype == "bfloat16", reference.lm
    cut = _cut(source, params.trainable_layers) if params.trainable_layers else 0
    value_trunk, head = _critic_of(reward_model) if params.critic == "separate" else (None, None)
    learning = source if params.trainable_layers is None else source.base_model.layers[cut:]
    lm = _copy(source, [] if params.lora_rank else list(learning.parameters()), torch.float32)
    policy = PolicyWithValue(lm, params.trainable_layers, params.critic, value_trunk, bf16)
    if params.lora_rank:
        _add_adapters(lm, params, cut)
    if params.lora_rank or bf16:
        own = [source.get_parameter(name) for name, _ in _merged(lm)]
        policy._sampler.append(_copy(source, own, source.dtype).requires_grad_(False))
    if head is not None:
        policy.value_head.load_state_dict(head)
    return policy.to(next(source.parameters()).device)


def _copy(lm: PreTrainedModel, own: list[nn.Parameter], dtype: torch.dtype) -> PreTrainedModel:
    """A copy with its `own` weights, as `dtype`, that shares all others."""
    copied, originals = set(map(id, own)), {id(p): p for p in lm.parameters()}
    made = copy.deepcopy(lm, {key: p for key, p in originals.items() if key not in copied})
    for p in made.parameters():
        if id(p) not in originals:
            p.data = p.data.to(dtype)
            p.requires_grad_(True)
    return made


def _add_adapters(lm: PreTrainedModel, params: PolicyParams, cut: int) -> None:
    """LoRA on every linear map of the trained blocks, in place; float32, no dropout."""
    from peft import LoraConfig, inject_adapter_in_model

    where: str | list[str] = "all-linear"
    if cut:
        learning = set(lm.base_model.layers[cut:].modules())
        where = [name for name, part in lm.named_modules() if part in learning and isinstance(part, nn.Linear)]
    config = LoraConfig(r=params.lora_rank, lora_alpha=params.lora_alpha, lora_dropout=0.0, target_modules=where)
    inject_adapter_in_model(config, lm)
    for name, p in lm.named_parameters():
        p.requires_grad_("lora_" in name)
        if "lora_" in name:
            p.data = p.data.float()


def value_probe(reference: PolicyWithValue, reward_model: RewardModel, batches: list[Responses]) -> dict[str, Tensor]:
    """Weights of a value head, fitted on the reference's states to a separate critic's initial values.

    Ridge regression of the score of the tokens so far, over all tokens of the responses. Raises `InputError` if the
    reward model cannot be read token by token.
    """
    trunk, head = _critic_of(reward_model)
    critic = PolicyWithValue(reference.lm, critic="separate", value_trunk=trunk).to(reference.lm.device)
    critic.value_head.load_state_dict(head)
    with torch.no_grad():
        scores = torch.cat([critic(texts, 1.0)[1][texts.mask] for texts in batches]).double()
    states = torch.cat([reference.states(texts) for texts in batches]).double()
    level, centre = scores.mean(), states.mean(0)
    gram = (states - centre).T @ (states - centre)
    penalty = RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    weight = torch.linalg.solve(gram + penalty, (states - centre).T @ (scores - level))
    return {"weight": weight[None].float(), "bias": (level - centre @ weight)[None].float()}


def _critic_of(reward_model: RewardModel | None) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """A copy of the reward model's trunk and its head in units of the score, as weights of `value_head`."""
    head = getattr(reward_model and reward_model.model, "score", None)
    if head is None or not (reward_model.has_head and reward_model.shares_tokens) or head.out_features != 1:
        raise InputError(
            "policy.critic is 'separate', which starts as the reward model: wanted a decoder with a "
            "`score` head in the policy's own tokens; take 'shared' or 'detached'"
        )
    trunk = copy.deepcopy(reward_model.model.base_model).float().requires_grad_(True)
    bias = -reward_model.offset if head.bias is None else head.bias.item() - reward_model.offset
    weight = head.weight.detach().float() / reward_model.scale
    return trunk, {"weight": weight.clone(), "bias": torch.tensor([bias / reward_model.scale])}


# ---------------------------------------------------------------------------------------------------- micro-batches


Texts = TypeVar("Texts", bound=Responses)


def micro_batches(texts: Texts, rows: Tensor, size: int) -> Iterator[tuple[Tensor, Texts]]:
    """Split `rows` by length, `size` at a time: their numbers, and the rows without needless padding."""
    for part in rows[texts.lengths[rows].argsort(stable=True)].split(size):
        yield part, texts.take(part)
