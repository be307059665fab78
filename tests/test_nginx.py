"""nginx as shipped, before two API processes: many streams, reloads, restarts, bad clients."""

import asyncio
import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from http.client import HTTPResponse
from pathlib import Path
from typing import Any

import orjson
import psutil
import pytest
import requests
from websockets.asyncio.client import connect

from bench.nginx import Nginx
from bench.stack import Process, Stack, await_that, running
from deploy import make_secrets
from tasks.contract.response import fold
from tests.conftest import SIM
from tests.faults.clients import ENDPOINT, Client, await_tokens, chat, paused

pytestmark = pytest.mark.timeout(900)

STREAMS, SOCKETS, QUESTIONS = 200, 100, 10
# Threads of one process: more at once may take longer than nginx waits for a request.
TOGETHER = 20
TOKENS = 40
# Long enough for all to be open at once, and for a restart in the middle.
MANY = SIM | {
    "slots": STREAMS + SOCKETS,
    "args": {"tokens-per-s": 4, "first-token-s": 0.01, "max-num-seqs": STREAMS + SOCKETS},
}
FAST = SIM | {"name": "fast", "aliases": [], "args": {"tokens-per-s": 0, "first-token-s": 0}}
LARGE_BODIES = 50  # of one address, as in nginx.conf
# nginx's patience with slow clients, in seconds that a test has.
HURRIED = {"client_header_timeout 10s;": "client_header_timeout 2s;"} | {
    "client_body_timeout 10s;": "client_body_timeout 2s;"
}
SMALL_BUFFER_BYTES = 8192
# More than all buffers on the way hold.
LARGE: dict[str, Any] = {"model": "fast", "max_tokens": 40_000, "stream": True}


