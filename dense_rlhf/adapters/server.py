"""The token-reward server as an ASGI application: HTTP in front of a `Batcher`, JSON or binary, bounded."""

from __future__ import annotations

import asyncio
import hmac
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager

import numpy as np
from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from dense_rlhf.adapters.batcher import Asked, Batcher, Full, Limits, ModelFailure
from dense_rlhf.adapters.client import BINARY, MIB, SERVED, once, pack, unpack
from dense_rlhf.config.strict import LARGEST, Count, Many, Some, Whole, params, parse
from dense_rlhf.models.dialogue import messages_of
from dense_rlhf.types import InputError, Prompt, one_line

GONE = 499  # nobody is there to read it; nginx's number


@params("")
class _Json:
    """A request in JSON."""

    prompt_ids: Many[Some[Whole]] = ()
    response_ids: Many[Some[Whole]] = ()
    prompts: Many[object] | None = None


@params("")
class _Header:
    """The header of a binary request, whose numbers are all prompts' ids, then all responses'."""

    prompt_lengths: Many[Count] = ()
    response_lengths: Many[Count] = ()
    prompts: Many[object] | None = None


class Refusal(Exception):
    """An answer other than rewards."""

    def __init__(self, status: int, text: str, **headers: str):
        super().__init__(text)
        self.status, self.headers = status, headers


def read_json(body: bytes) -> Asked:
    """A request in JSON. Raises ValueError and `InputError` for what is none."""
    given = parse(_Json, json.loads(body, object_pairs_hook=once))
    rows = ([np.array(row, dtype=np.int32) for row in part] for part in (given.prompt_ids, given.response_ids))
    return Asked(*rows, _prompts(given.prompts))


def read_binary(body: bytes) -> Asked:
    """A request in the form of `pack`. Raises ValueError and `InputError` for what is none."""
    header, ids = unpack(body, "<i4")
    given = parse(_Header, header)
    lengths = [*given.prompt_lengths, *given.response_lengths]
    if sum(lengths) != len(ids):
        raise InputError(f"{len(ids)} token ids arrived, wanted {sum(lengths)}, as the header's lengths say")
    if len(ids) and ids.min() < 0:
        raise InputError(f"token id {ids.min()} arrived, wanted whole numbers from 0 and below {LARGEST}")
    rows = [ids[end - n : end] for n, end in zip(lengths, np.cumsum(lengths))]
    prompts = len(given.prompt_lengths)
    return Asked(rows[:prompts], rows[prompts:], _prompts(given.prompts))


def _prompts(given: tuple | None) -> list[Prompt] | None:
    json.dumps(given, ensure_ascii=False).encode()  # ValueError: half a surrogate pair, which no tokenizer reads
    return None if given is None else [messages_of(prompt) for prompt in given]


def _check(asked: Asked, limits: Limits) -> None:
    """Raise `Refusal` for a request that is too large in some part, or whose parts do not fit together."""
    counts = {"prompt_ids": len(asked.prompt_ids), "response_ids": len(asked)}
    counts |= {} if asked.prompts is None else {"prompts": len(asked.prompts)}
    if len(set(counts.values())) > 1:
        given = ", ".join(f"{count} {name}" for name, count in counts.items())
        raise Refusal(422, f"{given}; wanted one each a response")
    if len(asked) > limits.responses:
        raise Refusal(422, f"{len(asked)} responses in one request, wanted at most {limits.responses}; send fewer")
    for name in ("prompt_ids", "response_ids"):
        longest = max(map(len, getattr(asked, name)), default=0)
        if longest > limits.tokens:
            raise Refusal(422, f"{name} has a row of {longest} tokens, wanted at most {limits.tokens}")


class _Held:
    """Bytes of requests that are in memory, at most `most`."""

    def __init__(self, most: int):
        self.most, self.bytes = most, 0

    @contextmanager
    def __call__(self, size: int) -> Iterator[None]:
        if self.bytes and self.bytes + size > self.most:
            raise Full(f"{self.bytes / MIB:.1f} MiB of requests wait")
        self.bytes += size
        try:
            yield
        finally:
            self.bytes -= size


class _Metrics:
    """What Prometheus asks for; also a collector of its own, of what others count."""

    def __init__(self, rewards: Batcher, held: _Held):
        self.rewards, self.held, self.registry = rewards, held, CollectorRegistry()
        of = {"registry": self.registry}
        self.requests = Counter("dense_rlhf_requests", "Requests for rewards, by status", ["status"], **of)
        steps = [width * 10**power for power in range(-2, 3) for width in (1, 2, 5)]
        self.seconds = Histogram("dense_rlhf_request_seconds", "From arrival to rewards", buckets=steps, **of)
        self.registry.register(self)
        ProcessCollector(**of)  # its memory and CPU seconds

    async def counted(self, request: Request, answer: Awaitable[Response]) -> Response:
        """The answer, or what it was refused with."""
        started = time.perf_counter()
        try:
            response = await answer
            self.seconds.observe(time.perf_counter() - started)
        except Refusal as refusal:
            response = await _refused(request, refusal)
        self.requests.labels(response.status_code).inc()
        return response

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        cost = self.rewards.scorer.cost
        yield GaugeMetricFamily("dense_rlhf_waiting_responses", "Wait for the model", self.rewards.waiting)
        yield GaugeMetricFamily("dense_rlhf_held_bytes", "Of requests not answered yet", self.held.bytes)
        yield CounterMetricFamily("dense_rlhf_batches", "Of responses that were explained", self.rewards.batches)
        for name, what, count in (
            ("responses", "Whose rewards were asked for", cost.responses),
            ("remembered", "Responses whose rewards were known from before", cost.remembered),
            ("evaluations", "Forwards of the reward model", cost.evaluations),
            ("busy_seconds", "In which rewards were computed", cost.seconds),
        ):
            yield CounterMetricFamily(f"dense_rlhf_{name}", what, count)


