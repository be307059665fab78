"""What /metrics reports, beside what really happened: real Redis, API processes and workers."""

import random
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
from prometheus_client.parser import text_string_to_metric_families

from bench.stack import Stack, await_that, running
from deploy.redis_server import free_port
from tasks.contract import keys
from tasks.contract.job import Cause, Claim, EnqueueOptions, Job, Lane, State, new_id
from tasks.contract.settings import Settings
from tasks.queue.backlog import Backlog
from tests.conftest import SIM
from tests.faults.clients import paused

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 20}
ADMIN = {"Authorization": "Bearer admin"}
SLOW = SIM | {"slots": 4, "args": {"tokens-per-s": 40, "first-token-s": 0.05}}
Sample = tuple[str, tuple[tuple[str, str], ...]]


class Metrics:
    """One scrape: all of it, or the samples whose names begin with one of those given."""

    def __init__(self, url: str, *names: str) -> None:
        answer = requests.get(url, timeout=10)
        assert answer.status_code == 200, answer.text
        lines = [line for line in answer.text.splitlines() if line.startswith(names or "")]
        self.samples: dict[Sample, float] = {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in text_string_to_metric_families("\n".join(lines))
            for sample in family.samples
        }

    def total(self, name: str, **labels: str) -> float:
        """The sum of the metric's samples with these labels."""
        return sum(
            value
            for (found, having), value in self.samples.items()
            if found == name and labels.items() <= dict(having).items()
        )


def open_streams(stack: Stack) -> float:
    return Metrics(f"{stack.url}/metrics").total("sluice_streams_open")


@pytest.fixture
def stack(home: Path) -> Iterator[Stack]:
    """API, maintenance, and two slow workers."""
    settings: dict[str, Any] = {"lease_s": 6, "keep_alive_s": 1}
    with running(Stack(home, [SLOW], **settings), workers=2) as stack:
        yield stack


def make_job(lane: Lane, **options: Any) -> Job:
    queued = EnqueueOptions(**options)
    return Job(new_id(), "sim", "/v1/completions", b"{}", lane, options=queued)


class Model:
    """What a correct queue would hold, after 1,000 jobs' worth of random steps."""

    def __init__(self, backlog: Backlog, seed: int) -> None:
        self.backlog = backlog
        self.random = random.Random(seed)
        self.waiting: dict[str, Lane] = {}
        self.claims: dict[str, Claim] = {}
        self.delayed: dict[str, Lane] = {}
        self.submitted = 0

    def step(self) -> None:
        often = [self.submit, self.submit, self.submit, self.claim, self.claim]
        rare = [self.finish, self.cancel, self.kill, self.hand_back, self.fail, self.expire]
        self.random.choice([*often, *rare])()

    def submit(self) -> None:
        lane = self.random.choice(list(Lane))
        job = make_job(lane, priority=self.random.randint(-100, 100))
        self.backlog.submit(job)
        self.waiting[job.id] = lane
        self.submitted += 1

    def claim(self) -> None:
        claim = self.backlog.claim("sim", f"worker-{self.random.randint(1, 9)}-{self.submitted}")
        assert bool(claim) == bool(self.waiting)
        if claim:
            del self.waiting[claim.job.id]
            self.claims[claim.job.id] = claim

    def finish(self) -> None:
        if claim := self._take():
            assert self.backlog.finish(claim, self.random.choice([State.COMPLETED, State.FAILED]))

    def cancel(self) -> None:
        ids = [*self.waiting, *self.claims, *self.delayed]
        if ids:
            job_id = self.random.choice(ids)
            assert self.backlog.cancel(job_id)
            for held in (self.waiting, self.claims, self.delayed):
                held.pop(job_id, None)

    def kill(self) -> None:
        """A worker falls silent: its lease expires, and the reaper runs."""
        if claim := self._take():
            self.backlog.redis.zadd(keys.LEASES, {claim.job.id: 1})
            (reaped,) = self.backlog.reap()
            self._note(claim, reaped.state)

    def hand_back(self) -> None:
        if claim := self._take():
            self._note(claim, self.backlog.requeue(claim, Cause.HANDED_BACK, "stopped"))

    def fail(self) -> None:
        if claim := self._take():
            state = self.backlog.requeue(claim, Cause.ENGINE_ERROR, "503", delay_s=1000)
            if state is State.QUEUED:
                self.delayed[claim.job.id] = claim.job.lane

    def expire(self) -> None:
        lane = self.random.choice(list(Lane))
        job = make_job(lane, deadline_s=0, priority=100)
        self.backlog.submit(job)
        self.submitted += 1
        (reaped,) = self.backlog.reap()
        assert (reaped.job_id, reaped.state) == (job.id, State.EXPIRED)

    def _take(self) -> Claim | None:
        if not self.claims:
            return None
        return self.claims.pop(self.random.choice(list(self.claims)))

    def _note(self, claim: Claim, state: State | None) -> None:
        if state is State.QUEUED:
            self.waiting[claim.job.id] = claim.job.lane
        else:
            assert state is State.FAILED


