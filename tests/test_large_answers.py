"""An answer that is too large fails alone: its engine is freed, and others go on."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import redis

from bench.stack import Stack, await_that, running
from gpu_worker.engines.engine import (
    Engine,
    Load,
    Message,
    Receive,
    Send,
    answer_unless_left,
    read_body,
)
from gpu_worker.publisher import Publisher
from gpu_worker.runner import Runner
from gpu_worker.running import History
from tasks.contract import keys
from tasks.contract.connections import connect_async
from tasks.contract.events import End
from tasks.contract.job import Claim, Job, State
from tasks.contract.models import Timeouts
from tasks.contract.settings import get_settings
from tasks.queue.control import workers
from tasks.queue.token_log import TokenLog
from tests.conftest import SIM
from tests.test_jobs import CHAT, ENDPOINT, call, events, get, submit, wait
from tests.test_metrics import Metrics

MOST_BYTES = 20_000
# A whole answer of more than that within a second; a stream that would go on for minutes.
LARGE = CHAT | {"n": 10, "max_tokens": 400}
LONG = CHAT | {"stream": True, "max_tokens": 100_000}


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    model = SIM | {"args": {"tokens-per-s": 500, "first-token-s": 0}}
    home = tmp_path_factory.mktemp("large")
    with running(Stack(home, [model], max_answer_bytes=MOST_BYTES, keep_alive_s=1)) as stack:
        yield stack


def in_engine(stack: Stack) -> int:
    (worker,) = workers(stack.redis)
    return worker.running + worker.waiting


def check_failed(stack: Stack, job_id: str) -> None:
    """The job has ended so, at its first attempt, and nothing of it is left in the engine."""
    job = wait(stack, job_id).json()
    assert (job["status"], job["attempts"]) == ("failed", 1)
    check_error(job["error"])
    # As the worker's next heartbeat tells.
    await_that(lambda: in_engine(stack) == 0)


def check_error(error: dict[str, Any]) -> None:
    assert (error["type"], error["code"]) == ("server_error", "answer_too_large")
    assert f"{MOST_BYTES:,} bytes" in error["message"]
    assert "SLUICE_MAX_ANSWER_BYTES" in error["message"]


def test_a_whole_answer_that_is_too_large_is_an_error_that_is_not_tried_again(stack: Stack) -> None:
    refused = call(stack, "POST", ENDPOINT, json=LARGE)
    assert refused.status_code == 500
    assert refused.headers["x-should-retry"] == "false"
    check_error(refused.json()["error"])
    check_failed(stack, refused.headers["x-sluice-job"])


def test_a_stream_that_gets_too_large_ends_with_an_error_event(stack: Stack) -> None:
    cut = call(stack, "POST", ENDPOINT, json=LONG)
    *sent, error, done = cut.text.removesuffix("\n\n").split("\n\n")
    assert done == "data: [DONE]"
    check_error(json.loads(error.removeprefix("data: "))["error"])
    size = sum(len(event) + 2 for event in sent)
    assert MOST_BYTES - 300 < size <= MOST_BYTES
    check_failed(stack, cut.headers["x-sluice-job"])


def test_other_jobs_do_not_notice(stack: Stack) -> None:
    small = CHAT | {"max_tokens": 80, "stream": True}
    expected = get_text(stack, submit(stack, small)["id"])
    large = [submit(stack, body)["id"] for body in (LARGE, LONG)]
    others = [submit(stack, small)["id"] for _ in range(4)]
    for job_id in others:
        assert get_text(stack, job_id) == expected
    for job_id in large:
        check_failed(stack, job_id)


def get_text(stack: Stack, job_id: str) -> str:
    assert "[DONE]" in events(stack, job_id)
    await_that(lambda: get(stack, job_id)["status"] == "completed")
    return str(get(stack, job_id)["response"]["body"]["choices"][0]["message"]["content"])


class Endless:
    """An engine that sends a body in pieces, and never ends it."""

    server = None

    def __init__(self) -> None:
        self.running = 0

    def load(self) -> Load:
        return Load(self.running, 0)

    def is_dead(self) -> bool:
        return False

    def progress(self) -> int | None:
        return None

    async def app(self, _scope: Message, receive: Receive, send: Send) -> None:
        await read_body(receive)
        self.running += 1
        try:
            await answer_unless_left(receive, self._answer(send))
        finally:
            self.running -= 1

    async def _answer(self, send: Send) -> None:
        headers = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        while True:
            await send({"type": "http.response.body", "body": b"x" * 1000, "more_body": True})
            await asyncio.sleep(0)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def publisher(server: Stack, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Publisher]:
    monkeypatch.setenv("SLUICE_MAX_ANSWER_BYTES", str(MOST_BYTES))
    get_settings.cache_clear()
    bus = connect_async(f"redis://127.0.0.1:{server.redis_port}/0")
    publisher = Publisher(bus, lambda _attempt: None)
    task = asyncio.ensure_future(publisher.run())
    yield publisher
    task.cancel()
    await bus.aclose()
    get_settings.cache_clear()


@pytest.mark.anyio
async def test_a_whole_answer_without_end_is_not_collected_any_further(
    bus: redis.Redis, publisher: Publisher
) -> None:
    engine: Engine = Endless()
    claim = Claim(Job("job_1", "m", ENDPOINT, b"{}"), 1, 0, 0, 3)
    runner = Runner(engine, publisher, lambda _claim: None, Timeouts())
    ended = await asyncio.wait_for(runner.run(claim, History()), 60)
    assert ended
    assert (ended.state, ended.usage) == (State.FAILED, None)
    assert engine.load().running == 0
    (end,) = TokenLog(bus).read_after("job_1")
    check_error(End.decode(end.data).error["error"])
    assert bus.ttl(keys.log("job_1")) == -1


@pytest.fixture
def narrow_stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Its Redis does not take what SLUICE_MAX_ANSWER_BYTES allows."""
    model = SIM | {"slots": 3000, "args": {"tokens-per-s": 50, "first-token-s": 0}}
    stack = Stack(tmp_path_factory.mktemp("narrow"), [model], keep_alive_s=1)
    with running(stack) as stack:
        stack.redis.config_set("proto-max-bulk-len", 2**20)
        yield stack


