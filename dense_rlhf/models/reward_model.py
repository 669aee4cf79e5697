"""A learned reward model as the study reads it: token sequences in, scores out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dense_rlhf.models.text_spans import translate
from dense_rlhf.types import InputError, Reading, Responses, Rollout


@dataclass(frozen=True)
class RewardModel:
    """A sequence classifier with one output, read at the end of a suffix that we append, which no removal moves.

    `score = (output - offset) / scale`. Prompt and suffix (by default its EOS) are never players.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase  # the model's own
    offset: float = 0.0
    scale: float = 1.0
    token_budget: int | None = None  # tokens in one forward pass; None leaves it to the device
    policy_tokenizer: PreTrainedTokenizerBase | None = None  # set where the policy's tokens are not the model's
    suffix: tuple[int, ...] = ()
    implicit: Callable[[Rollout], Tensor] | None = None  # per-token reward of a DPO-trained policy, (B, T)
    revision: str = ""  # the hub's commit, or a hash of the weights or of what they were trained on

    def __post_init__(self):
        if not self.suffix:
            if self.tokenizer.eos_token_id is None:
                raise InputError("the reward model's tokenizer has no EOS to read at; give a suffix of token ids")
            object.__setattr__(self, "suffix", (self.tokenizer.eos_token_id,))

    @property
    def budget(self) -> int:
        """Tokens in one forward pass: what fits a CPU's cache, what fills a GPU."""
        return self.token_budget or (4096 if self.model.device.type == "cpu" else 65536)

    @property
    def dtype(self) -> torch.dtype:
        """Of scores: the model's, at least float32."""
        return torch.promote_types(self.model.dtype, torch.float32)

    def calibrated(self, scores: Tensor) -> RewardModel:
        """The same model, shifted and scaled so that the reference policy's `scores` (N,) have mean 0 and sd 1."""
        sd = scores.std().item()
        if not sd > 1e-6:
            raise InputError(f"the reward model gives {len(scores)} texts scores of standard deviation {sd}; train it")
        return replace(self, offset=self.offset + scores.mean().item() * self.scale, scale=self.scale * sd)

    def calibrate(self, outputs: Tensor) -> Tensor:
        """Raw outputs of the model as scores."""
        return (outputs - self.offset) / self.scale

    def reading(self, prompt: Sequence[int], response: Sequence[int]) -> Reading:
        """A policy's tokens as the model reads them: the same, or their text in its own tokens."""
        if self.policy_tokenizer is None:
            return Reading(tuple(prompt), tuple(response))
        return translate(self.policy_tokenizer, self.tokenizer, prompt, response)

    def readings(self, texts: Responses) -> list[Reading]:
        """A reading of every response, without its EOS."""
        queries = (ids[keep].tolist() for ids, keep in zip(texts.queries.cpu(), texts.query_mask.cpu()))
        responses = (ids[keep].tolist() for ids, keep in zip(texts.responses.cpu(), texts.players.cpu()))
        return [self.reading(query, response) for query, response in zip(queries, responses)]

    def score(self, readings: Sequence[Reading]) -> Tensor:
        """Scores (N,) of whole responses."""
        return self.calibrate(self.outputs([[*reading.prompt, *reading.response] for reading in readings]))

    @torch.no_grad()
    def outputs(self, sequences: Sequence[Sequence[int]], attended: Sequence[Sequence[bool]] | None = None) -> Tensor:
        """Raw outputs (N,) of token sequences followed by the suffix, in batches within the token budget.

        Tokens that are not `attended` are hidden and keep their place. At least float32.
        """
        outputs = torch.empty(len(sequences), device=self.model.device, dtype=self.dtype)
        for rows in batches([len(sequence) + len(self.suffix) for sequence in sequences], self.budget):
            ids, real = self.suffixed([sequences[i] for i in rows])
            seen = real
            if attended is not None:
                seen = padded([(*attended[i], *(True for _ in self.suffix)) for i in rows], 0, ids.device)[0].bool()
            outputs[rows] = self.read(seen, real.sum(-1) - 1, input_ids=ids).to(outputs.dtype)
        return outputs

    def suffixed(self, sequences: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Token sequences followed by the suffix: ids (N, L), padded on the right, and which are real (N, L)."""
        rows = [(*sequence, *self.suffix) for sequence in sequences]
        return padded(rows, self.tokenizer.pad_token_id or 0, self.model.device)

    def read(self, seen: Tensor, last: Tensor, **tokens: Tensor) -> Tensor:
        """Raw outputs (N,) of `input_ids` or `inputs_embeds` at the positions `last`; encoders pool by themselves."""
        if not hasattr(self.model, "score"):
            return self.model(attention_mask=seen.long(), **tokens).logits.squeeze(-1)
        hidden = self.model.base_model(attention_mask=seen.long(), use_cache=False, **tokens).last_hidden_state
        return self.model.score(hidden[torch.arange(len(seen), device=seen.device), last]).squeeze(-1)


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
