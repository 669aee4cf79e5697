"""The proxy reward model: trained here on labels or pairs, or loaded from the hub; its agreement with people."""

from __future__ import annotations

from collections.abc import Callable
from itertools import compress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from dense_rlhf.config.params import RewardParams
from dense_rlhf.data import render
from dense_rlhf.files import cached_folder, commit_of, weights_sha256
from dense_rlhf.fingerprint import source_key
from dense_rlhf.models.reward_model import RewardModel
from dense_rlhf.types import InputError, LabelledText, PreferencePair


def share_of(examples: list, labels: float, seed: int) -> list:
    """A random share `labels` of the examples; a larger share holds a smaller one of the same seed, 1 keeps all.

    Raises `InputError` where it rounds to none.
    """
    if labels == 1:
        return examples
    kept = round(labels * len(examples))
    if not kept:
        left = f"reward.labels is {labels:g}, which leaves none of {len(examples)} examples"
        raise InputError(f"{left}; wanted at least {1 / len(examples):.2g}")
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed))
    return [examples[i] for i in order[:kept].tolist()]


def fresh_classifier(params: RewardParams, tokenizer: PreTrainedTokenizerBase) -> LlamaForSequenceClassification:
    """A Llama classifier of this size with one output and random weights."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=params.hidden,
        intermediate_size=2 * params.hidden,
        num_hidden_layers=params.layers,
        num_attention_heads=params.heads,
        num_labels=1,
        max_position_embeddings=2048,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForSequenceClassification(config)


def pack_kept(ids: Tensor, keep: Tensor, eos_id: int) -> tuple[Tensor, Tensor]:
    """Move the kept tokens of each row (N, L) to the front and append EOS: ids (N, L + 1), lengths with EOS (N,)."""
    order = torch.argsort(~keep, dim=-1, stable=True)
    packed = F.pad(ids.gather(-1, order), (0, 1), value=eos_id)
    lengths = keep.sum(-1)
    packed[torch.arange(len(ids), device=ids.device), lengths] = eos_id
    return packed, lengths + 1


def _snippets(encoded: list[list[int]], params: RewardParams, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A random window of each text, and which of its tokens are kept: ids and keep, both (N, window)."""
    ids = torch.zeros(len(encoded), params.window, dtype=torch.long)
    keep = torch.zeros(len(encoded), params.window, dtype=torch.bool)
    for row, tokens in enumerate(encoded):
        start = int(torch.randint(max(1, len(tokens) - params.window + 1), (), generator=generator))
        part = tokens[start : start + params.window]
        ids[row, : len(part)] = torch.tensor(part)
        keep[row, : len(part)] = True
    share = torch.rand(len(encoded), 1, generator=generator) * params.max_drop
    return ids, keep & (torch.rand(keep.shape, generator=generator) >= share)


def train_on_labels(
    examples: list[LabelledText],
    tokenizer: PreTrainedTokenizerBase,
    params: RewardParams,
    seed: int,
    progress: Callable = iter,
) -> PreTrainedModel:
    """A fresh classifier trained by logistic loss on snippets with random token dropout.

    Dropout makes coalitions (texts with tokens removed) part of the training distribution (Hase et al., 2021).
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = fresh_classifier(params, tokenizer)
    encoded = tokenizer([e.text for e in examples], add_special_tokens=False)["input_ids"]
    labels = torch.tensor([float(e.label) for e in examples])
    optimizer = torch.optim.AdamW(model.parameters(), lr=params.lr, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, params.lr, total_steps=params.steps, pct_start=0.1)
    for _ in progress(range(params.steps)):
        rows = torch.randint(len(examples), (params.batch,), generator=generator)
        snippets = _snippets([encoded[row] for row in rows], params, generator)
        packed, lengths = pack_kept(*snippets, tokenizer.eos_token_id)
        hidden = model.model(input_ids=packed, use_cache=False).last_hidden_state  # causal: right padding is unseen
        logits = model.score(hidden[torch.arange(len(rows)), lengths - 1]).squeeze(-1)
        F.binary_cross_entropy_with_logits(logits, labels[rows]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval()


def pair_ids(pair: PreferencePair, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Token ids of prompt + chosen and prompt + rejected, each with EOS, as the reward model reads them."""
    prompt = tokenizer(render(pair.prompt, tokenizer), add_special_tokens=False)["input_ids"]
    space = "" if tokenizer.chat_template and not isinstance(pair.prompt, str) else " "
    sides = tokenizer([space + pair.chosen, space + pair.rejected], add_special_tokens=False)["input_ids"]
    return tuple(prompt + side + [tokenizer.eos_token_id] for side in sides)


