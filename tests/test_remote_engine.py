"""The remote engine against a real HTTP server on a real socket."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import httpx
import pytest

from deploy.redis_server import free_port
from gpu_worker.engines.engine import Load, Message
from gpu_worker.engines.remote import RemoteEngine, open_engine
from gpu_worker.replay_log import ReplayLog, current_replay_log
from tasks.contract.job_errors import StreamBrokenError
from tasks.contract.models import Model

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Server:
    """Answers each POST with a chunked event stream; keeps what it was sent."""

    def __init__(self) -> None:
        self.url = ""
        self.requests: list[tuple[str, bytes]] = []
        self.models = b"{}"
        self.headers = b""
        self.events = [b"data: one\n\n", b"data: [DONE]\n\n"]
        self.goes_on = asyncio.Event()
        self.client_left = asyncio.Event()
        self.breaks_off = False
        self.is_silent = False
        self.goes_on.set()
        self._connections: list[asyncio.StreamWriter] = []

    def drop_connections(self) -> None:
        for connection in self._connections:
            connection.close()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections.append(writer)
        try:
            while head := (await reader.readuntil(b"\r\n\r\n")).decode():
                await self._answer(head, reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self.client_left.set()
            writer.close()

    async def _answer(
        self, head: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        if head.startswith("GET /nowhere/"):
            writer.write(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n")
            return
        if head.startswith("GET /v1/models "):
            size = len(self.models)
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (size, self.models))
            return
        size = int(head.lower().split("content-length: ")[1].split("\r\n")[0])
        self.requests.append((head, await reader.readexactly(size)))
        if self.is_silent:
            await reader.read(1)  # returns when the client has left
            return
        writer.write(b"HTTP/1.1 418 Teapot\r\ncontent-type: text/event-stream\r\n" + self.headers)
        writer.write(b"transfer-encoding: chunked\r\nconnection: keep-alive\r\n\r\n")
        first, *others = (b"%x\r\n%b\r\n" % (len(event), event) for event in self.events)
        writer.write(first)
        if self.breaks_off:
            raise ConnectionResetError
        if not self.goes_on.is_set():
            await reader.read(1)  # returns when the client has left
            return
        writer.write(b"".join(others) + b"0\r\n\r\n")


@asynccontextmanager
async def serving() -> AsyncIterator[Server]:
    server = Server()
    listening = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    host, port = listening.sockets[0].getsockname()
    server.url = f"http://{host}:{port}"
    yield server
    listening.close()


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    async with serving() as server:
        yield server


@asynccontextmanager
async def remote(
    source: str, aliases: tuple[str, ...] = (), **args: Any
) -> AsyncIterator[RemoteEngine]:
    model = Model(name="far", aliases=aliases, engine="remote", source=source, slots=4, args=args)
    async with open_engine(model) as engine:
        yield engine


async def post(engine: RemoteEngine, body: bytes = b'{"a": 1}') -> httpx.Response:
    transport = httpx.ASGITransport(engine.app)
    async with httpx.AsyncClient(transport=transport, base_url="http://worker") as client:
        headers = {"x-request-id": "R1", "content-type": "application/json"}
        return await client.post("/v1/chat/completions", content=body, headers=headers)


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
async def test_request_and_answer_go_through_unchanged(server: Server, suffix: str) -> None:
    async with remote(server.url + suffix) as engine:
        answer = await post(engine)
        assert engine.load() == Load(0, 0)
    assert answer.status_code == 418
    assert answer.text == "data: one\n\ndata: [DONE]\n\n"
    assert dict(answer.headers) == {"content-type": "text/event-stream"}
    head, body = server.requests[0]
    assert head.startswith("POST /v1/chat/completions HTTP/1.1\r\n")
    assert "x-request-id: R1" in head
    assert "accept-encoding: identity" in head.lower()
    assert body == b'{"a": 1}'


async def test_the_servers_own_name_and_key_are_used(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAR_KEY", "s3cret")
    async with remote(server.url, **{"model": "llama", "api-key-env": "FAR_KEY"}) as engine:
        await post(engine, b'{"model": "far", "n": 1}')
    head, body = server.requests[0]
    assert "authorization: bearer s3cret" in head.lower()
    assert body == b'{"model": "llama", "n": 1}'


STREAMED = b"""data: {"choices": [{"index": 0, "delta": {"content": "Hi"}}]}

data: {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 1}}\r
\r
data: [DONE]