class SocketClient(Client):
    """The same request on a WebSocket.

    With the library's client without asyncio, which reads and writes in two threads, nginx did not
    get one request of a hundred on a busy machine. That TLS of Python 3.11 is why is a guess.
    """

    def run(self) -> None:
        asyncio.run(self._converse())

    async def _converse(self) -> None:
        url = self._url.replace("https://", "wss://")
        async with connect(url, open_timeout=60, proxy=None) as socket:
            await socket.send(orjson.dumps(self.body).decode())
            async for frame in socket:
                self.chunks.append((time.monotonic(), str(frame).encode()))
                if frame == "[DONE]":
                    return


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Two API processes, which let their streams go on when they are stopped."""
    home = tmp_path_factory.mktemp("stack")
    with running(Stack(home, [MANY, FAST], keep_alive_s=1, api_drain_s=120)) as stack:
        stack.start_api()
        yield stack


@pytest.fixture(scope="module")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("secrets")
    make_secrets.main("localhost", root)
    return root / "secrets"


@pytest.fixture
def nginx(
    stack: Stack, secrets: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Nginx]:
    """Its certificates are what clients trust."""
    for variable in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"):
        monkeypatch.setenv(variable, str(secrets / "ca"))
    with Nginx(home, secrets, stack.api_ports) as nginx:
        yield nginx


def bodies() -> list[dict[str, Any]]:
    return [chat(number, stream=True, max_tokens=TOKENS) for number in range(QUESTIONS)]


@pytest.fixture(scope="module")
def expected(stack: Stack) -> list[dict[str, Any]]:
    """What an API answers to each question, asked directly."""
    return [client.answer() for client in [Client(stack, body) for body in bodies()]]


@contextmanager
def everybody(stack: Stack, nginx: Any, expected: list[dict[str, Any]]) -> Iterator[list[Client]]:
    """All streams and sockets, in the middle of their answers; each answer has to be whole."""
    asked = bodies()
    clients: list[Client] = []
    with paused(stack):
        for first in range(0, STREAMS + SOCKETS, TOGETHER):
            kind = Client if first < STREAMS else SocketClient
            clients += [kind(nginx, asked[number % QUESTIONS]) for number in range(TOGETHER)]
            await_open(stack, len(clients), nginx)
    await_tokens(clients, 1)
    yield clients
    for number, client in enumerate(clients):
        assert client.answer() == expected[number % TOGETHER % QUESTIONS]


def await_open(stack: Stack, streams: int, nginx: Nginx) -> None:
    await_that(lambda: sum(open_streams(stack)) == streams, explain=nginx.log)


def open_streams(stack: Stack) -> list[int]:
    """Of each API."""
    live = [f"http://127.0.0.1:{port}/health/live" for port in stack.api_ports]
    return [int(requests.get(url, timeout=60).json()["streams"]) for url in live]


def test_streams_and_sockets_at_once_on_both_apis(
    stack: Stack, nginx: Nginx, expected: list[dict[str, Any]]
) -> None:
    with everybody(stack, nginx, expected):
        shares = open_streams(stack)
    assert min(shares) > (STREAMS + SOCKETS) / 4


def test_a_reload_of_nginx_breaks_no_stream(
    stack: Stack, nginx: Nginx, expected: list[dict[str, Any]]
) -> None:
    with everybody(stack, nginx, expected):
        nginx.reload()
        assert requests.get(f"{nginx.url}/health/live", timeout=60).ok
        assert sum(open_streams(stack)) > 0, "all had ended before"


def test_a_restart_of_one_api_breaks_no_stream_and_refuses_nobody(
    stack: Stack, nginx: Nginx, expected: list[dict[str, Any]]
) -> None:
    stopping, port = stack.api_processes[0], stack.api_ports[0]
    with everybody(stack, nginx, expected):
        stopping.ask_to_stop()
        await_that(lambda: not _listens(port))
        statuses = {_ask(nginx) for _ in range(20) if stopping.popen.poll() is None}
        assert statuses == {200}, "none: it has ended before its streams"
    assert stopping.stop() == 0
    stack.processes.remove(stopping)
    stack.api_processes[0] = _start_again(stack, port)
    await_that(lambda: _serves(nginx, port))


def _start_again(stack: Stack, port: int) -> Process:
    ports = list(stack.api_ports)
    api = stack.start_api(port)
    stack.api_ports[:] = ports
    stack.api_processes.pop()
    return api


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _ask(nginx: Nginx, body: dict[str, Any] | None = None) -> int:
    # The slots of the other model may be in use.
    body = body or chat(model="fast", max_tokens=1)
    return requests.post(f"{nginx.url}{ENDPOINT}", json=body, timeout=60).status_code


def _serves(nginx: Nginx, port: int) -> bool:
    _ask(nginx)
    return f"127.0.0.1:{port}" in {line["api"] for line in nginx.access_log()[-4:]}


def test_an_api_that_is_killed_takes_no_new_request_along(stack: Stack, nginx: Nginx) -> None:
    """What it had begun with breaks: only its clients know whether that may be sent again."""
    killed, port = stack.api_processes[1], stack.api_ports[1]
    killed.kill_all()
    # One that is sent on a connection whose end nginx has not noticed yet is such a request.
    await_that(lambda: not nginx.connections(port))
    assert {_ask(nginx) for _ in range(20)} == {200}
    stack.api_processes[1] = _start_again(stack, port)
    await_that(lambda: _serves(nginx, port))


def test_when_no_api_answers_clients_are_told_when_to_come_back(stack: Stack, nginx: Nginx) -> None:
    text = nginx.config.read_text()
    for port in stack.api_ports:
        text = text.replace(f"server 127.0.0.1:{port} ", "server 127.0.0.1:1 ")
    nginx.config.write_text(text)
    nginx.reload()

    def refused() -> requests.Response:
        return requests.get(f"{nginx.url}/v1/models", timeout=60)

    await_that(lambda: refused().status_code == 502)
    answer = refused()
    assert answer.json()["error"]["code"] == "api_unavailable"
    assert (answer.headers["retry-after"], answer.headers["retry-after-ms"]) == ("1", "1000")


def test_who_reads_slowly_gets_all_of_it_and_holds_up_nobody(stack: Stack, nginx: Nginx) -> None:
    whole = Client(stack, chat(**LARGE)).answer()
    with _connection(nginx, SMALL_BUFFER_BYTES) as slow:
        slow.sendall(_request(orjson.dumps(chat(**LARGE))))
        answer = HTTPResponse(slow)
        answer.begin()
        # It reads nothing while others are served.
        for number in range(5):
            assert _ask(nginx, chat(number, model="fast")) == 200
        events = answer.read()
    assert events.endswith(b"data: [DONE]\n\n")
    chunks = [line[6:] for line in events.splitlines() if line.startswith(b"data: {")]
    assert fold([orjson.loads(chunk) for chunk in chunks])["choices"] == whole["choices"]


def _request(body: bytes, length: int | None = None) -> bytes:
    length = len(body) if length is None else length
    head = f"POST {ENDPOINT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {length}\r\n\r\n".encode() + body


def _connection(nginx: Nginx, buffer_bytes: int = 0) -> ssl.SSLSocket:
    plain = socket.socket()
    if buffer_bytes:
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
    plain.settimeout(120)
    plain.connect(("127.0.0.1", nginx.port))
    return ssl.create_default_context().wrap_socket(plain, server_hostname="localhost")


def test_a_body_that_does_not_arrive_ends_at_nginx(hurried: Nginx) -> None:
    """No API gets to know of it."""
    before = len(hurried.access_log())
    clients = []
    for _ in range(50):
        clients.append(client := _connection(hurried))
        client.sendall(_request(b"{", length=1000))
    for client in clients:
        with client:
            assert _is_closed(client)
    await_that(lambda: len(hurried.access_log()) >= before + len(clients))
    ended = hurried.access_log()[before:]
    assert {(line["status"], line["api"]) for line in ended} == {(408, "")}


def test_headers_that_come_letter_by_letter_end_at_nginx(hurried: Nginx) -> None:
    with _connection(hurried) as client:
        client.settimeout(0.2)
        client.sendall(b"GET /health/live HTTP/1.1\r\nX-Slow: ")
        await_that(lambda: _has_ended_at_a_letter(client), 60)


def _has_ended_at_a_letter(client: ssl.SSLSocket) -> bool:
    try:
        client.sendall(b"x")
        return client.recv(1024) == b""
    except TimeoutError:
        return False
    except (ConnectionError, ssl.SSLError):
        return True


def _is_closed(client: ssl.SSLSocket) -> bool:
    """Whether the other side has ended the connection without an answer."""
    try:
        return client.recv(1) == b""
    except (ConnectionError, ssl.SSLError):
        return True


@pytest.mark.parametrize("version", ["tls1", "tls1_1", "tls1_2", "tls1_3"])
def test_only_tls_since_1_2_is_spoken(nginx: Nginx, version: str) -> None:
    # Without that, the client's own library would refuse the old ones.
    old = [] if version == "tls1_3" else ["-cipher", "ALL:@SECLEVEL=0"]
    client = ["openssl", "s_client", "-connect", f"127.0.0.1:{nginx.port}", f"-{version}", *old]
    done = subprocess.run(client, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    has_agreed = b"Cipher is " in done.stdout and b"Cipher is (NONE)" not in done.stdout
    assert has_agreed == (version in {"tls1_2", "tls1_3"}), done.stdout + done.stderr


def test_http_2_is_spoken(nginx: Nginx) -> None:
    context = ssl.create_default_context()
    context.set_alpn_protocols(["h2", "http/1.1"])
    with (
        socket.create_connection(("127.0.0.1", nginx.port), timeout=60) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as client,
    ):
        assert client.selected_alpn_protocol() == "h2"
        # The preface and an empty SETTINGS frame; the answer begins with one (RFC 9113, 3.4).
        client.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))
        assert client.recv(9)[3] == 4


@pytest.fixture
def limited(stack: Stack, nginx: Nginx, secrets: Path) -> Callable[..., Any]:
    """Another nginx, with other limits."""

    @contextmanager
    def start(**changes: str) -> Iterator[Nginx]:
        home = nginx.home / "limited"
        home.mkdir()
        with Nginx(home, secrets, stack.api_ports, changes) as other:
            yield other

    return start


@pytest.fixture
def hurried(limited: Callable[..., Any]) -> Iterator[Nginx]:
    """One that waits for its clients for two seconds only."""
    with limited(**HURRIED) as nginx:
        yield nginx


def test_large_bodies_that_stall_take_no_memory_and_end(limited: Callable[..., Any]) -> None:
    with limited() as nginx, ExitStack() as clients:
        before_bytes, more = _memory_bytes(nginx), 5
        stalled = [clients.enter_context(_connection(nginx)) for _ in range(LARGE_BODIES + more)]
        # In turns: none waits for the others for as long as nginx waits for it.
        for piece in (_request(b"", length=9_900_000), *[bytes(100_000)] * 9):
            for client in stalled:
                with suppress(OSError):  # those that are too many may be closed already
                    client.sendall(piece)
        await_that(lambda: nginx.log().count('"large_bodies_of_one"') == more, explain=nginx.log)
        # Others are served meanwhile.
        assert _ask(nginx) == 200
        assert _memory_bytes(nginx) - before_bytes < LARGE_BODIES * 400_000
        for client in stalled:
            while not _is_closed(client):
                pass  # a refusal, byte by byte
        large = orjson.dumps(chat(model="fast", max_tokens=1)) + b" " * 200_000
        head = {"Content-Type": "application/json"}
        assert requests.post(nginx.url + ENDPOINT, large, headers=head, timeout=60).ok


def _memory_bytes(nginx: Nginx) -> int:
    assert nginx._process
    workers = psutil.Process(nginx._process.pid).children()
    return sum(int(worker.memory_info().rss) for worker in workers)


def test_too_many_requests_of_one_address_are_refused(limited: Callable[..., Any]) -> None:
    with limited(**{"rate=100r/s": "rate=1r/m", "burst=500": "burst=5"}) as nginx:
        answers = [requests.get(f"{nginx.url}/health/live", timeout=60) for _ in range(10)]
    refused = [answer for answer in answers if answer.status_code == 429]
    assert refused
    assert {answer.json()["error"]["code"] for answer in refused} == {"rate_limit_exceeded"}
    assert {answer.headers["retry-after"] for answer in refused} == {"1"}
    assert {answer.headers["content-type"] for answer in refused} == {"application/json"}


def test_a_body_that_is_too_large_is_refused_before_it_is_sent(nginx: Nginx) -> None:
    with _connection(nginx) as client:
        client.sendall(_request(b"", length=11_000_000))
        answer = HTTPResponse(client)
        answer.begin()
        error = orjson.loads(answer.read())["error"]
    assert (answer.status, error["code"]) == (413, "request_entity_too_large")


ENDS = b"HTTP/1.1\r\nHost: localhost\r\n"
UNREADABLE = {
    b"\x00\r\n\r\n": (400, "invalid_request"),
    b"GET / HTTP/1.1\r\n\r\n": (400, "invalid_request"),
    b"GET / HTTP/9.9\r\n\r\n": (505, "invalid_request"),
    b"TRACE / %s\r\n" % ENDS: (405, "method_not_allowed"),
    b"GET /%s %s\r\n" % (b"a" * 10_000, ENDS): (414, "request_uri_too_long"),
    b"GET / %sX: %s\r\n\r\n" % (ENDS, b"a" * 10_000): (431, "request_header_fields_too_large"),
}


@pytest.mark.parametrize("sent", UNREADABLE, ids=lambda sent: sent[:24].decode())
def test_what_nginx_cannot_read_is_refused_in_openais_form(nginx: Nginx, sent: bytes) -> None:
    with _connection(nginx) as client:
        client.sendall(sent)
        answer = HTTPResponse(client)
        answer.begin()
        error = orjson.loads(answer.read())["error"]
    assert (answer.status, error["code"]) == UNREADABLE[sent]
    assert answer.headers["content-type"] == "application/json"


def test_http_without_tls_is_told_so(nginx: Nginx) -> None:
    answer = requests.get(f"http://localhost:{nginx.port}/v1/models", timeout=60)
    assert answer.status_code == 400
    assert "without TLS" in answer.json()["error"]["message"]


def test_refusals_of_the_api_pass_as_they_are(stack: Stack, nginx: Nginx) -> None:
    urls = stack.url, nginx.url
    body = chat(model="none")
    direct, behind = (requests.post(url + ENDPOINT, json=body, timeout=60) for url in urls)
    assert direct.status_code == 404
    assert (behind.status_code, behind.json()) == (direct.status_code, direct.json())


def test_no_question_is_in_the_logs(nginx: Nginx) -> None:
    question = "Whisper 4711"
    body = chat(max_tokens=1) | {"messages": [{"role": "user", "content": question}]}
    assert requests.post(f"{nginx.url}{ENDPOINT}?q=4711", json=body, timeout=60).ok
    await_that(lambda: ENDPOINT in (nginx.home / "access.log").read_text())
    assert "4711" not in (nginx.home / "access.log").read_text() + nginx.log()
