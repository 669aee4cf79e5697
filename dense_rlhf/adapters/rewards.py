"""Token rewards from token ids, for ragged batches of any trainer."""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dense_rlhf.attribution import attribute, available
from dense_rlhf.config.params import AttributionParams
from dense_rlhf.files import content_key
from dense_rlhf.models.dialogue import messages_of, turn_ends
from dense_rlhf.models.reward_model import RewardModel, check_fits, chosen_output, padded
from dense_rlhf.ppo.rollout import scored
from dense_rlhf.shaping.rewards import shape_rewards
from dense_rlhf.types import InputError, Prompt, Reading, Responses, RewardShape, is_number


@dataclass
class Cost:
    """What a scorer did so far."""

    responses: int = 0  # asked for
    remembered: int = 0  # of these, known from before
    evaluations: float = 0.0  # forwards of the reward model
    seconds: float = 0.0


@dataclass(frozen=True)
class Scorer:
    """A reward model, how it reads a trainer's tokens, and how its scores are explained; it remembers its answers.

    With the trainer's tokenizer the model reads the text of the tokens in its own, as `explain` does; a dialogue then
    goes through the model's chat template if it is given as messages. Without it, the tokens are the model's, and it
    reads exactly these: prompt, response and the end that the response has. A score is `(output - offset) / scale`.
    Weights that change need a new scorer.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase  # the model's own
    trainer_tokenizer: PreTrainedTokenizerBase | None = None  # of prompt and response ids; None: the model's own
    attribution: AttributionParams = AttributionParams()
    output: int | None = None  # which of several outputs is the score
    pair: bool = False  # the model reads prompt and response as two segments
    adds_end: bool = (
        False  # it reads its EOS after a response that has no end; only where it reads the trainer's tokens
    )
    offset: float = 0.0
    scale: float = 1.0
    memory: int = 65536  # answers that are kept, the latest
    cost: Cost = field(default_factory=Cost)
    _answers: OrderedDict[str, np.ndarray] = field(default_factory=OrderedDict, repr=False)

    def __post_init__(self):
        for name, least in (("offset", -math.inf), ("scale", 0), ("memory", -1)):
            value = getattr(self, name)
            if not is_number(value) or value <= least:
                wanted = "a finite number" if least == -math.inf else f"a finite number above {least}"
                raise InputError(f"{name} is {value!r}, wanted {wanted}")

    @cached_property
    def reward_model(self) -> RewardModel:
        if self.model.training:
            raise InputError(
                f"{type(self.model).__name__} is in training mode, dropout would be explained; call eval()"
            )
        if self.adds_end and (self.trainer_tokenizer or self.tokenizer.eos_token_id is None):
            raise InputError("adds_end wants the model's own tokens, and a tokenizer with EOS; leave it out")
        return RewardModel(
            self.model,
            self.tokenizer,
            self.offset,
            self.scale,
            policy_tokenizer=self.trainer_tokenizer,
            suffix=None if self.trainer_tokenizer else (),
            output=chosen_output(self.model, self.output, "output"),
            pair=self.pair,
        )

    def check(self, shape: RewardShape) -> None:
        """Raise `InputError` for a source that cannot explain this model."""
        if missing := set(shape.weighted) - set(available(self.reward_model, self.attribution)):
            cannot = f"{', '.join(sorted(missing))} cannot explain {type(self.model).__name__}"
            raise InputError(f"shape.sources: {cannot}")

    @cached_property
    def trainer_vocabulary(self) -> set[int]:
        """Ids that the trainer's tokenizer can write out."""
        return set(self.trainer_tokenizer.get_vocab().values())

    @cached_property
    def ends(self) -> set[int]:
        """Ids of the trainer's that end a response."""
        return turn_ends(self.trainer_tokenizer or self.tokenizer)


class _Row(NamedTuple):
    """A response to explain."""

    key: str
    prompt_ids: list[int]
    response_ids: list[int]
    prompt: Prompt | None


def dense_rewards(
    scorer: Scorer,
    prompt_ids: Sequence[Sequence[int]],
    response_ids: Sequence[Sequence[int]],
    shape: RewardShape,
    prompts: Sequence[Prompt] | None = None,
) -> list[np.ndarray]:
    """A reward for each token of N responses: N arrays (T_i,) of float32, each of which sums to its response's score.

    `prompts` are the texts or messages that `prompt_ids` were made of, which a model with another chat template needs;
    without them it reads the text of the ids, less special tokens. The last token of a response may be its end; it is
    part of T_i and never removed. Responses that were asked for before, with this shape, are not scored again;
    `scorer.cost` counts. Raises `InputError` for lists of different lengths, a response or prompt of no tokens, a
    source that this model lacks, and a score that is not finite. Not thread-safe.
    """
    started, rows = time.perf_counter(), _rows(scorer, prompt_ids, response_ids, shape, prompts)
    fresh = list({row.key: row for row in rows if row.key not in scorer._answers}.values())
    answers = {row.key: scorer._answers[row.key] for row in rows if row.key in scorer._answers}
    for suffix, alike in _by_suffix(scorer, fresh).items():
        answers |= _explained(scorer, suffix, alike, shape)
    for row in rows:
        scorer._answers[row.key] = answers[row.key]
        scorer._answers.move_to_end(row.key)
    while len(scorer._answers) > scorer.memory:
        scorer._answers.popitem(last=False)
    scorer.cost.responses += len(rows)
    scorer.cost.remembered += len(rows) - len(fresh)
    scorer.cost.seconds += time.perf_counter() - started
    return [answers[row.key].copy() for row in rows]


