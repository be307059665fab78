"""Sluice answers as vLLM's own server does: same status, same content type, same text.

Both run the same model with the same arguments; a request goes to one, then to the other.
"""

import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import requests

from bench.stack import Stack
from tests.parity_cases import CASES, CHAT, TEXT

# The load of two engines counts for the first test.
pytestmark = pytest.mark.timeout(1500)
# The first structured output compiles a kernel, which on a new machine takes a minute and more.
TIMEOUT_S = 240
# What differs from one request to the next on one server, too.
VARYING = [
    (re.compile(r'"id":"(chatcmpl|cmpl)-[^"]*"'), r'"id":"\1-ID"'),
    (re.compile(r'"id":"(chatcmpl-tool-|call_)[^"]*"'), r'"id":"\1ID"'),
    (re.compile(r'"created":\d+'), '"created":0'),
    (re.compile(r'"system_fingerprint":"[^"]*"'), '"system_fingerprint":"F"'),
]
GROWING = {"content", "text", "token_ids"}
GROWING |= {"tokens", "token_logprobs", "top_logprobs", "text_offset"}


class Answer(NamedTuple):
    """What a client sees of an answer; for a stream, free of where its chunks were cut."""

    status: int
    content_type: str | None
    content: Any
    shapes: set[str]
    """Of the chunks that carry nothing but tokens."""


def _read(response: requests.Response) -> Answer:
    content_type = response.headers.get("content-type")
    text = response.content.decode()
    for pattern, constant in VARYING:
        text = pattern.sub(constant, text)
    if not (content_type or "").startswith("text/event-stream"):
        return Answer(response.status_code, content_type, text, set())
    content, shapes = _join(text.replace(": keep-alive\n\n", ""))
    return Answer(response.status_code, content_type, content, shapes)


def _join(text: str) -> tuple[dict[str, Any], set[str]]:
    """The stream with the texts of its tokens joined.

    When the server is slow to take tokens from the engine, vLLM puts two of them in one chunk, or
    the last one in the chunk that finishes; and it sends the chunks of several choices as they
    come. So neither is the same twice, even on one server. The rest must agree: the framing, which
    chunks begin and end each choice, all their fields in their order, and the whole text.
    """
    frames = text.split("\n\n")
    others = [frame for frame in frames if not frame.startswith("data: {")]
    order: dict[int, list[str]] = {}
    joined: dict[str, Any] = {}
    shapes = set()
    for frame in frames:
        if not frame.startswith("data: {"):
            continue
        chunk = json.loads(frame.removeprefix("data: "))
        (choice,) = chunk.get("choices") or [{"index": -1}]
        delta = choice.get("delta", choice)
        for path, tokens in _take_tokens(chunk, choice, delta):
            joined[path] = joined.get(path, type(tokens)()) + tokens
        if choice["index"] >= 0 and choice["finish_reason"] is None and "role" not in delta:
            shapes.add(json.dumps(chunk))
        else:
            order.setdefault(choice["index"], []).append(json.dumps(chunk))
    joined = {path: tokens for path, tokens in joined.items() if tokens}
    return {"order": order, "joined": joined, "others": others}, shapes


def _take_tokens(chunk: Any, choice: Any, delta: Any) -> Iterator[tuple[str, Any]]:
    """Takes out of a chunk what depends on how many tokens are in it."""
    index = choice["index"]
    if index >= 0 and chunk.get("usage"):
        chunk["usage"] = "..."  # it counts up; the last chunk, without a choice, has the sum
    for call in delta.pop("tool_calls", None) or []:
        path = f"{index}.call{call['index']}"
        yield f"{path}.arguments", call["function"].pop("arguments", None) or ""
        if "id" in call:
            yield path, [call]
    for holder in (choice, delta, choice.get("logprobs") or {}):
        for field in GROWING & holder.keys():
            if isinstance(holder[field], str | list):
                yield f"{index}.{field}.{holder is delta}", holder.pop(field)
    if delta.get("content", "") is None:  # in a last chunk that holds no part of a tool call
        del delta["content"]


def _post(url: str, path: str, body: object) -> Answer:
    data, headers = json.dumps(body), {"content-type": "application/json"}
    return _read(requests.post(url + path, data=data, headers=headers, timeout=TIMEOUT_S))


