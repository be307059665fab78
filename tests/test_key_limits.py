"""What keys and tenants may use: reserved when a job is admitted, settled once, on a real Redis."""

from datetime import UTC, datetime
from typing import Any

import pytest
import redis

from tasks.contract import keys
from tasks.contract.access import Allowance
from tasks.contract.errors import RateLimitError
from tasks.contract.job import Cause, Job, Lane, State, Usage, new_id
from tasks.contract.settings import Settings
from tasks.queue import backlog as module
from tasks.queue.backlog import RESERVATION_S, Backlog

# As many tokens as bytes: the most that there can be.
BODY = b"x" * 100
PROMPT_TOKENS = 100
NOW = "test:now_us"
TIME = "local time = redis.call('TIME')\n    return time[1] * 1000000 + time[2]"
NOON = datetime(2026, 1, 31, 12, tzinfo=UTC)
DAY_S = 86_400


@pytest.fixture
def backlog(bus: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> Backlog:
    """One whose clock stands still until a test moves it."""
    read = module.read_scripts.__wrapped__

    def with_own_clock(names: tuple[str, ...]) -> str:
        text: str = read(names)
        assert TIME in text
        return text.replace(TIME, f"return tonumber(redis.call('GET', '{NOW}'))")

    monkeypatch.setattr(module, "read_scripts", with_own_clock)
    bus.set(NOW, int(NOON.timestamp() * 1e6))
    return Backlog(bus, Settings(lease_s=300, max_backlog=100_000))


def pass_time(backlog: Backlog, seconds: float) -> None:
    backlog.redis.incrby(NOW, int(seconds * 1e6))


def job(max_tokens: int | None = 100, key_id: str = "k", **fields: Any) -> Job:
    return Job(
        *(new_id(), "m", "/v1/completions", BODY),
        max_tokens=max_tokens,
        key_id=key_id,
        tenant=fields.pop("tenant", "t"),
        **fields,
    )


def of(subject: str = "key:k", **limits: int) -> list[dict[str, Any]]:
    return [limits | {"subject": subject}]


def refusal(backlog: Backlog, asked: Job, limits: list[dict[str, Any]]) -> RateLimitError:
    with pytest.raises(RateLimitError) as refused:
        backlog.submit(asked, limits)
    return refused.value


def used(backlog: Backlog, subject: str = "key:k", period: str = "day") -> int:
    (key,) = backlog.redis.keys(f"{keys.USED_PREFIX}{subject}:{period}:*")
    return int(backlog.redis.get(key) or 0)  # type: ignore[arg-type]


def run(backlog: Backlog, tokens: int | None = 50) -> None:
    claim = backlog.claim("m", "w")
    assert claim
    usage = None if tokens is None else Usage(PROMPT_TOKENS, tokens)
    assert backlog.finish(claim, State.COMPLETED, usage=usage)


def left_places(server: redis.Redis) -> list[bytes]:
    """Keys that hold something for jobs that are open."""
    found = [keys.OPEN_PREFIX, keys.WAITING_PREFIX, keys.RESERVED_PREFIX, keys.HELD]
    left = [key for prefix in found for key in server.keys(f"{prefix}*")]
    # One that may still be told what it has used holds nothing.
    return [k for k in left if not (server.type(k) == b"string" and b"late" in server.get(k))]


def test_requests_per_minute_slide(backlog: Backlog) -> None:
    limits = of(requests_per_minute=4)
    for _ in range(4):
        backlog.submit(job(), limits)
    # None counts less before the next minute has begun.
    refused = refusal(backlog, job(), limits)
    assert refused.status == 429
    assert refused.retry_after_s == pytest.approx(75)
    assert "4 requests per minute" in str(refused)
    pass_time(backlog, refused.retry_after_s - 1)
    refusal(backlog, job(), limits)
    pass_time(backlog, 1.001)
    backlog.submit(job(), limits)
    refusal(backlog, job(), limits)


def test_tokens_per_minute_count_what_was_used(backlog: Backlog) -> None:
    limits = of(tokens_per_minute=350)
    backlog.submit(job(), limits)
    backlog.submit(job(), limits)
    assert refusal(backlog, job(), limits).type == "tokens"
    run(backlog, tokens=0)
    # The first one had reserved 125, its prompt by a quarter of its bytes, and used 100.
    backlog.submit(job(), limits)
    refusal(backlog, job(), limits)


def test_a_request_larger_than_a_limit_is_not_to_be_tried_again(backlog: Backlog) -> None:
    for limits in (of(tokens_per_minute=100), of(tokens_per_day=100)):
        refused = refusal(backlog, job(), limits)
        assert refused.retry_after_s is None
        assert refused.should_retry is False
        assert "this request alone" in str(refused)


@pytest.mark.parametrize(
    ("period", "until"),
    [("day", datetime(2026, 2, 1, tzinfo=UTC)), ("month", datetime(2026, 2, 1, tzinfo=UTC))],
)
def test_a_budget_lasts_until_its_period_ends(
    backlog: Backlog, period: str, until: datetime
) -> None:
    limits = of(**{f"tokens_per_{period}": 300})
    backlog.submit(job(), limits)
    run(backlog, 100)
    refused = refusal(backlog, job(), limits)
    assert refused.code == "insufficient_quota"
    assert refused.should_retry is False
    assert refused.retry_after_s == (until - NOON).total_seconds()
    pass_time(backlog, refused.retry_after_s - 1)
    refusal(backlog, job(), limits)
    pass_time(backlog, 1)
    backlog.submit(job(), limits)


def test_months_are_those_of_the_calendar(backlog: Backlog) -> None:
    limits = of(tokens_per_month=200)
    for year in range(1999, 2005):
        for month in range(1, 13):
            first = datetime(year, month, 1, tzinfo=UTC)
            after = datetime(year + month // 12, month % 12 + 1, 1, tzinfo=UTC)
            backlog.redis.flushall()
            backlog.redis.set(NOW, int(first.timestamp() * 1e6))
            backlog.submit(job(), limits)
            run(backlog, 100)
            assert refusal(backlog, job(), limits).retry_after_s == (after - first).total_seconds()


@pytest.mark.parametrize("lane", Lane)
def test_jobs_that_wait_and_those_that_are_open_are_counted(backlog: Backlog, lane: Lane) -> None:
    limits = of(queued_jobs=2, parallel_requests=3)
    for _ in range(2):
        backlog.submit(job(lane=lane), limits)
    assert "2 jobs that wait" in str(refusal(backlog, job(lane=lane), limits))
    claim = backlog.claim("m", "w")
    assert claim
    third = job(lane=lane)
    backlog.submit(third, limits)
    backlog.requeue(claim, Cause.HANDED_BACK, "")
    for _ in range(3):
        assert backlog.claim("m", "w")
    if lane is Lane.INTERACTIVE:
        assert "3 requests at once" in str(refusal(backlog, job(lane=lane), limits))
        assert backlog.cancel(third.id)
    backlog.submit(job(lane=lane), limits)


def test_the_strictest_limit_tells_how_long(backlog: Backlog) -> None:
    limits = of(requests_per_minute=1) + of("tenant:t", tokens_per_day=200)
    backlog.submit(job(), limits)
    run(backlog, 100)
    refused = refusal(backlog, job(), limits)
    assert "Your tenant" in str(refused)
    assert refused.retry_after_s == DAY_S / 2
    # Its other keys have used it up as well.
    refusal(backlog, job(key_id="other"), of("tenant:t", tokens_per_day=200))


@pytest.mark.parametrize("tokens", [0, 10, 5000])
def test_what_was_reserved_is_settled_once(backlog: Backlog, tokens: int) -> None:
    backlog.submit(first := job())
    assert used(backlog) == used(backlog, "tenant:t") == used(backlog, period="month") == 200
    run(backlog, tokens)
    for _ in range(2):
        assert backlog.settle({first.id: 12_345}) == [first.id]
    for subject in ("key:k", "tenant:t"):
        assert used(backlog, subject) == used(backlog, subject, "month") == PROMPT_TOKENS + tokens
    assert left_places(backlog.redis) == []


def test_a_job_that_never_ran_costs_nothing(backlog: Backlog) -> None:
    backlog.submit(cancelled := job())
    assert backlog.cancel(cancelled.id)
    assert used(backlog) == 0
    assert left_places(backlog.redis) == []


@pytest.mark.parametrize(("known", "cost"), [(30, 30), (None, 200)])
def test_a_job_stopped_on_its_way_is_settled_when_it_is_recorded(
    backlog: Backlog, known: int | None, cost: int
) -> None:
    backlog.submit(cancelled := job())
    assert backlog.claim("m", "w")
    assert backlog.cancel(cancelled.id)
    assert used(backlog) == 200
    backlog.settle({cancelled.id: known})
    assert used(backlog) == cost
    assert left_places(backlog.redis) == []


def test_a_job_that_moves_to_another_worker_is_charged_once(backlog: Backlog) -> None:
    limits = of(tokens_per_day=399)
    backlog.submit(job(), limits)
    pass_time(backlog, 1)
    assert backlog.claim("m", "killed")
    pass_time(backlog, 301)
    assert [each.state for each in backlog.reap()] == [State.QUEUED]
    refusal(backlog, job(), limits)
    run(backlog, 50)
    assert used(backlog) == 150
    backlog.submit(job(), limits)


@pytest.mark.parametrize("is_released", [True, False])
def test_what_is_reserved_for_a_job_that_is_not_accepted_is_given_back(
    backlog: Backlog, is_released: bool
) -> None:
    limits = of(tokens_per_day=399, queued_jobs=1)
    asked = job()
    for _ in range(2):  # its reply was lost
        assert backlog.reserve(asked, limits) == asked.id
    refusal(backlog, job(), limits)
    if is_released:
        backlog.release(asked)
    else:
        pass_time(backlog, RESERVATION_S + 1)
        backlog.reap()
    assert used(backlog) == 0
    assert left_places(backlog.redis) == []


@pytest.mark.parametrize("late_s", [0, RESERVATION_S + 1])
def test_an_accepted_job_keeps_what_is_reserved_for_it(backlog: Backlog, late_s: float) -> None:
    limits = of(tokens_per_day=200)
    backlog.reserve(accepted := job(lane=Lane.BATCH), limits)
    pass_time(backlog, late_s)
    backlog.reap()
    for _ in range(2):
        backlog.queue(accepted)
    pass_time(backlog, RESERVATION_S + 1)
    backlog.reap()
    assert used(backlog) == 200
    refusal(backlog, job(), limits)
    run(backlog)
    assert used(backlog) == 150


def test_a_job_sent_again_after_a_lost_reply_counts_once(backlog: Backlog) -> None:
    limits = of(requests_per_minute=1)
    asked = job()
    assert backlog.submit(asked, limits) == backlog.submit(asked, limits) == asked.id


def test_jobs_without_a_key_leave_nothing(backlog: Backlog) -> None:
    backlog.submit(job(key_id=""))
    run(backlog)
    assert backlog.redis.keys(f"{keys.USED_PREFIX}*") == left_places(backlog.redis) == []


def test_what_is_left_is_told(backlog: Backlog) -> None:
    told: list[Allowance] = []
    limits = of(requests_per_minute=10, tokens_per_minute=1000)
    limits += of("tenant:t", requests_per_minute=5)
    for _ in range(2):
        backlog.submit(job(), limits, told.append)
    first, second = told
    assert first.requests
    assert (first.requests.most, first.requests.left, first.requests.resets_s) == (5, 4, 120)
    assert second.requests
    assert second.requests.left == 3
    assert second.tokens
    assert (second.tokens.most, second.tokens.left) == (1000, 750)


def test_a_guess_refuses_no_job_for_ever(backlog: Backlog) -> None:
    """The model's answers have been long, as others asked for that; this one may be short."""
    backlog.redis.hset(keys.tokens("m"), "output", "50000")
    limits = of(tokens_per_minute=1000)
    backlog.submit(job(max_tokens=None), limits)
    refused = refusal(backlog, job(max_tokens=None), limits)
    assert refused.retry_after_s
    pass_time(backlog, refused.retry_after_s + 0.1)
    backlog.submit(job(max_tokens=None), limits)


def test_what_is_only_reserved_of_a_budget_may_soon_be_there_again(backlog: Backlog) -> None:
    limits = of(tokens_per_day=1000)
    backlog.submit(job(max_tokens=900), limits)
    refused = refusal(backlog, job(max_tokens=300), limits)
    assert refused.retry_after_s == 1
    assert refused.should_retry is None
    run(backlog, 50)
    backlog.submit(job(max_tokens=300), limits)
    run(backlog, 800)
    assert refusal(backlog, job(max_tokens=300), limits).retry_after_s == DAY_S / 2


def test_what_a_stopped_job_has_used_is_settled_when_its_worker_knows(backlog: Backlog) -> None:
    backlog.submit(cancelled := job())
    assert backlog.claim("m", "w")
    assert backlog.cancel(cancelled.id)
    backlog.settle({cancelled.id: None})
    assert used(backlog) == 200
    for _ in range(2):
        backlog.report(cancelled.id, Usage(PROMPT_TOKENS, 7))
        assert used(backlog) == PROMPT_TOKENS + 7


def test_what_an_answer_has_beyond_the_estimate_counts_when_it_ends(backlog: Backlog) -> None:
    limits = of(tokens_per_minute=1000)
    backlog.submit(job(max_tokens=None), limits)
    claim = backlog.claim("m", "w")
    assert claim
    pass_time(backlog, 200)
    assert backlog.finish(claim, State.COMPLETED, usage=Usage(100, 5000))
    assert refusal(backlog, job(), limits).retry_after_s


def test_batch_jobs_are_not_bounded_in_how_many_run(backlog: Backlog) -> None:
    limits = of(parallel_requests=1)
    backlog.submit(job(), limits)
    backlog.submit(job(lane=Lane.BATCH), limits)
    refusal(backlog, job(), limits)


def test_a_place_whose_job_holds_none_is_found_when_it_is_needed(backlog: Backlog) -> None:
    limits = of(queued_jobs=2)
    backlog.redis.sadd(keys.WAITING_PREFIX + "key:k", "lost", "lost too")
    backlog.submit(job(), limits)
    backlog.submit(job(), limits)
    refusal(backlog, job(), limits)
