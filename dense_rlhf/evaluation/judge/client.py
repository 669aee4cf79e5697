"""One request to an OpenAI-compatible endpoint, and its outcome. Address, key and model come from the environment."""

from __future__ import annotations

import asyncio
import json
import os
import re
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from http.cookiejar import DefaultCookiePolicy
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from dense_rlhf.config.params import JudgeParams
from dense_rlhf.evaluation.judge.templates import NoVerdict, Question
from dense_rlhf.types import InputError

if TYPE_CHECKING:
    import httpx
    from openai import APIStatusError, AsyncOpenAI

ADDRESS, KEY, MODEL = "OPENAI_BASE_URL", "OPENAI_API_KEY", "OPENAI_MODEL"
LIMIT = 2**22  # bytes of an answer
BUSY = (408, 409, 425, 429)  # with server errors, from 500: worth another attempt
TOO_LONG = (413, 414)  # this question; others may be shorter
REFUSED = {
    401: f"the key is refused; correct {KEY}",
    403: f"the key may not do this; correct {KEY}",
    404: f"there is no such model or address; correct {MODEL} or {ADDRESS}",
}
FORM = {
    "max_tokens": "judge.limit_as=max_completion_tokens, or lower judge.reply_tokens",
    "max_completion_tokens": "judge.limit_as=max_tokens, or lower judge.reply_tokens",
    "temperature": "judge.temperature=null",
}  # fields that servers refuse by name, and what to set
NO_CHAT = "the answer is not JSON of a chat completion"


@dataclass(frozen=True)
class Outcome:
    """The outcome of one request: a `value`, or the `reason` for having none."""

    value: float | None = None
    reason: str = ""
    reply: str = ""
    tokens: int = 0
    again: bool = False  # another attempt may help
    after: float = 0.0  # seconds for which the server asked to be left alone
    ends: bool = False  # the server wants no more questions for now
    refused: bool = False  # other questions would be refused too
    form: bool = False  # others would be refused too if none has been answered


def setting(name: str) -> str:
    """A variable of the environment. Raises `InputError` if it is not set."""
    if value := os.environ.get(name, "").strip():
        return value
    raise InputError(
        f"{name} is not set; an endpoint needs {ADDRESS}, such as http://localhost:8000/v1, {MODEL}, and "
        f"{KEY}, any text if the server asks for none"
    )


def connect(params: JudgeParams) -> AsyncOpenAI:
    """A client of the environment's endpoint: no retry, redirect or cookie. Raises `InputError` if it names none."""
    address, key = _address(setting(ADDRESS)), setting(KEY)
    if not (key.isascii() and key.isprintable()):
        raise InputError(f"{KEY} holds characters that no key has, such as a line break or an accent; copy it again")
    try:
        from openai import AsyncOpenAI, DefaultAsyncHttpxClient
    except ImportError:
        raise InputError("an endpoint needs the package openai; pip install 'dense-rlhf[judge]'") from None
    http = DefaultAsyncHttpxClient(follow_redirects=False, event_hooks={"response": [_bound]})
    http.cookies.jar.set_policy(DefaultCookiePolicy(allowed_domains=[]))
    plain = {"Accept-Encoding": "identity"}
    return AsyncOpenAI(
        base_url=address, api_key=key, max_retries=0, timeout=params.timeout, http_client=http, default_headers=plain
    )


def _address(text: str) -> str:
    """The address itself. Raises `InputError`, which does not repeat it, if it is none."""
    wanted = "wanted one such as http://localhost:8000/v1"
    if not text.startswith(("http://", "https://")):
        raise InputError(f"{ADDRESS} must begin with http:// or https://; {wanted}")
    try:
        host, port = urlsplit(text).hostname, urlsplit(text).port  # a port is checked when it is read
    except ValueError as error:
        raise InputError(f"{ADDRESS} is no address ({str(error)[:60]}); {wanted}") from None
    if not host or port == 0 or not text.isascii() or not text.isprintable() or " " in text:
        raise InputError(f"{ADDRESS} is no address: its host or port is missing, or it holds a space; {wanted}")
    return text


class _Unread(Exception):
    """An answer that is not read on; the message says why."""


async def _bound(response: httpx.Response) -> None:
    """Have an answer, also an error's, end at `LIMIT`; compressed it could be any length."""
    if response.headers.get("content-encoding", "identity").lower() != "identity":
        raise _Unread("the answer is compressed, which was not asked for")
    stream = response.stream

    class Bounded(type(stream)):  # the client asks for this type, which differs between its libraries
        def __init__(self):
            pass

        async def __aiter__(self) -> AsyncIterator[bytes]:
            size = 0
            async for part in stream:
                if (size := size + len(part)) > LIMIT:
                    raise _Unread(f"the answer is longer than {LIMIT // 2**20} MB")
                yield part

        async def aclose(self) -> None:
            await stream.aclose()

    response.stream = Bounded()


