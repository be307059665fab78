"""Tenants get service by their weights, whatever they queue: lua/fair.lua on a real Redis."""

import heapq
import itertools
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import redis

from tasks.contract import keys
from tasks.contract.job import Cause, Claim, EnqueueOptions, Job, Lane, State, Usage, new_id
from tasks.contract.settings import Settings
from tasks.queue.backlog import MEAN_TOKENS, MOST_TOKENS, Backlog
from tasks.queue.depth import places

BODY = b"x" * 400
PROMPT_TOKENS = 100
ESTIMATE = PROMPT_TOKENS + MEAN_TOKENS
SLOTS = 16
QUEUED_EACH = 3
LANE = ("m", Lane.INTERACTIVE)


@pytest.fixture
def backlog(bus: redis.Redis) -> Backlog:
    return Backlog(bus, Settings(lease_s=300, max_backlog=100_000))


def _job(tenant: str, lane: Lane = Lane.INTERACTIVE, **fields: Any) -> Job:
    return Job(new_id(), "m", "/v1/completions", BODY, lane, tenant, **fields)


def _claim(backlog: Backlog) -> Claim:
    claim = backlog.claim("m", "w")
    assert claim
    return claim


def _finish(backlog: Backlog, claim: Claim, tokens: int) -> None:
    assert backlog.finish(claim, State.COMPLETED, usage=Usage(PROMPT_TOKENS, tokens))


def _tenants(backlog: Backlog, number: int) -> str:
    """Whose jobs are claimed next."""
    return "".join(_claim(backlog).job.tenant for _ in range(number))


def _service(backlog: Backlog, tenant: str) -> float:
    """Its counter."""
    waiting: Any = backlog.redis.zscore(keys.turns(*LANE), tenant)
    idle: Any = backlog.redis.get(keys.served(*LANE, tenant))
    return float(idle or 0) if waiting is None else float(waiting)


def serve(
    backlog: Backlog, weights: dict[str, float], length: Callable[[str], int], claims: int
) -> Counter[str]:
    """Tokens that an engine makes for each tenant, while each always has jobs queued.

    It makes one for each of its slots at a time, so that long answers end late.
    """
    queued, served = Counter[str](), Counter[str]()
    running: list[tuple[int, int, Claim, int]] = []
    step = 0
    for number in range(claims):
        for tenant, weight in weights.items():
            while queued[tenant] < QUEUED_EACH:
                backlog.submit(_job(tenant, weight=weight))
                queued[tenant] += 1
        claim = _claim(backlog)
        tenant = claim.job.tenant
        queued[tenant] -= 1
        tokens = length(tenant)
        heapq.heappush(running, (step + tokens, number, claim, tokens))
        if len(running) == SLOTS:
            step, _, claim, tokens = heapq.heappop(running)
            _finish(backlog, claim, tokens)
            served[claim.job.tenant] += PROMPT_TOKENS + tokens
    return served


def jain(shares: list[float]) -> float:
    """Fairness from 1 / len(shares), one has all, to 1, all have the same."""
    return sum(shares) ** 2 / (len(shares) * sum(share**2 for share in shares))


def test_one_job_waits_for_one_job_of_a_tenant_with_a_thousand(backlog: Backlog) -> None:
    for _ in range(1000):
        backlog.submit(_job("a"))
    assert _tenants(backlog, 5) == "aaaaa"
    backlog.submit(_job("b"))
    assert "b" in _tenants(backlog, 2)
    for _ in range(3):
        backlog.submit(_job("b"))
    assert _tenants(backlog, 6).count("b") == 3


def test_weights_of_three_to_one_are_served_three_to_one(backlog: Backlog) -> None:
    lengths = itertools.cycle([20, 400, 150])
    served = serve(backlog, {"a": 3, "b": 1}, lambda _: next(lengths), 800)
    assert served["a"] / served["b"] == pytest.approx(3, rel=0.05)


def test_equal_tenants_get_the_same_however_long_their_answers_are(
    backlog: Backlog, report: Callable[[str], None]
) -> None:
    lengths = {f"t{n}": 20 + 50 * n for n in range(10)}
    served = serve(backlog, dict.fromkeys(lengths, 1.0), lengths.__getitem__, 2000)
    fairness = jain([float(served[tenant]) for tenant in lengths])
    report(f"Jain's index of ten tenants: {fairness:.4f}, {dict(served)}")
    assert fairness >= 0.98


