"""The tiny policy from nothing: a byte-level BPE and a Llama-style model, trained on reviews."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dense_rlhf.files import seal, write_json

EOS, PAD = "<eos>", "<pad>"


@dataclass(frozen=True)
class LanguageModelParams:
    """Size and recipe. Two optimisers: Muon (Jordan, 2024) for the layers' matrices, AdamW for the rest."""

    vocabulary: int = 4096
    hidden: int = 256
    layers: int = 4
    heads: int = 4
    context: int = 128  # tokens a training sequence
    batch: int = 32  # sequences a step
    steps: int = 60
    muon_lr: float = 0.02
    adamw_lr: float = 6e-3
    warmup: float = 0.05  # share of the steps; then cosine to a tenth
    held_out_tokens: int = 100_000


def train_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with distinct `<eos>` and `<pad>`; encoding adds neither."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[EOS, PAD], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=EOS, pad_token=PAD, padding_side="left", clean_up_tokenization_spaces=False
    )


def build_language_model(params: LanguageModelParams, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A fresh model with tied embeddings; about 4.2M parameters at the defaults."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=params.hidden,
        intermediate_size=params.hidden * 8 // 3 // 8 * 8,
        num_hidden_layers=params.layers,
        num_attention_heads=params.heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def token_stream(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """All texts as one sequence of token ids, with an EOS before each and one at the end."""
    eos = tokenizer.eos_token_id
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return torch.tensor([token for ids in encoded for token in (eos, *ids)] + [eos])


def next_token_loss(model: LlamaForCausalLM, tokens: Tensor) -> Tensor:
    """Mean cross-entropy, nats a token, of each token of (B, L + 1) given those before it."""
    logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, stream: Tensor, context: int) -> float:
    """Nats a token over consecutive windows of `context` tokens; the short tail is left out."""
    windows = stream[: (len(stream) - 1) // context * context + 1].unfold(0, context + 1, context)
    losses = [next_token_loss(model, chunk).item() * len(chunk) for chunk in windows.split(64)]
    return sum(losses) / len(windows)


def _schedule(step: int, params: LanguageModelParams) -> float:
    warm = max(1, round(params.warmup * params.steps))
    if step < warm:
        return (step + 1) / warm
    return 0.55 + 0.45 * math.cos(math.pi * (step - warm) / max(1, params.steps - warm))


def train_language_model(
    model: LlamaForCausalLM,
    stream: Tensor,
    params: LanguageModelParams,
    seed: int,
    progress: Callable[[Iterator], Iterator] = iter,
) -> list[float]:
    """Train in place on random windows of `stream`; returns the loss of every step, nats a token."""
    generator = torch.Generator().manual_seed(seed)
    trunk = [p for p in model.model.layers.parameters() if p.dim() == 2]
    rest = [p for p in model.parameters() if not any(p is q for q in trunk)]
    optimizers = [
        torch.optim.Muon(trunk, lr=params.muon_lr, weight_decay=0.01, adjust_lr_fn="original"),
        torch.optim.AdamW(rest, lr=params.adamw_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    schedulers = [torch.optim.lr_scheduler.LambdaLR(o, lambda step: _schedule(step, params)) for o in optimizers]
    window, losses = torch.arange(params.context + 1), []
    for _ in progress(range(params.steps)):
        start = torch.randint(len(stream) - params.context, (params.batch, 1), generator=generator)
        loss = next_token_loss(model, stream[start + window])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for stepper in (*optimizers, *schedulers):
            stepper.step()
        model.zero_grad()
        losses.append(loss.item())
    return losses


def save_language_model(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, recipe: dict, folder: Path
) -> LlamaForCausalLM:
    """Write half-precision safetensors, tokenizer, `recipe.json` and hashes; returns the model as readers load it."""
    half = LlamaForCausalLM(model.config).to(torch.float16)
    half.load_state_dict(model.state_dict())
    half.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_json(Path(folder) / "recipe.json", recipe)
    seal(Path(folder))
    return half.float()
