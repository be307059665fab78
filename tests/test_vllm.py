"""The real engine behind the whole path: what only vLLM can show."""

import asyncio
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import psutil
import pytest
import requests

from gpu_worker.demo.texts import read
from tasks import keys
from tasks.models import Model
from tests.stack import Process, Stack, await_that, running, send

# The load of an engine counts for the first test that needs it.
pytestmark = pytest.mark.timeout(300)

LONG = {
    "messages": [{"role": "user", "content": "Tell me a long story about a queue"}],
    "max_tokens": 1500,
    "ignore_eos": True,
    "temperature": 0,
}
ANSWERED_AT_LEAST = 25


def _client(stack: Stack) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{stack.url}/v1", api_key="none", max_retries=0)


def _load(stack: Stack) -> int:
    """Requests in the engine's batch, as vLLM's own metric counts them."""
    beats = [stack.redis.hget(key, "running") for key in stack.redis.keys(keys.worker("*"))]
    return sum(int(beat) for beat in beats if beat)


def test_the_sdk_streams_chat_and_completions(vllm_stack: Stack) -> None:
    client = _client(vllm_stack)
    chat = client.chat.completions.create(
        model="gpt-3.5-turbo",
        messages=[{"role": "user", "content": "Hello"}],
        stream=True,
        temperature=0,
    )
    assert len("".join(chunk.choices[0].delta.content or "" for chunk in chat)) > 5
    text = client.completions.create(
        model="llama-3", prompt="Sluice is", max_tokens=10, stream=True, temperature=0
    )
    assert len([chunk.choices[0].text for chunk in text]) > 2


def test_the_asynchronous_sdk_streams(vllm_stack: Stack) -> None:
    async def ask() -> str:
        async with openai.AsyncOpenAI(base_url=f"{vllm_stack.url}/v1", api_key="none") as client:
            stream = await client.chat.completions.create(
                model="sluice-demo", messages=[{"role": "user", "content": "Hello"}], stream=True
            )
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    assert asyncio.run(ask())


def _is_answered(stack: Stack, item: dict[str, object]) -> bool:
    answer = _client(stack).chat.completions.create(
        model="sluice-demo",
        messages=[{"role": "user", "content": str(item["ask"])}],
        temperature=0,
        max_tokens=80,
    )
    said = (answer.choices[0].message.content or "").lower()
    return any(word.lower() in said for word in item["expect"])  # type: ignore[attr-defined]


def test_the_demo_model_answers_questions_that_it_was_not_trained_on(vllm_stack: Stack) -> None:
    with ThreadPoolExecutor(16) as clients:
        questions = read("questions.yaml")
        right = sum(clients.map(lambda item: _is_answered(vllm_stack, item), questions))
    assert right >= ANSWERED_AT_LEAST
    greeting = {"ask": "Hello", "expect": ["hello", "hi"]}
    assert _is_answered(vllm_stack, greeting)


def test_64_streams_share_one_engine_and_leaving_frees_it(vllm_stack: Stack) -> None:
    clients = [send(vllm_stack, LONG | {"stream": True}) for _ in range(64)]
    seen = set()

    def all_run() -> bool:
        seen.add((_load(vllm_stack), vllm_stack.redis.zcard(keys.LEASES)))
        return any(load == 64 for load, _ in seen)

    try:
        await_that(all_run, 120, lambda: f"loads and leases {seen}: {vllm_stack.logs()}")
    finally:
        for client in clients:
            client.close()
    await_that(lambda: _load(vllm_stack) == 0, timeout_s=30)
    assert vllm_stack.redis.zcard(keys.LEASES) == 0


@pytest.fixture(scope="module")
def own_stack(tmp_path_factory: pytest.TempPathFactory, demo_model: Model) -> Iterator[Stack]:
    """A deployment whose worker is killed, again and again."""
    home: Path = tmp_path_factory.mktemp("killed")
    with running(Stack(home, [demo_model.model_dump(mode="json")], lease_s=3)) as stack:
        yield stack


def _engine(worker: Process) -> tuple[psutil.Process, list[psutil.Process]]:
    """EngineCore of a worker, and all processes that the worker started."""
    started = psutil.Process(worker.pid).children(recursive=True)
    (core,) = [process for process in started if "EngineCore" in process.cmdline()[0]]
    return core, started


def _all_gone(processes: list[psutil.Process]) -> bool:
    return not psutil.wait_procs(processes, timeout=0)[1]


def test_a_killed_engine_ends_its_worker_and_a_killed_worker_its_engine(own_stack: Stack) -> None:
    stack = own_stack
    first = stack.processes[-1]
    with ThreadPoolExecutor(1) as clients:
        body = LONG | {"max_tokens": 1000}
        url = f"{stack.url}/v1/chat/completions"
        waiting = clients.submit(requests.post, url, json=body, timeout=200)
        await_that(lambda: stack.redis.zcard(keys.LEASES) == 1)
        core, started = _engine(first)
        core.kill()
        assert first.popen.wait(30) == 1
        await_that(lambda: _all_gone(started))
        stack.processes.remove(first)
        second = stack.start_worker("sluice-demo")
        answer = waiting.result()
        assert answer.headers["x-sluice-attempts"] == "2"
        assert answer.json()["usage"]["completion_tokens"] == 1000
    _, started = _engine(second)
    second.kill()
    await_that(lambda: _all_gone(started), timeout_s=10)


def test_sigterm_ends_a_worker_and_its_engine(own_stack: Stack) -> None:
    stack = own_stack
    await_that(lambda: not stack.redis.keys(keys.worker("*")))
    worker = stack.start_worker("sluice-demo")
    stack.await_workers(1)
    _, started = _engine(worker)
    worker.signal(signal.SIGTERM)
    assert worker.popen.wait(10) == 0
    await_that(lambda: _all_gone(started), timeout_s=5)
