"""What a request takes of a worker: a slot for each of its sequences, and no more than it has."""

from typing import Any

import orjson
import pytest

from bench.stack import Stack, await_that
from tasks.contract import keys
from tests.test_jobs import CHAT, call, in_sql, submit, wait

COUNTED: list[tuple[str, dict[str, Any], int]] = [
    ("/v1/chat/completions", CHAT, 1),
    ("/v1/chat/completions", CHAT | {"n": 3}, 3),
    ("/v1/chat/completions", CHAT | {"prompt": ["a", "b"], "best_of": 5}, 1),
    ("/v1/completions", {"prompt": "Once", "max_tokens": 1}, 1),
    ("/v1/completions", {"prompt": ["Once", "Twice"], "n": 2, "max_tokens": 1}, 4),
    ("/v1/completions", {"prompt": "Once", "n": 2, "best_of": 3, "max_tokens": 1}, 3),
    ("/v1/completions", {"prompt": [1, 2, 3], "max_tokens": 1}, 1),
    ("/v1/completions", {"prompt": [[1, 2], [3], [4]], "max_tokens": 1}, 3),
    ("/v1/completions", {"prompt": [], "max_tokens": 1}, 1),
    ("/v1/embeddings", {"input": "Once"}, 1),
    ("/v1/embeddings", {"input": ["Once", "Twice"], "n": 7}, 2),
    ("/v1/embeddings", {"input": [1, 2, 3]}, 1),
    ("/v1/embeddings", {"input": [[1], [2]]}, 2),
    ("/v1/embeddings", {"input": [[1]] * 65}, 64),
    *(("/v1/chat/completions", CHAT | {"n": n}, 3) for n in ("3", 3.0, " 3 ")),
    *(("/v1/chat/completions", CHAT | {"n": n}, 1) for n in (0, -5, None, 2.5, True, [9], "x")),
]


@pytest.mark.parametrize(("endpoint", "body", "sequences"), COUNTED)
def test_a_request_is_counted_by_its_sequences(
    sim_stack: Stack, endpoint: str, body: dict[str, Any], sequences: int
) -> None:
    answered = call(sim_stack, "POST", endpoint, json=body)
    submitted = submit(sim_stack, body, endpoint=endpoint, priority="interactive")["id"]
    for job_id in (answered.headers["x-sluice-job"], submitted):
        assert sim_stack.redis.hget(keys.job(job_id), "sequences") == str(sequences).encode()


def test_a_job_that_is_sent_again_takes_what_it_took_before(sim_stack: Stack) -> None:
    """65 inputs to embed took all slots, and 65 the second time, which no worker had."""
    sim_stack.redis.sadd(keys.PAUSED, "sim")
    try:
        body = {"input": [[1]] * 65}
        most = submit(sim_stack, body, endpoint="/v1/embeddings", priority="interactive")["id"]
        assert sim_stack.redis.hget(keys.job(most), "sequences") == b"64"
        first = submit(sim_stack, body, endpoint="/v1/embeddings")["id"]
        before = sim_stack.redis.hget(keys.job(first), "sequences")
        assert call(sim_stack, "POST", f"/v1/jobs/{first}/cancel").status_code == 200
        await_that(lambda: in_sql(sim_stack, first))
        again = call(sim_stack, "POST", f"/v1/jobs/{first}/retry").json()["id"]
        assert sim_stack.redis.hget(keys.job(again), "sequences") == before
    finally:
        sim_stack.redis.srem(keys.PAUSED, "sim")
    for job_id in (most, again):
        assert wait(sim_stack, job_id).json()["status"] in ("completed", "failed")


@pytest.mark.parametrize(
    ("endpoint", "body", "param", "number"),
    [
        *(("/v1/chat/completions", CHAT | {"n": n}, "n", "2,000") for n in (2000, "2000", 2e3)),
        ("/v1/completions", {"prompt": ["Once"] * 1024}, "prompt", "1,024"),
        ("/v1/completions", {"prompt": "Once", "best_of": 65}, "n", "65"),
    ],
)
def test_more_than_a_worker_takes_is_refused_with_what_to_do(
    sim_stack: Stack, endpoint: str, body: dict[str, Any], param: str, number: str
) -> None:
    jobs = len(sim_stack.redis.keys(keys.job("*")))
    job = {"endpoint": endpoint, "body": body}
    for path, sent in ((endpoint, body), ("/v1/jobs", job)):
        refused = call(sim_stack, "POST", path, json=sent)
        assert refused.status_code == 400
        error = orjson.loads(refused.content)["error"]
        assert (error["type"], error["param"]) == ("invalid_request_error", param)
        assert f"{number} sequences" in error["message"]
        assert "up to 64" in error["message"]
        assert "several requests" in error["message"]
    assert len(sim_stack.redis.keys(keys.job("*"))) == jobs
