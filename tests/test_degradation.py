"""What a busy model gives: shorter answers, and 503 for keys of less weight first."""

from collections.abc import Iterator
from typing import Any

import pytest
import requests

from bench.stack import Stack, await_that, running
from db import migrate
from tasks.contract import keys
from tasks.contract.access import KeySpec, TenantSpec
from tasks.maintenance import api_keys
from tests.conftest import SIM
from tests.test_jobs import CHAT, ENDPOINT
from tests.test_keys import ask, code, submit

MOST_JOBS = 20
BUSY = SIM | {"degradation": {"cap_at": 0.2, "shed_at": 0.5}}


@pytest.fixture
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    stack = Stack(tmp_path_factory.mktemp("busy"), [BUSY], max_backlog=MOST_JOBS, keep_alive_s=1)
    migrate(stack.database_url)
    api_keys.set_tenant(stack.database_url, "acme", TenantSpec())
    api_keys.create(stack.database_url, KeySpec(name="first", tenant="acme"))
    with running(stack) as stack:
        yield stack


def make(stack: Stack, weight: float, **limits: int) -> str:
    terms = {"name": "test", "tenant": "acme", "weight": weight, "limits": limits}
    return str(api_keys.create(stack.database_url, KeySpec.model_validate(terms))["key"])


def submit_for_a_moment(stack: Stack, key: str, **options: Any) -> requests.Response:
    """Asks, but leaves no job behind that would fill the backlog."""
    answer = submit(stack, key, priority="interactive", **options)
    if answer.status_code == 202:
        cancelled = ask(stack, key, "POST", f"/v1/jobs/{answer.json()['id']}/cancel")
        # A worker may have answered it meanwhile.
        assert cancelled.status_code == 200 or code(cancelled) == (409, "conflict")
    return answer


def test_a_model_gives_less_and_less_before_its_backlog_is_full(stack: Stack) -> None:
    light, usual, heavy = (make(stack, weight) for weight in (0.5, 1, 2))
    capped = make(stack, 1, tokens_when_busy=3)
    stack.redis.sadd(keys.PAUSED, "sim")

    def wait_with(jobs: int) -> None:
        while stack.redis.zcard(keys.backlog("sim", "interactive")) < jobs:
            assert submit(stack, heavy, priority="interactive").status_code == 202

    def answered(key: str) -> int:
        return submit_for_a_moment(stack, key).status_code

    wait_with(5)

    def is_told() -> bool:
        answer = submit_for_a_moment(stack, capped, body=CHAT | {"max_tokens": 50})
        return "x-sluice-degraded" in answer.headers

    await_that(is_told, 20)
    wait_with(10)
    await_that(lambda: answered(light) == 503, 20)
    refused = submit_for_a_moment(stack, light)
    assert code(refused) == (503, "shed")
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert answered(usual) == 202
    wait_with(16)
    await_that(lambda: answered(usual) == 503, 20)
    assert answered(heavy) == 202
    stack.redis.srem(keys.PAUSED, "sim")
    # Then all is well again, and answers are as long as they were.
    await_that(lambda: answered(light) == 202, 60)
    await_that(lambda: not is_told(), 60)
    whole = ask(stack, capped, "POST", ENDPOINT, json=CHAT | {"max_tokens": 50})
    assert whole.json()["usage"]["completion_tokens"] == 50