: no end"""
TOLD = STREAMED.replace(b"\r", b"").removesuffix(b": no end")
WITHOUT_USAGE = re.sub(rb'data: {"choices": \[\].*?\n\n', b"", TOLD, flags=re.DOTALL)


@pytest.mark.parametrize("size", [1, 7, 1000])
@pytest.mark.parametrize(
    ("options", "asked", "is_sent"),
    [
        ({}, {"include_usage": True}, False),
        ({"stream_options": None}, {"include_usage": True}, False),
        (
            {"stream_options": {"include_usage": False, "continuous_usage_stats": True, "x": 1}},
            {"include_usage": True, "x": 1},
            False,
        ),
        ({"stream_options": {"include_usage": True}}, {"include_usage": True}, True),
    ],
)
async def test_usage_is_requested_and_sent_to_clients_that_asked(
    server: Server, size: int, options: dict[str, Any], asked: dict[str, Any], is_sent: bool
) -> None:
    server.events = [STREAMED[at : at + size] for at in range(0, len(STREAMED), size)]
    replay_log = ReplayLog()
    current_replay_log.set(replay_log)
    async with remote(server.url) as engine:
        answer = await post(engine, json.dumps({"stream": True} | options).encode())
    assert json.loads(server.requests[0][1])["stream_options"] == asked
    assert answer.content == (TOLD if is_sent else WITHOUT_USAGE)
    assert replay_log.total() == (3, 1)


MEGABYTE = b"x" * 1_000_000


@pytest.mark.parametrize(
    ("events", "why"),
    [
        ([b"data: ", *[MEGABYTE] * 11], "longer than 10,000,000 bytes"),
        ([b"data: " + MEGABYTE + b"\n"] * 11, "longer than 10,000,000 bytes"),
        ([b": " + MEGABYTE] * 11, "longer than 10,000,000 bytes"),
        ([b'data: {}\n\ndata: {"a'], "in the midst of an event"),
    ],
)
async def test_an_event_without_an_end_breaks_the_stream(
    server: Server, events: list[bytes], why: str
) -> None:
    server.events = events
    async with remote(server.url) as engine:
        with pytest.raises(StreamBrokenError, match=why):
            await post(engine)
    await asyncio.wait_for(server.client_left.wait(), 10)


async def test_many_long_events_go_through(server: Server) -> None:
    server.events = [b"data: " + MEGABYTE + b"\n\n"] * 11
    async with remote(server.url) as engine:
        assert (await post(engine)).content == b"".join(server.events)


async def test_an_encoded_stream_stays_as_it_is(server: Server) -> None:
    server.headers = b"content-encoding: of-its-own\r\n"
    server.events = [b"data: a\r\n", b"\r\n: b"]
    async with remote(server.url) as engine:
        assert (await post(engine)).content == b"data: a\r\n\r\n: b"


async def test_a_request_that_is_cancelled_leaves_the_server_at_once(server: Server) -> None:
    server.goes_on.clear()
    async with remote(server.url) as engine:
        task = asyncio.ensure_future(post(engine))
        while not server.requests:  # noqa: ASYNC110 - the server is in this loop
            await asyncio.sleep(0.005)
        assert engine.load().running == 1
        task.cancel()
        await asyncio.wait_for(server.client_left.wait(), 10)
        with suppress(asyncio.CancelledError):
            await task
        assert engine.load().running == 0


@pytest.mark.parametrize("is_silent", [True, False])
async def test_a_client_that_leaves_has_the_servers_connection_closed(
    server: Server, is_silent: bool
) -> None:
    server.is_silent = is_silent
    server.goes_on.clear()
    left = asyncio.Event()
    messages: list[Message] = [{"type": "http.request", "body": b"{}", "more_body": False}]
    received: list[str] = []

    async def receive() -> Message:
        if not messages:
            await left.wait()
        return messages.pop() if messages else {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        received.append(message["type"])

    async with remote(server.url) as engine:
        scope: Message = {"method": "POST", "path": "/v1/embeddings", "headers": []}
        answering = asyncio.ensure_future(engine.app(scope, receive, send))
        while not server.requests or (not is_silent and len(received) < 2):  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        left.set()
        await asyncio.wait_for(server.client_left.wait(), 10)
        await asyncio.wait_for(answering, 10)
        assert engine.load().running == 0
    assert len(received) == (0 if is_silent else 2)


async def test_an_answer_that_breaks_off_is_an_error_with_its_reason(server: Server) -> None:
    server.breaks_off = True
    async with remote(server.url) as engine:
        with pytest.raises(StreamBrokenError, match=r"broke off \(127\.0\.0\.1:"):
            await post(engine)


async def test_a_server_that_went_away_is_503_to_be_retried(unused: int) -> None:
    server = Server()
    listening = await asyncio.start_server(server.serve, "127.0.0.1", unused)
    async with remote(f"http://127.0.0.1:{unused}", **{"read-timeout-s": 1}) as engine:
        listening.close()
        server.drop_connections()
        answer = await post(engine)
        assert not engine.is_dead()
    assert answer.status_code == 503
    assert answer.json()["error"]["type"] == "overloaded_error"
    assert int(answer.headers["retry-after"]) > 0


@pytest.fixture
def unused() -> int:
    return free_port()