def make_app(rewards: Batcher, about: dict[str, object], key: str | None, announce: Callable[[], None]) -> FastAPI:
    """The application: POST /rewards, GET /about, /metrics, and /health, which alone asks for no key.

    It starts the batcher, calls `announce`, and closes the batcher when the server stops.
    """
    app = FastAPI(lifespan=_lifespan(rewards, announce), docs_url=None, redoc_url=None, openapi_url=None)
    held, known = _Held(rewards.limits.held * MIB), [Depends(_admission(key))]
    metrics = _Metrics(rewards, held)
    for kind, handler in ((Refusal, _refused), (HTTPException, _no_such_place), (Exception, _broken)):
        app.add_exception_handler(kind, handler)

    @app.post("/rewards", dependencies=known)
    async def post_rewards(request: Request) -> Response:
        response = await metrics.counted(request, _rewards(request, rewards, held))
        response.headers[SERVED] = str(about["served"])
        return response

    @app.get("/about", dependencies=known)
    async def get_about() -> JSONResponse:
        return JSONResponse(about)

    @app.get("/metrics", dependencies=known)
    async def get_metrics() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/health")
    async def get_health() -> JSONResponse:
        if not rewards.is_alive():
            raise Refusal(503, "the server is stopping")
        return JSONResponse({"status": "ok"})

    return app


def _lifespan(rewards: Batcher, announce: Callable[[], None]) -> Callable:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        rewards.start()
        announce()
        yield
        await asyncio.to_thread(rewards.close, 1)  # all who waited were answered, or have waited `limits.stop`

    return lifespan


def _admission(key: str | None) -> Callable:
    wanted = f"Bearer {key}".encode()

    async def check(request: Request) -> None:
        given = request.headers.get("authorization", "").encode("latin-1")
        if key and not hmac.compare_digest(given, wanted):
            raise Refusal(401, "no key, or another; wanted Authorization: Bearer KEY", **{"WWW-Authenticate": "Bearer"})

    return check


async def _rewards(request: Request, rewards: Batcher, held: _Held) -> Response:
    """Rewards in the form of the request. Raises `Refusal`."""
    limits = rewards.limits
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind not in ("application/json", BINARY):
        raise Refusal(415, f"the content type is {one_line(kind)[:80]}, wanted application/json or {BINARY}")
    if "content-length" not in request.headers or "transfer-encoding" in request.headers:
        raise Refusal(411, "no content length, or a body in chunks; wanted a body whose length is told before it")
    size = int(request.headers["content-length"])  # the HTTP parser has checked it, and that the body keeps to it
    if size > limits.body * MIB:
        raise Refusal(413, f"a body of {size} bytes, wanted at most {limits.body} MiB; send fewer responses a request")
    try:
        with held(size):
            asked = _asked(await _body(request, limits.upload), kind)
            _check(asked, limits)
            rewards.submit(asked)
            return _packed(await _first(asked, request), kind)
    except Full as full:
        raise Refusal(503, f"{full}; ask again", **{"Retry-After": "1"}) from None
    except ClientDisconnect:
        return Response(status_code=GONE)
    except asyncio.CancelledError:  # the server was told to stop, and `limits.stop` has passed
        rewards.cut_off += 1
        raise Refusal(503, "the server stopped before it was done") from None
    except ModelFailure as failure:
        raise Refusal(500, str(failure)) from None
    except InputError as error:
        raise Refusal(422, one_line(str(error))[:500]) from None


async def _body(request: Request, seconds: float) -> bytes:
    try:
        async with asyncio.timeout(seconds):
            return await request.body()
    except TimeoutError:
        raise Refusal(408, f"the body did not arrive within {seconds:g} seconds", Connection="close") from None


def _asked(body: bytes, kind: str) -> Asked:
    try:
        return read_binary(body) if kind == BINARY else read_json(body)
    except InputError as error:
        raise Refusal(422, one_line(str(error))[:500]) from None
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, nested too deeply, or not in the form of `pack`
        reason = one_line(f"{type(error).__name__}: {error}")[:200]
        raise Refusal(400, f"the body cannot be read as {kind} ({reason})") from None


async def _first(asked: Asked, request: Request) -> list[np.ndarray]:
    """The rewards; a request whose client leaves before is cancelled, and its batch goes on without it."""
    coming = asyncio.wrap_future(asked.rewards)
    leaving = asyncio.ensure_future(request.receive())  # after the body comes only that the client has left
    try:
        await asyncio.wait({coming, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not coming.done():
            raise ClientDisconnect
        return coming.result()
    finally:
        leaving.cancel()
        coming.cancel()


def _packed(rewards: list[np.ndarray], kind: str) -> Response:
    if kind == BINARY:
        numbers = np.concatenate([np.empty(0, np.float32), *rewards])
        return Response(pack({"lengths": list(map(len, rewards))}, numbers), media_type=BINARY)
    return JSONResponse({"rewards": [row.tolist() for row in rewards]})


async def _refused(request: Request, refusal: Refusal) -> JSONResponse:
    return JSONResponse({"error": str(refusal)}, refusal.status, refusal.headers)


async def _no_such_place(request: Request, error: HTTPException) -> JSONResponse:
    places = "wanted POST /rewards, GET /about, /metrics or /health"
    return JSONResponse({"error": f"{error.detail}; {places}"}, error.status_code, error.headers)


async def _broken(request: Request, error: Exception) -> JSONResponse:
    return JSONResponse({"error": "the server failed; its log says how"}, 500)
