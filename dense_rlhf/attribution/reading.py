"""What `explain` asks of a reward model: which model and text it takes, and what of them the model reads, and where."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dense_rlhf.models.dialogue import ROLES, Reader, Turn, frame, messages_of, templated
from dense_rlhf.models.reward_model import RewardModel, check_fits, chosen_output
from dense_rlhf.models.text_spans import Spans, cut, groups, homes, partition, tile
from dense_rlhf.types import InputError, Message, Prompt, Reading

ENDS = (None, "eos")


def wrap(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    output: int | None = None,
    pair: bool | None = None,
    end: str | None = None,
) -> tuple[RewardModel, Reader]:
    """The model and how it reads a text; the options are those of `explain`, whose `InputError`s it raises."""
    if end not in ENDS:
        raise InputError(f"end is {end!r}, wanted None, as the tokenizer ends a text, or 'eos'")
    model = _checked(model, tokenizer, pair)
    output = chosen_output(model, output, "output")
    wrapped = RewardModel(model, tokenizer, suffix=(), output=output, pair=bool(pair))
    return wrapped, Reader(tokenizer, wrapped.pair, ends=end == "eos" and wrapped.has_head)


def _checked(model: nn.Module, tokenizer: PreTrainedTokenizerBase, pair: bool | None) -> PreTrainedModel:
    """The classifier itself; of a PEFT model the one that its adapters are part of, unmerged."""
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        if model.active_peft_config.is_prompt_learning:
            kind = model.active_peft_config.peft_type.value
            raise InputError(f"reward_model has {kind} adapters, tokens that no text has; wanted LoRA or its kin")
        model = model.get_base_model()
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise InputError(f"reward_model is {name}, wanted a Hugging Face sequence classifier, or a PEFT model of one")
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise InputError(f"tokenizer is {type(tokenizer).__name__}, wanted the model's own, from AutoTokenizer")
    if model.device.type == "meta":
        raise InputError(f"{name} is on the meta device and has no weights; load it with from_pretrained")
    if model.training:
        raise InputError(f"{name} is in training mode, its dropout would be explained too; call eval()")
    if pair is None and (getattr(model.config, "type_vocab_size", 0) or 0) > 1:
        reads = f"{name} can tell two segments apart; prompt and response are read as one text"
        warnings.warn(
            f"{reads}. Say pair=True if it was trained on tokenizer(prompt, response), else pair=False", stacklevel=5
        )
    return model


def read(wrapped: RewardModel, reader: Reader, prompt: object, response: str) -> tuple[Reading, Spans]:
    """The tokens that the model reads, and the characters of each response token."""
    if not isinstance(response, str) or not response:
        raise InputError(f"response is {response!r}, wanted text that is not empty")
    asked, tokenizer = _turns(prompt, wrapped.tokenizer), wrapped.tokenizer
    if not isinstance(asked, str) and tokenizer.chat_template:
        around, turns = frame(tokenizer, asked), (*asked, Message("assistant", response))
        if templated(tokenizer, turns) != around.before + response + around.after:
            advice = "strip white space around it and markers that the template reads"
            raise InputError(f"the chat template does not keep the response {response[:80]!r} as it is, once; {advice}")
    reading, spans = reader.read(asked, response)
    if not reading.response:
        raise InputError(f"the tokenizer reads nothing in the response {response[:80]!r}; wanted text that it knows")
    if not (reading.prompt or reading.suffix):
        needs = "without the response the model reads no token at all, and has no score"
        raise InputError(f"prompt is {str(prompt)[:80]!r}: {needs}; give a prompt, or end='eos'")
    check_fits(wrapped.model, reading)
    if isinstance(asked, str) and not wrapped.pair:
        own, ours = tokenizer(asked + response)["input_ids"], wrapped.whole(reading)
        if tuple(own) != ours[: len(own)]:
            why = "a token would lie in both, or the special tokens at the start would stand twice"
            warnings.warn(f"prompt and response are not read as tokenizer(prompt + response): {why}", stacklevel=6)
    return reading, tile(spans, len(response))


def _turns(prompt: object, tokenizer: PreTrainedTokenizerBase) -> Prompt:
    """`messages_of`; where a chat template reads them, turns with more than a role and text stay as they are."""
    is_dialogue = tokenizer.chat_template and isinstance(prompt, Sequence) and not isinstance(prompt, str | bytes)
    if not is_dialogue or not all(isinstance(turn, Mapping) and isinstance(turn.get("role"), str) for turn in prompt):
        return messages_of(prompt)
    plain = [set(turn) == {"role", "content"} and isinstance(turn["content"], str) for turn in prompt]
    turns = [dict(turn) if ok and turn["role"] in ROLES else Turn(**turn) for turn, ok in zip(prompt, plain)]
    return messages_of(turns)


def text_of(wrapped: RewardModel, reading: Reading) -> str:
    """All that the model reads, with its special tokens, as its tokenizer writes them."""
    return wrapped.tokenizer.decode(list(wrapped.whole(reading)), clean_up_tokenization_spaces=False)


def where_read(wrapped: RewardModel, reading: Reading) -> str:
    """The token at which the score is read; of a model that is no head on one token, that it pools as it does."""
    whole = wrapped.whole(reading)
    if not wrapped.has_head:
        return f"what {type(wrapped.model).__name__} pools of {len(whole)} tokens"
    last = int(wrapped.ends(*wrapped.padded([whole])))
    return f"token {last + 1} of {len(whole)}, {wrapped.tokenizer.convert_ids_to_tokens(whole[last])!r}"


def players_of(response: str, tokens: Spans, players: str | Sequence[tuple[int, int]]) -> list[int]:
    """The player of each token, numbered from 0."""
    if isinstance(players, str):
        return list(range(len(tokens))) if players == "tokens" else groups(tokens, cut(response, players))
    parts = partition(players, len(response))
    owned = {parts[home] for home in homes(tokens, parts)}
    lost = [span for span in map(tuple, players) if span not in owned]
    if lost:
        raise InputError(f"spans: {lost[0]} ({response[slice(*lost[0])]!r}) is the smaller part of a token; widen it")
    return groups(tokens, parts)