@pytest.mark.parametrize("name", CASES)
def test_answers_as_vllm_does(name: str, vllm_stack: Stack, vllm_server: str) -> None:
    path, body = CASES[name]
    ours, theirs = _post(vllm_stack.url, path, body), _post(vllm_server, path, body)
    assert ours[:3] == theirs[:3]
    # Of a short answer all may be in its last chunk; of an echo, in its first chunk too.
    if isinstance(body, dict) and body.get("echo"):
        assert ours.shapes <= theirs.shapes or theirs.shapes <= ours.shapes
    else:
        assert ours.shapes == theirs.shapes or not (ours.shapes and theirs.shapes)


JSON = "application/json"
GREETING = b'{"messages": [{"role": "user", "content": "Hello"}]}'
# vLLM answers these in three shapes, of which only one has an `error` that OpenAI's clients can
# read; Sluice always has it, and the same status. Only the embeddings are sent to a worker.
REFUSED: dict[str, tuple[str, str, str | None, bytes]] = {
    "cut-off": ("POST", CHAT, JSON, b'{"messages": ['),
    "no-utf8": ("POST", CHAT, JSON, b'{"model": "\xff"}'),
    "half-surrogate": ("POST", CHAT, JSON, GREETING.replace(b"Hello", rb"\ud83d")),
    "not-a-number": ("POST", CHAT, JSON, GREETING[:-1] + b', "temperature": NaN}'),
    "too-deep": ("POST", CHAT, JSON, b'{"messages": ' + b"[" * 5000 + b"]" * 5000 + b"}"),
    "empty": ("POST", CHAT, JSON, b""),
    "empty-text": ("POST", TEXT, JSON, b""),
    "text-plain": ("POST", CHAT, "text/plain", GREETING),
    "form": ("POST", TEXT, "application/x-www-form-urlencoded", b"prompt=Hello"),
    "no-type": ("POST", CHAT, None, GREETING),
    "unknown-route": ("POST", "/v1/no/such/route", JSON, GREETING),
    "unknown-route-get": ("GET", "/nothing", None, b""),
    "get-chat": ("GET", CHAT, None, b""),
    "delete-text": ("DELETE", TEXT, None, b""),
    "post-models": ("POST", "/v1/models", JSON, b"{}"),
    "embeddings": ("POST", "/v1/embeddings", JSON, b'{"input": "Hello"}'),
    "embeddings-alias": ("POST", "/v1/embeddings", JSON, b'{"model": "llama-3", "input": ["a"]}'),
    "unknown-model": ("GET", "/v1/models/no-such-model", None, b""),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_with_vllms_status(name: str, vllm_stack: Stack, vllm_server: str) -> None:
    method, path, content_type, body = REFUSED[name]

    def ask(url: str) -> requests.Response:
        headers = {"content-type": content_type} if content_type else {}
        return requests.request(method, url + path, data=body, headers=headers, timeout=TIMEOUT_S)

    ours, theirs = ask(vllm_stack.url), ask(vllm_server)
    assert ours.status_code == theirs.status_code
    assert ours.headers["content-type"] == theirs.headers["content-type"]
    error = ours.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]


def test_lists_the_models_that_vllm_lists(vllm_stack: Stack, vllm_server: str) -> None:
    def read(url: str) -> tuple[str, list[tuple[str, str, str]]]:
        models = requests.get(f"{url}/v1/models", timeout=TIMEOUT_S).json()
        cards = [(card["id"], card["object"], card["owned_by"]) for card in models["data"]]
        return models["object"], cards

    # vLLM has a path of its machine and fields of its own, which the API does not know.
    assert read(vllm_stack.url) == read(vllm_server)


def test_gives_each_model_of_the_list(vllm_stack: Stack) -> None:
    """As OpenAI does; vLLM's server has no such route."""
    models = requests.get(f"{vllm_stack.url}/v1/models", timeout=TIMEOUT_S).json()["data"]
    for model in models:
        url = f"{vllm_stack.url}/v1/models/{model['id']}"
        assert requests.get(url, timeout=TIMEOUT_S).json() == model