def train_on_pairs(
    examples: list[PreferencePair], tokenizer: PreTrainedTokenizerBase, params: RewardParams, seed: int, folder: Path
) -> PreTrainedModel:
    """A fresh classifier trained on pairs by trl's RewardTrainer; pairs longer than `window` tokens are left out."""
    import datasets
    from trl import RewardConfig, RewardTrainer

    torch.manual_seed(seed)
    rows = [dict(zip(("chosen_ids", "rejected_ids"), pair_ids(p, tokenizer))) for p in examples]
    rows = [row for row in rows if max(map(len, row.values())) <= params.window]
    if len(rows) < params.batch:
        short = f"{len(rows)} of {len(examples)} pairs have at most {params.window} tokens"
        wanted = f"wanted at least reward.batch = {params.batch}; raise the window or the labels"
        raise InputError(f"reward.window: {short}, {wanted}")
    cpu = not torch.cuda.is_available()
    quiet = dict(report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True)
    config = RewardConfig(
        str(folder / "trainer"),
        per_device_train_batch_size=params.batch,
        max_steps=params.steps,
        seed=seed,
        learning_rate=params.lr,
        max_length=params.window,
        center_rewards_coefficient=0.01,
        use_cpu=cpu,
        bf16=not cpu,
        gradient_checkpointing=False,
        **quiet,
    )
    data, model = datasets.Dataset.from_list(rows), fresh_classifier(params, tokenizer)
    trainer = RewardTrainer(model, config, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    return trainer.model.float().eval()


def load_reward_model(
    examples: list[LabelledText] | list[PreferencePair],
    tokenizer: PreTrainedTokenizerBase,
    params: RewardParams,
    data_revision: str,
    seed: int = 0,
    progress: Callable = iter,
) -> RewardModel:
    """The proxy of `params`: trained on its share of `examples` and cached by content, or loaded from the hub.

    A hub model may have another vocabulary than the policy's; its tokens are then aligned by characters.
    """
    if params.name != "scratch":
        return _hub_reward_model(params, tokenizer)
    examples = share_of(examples, params.labels, seed)

    def build(folder: Path) -> None:
        if isinstance(examples[0], PreferencePair):
            model = train_on_pairs(examples, tokenizer, params, seed, folder)
        else:
            model = train_on_labels(examples, tokenizer, params, seed, progress)
        model.save_pretrained(folder)

    later = ("dtype", "token_budget", "dpo_steps", "dpo_beta")  # parameters that its training does not use
    learned = {name: value for name, value in vars(params).items() if name not in later}
    key = {
        "data": data_revision,
        "rows": len(examples),
        "params": learned,
        "seed": seed,
        "vocabulary": sorted(tokenizer.get_vocab().items())[:: max(1, len(tokenizer) // 4096)],
        "torch": torch.__version__,
        "code": source_key("dense_rlhf.models.train_reward_model"),
    }
    folder = cached_folder("reward", key, build)
    model = LlamaForSequenceClassification.from_pretrained(folder, use_safetensors=True)
    model = model.eval().to(getattr(torch, params.dtype))
    return RewardModel(model, tokenizer, token_budget=params.token_budget, revision=folder.name)


def _hub_reward_model(params: RewardParams, tokenizer: PreTrainedTokenizerBase) -> RewardModel:
    try:
        commit = commit_of(params.name, params.revision)
        at = {"revision": commit or "main"}
        model = AutoModelForSequenceClassification.from_pretrained(params.name, use_safetensors=True, **at)
        own = AutoTokenizer.from_pretrained(params.name, **at)
    except (OSError, ValueError) as error:
        wanted = "'scratch', a local folder or a hub id that is reachable"
        failed = f"cannot load {params.name!r} ({type(error).__name__})"
        raise InputError(f"reward.name: {failed}. Wanted {wanted}") from error
    if model.config.num_labels != 1:
        raise InputError(f"reward.name: {params.name!r} has {model.config.num_labels} outputs, wanted one")
    model = model.eval().to(getattr(torch, params.dtype))
    revision = commit or weights_sha256(Path(params.name))
    other = None if shares_tokens(tokenizer, own) else tokenizer
    return RewardModel(model, own, token_budget=params.token_budget, policy_tokenizer=other, revision=revision)


def shares_tokens(policy: PreTrainedTokenizerBase, reward: PreTrainedTokenizerBase) -> bool:
    """Whether every token of the policy is the same token of the reward model, which may have more."""
    return policy.get_vocab().items() <= reward.get_vocab().items()


def proxy_correct(
    reward_model: RewardModel,
    examples: list[LabelledText] | list[PreferencePair],
    window: int,
    drop: float = 0.0,
    seed: int = 0,
) -> np.ndarray:
    """Whether the proxy agrees with people on each example, (N,) of bool, with a share `drop` of its tokens removed.

    Labels: the sign of the output on the first `window` tokens. Pairs: the chosen reply scores higher; those with more
    than `window` tokens are left out, so compare len() with the number of examples.
    """
    tokenizer, generator = reward_model.tokenizer, torch.Generator().manual_seed(seed)

    def outputs(sequences: list[list[int]]) -> Tensor:
        keep = ((torch.rand(len(tokens), generator=generator) >= drop).tolist() for tokens in sequences)
        return reward_model.outputs([list(compress(tokens, kept)) for tokens, kept in zip(sequences, keep)]).cpu()

    if isinstance(examples[0], PreferencePair):
        pairs = [sides for e in examples if max(map(len, sides := pair_ids(e, tokenizer))) <= window]
        chosen, rejected = (outputs([sides[i][:-1] for sides in pairs]) for i in (0, 1))
        return (chosen > rejected).numpy()
    encoded = tokenizer([e.text for e in examples], add_special_tokens=False)["input_ids"]
    labels = np.array([e.label for e in examples], bool)
    return (outputs([tokens[:window] for tokens in encoded]) > 0).numpy() == labels
