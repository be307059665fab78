"""What the logs of all parts hold, and what they must not."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
import requests

from bench.stack import Stack, await_that, running
from tasks.contract import keys
from tests.conftest import SIM

SLOW = SIM | {"args": {"tokens-per-s": 40, "first-token-s": 0.05}}
PROMPT = "an unmistakable question"
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 10}


@pytest.fixture
def stack(home: Path) -> Iterator[Stack]:
    settings: dict[str, Any] = {"log_format": "json", "lease_s": 3}
    with running(Stack(home, [SLOW], **settings)) as stack:
        yield stack


def lines(stack: Stack, job_id: str) -> list[dict[str, Any]]:
    """All lines about the job, in the order of time. Each line of the parts' logs is JSON."""
    logs = [p.log for p in stack.processes if not p.log.name.startswith("redis")]
    parsed = [orjson.loads(line) for log in dict.fromkeys(logs) for line in _written(log)]
    about = [line for line in parsed if line.get("job") == job_id]
    return sorted(about, key=lambda line: str(line["timestamp"]))


def _written(log: Path) -> list[str]:
    complete, _, _ = log.read_text().rpartition("\n")
    # Celery's warning about the superuser is Python's, and goes past all logging.
    return [line for line in complete.splitlines() if line.startswith("{")]


def chat(stack: Stack, **more: Any) -> requests.Response:
    return requests.post(stack.url + "/v1/chat/completions", json=CHAT | more, timeout=120)


def test_each_transition_is_a_line_without_what_was_asked_or_answered(stack: Stack) -> None:
    began_s = time.monotonic()
    answer = chat(stack)
    job_id = answer.headers["x-sluice-job"]
    await_that(lambda: len(lines(stack, job_id)) == 3)
    most_ms = (time.monotonic() - began_s) * 1000
    # The API may write its line when a worker has claimed the job already.
    by_event = {line["event"]: line for line in lines(stack, job_id)}
    events = ("job accepted", "job claimed", "job completed")
    accepted, claimed, completed = (by_event[event] for event in events)
    assert claimed["timestamp"] < completed["timestamp"]
    for line in (accepted, claimed, completed):
        assert (line["tenant"], line["model"], line["level"]) == ("default", "sim", "info")
    assert accepted["lane"] == "interactive"
    assert claimed["attempt"] == completed["attempt"] == 1
    assert claimed["queue_ms"] >= 0
    # Nine tokens after the first one, at 40 per second.
    assert completed["run_ms"] > 200
    assert claimed["queue_ms"] + completed["run_ms"] < most_ms + 2  # each is rounded
    text = answer.json()["choices"][0]["message"]["content"]
    written = "".join(process.log.read_text() for process in stack.processes)
    assert PROMPT not in written
    assert text not in written


def test_failures_are_logged_with_the_same_fields(stack: Stack) -> None:
    body = CHAT | {"max_tokens": 2000, "stream": True}
    url = stack.url + "/v1/chat/completions"
    with requests.post(url, json=body, stream=True, timeout=30) as answer:
        job_id = answer.headers["x-sluice-job"]
        stack.workers[0].kill()
        await_that(lambda: len(lines(stack, job_id)) == 3)
        requests.post(f"{stack.url}/v1/jobs/{job_id}/cancel", timeout=10).raise_for_status()
    await_that(lambda: len(lines(stack, job_id)) == 4)
    taken, cancelled = lines(stack, job_id)[2:]
    assert taken["event"].startswith("job taken back")
    assert (taken["state"], taken["attempt"], taken["level"]) == ("queued", 1, "warning")
    assert (cancelled["event"], cancelled["attempt"]) == ("job cancelled", 1)
    assert taken["tenant"] == cancelled["tenant"] == "default"
    assert taken["model"] == cancelled["model"] == "sim"


def test_errors_are_lines_of_the_same_form(stack: Stack) -> None:
    stack.redis.lpush(keys.job("job_1"), "not a hash")
    assert requests.get(f"{stack.url}/v1/jobs/job_1", timeout=10).status_code == 503

    def errors() -> list[dict[str, Any]]:
        parsed = [orjson.loads(line) for line in _written(stack.api_processes[0].log)]
        return [line for line in parsed if line["level"] == "error"]

    await_that(errors)  # a thread writes it
    (error,) = errors()
    assert "WRONGTYPE" in error["event"]
    assert error["logger"] == "api.errors"


def test_content_is_logged_when_that_is_switched_on(home: Path) -> None:
    with running(Stack(home, [SIM], log_format="json", log_content=True)) as stack:
        answer = chat(stack)
        job_id = answer.headers["x-sluice-job"]
        await_that(lambda: len(lines(stack, job_id)) == 3)
        by_event = {line["event"]: line for line in lines(stack, job_id)}
        accepted, completed = by_event["job accepted"], by_event["job completed"]
        assert orjson.loads(accepted["request"]) == CHAT
        assert orjson.loads(completed["answer"]) == answer.json()


def test_people_read_lines_of_words(sim_stack: Stack) -> None:
    job_id = chat(sim_stack).headers["x-sluice-job"]
    worker = sim_stack.part("worker").log
    await_that(lambda: f"job={job_id}" in worker.read_text())
    line = next(line for line in worker.read_text().splitlines() if job_id in line)
    assert "job claimed" in line
    assert "model=sim" in line
    assert not line.startswith("{")
