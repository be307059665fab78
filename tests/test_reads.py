"""Reading jobs costs what is shown, whatever else is stored, and holds up nobody."""

import re
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from bench.stack import Stack, await_that, running, slack
from db import writing
from db.models import JobRecord, JobResult
from db.session import insert_new
from tasks.contract import keys
from tasks.contract.events import LOG_FIELD, End, Entry
from tasks.contract.job import Job, State
from tests.conftest import SIM
from tests.test_jobs import CHAT, in_sql, submit, wait
from tests.test_response import chunk, log_of


@pytest.fixture(scope="module")
def unmaintained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Without maintenance, once it has begun: what a test writes stays as it is."""
    with running(Stack(tmp_path_factory.mktemp("reads"), [SIM]), workers=0) as stack:
        stack.part("maintenance").stop()
        stack.processes.remove(stack.part("maintenance"))
        yield stack


@pytest.fixture
def stack(unmaintained: Stack) -> Stack:
    """The same without any job."""
    unmaintained.forget()
    return unmaintained


def store(stack: Stack, rows: Sequence[JobRecord | JobResult]) -> None:
    with writing(f"sqlite:///{stack.home / 'sluice.db'}") as session:
        insert_new(session, rows)


def record(job_id: str, **more: Any) -> JobRecord:
    now, endpoint = datetime.now(UTC), "/v1/chat/completions"
    about = {"tenant": "default", "model": "sim", "endpoint": endpoint, "lane": "batch"}
    if more.get("status") == "completed":
        more["completed_at"] = now
    return JobRecord(**about, id=job_id, created_at=now, **more)  # type: ignore[arg-type]


@contextmanager
def measured_silence(stack: Stack) -> Iterator[list[float]]:
    """How long the API took for each of the health checks that were made meanwhile."""
    took_s: list[float] = []
    is_over = threading.Event()

    def check_health() -> None:
        with requests.Session() as client:
            while not is_over.is_set():
                begun_s = time.monotonic()
                assert client.get(f"{stack.url}/health/live", timeout=30).ok
                took_s.append(time.monotonic() - begun_s)

    thread = threading.Thread(target=check_health)
    thread.start()
    try:
        yield took_s
    finally:
        is_over.set()
        thread.join()


def get(stack: Stack, path: str) -> Any:
    response = requests.get(stack.url + path, timeout=60)
    assert response.status_code == 200, response.text
    return response.json()


def test_a_list_of_jobs_does_not_load_their_requests(stack: Stack) -> None:
    body = b"x" * 5_000_000
    store(stack, [record(f"job_{n:02}", status="completed", request=body) for n in range(20)])
    get(stack, "/v1/jobs?model=none")
    (process,) = psutil.Process(stack.api_processes[0].pid).children()
    before = most_memory_kb(process.pid)
    assert len(get(stack, "/v1/jobs?limit=40")["data"]) == 20
    assert most_memory_kb(process.pid) - before < 20_000


def test_a_list_of_jobs_loads_no_answer_that_it_does_not_show(stack: Stack) -> None:
    """Those of the job before its first one and of the job after its last one were loaded too."""
    ids = [f"job_{n}" for n in range(5)]
    large = [b'"' + b"x" * 50_000_000 + b'"', b'"small"']
    store(stack, [record(job_id, status="completed") for job_id in ids])
    store(stack, [answer_of(job_id, large[job_id == "job_2"]) for job_id in ids])
    (process,) = psutil.Process(stack.api_processes[0].pid).children()
    before = most_memory_kb(process.pid)
    found = get(stack, "/v1/jobs?status=completed&limit=1&after=job_3")
    assert [job["response"]["body"] for job in found["data"]] == ["small"]
    assert found["has_more"] is True
    assert most_memory_kb(process.pid) - before < 20_000


def answer_of(job_id: str, body: bytes) -> JobResult:
    return JobResult(job_id=job_id, status_code=200, body=body, error=None, usage=None)


def most_memory_kb(pid: int) -> int:
    """The most that the process ever had."""
    (line,) = re.findall(r"^VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return int(line)


def test_few_of_one_status_are_found_among_very_many_of_others(stack: Stack) -> None:
    store(stack, [record("job_00000", status="in_progress")])
    store(stack, [record(f"job_0{n:05}", status="completed") for n in range(20_000)])
    store(stack, [record(f"job_1{n:05}") for n in range(2_000)])
    (process,) = psutil.Process(stack.api_processes[0].pid).children()
    before_s = used_s(process)
    found = get(stack, "/v1/jobs?status=in_progress&limit=1")
    # Of a processor: how long it waits for one is not its own.
    assert used_s(process) - before_s < 0.5
    assert [job["id"] for job in found["data"]] == ["job_00000"]
    assert found["has_more"] is False


def used_s(process: psutil.Process) -> float:
    spent = process.cpu_times()
    return float(spent.user + spent.system)


def test_what_has_changed_its_status_meanwhile_is_passed_over(stack: Stack) -> None:
    # SQL takes all for queued; of those that Redis knows, each third runs.
    store(stack, [record(f"job_{n:03}") for n in range(300)])
    for number in range(0, 300, 3):
        job = Job(f"job_{number:03}", "sim", "/v1/chat/completions", b"{}")
        state = {"state": "in_progress", "attempt": 1, "queued_us": 1, "started_us": 2}
        fields = job.encode()
        mapping = dict(zip(fields[::2], fields[1::2], strict=True)) | state
        stack.redis.hset(keys.job(job.id), mapping=mapping)  # type: ignore[arg-type]
    seen, after = [], ""
    while True:
        page = get(stack, f"/v1/jobs?status=queued&limit=7{after}")
        seen += [job["id"] for job in page["data"]]
        if not page["has_more"]:
            break
        after = f"&after={page['last_id']}"
    assert seen == [f"job_{n:03}" for n in reversed(range(300)) if n % 3]


def test_a_job_that_cannot_be_read_is_told_to_the_log_alone(stack: Stack) -> None:
    job_id = submit(stack)["id"]
    stack.redis.hset(keys.job(job_id), "state", "no state")
    response = requests.get(f"{stack.url}/v1/jobs/{job_id}", timeout=20)
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "internal_error"
    assert job_id not in response.text
    log = stack.api_processes[0].log
    await_that(lambda: f"job {job_id} cannot be read" in log.read_text())


def test_a_long_answer_that_sql_does_not_have_yet_holds_up_nobody(stack: Stack) -> None:
    job = Job("job_long", "sim", "/v1/chat/completions", b"{}")
    ended = {"state": State.COMPLETED, "attempt": 1, "queued_us": 1, "started_us": 2, "ended_us": 3}
    fields = job.encode()
    mapping = dict(zip(fields[::2], fields[1::2], strict=True)) | ended
    stack.redis.hset(keys.job(job.id), mapping=mapping)  # type: ignore[arg-type]
    write_log(stack, job.id, log_of([chunk({"content": "word "})] * 100_000))
    longest_s = []
    for _ in range(3):
        with measured_silence(stack) as took_s:
            found = get(stack, "/v1/jobs/job_long")
        content = found["response"]["body"]["choices"][0]["message"]["content"]
        assert content == "word " * 100_000
        longest_s.append(max(took_s))
    # The machine holds processes up, too, but not each time.
    assert min(longest_s) < slack(0.3), longest_s


def test_a_body_in_pieces_of_a_byte_holds_up_nobody(stack: Stack) -> None:
    """One upload in a million chunks stopped all streams of the process for a minute."""
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    head += b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    with (
        socket.create_connection(("127.0.0.1", stack.api_ports[0]), timeout=240) as client,
        measured_silence(stack) as took_s,
    ):
        client.sendall(head + b"1\r\nx\r\n" * 1_000_000 + b"0\r\n\r\n")
        assert client.recv(65536).startswith(b"HTTP/1.1 400 ")
        answered = len(took_s)
    # Whatever the machine: others are answered again and again while the body is read.
    assert answered > 20


def write_log(stack: Stack, job_id: str, entries: list[Entry]) -> None:
    pipeline = stack.redis.pipeline(transaction=False)
    for entry in entries:
        fields: Any = {LOG_FIELD: entry.encode_value()}
        pipeline.xadd(keys.log(job_id), fields, str(entry.position))
    pipeline.execute()


def test_an_answer_that_sql_has_is_not_put_together_again(sim_stack: Stack) -> None:
    job_id = submit(sim_stack, CHAT | {"stream": True})["id"]
    before = wait(sim_stack, job_id).json()
    await_that(lambda: in_sql(sim_stack, job_id))
    sim_stack.redis.delete(keys.log(job_id))
    # An end, but another one than what was answered.
    end = Entry(job_id, log_of([])[-1].position, log_of([])[-1].kind, End(State.FAILED).encode())
    write_log(sim_stack, job_id, [end])
    assert get(sim_stack, f"/v1/jobs/{job_id}") == before
