"""Limits as clients see them: 429 and how long to wait, headers, and what a key may not ask."""

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from bench.stack import Stack, await_that, running
from db import migrate
from tasks.contract.access import KeySpec, TenantSpec
from tasks.maintenance import api_keys
from tests.conftest import SIM
from tests.test_jobs import CHAT, ENDPOINT, LONG
from tests.test_keys import ask, client, code, submit


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    stack = Stack(tmp_path_factory.mktemp("quotas"), [SIM], keep_alive_s=1)
    migrate(stack.database_url)
    api_keys.set_tenant(stack.database_url, "acme", TenantSpec())
    api_keys.create(stack.database_url, KeySpec(name="first", tenant="acme"))
    with running(stack) as stack:
        yield stack


def make(stack: Stack, **limits: int) -> str:
    spec = KeySpec.model_validate({"name": "test", "tenant": "acme", "limits": limits})
    return str(api_keys.create(stack.database_url, spec)["key"])


def test_the_sdk_is_told_what_is_left_and_how_long_to_wait(stack: Stack) -> None:
    key = make(stack, requests_per_minute=2, tokens_per_minute=100_000)
    messages: Any = CHAT["messages"]
    with client(stack, key) as sdk:
        for left in ("1", "0"):
            answer = sdk.chat.completions.with_raw_response.create(model="sim", messages=messages)
            assert answer.headers["x-ratelimit-limit-requests"] == "2"
            assert answer.headers["x-ratelimit-remaining-requests"] == left
            assert int(answer.headers["x-ratelimit-remaining-tokens"]) < 100_000
            assert answer.headers["x-ratelimit-reset-tokens"].endswith("s")
        with pytest.raises(openai.RateLimitError, match="2 requests per minute") as refused:
            sdk.chat.completions.create(model="sim", messages=messages)
    assert 1 <= int(refused.value.response.headers["retry-after"]) <= 120
    assert refused.value.code == "rate_limit_exceeded"


def test_jobs_in_the_background_have_the_same_limits(stack: Stack) -> None:
    key = make(stack, requests_per_minute=1)
    accepted = submit(stack, key, body=CHAT)
    assert accepted.status_code == 202
    assert accepted.headers["x-ratelimit-remaining-requests"] == "0"
    assert code(submit(stack, key, body=CHAT)) == (429, "rate_limit_exceeded")


def test_as_many_requests_at_once_as_the_key_may(stack: Stack) -> None:
    key = make(stack, parallel_requests=1)
    with ask(stack, key, "POST", ENDPOINT, json=LONG | {"stream": True}, stream=True) as first:
        assert first.ok
        refused = ask(stack, key, "POST", ENDPOINT, json=CHAT)
        assert "1 requests at once" in refused.json()["error"]["message"]
    await_that(lambda: ask(stack, key, "POST", ENDPOINT, json=CHAT).ok, 20)


@pytest.mark.parametrize(
    ("limit", "asked", "param"),
    [
        ({"tokens_per_answer": 10}, {"max_tokens": 11}, "max_tokens"),
        ({"tokens_per_answer": 10}, {"max_completion_tokens": 2**70}, "max_completion_tokens"),
        ({"tokens_per_answer": 10}, {"max_tokens": "11"}, "max_tokens"),
        ({"tokens_per_answer": 10}, {"max_tokens": "many"}, "max_tokens"),
        ({"tokens_per_day": 9000}, {"use_beam_search": True}, "max_tokens"),
        ({"sequences_per_request": 2}, {"n": 3}, "n"),
        ({"sequences_per_request": 2}, {"n": "3"}, "n"),
        ({"logprobs_per_token": 2}, {"logprobs": True, "top_logprobs": 3}, "top_logprobs"),
        ({"logprobs_per_token": 2}, {"prompt_logprobs": -1}, "prompt_logprobs"),
        ({}, {"priority": -5}, "priority"),
        ({}, {"cache_salt": "another tenant's"}, "cache_salt"),
    ],
)
def test_more_than_the_key_may_ask_of_the_engine_is_refused(
    stack: Stack, limit: dict[str, int], asked: dict[str, Any], param: str
) -> None:
    body = {"messages": CHAT["messages"]} | asked
    refused = ask(stack, make(stack, **limit), "POST", ENDPOINT, json=body)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == param


def test_an_answer_is_as_long_as_the_key_allows(stack: Stack) -> None:
    key = make(stack, tokens_per_answer=7)
    answer = ask(stack, key, "POST", ENDPOINT, json={"messages": CHAT["messages"]}).json()
    assert answer["usage"]["completion_tokens"] == 7
    assert answer["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    "asked",
    [
        {"max_tokens": None, "max_completion_tokens": 1},
        {"max_completion_tokens": 1},
    ],
)
def test_a_field_that_the_engine_does_not_know_limits_nothing(
    stack: Stack, asked: dict[str, Any]
) -> None:
    key = make(stack, tokens_per_answer=7)
    body = {"prompt": "Hello"} | asked
    answer = ask(stack, key, "POST", "/v1/completions", json=body).json()
    assert answer["usage"]["completion_tokens"] == 7
    many = body | {"max_tokens": 8}
    assert ask(stack, key, "POST", "/v1/completions", json=many).status_code == 400


def test_a_list_of_prompts_counts_as_so_many_sequences(stack: Stack) -> None:
    key = make(stack, sequences_per_request=2)
    body = {"prompt": ["a", "b", "c"], "max_tokens": 1}
    assert ask(stack, key, "POST", "/v1/completions", json=body).status_code == 400
    assert ask(stack, key, "POST", "/v1/completions", json=body | {"prompt": ["a", "b"]}).ok


def test_a_job_that_is_retried_has_the_limits_of_who_retries_it(stack: Stack) -> None:
    many = make(stack)
    body = CHAT | {"max_tokens": 100, "sim": {"failure": "error"}}
    failed = submit(stack, many, body=body).json()["id"]
    path = f"/v1/jobs/{failed}"
    await_that(lambda: ask(stack, many, "GET", path).json()["status"] == "failed", 30)
    few = make(stack, tokens_per_answer=10)
    assert ask(stack, few, "POST", f"{path}/retry").status_code == 400
    assert ask(stack, many, "POST", f"{path}/retry").status_code == 202


def test_a_request_has_no_more_bytes_than_the_key_may_send(stack: Stack) -> None:
    key = make(stack, bytes_per_request=100)
    body = {"messages": [{"role": "user", "content": "x" * 100}]}
    assert "100" in ask(stack, key, "POST", ENDPOINT, json=body).json()["error"]["message"]