def test_priorities_hold_within_a_tenant_alone(backlog: Backlog) -> None:
    urgent = EnqueueOptions(priority=-100)
    late, soon = _job("a", options=EnqueueOptions(priority=5)), _job("a", options=urgent)
    other = _job("b")
    for job in (late, other, soon):
        backlog.submit(job)
    claimed = [_claim(backlog).job.id for _ in range(3)]
    assert claimed == [soon.id, other.id, late.id]


def test_who_was_idle_has_no_credit(backlog: Backlog) -> None:
    for _ in range(20):
        backlog.submit(_job("a"))
    for _ in range(10):
        _finish(backlog, _claim(backlog), MEAN_TOKENS)
    for _ in range(10):
        backlog.submit(_job("b"))
    claimed = _tenants(backlog, 10)
    assert claimed.count("a") == claimed.count("b") == 5


def test_a_tenant_that_comes_begins_where_the_last_one_is(backlog: Backlog) -> None:
    for _ in range(9):
        backlog.submit(_job("a"))
    _tenants(backlog, 5)
    backlog.submit(_job("b"))
    assert _service(backlog, "b") == _service(backlog, "a") == 5 * ESTIMATE
    _tenants(backlog, 5)
    backlog.submit(_job("c"))
    assert _service(backlog, "c") >= 5 * ESTIMATE


def test_who_has_been_served_and_comes_back_keeps_its_counter_for_a_day(backlog: Backlog) -> None:
    backlog.redis.hset(keys.tokens("m"), mapping={"input": "100", "output": "200"})
    backlog.submit(_job("a"))
    _finish(backlog, _claim(backlog), 5000)
    assert _service(backlog, "a") == PROMPT_TOKENS + 5000
    assert 86_000 < backlog.redis.ttl(keys.served(*LANE, "a")) <= 86_400
    backlog.submit(_job("b"))
    for _ in range(20):
        backlog.submit(_job("a"))
        backlog.submit(_job("b"))
    assert _tenants(backlog, 9) == 9 * "b"


def test_a_job_is_charged_once_and_then_what_it_has_cost(backlog: Backlog) -> None:
    backlog.submit(_job("a"))
    for _ in range(3):
        claim = _claim(backlog)
        assert _service(backlog, "a") == ESTIMATE
        backlog.requeue(claim, Cause.HANDED_BACK, "stopped")
    claim = _claim(backlog)
    _finish(backlog, claim, 7)
    assert _service(backlog, "a") == PROMPT_TOKENS + 7
    assert not backlog.finish(claim, State.FAILED, usage=Usage(1, 1))
    assert _service(backlog, "a") == PROMPT_TOKENS + 7


def test_a_job_whose_tokens_are_not_known_is_charged_by_its_time(backlog: Backlog) -> None:
    backlog.redis.set(keys.service("m"), 1_000_000)
    backlog.submit(_job("a"))
    claim = _claim(backlog)
    started_us = int(backlog.redis.hget(keys.job(claim.job.id), "started_us") or 0)
    backlog.redis.hset(keys.job(claim.job.id), "started_us", str(started_us - 500_000))
    backlog.cancel(claim.job.id)
    assert 0.5 * ESTIMATE <= _service(backlog, "a") < 2 * ESTIMATE


def test_a_job_cancelled_before_it_started_costs_nothing(backlog: Backlog) -> None:
    job = _job("a")
    backlog.submit(job)
    backlog.cancel(job.id)
    assert _service(backlog, "a") == 0
    assert backlog.redis.exists(keys.turns(*LANE), keys.queue(*LANE, "a")) == 0


def test_the_estimate_knows_the_model_and_the_limit_of_the_job(backlog: Backlog) -> None:
    backlog.submit(_job("a", max_tokens=10, sequences=2))
    assert backlog.claim("m", "w", free_slots=2)
    assert _service(backlog, "a") == PROMPT_TOKENS + 2 * 10
    backlog.redis.hset(keys.tokens("m"), "output", "40")
    backlog.submit(_job("b", max_tokens=1000))
    _claim(backlog)
    assert _service(backlog, "b") == PROMPT_TOKENS + 40


