"""What a hostile or broken client can make the API do: nothing that others notice."""

import json
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from http.client import HTTPResponse
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from bench.postgres import Postgres
from bench.stack import Process, Stack, await_that, running, slack
from deploy.redis_server import free_port
from tasks.contract import keys
from tests.conftest import SIM
from tests.test_jobs import CHAT, STREAM, call, get, submit

BODY_TIMEOUT_S = 1
MOST_BYTES = 100_000
FAST = {**SIM, "args": {"tokens_per_s": 0}}
HEAD = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
HEAD += "Connection: close\r\n"


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    home = tmp_path_factory.mktemp("bounds")
    with running(Stack(home, [FAST], max_body_bytes=MOST_BYTES)) as stack:
        yield stack


@pytest.fixture(scope="module")
def hasty_port(stack: Stack) -> int:
    """Of an API that waits for no client longer than BODY_TIMEOUT_S."""
    start_limited(stack, "true", port := free_port(), BODY_TIMEOUT_S)
    await_that(lambda: is_up(port))
    return port


@pytest.fixture(scope="module")
def postgres_stack(tmp_path_factory: pytest.TempPathFactory, postgres: Postgres) -> Iterator[Stack]:
    home, url = tmp_path_factory.mktemp("postgres"), postgres.create_database()
    with running(Stack(home, [FAST], database_url=url), workers=0) as stack:
        yield stack


@contextmanager
def sending(stack: Stack, data: bytes, port: int | None = None) -> Iterator[socket.socket]:
    address = ("127.0.0.1", port or stack.api_ports[0])
    with socket.create_connection(address, timeout=60) as connection:
        connection.sendall(data)
        yield connection


def answer(stack: Stack, data: bytes, is_cut_off: bool = False, port: int | None = None) -> bytes:
    """All that is answered until the server closes; `is_cut_off`: nothing follows the data."""
    with sending(stack, data, port) as connection:
        if is_cut_off:
            connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(65536), b""))


@pytest.mark.parametrize("levels", [102, 255, 600, 1023, 1025, 40_000])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/jobs"])
def test_a_body_of_many_levels_is_refused_at_once(stack: Stack, path: str, levels: int) -> None:
    body = '{"on_disconnect":"abort","x":' + "[" * levels + "]" * levels + "}"
    begun_s = time.monotonic()
    refused = call(stack, "POST", path, data=body, headers={"content-type": "application/json"})
    assert time.monotonic() - begun_s < slack(1)
    assert refused.status_code == 400
    assert refused.json()["error"]["type"] == "invalid_request_error"


def test_a_schema_of_some_levels_is_taken(stack: Stack) -> None:
    body = CHAT | {"tools": [{"x": [[[[[[[[[[[[[[[[[[[[[[["deep"]]]]]]]]]]]]]]]]]]]]]]]}] * 200}
    assert call(stack, "POST", "/v1/chat/completions", json=body).status_code == 200


@pytest.mark.parametrize("seconds", ["9" * 5000, "-1", "1.5", "²", "", "x"])
def test_a_wait_that_is_no_number_of_seconds_is_refused(stack: Stack, seconds: str) -> None:
    headers = {"prefer": f"wait={seconds}".encode("latin-1")}
    refused = call(stack, "POST", "/v1/chat/completions", json=CHAT, headers=headers)
    assert refused.status_code == 400


@pytest.mark.parametrize(
    "chunks",
    [b"ZZ\r\n{}\r\n0\r\n\r\n", b"5\r\n{}", b"2\r\n{}XX0\r\n\r\n", b"-2\r\n{}\r\n0\r\n\r\n"],
)
def test_broken_chunks_are_refused(stack: Stack, chunks: bytes) -> None:
    response = answer(stack, f"{HEAD}Transfer-Encoding: chunked\r\n\r\n".encode() + chunks, True)
    assert response.startswith(b"HTTP/1.1 400 ")
    assert response.count(b"HTTP/1.1") == 1


@pytest.mark.parametrize("headers", [{}, {"Sec-WebSocket-Version": "8"}])
def test_what_is_no_websocket_is_refused_as_all_else(stack: Stack, headers: dict[str, str]) -> None:
    headers = headers | {"Connection": "Upgrade", "Upgrade": "websocket"}
    refused = call(stack, "GET", "/v1/chat/completions", headers=headers)
    assert refused.status_code == 400
    assert "Sec-WebSocket-Version: 13" in refused.json()["error"]["message"]