async def send(client: AsyncOpenAI, model: str, question: Question, params: JudgeParams) -> Outcome:
    """Ask once. Only the kind of an error is kept, as its text may repeat the key."""
    import openai

    warmth = {} if params.temperature is None else {"temperature": params.temperature}
    messages = [vars(message) for message in question.messages]
    limits = warmth | {params.limit_as: params.reply_tokens}
    ask = client.chat.completions.with_raw_response.create
    try:
        async with asyncio.timeout(params.timeout):
            raw = await ask(model=model, messages=messages, **limits)
        return _judgement(json.loads(raw.content, object_pairs_hook=_once), question)
    except (TimeoutError, openai.APITimeoutError):
        return Outcome(reason=f"no answer within {params.timeout:g} s", again=True)
    except openai.APIStatusError as error:
        return _refusal(error, params, limits)
    except (_Unread, openai.APIConnectionError) as error:  # releases of openai differ in whether they wrap the first
        unread = next((e for e in (error, error.__cause__) if isinstance(e, _Unread)), None)
        return Outcome(reason=str(unread or "no connection, or one that was cut short"), again=True)
    except UnicodeEncodeError:
        return Outcome(reason="the texts hold half a surrogate pair, which cannot be sent")
    except (openai.APIError, ValueError, RecursionError):
        return Outcome(reason=NO_CHAT, again=True)


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object in which no key stands twice."""
    if len(fields := dict(pairs)) < len(pairs):
        raise ValueError("a key stands twice")
    return fields


def _refusal(error: APIStatusError, params: JudgeParams, sent: dict) -> Outcome:
    status, after = error.status_code, _seconds(error.response.headers.get("retry-after"))
    if 300 <= status < 400:
        reason = f"HTTP {status}: the server points to another address, which is not followed; correct {ADDRESS}"
        return Outcome(reason=reason, refused=True)
    if status in REFUSED:
        return Outcome(reason=f"HTTP {status}: {REFUSED[status]}", refused=True)
    if status in BUSY or status >= 500:
        if after > params.longest_wait:
            reason = f"HTTP {status}: asked to wait {after:.0f} s, longer than judge.longest_wait"
            return Outcome(reason=reason, ends=True)
        return Outcome(reason=f"HTTP {status}", again=True, after=after)
    message = error.response.text
    if status in TOO_LONG or any(word in message for word in ("context_length", "context length", "content_filter")):
        return Outcome(reason=f"HTTP {status}: the question is too long for this model, or its filter refuses it")
    named = [name for name in sent if re.search(rf"\b{name}\b", message)]
    change = [FORM[name] for name in named or sent]
    reason = f"HTTP {status}: the server refuses the form of the request; try {', or '.join(change)}"
    return Outcome(reason=reason if named else f"{reason}, or another {MODEL}", refused=bool(named), form=True)


def _seconds(header: str | None) -> float:
    """Seconds of a Retry-After, which is a number or a date; zero if it is neither."""
    with suppress(TypeError, ValueError):
        return max(0.0, float(header))  # in this order, so that NaN becomes 0
    with suppress(TypeError, ValueError):
        return max(0.0, parsedate_to_datetime(header).timestamp() - time.time())
    return 0.0


def _judgement(completion: object, question: Question) -> Outcome:
    """The judgement in a completion, of which servers differ in all but the reply's place."""
    try:
        choices = [(choice["message"]["content"], choice.get("finish_reason")) for choice in completion["choices"]]
        reply, _ = choices[0]
    except (AttributeError, LookupError, TypeError):
        return Outcome(reason=NO_CHAT, again=True)
    tokens = _tokens(completion.get("usage"), question, reply)
    shown = reply.replace(setting(KEY), "⟨secret⟩") if isinstance(reply, str) else ""
    try:
        values = [_read(question, *choice) for choice in choices]
        if len(set(values)) > 1:
            raise NoVerdict("the answer holds several choices, which disagree")
        return Outcome(values[0], reply=shown, tokens=tokens)
    except NoVerdict as error:
        return Outcome(reason=str(error), reply=shown, tokens=tokens)


def _read(question: Question, reply: object, ended: object) -> float:
    """The number in a reply. Raises `NoVerdict` if there is none."""
    if not isinstance(reply, str):
        raise NoVerdict("the reply has no text")
    if ended == "length":
        raise NoVerdict("the reply was cut at judge.reply_tokens")
    return question.read(reply)


def _tokens(usage: object, question: Question, reply: object) -> int:
    """The server's count; without a valid one the number of bytes, which is never less than that of tokens."""
    total = usage.get("total_tokens") if isinstance(usage, dict) else None
    if type(total) is int and 0 <= total < 2**31:
        return total
    texts = [message.content for message in question.messages] + [reply if isinstance(reply, str) else ""]
    return sum(len(text.encode(errors="replace")) for text in texts)
