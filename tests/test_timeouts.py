"""Jobs that take too long: each has a clear error, and frees its slot in the engine."""

import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from bench.stack import Stack, await_that, running, slack
from tasks.contract import keys
from tasks.queue.control import workers
from tests.conftest import SIM
from tests.test_jobs import CHAT, ENDPOINT, call, submit, wait

STREAM = CHAT | {"stream": True}
SLOW = {"tokens-per-s": 2, "first-token-s": 0}
HANGS: dict[str, Any] = {"sim": {"failure": "hang"}}


def model(name: str, args: dict[str, Any], **timeouts: float) -> dict[str, Any]:
    return SIM | {"name": name, "aliases": [], "args": args, "timeouts": timeouts}


MODELS = [
    model("total", SLOW, total_s=3),
    model("first", SLOW | {"first-token-s": 30}, first_token_s=0.5),
    model("next", {"tokens-per-s": 50, "first-token-s": 0}, between_tokens_s=1),
    model("queue", SLOW, queue_s=3),
]


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    home = tmp_path_factory.mktemp("timeouts")
    with running(Stack(home, MODELS, keep_alive_s=1)) as stack:
        yield stack


def is_free(stack: Stack) -> bool:
    return all(worker.running + worker.waiting == 0 for worker in workers(stack.redis))


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize(
    ("name", "body", "code"),
    [
        ("total", {"max_tokens": 1000}, "job_timeout"),
        ("first", {}, "first_token_timeout"),
        ("next", HANGS, "next_token_timeout"),
    ],
)
def test_what_is_late_ends_with_its_own_error(
    stack: Stack, name: str, body: dict[str, Any], code: str, is_streamed: bool
) -> None:
    begun_s = time.monotonic()
    answer = call(
        stack, "POST", ENDPOINT, json=CHAT | body | {"model": name, "stream": is_streamed}
    )
    assert time.monotonic() - begun_s < slack(5)
    assert f'"code":"{code}"' in answer.text.replace(" ", "")
    if not is_streamed:
        assert answer.status_code == 504
    await_that(lambda: is_free(stack), 10)


def test_what_nobody_begins_in_time_expires(stack: Stack) -> None:
    stack.redis.sadd(keys.PAUSED, "queue")
    try:
        answer = call(stack, "POST", ENDPOINT, json=CHAT | {"model": "queue"})
    finally:
        stack.redis.srem(keys.PAUSED, "queue")
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "job_expired")


def test_a_request_may_have_a_shorter_time_than_the_model(stack: Stack) -> None:
    """Here through OpenAI's SDK."""
    client = openai.OpenAI(base_url=f"{stack.url}/v1", api_key="-", max_retries=0)
    begun_s = time.monotonic()
    with pytest.raises(openai.InternalServerError, match="within 3 s") as late:
        client.chat.completions.create(
            model="queue",
            messages=[{"role": "user", "content": "Hello"}],
            max_tokens=1000,
            extra_headers={"x-sluice-timeout": "3"},
        )
    assert late.value.code == "job_timeout"
    assert time.monotonic() - begun_s < 3 + slack(2.7)


def test_a_job_in_the_background_has_its_time_from_its_acceptance(stack: Stack) -> None:
    body = CHAT | {"model": "queue", "max_tokens": 1000}
    job = wait(stack, submit(stack, body, timeout_s=3)["id"]).json()
    assert (job["status"], job["error"]["code"]) == ("failed", "job_timeout")


def test_a_job_that_is_in_time_is_not_touched(stack: Stack) -> None:
    answer = call(stack, "POST", ENDPOINT, json=CHAT | {"model": "next", "max_tokens": 100})
    assert answer.status_code == 200


@pytest.mark.parametrize("given", ["0", "-1", "nan", "inf", "1e3", "5 s", "9" * 12, ""])
def test_a_timeout_that_is_none_is_refused(stack: Stack, given: str) -> None:
    refused = call(stack, "POST", ENDPOINT, json=CHAT, headers={"x-sluice-timeout": given})
    assert refused.status_code == 400
    assert "x-sluice-timeout is a number of seconds" in refused.text