def test_the_depth_is_right_after_every_step_of_1000_jobs(home: Path) -> None:
    stack = Stack(home, [SIM])
    try:
        stack.start_redis()
        stack.start_api()
        # Nobody renews these leases.
        model = Model(Backlog(stack.redis, Settings(max_attempts=2, lease_s=1000)), seed=4)
        while model.submitted < 1000:
            model.step()
            seen = Metrics(stack.url + "/metrics", "sluice_queue_de", "sluice_leases")
            for lane in Lane:
                wanted = sum(waiting is lane for waiting in model.waiting.values())
                assert seen.total("sluice_queue_depth", lane=lane) == wanted
            assert seen.total("sluice_leases") == len(model.claims)
            assert seen.total("sluice_queue_delayed") == len(model.delayed)
        seen = Metrics(stack.url + "/metrics")
        _assert_nothing_unaccounted(seen)
        assert seen.total("sluice_jobs_total", status="queued") == model.submitted
    finally:
        stack.stop()
        stack.redis.close()


def _assert_nothing_unaccounted(seen: Metrics) -> None:
    """Every job that was accepted waits, runs, or has ended."""
    names = ("sluice_queue_depth", "sluice_queue_delayed", "sluice_leases")
    ended = sum(seen.total("sluice_jobs_total", status=s) for s in State if s.is_final)
    accounted = ended + sum(seen.total(name) for name in names)
    assert seen.total("sluice_jobs_total", status="queued") == accounted


def test_every_api_reports_the_same_depth_while_a_worker_is_killed(stack: Stack) -> None:
    stack.start_api()
    urls = [f"http://127.0.0.1:{port}" for port in stack.api_ports]
    with ThreadPoolExecutor(60) as pool:
        with paused(stack):
            chats = [
                pool.submit(requests.post, f"{url}/v1/chat/completions", json=CHAT, timeout=240)
                for url in urls * 30
            ]
            waiting = lambda: Metrics(urls[0] + "/metrics").total("sluice_queue_depth")
            await_that(lambda: waiting() == len(chats))
        await_that(lambda: stack.redis.zcard(keys.LEASES) == 8)
        killed = stack.workers[0]
        killed.kill()
        taken = len(stack.jobs_of(killed))
        scrapes = 0
        while not all(chat.done() for chat in chats):
            for url in urls:
                seen = Metrics(url + "/metrics")
                _assert_nothing_unaccounted(seen)
                assert seen.total("sluice_slots_used") <= 8
                scrapes += 1
        assert {chat.result().status_code for chat in chats} == {200}
    assert scrapes > 20
    # An end is counted after its client has the answer; a heartbeat may outlast the leases.
    total = lambda name, **labels: Metrics(urls[0] + "/metrics").total(name, **labels)
    await_that(lambda: total("sluice_jobs_total", status="completed") == 60)
    await_that(lambda: total("sluice_workers", state="serving") == 1)
    last = Metrics(urls[0] + "/metrics")
    assert last.total("sluice_jobs_total", status="completed") == 60
    assert last.total("sluice_requeues_total", cause="lease_expired") == taken > 0
    assert last.total("sluice_jobs_total", status="in_progress") == 60 + taken
    assert last.total("sluice_workers", state="serving") == 1
    assert last.total("sluice_slots") == 4