def test_a_job_whose_answer_redis_does_not_take_becomes_a_dead_letter(narrow_stack: Stack) -> None:
    stack = narrow_stack
    long = CHAT | {"stream": True, "max_tokens": 400}
    others = [submit(stack, long)["id"] for _ in range(4)]
    before = stack.redis.xlen(keys.log(others[0]))
    large_id = submit(stack, CHAT | {"n": 2500, "max_tokens": 50}, priority="interactive")["id"]
    ended = wait(stack, large_id).json()
    # The others have gone on meanwhile: by half as many tokens as its three attempts have made.
    assert stack.redis.xlen(keys.log(others[0])) - before > 3 * 50 / 2
    assert (ended["status"], ended["attempts"]) == ("failed", 3)
    assert ended["error"]["code"] == "job_failed"
    admin = {"Authorization": "Bearer admin"}
    dead = lambda: call(stack, "GET", f"/v1/admin/dead/{large_id}", headers=admin)
    await_that(lambda: dead().status_code == 200)  # SQL is told a little later
    reasons = [each["reason"] for each in dead().json()["reasons"]]
    assert reasons == ["Redis does not take what it has answered"] * 3
    counted = Metrics(f"{stack.url}/metrics")
    assert counted.total("sluice_requeues_total", cause="log_refused") == 3
    for job_id in others:
        await_that(lambda job_id=job_id: get(stack, job_id)["status"] == "completed")
        assert get(stack, job_id)["attempts"] == 1
    await_that(lambda: in_engine(stack) == 0)
    assert len(stack.workers) == 1
