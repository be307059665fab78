"""Workers that are killed, stopped, hung, drained or poisoned, with the sim engine."""

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import requests

from bench.stack import Process, Stack, await_that, running, slack
from db.models import JobRecord, LedgerEntry
from tasks.contract import keys
from tasks.queue.celery_app import make_ticket
from tests.faults.clients import (
    ENDPOINT,
    LONGEST_S,
    Client,
    ask,
    await_claims,
    await_rows,
    await_tokens,
    chat,
    compare,
    start_replacement,
)
from tests.faults.conftest import LEASE_S, REAP_S, SLOW_SIM, Fault
from tests.test_client import sluice
from tests.test_jobs import call, get, submit

pytestmark = pytest.mark.timeout(600)

STREAMS = 32


def _kill(fault: Fault, worker: Process) -> float:
    fault.inflict("SIGKILL worker")
    worker.kill()
    return time.monotonic()


@contextmanager
def _supervised(stack: Stack) -> Iterator[None]:
    """Workers that have exited are replaced, as `sluice up` would do."""
    done = threading.Event()
    wanted = len(stack.workers)

    def replace() -> None:
        while not done.wait(0.1):
            for _ in range(wanted - len(stack.workers)):
                stack.start_worker("sim")

    supervisor = threading.Thread(target=replace)
    supervisor.start()
    try:
        yield
    finally:
        done.set()
        supervisor.join()


def test_1_a_job_whose_worker_was_stopped_and_killed_is_done_elsewhere(
    stack: Stack, fault: Fault
) -> None:
    (worker,) = stack.workers
    fault.inflict("SIGSTOP worker")
    worker.signal(signal.SIGSTOP)
    client = Client(stack, chat(max_tokens=2))
    await_that(lambda: stack.redis.zcard(keys.backlog("sim", "interactive")) == 1)
    killed_s = _kill(fault, worker)
    serves_s = start_replacement(stack)
    client.answer()
    fault.recovery_s.append(time.monotonic() - killed_s)
    # Its ticket may be lost with the worker, and is issued again after four seconds at most.
    assert time.monotonic() - serves_s < slack(4 + LEASE_S + REAP_S)


def test_2_streams_of_a_killed_worker_go_on_elsewhere(two_workers: Stack, fault: Fault) -> None:
    stack = two_workers
    bodies = [chat(n, stream=True, max_tokens=200) for n in range(STREAMS)]
    expected = ask(stack, bodies)
    clients = [Client(stack, body) for body in bodies]
    await_tokens(clients, 10)
    victim = max(stack.workers, key=lambda worker: len(stack.jobs_of(worker)))
    assert stack.jobs_of(victim)
    killed_s = _kill(fault, victim)
    compare(fault, clients, expected, killed_s)
    assert max(fault.recovery_s) < LEASE_S + slack(5)
    await_rows(stack, LedgerEntry, 2 * STREAMS)


def test_2b_streams_survive_one_worker_after_the_other(stack: Stack, fault: Fault) -> None:
    bodies = [chat(n, stream=True, max_tokens=200) for n in range(8)]
    expected = ask(stack, bodies)
    clients = [Client(stack, body) for body in bodies]
    killed_s = serves_s = 0.0
    for tokens in (10, 40):
        await_tokens(clients, tokens)
        (worker,) = stack.workers
        killed_s = _kill(fault, worker)
        serves_s = start_replacement(stack)
    compare(fault, clients, expected, killed_s)
    # All are suspects now; one that gets on makes way for the next, long before its end.
    assert max(client.gap_after(serves_s) for client in clients) < LEASE_S + slack(9)
    assert all(client.headers["x-sluice-attempts"] == "1" for client in clients)