def test_a_socket_that_follows_a_job_learns_that_redis_is_away(home: Path) -> None:
    with running(Stack(home, [FAST]), workers=0) as own:
        own.part("redis").kill()
        with connect(f"{own.url.replace('http', 'ws')}/v1/jobs/job_x/events") as ws:
            assert json.loads(ws.recv(timeout=20))["error"]["code"] == "queue_unavailable"
            assert ws.recv(timeout=10) == "[DONE]"


def chunked(body: bytes) -> bytes:
    pieces = [body[at : at + 5000] for at in range(0, len(body), 5000)]
    sent = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
    return f"{HEAD}Transfer-Encoding: chunked\r\n\r\n".encode() + sent + b"0\r\n\r\n"


def padded(length: int) -> bytes:
    start = b'{"messages":[{"role":"user","content":"Hello"}],"max_tokens":1,"pad":"'
    return start + b"x" * (length - len(start) - 2) + b'"}'


def test_a_chunked_body_is_bounded_like_any_other(stack: Stack) -> None:
    assert answer(stack, chunked(padded(MOST_BYTES))).startswith(b"HTTP/1.1 200 ")
    response = answer(stack, chunked(padded(MOST_BYTES + 1)))
    assert response.startswith(b"HTTP/1.1 413 ")
    assert f"{MOST_BYTES:,} bytes".encode() in response


def test_a_body_that_is_cut_off_is_no_request(stack: Stack) -> None:
    body = b'{"messages":[{"role":"user","content":"Hello"}]}'
    response = answer(stack, f"{HEAD}Content-Length: {len(body) + 1}\r\n\r\n".encode() + body, True)
    assert response.startswith(b"HTTP/1.1 400 ")


def test_a_body_that_does_not_come_is_not_waited_for(stack: Stack, hasty_port: int) -> None:
    for framing in ("Content-Length: 5000", "Transfer-Encoding: chunked"):
        begun_s = time.monotonic()
        response = answer(stack, f"{HEAD}{framing}\r\n\r\n".encode(), port=hasty_port)
        assert response.startswith(b"HTTP/1.1 408 ")
        assert time.monotonic() - begun_s < BODY_TIMEOUT_S + slack(2)


def test_headers_that_come_a_byte_at_a_time_are_not_waited_for(
    stack: Stack, hasty_port: int
) -> None:
    begun_s = time.monotonic()
    start = b"GET /health/live HTTP/1.1\r\nX-Slow: "
    with sending(stack, start, hasty_port) as connection:
        connection.settimeout(0.1)
        response = b""
        while not response:
            connection.sendall(b"x")
            with suppress(TimeoutError):
                response = connection.recv(65536)
        assert response.startswith(b"HTTP/1.1 408 ")
        assert b"headers did not arrive in time" in response
        assert BODY_TIMEOUT_S * 0.9 < time.monotonic() - begun_s < BODY_TIMEOUT_S + slack(2)


def test_a_connection_may_be_idle_between_requests_for_longer(
    stack: Stack, hasty_port: int
) -> None:
    request = b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with sending(stack, request, hasty_port) as connection:
        response = HTTPResponse(connection)
        response.begin()
        assert response.status == 200
        assert response.read()
        connection.settimeout(2 * BODY_TIMEOUT_S)
        with pytest.raises(TimeoutError):
            connection.recv(1)
        connection.settimeout(60)
        # Two at once: the second one is read already when the first one is answered.
        connection.sendall(2 * request)
        answers = b""
        while answers.count(b"HTTP/1.1 200 ") < 2:
            answers += (received := connection.recv(65536))
            assert received


def start_limited(stack: Stack, limit: str, port: int, body_timeout_s: float = 10) -> Process:
    """An API that starts after that command of a shell."""
    command = [sys.executable, "-m", "deploy.cli", "api", "--bind", f"127.0.0.1:{port}"]
    limited = ["/bin/sh", "-c", f'{limit}; exec "$@"', "sh", *command]
    log = stack.home / f"api-{port}.log"
    api = Process(limited, stack.env | {"SLUICE_BODY_TIMEOUT_S": str(body_timeout_s)}, log)
    stack.processes.append(api)
    return api