def _rows(scorer: Scorer, prompt_ids, response_ids, shape: RewardShape, prompts) -> list[_Row]:
    counts = {len(prompt_ids), len(response_ids), len(prompt_ids if prompts is None else prompts)}
    if isinstance(prompts, str):
        raise InputError("prompts are one text, wanted one each a response")
    if len(counts) > 1:
        given = f"{len(prompt_ids)} prompt_ids, {len(response_ids)} response_ids"
        raise InputError(f"{given}{'' if prompts is None else f', {len(prompts)} prompts'}; wanted one each a response")
    about, rows = [vars(shape), vars(scorer.attribution)], []
    for i, (asked, answer) in enumerate(zip(prompt_ids, response_ids)):
        query, response = _ids("prompt_ids", i, asked), _ids("response_ids", i, answer)
        prompt = None if prompts is None else messages_of(prompts[i])
        if not scorer.trainer_tokenizer:
            _check_fits(scorer, i, query, response)
        else:
            _check_known(scorer, f"prompt_ids[{i}]", query)
            _check_known(scorer, f"response_ids[{i}]", response)
        rows.append(_Row(content_key([about, query, response, repr(prompt)]), query, response, prompt))
    return rows


def _ids(name: str, i: int, given: Sequence[int]) -> list[int]:
    ids = np.asarray(given.cpu() if isinstance(given, torch.Tensor) else given)
    if ids.ndim != 1 or not len(ids) or ids.dtype.kind not in "iu" or ids.min() < 0:
        shown = f"{ids.dtype} of shape {ids.shape}"
        raise InputError(f"{name}[{i}] is {shown}, wanted at least one token id, none of them padding")
    return ids.tolist()


def _check_fits(scorer: Scorer, i: int, query: list[int], response: list[int]) -> None:
    try:
        check_fits(scorer.model, Reading(tuple(query), tuple(response)))
    except InputError as error:
        raise InputError(f"row {i}: {error}") from None


def _check_known(scorer: Scorer, name: str, ids: list[int]) -> None:
    if lacking := set(ids) - scorer.trainer_vocabulary:  # they would be read as no text at all
        raise InputError(
            f"{name} has token {max(lacking)}, which the trainer's tokenizer lacks; give the trainer's own"
        )


def _by_suffix(scorer: Scorer, rows: Sequence[_Row]) -> dict[tuple[int, ...] | None, list[_Row]]:
    """Rows by what follows their tokens: the end that each has; None: what the model's reader puts there."""
    groups: dict[tuple[int, ...] | None, list[_Row]] = {}
    for row in rows:
        added = (scorer.tokenizer.eos_token_id,) if scorer.adds_end else ()
        end = tuple(row.response_ids[-1:]) if row.response_ids[-1] in scorer.ends else added
        groups.setdefault(None if scorer.trainer_tokenizer else end, []).append(row)
    return groups


def _explained(
    scorer: Scorer, suffix: tuple[int, ...] | None, rows: Sequence[_Row], shape: RewardShape
) -> dict[str, np.ndarray]:
    """Rewards of each row by its key."""
    judge = scorer.reward_model if suffix is None else replace(scorer.reward_model, suffix=suffix)
    scorer.check(shape)
    responses = scored(_responses(scorer, rows), judge)
    if not bool(responses.scores.isfinite().all()):
        raise InputError(
            f"{type(scorer.model).__name__} gives a score that is not finite; look at its weights and dtype"
        )
    credit = attribute(judge, responses, shape.weighted, scorer.attribution)
    scorer.cost.evaluations += len(rows) * (1 + sum(one.evaluations for one in credit.values()))
    rewards = shape_rewards(responses, credit, shape).float().cpu().numpy()
    return {row.key: rewards[i, : len(row.response_ids)].copy() for i, row in enumerate(rows)}  # not the whole batch


def _responses(scorer: Scorer, rows: Sequence[_Row]) -> Responses:
    """The rows as a batch, not yet scored."""
    device, ends = scorer.model.device, scorer.ends
    queries, query_mask = padded([row.prompt_ids for row in rows], 0, device, left=True)
    ids, mask = padded([row.response_ids for row in rows], 0, device)
    ended = torch.tensor([row.response_ids[-1] in ends for row in rows], device=device)
    prompts = None if rows[0].prompt is None else tuple(row.prompt for row in rows)
    return Responses(queries, query_mask, ids, mask, torch.zeros(len(rows), device=device), ended, prompts=prompts)
