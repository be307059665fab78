"""The real engine behind the whole path: what only vLLM can show."""

import asyncio
import os
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
import requests

from bench.stack import Stack, await_that, send
from gpu_worker.demo.texts import read
from gpu_worker.engines import vllm_sockets as sockets
from tasks.contract import keys
from tasks.contract.models import Model
from tasks.contract.settings import Settings
from tasks.queue.control import workers
from tests.test_demo_texts import boasts
from tests.test_metrics import Metrics
from tests.test_openapi import try_examples

# The load of an engine counts for the first test that needs it.
pytestmark = pytest.mark.timeout(900)

LONG = {
    "messages": [{"role": "user", "content": "Tell me a long story about a queue"}],
    "max_tokens": 1500,
    "ignore_eos": True,
    "temperature": 0,
}
ANSWERED_AT_LEAST = 50
# Questions about what other servers have.
NOT_BUILT = (
    "How do I upload a file for a batch?",
    "Is there a batch API like OpenAI's?",
    "Does Sluice have a web console?",
    "Does Sluice support the Responses API?",
    "How do I log in to the dashboard?",
    "How do I deploy on Kubernetes?",
    "Does KEDA scale the workers?",
    "How do I fine-tune a model?",
)
ALL_TOKENS = {"ignore_eos": True}


def _client(stack: Stack) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{stack.url}/v1", api_key="none", max_retries=0)


def _load(stack: Stack) -> int:
    """Requests in the engine's batch, as vLLM's own metric counts them."""
    beats = [stack.redis.hget(key, "running") for key in stack.redis.keys(keys.worker("*"))]
    return sum(int(beat) for beat in beats if beat)


def test_the_examples_of_the_document_run(vllm_stack: Stack) -> None:
    try_examples(vllm_stack)


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


def _ask(stack: Stack, question: str) -> str:
    answer = _client(stack).chat.completions.create(
        model="sluice-demo",
        messages=[{"role": "user", "content": question}],
        temperature=0,
        max_tokens=80,
    )
    return answer.choices[0].message.content or ""


def _is_answered(stack: Stack, item: dict[str, Any]) -> bool:
    answer = _ask(stack, item["ask"]).lower()
    return any(word.lower() in answer for word in item["expect"])


def test_the_demo_model_answers_questions_that_it_was_not_trained_on(vllm_stack: Stack) -> None:
    with ThreadPoolExecutor(16) as clients:
        questions = read("questions.yaml")
        right = sum(clients.map(lambda item: _is_answered(vllm_stack, item), questions))
    assert right >= ANSWERED_AT_LEAST
    # What README asks, and what users ask first.
    for first in (
        {"ask": "What is Sluice?", "expect": ["queue"]},
        {"ask": "Hello", "expect": ["hello"]},
    ):
        assert _is_answered(vllm_stack, first)


def test_the_demo_model_claims_nothing_that_is_not_built(vllm_stack: Stack) -> None:
    with ThreadPoolExecutor(16) as clients:
        answers = list(clients.map(lambda question: _ask(vllm_stack, question), NOT_BUILT))
    assert all(answers)
    assert [sentence for answer in answers for sentence in boasts(answer)] == []


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
    await_that(lambda: _load(vllm_stack) == 0)
    await_that(lambda: vllm_stack.redis.zcard(keys.LEASES) == 0)


def test_the_worker_serves_vllms_metrics_beside_its_own(vllm_stack: Stack) -> None:
    (worker,) = workers(vllm_stack.redis)
    url = f"http://{worker.metrics_address}/metrics"
    before = Metrics(url)
    client = _client(vllm_stack)
    question: Any = [{"role": "user", "content": "What is a lease?"}]
    chat = {"model": "sluice-demo", "messages": question, "max_tokens": 30}
    streamed = list(
        client.chat.completions.create(
            **chat, stream=True, stream_options={"include_usage": True}, extra_body=ALL_TOKENS
        )
    )
    whole = client.chat.completions.create(**chat, n=2, extra_body=ALL_TOKENS)
    after = Metrics(url)

    def grown(name: str, **labels: str) -> float:
        return after.total(name, **labels) - before.total(name, **labels)

    usages = [usage for usage in (streamed[-1].usage, whole.usage) if usage]
    assert [usage.completion_tokens for usage in usages] == [30, 60]
    assert grown("sluice_tokens_total", type="output") == 90
    assert grown("sluice_tokens_total", type="input") == sum(u.prompt_tokens for u in usages)
    assert grown("vllm:generation_tokens_total") == 90
    assert grown("sluice_time_to_first_token_seconds_count") == 1
    assert grown("sluice_inter_token_latency_seconds_count") <= 29
    assert grown("sluice_request_duration_seconds_count") == 2
    assert grown("sluice_time_to_first_token_seconds_sum") < 10
    for name in ("vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"):
        assert name in {found for found, _ in after.samples}


