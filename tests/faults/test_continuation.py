"""An answer that real vLLM began is continued, from any point, as if it had not been disturbed."""

from typing import Any

import orjson
import pytest
import requests

from bench.stack import Stack, await_that
from tasks.contract import keys
from tasks.contract.events import Entry, Kind
from tasks.contract.job import Lane
from tasks.contract.response import Outcome, assemble
from tasks.queue.celery_app import make_ticket

pytestmark = pytest.mark.timeout(900)

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
STREAM = {"stream": True, "temperature": 0, "stream_options": {"include_usage": True}}
HELLO = {"messages": [{"role": "user", "content": "What is Sluice?"}]}
TOOL = {
    "type": "function",
    "function": {"name": "f", "parameters": {"type": "object", "properties": {}}},
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": (CHAT, HELLO | {"max_tokens": 40, "ignore_eos": True}),
    "chat to its own end": (CHAT, HELLO),
    "chat with logprobs": (CHAT, HELLO | {"max_tokens": 30, "logprobs": True, "top_logprobs": 3}),
    "chat with token ids": (CHAT, HELLO | {"max_tokens": 30, "return_token_ids": True}),
    "chat with tools": (CHAT, HELLO | {"max_tokens": 30, "tools": [TOOL]}),
    "chat with usage in each chunk": (
        CHAT,
        HELLO
        | {"max_tokens": 30}
        | {"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    ),
    "text": (TEXT, {"prompt": "A job is", "max_tokens": 40, "ignore_eos": True}),
    "text with logprobs": (TEXT, {"prompt": "A job is", "max_tokens": 30, "logprobs": 2}),
    "text of token ids": (TEXT, {"prompt": [300, 301, 302], "max_tokens": 30}),
    "text up to a stop string": (
        TEXT,
        {"prompt": "A job is", "max_tokens": 60, "stop": ["xyzzy, a long one", "."]},
    ),
    "text that must be long": (TEXT, {"prompt": "A job is", "max_tokens": 40, "min_tokens": 35}),
    "bytes that make characters only together": (
        TEXT,
        {
            "prompt": "Żółć 🚀",
            "max_tokens": 40,
            "temperature": 0.0,
            "logit_bias": {str(token): 30.0 for token in range(130, 250)},
            "ignore_eos": True,
        },
    ),
    "text with a repetition penalty": (
        TEXT,
        {"prompt": "A job is", "max_tokens": 40, "repetition_penalty": 1.3, "ignore_eos": True},
    ),
}


def _run(stack: Stack, endpoint: str, body: dict[str, Any]) -> tuple[str, bytes, list[Any]]:
    """A job's id, its request and its whole log."""
    raw = orjson.dumps(STREAM | body)
    answer = requests.post(
        stack.url + endpoint, data=raw, headers={"Content-Type": "application/json"}, timeout=60
    )
    assert answer.status_code == 200, answer.text
    job_id = answer.headers["x-sluice-job"]
    await_that(lambda: stack.redis.hget(keys.job(job_id), "state") == b"completed")
    log: Any = stack.redis.xrange(keys.log(job_id))
    return job_id, raw, log


def _rewind(stack: Stack, job_id: str, raw: bytes, log: list[Any]) -> None:
    """Sets the job back to where its worker died after it had written that much."""
    redis = stack.redis
    redis.delete(keys.log(job_id))
    for log_id, entry in log:
        redis.xadd(keys.log(job_id), entry, id=log_id)
    redis.hdel(keys.job(job_id), "ended_us")
    place = keys.backlog("sluice-demo", Lane.INTERACTIVE)
    fields = {"state": "queued", "place": place, "attempt": 1, "body": raw}
    redis.hset(keys.job(job_id), mapping=fields)
    redis.persist(keys.job(job_id))
    redis.zadd(place, {job_id: 1})
    redis.lpush(keys.tickets("sluice-demo"), make_ticket("sluice-demo", job_id))


def _entries(job_id: str, log: list[Any]) -> list[Entry]:
    return [Entry.decode_log(job_id, log_id, fields) for log_id, fields in log]


def _outcome(job_id: str, log: list[Any]) -> Outcome:
    outcome = assemble(_entries(job_id, log))
    assert outcome
    return outcome


def _continued(stack: Stack, job_id: str, raw: bytes, log: list[Any]) -> list[Any]:
    _rewind(stack, job_id, raw, log)
    await_that(lambda: stack.redis.hget(keys.job(job_id), "state") in (b"completed", b"failed"))
    continued: Any = stack.redis.xrange(keys.log(job_id))
    return list(continued)


@pytest.mark.parametrize("case", CASES)
def test_an_answer_goes_on_from_wherever_it_was_cut(vllm_stack: Stack, case: str) -> None:
    endpoint, body = CASES[case]
    job_id, raw, whole = _run(vllm_stack, endpoint, body)
    expected = _outcome(job_id, whole)
    assert expected.usage
    assert expected.usage["completion_tokens"] > 6
    # On a busy machine an event has several tokens: there may be fewer places to cut it.
    cuts = {0, 1, 2, 3, 7, 20, len(whole) - 4, len(whole) - 2, len(whole) - 1}
    for cut in sorted(cuts & set(range(len(whole)))):
        continued = _continued(vllm_stack, job_id, raw, whole[:cut])
        assert continued[:cut] == whole[:cut]
        assert continued[cut][0] == b"2-0"
        outcome = _outcome(job_id, continued)
        assert outcome.state == "completed", f"cut after {cut}: {outcome}"
        answer, wanted = (orjson.loads(o.body or b"") for o in (outcome, expected))
        if cut < 2:  # nothing was sent: it runs again, later
            answer["created"] = wanted["created"]
        assert answer == wanted, f"cut after {cut}"
        ends = [e for e in _entries(job_id, continued) if e.kind is Kind.BODY][-1]
        assert ends.data == b"data: [DONE]\n\n"


@pytest.mark.parametrize(
    "body",
    [
        HELLO | {"n": 2, "max_tokens": 20, "temperature": 0.9, "seed": 3},
        HELLO | {"max_tokens": 20, "structured_outputs": {"regex": "[ab]{9}"}},
        HELLO | {"max_tokens": 20, "frequency_penalty": 1.0},
    ],
)
def test_what_cannot_go_on_faithfully_fails_or_runs_again(
    vllm_stack: Stack, body: dict[str, Any]
) -> None:
    job_id, raw, whole = _run(vllm_stack, CHAT, body)
    ended = _continued(vllm_stack, job_id, raw, whole[:4])
    end = _outcome(job_id, ended)
    assert end.state == "failed"
    assert end.error
    assert end.error["code"] == "stream_broken"
    again = _outcome(job_id, _continued(vllm_stack, job_id, raw, whole[:1]))
    answer, wanted = (orjson.loads(o.body or b"") for o in (again, _outcome(job_id, whole)))
    assert answer["choices"] == wanted["choices"]


def test_an_answer_that_was_complete_is_not_made_again(vllm_stack: Stack) -> None:
    """An ended log stays as it ended, also when the job's state was not written any more."""
    job_id, raw, whole = _run(vllm_stack, CHAT, HELLO)
    continued = _continued(vllm_stack, job_id, raw, whole)
    assert _outcome(job_id, continued) == _outcome(job_id, whole)
    assert len(continued) == len(whole) + 2  # the takeover, and the end once more