# Two renewals may be late.
@pytest.mark.parametrize("stack", [{"lease_s": 2 * LEASE_S}], indirect=True)
def test_3_a_job_far_longer_than_its_lease_runs_once(stack: Stack, fault: Fault) -> None:
    fault.inflict("a job of three leases")
    client = Client(stack, chat(max_tokens=int(25 * 2 * LEASE_S * 3)))
    client.answer()
    assert client.headers["x-sluice-attempts"] == "1"
    await_rows(stack, LedgerEntry, 1)
    await_that(lambda: stack.part("worker").log.read_text().count("job completed") == 1)


@pytest.mark.parametrize("kind", ["pubsub", "normal"])
def test_4_cut_connections_lose_and_double_nothing(stack: Stack, fault: Fault, kind: str) -> None:
    bodies = [chat(n, stream=True) for n in range(STREAMS)]
    expected = ask(stack, bodies)
    clients = [Client(stack, body) for body in bodies]
    cut_s = 0.0
    for tokens in range(10, 60, 10):
        await_tokens(clients, tokens)
        fault.inflict(f"CLIENT KILL TYPE {kind}")
        cut_s = time.monotonic()
        stack.redis.client_kill_filter(_type=kind, skipme=True)
    compare(fault, clients, expected, cut_s)
    assert {client.headers["x-sluice-attempts"] for client in clients} == {"1"}


# Long after the short ones, long before the long ones; and no lease is lost meanwhile.
@pytest.mark.parametrize("stack", [{"drain_s": 15, "lease_s": 10}], indirect=True)
def test_8_a_stopping_worker_finishes_or_hands_on(stack: Stack, fault: Fault) -> None:
    short = [Client(stack, chat(n, max_tokens=100)) for n in range(4)]
    long = [Client(stack, chat(n, max_tokens=500, stream=True)) for n in range(4, 8)]
    (worker,) = stack.workers
    await_claims(worker, 8)
    fault.inflict("SIGTERM worker")
    worker.signal(signal.SIGTERM)
    await_that(lambda: "draining: 8 jobs run" in worker.log.read_text())
    stack.start_worker("sim")
    undisturbed = [Client(stack, client.body) for client in long]
    # With 0 only if it has not had to be forced.
    assert worker.popen.wait(120) == 0
    stopped_s = time.monotonic()
    assert {client.answer()["usage"]["completion_tokens"] for client in short} == {100}
    assert {client.headers["x-sluice-attempts"] for client in short} == {"1"}
    compare(fault, long, [client.answer() for client in undisturbed], stopped_s)


@pytest.mark.parametrize("stack", [{"drain_s": 120}], indirect=True)
def test_8b_a_worker_killed_while_it_drains_has_finished_what_it_finished(
    stack: Stack, fault: Fault
) -> None:
    short = [Client(stack, chat(n, max_tokens=50)) for n in range(4)]
    long = [Client(stack, chat(n, stream=True, max_tokens=300)) for n in range(4, 8)]
    (worker,) = stack.workers
    await_claims(worker, 8)
    fault.inflict("SIGTERM worker")
    worker.signal(signal.SIGTERM)
    for client in short:
        client.answer()
    finished = [keys.job(client.headers["x-sluice-job"]) for client in short]
    await_that(lambda: {stack.redis.hget(job, "state") for job in finished} == {b"completed"})
    stack.start_worker("sim")
    killed_s = _kill(fault, worker)
    expected = ask(stack, [client.body for client in long])
    compare(fault, long, expected, killed_s)
    await_rows(stack, LedgerEntry, 12)
    assert {stack.redis.hget(job, "attempt") for job in finished} == {b"1"}


