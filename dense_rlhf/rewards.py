"""What a text is worth: the learned proxy reward model, and additive judges whose token credit is known exactly."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from dense_rlhf.data import prompt_text
from dense_rlhf.params import RewardParams
from dense_rlhf.store import cached_folder, source_sha256, write_json
from dense_rlhf.types import InputError, LabelledText, PreferencePair

WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)?")


# ---------------------------------------------------------------------------------------------------- proxy


def pack_kept(ids: Tensor, keep: Tensor, eos_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """Move the kept tokens of each row (N, L) to the front and put EOS behind them.

    Returns packed ids (N, L + 1), lengths (N,) with the EOS, and the original column of each packed one (N, L).
    """
    order = torch.argsort(~keep, dim=-1, stable=True)
    packed = F.pad(ids.gather(-1, order), (0, 1), value=eos_id)
    lengths = keep.sum(-1)
    packed[torch.arange(len(ids), device=ids.device), lengths] = eos_id
    return packed, lengths + 1, order


@dataclass(frozen=True)
class RewardModel:
    """A sequence classifier with one output, read at an EOS that we append, so that no removal moves the read-out.

    `score = (output - offset) / scale`. The EOS is never a player; `offset` and `scale` come from `calibrated`.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    offset: float = 0.0
    scale: float = 1.0
    token_budget: int = 32768

    def calibrated(self, scores: Tensor) -> RewardModel:
        """The same model, centred and scaled so that `scores` (N,), the reference policy's, have mean 0 and sd 1."""
        sd = scores.std().item()
        if not sd > 1e-6:
            raise InputError(f"the reward model gives {len(scores)} texts scores of standard deviation {sd}; train it")
        return replace(self, offset=self.offset + scores.mean().item() * self.scale, scale=self.scale * sd)

    @torch.no_grad()
    def score(self, ids: Tensor, keep: Tensor) -> Tensor:
        """Scores (N,) of the kept tokens of each row of `ids` (N, L), in batches of `token_budget` tokens."""
        packed, lengths, _ = pack_kept(ids, keep, self.tokenizer.eos_token_id)
        order = torch.argsort(lengths)
        scores = torch.empty(len(ids), device=ids.device)
        for rows in self._batches(order, lengths):
            width = int(lengths[rows].max())
            hidden = self._trunk(packed[rows, :width], lengths[rows]).last_hidden_state
            read = hidden[torch.arange(len(rows), device=ids.device), lengths[rows] - 1]
            scores[rows] = self.model.score(read).squeeze(-1).float()
        return (scores - self.offset) / self.scale

    def _batches(self, order: Tensor, lengths: Tensor) -> Iterator[Tensor]:
        """Split `order`, sorted by length, so that rows times longest row stays within the token budget."""
        start, sizes = 0, lengths[order].tolist()
        for end in range(1, len(sizes) + 1):
            if end == len(sizes) or (end + 1 - start) * sizes[end] > self.token_budget:
                yield order[start:end]
                start = end

    def _trunk(self, ids: Tensor, lengths: Tensor, **options):
        mask = (torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]).long()
        return self.model.base_model(input_ids=ids, attention_mask=mask, use_cache=False, **options)

    @torch.no_grad()
    def read_attention(self, ids: Tensor, keep: Tensor) -> Tensor:
        """Last-layer attention of the read position, mean over heads, at the kept tokens of `ids`: (N, L)."""
        packed, lengths, order = pack_kept(ids, keep, self.tokenizer.eos_token_id)
        before = self.model.config._attn_implementation
        self.model.set_attn_implementation("eager")  # the others return no weights
        try:
            weights = self._trunk(packed, lengths, output_attentions=True).attentions[-1].float().mean(1)  # (N, L, L)
        finally:
            self.model.set_attn_implementation(before)
        row = weights[torch.arange(len(ids), device=ids.device), lengths - 1, :-1]
        return torch.zeros_like(row).scatter(-1, order, row).masked_fill(~keep, 0)


def _fresh_classifier(params: RewardParams, tokenizer: PreTrainedTokenizerBase) -> LlamaForSequenceClassification:
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=params.hidden, intermediate_size=2 * params.hidden,
        num_hidden_layers=params.layers, num_attention_heads=params.heads, num_labels=1,
        max_position_embeddings=2048, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return LlamaForSequenceClassification(config)