def test_a_worker_times_its_streams_and_counts_their_tokens(stack: Stack) -> None:
    begun_s = time.monotonic()
    answer = requests.post(
        stack.url + "/v1/chat/completions", json=CHAT | {"stream": True}, timeout=30
    )
    took_s = time.monotonic() - begun_s
    assert answer.text.endswith("data: [DONE]\n\n")
    targets = requests.get(stack.url + "/v1/admin/targets", headers=ADMIN, timeout=10).json()
    assert {target["labels"]["worker"].rpartition("-")[2] for target in targets} == {
        str(worker.pid) for worker in stack.workers
    }
    workers = [Metrics(f"http://{target['targets'][0]}/metrics") for target in targets]

    def total(name: str, **labels: str) -> float:
        return sum(worker.total(f"sluice_{name}", **labels) for worker in workers)

    first_token = "sluice_time_to_first_token_seconds_count"
    assert total("time_to_first_token_seconds_count", model="sim", lane="interactive") == 1
    assert total("inter_token_latency_seconds_count") == 19
    assert 0.4 < total("inter_token_latency_seconds_sum") < took_s
    assert total("time_per_output_token_seconds_sum") == pytest.approx(
        total("inter_token_latency_seconds_sum") / 19, rel=0.01
    )
    assert total("queue_wait_seconds_count") == total("request_duration_seconds_count") == 1
    assert total("tokens_total", type="output") == 20
    # What has not happened yet is 0 and not missing, or its first time would be no increase.
    for worker in workers:
        assert worker.samples[(first_token, (("lane", "batch"), ("model", "sim")))] == 0


def test_a_continued_answer_counts_its_tokens_once(stack: Stack) -> None:
    body = CHAT | {"stream": True, "max_tokens": 200}
    url = stack.url + "/v1/chat/completions"
    with requests.post(url, json=body, stream=True, timeout=30) as answer:
        lines = (line for line in answer.iter_lines() if line.startswith(b"data: "))
        for _ in range(10):
            next(lines)
        next(worker for worker in stack.workers if stack.jobs_of(worker)).kill()
        assert list(lines)[-1] == b"data: [DONE]"
    await_that(lambda: len(_targets(stack)) == 1)
    (target,) = _targets(stack)
    seen = Metrics(f"http://{target}/metrics")
    assert seen.total("sluice_tokens_total", type="output") == 200
    assert seen.total("sluice_time_to_first_token_seconds_count") == 0
    assert seen.total("sluice_inter_token_latency_seconds_count") <= 190


def test_restarted_workers_leave_no_series_behind(home: Path) -> None:
    with running(Stack(home, [SIM], lease_s=3)) as stack:
        Metrics(stack.url + "/metrics")
        before = Metrics(stack.url + "/metrics").samples.keys()
        for _ in range(3):
            stack.workers[0].kill()
            name = f"*-{stack.start_worker('sim').pid}"
            await_that(lambda: stack.redis.keys(keys.worker(name)))  # noqa: B023 (awaited at once)
        await_that(lambda: len(stack.redis.keys(keys.worker("*"))) == 1)
        assert Metrics(stack.url + "/metrics").samples.keys() - before == set()
        await_that(lambda: stack.redis.scard(keys.WORKERS) == 1)


def _targets(stack: Stack) -> list[str]:
    found = requests.get(stack.url + "/v1/admin/targets", headers=ADMIN, timeout=10).json()
    return [target["targets"][0] for target in found]


def test_processes_of_one_api_count_together_and_leave_nothing_behind(home: Path) -> None:
    with running(Stack(home, [SIM], api_processes=2)) as stack:
        directory = next((home / "metrics").iterdir())

        def answered() -> float:
            seen = Metrics(stack.url + "/metrics")
            return seen.total("sluice_http_requests_total", endpoint="/v1/models", status="200")

        asked = 0
        for _ in range(3):
            for _ in range(20):
                assert requests.get(stack.url + "/v1/models", timeout=10).ok
            asked += 20
            assert answered() == asked
            children = psutil.Process(stack.api_processes[0].pid).children()
            for child in children:
                child.send_signal(signal.SIGKILL)
            psutil.wait_procs(children, timeout=10)
            await_that(lambda: len(psutil.Process(stack.api_processes[0].pid).children()) == 2)
            await_that(lambda: _is_up(stack))
        # Two processes, two slots: a slot's files appear with what its process first counts.
        assert {path.stem.rpartition("_")[2] for path in directory.iterdir()} == {"0", "1"}
        assert answered() == asked


def _is_up(stack: Stack) -> bool:
    try:
        return requests.get(stack.url + "/health/live", timeout=2).ok
    except requests.RequestException:
        return False