def live(port: int) -> requests.Response | None:
    """What the API answers to whether it lives; None if it does not."""
    try:
        return requests.get(f"http://127.0.0.1:{port}/health/live", timeout=5)
    except requests.RequestException:
        return None


def is_up(port: int) -> bool:
    found = live(port)
    return found is not None and found.ok


def test_an_api_that_may_open_too_few_files_does_not_start(stack: Stack) -> None:
    api = start_limited(stack, "ulimit -n 364", free_port())
    assert api.popen.wait(60) == 2
    (line,) = api.log.read_text().splitlines()
    assert "may open 364 files" in line
    assert "raise the hard limit" in line


def test_the_api_raises_a_low_limit_of_files_itself(stack: Stack) -> None:
    port = free_port()
    api = start_limited(stack, "ulimit -Sn 300; ulimit -Hn 500", port)
    await_that(lambda: is_up(port))
    (process,) = psutil.Process(api.pid).children()
    assert process.rlimit(psutil.RLIMIT_NOFILE) == (500, 500)
    api.stop()


def test_more_connections_than_files_allow_get_503_and_take_nothing_away(stack: Stack) -> None:
    port = free_port()
    api = start_limited(stack, "ulimit -n 400", port)
    await_that(lambda: is_up(port))
    seen: list[requests.Response] = []

    def is_refused() -> bool:
        if (found := live(port)) is not None:
            seen.append(found)
        return found is not None and not found.ok

    with ExitStack() as held:
        unfinished = f"{HEAD}Content-Length: 5000\r\n\r\n".encode()
        for _ in range(60):
            held.enter_context(sending(stack, unfinished, port))
        await_that(is_refused)
        refused = seen[-1]
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "too_many_connections"
        assert refused.headers["Retry-After"]
        # Their bodies are not waited for.
        await_that(lambda: is_up(port))
    api.stop()


@pytest.mark.parametrize("after", ["1--3", "1-", "-1", "1-2-3", "1-9" + "9" * 30, "1-2\n"])
def test_what_is_no_events_id_is_refused_at_the_door(stack: Stack, after: str) -> None:
    job_id = submit(stack, STREAM)["id"]
    refused = call(stack, "GET", f"/v1/jobs/{job_id}/events", params={"starting_after": after})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "starting_after"


@pytest.mark.parametrize(
    "path",
    [
        *("jobs/%00", "jobs/a%00b/events", "jobs/%00/webhook", "jobs?after=%00", "jobs?model=%00"),
        "admin/dead/%00",
    ],
)
def test_what_no_database_takes_is_refused_at_the_door(postgres_stack: Stack, path: str) -> None:
    key = {"Authorization": "Bearer admin"}
    refused = call(postgres_stack, "GET", f"/v1/{path}", headers=key)
    assert refused.status_code == 400, refused.text
    assert refused.json()["error"]["param"] in ("job_id", "after", "model")


def test_a_socket_refuses_it_too(postgres_stack: Stack) -> None:
    with connect(f"ws{postgres_stack.url[4:]}/v1/jobs/%00/events") as client:
        assert json.loads(client.recv(timeout=10))["error"]["param"] == "job_id"
        assert client.recv(timeout=10) == "[DONE]"


def test_a_follower_that_does_not_read_costs_nothing(stack: Stack) -> None:
    job_id = submit(stack, STREAM | {"max_tokens": 60_000})["id"]
    request = f"GET /v1/jobs/{job_id}/events HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
    api = psutil.Process(stack.api_processes[0].popen.pid).children()[0]
    await_that(lambda: get(stack, job_id)["status"] == "completed", timeout_s=240)
    with socket.socket() as idle:
        # Its kernel takes a few kilobytes for it, ours some megabytes.
        idle.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        idle.connect(("127.0.0.1", stack.api_ports[0]))
        idle.sendall(request)
        await_that(lambda: len(idle.recv(4096, socket.MSG_PEEK)) > 1000)
        # When all is full that is kept for it, it waits.
        await_that(lambda: _cpu_s(api, 2) < 0.2, timeout_s=60)


