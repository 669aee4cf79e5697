"""A client of the token-reward server. It needs Python and numpy alone, and this file can be copied anywhere.

rewards = RewardClient("http://127.0.0.1:8700")
rewards(prompt_ids, response_ids)  # N float32 arrays (T_i,), as of `dense_rewards`
"""

from __future__ import annotations

import http.client
import json
import os
import random
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from urllib.parse import SplitResult, urlsplit

import numpy as np

BINARY = "application/octet-stream"
SERVED = "Dense-RLHF-Served"  # the header of rewards that names what is served, a hash
MIB = 2**20
LONGEST_PAUSE = 30.0  # seconds between two tries


class RewardServerError(RuntimeError):
    """The server refused, failed or did not answer; `status` is HTTP's, None without an answer."""

    def __init__(self, message: str, status: int | None = None):
        super().__init__(message)
        self.status = status


def pack(header: Mapping[str, object], numbers: np.ndarray) -> bytes:
    """The binary form: the length of a JSON header (uint32), the header, numbers of four bytes; all little-endian."""
    text = json.dumps(header).encode()
    return len(text).to_bytes(4, "little") + text + numbers.astype(numbers.dtype.newbyteorder("<")).tobytes()


def once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object. Raises ValueError for one that names a field twice, of which JSON readers take the last."""
    names = [name for name, _ in pairs]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"{min(twice)[:80]!r} is given twice")
    return dict(pairs)


def is_key(text: str) -> bool:
    """Whether a header can hold a key."""
    return text.isascii() and text.isprintable() and len(text.split()) == 1


def unpack(body: bytes, dtype: str) -> tuple[object, np.ndarray]:
    """The JSON value and the numbers of `pack`, "<i4" or "<f4", read-only. Raises ValueError for anything else."""
    start = 4 + int.from_bytes(body[:4], "little")
    if len(body) < start or (len(body) - start) % 4:
        raise ValueError(f"{len(body)} bytes hold no header of {start - 4} bytes and whole numbers")
    return json.loads(body[4:start], object_pairs_hook=once), np.frombuffer(body, dtype, offset=start)


class RewardClient:
    """Token rewards from a server. Threads and forked processes have connections of their own.

    A call takes at most `timeout` seconds, tries included. A server that is full is asked again when it says, one that
    does not answer `retries` times. Rewards of anything but `served` are refused; without it, of anything but what the
    first answer came from.
    """

    KIND = BINARY  # of what is sent

    def __init__(
        self, url: str, key: str | None = None, timeout: float = 600.0, retries: int = 5, served: str | None = None
    ):
        self.url, self.timeout, self.retries, self.served, self._key = url, timeout, retries, served, key
        self._place, self._local = _place(url), threading.local()
        if key and not is_key(key):
            raise ValueError("key is no word of ASCII, wanted the server's own")

    def __reduce__(self):
        return RewardClient, (self.url, self._key, self.timeout, self.retries, self.served)

    def __call__(
        self,
        prompt_ids: Sequence[Sequence[int]],
        response_ids: Sequence[Sequence[int]],
        prompts: Sequence[object] | None = None,
    ) -> list[np.ndarray]:
        """A reward for each token of N responses: N arrays (T_i,) of float32, as `dense_rewards` gives them.

        `prompts` are texts or messages with role and content. Raises `RewardServerError`, and ValueError for ids that
        are not whole numbers below 2^31 in one dimension.
        """
        asked, answers = _rows("prompt_ids", prompt_ids), _rows("response_ids", response_ids)
        header = {"prompt_lengths": list(map(len, asked)), "response_lengths": list(map(len, answers))}
        header["prompts"] = None if prompts is None else _prompts(prompts)
        body = pack(header, np.concatenate([np.empty(0, "<i4"), *asked, *answers]))
        lengths, answer = header["response_lengths"], self._send("POST", "/rewards", body)
        try:
            named, numbers = unpack(answer, "<f4")
            if named != {"lengths": lengths} or len(numbers) != sum(lengths):
                raise ValueError("its rewards are not one a response token")
            if not np.isfinite(numbers).all():
                raise ValueError("its rewards are not finite")
        except ValueError as error:
            raise RewardServerError(f"{self.url} gave no rewards: {error}") from error
        return [numbers[end - n : end].astype(np.float32) for n, end in zip(lengths, np.cumsum(lengths))]

    def about(self) -> dict:
        """What is served: model, shape, hashes, version, and as `served` one hash of all."""
        answer = self._send("GET", "/about")
        try:
            return dict(json.loads(answer))
        except (ValueError, TypeError) as error:
            raise RewardServerError(f"{self.url} gave no description: {error}") from error

    def _send(self, method: str, path: str, body: bytes | None = None) -> bytes:
        """The body of a good answer, after as many tries as that takes."""
        deadline, failures = time.monotonic() + self.timeout, 0
        while True:
            try:
                status, headers, answer = self._exchange(method, path, body, deadline)
            except (OSError, http.client.HTTPException) as error:
                status, failures = None, failures + 1
                problem = f"{self.url} does not answer ({type(error).__name__}: {error})"
                pause = min(0.1 * 3 ** (failures - 1), LONGEST_PAUSE) * (failures > 1)  # at once: it closed an idle one
            else:
                if status == 200:
                    if body:
                        self._check_served(headers.get(SERVED))
                    return answer
                problem, pause = f"{self.url}: {_problem(status, answer)}", _seconds(headers.get("Retry-After"))
            is_over = failures > self.retries or time.monotonic() + pause >= deadline
            if status not in (None, 503) or is_over:
                raise RewardServerError(problem, status)
            time.sleep(pause * random.uniform(0.5, 1))  # else all who were refused come back at once

    def _exchange(self, method: str, path: str, body: bytes | None, deadline: float):
        """Status, headers and body of one answer; a connection on which anything went wrong is not used again."""
        connection = self._connection(max(deadline - time.monotonic(), 0.001))
        secret = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        try:
            try:
                kind = {"Content-Type": self.KIND}
                connection.request(method, self._place.path.rstrip("/") + path, body, kind | secret)
            except (BrokenPipeError, ConnectionResetError):  # it may have refused before it read all
                pass
            response = connection.getresponse()
            return response.status, response.headers, self._read(response, len(body or b"") + MIB, deadline)
        except BaseException:
            connection.close()
            raise

    def _read(self, response: http.client.HTTPResponse, most: int, deadline: float) -> bytes:
        """The body of an answer, of at most so many bytes: rewards are no longer than their request."""
        parts, read, size = [], 0, response.length or 0
        while response.length != 0 and size <= most and (ready := response.peek()):
            parts.append(response.read(len(ready)))
            read += len(parts[-1])
            size = max(size, read)
            if time.monotonic() > deadline:
                raise TimeoutError(f"not whole within {self.timeout:g} seconds")
        if size > most:
            raise RewardServerError(f"{self.url} answers with more than {most} bytes", response.status)
        if response.length:
            raise http.client.IncompleteRead(b"".join(parts), response.length)
        return b"".join(parts)

    def _connection(self, seconds: float) -> http.client.HTTPConnection:
        """The one of this thread and process: a forked one shares the socket, and would read answers of another."""
        if getattr(self._local, "process", None) != os.getpid():
            kind = http.client.HTTPSConnection if self._place.scheme == "https" else http.client.HTTPConnection
            self._local.process, self._local.connection = os.getpid(), kind(self._place.hostname, self._place.port)
        connection = self._local.connection
        connection.timeout = seconds
        if connection.sock:
            connection.sock.settimeout(seconds)
        return connection

    def _check_served(self, served: str | None) -> None:
        if self.served and served != self.served:
            serves = f"serves {served}" if served else "does not say what it serves"
            raise RewardServerError(f"{self.url} {serves}, wanted {self.served}: another model or shape", 200)
        self.served = served or self.served


def _rows(name: str, given: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """Each row as int32."""
    rows = [np.asarray(row.cpu() if hasattr(row, "cpu") else row) for row in given]
    for i, row in enumerate(rows):
        if row.ndim != 1 or row.dtype.kind not in "iu" or not len(row) or row.min() < 0 or row.max() >= 2**31:
            raise ValueError(f"{name}[{i}] is {row.dtype} of shape {row.shape}, wanted at least one token id")
    return [row.astype("<i4") for row in rows]


def _place(url: str) -> SplitResult:
    with suppress(ValueError):  # no port, no host
        place = urlsplit(url)
        if place.scheme in ("http", "https") and place.hostname and place.port != 0 and not place.username:
            return place
    shown = url.rpartition("@")[2]  # without a password
    raise ValueError(f"url is {shown!r}, wanted one such as http://127.0.0.1:8700, and a key apart from it")


def _prompts(given: Sequence[object]) -> list[object]:
    """Prompts as JSON has them."""
    try:
        if not isinstance(given, str):
            return [_plain(prompt) for prompt in given]
    except (TypeError, KeyError):
        pass
    raise ValueError(f"prompts are {given!r:.80}, wanted texts or messages with role and content")


def _plain(prompt: object) -> object:
    if isinstance(prompt, str):
        return prompt
    turns = [turn if isinstance(turn, Mapping) else vars(turn) for turn in prompt]
    return [{"role": turn["role"], "content": turn["content"]} for turn in turns]


def _problem(status: int, answer: bytes) -> str:
    try:
        return f"{json.loads(answer)['error']} ({status})"
    except (ValueError, TypeError, KeyError):
        return f"{answer[:200]!r} ({status})"


def _seconds(given: str | None) -> float:
    """How long a server asks to be left alone."""
    return min(float(given), LONGEST_PAUSE) if given and given.isdigit() else 1.0
