"""A running OpenAI-compatible server as an engine: SGLang, TGI, Ollama, another vLLM.

The worker's requests go to the server, and its answers come back as they arrive.
"""

import asyncio
import json
import logging
import os
from collections.abc import AsyncIterator, Iterable
from contextlib import aclosing, asynccontextmanager

import httpx
from pydantic import BaseModel, ConfigDict, Field

from gpu_worker.engines.engine import (
    Load,
    Message,
    Receive,
    Send,
    answer_unless_left,
    read_args,
    read_body,
)
from gpu_worker.engines.remote_names import Names, choose, listed_in
from gpu_worker.engines.remote_usage import read_object, usage_option, watched
from tasks.contract.errors import ConfigurationError, OverloadedError, headers_of
from tasks.contract.job_errors import StreamBrokenError
from tasks.contract.models import Model
from tasks.contract.settings import without_password

Headers = Iterable[tuple[bytes, bytes]]

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 5.0
# Of one connection, not of the answer. A content-encoding stays: the bytes are relayed undecoded.
OMITTED = frozenset(
    b"connection content-length date keep-alive proxy-authenticate proxy-connection server te "
    b"trailer transfer-encoding upgrade".split()
)
FORWARDED = {b"accept", b"content-type", b"x-request-id"}


class Args(BaseModel):
    """The `args` of a remote model in models.yaml, with dashes or underscores."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    read_timeout_s: float = Field(600, gt=0, description="between two pieces of an answer")
    model: str | None = Field(None, min_length=1, description="the server's name for the model")
    api_key_env: str | None = Field(None, min_length=1, description="variable that holds its key")


class RemoteUnavailableError(OverloadedError):
    """The server behind this model cannot be reached; try again shortly."""

    code = "engine_unavailable"


class RemoteEngine:
    """The server's endpoints as an ASGI app."""

    def __init__(self, client: httpx.AsyncClient, names: Names) -> None:
        self._client = client
        self._names = names
        self._running = 0

    @property
    def server(self) -> tuple[str, int]:
        url = self._client.base_url
        return url.host, url.port or (443 if url.scheme == "https" else 80)

    def load(self) -> Load:
        return Load(self._running, 0)

    def is_dead(self) -> bool:
        return False

    def progress(self) -> None:
        return None  # `read_timeout_s` bounds the server's silence

    async def app(self, scope: Message, receive: Receive, send: Send) -> None:
        """Relays one request; if the client leaves, the connection closes, which frees a slot."""
        body, wants_no_usage = self._asked(scope["path"], await read_body(receive))
        await answer_unless_left(receive, self._relay(scope, body, send, wants_no_usage))

    async def _relay(self, scope: Message, body: bytes, send: Send, wants_no_usage: bool) -> None:
        headers = [pair for pair in scope["headers"] if pair[0] in FORWARDED]
        request = self._client.build_request(
            scope["method"], scope["path"], content=body, headers=headers
        )
        has_started = False
        self._running += 1
        try:
            response = await self._client.send(request, stream=True)
            async with aclosing(response):
                has_started = True
                await _send_start(send, response.status_code, response.headers.raw)
                async for piece in watched(response, scope["path"], wants_no_usage):
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except httpx.TransportError as failure:
            reason = f"{request.url.host}:{request.url.port}: {failure or type(failure).__name__}"
            if has_started:
                raise StreamBrokenError(f"the answer broke off ({reason})") from failure
            log.warning("no answer from %s", reason)
            await _send_unavailable(send)
        finally:
            self._running -= 1

    def _asked(self, path: str, body: bytes) -> tuple[bytes, bool]:
        """The request for the server: with its name for the model, asking for a stream's usage.

        Returns:
            The body, and whether its client has not asked for the usage.
        """
        if (document := read_object(body)) is None:
            return body, False  # the server reports what is wrong with it
        unasked = usage_option(path, document)
        changes = self._names.change(document) | unasked
        return (json.dumps(document | changes).encode() if changes else body), bool(unasked)


@asynccontextmanager
async def open_engine(model: Model) -> AsyncIterator[RemoteEngine]:
    """Connects to the server at the model's source, a base URL with or without `/v1`.

    Raises:
        ConfigurationError: an argument is wrong, the key is not set, or the server does not answer
            or has several models.
    """
    args = read_args(model, Args)
    headers = {"accept-encoding": "identity"}
    if args.api_key_env:
        headers["authorization"] = f"Bearer {_read_key(args.api_key_env, model)}"
    async with httpx.AsyncClient(
        headers=headers,
        trust_env=False,  # a proxy meant for the Internet must not see the models' traffic
        timeout=httpx.Timeout(args.read_timeout_s, connect=CONNECT_TIMEOUT_S),
        limits=httpx.Limits(max_connections=model.slots, max_keepalive_connections=model.slots),
    ) as client:
        listed = await _list_models(client, model)
        names = Names(args.model) if args.model else choose(model, listed)
        if names.server_model:
            log.info("the server of %s is asked for %r", model.name, names.server_model)
        yield RemoteEngine(client, names)


def _read_key(variable: str, model: Model) -> str:
    key = os.environ.get(variable, "").strip()  # what is read from a file ends in a line feed
    if not key:
        raise ConfigurationError(
            f"{model.name} needs its server's key; set the variable {variable}"
        )
    if not (key.isascii() and key.isprintable()):
        # What h11 says of such a header holds the key.
        raise ConfigurationError(
            f"the key of {model.name}'s server has characters that no header can hold; correct the "
            f"variable {variable}"
        )
    return key


async def _list_models(client: httpx.AsyncClient, model: Model) -> list[str]:
    """What the server says that it has; sets the client's base URL once it has answered there."""
    remedy = f"start it, or correct the source of {model.name}"
    shown = without_password(model.source)
    try:
        url = httpx.URL(model.source.rstrip("/").removesuffix("/v1"))
        if url.userinfo:
            # Taken out of the URL, a password is in no message of httpx.
            client.auth = httpx.BasicAuth(url.username, url.password)
        client.base_url = url.copy_with(userinfo=b"")
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            answer = await client.get("/v1/models")
    except (httpx.HTTPError, httpx.InvalidURL, TimeoutError) as failure:
        reason = str(failure) or type(failure).__name__
        if isinstance(failure, httpx.InvalidURL) and shown != model.source:
            reason = "no URL"  # what is wrong may be a part of the password
        raise ConfigurationError(
            f"no OpenAI-compatible server answers at {shown} ({reason}); {remedy}"
        ) from None
    if answer.status_code != httpx.codes.OK:
        raise ConfigurationError(
            f"{without_password(str(answer.url))} answers {answer.status_code}; {remedy} or its "
            "api-key-env"
        )
    return listed_in(answer)


async def _send_start(send: Send, status: int, headers: Headers) -> None:
    kept = [(name.lower(), value) for name, value in headers if name.lower() not in OMITTED]
    await send({"type": "http.response.start", "status": status, "headers": kept})


async def _send_unavailable(send: Send) -> None:
    error = RemoteUnavailableError()
    headers = {"content-type": "application/json"} | headers_of(error)
    encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
    await _send_start(send, error.status, encoded)
    body = json.dumps(error.body()).encode()
    await send({"type": "http.response.body", "body": body, "more_body": False})