def test_9_poison_is_given_up_and_others_are_unharmed(stack: Stack, fault: Fault) -> None:
    bodies = [chat(n, stream=True, max_tokens=60) for n in range(4)]
    expected = ask(stack, bodies)
    with _supervised(stack):
        clients = [Client(stack, body) for body in bodies]
        await_tokens(clients, 5)
        poison = submit(stack, chat(9, stream=True, sim={"failure": "crash"}))
        fault.inflict("poisoned request")
        await_that(lambda: get(stack, poison["id"])["status"] == "failed", LONGEST_S)
        dead = get(stack, poison["id"])
        assert dead["error"]["code"] == "job_failed"
        assert dead["attempts"] == 3
        compare(fault, clients, expected, math.inf)
    job_id = poison["id"]
    await_that(lambda: job_id in sluice(stack, "dead", "list").stdout)
    shown = sluice(stack, "dead", "show", job_id).stdout
    assert shown.count("fell silent") == 3
    assert "Question 9" not in shown
    again = sluice(stack, "dead", "retry", job_id)
    assert (again.returncode, again.stderr) == (0, "")
    assert job_id not in sluice(stack, "dead", "list").stdout
    sluice(stack, "cancel", again.stdout.split()[-1])


def test_9b_the_operator_looks_after_dead_letters_over_http(home: Any, fault: Fault) -> None:
    settings = {"lease_s": LEASE_S, "max_attempts": 1, "admin_key": "secret"}
    key = {"Authorization": "Bearer secret"}
    with running(Stack(home, [SLOW_SIM], **settings)) as stack:
        with _supervised(stack):
            fault.inflict("poisoned request")
            wanted = {"endpoint": ENDPOINT, "body": chat(stream=True, sim={"failure": "crash"})}
            job = call(stack, "POST", "/v1/jobs", json=wanted, headers=key).json()
            path = f"/v1/jobs/{job['id']}"
            await_that(lambda: call(stack, "GET", path, headers=key).json()["status"] == "failed")
        url = f"{stack.url}/v1/admin/dead"
        assert requests.get(url, timeout=9).status_code == 401
        wrong = requests.get(url, headers={"Authorization": "Bearer no"}, timeout=9)
        assert wrong.status_code == 401
        assert wrong.headers["www-authenticate"] == "Bearer"

        def listed() -> list[str]:
            found = requests.get(url, headers=key, timeout=9).json()["data"]
            return [letter["id"] for letter in found]

        await_that(lambda: listed() == [job["id"]])
        letter = requests.get(f"{url}/{job['id']}", headers=key, timeout=9).json()
        assert [reason["attempt"] for reason in letter["reasons"]] == [1]
        deleted = requests.delete(f"{url}/{job['id']}", headers=key, timeout=9)
        assert deleted.json() == {"id": job["id"], "deleted": True}
        assert requests.get(f"{url}/{job['id']}", headers=key, timeout=9).status_code == 404
        with _supervised(stack):
            failed = Client(stack, chat(sim={"failure": "crash"}), **key)
            failed.join(LONGEST_S)
        # OpenAI's SDK would have it end workers again.
        assert failed.document["error"]["code"] == "job_failed"
        assert failed.headers["x-should-retry"] == "false"


def test_without_a_key_nobody_is_admin(sim_stack: Stack) -> None:
    assert requests.get(f"{sim_stack.url}/v1/admin/dead", timeout=9).ok
    refused = requests.get(f"{sim_stack.url}/v1/admin/keys", timeout=9)
    assert refused.status_code == 403
    assert "sluice keys create" in refused.json()["error"]["message"]


def test_11_a_zombie_adds_nothing(two_workers: Stack, fault: Fault) -> None:
    stack = two_workers
    bodies = [chat(n, stream=True, max_tokens=200) for n in range(8)]
    expected = ask(stack, bodies)
    clients = [Client(stack, body) for body in bodies]
    await_tokens(clients, 5)
    zombie = max(stack.workers, key=lambda worker: len(stack.jobs_of(worker)))
    fault.inflict("SIGSTOP worker")
    zombie.signal(signal.SIGSTOP)
    stopped_s = time.monotonic()
    compare(fault, clients, expected, stopped_s)
    logs = {key: stack.redis.xlen(key) for key in stack.redis.keys(keys.log("*"))}
    await_rows(stack, LedgerEntry, 16)
    zombie.signal(signal.SIGCONT)
    await_that(lambda: "stopped" in zombie.log.read_text())
    stack.await_workers(2)
    assert {key: stack.redis.xlen(key) for key in stack.redis.keys(keys.log("*"))} == logs
    again = Client(stack, chat(1))
    again.answer()
    await_rows(stack, LedgerEntry, 17)


