"""One thread that owns a scorer, and the requests that wait for it: they are joined, and none spoils another's."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np

from dense_rlhf.adapters.rewards import Scorer, dense_rewards
from dense_rlhf.config.strict import LARGEST, Count, Positive, Share, params
from dense_rlhf.types import InputError, Prompt, RewardShape

MOMENT = 0.002  # seconds without a new request that end the wait for more
log = logging.getLogger(__name__)


@params("limits")
class Limits:
    """How much is taken at once; what is more is refused."""

    batch: Count = 64  # responses that are explained together, of all requests that wait
    linger: Share = 0.1  # of the last batch's time, that the next waits for as many requests as the last ones joined
    waiting: Count = 4096  # responses that wait for the model
    responses: Count = 1024  # of a request
    tokens: Count = 4096  # of a prompt, and of a response
    body: Count = 16  # MiB of a request
    held: Count = 64  # MiB of all requests that are not answered yet
    upload: Positive = 60.0  # seconds that a request's body may take
    stop: Count = 60  # seconds that a server which was told to stop may take
    remembered: Count = 16384  # rewards of responses, the latest


class Full(Exception):
    """As many responses wait as may, or the server is stopping."""


class ModelFailure(Exception):
    """The reward model failed on a request by itself; the log says how."""


@dataclass(frozen=True)
class Asked:
    """The responses of one request, and their rewards to come."""

    prompt_ids: Sequence[np.ndarray]
    response_ids: Sequence[np.ndarray]
    prompts: Sequence[Prompt] | None = None
    rewards: Future[list[np.ndarray]] = field(default_factory=Future)

    def __len__(self) -> int:
        return len(self.response_ids)


class Batcher(threading.Thread):
    """Explains the responses of all requests that wait, at most `limits.batch` together, in the order of their arrival.

    Where a batch fails, each of its requests is tried by itself: the rewards of the others come, and its own failure is
    an `InputError` about its content or `ModelFailure`. A request that was cancelled while it waited is left out.
    """

    def __init__(self, scorer: Scorer, shape: RewardShape, limits: Limits):
        super().__init__(name="rewards", daemon=True)
        self.scorer, self.shape, self.limits = scorer, shape, limits
        self.waiting = 0  # responses
        self.batches = 0  # so far
        self.cut_off = 0  # requests that a stop left without an answer
        self._queue: deque[Asked] = deque()
        self._changed = threading.Condition()
        self._joined: deque[int] = deque([1], maxlen=4)  # requests of the last batches
        self._seconds = 0.0  # of the last batch
        self._closing = False

    def submit(self, asked: Asked) -> None:
        """Let a request wait. Raises `Full` where `limits.waiting` responses wait, and once it is closing."""
        with self._changed:
            if self._closing or self.waiting and self.waiting + len(asked) > self.limits.waiting:
                raise Full(f"{self.waiting} responses wait" if not self._closing else "the server is stopping")
            self._queue.append(asked)
            self.waiting += len(asked)
            self._changed.notify()

    def close(self, seconds: float) -> bool:
        """Take no more, finish what waits; whether that was done in time."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self.join(seconds)
        return not self.is_alive()

    def run(self) -> None:
        while together := self._next():
            wanted = [asked for asked in together if asked.rewards.set_running_or_notify_cancel()]
            if wanted:
                self.batches += 1
                started = time.perf_counter()
                self._answer(wanted)
                self._seconds = time.perf_counter() - started

    def _next(self) -> list[Asked]:
        """The requests that have waited longest and fit in a batch; one alone may be larger. None once it is closed.

        Clients that were answered together ask again almost together: without lingering, the first would go alone.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closing)
            self._linger()
            together: list[Asked] = []
            while self._queue and (not together or self._joins(together, self._queue[0])):
                together.append(self._queue.popleft())
                self.waiting -= len(together[-1])
            self._joined.append(len(together))
            return together

    def _linger(self) -> None:
        """Wait for as many requests as came together of late, then until none has come for a moment."""
        wanted = max(self._joined)

        def is_enough(requests: int) -> bool:
            return self._closing or len(self._queue) >= requests or self.waiting >= self.limits.batch

        self._changed.wait_for(lambda: is_enough(wanted), self.limits.linger * self._seconds)
        while wanted > 1 and not is_enough(LARGEST) and self._changed.wait(MOMENT):
            continue

    def _joins(self, together: list[Asked], asked: Asked) -> bool:
        fits = sum(map(len, together)) + len(asked) <= self.limits.batch
        return fits and (asked.prompts is None) == (together[0].prompts is None)

    def _answer(self, together: list[Asked]) -> None:
        try:
            rewards = iter(self._rewards(together))
            for asked in together:
                asked.rewards.set_result([next(rewards) for _ in range(len(asked))])
        except BaseException as error:  # whatever a model raises; the thread goes on
            if len(together) > 1:
                for asked in together:
                    self._answer([asked])
            else:
                together[0].rewards.set_exception(_failure(error))

    def _rewards(self, together: list[Asked]) -> list[np.ndarray]:
        prompt_ids, response_ids = _joined(together, "prompt_ids"), _joined(together, "response_ids")
        prompts = None if together[0].prompts is None else _joined(together, "prompts")
        rewards: list[np.ndarray] = []
        for start in range(0, len(response_ids), self.limits.batch):
            part = slice(start, start + self.limits.batch)
            given = None if prompts is None else prompts[part]
            try:
                rewards += dense_rewards(self.scorer, prompt_ids[part], response_ids[part], self.shape, given)
            except InputError as error:
                if not start:
                    raise
                raise InputError(f"in the responses from {start} on, {error}") from error.__cause__
        return rewards


def _joined(together: list[Asked], name: str) -> list:
    return [row for asked in together for row in getattr(asked, name)]


def _failure(error: BaseException) -> Exception:
    """An error about the content as it is; of any other only that there was one, as its text may name files."""
    if isinstance(error, InputError) and error.__cause__ is None:
        return error
    log.error("the reward model failed on a request", exc_info=error)
    return ModelFailure("the reward model failed on this request; the server's log says how")
