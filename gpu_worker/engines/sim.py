"""An engine with no model: made-up words in vLLM's JSON, at a set speed, failing on request.

For load tests, CI, and machines where vLLM cannot be installed.
"""

import asyncio
import math
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from hashlib import shake_256

import orjson
from pydantic import BaseModel, ConfigDict, Field

from gpu_worker.engines.engine import (
    Load,
    Message,
    Receive,
    Send,
    answer_unless_left,
    current_job,
    read_args,
    read_body,
)
from gpu_worker.engines.sim_answers import (
    CONTEXT_TOKENS,
    ROUTES,
    Answer,
    AnyRequest,
    Failure,
    Json,
    make_words,
    parse,
)
from gpu_worker.replay_log import get_replay_log
from tasks.contract.errors import HttpError, InvalidRequestError, SluiceError
from tasks.contract.models import Model

FAILS_AT_TOKEN = 3  # the client has something by then
LOOP_ROUNDS_S = 0.001


class Args(BaseModel):
    """The `args` of a sim model in models.yaml, with dashes or underscores."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    first_token_s: float = Field(0.05, ge=0)
    tokens_per_s: float = Field(50, ge=0, description="of each stream; 0: as fast as possible")
    length: int = Field(64, ge=1, le=CONTEXT_TOKENS, description="tokens if the request sets none")
    max_num_seqs: int = Field(64, ge=1, description="requests in the running batch; others wait")
    failure: Failure = "none"
    failure_rate: float = Field(1, ge=0, le=1, description="share of the requests that fail")


class SimEngine:
    """The batch, its speed and its failures, behind an ASGI app."""

    server = None

    def __init__(self, model: Model, args: Args) -> None:
        self._name = model.name
        self._args = args
        self._slots = asyncio.Semaphore(args.max_num_seqs)
        self._running = 0
        self._waiting = 0
        self._steps = 0
        self._dead = asyncio.Event()

    def load(self) -> Load:
        return Load(self._running, self._waiting)

    def is_dead(self) -> bool:
        return self._dead.is_set()

    def progress(self) -> int | None:
        return self._steps if self._running else None

    async def app(self, scope: Message, receive: Receive, send: Send) -> None:
        """One request; a client that goes away ends it at once."""
        body = await read_body(receive)
        await answer_unless_left(receive, self._answer(scope, body, send))

    async def _answer(self, scope: Message, body: bytes, send: Send) -> None:
        endpoint = ROUTES.get(scope["path"])
        if endpoint is None:
            return await _send_json(send, 404, {"detail": "Not Found"})
        request_id = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        try:
            request = parse(endpoint, body)
            answer = self._compose(request, request_id)
            failure = request.sim.failure if request.sim else self._failure(request_id)
            if failure == "error":
                raise HttpError(500, "Internal server error")
            await (self._stream if request.stream else self._complete)(answer, failure, send)
        except SluiceError as refused:
            await _send_json(send, refused.status, refused.body())

    async def _complete(self, answer: Answer, failure: Failure, send: Send) -> None:
        async with self._in_batch():
            for number in range(answer.length):
                await self._token(answer, failure, number)
        get_replay_log().usage = answer.usage()
        await _send_json(send, 200, answer.whole())

    async def _stream(self, answer: Answer, failure: Failure, send: Send) -> None:
        await _send_head(send, 200, b"text/event-stream; charset=utf-8")
        try:
            async with self._in_batch():
                for number in range(answer.length):
                    await self._token(answer, failure, number)
                    for chunk in answer.chunks(number):
                        await _send_event(send, orjson.dumps(chunk))
            get_replay_log().usage = answer.usage()
        except SluiceError as failed:
            await _send_event(send, orjson.dumps(failed.body()))
        await _send_event(send, b"[DONE]")
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    @asynccontextmanager
    async def _in_batch(self) -> AsyncIterator[None]:
        self._waiting += 1
        try:
            await self._slots.acquire()
        finally:
            self._waiting -= 1
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1
            self._slots.release()

    async def _token(self, answer: Answer, failure: Failure, number: int) -> None:
        """Returns when the token of that number is made, or fails as requested."""
        replay_log = get_replay_log()
        # Those before were made by a worker that has died.
        if number >= len(replay_log.earlier):
            await self._make_token(answer, failure, number)
            replay_log.note(number)
            if self._dead.is_set():
                raise HttpError(500, "The engine is dead")
        replay_log.count(answer.prompt_tokens, len(answer.choices))

    async def _make_token(self, answer: Answer, failure: Failure, number: int) -> None:
        if number == 0:
            await asyncio.sleep(self._args.first_token_s)
        elif rate := self._args.tokens_per_s:
            # Woken on common ticks, as sequences of one batch are. The loop rounds to milliseconds:
            # a stream that is woken that much too early has had this tick.
            now_s = asyncio.get_running_loop().time()
            tick = math.floor(now_s * rate + min(rate * LOOP_ROUNDS_S, 0.5)) + 1
            await asyncio.sleep(tick / rate - now_s)
        else:
            await asyncio.sleep(0)
        last = answer.length - 1
        if failure == "hang" and number == min(1, last):
            await self._dead.wait()
        elif failure == "crash" and number == min(FAILS_AT_TOKEN, last):
            os.kill(os.getpid(), signal.SIGKILL)
        elif failure == "die" and number == min(FAILS_AT_TOKEN, last):
            self._dead.set()
        self._steps += 1

    def _failure(self, request_id: str) -> Failure:
        """The failure that this request meets; the same id meets it again."""
        share = int.from_bytes(shake_256(request_id.encode()).digest(4)) / 2**32
        return self._args.failure if share < self._args.failure_rate else "none"

    def _compose(self, request: AnyRequest, request_id: str) -> Answer:
        prompts, n, limit = request.prompts(), request.n or 1, _limit(request)
        most = CONTEXT_TOKENS // (len(prompts) * n)
        if not most:
            wrong = f"n: all prompts together have {CONTEXT_TOKENS:,} choices at most."
            raise InvalidRequestError(f"The request is malformed: {wrong}", param="n")
        count = min(limit or self._args.length, most)
        return Answer(
            request=request,
            id=f"{request.prefix}-{request_id}",
            model=self._name,
            prompt_tokens=sum(tokens for _, tokens in prompts),
            choices=[
                make_words(f"{prompt} {request.seed} {index}", count)
                for prompt, _ in prompts
                for index in range(n)
            ],
            finish_reason="length" if limit else "stop",
            created=int(time.time()),
        )


def _limit(request: AnyRequest) -> int | None:
    """Most tokens of each choice: as asked for, and as its key may have."""
    job = current_job.get()
    bounds = [request.limit(), job.max_tokens if job else None]
    return min((bound for bound in bounds if bound is not None), default=None)


@asynccontextmanager
async def open_engine(model: Model) -> AsyncIterator[SimEngine]:
    """Is ready at once; nothing is loaded.

    Raises:
        ConfigurationError: an argument is unknown or out of range.
    """
    yield SimEngine(model, read_args(model, Args))


async def _send_head(send: Send, status: int, content_type: bytes) -> None:
    headers = [(b"content-type", content_type)]
    await send({"type": "http.response.start", "status": status, "headers": headers})


async def _send_json(send: Send, status: int, answer: Json) -> None:
    await _send_head(send, status, b"application/json")
    await send({"type": "http.response.body", "body": orjson.dumps(answer), "more_body": False})


async def _send_event(send: Send, data: bytes) -> None:
    body = b"data: " + data + b"\n\n"
    await send({"type": "http.response.body", "body": body, "more_body": True})
