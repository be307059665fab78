"""A job that is nobody's any more ends inside vLLM too, whatever it is and whyever it ended."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import requests

from bench.stack import Stack, await_that, running, send, slack
from tasks.contract import keys
from tasks.contract.models import Model
from tasks.queue.control import workers
from tests.test_metrics import Metrics

pytestmark = pytest.mark.timeout(900)

CHAT, TEXT, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
LONG: dict[str, Any] = {"max_tokens": 1900, "ignore_eos": True}
CHAT_BODY = LONG | {"messages": [{"role": "user", "content": "Hello"}]}
TEXT_BODY = LONG | {"prompt": "A queue is"}
PROMPTS = ["A queue is", "A job is", "A lease is"]

CASES: dict[str, tuple[str, dict[str, Any], int]] = {
    "chat, streamed": (CHAT, CHAT_BODY | {"stream": True}, 1),
    "chat, whole": (CHAT, CHAT_BODY, 1),
    "chat, whole, four at once": (CHAT, CHAT_BODY | {"n": 4}, 4),
    "text, streamed": (TEXT, TEXT_BODY | {"stream": True}, 1),
    "text, streamed, four at once": (TEXT, TEXT_BODY | {"stream": True, "n": 4}, 4),
    "text, whole": (TEXT, TEXT_BODY, 1),
    "text, whole, two each of three prompts": (TEXT, TEXT_BODY | {"prompt": PROMPTS, "n": 2}, 6),
}


class Engine:
    """The engine of the only worker, as vLLM's own metrics show it."""

    def __init__(self, stack: Stack) -> None:
        (worker,) = workers(stack.redis)
        self._url = f"http://{worker.metrics_address}/metrics"

    def sequences(self) -> int:
        seen = Metrics(self._url)
        names = ("vllm:num_requests_running", "vllm:num_requests_waiting")
        return int(sum(seen.total(name) for name in names))

    def tokens(self) -> float:
        """All that it has made."""
        return Metrics(self._url).total("vllm:generation_tokens_total")


def _only_lease(stack: Stack) -> str:
    (job_id,) = stack.redis.zrange(keys.LEASES, 0, -1)  # type: ignore[misc]
    return str(job_id.decode())


@pytest.mark.parametrize("case", CASES)
def test_a_client_that_leaves_frees_the_engine_within_a_second(
    vllm_stack: Stack, case: str
) -> None:
    stack, engine = vllm_stack, Engine(vllm_stack)
    endpoint, body, sequences = CASES[case]
    before = engine.tokens()
    client = send(stack, body, endpoint)
    await_that(lambda: engine.sequences() == sequences)
    job_id = _only_lease(stack)
    client.close()
    await_that(lambda: engine.sequences() == 0, timeout_s=slack(1), explain=engine.sequences)
    # It has not come to its end.
    assert engine.tokens() - before < sequences * LONG["max_tokens"]
    await_that(lambda: stack.redis.hget(keys.job(job_id), "state") == b"cancelled")
    if not body.get("stream"):  # the app's answer to a client that has left is dropped
        await_that(lambda: stack.redis.xlen(keys.log(job_id)) == 1)


def test_a_whole_answer_that_is_cancelled_frees_the_engine(vllm_stack: Stack) -> None:
    stack, engine = vllm_stack, Engine(vllm_stack)
    before = engine.tokens()
    with send(stack, CHAT_BODY):
        await_that(lambda: engine.sequences() == 1)
        cancelled = requests.post(f"{stack.url}/v1/jobs/{_only_lease(stack)}/cancel", timeout=60)
        assert cancelled.status_code == 200
        await_that(lambda: engine.sequences() == 0, timeout_s=slack(1))
        assert engine.tokens() - before < LONG["max_tokens"]


def test_a_whole_answer_whose_lease_is_lost_frees_the_engine(vllm_stack: Stack) -> None:
    stack, engine = vllm_stack, Engine(vllm_stack)
    with send(stack, CHAT_BODY) as client:
        await_that(lambda: engine.sequences() == 1)
        with _taking_nothing(stack):
            job_id = _only_lease(stack)
            # The worker may renew it once more before maintenance sees that it is over.
            await_that(lambda: _lose_lease(stack, job_id))
            # Found when the worker renews its leases.
            await_that(lambda: engine.sequences() == 0, timeout_s=30)
            client.close()
            await_that(lambda: stack.redis.hget(keys.job(job_id), "state") == b"cancelled")


@contextmanager
def _taking_nothing(stack: Stack) -> Iterator[None]:
    """The worker leaves the backlog alone."""
    stack.redis.sadd(keys.PAUSED, "sluice-demo")
    try:
        yield
    finally:
        stack.redis.srem(keys.PAUSED, "sluice-demo")


def _lose_lease(stack: Stack, job_id: str) -> bool:
    """Has the job's lease be over; whether maintenance has taken the job away."""
    stack.redis.zadd(keys.LEASES, {job_id: 1}, xx=True)
    return stack.redis.hget(keys.job(job_id), "state") == b"queued"


@pytest.fixture
def embedding_stack(home: Any, demo_model: Model) -> Iterator[Stack]:
    """The demo model as one that embeds, a token at a time: slow enough to be stopped."""
    model = demo_model.model_dump(mode="json") | {"name": "embedder", "aliases": []}
    keep = ("max-model-len", "dtype", "gpu-memory-utilization", "enforce-eager")
    args = {name: model["args"][name] for name in keep}
    args |= {"runner": "pooling", "convert": "embed", "max-num-seqs": 1}
    with running(Stack(home, [model | {"args": args}])) as stack:
        yield stack


def test_embeddings_that_nobody_wants_any_more_free_the_engine(embedding_stack: Stack) -> None:
    stack, engine = embedding_stack, Engine(embedding_stack)
    short = requests.post(f"{stack.url}{EMBEDDINGS}", json={"input": "A queue"}, timeout=240)
    assert short.json()["data"][0]["embedding"]
    client = send(stack, {"input": [f"{n} is in a queue. " * 180 for n in range(200)]}, EMBEDDINGS)
    await_that(lambda: engine.sequences() > 100)
    client.close()
    await_that(lambda: engine.sequences() == 0, timeout_s=slack(1), explain=engine.sequences)