def _cpu_s(process: psutil.Process, during_s: float) -> float:
    """What the process uses of the processor from now on."""
    before, begun_s = process.cpu_times(), time.monotonic()
    await_that(lambda: time.monotonic() - begun_s > during_s)
    after = process.cpu_times()
    return after.user + after.system - before.user - before.system


def test_a_socket_is_not_sent_compressed_frames(stack: Stack) -> None:
    url = f"ws://127.0.0.1:{stack.api_ports[0]}/v1/chat/completions"
    with connect(url, compression="deflate") as ws:
        assert ws.protocol.extensions == []


def test_what_waits_on_a_socket_is_bounded_in_bytes(stack: Stack) -> None:
    url = f"ws://127.0.0.1:{stack.api_ports[0]}/v1/chat/completions"
    frame = padded(MOST_BYTES // 3).decode().replace('"max_tokens":1', '"max_tokens":5000')
    frame = frame.replace("xx", "é")  # as many bytes in half as many characters
    stack.redis.sadd(keys.PAUSED, "sim")
    try:
        with connect(url) as ws:
            with suppress(ConnectionClosed):
                for _ in range(5):
                    ws.send(frame)
                while True:
                    ws.recv(timeout=60)
            assert ws.close_code == 1008
    finally:
        stack.redis.srem(keys.PAUSED, "sim")


SECRET = "sk-marked-secret"


def test_nothing_that_was_asked_is_in_a_log(stack: Stack) -> None:
    asked = {"messages": [{"role": "user", "content": SECRET}], "max_tokens": 1}
    headers = {
        "authorization": f"Bearer {SECRET}",
        "x-request-id": SECRET,
        "idempotency-key": SECRET,
        "content-type": "application/json",
    }
    json_bodies: list[dict[str, Any]] = [
        asked,
        asked | {"stream": True},
        asked | {"model": SECRET},
        asked | {"on_disconnect": SECRET},
        asked | {"n": SECRET},
        asked | {"max_tokens": SECRET},
        {"messages": SECRET},
    ]
    bodies = [json.dumps(body) for body in json_bodies]
    bodies += [f'{{"{SECRET}', "[" * 300 + f'"{SECRET}"' + "]" * 300, f'"{SECRET}"']
    for number, body in enumerate(bodies):
        own = headers | {"idempotency-key": f"{SECRET}-{number}"}
        call(stack, "POST", "/v1/chat/completions", data=body, headers=own)
        call(stack, "POST", "/v1/completions", data=body, headers=own)
        call(stack, "POST", f"/v1/{SECRET}?{SECRET}", data=body, headers=own)
        call(stack, "POST", "/v1/chat/completions", data=body, headers=own | {"prefer": SECRET})
        job = f'{{"endpoint":"/v1/chat/completions","body":{body},"metadata":{{"a":"{SECRET}"}}}}'
        call(stack, "POST", "/v1/jobs", data=job, headers=own | {"idempotency-key": f"j{number}"})
    job = {"endpoint": "/v1/chat/completions", "body": asked, "webhook": f"http://x/{SECRET}"}
    call(stack, "POST", "/v1/jobs", json=job)
    call(stack, "GET", f"/v1/jobs/{SECRET}/events", params={"starting_after": SECRET})
    answer(stack, f"{HEAD}Transfer-Encoding: chunked\r\n\r\n{SECRET}\r\n".encode(), True)
    answer(stack, f"{HEAD}Content-Length: {SECRET}\r\n\r\n".encode(), True)
    answer(stack, f"{SECRET} / HTTP/1.1\r\n\r\n".encode(), True)
    with connect(f"ws://127.0.0.1:{stack.api_ports[0]}/v1/chat/completions") as ws:
        for body in bodies:
            ws.send(body)
            while ws.recv(timeout=60) != "[DONE]":
                continue
    await_that(lambda: all(get(stack, i)["status"] == "completed" for i in _jobs(stack)))
    logs = "".join(process.log.read_text() for process in stack.processes)
    assert "job accepted" in logs
    assert SECRET not in logs


def _jobs(stack: Stack) -> list[str]:
    listed = call(stack, "GET", "/v1/jobs", params={"status": "queued"}).json()["data"]
    return [job["id"] for job in listed]
