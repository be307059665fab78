"""Web pages of other sites cannot use the API through their visitors' browsers."""

import socket
from collections.abc import Iterator
from typing import Any

import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from bench.stack import Stack, running
from tests.conftest import SIM
from tests.test_jobs import CHAT, call

OURS = "https://chat.example.com"


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    stack = Stack(tmp_path_factory.mktemp("sites"), [SIM], allowed_origins=f"{OURS}, http://x:1")
    with running(stack) as stack:
        yield stack


def ask(stack: Stack, **headers: str) -> Any:
    return call(stack, "POST", "/v1/chat/completions", json=CHAT, headers=headers)


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "127.0.0.1.evil", "[::2]"])
def test_a_name_that_points_here_is_not_ours(stack: Stack, host: str) -> None:
    refused = ask(stack, host=host)
    assert refused.status_code == 403
    assert refused.json()["error"]["code"] == "host_not_allowed"


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:80", "127.0.0.1:1", "[::1]:8000"])
def test_names_of_this_machine_are(stack: Stack, host: str) -> None:
    assert ask(stack, host=host).status_code == 200


@pytest.mark.parametrize("origin", ["https://evil.example", "http://localhost:3000", "null"])
def test_a_page_of_another_site_is_refused(stack: Stack, origin: str) -> None:
    refused = ask(stack, origin=origin)
    assert refused.status_code == 403
    assert refused.json()["error"]["code"] == "origin_not_allowed"
    assert "access-control-allow-origin" not in refused.headers


def test_our_own_pages_and_allowed_ones_are_answered(stack: Stack) -> None:
    assert ask(stack, origin=stack.url).status_code == 200
    answered = ask(stack, origin=OURS)
    assert answered.status_code == 200
    assert answered.headers["access-control-allow-origin"] == OURS


def test_a_preflight_request_gets_what_is_allowed(stack: Stack) -> None:
    asks = {
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization, content-type",
    }
    answer = call(stack, "OPTIONS", "/v1/jobs", headers=asks | {"origin": OURS})
    assert answer.status_code == 204
    assert answer.headers["access-control-allow-origin"] == OURS
    assert answer.headers["access-control-allow-headers"] == "authorization, content-type"
    assert "POST" in answer.headers["access-control-allow-methods"]
    refused = call(stack, "OPTIONS", "/v1/jobs", headers=asks | {"origin": "https://evil.example"})
    assert refused.status_code == 403


@pytest.mark.parametrize(
    ("origin", "status"), [("https://evil.example", 403), (OURS, 101), (None, 101)]
)
def test_sockets_are_checked_too(stack: Stack, origin: str | None, status: int) -> None:
    url = f"ws://127.0.0.1:{stack.api_ports[0]}/v1/chat/completions"
    headers = {"Origin": origin} if origin else {}
    if status == 101:
        with connect(url, additional_headers=headers) as ws:
            ws.send('{"message": "Hello", "max_tokens": 1}')
            assert "choices" in str(ws.recv(timeout=60))
        return
    with pytest.raises(InvalidStatus) as refused:
        connect(url, additional_headers=headers)
    assert refused.value.response.status_code == status


def test_sockets_of_a_name_that_points_here_are_refused(stack: Stack) -> None:
    url = f"ws://evil.example:{stack.api_ports[0]}/v1/chat/completions"
    with socket.create_connection(("127.0.0.1", stack.api_ports[0])) as opened:
        with pytest.raises(InvalidStatus) as refused:
            connect(url, sock=opened)
        assert refused.value.response.status_code == 403
