"""What users may ask an engine for, and how much of it."""

from collections.abc import Iterator
from typing import Any

import pytest

from bench.stack import Stack, running
from tests.conftest import SIM
from tests.test_jobs import CHAT, call

MOST_BYTES = 2000
OPEN = {
    **SIM,
    "name": "open",
    "aliases": [],
    "allow": ["vllm_xargs"],
    "args": {"allowed-media-domains": ["pictures.example.com"]},
}


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    home = tmp_path_factory.mktemp("limits")
    with running(Stack(home, [SIM, OPEN], max_schema_bytes=MOST_BYTES), workers=0) as stack:
        yield stack


def schema(length: int) -> dict[str, Any]:
    return {"type": "object", "description": "x" * length}


def picture(url: str) -> dict[str, Any]:
    part = {"type": "image_url", "image_url": {"url": url}}
    return {"messages": [{"role": "user", "content": [part]}]}


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    **{
        name: ("chat/completions", CHAT | {name: {"a": 1}}, name)
        for name in ("kv_transfer_params", "ec_transfer_params", "vllm_xargs")
    },
    "mm_processor_kwargs": (
        "completions",
        {"prompt": "a", "mm_processor_kwargs": {}},
        "mm_processor_kwargs",
    ),
    "media_io_kwargs": ("chat/completions", CHAT | {"media_io_kwargs": {}}, "media_io_kwargs"),
    "a large schema": (
        "chat/completions",
        CHAT | {"response_format": {"type": "json_schema", "json_schema": schema(MOST_BYTES)}},
        "response_format",
    ),
    "a large grammar": (
        "completions",
        {"prompt": "a", "structured_outputs": {"grammar": "x" * MOST_BYTES}},
        "structured_outputs",
    ),
    "many tools": (
        "chat/completions",
        CHAT
        | {
            "tools": [{"type": "function", "function": {"name": "f", "parameters": schema(200)}}]
            * 9
        },
        "tools",
    ),
    "many token ids": ("completions", {"prompt": [1] * 1_000_001}, "prompt"),
    "many token ids in parts": ("embeddings", {"input": [[1] * 500_001] * 2}, "input"),
    **{
        f"many {name}": ("completions", {"prompt": "a", name: [1] * 1_000_001}, name)
        for name in ("stop_token_ids", "allowed_token_ids", "logprob_token_ids")
    },
    "a picture elsewhere": ("chat/completions", picture("http://127.0.0.1/x.png"), "messages"),
    "a file": ("chat/completions", picture(" FILE:///etc/passwd"), "messages"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_business_of_users_is_refused(stack: Stack, name: str) -> None:
    path, body, param = REFUSED[name]
    job = {"endpoint": f"/v1/{path}", "body": body}
    for url, sent in ((f"/v1/{path}", body), ("/v1/jobs", job)):
        refused = call(stack, "POST", url, json=sent)
        assert refused.status_code == 400, refused.text
        assert refused.json()["error"]["param"] == param


@pytest.mark.parametrize(
    "body",
    [
        CHAT | {"kv_transfer_params": None},
        CHAT | {"response_format": {"type": "json_schema", "json_schema": schema(100)}},
        CHAT | picture("data:image/png;base64,AAAA"),
        CHAT | {"model": "open", "vllm_xargs": {"a": 1}},
        CHAT | {"model": "open"} | picture("https://pictures.example.com/x.png"),
    ],
)
def test_what_is_theirs_is_accepted(stack: Stack, body: dict[str, Any]) -> None:
    asked = {"prefer": "respond-async"}
    accepted = call(stack, "POST", "/v1/chat/completions", json=body, headers=asked)
    assert accepted.status_code == 202
