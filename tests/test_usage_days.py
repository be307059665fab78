"""Daily sums of what tenants use: each job is in them once."""

import csv
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, date, datetime, timedelta
from typing import Any

import pytest

from bench.stack import Stack, await_that, running
from db import migrate, usage
from db.jobs import Change, apply
from db.models import JobEvent, JobRecord, JobResult, LedgerEntry
from tests.conftest import SIM
from tests.test_jobs import CHAT, ENDPOINT, call

ADMIN = {"Authorization": "Bearer admin"}
NOON = datetime(2026, 1, 31, 12, tzinfo=UTC)
TODAY = date(2026, 1, 31)
USED = {"prompt_tokens": 5, "completion_tokens": 7, "prompt_tokens_details": {"cached_tokens": 4}}


def ended(
    job_id: str,
    *,
    tenant: str = "a",
    model: str = "m",
    state: str = "completed",
    at: datetime = NOON,
    used: Any = USED,
) -> Change:
    kind = {"tenant": tenant, "model": model, "endpoint": "/v1/completions", "lane": "batch"}
    job = JobRecord(id=job_id, created_at=at, completed_at=at, status=state, **kind)
    event = JobEvent(job_id=job_id, record_id="1-0", at=at, state=state, attempt=1, worker="w")
    result = JobResult(job_id=job_id, status_code=200, body=None, error=None, usage=used)
    entry = LedgerEntry(
        job_id=job_id, state=state, attempts=1, queued_at=at, started_at=at, ended_at=at, **kind
    )
    return Change(job, event, result, entry)


@pytest.fixture
def url(database_url: str) -> str:
    migrate(database_url)
    return database_url


def rows(url: str, tenant: str | None = None, days: int = 0) -> list[Sequence[Any]]:
    found = usage.read(url, TODAY - timedelta(days), TODAY + timedelta(days), tenant)
    names = "jobs", "failed_jobs", "prompt_tokens", "cached_tokens", "completion_tokens"
    return [
        (day.day.day, day.tenant, day.model, *(getattr(day, name) for name in names))
        for day in found
    ]


def test_each_job_is_counted_once(url: str) -> None:
    assert apply(url, [ended("j1"), ended("j2"), ended("j1")]) == 2
    assert apply(url, [ended("j2"), ended("j3", state="failed", used=None)]) == 1
    assert rows(url) == [(31, "a", "m", 3, 1, 10, 8, 14)]


def test_processes_that_record_the_same_jobs_count_them_once(url: str) -> None:
    changes = [ended(f"j{n}", tenant="abc"[n % 3]) for n in range(60)]
    with ThreadPoolExecutor(4) as pool:
        new = list(pool.map(lambda _: apply(url, changes), range(4)))
    assert sum(new) == 60
    assert [row[3] for row in rows(url)] == [20, 20, 20]


def test_days_are_those_of_utc_and_tenants_see_their_own(url: str) -> None:
    late = datetime(2026, 2, 1, 0, 30, tzinfo=UTC) - timedelta(hours=1)
    apply(url, [ended("j1", at=late), ended("j2", at=late + timedelta(hours=1), model="n")])
    apply(url, [ended("j3", tenant="b")])
    assert [row[:3] for row in rows(url, days=1)] == [
        (1, "a", "n"),
        (31, "a", "m"),
        (31, "b", "m"),
    ]
    assert [row[:3] for row in rows(url, "b", days=1)] == [(31, "b", "m")]


@pytest.mark.parametrize(
    "used",
    [
        {"prompt_tokens": "5"},
        {"prompt_tokens": -1, "completion_tokens": 2**80},
        {"prompt_tokens": None, "prompt_tokens_details": [1]},
    ],
)
def test_what_is_no_number_of_tokens_counts_as_none(url: str, used: Any) -> None:
    apply(url, [ended("j1", used=used), ended("j2")])
    assert rows(url) == [(31, "a", "m", 2, 0, 5, 4, 7)]


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with running(Stack(tmp_path_factory.mktemp("usage"), [SIM], admin_key="admin")) as stack:
        yield stack


def test_what_was_used_can_be_got_as_json_and_as_csv(stack: Stack) -> None:
    for _ in range(3):
        assert call(stack, "POST", ENDPOINT, json=CHAT, headers=ADMIN).status_code == 200

    def sums() -> list[dict[str, Any]]:
        data: list[dict[str, Any]] = call(stack, "GET", "/v1/usage", headers=ADMIN).json()["data"]
        return data

    await_that(lambda: [day["jobs"] for day in sums()] == [3])
    (day,) = sums()
    assert (day["tenant"], day["model"], day["failed_jobs"]) == ("default", "sim", 0)
    assert day["completion_tokens"] == 3 * CHAT["max_tokens"]
    assert call(stack, "GET", "/v1/admin/usage", headers=ADMIN).json()["data"] == [day]
    table = call(stack, "GET", "/v1/admin/usage?format=csv", headers=ADMIN)
    assert table.headers["content-type"].startswith("text/csv")
    (row,) = csv.DictReader(table.text.splitlines())
    assert row == {name: str(value) for name, value in day.items()}
    assert call(stack, "GET", "/v1/admin/usage?tenant=x", headers=ADMIN).json()["data"] == []


@pytest.mark.parametrize(
    "query", ["since=yesterday", "since=0", "format=xlsx", "tenant=default", "until=2026-02-30"]
)
def test_a_wrong_question_about_usage_is_refused(stack: Stack, query: str) -> None:
    assert call(stack, "GET", f"/v1/usage?{query}", headers=ADMIN).status_code == 400


def test_the_usage_of_all_is_the_operators(stack: Stack) -> None:
    assert call(stack, "GET", "/v1/admin/usage").status_code == 401


def test_a_name_is_no_formula_in_a_spreadsheet(stack: Stack) -> None:
    database = f"sqlite:///{stack.home / 'sluice.db'}"
    apply(database, [ended("j1", tenant="=1+1", at=datetime.now(UTC))])
    asked = "/v1/admin/usage?format=csv&tenant=%3D1%2B1"
    table = call(stack, "GET", asked, headers=ADMIN)
    (row,) = csv.DictReader(table.text.splitlines())
    assert row["tenant"] == "'=1+1"
