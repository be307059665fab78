"""What a client of the API sees, with the sim engine."""

import json
import socket
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import requests

from bench.stack import Stack, await_that

CHAT = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 5}


def _post(stack: Stack, path: str = "/v1/chat/completions", **options: object) -> requests.Response:
    return requests.post(stack.url + path, timeout=20, **options)  # type: ignore[arg-type]


def _client(stack: Stack) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{stack.url}/v1", api_key="none", max_retries=0)


def test_the_sdk_streams_a_chat(sim_stack: Stack) -> None:
    stream = _client(sim_stack).chat.completions.create(
        model="gpt-3.5-turbo", messages=[{"role": "user", "content": "Hello"}], stream=True
    )
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream]
    assert len(pieces) > 2
    whole = _client(sim_stack).chat.completions.create(
        model="sim", messages=[{"role": "user", "content": "Hello"}]
    )
    assert "".join(pieces) == whole.choices[0].message.content


def test_the_sdk_completes_a_text(sim_stack: Stack) -> None:
    answer = _client(sim_stack).completions.create(model="sim", prompt="Once", max_tokens=7)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 7


def test_the_short_form_streams_from_the_default_model(sim_stack: Stack) -> None:
    response = _post(sim_stack, json={"message": "Hello"})
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    assert response.text.endswith("data: [DONE]\n\n")


def test_responses_name_their_job(sim_stack: Stack) -> None:
    response = _post(sim_stack, json=CHAT)
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-sluice-job"].startswith("job_")
    assert response.headers["x-sluice-model"] == "sim"
    assert response.headers["x-sluice-attempts"] == "1"
    assert int(response.headers["x-sluice-queue-ms"]) >= 0
    assert int(response.headers["openai-processing-ms"]) > 0
    assert response.headers["x-request-id"] == response.headers["x-sluice-job"]
    own = _post(sim_stack, json=CHAT, headers={"x-request-id": "mine"})
    assert own.headers["x-request-id"] == "mine"


def test_models_are_listed_by_name_and_alias(sim_stack: Stack) -> None:
    models = _client(sim_stack).models
    assert [model.id for model in models.list()] == ["sim", "gpt-3.5-turbo"]
    assert models.retrieve("gpt-3.5-turbo").id == "gpt-3.5-turbo"
    with pytest.raises(openai.NotFoundError):
        models.retrieve("nothing")


def test_an_unknown_model_is_refused_in_vllms_words_without_queueing(sim_stack: Stack) -> None:
    response = _post(sim_stack, json=CHAT | {"model": "nothing"})
    assert response.status_code == 404
    assert response.json()["error"] == {
        "message": "The model `nothing` does not exist. Valid aliases: sim, gpt-3.5-turbo.",
        "type": "NotFoundError",
        "param": "model",
        "code": 404,
    }
    assert "x-sluice-job" not in response.headers


@pytest.mark.parametrize(
    ("options", "status"),
    [
        ({"data": b'{"messages": [', "headers": {"content-type": "application/json"}}, 400),
        ({"data": b"hello", "headers": {"content-type": "text/plain"}}, 400),
        ({"data": b""}, 400),
        ({"json": ["a", "list"]}, 400),
        ({"json": {"messages": "x" * 10_000_001}}, 413),
        ({"json": CHAT, "path": "/v1/unknown"}, 404),
        ({"json": CHAT, "path": "/v1/models"}, 405),
        ({"json": CHAT | {"max_tokens": 0}}, 400),
        ({"json": {"messages": 3}}, 400),
        ({"json": CHAT | {"priority": 1}}, 400),
    ],
)
def test_bad_requests_get_an_error_in_openais_shape(
    sim_stack: Stack, options: dict[str, object], status: int
) -> None:
    response = _post(sim_stack, **options)  # type: ignore[arg-type]
    assert response.status_code == status
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]


@pytest.mark.parametrize("method", ["GET", "PUT", "PATCH", "DELETE", "TRACE", "BREW"])
def test_an_unknown_method_gets_those_that_are_allowed(sim_stack: Stack, method: str) -> None:
    url = f"{sim_stack.url}/v1/chat/completions"
    response = requests.request(method, url, json=CHAT, timeout=20)
    assert response.status_code == 405
    assert set(response.headers["allow"].split(", ")) == {"OPTIONS", "POST"}
    assert response.json()["error"]["code"] == "method_not_allowed"


@pytest.mark.parametrize(
    ("request_line", "status"),
    [
        ("GET /" + "x" * 5000 + " HTTP/1.1", 414),
        ("GET /version HTTP/1.1\r\nA header: 1", 400),
        ("GET /version HTTP/1.1\r\nA: " + "x" * 9000, 431),
        ("GET /version HTTP/9", 400),
        ("{", 400),
    ],
)
def test_what_is_not_http_is_refused_in_openais_shape(
    sim_stack: Stack, request_line: str, status: int
) -> None:
    with socket.create_connection(("127.0.0.1", sim_stack.api_ports[0]), timeout=20) as client:
        client.sendall(f"{request_line}\r\nHost: localhost\r\n\r\n".encode())
        head, _, body = client.makefile("rb").read().partition(b"\r\n\r\n")
    assert head.startswith(f"HTTP/1.1 {status} ".encode())
    assert b"Content-Type: application/json" in head
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"


def test_an_engines_refusal_of_a_stream_keeps_its_status(sim_stack: Stack) -> None:
    response = _post(sim_stack, json=CHAT | {"stream": True, "max_tokens": -1})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "max_tokens"


def test_a_chat_model_refuses_embeddings_in_openais_shape(sim_stack: Stack) -> None:
    with _client(sim_stack) as client, pytest.raises(openai.NotFoundError) as refused:
        client.embeddings.create(model="gpt-3.5-turbo", input="Hello")
    error = {
        "message": "sim has no /v1/embeddings; choose another model of /v1/models.",
        "type": "not_found_error",
        "param": "model",
        "code": "endpoint_not_supported",
    }
    assert refused.value.body == error
    wait = {"Prefer": "respond-async, wait=20"}
    job = _post(sim_stack, "/v1/embeddings", json={"input": "Hello"}, headers=wait).json()
    assert (job["status"], job["error"]) == ("failed", error)
    assert job["response"] == {"status_code": 404, "body": {"error": error}}


def test_a_request_that_was_cancelled_is_not_to_be_sent_again(sim_stack: Stack) -> None:
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(_post, sim_stack, json=CHAT | {"sim": {"failure": "hang"}})
        (worker,) = sim_stack.workers
        await_that(lambda: sim_stack.jobs_of(worker))
        (job_id,) = sim_stack.jobs_of(worker)
        assert _post(sim_stack, f"/v1/jobs/{job_id}/cancel").ok
        answer = asked.result()
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "job_cancelled")
    assert answer.headers["x-should-retry"] == "false"
    assert answer.headers["x-sluice-job"] == job_id


def test_health_and_version(sim_stack: Stack) -> None:
    def get(path: str) -> requests.Response:
        return requests.get(sim_stack.url + path, timeout=5)

    assert get("/health/live").json() == {"status": "ok", "streams": 0}
    assert get("/health/ready").json() == {"status": "ok", "workers": 1}
    assert get("/health").status_code == get("/ping").status_code == 200
    assert get("/load").json() == {"server_load": 0}
    assert get("/version").json()["version"]
