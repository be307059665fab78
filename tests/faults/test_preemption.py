"""Batch jobs make way for interactive ones, and go on where they stopped."""

import time
from typing import Any

import pytest

from bench.stack import Stack, await_that, running
from tests.faults.clients import Client, ask, chat, compare
from tests.faults.conftest import LEASE_S, SLOW_SIM, Fault
from tests.test_jobs import ENDPOINT, call, get, submit
from tests.test_metrics import Metrics

pytestmark = pytest.mark.timeout(120)

SLOTS = 4
HELD = SLOW_SIM | {"slots": SLOTS}


def _running(stack: Stack, job_ids: list[str]) -> int:
    return sum(get(stack, job_id)["status"] == "in_progress" for job_id in job_ids)


def test_chats_take_the_slots_of_batch_jobs_which_go_on_later(home: Any, fault: Fault) -> None:
    with running(Stack(home, [HELD], lease_s=LEASE_S)) as stack:
        bodies = [chat(n, stream=True, max_tokens=150) for n in range(2 * SLOTS)]
        undisturbed = ask(stack, bodies)
        jobs = [submit(stack, body, priority="batch")["id"] for body in bodies]
        await_that(lambda: _running(stack, jobs) == SLOTS)
        fault.inflict("a burst of chats")
        burst = [chat(n, stream=True, max_tokens=20) for n in range(SLOTS)]
        begun_s = time.monotonic()
        chats = [Client(stack, body) for body in burst]
        compare(fault, chats, ask(stack, burst), begun_s)
        for job_id, whole in zip(jobs, undisturbed, strict=True):
            await_that(lambda job_id=job_id: get(stack, job_id)["status"] == "completed")
            answer = get(stack, job_id)["response"]["body"]
            assert {k: v for k, v in answer.items() if k not in ("id", "created")} == whole
        counted = Metrics(f"{stack.url}/metrics")
        assert counted.total("sluice_requeues_total", cause="preempted") > 0


def test_while_chats_come_batch_jobs_leave_slots_free(home: Any, fault: Fault) -> None:
    with running(Stack(home, [HELD | {"interactive_reserve": 0.5}], lease_s=LEASE_S)) as stack:
        fault.inflict("batch jobs after a chat")
        assert call(stack, "POST", ENDPOINT, json=chat(max_tokens=1)).ok
        body = chat(stream=True, max_tokens=1000)
        jobs = [submit(stack, body, priority="batch")["id"] for _ in range(SLOTS)]
        await_that(lambda: _running(stack, jobs) == SLOTS // 2)
        assert call(stack, "POST", ENDPOINT, json=chat(max_tokens=20)).ok
        assert _running(stack, jobs) == SLOTS // 2