def _snippets(encoded: list[list[int]], params: RewardParams, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A random window of each text, random tokens of it kept: ids and keep, both (N, window)."""
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
    examples: list[LabelledText], tokenizer: PreTrainedTokenizerBase, params: RewardParams, seed: int,
    progress: Callable = iter,
) -> PreTrainedModel:  # fmt: skip
    """A fresh classifier trained by logistic loss on snippets with random token dropout.

    Dropout puts coalitions (texts with tokens removed) into the training distribution (Hase et al., 2021).
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = _fresh_classifier(params, tokenizer)
    encoded = tokenizer([e.text for e in examples], add_special_tokens=False)["input_ids"]
    labels = torch.tensor([float(e.label) for e in examples])
    optimizer = torch.optim.AdamW(model.parameters(), lr=params.lr, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, params.lr, total_steps=params.steps, pct_start=0.1)
    for _ in progress(range(params.steps)):
        rows = torch.randint(len(examples), (params.batch,), generator=generator)
        snippets = _snippets([encoded[row] for row in rows], params, generator)
        packed, lengths, _ = pack_kept(*snippets, tokenizer.eos_token_id)
        hidden = model.model(input_ids=packed, use_cache=False).last_hidden_state  # causal: right padding is unseen
        logits = model.score(hidden[torch.arange(len(rows)), lengths - 1]).squeeze(-1)
        F.binary_cross_entropy_with_logits(logits, labels[rows]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval()


def pair_ids(pair: PreferencePair, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Token ids of prompt + chosen and prompt + rejected, each with EOS: what the reward model reads."""
    prompt = tokenizer(prompt_text(pair.prompt), add_special_tokens=False)["input_ids"]
    sides = tokenizer([" " + pair.chosen, " " + pair.rejected], add_special_tokens=False)["input_ids"]
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
        raise InputError(f"reward.window: {len(rows)} of {len(examples)} pairs have at most {params.window} tokens, "
                         f"wanted at least reward.batch = {params.batch}; raise the window")  # fmt: skip
    cpu = not torch.cuda.is_available()
    config = RewardConfig(
        str(folder / "trainer"), per_device_train_batch_size=params.batch, max_steps=params.steps, seed=seed,
        learning_rate=params.lr, max_length=params.window, center_rewards_coefficient=0.01, use_cpu=cpu, bf16=not cpu,
        gradient_checkpointing=False, report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    data, model = datasets.Dataset.from_list(rows), _fresh_classifier(params, tokenizer)
    trainer = RewardTrainer(model, config, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    return trainer.model.float().eval()


def load_reward_model(
    examples: list[LabelledText] | list[PreferencePair], tokenizer: PreTrainedTokenizerBase, params: RewardParams,
    data_revision: str, seed: int = 0, progress: Callable = iter,
) -> RewardModel:  # fmt: skip
    """The proxy of `params`: trained on `examples` and cached by content, or loaded from the hub.

    Raises `InputError` for a hub model with another vocabulary than the policy's: credit is per policy token.
    """
    if params.name != "scratch":
        return _hub_reward_model(params, tokenizer)

    def build(folder: Path) -> None:
        if isinstance(examples[0], PreferencePair):
            model = train_on_pairs(examples, tokenizer, params, seed, folder)
        else:
            model = train_on_labels(examples, tokenizer, params, seed, progress)
        model.save_pretrained(folder)

    key = {
        "data": data_revision, "rows": len(examples), "params": vars(params), "seed": seed,
        "vocabulary": sorted(tokenizer.get_vocab().items())[:: max(1, len(tokenizer) // 4096)],
        "torch": torch.__version__, "code": source_sha256("rewards.py", "data.py"),
    }  # fmt: skip
    folder = cached_folder("reward", key, build)
    model = LlamaForSequenceClassification.from_pretrained(folder, use_safetensors=True)
    return RewardModel(model.eval(), tokenizer, token_budget=params.token_budget)


def _hub_reward_model(params: RewardParams, tokenizer: PreTrainedTokenizerBase) -> RewardModel:
    try:
        model = AutoModelForSequenceClassification.from_pretrained(
            params.name, revision=params.revision or "main", use_safetensors=True
        )
        own = type(tokenizer).from_pretrained(params.name, revision=params.revision or "main")
    except (OSError, ValueError) as error:
        raise InputError(f"reward.name: cannot load {params.name!r} ({type(error).__name__}). Wanted 'scratch', a "
                         "local folder or a hub id that is reachable") from error  # fmt: skip
    if model.config.num_labels != 1 or not hasattr(model, "score"):
        raise InputError(f"reward.name: {params.name!r} has {model.config.num_labels} outputs, wanted one 'score' head")
    if own.get_vocab() != tokenizer.get_vocab():
        raise InputError(f"reward.name: {params.name!r} has another vocabulary than the policy's; credit is per policy "
                         "token, so take a reward model with the policy's tokenizer")  # fmt: skip
    return RewardModel(model.eval(), tokenizer, token_budget=params.token_budget)


# ---------------------------------------------------------------------------------------------------- additive judges


@dataclass(frozen=True)
class AdditiveJudge:
    """A score that is a sum over words, so that the credit of every token is known exactly. Unknown words add zero."""

    name: str
    weights: dict[str, float]  # lower-case word -> credit

    def score(self, text: str) -> float:
        """What the text's words add up to."""
        return sum(self.weights.get(word.group().lower(), 0.0) for word in WORD.finditer(text))

    def token_credit(self, tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[float]:
        """Credit of each token: a word's is spread evenly over the tokens that touch it. Sums to `score(text)`."""
        ends = [len(tokenizer.decode(ids[: t + 1])) for t in range(len(ids))]
        starts, credit = [0, *ends[:-1]], [0.0] * len(ids)
        for word in WORD.finditer(tokenizer.decode(ids)):
            weight = self.weights.get(word.group().lower(), 0.0)
            touching = [t for t in range(len(ids)) if starts[t] < word.end() and ends[t] > word.start()]
            for t in touching if weight else ():
                credit[t] += weight / len(touching)
        return credit


def train_gold_judge(examples: list[LabelledText] | list[PreferencePair], strength: float = 1e-3) -> AdditiveJudge:
    """Logistic regression on un-normalised TF-IDF of single words: labels, or differences of pairs (Bradley-Terry).

    `strength` is the inverse of the ridge penalty. Without length normalisation the log-odds are additive in words.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    tfidf = TfidfVectorizer(lowercase=True, token_pattern=WORD.pattern, norm=None, min_df=5)
    if isinstance(examples[0], PreferencePair):
        tfidf.fit([pair.chosen for pair in examples] + [pair.rejected for pair in examples])
        better = tfidf.transform([pair.chosen for pair in examples]) - tfidf.transform([p.rejected for p in examples])
        sign = np.where(np.arange(len(examples)) % 2, 1, -1)  # half of the differences are flipped
        X, y = better.multiply(sign[:, None]).tocsr(), sign > 0
    else:
        X, y = tfidf.fit_transform([e.text for e in examples]), [e.label for e in examples]
    model = LogisticRegression(C=strength, fit_intercept=not isinstance(examples[0], PreferencePair), max_iter=500)
    weights = model.fit(X, y).coef_[0] * tfidf.idf_
    return AdditiveJudge("gold", dict(zip(tfidf.get_feature_names_out().tolist(), weights.tolist())))


def load_gold_judge(examples: list[LabelledText] | list[PreferencePair], data_revision: str) -> AdditiveJudge:
    """`train_gold_judge`, cached by content."""
    key = {"data": data_revision, "rows": len(examples), "code": source_sha256("rewards.py", "data.py")}
    folder = cached_folder("gold", key, lambda f: write_json(f / "weights.json", train_gold_judge(examples).weights))
    return AdditiveJudge("gold", json.loads((folder / "weights.json").read_text()))


def load_lexicon() -> AdditiveJudge:
    """VADER's words with their mean human valence, -4 to 4 (Hutto & Gilbert, 2014); phrases and emoji left out."""
    import importlib.resources

    text = (importlib.resources.files("vaderSentiment") / "vader_lexicon.txt").read_text(encoding="utf-8")
    rows = (line.split("\t") for line in text.splitlines() if line.strip())
    return AdditiveJudge("lexicon", {row[0].lower(): float(row[1]) for row in rows if WORD.fullmatch(row[0])})


# ---------------------------------------------------------------------------------------------------- accuracy


def proxy_correct(
    reward_model: RewardModel, examples: list[LabelledText] | list[PreferencePair], window: int, drop: float = 0.0,
    seed: int = 0,
) -> np.ndarray:  # fmt: skip
    """Whether the proxy agrees with people on each example, (N,) of bool, with a share `drop` of its tokens removed.

    Labels: is the first `window` tokens' output above zero? Pairs: does the chosen reply score higher? Pairs with
    more than `window` tokens are left out, so compare len() with the number of examples.
    """
    tokenizer, generator = reward_model.tokenizer, torch.Generator().manual_seed(seed)

    def scores(sequences: list[list[int]]) -> Tensor:
        width = max(map(len, sequences))
        ids = torch.tensor([tokens + [0] * (width - len(tokens)) for tokens in sequences])
        keep = torch.arange(width) < torch.tensor([len(tokens) for tokens in sequences])[:, None]
        keep &= torch.rand(keep.shape, generator=generator) >= drop
        device = reward_model.model.device
        return reward_model.score(ids.to(device), keep.to(device)).cpu() * reward_model.scale + reward_model.offset

    if isinstance(examples[0], PreferencePair):
        pairs = [sides for e in examples if max(map(len, sides := pair_ids(e, tokenizer))) <= window]
        chosen, rejected = (scores([sides[i][:-1] for sides in pairs]) for i in (0, 1))
        return (chosen > rejected).numpy()
    encoded = tokenizer([e.text for e in examples], add_special_tokens=False)["input_ids"]
    labels = np.array([e.label for e in examples], bool)
    return (scores([tokens[:window] for tokens in encoded]) > 0).numpy() == labels


def judge_correct(judge: AdditiveJudge, examples: list[LabelledText] | list[PreferencePair]) -> np.ndarray:
    """Whether an additive judge agrees with people on each whole example, (N,) of bool."""
    if isinstance(examples[0], PreferencePair):
        return np.array([judge.score(e.chosen) > judge.score(e.rejected) for e in examples])
    return np.array([(judge.score(e.text) > 0) == bool(e.label) for e in examples])
