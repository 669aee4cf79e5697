"""One request to an OpenAI-compatible endpoint, and its outcome. Address, key and model come from the environment."""

from __future__ import annotations

import asyncio
import os
import time
from contextlib import suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING

from dense_rlhf.config.params import JudgeParams
from dense_rlhf.evaluation.judge.templates import NoVerdict, Question
from dense_rlhf.types import InputError

if TYPE_CHECKING:
    from openai import APIStatusError, AsyncOpenAI
    from openai.types.chat import ChatCompletion

ADDRESS, KEY, MODEL = "OPENAI_BASE_URL", "OPENAI_API_KEY", "OPENAI_MODEL"
BUSY = (408, 409, 425, 429)  # with server errors, from 500: worth another attempt
REFUSED = {
    401: f"the key is refused; correct {KEY}",
    403: f"the key may not do this; correct {KEY}",
    404: f"there is no such model or address; correct {MODEL} or {ADDRESS}",
}


@dataclass(frozen=True)
class Outcome:
    """The outcome of one request: a `value`, or the `reason` for having none."""

    value: float | None = None
    reason: str = ""
    reply: str = ""
    tokens: int = 0
    again: bool = False  # another attempt may help
    after: float = 0.0  # seconds for which the server asked to be left alone
    refused: bool = False  # other questions would be refused too


def setting(name: str) -> str:
    """A variable of the environment. Raises `InputError` if it is not set."""
    if value := os.environ.get(name, "").strip():
        return value
    raise InputError(
        f"{name} is not set; an endpoint needs {ADDRESS}, such as http://localhost:8000/v1, {MODEL}, and "
        f"{KEY}, any text if the server asks for none"
    )


def connect(params: JudgeParams) -> AsyncOpenAI:
    """A client of the environment's endpoint that never retries by itself. Raises `InputError` if it names none."""
    address, key = setting(ADDRESS), setting(KEY)
    if not address.startswith(("http://", "https://")):
        raise InputError(f"{ADDRESS} must begin with http:// or https://")
    try:
        from openai import AsyncOpenAI
    except ImportError:
        raise InputError("an endpoint needs the package openai; pip install 'dense-rlhf[judge]'") from None
    return AsyncOpenAI(base_url=address, api_key=key, max_retries=0, timeout=params.timeout)


async def send(client: AsyncOpenAI, model: str, question: Question, params: JudgeParams) -> Outcome:
    """Ask once. Only the kind of an error is kept, as its text may repeat the key."""
    import openai

    warmth = {} if params.temperature is None else {"temperature": params.temperature}
    messages = [vars(message) for message in question.messages]
    limits = warmth | {params.limit_as: params.reply_tokens}
    try:
        async with asyncio.timeout(params.timeout):
            completion = await client.chat.completions.create(model=model, messages=messages, **limits)
    except (TimeoutError, openai.APITimeoutError):
        return Outcome(reason=f"no answer within {params.timeout:g} s", again=True)
    except openai.APIStatusError as error:
        return _refusal(error, params)
    except openai.APIConnectionError:
        return Outcome(reason="no connection, or one that was cut short", again=True)
    except UnicodeEncodeError:
        return Outcome(reason="the texts hold half a surrogate pair, which cannot be sent")
    except (openai.APIError, ValueError, RecursionError):
        return Outcome(reason="the answer is not JSON of a chat completion", again=True)
    return _judgement(completion, question)


def _refusal(error: APIStatusError, params: JudgeParams) -> Outcome:
    status, after = error.status_code, _seconds(error.response.headers.get("retry-after"))
    if status in REFUSED:
        return Outcome(reason=f"HTTP {status}: {REFUSED[status]}", refused=True)
    if after > params.longest_wait:
        return Outcome(reason=f"HTTP {status}: asked to wait {after:.0f} s, longer than judge.longest_wait")
    return Outcome(reason=f"HTTP {status}", again=status in BUSY or status >= 500, after=after)


def _seconds(header: str | None) -> float:
    """Seconds of a Retry-After, which is a number or a date; zero if it is neither."""
    with suppress(TypeError, ValueError):
        return max(0.0, float(header))  # in this order, so that NaN becomes 0
    with suppress(TypeError, ValueError):
        return max(0.0, parsedate_to_datetime(header).timestamp() - time.time())
    return 0.0


def _judgement(completion: ChatCompletion, question: Question) -> Outcome:
    """The judgement in a completion. Servers differ, and the client validates no field."""
    try:
        choice = completion.choices[0]
        reply, ended = choice.message.content, choice.finish_reason
    except (AttributeError, IndexError, TypeError):
        return Outcome(reason="the answer is not JSON of a chat completion", again=True)
    tokens = _tokens(completion, question, reply)
    if not isinstance(reply, str):
        return Outcome(reason="the reply has no text", tokens=tokens)
    reply = reply.replace(setting(KEY), "⟨secret⟩")
    if ended == "length":
        return Outcome(reason="the reply was cut at judge.reply_tokens", reply=reply, tokens=tokens)
    try:
        return Outcome(question.read(reply), reply=reply, tokens=tokens)
    except NoVerdict as error:
        return Outcome(reason=str(error), reply=reply, tokens=tokens)


def _tokens(completion: ChatCompletion, question: Question, reply: object) -> int:
    """The server's count; without a valid one the number of bytes, which is never less than that of tokens."""
    total = getattr(getattr(completion, "usage", None), "total_tokens", None)
    if isinstance(total, int) and 0 <= total < 2**31:
        return total
    texts = [message.content for message in question.messages] + [reply if isinstance(reply, str) else ""]
    return sum(len(text.encode(errors="replace")) for text in texts)
