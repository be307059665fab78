"""Batch jobs make way for interactive ones, and go on where they stopped."""

import time
from typing import Any

import pytest

from bench.stack import Stack, await_that, running
from tasks.contract.events import Kind
from tasks.queue.token_log import TokenLog
from tests.faults.clients import ENDPOINT, Client, ask, chat, compare
from tests.faults.conftest import LEASE_S, SLOW_SIM, Fault
from tests.test_jobs import call, get, submit
from tests.test_metrics import Metrics

SLOTS = 4
HELD = SLOW_SIM | {"slots": SLOTS}
DEMO_SLOTS = 64


def _running(stack: Stack, job_ids: list[str]) -> int:
    return sum(get(stack, job_id)["status"] == "in_progress" for job_id in job_ids)


def _answer(stack: Stack, job_id: str) -> dict[str, Any]:
    """A job's answer, without what differs from request to request."""
    await_that(lambda: get(stack, job_id)["status"] in ("completed", "failed"), 60)
    body = get(stack, job_id)["response"]["body"]
    return {name: value for name, value in body.items() if name not in ("id", "created")}


def _notes(stack: Stack, job_id: str) -> int:
    """How often the job was stopped with something made that was not sent."""
    return sum(e.kind is Kind.NOTE for e in TokenLog(stack.redis).read_after(job_id))


@pytest.mark.timeout(120)
@pytest.mark.parametrize("is_streamed", [True, False])
def test_chats_take_the_slots_of_batch_jobs_which_go_on_later(
    home: Any, fault: Fault, is_streamed: bool
) -> None:
    with running(Stack(home, [HELD], lease_s=LEASE_S)) as stack:
        bodies = [chat(n, stream=is_streamed, max_tokens=150) for n in range(2 * SLOTS)]
        undisturbed = ask(stack, bodies)
        jobs = [submit(stack, body, priority="batch")["id"] for body in bodies]
        # A slot is left for a chat, as there were some.
        await_that(lambda: _running(stack, jobs) == SLOTS - 1)
        fault.inflict("a burst of chats")
        burst = [chat(n, stream=True, max_tokens=20) for n in range(SLOTS)]
        begun_s = time.monotonic()
        chats = [Client(stack, body) for body in burst]
        compare(fault, chats, ask(stack, burst), begun_s)
        assert [_answer(stack, job_id) for job_id in jobs] == undisturbed
        preempted = Metrics(f"{stack.url}/metrics").total(
            "sluice_requeues_total", cause="preempted"
        )
        assert preempted > 0
        if not is_streamed:
            assert sum(_notes(stack, job_id) for job_id in jobs) == preempted


@pytest.mark.timeout(120)
def test_while_chats_come_batch_jobs_leave_slots_free(home: Any, fault: Fault) -> None:
    with running(Stack(home, [HELD | {"interactive_reserve": 0.5}], lease_s=LEASE_S)) as stack:
        fault.inflict("batch jobs after a chat")
        assert call(stack, "POST", ENDPOINT, json=chat(max_tokens=1)).ok
        body = chat(stream=True, max_tokens=1000)
        jobs = [submit(stack, body, priority="batch")["id"] for _ in range(SLOTS)]
        await_that(lambda: _running(stack, jobs) == SLOTS - 1)
        ask(stack, [chat(n, max_tokens=1) for n in range(20)])
        for job_id in jobs:
            call(stack, "POST", f"/v1/jobs/{job_id}/cancel")
        jobs = [submit(stack, body, priority="batch")["id"] for _ in range(SLOTS)]
        await_that(lambda: _running(stack, jobs) == SLOTS // 2)
        ask(stack, [chat(max_tokens=20)])
        assert _running(stack, jobs) == SLOTS // 2


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"logprobs": True, "top_logprobs": 2},
        {"stream": True, "stream_options": {"include_usage": True}},
        {"n": 2, "temperature": 0.7, "seed": 1},
    ],
)
def test_a_batch_job_on_vllm_makes_way_and_is_answered_as_if_undisturbed(
    vllm_stack: Stack, fault: Fault, options: dict[str, Any]
) -> None:
    body = chat(7, max_tokens=1000, ignore_eos=True) | options
    (undisturbed,) = ask(vllm_stack, [body])
    each = DEMO_SLOTS // 4
    # These run for longer than it takes the last chat to come, and it finds too few slots.
    held = chat(n=each, temperature=1, max_tokens=400, ignore_eos=True)
    holders = [submit(vllm_stack, held, priority="interactive")["id"] for _ in range(3)]
    await_that(lambda: _running(vllm_stack, holders) == len(holders))
    job_id = submit(vllm_stack, body, priority="batch")["id"]
    await_that(lambda: _running(vllm_stack, [job_id]) == 1)
    fault.inflict("a chat for more slots than are left")
    last = Client(vllm_stack, chat(n=each, temperature=1, max_tokens=20))
    assert len(last.answer()["choices"]) == each
    for holder in holders:
        call(vllm_stack, "POST", f"/v1/jobs/{holder}/cancel")
    assert _answer(vllm_stack, job_id) == undisturbed
    # Two sequences of one request cannot go on elsewhere: it keeps its slots.
    assert get(vllm_stack, job_id)["attempts"] == (1 if "n" in options else 2)
    if not options.keys() & {"n", "stream"}:
        assert _notes(vllm_stack, job_id) == 1
