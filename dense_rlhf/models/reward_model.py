"""A learned reward model as its own forward reads it: token sequences in, scores out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dense_rlhf.models.dialogue import Reader
from dense_rlhf.types import InputError, Prompt, Reading, Responses, Rollout

FAILURES = RuntimeError, IndexError, ValueError, TypeError, AttributeError  # each architecture fails in its own way


@dataclass(frozen=True)
class RewardModel:
    """A sequence classifier, read where its own forward reads it, after a suffix that no removal takes away.

    `score = (output - offset) / scale`. Prompt and suffix are never players.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase  # the model's own
    offset: float = 0.0
    scale: float = 1.0
    token_budget: int | None = None  # tokens in one forward pass; None leaves it to the device
    policy_tokenizer: PreTrainedTokenizerBase | None = None  # the model reads the text of its tokens; None: the tokens
    suffix: tuple[int, ...] | None = None  # after what is read as tokens; None: EOS
    implicit: Callable[[Rollout], Tensor] | None = None  # per-token reward of a DPO-trained policy, (B, T)
    revision: str = ""  # the hub's commit, or a hash of the weights or of what they were trained on
    output: int = 0  # which of the model's outputs is the score
    pair: bool = False  # prompt and response are two segments

    def __post_init__(self):
        if self.suffix is None:
            eos = self.tokenizer.eos_token_id
            if self.policy_tokenizer is None and eos is None:
                raise InputError("the reward model's tokenizer has no EOS to read at; give a suffix of token ids")
            object.__setattr__(self, "suffix", () if eos is None else (eos,))

    @property
    def budget(self) -> int:
        """Tokens in one forward pass: what fits a CPU's cache, what fills a GPU."""
        return self.token_budget or (4096 if self.model.device.type == "cpu" else 65536)

    @property
    def dtype(self) -> torch.dtype:
        """Of scores: the model's, at least float32."""
        return torch.promote_types(self.model.dtype, torch.float32)

    @cached_property
    def has_head(self) -> bool:
        """Whether the model is a linear head on a trunk's state at one token, as its own forward confirms."""
        return _is_head_on_trunk(self.model)

    @property
    def shares_tokens(self) -> bool:
        """Whether the policy's tokens are the model's."""
        return self.policy_tokenizer is None or shares_tokens(self.policy_tokenizer, self.tokenizer)

    @property
    def reader(self) -> Reader:
        """How the model reads a text."""
        return Reader(self.tokenizer, self.pair, ends=self.has_head)

    def calibrated(self, scores: Tensor) -> RewardModel:
        """The same model, shifted and scaled so that the reference policy's `scores` (N,) have mean 0 and sd 1."""
        sd = scores.std().item()
        if not sd > 1e-6:
            raise InputError(f"the reward model gives {len(scores)} texts scores of standard deviation {sd}; train it")
        return replace(self, offset=self.offset + scores.mean().item() * self.scale, scale=self.scale * sd)

    def calibrate(self, outputs: Tensor) -> Tensor:
        """Raw outputs of the model as scores."""
        return (outputs - self.offset) / self.scale

    def reading(self, query: Sequence[int], response: Sequence[int], prompt: Prompt | None = None) -> Reading:
        """A policy's tokens as the model reads them: the same, or their text in its own tokens.

        `prompt` is what `query` was made of; without it, the text of `query` is read as plain text.
        """
        if self.policy_tokenizer is None:
            return Reading(tuple(query), tuple(response))
        reading = self.reader.translate(self.policy_tokenizer, query, response, prompt)
        check_fits(self.model, reading)
        return reading

    def readings(self, texts: Responses) -> list[Reading]:
        """A reading of every response, without its EOS."""
        queries = (ids[keep].tolist() for ids, keep in zip(texts.queries.cpu(), texts.query_mask.cpu()))
        responses = (ids[keep].tolist() for ids, keep in zip(texts.responses.cpu(), texts.players.cpu()))
        prompts = texts.prompts or [None] * len(texts.queries)
        return [self.reading(*row) for row in zip(queries, responses, prompts, strict=True)]

    def suffix_of(self, reading: Reading) -> tuple[int, ...]:
        """What follows a reading's response."""
        return self.suffix if reading.suffix is None else reading.suffix

    def whole(self, reading: Reading) -> tuple[int, ...]:
        """All tokens of a reading."""
        return (*reading.prompt, *reading.response, *self.suffix_of(reading))

    def score(self, readings: Sequence[Reading]) -> Tensor:
        """Scores (N,) of whole responses."""
        segments = [reading.segments for reading in readings]
        return self.calibrate(self.read_whole([self.whole(one) for one in readings], segments=segments))

    def outputs(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """Raw outputs (N,) of token sequences followed by the suffix."""
        return self.read_whole([(*sequence, *self.suffix) for sequence in sequences])

    @torch.no_grad()
    def read_whole(
        self,
        sequences: Sequence[Sequence[int]],
        attended: Sequence[Sequence[bool]] | None = None,
        segments: Sequence[Sequence[int] | None] | None = None,
    ) -> Tensor:
        """Raw outputs (N,) of whole token sequences, in batches within the token budget; at least float32.

        Tokens that are not `attended` are hidden and keep their place.
        """
        outputs = torch.empty(len(sequences), device=self.model.device, dtype=self.dtype)
        if not all(map(len, sequences)):
            raise InputError("a text without a single token has no score; give a prompt that is not empty")
        for rows in self.batches(sequences):
            ids, real = self.padded([sequences[i] for i in rows])
            seen = real if attended is None else padded([attended[i] for i in rows], 0, ids.device)[0].bool()
            kinds = None if segments is None or segments[rows[0]] is None else [segments[i] for i in rows]
            kinds = {} if kinds is None else {"token_type_ids": padded(kinds, 0, ids.device)[0]}
            outputs[rows] = self.read(seen, self.ends(ids, real), input_ids=ids, **kinds).to(outputs.dtype)
        return outputs

    def batches(self, sequences: Sequence[Sequence[int]], budget: int | None = None) -> Iterator[list[int]]:
        """Numbers of sequences in batches of at most `budget` tokens.

        Padding changes what some models without a head on a trunk make of a text, and some read all of a batch at as
        many EOS: their batches hold texts of one length and number of EOS.
        """
        lengths, budget = list(map(len, sequences)), budget or self.budget
        if self.has_head:
            yield from batches(lengths, budget)
            return
        alike, eos = {}, getattr(self.model.config, "eos_token_id", None)
        for i, sequence in enumerate(sequences):
            alike.setdefault((lengths[i], list(sequence).count(eos)), []).append(i)
        for rows in alike.values():
            yield from ([rows[n] for n in part] for part in batches([lengths[i] for i in rows], budget))

    def padded(self, sequences: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Whole token sequences: ids (N, L), padded on the right, and which are real (N, L)."""
        return padded(sequences, self.tokenizer.pad_token_id or 0, self.model.device)

    def ends(self, ids: Tensor, real: Tensor) -> Tensor:
        """Where each row of `ids` (N, L) is read, (N,): as in the model's own forward, its last token but padding."""
        padding = pad_id_of(self.model) if self.has_head else None
        counted = real if padding is None else real & (ids != padding)
        return (torch.arange(ids.shape[1], device=ids.device) * counted).amax(-1)

    def read(self, seen: Tensor, last: Tensor, **tokens: Tensor) -> Tensor:
        """Raw outputs (N,) of `input_ids` or `inputs_embeds` at the positions `last`, or where the model pools."""
        try:
            if not self.has_head:
                logits = self.model(attention_mask=seen.long(), **tokens).logits
                if logits.shape[:-1] != seen.shape[:1]:
                    raise InputError(f"its logits have shape {tuple(logits.shape)}, wanted one row of outputs a text")
                return logits[..., self.output]
            hidden = self.model.base_model(attention_mask=seen.long(), use_cache=False, **tokens).last_hidden_state
            return self.model.score(hidden[torch.arange(len(seen), device=seen.device), last])[..., self.output]
        except (torch.OutOfMemoryError, InputError):
            raise
        except FAILURES as error:
            size, reason = tuple(seen.shape), " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise InputError(f"{type(self.model).__name__} cannot read {size[1]} tokens ({reason})") from error


def chosen_output(model: PreTrainedModel, output: int | None, field: str) -> int:
    """The output that is the score: the only one, or the one that `field` names. Raises `InputError` otherwise."""
    has, name = model.config.num_labels, type(model).__name__
    if output is None and has != 1:
        raise InputError(f"{name} has {has} outputs, wanted one; say which is the score, {field}=0 to {has - 1}")
    if output is not None and (type(output) is not int or not 0 <= output < has):
        raise InputError(f"{field} is {output!r}, but {name} has {has} outputs, counted from 0")
    return output or 0


def pad_id_of(model: PreTrainedModel) -> int | None:
    """The token that the model's own forward takes for padding."""
    return model.config.get_text_config().pad_token_id


def shares_tokens(policy: PreTrainedTokenizerBase, reward: PreTrainedTokenizerBase) -> bool:
    """Whether every token of the policy is the same token of the reward model, which may have more."""
    return policy.get_vocab().items() <= reward.get_vocab().items()


@torch.no_grad()
def _is_head_on_trunk(model: PreTrainedModel) -> bool:
    """Whether `score`, at the last state of the base model, gives what the model's own forward gives."""
    if not hasattr(model, "score"):
        return False
    if model.device.type == "meta":  # nothing to compare; the model is only counted
        return True
    rows = model.get_input_embeddings().weight.shape[0]
    ids = torch.tensor([[n for n in range(rows) if n != pad_id_of(model)][:5]], device=model.device)
    trains = model.training
    try:
        model.eval()  # dropout would tell them apart
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        own = model(input_ids=ids).logits
        return torch.allclose(model.score(hidden[:, -1]), own, rtol=1e-2, atol=1e-4, equal_nan=True)
    except Exception:  # every architecture fails in its own way
        return False
    finally:
        model.train(trains)


def longest_text(model: PreTrainedModel) -> float:
    """Tokens that fit the model's positions; RoBERTa's begin after its padding id, relative ones do not end."""
    config = model.config.get_text_config()
    most = getattr(config, "max_position_embeddings", None) or float("inf")
    if most < 0 or not getattr(config, "position_biased_input", True):  # XLNet; DeBERTa
        return float("inf")
    places = getattr(getattr(model.base_model, "embeddings", None), "position_embeddings", None)
    padding = getattr(places, "padding_idx", None)
    return most if padding is None else most - padding - 1


def check_fits(model: PreTrainedModel, reading: Reading) -> None:
    """Raise `InputError` for a reading that is longer than the model's positions, or of tokens that it lacks."""
    tokens, name = [*reading.prompt, *reading.response, *(reading.suffix or ())], type(model).__name__
    if len(tokens) > longest_text(model):
        reads = f"{name} reads at most {longest_text(model)}; shorten the prompt or the response"
        raise InputError(f"prompt, response and end are {len(tokens)} tokens, {reads}")
    if max(tokens, default=0) >= (rows := vocabulary_size(model)):
        raise InputError(f"{name} has {rows} embeddings, but the text has token {max(tokens)}; take its own tokenizer")


def vocabulary_size(model: PreTrainedModel) -> float:
    """Tokens that have an embedding; infinite for a model that hashes characters, as CANINE does."""
    if hasattr(model.config, "num_hash_buckets"):
        return float("inf")
    return model.get_input_embeddings().weight.shape[0]


def padded(
    sequences: Sequence[Sequence[int]], value: int, device: torch.device, left: bool = False
) -> tuple[Tensor, Tensor]:
    """Sequences padded with `value`, on the right or the left: ids (N, L), and which are real (N, L)."""
    width = max(map(len, sequences), default=0)
    ids, real = torch.full((len(sequences), width), value), torch.zeros(len(sequences), width, dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        place = slice(width - len(sequence), width) if left else slice(len(sequence))
        ids[row, place], real[row, place] = torch.tensor(sequence, dtype=torch.long), True
    return ids.to(device), real.to(device)


def batches(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Numbers of sequences, short ones first, in batches of at most `budget` tokens with padding, or of one."""
    batch = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) + 1) * lengths[i] > budget:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