def test_a_huge_prompt_is_charged_so_much_and_no_more_before_its_tokens_are_known(
    backlog: Backlog,
) -> None:
    backlog.submit(_job("a", sequences=10**6, weight=2.0))
    backlog.claim("m", "w", free_slots=10**6)
    assert _service(backlog, "a") == MOST_TOKENS / 2


def test_a_job_is_passed_over_at_most_once_by_each_tenant_that_pays_as_much(
    backlog: Backlog,
) -> None:
    tenants = [f"t{n}" for n in range(50)]
    for tenant in tenants:
        for _ in range(4):
            backlog.submit(_job(tenant))
    for _ in range(25):
        _claim(backlog)
    job = _job("zz")
    backlog.submit(job)
    waited = next(n for n in itertools.count() if _claim(backlog).job.id == job.id)
    assert waited <= len(tenants)


def _positions(backlog: Backlog, jobs: list[Job]) -> list[int]:
    return [place.position for place in places(backlog.redis, jobs) if place]


def test_positions_are_those_in_which_jobs_are_served(backlog: Backlog) -> None:
    backlog.redis.hset(keys.tokens("m"), mapping={"input": PROMPT_TOKENS, "output": 60})
    jobs = [_job(tenant, weight=2.0 if tenant == "c" else 1.0) for tenant in 9 * "a" + "bbbcccccc"]
    for job in jobs[:4]:
        backlog.submit(job)
    running = [_claim(backlog).job.id for _ in range(2)]
    for job in jobs[4:]:
        backlog.submit(job)
    waiting = [job for job in jobs if job.id not in running]
    positions = dict(zip((job.id for job in waiting), _positions(backlog, waiting), strict=True))
    claimed = [_claim(backlog).job.id for _ in waiting]
    assert {job_id: n + 1 for n, job_id in enumerate(claimed)} == positions


def test_positions_among_thousands_of_tenants_are_extrapolated(backlog: Backlog) -> None:
    backlog.redis.hset(keys.tokens("m"), mapping={"input": PROMPT_TOKENS, "output": 60})
    jobs = [_job(f"t{n:03}") for n in range(300) for _ in range(2)]
    for job in jobs:
        backlog.submit(job)
    assert _positions(backlog, [jobs[0], jobs[1], jobs[-1]]) == [1, 301, 600]


def test_jobs_of_an_older_version_are_served_and_get_their_turns(backlog: Backlog) -> None:
    old = [_job("a") for _ in range(3)]
    for job in old:
        backlog.submit(job)
        backlog.redis.hdel(keys.job(job.id), "weight", "max_tokens")
    backlog.redis.delete(keys.turns(*LANE), keys.queue(*LANE, "a"))
    assert _claim(backlog).job == old[0]
    new = _job("b")
    backlog.submit(new)
    assert backlog.sweep([job.id for job in old], place=keys.backlog(*LANE)) == 3 * ["open"]
    assert backlog.redis.zcard(keys.queue(*LANE, "a")) == 2
    assert sorted(_tenants(backlog, 2)) == ["a", "b"]


def test_a_turn_that_was_lost_is_repaired_and_one_without_jobs_is_passed(backlog: Backlog) -> None:
    lost, other = _job("b"), _job("c")
    for job in (lost, other):
        backlog.submit(job)
    backlog.redis.zrem(keys.turns(*LANE), "b")
    backlog.redis.zadd(keys.turns(*LANE), {"a": 0})
    backlog.redis.zadd(keys.queue(*LANE, "aa"), {"job_unknown": 1})
    backlog.redis.zadd(keys.turns(*LANE), {"aa": 0})
    assert _claim(backlog).job == other
    assert backlog.redis.exists(keys.turns(*LANE), keys.queue(*LANE, "aa")) == 0
    assert backlog.sweep([lost.id]) == ["misplaced"]
    assert _claim(backlog).job == lost


def test_a_suspect_goes_before_older_jobs_of_others(backlog: Backlog) -> None:
    queue = Backlog(backlog.redis, Settings(lease_s=300, max_attempts=2))
    queue.submit(_job("b"))
    suspect = _claim(queue)
    for _ in range(5):
        queue.submit(_job("a"))
    queue.requeue(suspect, Cause.ENGINE_ERROR, "503")
    assert _positions(queue, [suspect.job]) == [1]
    assert _claim(queue).job == suspect.job
    assert _tenants(queue, 3) == "aaa"
