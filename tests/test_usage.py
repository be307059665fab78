"""What a request used is known of every answer, whether its client asked for it or not."""

import re
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml

from bench.stack import Stack, await_that, running
from db import reading
from db.models import JobResult
from tasks.contract import keys
from tasks.queue.control import workers
from tests.conftest import SIM
from tests.test_metrics import Metrics

# The load of an engine counts for the first test that needs it.
pytestmark = pytest.mark.timeout(900)

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
BODIES: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": (CHAT, {"messages": [{"role": "user", "content": "What is a lease?"}]}),
    "chat, three at once": (CHAT, {"messages": [{"role": "user", "content": "Hello"}], "n": 3}),
    "text": (TEXT, {"prompt": "A queue is"}),
    "text, two each of two prompts": (TEXT, {"prompt": ["A queue is", "Once"], "n": 2}),
}
ASKING: dict[str, dict[str, Any]] = {
    "whole": {},
    "asked": {"stream": True, "stream_options": {"include_usage": True}},
    "not asked": {"stream": True},
    "refused": {"stream": True, "stream_options": {"include_usage": False}},
}


def tokens(stack: Stack) -> dict[str, float]:
    """What the worker has counted."""
    (worker,) = workers(stack.redis)
    metrics = Metrics(f"http://{worker.metrics_address}/metrics")
    return {kind: metrics.total("sluice_tokens_total", type=kind) for kind in ("input", "output")}


def run(stack: Stack, endpoint: str, body: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """What the client got, and the job once SQL has it too."""
    answer = requests.post(stack.url + endpoint, json=body, timeout=240)
    assert answer.status_code == 200, answer.text
    job_id = answer.headers["x-sluice-job"]

    def stored() -> JobResult | None:
        with reading(f"sqlite:///{stack.home / 'sluice.db'}") as session:
            return session.get(JobResult, job_id)

    await_that(stored)
    job = requests.get(f"{stack.url}/v1/jobs/{job_id}", timeout=60).json()
    result = stored()
    assert result
    assert job["usage"] == result.usage
    return answer.text, job


def check_usage(stack: Stack, name: str) -> None:
    """The same in the job, in SQL and in the metrics, however the request was made."""
    endpoint, body = BODIES[name]
    used = {}
    for way, options in ASKING.items():
        before = tokens(stack)
        text, job = run(stack, endpoint, body | {"max_tokens": 7, "ignore_eos": True} | options)
        assert ('"usage":{' in text) == (way in ("whole", "asked"))
        usage = {key: job["usage"][key] for key in job["usage"] if "details" not in key}
        assert job["response"]["body"]["usage"] == job["usage"]
        grown = {kind: count - before[kind] for kind, count in tokens(stack).items()}
        assert grown == {"input": usage["prompt_tokens"], "output": usage["completion_tokens"]}
        charged: Any = stack.redis.hget(keys.job(job["id"]), "charged")
        assert float(charged) == sum(grown.values())
        used[way] = usage
    assert used["whole"] == used["asked"] == used["not asked"] == used["refused"]
    assert used["whole"]["completion_tokens"] > 0


@pytest.mark.parametrize("name", BODIES)
def test_usage_is_counted_asked_for_or_not(sim_stack: Stack, name: str) -> None:
    check_usage(sim_stack, name)


@pytest.mark.parametrize("name", BODIES)
def test_usage_is_counted_on_vllm(vllm_stack: Stack, name: str) -> None:
    check_usage(vllm_stack, name)


@pytest.mark.parametrize("name", BODIES)
def test_usage_is_counted_behind_a_remote_server(
    sim_stack: Stack, remote_stack: Stack, name: str
) -> None:
    check_usage(remote_stack, name)


@pytest.fixture(scope="module")
def remote_stack(sim_stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A Sluice whose engine is another one."""
    model = {"name": "far", "engine": "remote", "source": sim_stack.url, "args": {"model": "sim"}}
    with running(Stack(tmp_path_factory.mktemp("remote"), [model])) as stack:
        yield stack


def test_a_continued_answer_counts_once(home: Path) -> None:
    """The worker is killed in the middle of it."""
    slow = SIM | {"args": {"tokens-per-s": 4}}
    with running(Stack(home, [slow], lease_s=6)) as stack:
        # The next worker is fast.
        (home / "models.yaml").write_text(yaml.safe_dump({"models": [SIM]}))
        body = {"prompt": "A queue is", "max_tokens": 60, "stream": True}
        with requests.post(stack.url + TEXT, json=body, stream=True, timeout=60) as answer:
            pieces = answer.iter_content(None)
            text = next(pieces)
            stack.part("worker").kill_all()
            stack.start_worker("sim")
            text += b"".join(pieces)
        assert text.endswith(b"data: [DONE]\n\n")
        job = f"{stack.url}/v1/jobs/{answer.headers['x-sluice-job']}"
        found = requests.get(job, headers={"Prefer": "wait=60"}, timeout=90).json()
        assert found["attempts"] == 2
        assert (found["usage"]["prompt_tokens"], found["usage"]["completion_tokens"]) == (3, 60)
        assert not re.search(rb'"usage"', text)