@pytest.mark.parametrize("failure", ["die", "hang"])
def test_15_a_dead_or_hung_engine_ends_its_worker(home: Any, fault: Fault, failure: str) -> None:
    settings = {"lease_s": LEASE_S, "keep_alive_s": 1, "engine_stall_s": 10}
    with running(Stack(home, [SLOW_SIM], **settings)) as stack:
        (worker,) = stack.workers
        fault.inflict(f"engine: {failure}")
        bad = Client(stack, chat(1, stream=True, sim={"failure": failure}))
        begun_s = time.monotonic()
        assert worker.popen.wait(120) == 1
        stack.processes.remove(worker)
        fault.recovery_s.append(time.monotonic() - begun_s)
        stack.redis.hset(_only_job(stack), "body", b'{"messages": [], "sim": {"failure": "none"}}')
        stack.start_worker("sim")
        bad.join(LONGEST_S)
        assert bad.chunks[-1][1] == b"[DONE]"
        assert ask(stack, [chat(2)])[0]["usage"]["completion_tokens"] == 100


def _only_job(stack: Stack) -> str:
    (key,) = stack.redis.keys(keys.job("*"))
    return str(key.decode())


def test_a_dead_engine_takes_nobody_along(stack: Stack, fault: Fault) -> None:
    bodies = [chat(n, stream=True) for n in range(8)]
    expected = ask(stack, bodies)
    with _supervised(stack):
        clients = [Client(stack, body) for body in bodies]
        await_tokens(clients, 5)
        fault.inflict("engine: die")
        begun_s = time.monotonic()
        failed = submit(stack, chat(9, stream=True, sim={"failure": "die"}))
        compare(fault, clients, expected, begun_s)
        await_that(lambda: get(stack, failed["id"])["status"] == "failed", LONGEST_S)
    for worker in [p for p in stack.processes if p.popen.poll() == 1]:
        stack.processes.remove(worker)


def test_an_engine_that_answers_5xx_is_asked_again(home: Any, fault: Fault) -> None:
    with running(Stack(home, [SLOW_SIM], lease_s=10, reap_interval_s=0.2)) as stack:
        fault.inflict("engine: 500")
        begun_s = time.monotonic()
        refused = Client(stack, chat(sim={"failure": "error"}))
        refused.join(LONGEST_S)
        assert refused.status == 500
        assert refused.document["error"]["message"] == "Internal server error"
        assert refused.headers["x-sluice-attempts"] == "3"
        assert time.monotonic() - begun_s > 1.5  # half a second, then one
        wrong = Client(stack, chat(max_tokens=-1))
        wrong.join(LONGEST_S)
        assert wrong.status == 400
        assert wrong.headers["x-sluice-attempts"] == "1"
        job = refused.headers["x-sluice-job"]
        await_that(lambda: job in sluice(stack, "dead", "list").stdout)


