"""The jobs API with the sim engine: what can be done with a request by its id."""

import re
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import requests
from sqlalchemy import select

from bench.stack import Stack, await_that, running, send
from db import writing
from db.jobs import accept, load
from db.models import JobEvent, JobRecord
from tasks.contract import keys
from tasks.contract.job import Job, new_id
from tasks.queue.backlog import Backlog
from tests.conftest import SIM

CHAT = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 5}
STREAM = CHAT | {"stream": True}
# Minutes: no test waits for its end.
LONG = STREAM | {"max_tokens": 60_000}
ENDPOINT = "/v1/chat/completions"
SLOW = SIM | {"slots": 1, "args": {"tokens-per-s": 50, "first-token-s": 0.01}}


@pytest.fixture(scope="module")
def one_slot(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A second job waits."""
    home = tmp_path_factory.mktemp("slow")
    with running(Stack(home, [SLOW], lease_s=3, keep_alive_s=1)) as stack:
        yield stack


@pytest.fixture
def slow_stack(one_slot: Stack) -> Stack:
    """The same without any job."""
    one_slot.clear()
    return one_slot


def call(stack: Stack, method: str, path: str, **options: Any) -> requests.Response:
    # Longer than any wait that a test prefers: 60 s.
    return requests.request(method, stack.url + path, timeout=120, **options)


def submit(stack: Stack, body: dict[str, Any] = CHAT, **options: Any) -> dict[str, Any]:
    job = {"endpoint": ENDPOINT, "body": body, **options}
    response = call(stack, "POST", "/v1/jobs", json=job)
    assert response.status_code == 202, response.text
    assert response.headers["location"] == f"/v1/jobs/{response.json()['id']}"
    return dict(response.json())


def test_what_is_refused_is_not_accepted(sim_stack: Stack) -> None:
    """A wish that could not be read was refused when the job had been accepted."""
    known = set(sim_stack.redis.keys(keys.job("*")))
    job, wish = {"endpoint": ENDPOINT, "body": CHAT}, {"Prefer": "wait=soon"}
    assert call(sim_stack, "POST", "/v1/jobs", json=job, headers=wish).status_code == 400
    assert set(sim_stack.redis.keys(keys.job("*"))) <= known


def test_any_name_of_a_model_can_be_answered(home: Path) -> None:
    """One that is not Latin was answered with 500 to every request."""
    with running(Stack(home, [SIM | {"name": "модель 100%"}], keep_alive_s=1)) as stack:
        for body in (CHAT, STREAM):
            answer = call(stack, "POST", ENDPOINT, json=body)
            assert answer.status_code == 200
            assert unquote(answer.headers["x-sluice-model"]) == "модель 100%"


def get(stack: Stack, job_id: str) -> dict[str, Any]:
    """The job; its status is None while it cannot be read."""
    return {"status": None} | call(stack, "GET", f"/v1/jobs/{job_id}").json()


def wait(stack: Stack, job_id: str, wait_s: int | None = None) -> requests.Response:
    """The job when it has ended; with `wait_s`, as it is after so many seconds at most."""
    wish = {"Prefer": f"wait={20 if wait_s is None else wait_s}"}
    ask = lambda: call(stack, "GET", f"/v1/jobs/{job_id}", headers=wish)
    answer = ask()
    until_s = time.monotonic() + 240
    while wait_s is None and answer.status_code == 202 and time.monotonic() < until_s:
        answer = ask()
    return answer


def events(stack: Stack, job_id: str, after: str = "") -> str:
    path = f"/v1/jobs/{job_id}/events"
    return call(stack, "GET", path + (after and f"?starting_after={after}")).text


def ids(text: str) -> list[str]:
    return re.findall(r"^id: (.*)$", text, re.MULTILINE)


def repeated(text: str) -> str:
    """The events that have an id, and the end: what is the same each time."""
    whole = [
        event for event in text.split("\n\n") if event and not event.startswith((":", "event"))
    ]
    return "\n\n".join(whole)


def recorded(stack: Stack, job_id: str) -> JobRecord | None:
    """What SQL has of the job: its start or its end."""
    return load(f"sqlite:///{stack.home / 'sluice.db'}", job_id)


def in_sql(stack: Stack, job_id: str) -> bool:
    job = recorded(stack, job_id)
    return job is not None and job.completed_at is not None


def test_a_job_is_accepted_waited_for_and_answered(sim_stack: Stack) -> None:
    job = submit(sim_stack, metadata={"purpose": "test"})
    assert (job["object"], job["endpoint"], job["model"]) == ("job", ENDPOINT, "sim")
    assert (job["status"], job["response"], job["error"]) == ("queued", None, None)
    done = wait(sim_stack, job["id"])
    assert done.status_code == 200
    found = done.json()
    assert found["status"] == "completed"
    assert found["metadata"] == {"purpose": "test"}
    assert found["attempts"] == 1
    assert found["response"]["status_code"] == 200
    posted = call(sim_stack, "POST", ENDPOINT, json=CHAT).json()
    assert found["response"]["body"]["choices"] == posted["choices"]
    assert found["usage"]["completion_tokens"] == 5
    assert 0 <= found["started_at"] - found["created_at"] <= found["completed_at"]


def test_a_streamed_job_is_polled_as_one_answer(sim_stack: Stack) -> None:
    with_usage = STREAM | {"stream_options": {"include_usage": True}}
    found = wait(sim_stack, submit(sim_stack, with_usage)["id"]).json()
    body = found["response"]["body"]
    posted = call(sim_stack, "POST", ENDPOINT, json=CHAT).json()
    assert body["object"] == "chat.completion"
    assert body["choices"][0]["finish_reason"] == "length"
    message, wanted = body["choices"][0]["message"], posted["choices"][0]["message"]
    assert (message["role"], message["content"]) == (wanted["role"], wanted["content"])
    assert found["usage"]["completion_tokens"] == 5


def test_waiting_answers_202_when_time_is_up(sim_stack: Stack) -> None:
    job = submit(sim_stack, LONG)
    await_that(lambda: get(sim_stack, job["id"])["status"] == "in_progress")
    response = wait(sim_stack, job["id"], 1)
    assert response.status_code == 202
    assert response.json()["status"] == "in_progress"
    assert call(sim_stack, "POST", f"/v1/jobs/{job['id']}/cancel").json()["status"] == "cancelled"
    assert wait(sim_stack, job["id"]).status_code == 200


def test_submitting_may_wait_too(sim_stack: Stack) -> None:
    job = {"endpoint": ENDPOINT, "body": CHAT}
    done = call(sim_stack, "POST", "/v1/jobs", json=job, headers={"Prefer": "wait=60"})
    assert done.status_code == 200
    assert done.json()["status"] == "completed"


def test_an_ordinary_request_answers_later_when_it_prefers_so(sim_stack: Stack) -> None:
    for path in (ENDPOINT, "/v1/completions", "/v1/embeddings"):
        body = {"prompt": "Once", "input": "Once", "max_tokens": 3, **CHAT}
        header = {"Prefer": "respond-async"}
        accepted = call(sim_stack, "POST", path, json=body, headers=header)
        assert accepted.status_code == 202
        assert accepted.headers["preference-applied"] == "respond-async"
        assert wait(sim_stack, accepted.headers["x-sluice-job"]).status_code == 200


def test_a_chat_request_is_a_job_like_any_other(sim_stack: Stack) -> None:
    streamed = call(sim_stack, "POST", ENDPOINT, json=STREAM)
    job_id = streamed.headers["x-sluice-job"]
    found = wait(sim_stack, job_id).json()
    assert found["status"] == "completed"
    replayed = events(sim_stack, job_id)
    assert "".join(re.sub(r"^id: .*\n", "", replayed, flags=re.MULTILINE)) == streamed.text
    await_that(lambda: in_sql(sim_stack, job_id))
    listed = call(sim_stack, "GET", "/v1/jobs?limit=100").json()["data"]
    assert found in listed


def test_events_resume_after_each_one_with_the_same_bytes(sim_stack: Stack) -> None:
    job = submit(sim_stack, STREAM | {"max_tokens": 40})
    live = repeated(events(sim_stack, job["id"]))
    whole = events(sim_stack, job["id"])
    assert repeated(whole) == live
    assert whole.endswith("data: [DONE]\n\n")
    for event_id in ids(whole):
        rest = whole.split(f"id: {event_id}\n")[1].split("\n\n", 1)[1]
        assert events(sim_stack, job["id"], event_id) in (rest, "data: [DONE]\n\n")
    header = {"Last-Event-ID": ids(whole)[3]}
    resumed = call(sim_stack, "GET", f"/v1/jobs/{job['id']}/events", headers=header).text
    assert ids(resumed) == ids(whole)[4:]


def test_an_answer_that_is_not_streamed_is_one_event(sim_stack: Stack) -> None:
    job = submit(sim_stack)
    body = wait(sim_stack, job["id"]).json()["response"]["body"]
    (event_id,) = ids(text := events(sim_stack, job["id"]))
    data = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
    assert (requests.models.complexjson.loads(data[0]), data[1]) == (body, "[DONE]")
    assert events(sim_stack, job["id"], event_id) == "data: [DONE]\n\n"


def test_a_refusal_by_the_engine_fails_the_job_with_its_answer(sim_stack: Stack) -> None:
    found = wait(sim_stack, submit(sim_stack, CHAT | {"max_tokens": -1})["id"]).json()
    assert found["status"] == "failed"
    assert found["response"]["status_code"] == 400
    assert found["error"] == found["response"]["body"]["error"]


def test_position_and_eta_count_down(slow_stack: Stack) -> None:
    wait(slow_stack, submit(slow_stack, CHAT)["id"])
    # A batch job would make way for the interactive one that follows.
    running_job = submit(slow_stack, LONG, priority="interactive")
    await_that(lambda: get(slow_stack, running_job["id"])["status"] == "in_progress")
    queued = [submit(slow_stack, STREAM) for _ in range(3)]
    first = submit(slow_stack, STREAM, priority="interactive")
    found = [get(slow_stack, job["id"])["queue"] for job in [first, *queued]]
    assert [place["position"] for place in found] == [1, 2, 3, 4]
    assert all(place["eta_s"] > 0 for place in found)
    path = f"/v1/jobs/{queued[-1]['id']}/events"
    with call(slow_stack, "GET", path, stream=True) as followed:
        lines = followed.iter_lines(decode_unicode=True)
        first_place = next(line for line in lines if "position" in line)
        # The others move up once it is seen.
        call(slow_stack, "POST", f"/v1/jobs/{running_job['id']}/cancel")
        text = "\n".join(["event: queue", first_place, *lines])
    seen = [int(n) for n in re.findall(r'event: queue\ndata: {"position":(\d+)', text)]
    assert seen[0] == 4
    assert seen == sorted(seen, reverse=True)


def test_priority_orders_the_lane(slow_stack: Stack) -> None:
    blocker = submit(slow_stack, LONG)
    await_that(lambda: get(slow_stack, blocker["id"])["status"] == "in_progress")
    late, soon = submit(slow_stack, priority=5), submit(slow_stack, priority=-5)
    assert get(slow_stack, soon["id"])["queue"]["position"] == 1
    assert get(slow_stack, late["id"])["queue"]["position"] == 2


def test_a_job_that_has_not_started_by_its_deadline_expires(slow_stack: Stack) -> None:
    blocker = submit(slow_stack, LONG)
    await_that(lambda: get(slow_stack, blocker["id"])["status"] == "in_progress")
    late = submit(slow_stack, STREAM, deadline_s=0.5)
    found = wait(slow_stack, late["id"]).json()
    assert (found["status"], found["attempts"], found["started_at"]) == ("expired", 0, None)
    assert found["error"]["code"] == "job_expired"
    assert '"code":"job_expired"' in events(slow_stack, late["id"])


def test_cancelling_and_retrying(slow_stack: Stack) -> None:
    blocker = submit(slow_stack, LONG)
    await_that(lambda: get(slow_stack, blocker["id"])["status"] == "in_progress")
    queued = submit(slow_stack, CHAT, metadata={"a": "b"})
    assert call(slow_stack, "POST", f"/v1/jobs/{queued['id']}/retry").status_code == 409
    for job in (queued, blocker):
        cancelled = call(slow_stack, "POST", f"/v1/jobs/{job['id']}/cancel")
        assert (cancelled.status_code, cancelled.json()["status"]) == (200, "cancelled")
    await_that(lambda: slow_stack.redis.zcard(keys.LEASES) == 0)
    again = call(slow_stack, "POST", f"/v1/jobs/{queued['id']}/retry")
    assert again.status_code == 202
    assert again.json()["id"] != queued["id"]
    done = wait(slow_stack, again.json()["id"]).json()
    assert (done["status"], done["metadata"]) == ("completed", {"a": "b"})
    for action in ("cancel", "retry"):
        refused = call(slow_stack, "POST", f"/v1/jobs/{done['id']}/{action}")
        assert (refused.status_code, refused.json()["error"]["type"]) == (409, "conflict_error")


def test_jobs_are_listed_in_pages_and_filtered(slow_stack: Stack) -> None:
    blocker = submit(slow_stack, LONG)
    await_that(lambda: get(slow_stack, blocker["id"])["status"] == "in_progress")
    queued = [submit(slow_stack, CHAT)["id"] for _ in range(5)]

    def listed(query: str) -> Any:
        return call(slow_stack, "GET", f"/v1/jobs?{query}").json()

    page = listed("limit=2")
    assert [job["id"] for job in page["data"]] == queued[:2:-1]
    assert (page["object"], page["has_more"]) == ("list", True)
    assert (page["first_id"], page["last_id"]) == (queued[-1], queued[-2])
    rest = listed(f"limit=10&after={page['last_id']}")
    assert [job["id"] for job in rest["data"]] == [*queued[2::-1], blocker["id"]]
    assert rest["has_more"] is False
    # What runs is in this list a moment later.
    await_that(lambda: listed("status=in_progress")["data"])
    assert [job["id"] for job in listed("status=in_progress")["data"]] == [blocker["id"]]
    assert len(listed("status=queued")["data"]) == 5
    assert listed("status=completed")["data"] == listed("model=other")["data"] == []
    assert len(listed("model=sim")["data"]) == len(listed("model=gpt-3.5-turbo")["data"]) == 6


@pytest.mark.parametrize("how", ["body", "header"])
def test_a_dropped_stream_runs_on_when_it_was_to_continue(sim_stack: Stack, how: str) -> None:
    body = STREAM | {"max_tokens": 100}
    if how == "body":
        with send(sim_stack, body | {"on_disconnect": "continue"}) as client:
            seen = client.recv(4000).decode()
    else:
        header = {"x-sluice-on-disconnect": "continue"}
        with call(sim_stack, "POST", ENDPOINT, json=body, headers=header, stream=True) as response:
            seen = f"x-sluice-job: {response.headers['x-sluice-job']}\n"
    found = re.search(r"x-sluice-job: (\S+)", seen)
    assert found
    done = wait(sim_stack, found[1])
    assert done.json()["status"] == "completed"
    assert len(ids(events(sim_stack, found[1]))) == 102


def test_equal_requests_with_a_key_are_one_job(sim_stack: Stack) -> None:
    def ask(**options: Any) -> requests.Response:
        header = {"Idempotency-Key": "the same"}
        return call(sim_stack, "POST", ENDPOINT, json=options or CHAT, headers=header)

    first, second = ask(), ask()
    assert first.headers["x-sluice-job"] == second.headers["x-sluice-job"]
    assert first.json() == second.json()
    refused = ask(**STREAM)
    assert refused.status_code == 422
    assert refused.json()["error"]["code"] == "idempotency_key_reused"


def test_a_second_caller_attaches_to_the_running_stream(sim_stack: Stack) -> None:
    header = {"Idempotency-Key": "attach"}
    body = STREAM | {"max_tokens": 200}
    first = call(sim_stack, "POST", ENDPOINT, json=body, headers=header, stream=True)
    next(first.iter_content(10))
    second = call(sim_stack, "POST", ENDPOINT, json=body, headers=header)
    assert first.headers["x-sluice-job"] == second.headers["x-sluice-job"]
    assert second.text.endswith(first.text[-500:])
    assert second.text.count("data: ") == 202


@pytest.mark.parametrize("are_two", [True, False])
def test_a_client_that_leaves_ends_a_job_that_nobody_else_waits_for(
    sim_stack: Stack, are_two: bool
) -> None:
    key = f"shared by two: {are_two}"
    header = {"Idempotency-Key": key, "x-sluice-on-disconnect": "abort"}
    body = STREAM | {"max_tokens": 400} if are_two else LONG
    first = call(sim_stack, "POST", ENDPOINT, json=body, headers=header, stream=True)
    pieces = first.iter_content(10)  # once it is collected the connection is closed
    next(pieces)
    job_id = first.headers["x-sluice-job"]
    if not are_two:
        first.close()
        await_that(lambda: get(sim_stack, job_id)["status"] == "cancelled")
        return
    with call(sim_stack, "POST", ENDPOINT, json=body, headers=header, stream=True) as second:
        assert second.headers["x-sluice-job"] == job_id
        first.close()
        assert second.text.count("data: ") == 402
    assert wait(sim_stack, job_id).json()["status"] == "completed"


def test_the_key_of_a_chat_is_a_background_jobs_once_the_chat_is_recorded(
    sim_stack: Stack,
) -> None:
    """A 202 was answered for it, and with Redis it would have been lost."""
    header = {"Idempotency-Key": "of a chat"}
    later = header | {"Prefer": "respond-async"}
    body = LONG

    def check_refused() -> None:
        refused = call(sim_stack, "POST", ENDPOINT, json=body, headers=later)
        assert refused.status_code == 409
        assert refused.json()["error"]["code"] == "idempotency_key_in_use"
        assert refused.headers["retry-after"] == "1"

    with call(sim_stack, "POST", ENDPOINT, json=body, headers=header, stream=True) as chat:
        next(chat.iter_content(10))
        check_refused()
        job_id = chat.headers["x-sluice-job"]
        await_that(lambda: recorded(sim_stack, job_id) is not None)
        check_refused()
        call(sim_stack, "POST", f"/v1/jobs/{job_id}/cancel")
    await_that(lambda: in_sql(sim_stack, job_id))
    again = call(sim_stack, "POST", ENDPOINT, json=body, headers=later)
    assert (again.status_code, again.json()["id"]) == (200, job_id)


def test_equal_background_jobs_with_a_key_are_one(sim_stack: Stack) -> None:
    def ask(body: dict[str, Any] = CHAT) -> requests.Response:
        job = {"endpoint": ENDPOINT, "body": body}
        return call(
            sim_stack, "POST", "/v1/jobs", json=job, headers={"Idempotency-Key": "background"}
        )

    first = ask()
    wait(sim_stack, first.json()["id"])
    assert ask().json()["id"] == first.json()["id"]
    assert ask(STREAM).status_code == 422
    # Redis has forgotten it: SQL has not.
    sim_stack.redis.delete(keys.idempotency("default", "background"))
    assert ask().json()["id"] == first.json()["id"]
    assert ask(STREAM).status_code == 422


def test_after_redis_has_forgotten_a_job_sql_answers(sim_stack: Stack) -> None:
    header = {"Idempotency-Key": "old"}
    first = call(sim_stack, "POST", ENDPOINT, json=STREAM, headers=header)
    job_id = first.headers["x-sluice-job"]
    before = wait(sim_stack, job_id).json()
    await_that(lambda: in_sql(sim_stack, job_id))
    sim_stack.redis.delete(keys.job(job_id), keys.log(job_id))
    assert get(sim_stack, job_id) == before
    assert before["response"]["body"]["choices"][0]["message"]["content"] in events(
        sim_stack, job_id
    )
    again = call(sim_stack, "POST", ENDPOINT, json=STREAM, headers=header)
    assert again.json() == before["response"]["body"]
    with writing(f"sqlite:///{sim_stack.home / 'sluice.db'}") as session:
        states = session.scalars(select(JobEvent.state).where(JobEvent.job_id == job_id))
        assert list(states) == ["in_progress", "completed"]


@pytest.mark.parametrize("priority", ["interactive", -100, 5.0])
def test_a_priority_is_a_lane_or_an_integer_in_any_form(sim_stack: Stack, priority: Any) -> None:
    assert submit(sim_stack, priority=priority)["status"] in ("queued", "in_progress")


BAD_JOBS: list[tuple[dict[str, Any], str | None]] = [
    ({"endpoint": "/v1/nothing"}, "endpoint"),
    ({"body": "text"}, "body"),
    ({"extra": 1}, "extra"),
    ({"priority": "urgent"}, "priority"),
    ({"priority": 101}, "priority"),
    ({"priority": 1.5}, "priority"),
    ({"deadline_s": 0}, "deadline_s"),
    ({"deadline_s": -5}, "deadline_s"),
    ({"deadline_s": "soon"}, "deadline_s"),
    ({"metadata": {str(n): "" for n in range(17)}}, "metadata"),
    ({"metadata": {"k": "v" * 513}}, "metadata.k"),
    ({"metadata": {"k": 1}}, "metadata.k"),
    ({"metadata": {"k": "\0"}}, "metadata.k"),
    ({"webhook": "http://127.0.0.1/"}, "webhook"),
    ({"body": {"on_disconnect": "maybe"}}, "on_disconnect"),
]


@pytest.mark.parametrize(("wrong", "param"), BAD_JOBS)
def test_a_wrong_job_is_refused_and_nothing_stored(
    sim_stack: Stack, wrong: dict[str, Any], param: str | None
) -> None:
    before = sim_stack.redis.dbsize()
    job = {"endpoint": ENDPOINT, "body": CHAT} | wrong
    refused = call(sim_stack, "POST", "/v1/jobs", json=job)
    assert refused.status_code == 400, refused.text
    error = refused.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert len(error["message"]) > 15
    assert len(sim_stack.redis.keys(keys.job("*"))) <= before


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/v1/jobs/job_unknown", {}, 404),
        ("/v1/jobs/job_unknown/events", {}, 404),
        ("/v1/jobs?limit=0", {}, 400),
        ("/v1/jobs?limit=101", {}, 400),
        ("/v1/jobs?status=lost", {}, 400),
        ("/v1/jobs?colour=red", {}, 400),
        ("/v1/jobs?after=job_unknown", {}, 404),
        ("/v1/jobs/{job}/events?starting_after=tomorrow", {}, 400),
        ("/v1/jobs/{job}/events?starting_after=1-4000", {}, 400),
        ("/v1/jobs/{job}/events", {"Last-Event-ID": "9-1"}, 400),
        ("/v1/jobs/{job}", {"Prefer": "wait=long"}, 400),
    ],
)
def test_a_wrong_question_is_refused(
    sim_stack: Stack, path: str, headers: dict[str, str], status: int
) -> None:
    if "{job}" in path:
        job_id = submit(sim_stack, STREAM)["id"]
        wait(sim_stack, job_id)
        path = path.replace("{job}", job_id)
    refused = call(sim_stack, "GET", path, headers=headers)
    assert refused.status_code == status
    assert set(refused.json()["error"]) == {"message", "type", "param", "code"}


def test_another_tenants_job_is_not_there(sim_stack: Stack) -> None:
    with writing(f"sqlite:///{sim_stack.home / 'sluice.db'}") as session:
        theirs = JobRecord(
            id="job_theirs",
            tenant="other",
            model="sim",
            endpoint=ENDPOINT,
            lane="batch",
            status="completed",
            created_at=datetime.now(UTC),
            completed_at=datetime.now(UTC),
        )
        session.merge(theirs)
    for method, path in (
        ("GET", "/v1/jobs/job_theirs"),
        ("GET", "/v1/jobs/job_theirs/events"),
        ("POST", "/v1/jobs/job_theirs/cancel"),
        ("POST", "/v1/jobs/job_theirs/retry"),
        ("GET", "/v1/jobs?after=job_theirs"),
    ):
        refused = call(sim_stack, method, path)
        assert (refused.status_code, refused.json()["error"]["code"]) == (404, "job_not_found")


def test_a_job_of_another_tenant_is_not_touched(sim_stack: Stack) -> None:
    url = f"sqlite:///{sim_stack.home / 'sluice.db'}"
    theirs = JobRecord(
        id=new_id(),
        tenant="another",
        model="sim",
        endpoint=ENDPOINT,
        lane="batch",
        created_at=datetime.now(UTC),
        request=None,
    )
    accept(url, [theirs])
    for method, path in (("POST", "/cancel"), ("POST", "/retry"), ("GET", ""), ("GET", "/events")):
        refused = call(sim_stack, method, f"/v1/jobs/{theirs.id}{path}")
        assert refused.status_code == 404, path
    found = load(url, theirs.id)
    assert found
    assert found.completed_at is None


def test_a_job_of_another_tenant_in_the_backlog_is_not_touched(slow_stack: Stack) -> None:
    theirs = Job(new_id(), "sim", ENDPOINT, b"{}", tenant="another")
    slow_stack.redis.sadd(keys.PAUSED, "sim")
    try:
        Backlog(slow_stack.redis).submit(theirs)
        for method, path in (("POST", "/cancel"), ("GET", ""), ("GET", "/events")):
            refused = call(slow_stack, method, f"/v1/jobs/{theirs.id}{path}")
            assert refused.status_code == 404, path
        assert slow_stack.redis.hget(keys.job(theirs.id), "state") == b"queued"
    finally:
        slow_stack.clear()
        slow_stack.redis.srem(keys.PAUSED, "sim")