def test_streams_that_a_killed_process_had_are_not_open_any_more(home: Path) -> None:
    with running(Stack(home, [SLOW])) as stack:
        body = CHAT | {"stream": True, "max_tokens": 400}
        answer = requests.post(
            stack.url + "/v1/chat/completions", json=body, stream=True, timeout=30
        )
        with answer:
            assert Metrics(stack.url + "/metrics").total("sluice_streams_open") == 1
            (child,) = psutil.Process(stack.api_processes[0].pid).children()
            child.kill()
        await_that(lambda: _is_up(stack))
        assert Metrics(stack.url + "/metrics").total("sluice_streams_open") == 0


def test_a_lost_maintenance_is_seen(home: Path) -> None:
    with running(Stack(home, [SIM]), workers=0) as stack:
        is_up = lambda: Metrics(stack.url + "/metrics").samples["sluice_maintenance_up", ()]
        await_that(lambda: is_up() == 1)
        stack.part("maintenance").kill()
        await_that(lambda: is_up() == 0)


def test_bytes_that_wait_and_repairs_are_seen(home: Path) -> None:
    with running(Stack(home, [SIM]), workers=0) as stack:
        seen = Metrics(stack.url + "/metrics")
        repairs = {kind for (name, kind) in seen.samples if name == "sluice_repairs_total"}
        kinds = ("misplaced", "stray", "unrecorded", "lost")
        assert repairs == {(("kind", kind),) for kind in kinds}
        assert seen.total("sluice_repairs_total") == seen.total("sluice_backlog_bytes") == 0
        # Without a maxmemory, that of the machine.
        memory = psutil.virtual_memory().total
        assert seen.total("sluice_redis_memory_limit_bytes") == pytest.approx(memory, rel=0.01)
        bodies = [CHAT | {"user": "x" * size} for size in (10, 1000, 10_000)]
        jobs = [{"endpoint": "/v1/chat/completions", "body": body} for body in bodies]
        found = [requests.post(f"{stack.url}/v1/jobs", json=job, timeout=10).json() for job in jobs]
        total = lambda name: Metrics(stack.url + "/metrics").total(name)
        assert 11_000 < total("sluice_backlog_bytes") < 12_000
        stack.redis.zrem(keys.backlog("sim", Lane.BATCH), found[2]["id"])
        await_that(lambda: total("sluice_repairs_total") == 1)
        cancel = f"{stack.url}/v1/jobs/{found[2]['id']}/cancel"
        requests.post(cancel, timeout=10).raise_for_status()
        assert 1_000 < total("sluice_backlog_bytes") < 2_000


def test_a_worker_serves_its_metrics_while_the_name_of_redis_is_unknown(home: Path) -> None:
    port = free_port()
    url, unknown = f"http://127.0.0.1:{port}", "redis://redis.invalid:6379/0"
    stack = Stack(home, [SIM], metrics_bind=f"0.0.0.0:{port}", redis_url=unknown)
    worker = stack.start_worker("sim")
    try:
        await_that(lambda: _answers(f"{url}/ready"), explain=worker.log.read_text)
        assert worker.popen.poll() is None
        assert Metrics(f"{url}/metrics").total("sluice_tokens_total") == 0
    finally:
        worker.kill_all()


def _answers(url: str) -> bool:
    try:
        return requests.get(url, timeout=2).status_code in {200, 503}
    except requests.ConnectionError:
        return False


def test_without_redis_the_metrics_show_it(home: Path) -> None:
    stack = Stack(home, [SIM])
    try:
        redis = stack.start_redis()
        stack.start_api()
        assert Metrics(stack.url + "/metrics").total("sluice_redis_up") == 1
        redis.kill()
        seen = Metrics(stack.url + "/metrics")
        assert ("sluice_redis_up", ()) in seen.samples
        assert seen.total("sluice_redis_up") == 0
        assert (
            requests.post(stack.url + "/v1/chat/completions", json=CHAT, timeout=10).status_code
            == 503
        )
        seen = Metrics(stack.url + "/metrics")
        assert seen.total("sluice_errors_total", status="503", code="queue_unavailable") == 1
        assert seen.total("sluice_http_requests_total", status="503") == 1
    finally:
        stack.stop()
        stack.redis.close()