def test_a_rolling_restart_under_load_fails_no_request(two_workers: Stack, fault: Fault) -> None:
    stack = two_workers
    expected = ask(stack, [chat(n, max_tokens=25) for n in range(6)])
    done = threading.Event()
    answers: list[tuple[int, dict[str, Any]]] = []

    def load(number: int) -> None:
        while not done.is_set():
            client = Client(stack, chat(number, max_tokens=25, stream=number % 2 == 0))
            answers.append((number, client.answer()))

    threads = [threading.Thread(target=load, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for worker in stack.workers:
        fault.inflict("drain worker")
        (name,) = [k for k in stack.redis.smembers(keys.WORKERS) if k.endswith(b"-%d" % worker.pid)]
        drained = sluice(stack, "drain", name.decode())
        assert (drained.returncode, drained.stderr) == (0, "")
        assert worker.popen.wait(120) == 0
        stack.processes.remove(worker)
        stack.start_worker("sim")
        stack.await_workers(2)
    done.set()
    for thread in threads:
        thread.join(LONGEST_S)
    assert len(answers) > 12
    texts = [answer["choices"][0]["message"]["content"] for answer in expected]
    assert all(a["choices"][0]["message"]["content"] == texts[n] for n, a in answers)
    fault.tokens += 25 * len(answers)


def test_a_paused_model_waits_and_goes_on(stack: Stack) -> None:
    assert "paused" in sluice(stack, "pause", "gpt-3.5-turbo").stdout
    client = Client(stack, chat(max_tokens=2))
    await_that(lambda: stack.redis.zcard(keys.backlog("sim", "interactive")) == 1)
    await_that(lambda: stack.redis.llen(keys.tickets("sim")) == 0)
    assert stack.redis.zcard(keys.backlog("sim", "interactive")) == 1
    assert sluice(stack, "resume", "sim").returncode == 0
    assert client.answer()["usage"]["completion_tokens"] == 2
    unknown = sluice(stack, "pause", "no-such-model")
    assert (unknown.returncode, "does not exist" in unknown.stderr) == (2, True)


def test_a_worker_that_is_not_there_cannot_be_drained(stack: Stack) -> None:
    refused = sluice(stack, "drain", "nobody-1")
    assert refused.returncode == 2
    assert "no worker 'nobody-1' lives" in refused.stderr
    assert "serving" in sluice(stack, "drain").stdout


def test_one_maintenance_goes_on_when_the_other_dies(stack: Stack, fault: Fault) -> None:
    bodies = [chat(n, stream=True) for n in range(4)]
    expected = ask(stack, bodies)
    first = stack.part("maintenance")
    stack.start_maintenance()
    clients = [Client(stack, body) for body in bodies]
    await_tokens(clients, 5)
    fault.inflict("SIGKILL maintenance")
    first.kill()
    (worker,) = stack.workers
    killed_s = _kill(fault, worker)
    stack.start_worker("sim")
    compare(fault, clients, expected, killed_s)
    await_rows(stack, JobRecord, 8)


def test_lost_tickets_are_issued_again(stack: Stack, fault: Fault) -> None:
    (worker,) = stack.workers
    worker.signal(signal.SIGSTOP)
    client = Client(stack, chat(max_tokens=2))
    await_that(lambda: stack.redis.zcard(keys.backlog("sim", "interactive")) == 1)
    fault.inflict("DEL tickets")
    await_that(lambda: stack.redis.delete(keys.tickets("sim")))
    worker.signal(signal.SIGCONT)
    client.answer()


def test_jobs_are_taken_beside_a_long_one_and_after_it(stack: Stack) -> None:
    """A busy worker takes its tickets itself, an idle one leaves that to Celery."""
    long = Client(stack, chat(1, stream=True, max_tokens=200))
    await_tokens([long], 1)
    ask(stack, [chat(n, max_tokens=2) for n in range(4)])
    long.answer()
    for n in range(4):
        ask(stack, [chat(n, max_tokens=2)])


def test_a_doubled_ticket_does_nothing(stack: Stack, fault: Fault) -> None:
    fault.inflict("doubled tickets")
    ask(stack, [chat(1, max_tokens=2)])
    queue = keys.tickets("sim")
    stack.redis.lpush(queue, *[make_ticket("sim", f"ticket {n}") for n in range(3)])
    await_that(lambda: stack.redis.llen(queue) == 0)
    ask(stack, [chat(2, max_tokens=2)])
    assert len(stack.redis.keys(keys.job("*"))) == 2
