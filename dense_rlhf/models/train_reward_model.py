"""The proxy reward model: trained here on labels or pairs, or loaded from the hub; its agreement with people."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
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
from dense_rlhf.files import cached_folder, commit_of, content_key, model_sha256
from dense_rlhf.fingerprint import source_key
from dense_rlhf.models.dialogue import head_ids, prompt_ids, tokens_key
from dense_rlhf.models.language_models import LanguageModel, load_weights, machine
from dense_rlhf.models.reward_model import RewardModel, chosen_output
from dense_rlhf.types import InputError, LabelledText, PreferencePair, Prompt, Reading

PARTS = 4  # of a batch of snippets, by length: padding would be a quarter of it


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


def fresh_classifier(
    params: RewardParams, tokenizer: PreTrainedTokenizerBase, policy: PreTrainedModel | None = None
) -> PreTrainedModel:
    """An untrained classifier with one output, in float32: a Llama of this size, with random weights.

    With `reward.name` policy it has the policy's embeddings, first `reward.layers` blocks and norm, and a random head.
    Raises `InputError` where the policy has fewer blocks, or `transformers` no classifier of its kind.
    """
    if params.name == "policy":
        return _first_layers(policy, params.layers)
    config = LlamaConfig(
        vocab_size=max(tokenizer.get_vocab().values()) + 1,  # ids may have gaps
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


def _first_layers(policy: PreTrainedModel, layers: int) -> PreTrainedModel:
    config = copy.deepcopy(policy.config)
    if layers > config.num_hidden_layers:
        raise InputError(f"reward.layers is {layers}, wanted at most the policy's {config.num_hidden_layers}")
    config.num_hidden_layers, config.num_labels, config.dtype = layers, 1, torch.float32
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    try:
        model = AutoModelForSequenceClassification.from_config(config)
    except ValueError as error:
        lacks = f"transformers has no classifier of a {config.model_type}"
        raise InputError(f"reward.name is 'policy', but {lacks}; wanted 'scratch', a folder or a hub id") from error
    with torch.no_grad():
        given = policy.base_model.state_dict()
        for name, weight in model.base_model.state_dict().items():
            weight.copy_(given[name])
    return model


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


def _logits(model: PreTrainedModel, ids: Tensor, lengths: Tensor) -> Tensor:
    """Outputs (N,) at the last tokens of right-padded ids (N, L), which a causal model reads without their padding."""
    hidden = model.base_model(input_ids=ids[:, : lengths.max()], use_cache=False).last_hidden_state
    return model.score(hidden[torch.arange(len(ids)), lengths - 1]).squeeze(-1)


def train_on_labels(
    examples: list[LabelledText],
    tokenizer: PreTrainedTokenizerBase,
    params: RewardParams,
    seed: int,
    progress: Callable = iter,
    policy: PreTrainedModel | None = None,
) -> PreTrainedModel:
    """A fresh classifier trained by logistic loss on snippets with random token dropout.

    Dropout makes coalitions (texts with tokens removed) part of the training distribution (Hase et al., 2021).
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = fresh_classifier(params, tokenizer, policy)
    encoded = tokenizer([e.text for e in examples], add_special_tokens=False)["input_ids"]
    head = torch.tensor([head_ids(tokenizer)] * params.batch, dtype=torch.long)
    labels = torch.tensor([float(e.label) for e in examples])
    optimizer = torch.optim.AdamW(model.parameters(), lr=params.lr, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, params.lr, total_steps=params.steps, pct_start=0.1)
    for _ in progress(range(params.steps)):
        rows = torch.randint(len(examples), (params.batch,), generator=generator)
        ids, keep = _snippets([encoded[row] for row in rows], params, generator)
        ids, keep = torch.cat([head, ids], 1), torch.cat([torch.ones_like(head, dtype=torch.bool), keep], 1)
        packed, lengths = pack_kept(ids, keep, tokenizer.eos_token_id)
        for part in lengths.argsort().chunk(PARTS):
            logits = _logits(model, packed[part], lengths[part])
            F.binary_cross_entropy_with_logits(logits, labels[rows[part]], reduction="sum").div(len(rows)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval()


def pair_ids(pair: PreferencePair, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Token ids of prompt + chosen and prompt + rejected, each with EOS, as the reward model reads them."""
    (prompt,) = prompt_ids([pair.prompt], tokenizer)
    space = "" if tokenizer.chat_template and not isinstance(pair.prompt, str) else " "
    sides = tokenizer([space + pair.chosen, space + pair.rejected], add_special_tokens=False)["input_ids"]
    return tuple(prompt + side + [tokenizer.eos_token_id] for side in sides)


def train_on_pairs(
    examples: list[PreferencePair],
    tokenizer: PreTrainedTokenizerBase,
    params: RewardParams,
    seed: int,
    folder: Path,
    policy: PreTrainedModel | None = None,
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
    data, model = datasets.Dataset.from_list(rows), fresh_classifier(params, tokenizer, policy)
    trainer = RewardTrainer(model, config, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    return trainer.model.float().eval()


def load_reward_model(
    examples: list[LabelledText] | list[PreferencePair],
    policy: LanguageModel | PreTrainedTokenizerBase,
    params: RewardParams,
    data_revision: str,
    progress: Callable = iter,
    meanwhile: Callable | None = None,
) -> RewardModel:
    """The proxy of `params`: trained on its share of `examples` and cached by content, or loaded from the hub.

    Of the policy its tokenizer is enough, unless `reward.name` is policy: then the proxy starts from its model.
    `meanwhile` is called where another process is training the proxy. A hub model may have another vocabulary than the
    policy's; its tokens are then aligned by characters. Raises `InputError` where a tokenizer alone is too little.
    """
    tokenizer = policy.tokenizer if isinstance(policy, LanguageModel) else policy
    if params.name == "policy" and tokenizer is policy:
        raise InputError("reward.name is 'policy', but only a tokenizer is given; wanted the policy as a LanguageModel")
    if not params.trained_here:
        return _hub_reward_model(params, tokenizer)
    examples = share_of(examples, params.labels, params.seed)
    start = policy.model if params.name == "policy" else None

    def build(folder: Path) -> None:
        if isinstance(examples[0], PreferencePair):
            model = train_on_pairs(examples, tokenizer, params, params.seed, folder, start)
        else:
            model = train_on_labels(examples, tokenizer, params, params.seed, progress, start)
        model.save_pretrained(folder)

    # parameters that its training does not use
    later = ("dtype", "token_budget", "output", "pair", "dpo_steps", "dpo_beta")
    learned = {name: value for name, value in vars(params).items() if name not in later}
    key = {
        "data": data_revision,
        "examples": content_key([asdict(example) for example in examples]),  # one file is read in several ways
        "params": learned,
        "tokens": tokens_key(tokenizer),
        "machine": machine(),
        "code": source_key("dense_rlhf.models.train_reward_model"),
    } | ({"policy": [policy.revision, str(start.dtype)]} if start is not None else {})
    folder = cached_folder("reward", key, build, meanwhile=meanwhile)
    model = AutoModelForSequenceClassification.from_pretrained(folder, use_safetensors=True)
    model = model.eval().to(getattr(torch, params.dtype))
    return RewardModel(model, tokenizer, token_budget=params.token_budget, revision=folder.name)


def _hub_reward_model(params: RewardParams, tokenizer: PreTrainedTokenizerBase) -> RewardModel:
    try:
        commit = commit_of(params.name, params.revision)
        own = AutoTokenizer.from_pretrained(params.name, revision=commit or "main")
    except InputError:
        raise
    except Exception as error:  # the tokenizers' own errors share no base class
        wanted = "'scratch', 'policy', a local folder or a hub id that is reachable"
        failed = f"cannot load {params.name!r} ({type(error).__name__})"
        raise InputError(f"reward.name: {failed}. Wanted {wanted}") from error
    model = load_weights(AutoModelForSequenceClassification, "reward.name", params.name, revision=commit or "main")
    output = chosen_output(model, params.output, "reward.output")
    return RewardModel(
        model.eval().to(getattr(torch, params.dtype)),
        own,
        token_budget=params.token_budget,
        policy_tokenizer=tokenizer,
        revision=commit or model_sha256(Path(params.name)),
        output=output,
        pair=params.pair,
    )


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
    generator = torch.Generator().manual_seed(seed)

    def outputs(readings: list[Reading]) -> Tensor:
        rows, segments = [], []
        for one in readings:
            keep = (torch.rand(len(one.prompt) + len(one.response), generator=generator) >= drop).tolist()
            keep += [True] * len(reward_model.suffix_of(one))
            rows.append(list(compress(reward_model.whole(one), keep)))
            segments.append(one.segments and list(compress(one.segments, keep)))
        return reward_model.read_whole(rows, segments=segments).cpu()

    if isinstance(examples[0], PreferencePair):
        sides = zip(*(text_readings(reward_model, [(e.prompt, e.chosen), (e.prompt, e.rejected)]) for e in examples))
        pairs = [pair for pair in zip(*sides) if max(len(reward_model.whole(one)) for one in pair) <= window]
        chosen, rejected = (outputs([pair[i] for pair in pairs]) for i in (0, 1))
        return (chosen > rejected).numpy()
    labels = np.array([e.label for e in examples], bool)
    readings = text_readings(reward_model, [(None, e.text) for e in examples])
    return (outputs([shortened(one, window) for one in readings]) > 0).numpy() == labels


def text_readings(reward_model: RewardModel, texts: Sequence[tuple[Prompt | None, str]]) -> list[Reading]:
    """Prompts and responses in the form that the model was trained on: here, or by whoever made it.

    Without a prompt, a response is a text of its own.
    """
    if reward_model.policy_tokenizer is not None:
        return [reward_model.reader.read(prompt or "", response)[0] for prompt, response in texts]
    tokenizer, head = reward_model.tokenizer, tuple(head_ids(reward_model.tokenizer))
    alone = iter(
        tokenizer([text for prompt, text in texts if prompt is None] or [""], add_special_tokens=False)["input_ids"]
    )
    sides = (None if p is None else pair_ids(PreferencePair(p, text, text), tokenizer)[0][:-1] for p, text in texts)
    return [Reading(head, tuple(next(alone))) if ids is None else Reading((), tuple(ids)) for ids in sides]


def shortened(reading: Reading, window: int) -> Reading:
    """The first `window` tokens of a text, with its special tokens."""
    cut, segments = reading.response[:window], reading.segments
    if segments:
        start, end = len(reading.prompt) + len(cut), len(reading.prompt) + len(reading.response)
        segments = (*segments[:start], *segments[end:])
    return replace(reading, response=cut, segments=segments)