def test_the_heartbeat_has_the_usage_of_the_kv_cache(vllm_stack: Stack) -> None:
    # Many at once take longer than any heartbeat is late.
    with send(vllm_stack, LONG | {"stream": True, "n": 32, "temperature": 1}):
        await_that(lambda: workers(vllm_stack.redis)[0].kv_cache_usage > 0)
    await_that(lambda: workers(vllm_stack.redis)[0].kv_cache_usage == 0)


def test_the_engines_sockets_are_in_a_directory_of_its_own(vllm_stack: Stack) -> None:
    (worker,) = vllm_stack.workers
    engine = psutil.Process(worker.pid)
    places = {
        Path(connection.laddr).parent
        for process in [engine, *engine.children(recursive=True)]
        for connection in process.net_connections("unix")
        if connection.laddr.startswith("/")
    }
    (own,) = places
    assert own.name.startswith(sockets.NAME)
    assert own.parent in {vllm_stack.home / "run", Path(tempfile.gettempdir())}
    assert stat.S_IMODE(own.stat().st_mode) == 0o700


# A worker with a child that outlives it.
WORKER = """
import subprocess, sys
from gpu_worker.engines.vllm_sockets import private_directory
with private_directory() as directory:
    child = subprocess.Popen(["sleep", "60"], stdout=subprocess.DEVNULL, close_fds=False)
    print(directory, child.pid, flush=True)
    sys.stdin.read()
"""


@contextmanager
def socket_worker() -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """Another worker's process, and its directory."""
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-c", WORKER], stdin=pipe, stdout=pipe, text=True
    ) as worker:
        assert worker.stdout
        directory, child = worker.stdout.readline().split()
        try:
            yield worker, Path(directory)
        finally:
            worker.kill()
            os.kill(int(child), signal.SIGKILL)


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where all workers have their directories."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    home = tmp_path / ("home" * 20)
    monkeypatch.setenv("SLUICE_HOME", str(home))
    monkeypatch.setattr(sockets, "get_settings", lambda: Settings(home=home))
    return tmp_path


def test_what_a_killed_worker_has_left_goes_with_the_next(shared: Path) -> None:
    with socket_worker() as (worker, left), sockets.private_directory() as used:
        worker.kill()
        worker.wait()
        assert left.parent == shared
        # As a killed worker would have left it in another container, where this pid is alive.
        as_here = shared / f"{sockets.NAME}{os.getpid()}-x"
        as_here.mkdir()
        with sockets.private_directory() as own:
            assert not left.exists()
            assert not as_here.exists()
            assert Path(used).is_dir()
            assert Path(own).is_dir()
        assert not Path(own).exists()
        assert Path(used).is_dir()


def test_sockets_of_a_worker_in_another_container_stay(shared: Path) -> None:
    """Its pid tells nothing here."""
    with socket_worker() as (_, used):
        elsewhere = used.rename(shared / f"{sockets.NAME}{2**22}-x")
        with sockets.private_directory():
            assert elsewhere.is_dir()


def test_a_directory_that_is_swept_before_it_is_locked_is_made_anew(
    shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make: Callable[..., str] = tempfile.mkdtemp
    swept: list[str] = []

    def make_and_sweep(**arguments: Any) -> str:
        directory = make(**arguments)
        if not swept:
            swept.append(directory)
            sockets._sweep(shared)
        return directory

    monkeypatch.setattr(tempfile, "mkdtemp", make_and_sweep)
    with sockets.private_directory() as own:
        assert own not in swept
        assert Path(own).is_dir()
        assert not Path(swept[0]).exists()


def test_cards_have_the_length_of_the_context(vllm_stack: Stack, demo_model: Model) -> None:
    for path in ("/v1/models/sluice-demo", "/v1/models/gpt-3.5-turbo"):
        card = requests.get(vllm_stack.url + path, timeout=60).json()
        assert card["max_model_len"] == demo_model.args["max-model-len"]
    listed = requests.get(f"{vllm_stack.url}/v1/models", timeout=10).json()["data"]
    assert {card["max_model_len"] for card in listed} == {demo_model.args["max-model-len"]}
