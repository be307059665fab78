"""The rules: everything that may happen to the queue, in any order."""

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, ClassVar

from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)
from redis.exceptions import RedisError
from sqlalchemy.exc import SQLAlchemyError

from db import jobs as records
from db.models import JobRecord
from tasks.contract import keys
from tasks.contract.errors import SluiceError
from tasks.contract.events import End
from tasks.contract.job import Cause, EnqueueOptions, Job, Lane, State
from tasks.contract.job_errors import JobCancelledError
from tasks.maintenance import dead_letters as dead
from tasks.maintenance.accepted import dispatch, to_job
from tests.model.drain import drain
from tests.model.redis_server import Fault
from tests.model.worker import Hold, Worker
from tests.model.world import MODELS, Asked, Reader, World

ENDPOINT = "/v1/completions"
STEPS_PER_EXAMPLE = 100
# The actor has given up or crashed; the world goes on.
GIVEN_UP = (RedisError, SQLAlchemyError, SluiceError)

WEIGHTS = {"default": 1.0, "rich": 3.0, "poor": 0.1}

some = st.integers(0, 2**16)
key_names = st.sampled_from(["", "", "", "k1", "k2"])
deadlines_s = st.sampled_from([None, None, None, 5.0, 400.0])


def step(**strategies: Any) -> Callable[[Any], Any]:
    """A rule, after which all invariants hold; it is counted."""

    def decorate(act: Callable[..., None]) -> Any:
        @functools.wraps(act)
        def wrapped(self: "QueueMachine", **values: Any) -> None:
            self.done[act.__name__] += 1
            self.holds = False
            with suppress(*GIVEN_UP):
                act(self, **values)
            self.world.check()
            self.holds, self.calm_steps = True, self.calm_steps + 1

        return rule(**strategies)(wrapped)

    return decorate


class QueueMachine(RuleBasedStateMachine):
    """Whatever happens, the invariants hold, and every accepted job ends once."""

    world: ClassVar[World]
    done: ClassVar[Counter[str]] = Counter()

    def __init__(self) -> None:
        super().__init__()
        self.requests: list[tuple[JobRecord, str]] = []
        """Being accepted: the job, and what comes next."""
        self.calm_steps = 0
        """Since Redis was lost."""
        self.holds = True
        self.was_set_back = False

    @initialize(most_failures=st.sampled_from([2, 2, 3]))
    def begin(self, most_failures: int) -> None:
        self.world.start_over(most_failures)

    def teardown(self) -> None:
        if self.holds:
            drain(self.world)

    def is_busy(self) -> bool:
        return any(worker.holds for worker in self.world.workers)

    # The API

    @step(
        size=st.integers(1, 40),
        lane=st.sampled_from(Lane),
        priority=st.sampled_from([0, 0, 5]),
        deadline_s=deadlines_s,
        key=key_names,
        fingerprint=st.sampled_from("fg"),
        model=st.sampled_from(MODELS),
        sequences=st.sampled_from([1, 1, 1, 2, 3]),
        tenant=st.sampled_from(list(WEIGHTS)),
        max_tokens=st.sampled_from([None, None, 0, 100, 10**6]),
    )
    def submit(
        self,
        *,
        size: int,
        lane: Lane,
        priority: int,
        deadline_s: float | None,
        key: str,
        fingerprint: str,
        model: str,
        sequences: int,
        tenant: str,
        max_tokens: int | None,
    ) -> None:
        """A client asks and waits."""
        body = b'{"pieces":%d}' % (size % 5 + 1) + b" " * size
        options = EnqueueOptions(priority, deadline_s, key, fingerprint)
        job_id = self.world.new_id()
        job = Job(
            *(job_id, model, ENDPOINT, body, lane, tenant),
            sequences=sequences,
            weight=WEIGHTS[tenant],
            max_tokens=max_tokens,
            options=options,
        )
        self.world.asked[job.id] = Asked(job.id, model, size % 5 + 1)
        self.world.queue.backlog.submit(job)

    @step(
        size=st.integers(1, 40),
        lane=st.sampled_from(Lane),
        priority=st.sampled_from([0, 0, 5]),
        deadline_s=deadlines_s,
        key=key_names,
        fingerprint=st.sampled_from("fg"),
        model=st.sampled_from(MODELS),
        sequences=st.sampled_from([1, 1, 1, 2, 3]),
        tenant=st.sampled_from(list(WEIGHTS)),
        max_tokens=st.sampled_from([None, None, 0, 100, 10**6]),
        webhook=st.booleans(),
        steps=st.sampled_from([1, 2, 3, 3, 3]),
    )
    def accept(
        self,
        *,
        size: int,
        lane: Lane,
        priority: int,
        deadline_s: float | None,
        key: str,
        fingerprint: str,
        model: str,
        sequences: int,
        tenant: str,
        max_tokens: int | None,
        webhook: bool,
        steps: int,
    ) -> None:
        """A client submits a background job; the API may stop on the way, or crash."""
        job = JobRecord(
            id=self.world.new_id(),
            tenant=tenant,
            model=model,
            endpoint=ENDPOINT,
            lane=lane,
            created_at=datetime.now(UTC),
            request=b'{"pieces":%d}' % (size % 5 + 1) + b" " * size,
            priority=priority,
            sequences=sequences,
            weight=WEIGHTS[tenant],
            max_tokens=max_tokens,
            deadline_s=deadline_s,
            idempotency_key=key or None,
            fingerprint=fingerprint if key else None,
            webhook="https://example.com" if webhook else None,
        )
        self.world.asked[job.id] = Asked(job.id, model, size % 5 + 1, webhook)
        self.requests.append((job, "reserve"))
        for _ in range(steps):
            if self.requests and self.requests[-1][0] is job:
                self._accept_on(len(self.requests) - 1)

    @precondition(lambda self: self.requests)
    @step(which=some)
    def go_on_accepting(self, which: int) -> None:
        self._accept_on(which % len(self.requests))

    def _accept_on(self, index: int) -> None:
        """What comes next: api/acceptance.py has the same steps."""
        job, next_step = self.requests.pop(index)
        queue, url = self.world.queue, self.world.database.url
        if next_step == "reserve":
            try:
                holder = queue.backlog.reserve(to_job(job))
            except RedisError:
                holder = job.id
            if holder != job.id and not self._may_commit(holder):
                return
            self.requests.append((job, "commit"))
        elif next_step == "commit":
            try:
                is_new = job.id in records.accept(url, [job])
            except SQLAlchemyError:
                with suppress(RedisError):
                    queue.backlog.release(to_job(job))
                raise
            if is_new:
                self.world.accepted[job.id] = self.world.asked[job.id]
                self.requests.append((job, "dispatch"))
            else:
                with suppress(RedisError):
                    queue.backlog.release(to_job(job))
        else:
            dispatch(queue.backlog, job)

    def _may_commit(self, holder: str) -> bool:
        """Whether the job with the key is neither accepted nor, a chat, in Redis alone."""
        if records.load(self.world.database.url, holder) is not None:
            return False
        return self.world.queue.backlog.snapshots([holder]) == [None]

    @precondition(lambda self: self.world.asked and self.calm_steps % 3 == 0)
    @step(which=some, unless_attached=st.booleans())
    def cancel(self, which: int, unless_attached: bool) -> None:
        """A client does not want it any more."""
        job, queue = self._asked(which), self.world.queue
        if queue.backlog.snapshots([job.id]) != [None]:
            queue.cancel(job.id, job.model, unless_attached=unless_attached)
        elif job.id in self.world.accepted:
            error = JobCancelledError().body()["error"]
            records.end_lost(self.world.database.url, job.id, State.CANCELLED, error)

    @precondition(is_busy)
    @step(which=some, late_s=st.sampled_from([0, 0, 31]))
    def cancel_late(self, which: int, late_s: float) -> None:
        """The end of a log is written a while after its job was cancelled."""
        worker, hold = self._hold(which)
        while hold in worker.holds.values() and not hold.ended:
            worker.go_on(hold)
        job, queue = hold.claim.job, self.world.queue
        if cancelled := queue.backlog.cancel(job.id):
            self.world.check()
            self.world.pass_time(late_s)
            self.world.recorder.record()
            end = End.failed(JobCancelledError(), State.CANCELLED)
            queue.log.end(job.id, cancelled.attempt, end, cancelled.listener)

    @precondition(lambda self: any(row.status == "failed" for row in self.world.rows.values()))
    @step(which=some)
    def retry(self, which: int) -> None:
        """An operator gives a dead letter another chance."""
        failed = [row.id for row in self.world.rows.values() if row.status == "failed"]
        old = self.world.asked[failed[which % len(failed)]]
        known = {row.id for row in self.world.database.rows()}
        try:
            dead.retry(self.world.queue, self.world.database.url, old.id)
        finally:
            for row in self.world.database.rows():
                if row.id not in known:
                    new = Asked(row.id, old.model, old.pieces, old.has_webhook)
                    self.world.asked[row.id] = self.world.accepted[row.id] = new

    @precondition(lambda self: self.world.asked and self.calm_steps % 2 == 0)
    @step(which=some)
    def read(self, which: int) -> None:
        """A client follows its answer."""
        if which % 2 or not self.world.readers:
            self.world.readers.append(Reader(self._asked(which).id))
        reader = self.world.readers[which % len(self.world.readers)]
        self.world.read(reader)

    def _asked(self, which: int) -> Asked:
        asked = list(self.world.asked.values())
        return asked[which % len(asked)]

    # Workers

    def may_claim(self) -> bool:
        """Mostly only when there is something to claim."""
        is_queued = any(job.state == "queued" for job in self.world.expected.jobs.values())
        return is_queued or self.calm_steps % 8 == 0

    @precondition(may_claim)
    @step(which=some, most=st.integers(1, 3))
    def claim(self, which: int, most: int) -> None:
        self._worker(which).claim(most)

    @precondition(may_claim)
    @step(which=some)
    def claim_all(self, which: int) -> None:
        """A worker fills its slots."""
        worker = self._worker(which)
        while worker.claim():
            pass

    def _worker(self, which: int) -> Worker:
        return self.world.workers[which % len(self.world.workers)]

    def _hold(self, which: int) -> tuple[Worker, Hold]:
        held = [(worker, hold) for worker in self.world.workers for hold in worker.holds.values()]
        return held[which % len(held)]

    @precondition(is_busy)
    @step(which=some)
    def work(self, which: int) -> None:
        """A worker does the next thing for one job."""
        worker, hold = self._hold(which)
        worker.go_on(hold)

    @precondition(is_busy)
    @step(which=some, times=st.integers(2, 9))
    def work_on(self, which: int, times: int) -> None:
        worker, hold = self._hold(which)
        for _ in range(times):
            if hold in worker.holds.values():
                worker.go_on(hold)

    @precondition(is_busy)
    @step(which=some)
    def work_all(self, which: int) -> None:
        """One tick of an engine: a piece of each job, in one script."""
        worker, _ = self._hold(which)
        worker.tick()

    @precondition(is_busy)
    @step(which=some)
    def renew(self, which: int) -> None:
        worker, _ = self._hold(which)
        worker.renew()

    @precondition(is_busy)
    @step(which=some, cause=st.sampled_from(list(Cause)[1:]), delay_s=st.sampled_from([0, 0, 7]))
    def hand_back(self, which: int, cause: Cause, delay_s: float) -> None:
        worker, hold = self._hold(which)
        worker.hand_back(hold, cause, delay_s)

    @precondition(is_busy)
    @step(which=some)
    def fail(self, which: int) -> None:
        """The engine refuses the request."""
        _, hold = self._hold(which)
        if hold.has_begun and not hold.ended:
            hold.end(End(State.FAILED))

    @precondition(is_busy)
    @step(which=some)
    def crash(self, which: int) -> None:
        self._crash(which)

    def _crash(self, which: int) -> None:
        """A worker is gone, with its state; another replaces it."""
        worker, _ = self._hold(which)
        index = self.world.workers.index(worker)
        self.world.workers[index] = self.world.new_worker(worker.model, worker.slots)

    @precondition(is_busy)
    @step(which=some)
    def crash_and_expire(self, which: int) -> None:
        """A worker crashes, and its leases run out."""
        self._crash(which)
        self.world.pass_time(301)
        self.world.queue.reap()

    @precondition(is_busy)
    @step(which=some, other=some, times=st.integers(1, 4))
    def stand_still(self, which: int, other: int, times: int) -> None:
        """A worker stalls past its leases, and goes on when others have its jobs."""
        worker, hold = self._hold(which)
        self.world.pass_time(301)
        self.world.queue.reap()
        others = [one for one in self.world.workers if one.model == worker.model]
        others[other % len(others)].claim()
        for _ in range(times):
            if hold in worker.holds.values():
                worker.go_on(hold)

    @precondition(is_busy)
    @step(which=some, lives=st.booleans())
    def take_for_gone(self, which: int, lives: bool) -> None:
        """Maintenance finds a worker silent, rightly or not; or it sends a heartbeat just then."""
        worker, _ = self._hold(which)
        beats = worker.beat()
        if lives:
            worker.beat()
        self.world.gone_workers.hand_on(worker.id, beats)

    @precondition(is_busy)
    @step(which=some)
    def work_unanswered(self, which: int) -> None:
        """A worker does the next thing for one job, and no reply arrives."""
        worker, hold = self._hold(which)
        self.world.redis.fault = Fault(0, 2, has_run=True)
        worker.go_on(hold)

    @precondition(lambda self: self.world.watch.orders)
    @step(is_received=st.booleans())
    def handle_order(self, is_received: bool) -> None:
        """An order on a control channel arrives, or it is lost."""
        worker_id, order = self.world.watch.orders.pop(0)
        job_id, attempt = order.split()
        for worker in self.world.workers:
            if is_received and worker.id == worker_id:
                worker.stop(job_id, int(attempt))

    @precondition(lambda self: self.calm_steps % 3 == 0)
    @step(model=st.sampled_from(MODELS))
    def take_ticket(self, model: str) -> None:
        self.world.redis.rpop(keys.tickets(model))

    # Rules are drawn alike: these, more often than others.
    claim_1 = claim_2 = claim_all
    work_1 = work_2 = work_3 = work_4 = work_on
    work_5 = work_6 = work_all
    work_7 = work_8 = work
    crash_and_expire_1 = crash_and_expire_2 = crash_and_expire
    hand_back_1 = hand_back_2 = hand_back

    # Maintenance and operators

    @precondition(lambda self: self.calm_steps % 3 == 1)
    @step()
    def reap(self) -> None:
        self.world.queue.reap()

    @precondition(lambda self: self.calm_steps % 2)
    @step()
    def record(self) -> None:
        self.world.recorder.record()

    @precondition(lambda self: self.calm_steps % 2)
    @step()
    def reconcile(self) -> None:
        self.world.reconciler.reconcile()

    @precondition(lambda self: self.calm_steps % 3 == 2)
    @step(slices=st.integers(1, 6))
    def sweep(self, slices: int) -> None:
        for _ in range(slices):
            self.world.sweeper.sweep()

    @precondition(lambda self: self.calm_steps % 3 == 1)
    @step()
    def reissue(self) -> None:
        self.world.queue.reissue_tickets()

    @precondition(lambda self: self.calm_steps % 8 == 0)
    @step()
    def restart_maintenance(self) -> None:
        self.world.restart_maintenance()

    @precondition(lambda self: not self.world.expected.paused and self.calm_steps % 3 == 0)
    @step(model=st.sampled_from(MODELS))
    def pause(self, model: str) -> None:
        self.world.queue.backlog.pause(model)

    @precondition(lambda self: self.world.expected.paused)
    @step(model=st.sampled_from(MODELS))
    def resume(self, model: str) -> None:
        self.world.queue.backlog.resume(model)

    # Time and trouble

    @precondition(lambda self: self.calm_steps % 2 == 0)
    @step(seconds=st.sampled_from([0.5, 6, 31, 65, 150, 301, 301, 500, 3700, 90_000]))
    def pass_time(self, seconds: float) -> None:
        self.world.pass_time(seconds)

    @precondition(lambda self: self.calm_steps % 4 == 0)
    @step(seconds=st.sampled_from([1, 60, 400, 4000]))
    def step_back(self, seconds: float) -> None:
        """The clock of Redis is set back. Nothing is promised if it loses its last moments too."""
        self.was_set_back = True
        self.world.pass_time(-seconds)

    @precondition(lambda self: self.calm_steps % 5 == 4)
    @step()
    def save(self) -> None:
        self.world.save()

    @precondition(lambda self: self.calm_steps > 25)
    @step()
    def lose_all(self) -> None:
        """Redis comes back empty."""
        self.calm_steps = 0
        self.world.lose_all()

    @precondition(lambda self: self.calm_steps > 15 and not self.was_set_back)
    @step()
    def lose_latest(self) -> None:
        """Redis comes back as it was a moment ago."""
        self.calm_steps = 0
        self.world.lose_latest()

    @precondition(lambda self: self.calm_steps > 25)
    @step()
    def lose_logs(self) -> None:
        """The Redis of the logs comes back empty."""
        self.world.lose_logs()
        self.calm_steps = 0

    @precondition(lambda self: not self.world.redis.fault)
    @rule(after=st.integers(0, 4), times=st.sampled_from([1, 2, 2, 2, 9]), has_run=st.booleans())
    def lose_messages(self, after: int, times: int, has_run: bool) -> None:
        """Of what is done next, some commands do not reach Redis, or their replies are lost."""
        self.done["lose_messages"] += 1
        self.world.redis.fault = Fault(after, times, has_run)

    @precondition(lambda self: not self.world.database.fault)
    @rule(after=st.integers(0, 8), times=st.sampled_from([1, 99]), has_run=st.booleans())
    def lose_sql(self, after: int, times: int, has_run: bool) -> None:
        """SQL goes away while the next thing is done; or has committed, and the reply is lost."""
        self.done["lose_sql"] += 1
        self.world.database.fault = Fault(after % 3 if has_run else after, times, has_run)


def run(steps: int, number: int, phases: Sequence[Phase]) -> None:
    """Takes about that many steps; the number is the seed of chance.

    Raises:
        AssertionError: an invariant did not hold.
    """
    seed(number)(QueueMachine)
    run_state_machine_as_test(
        QueueMachine,
        settings=settings(
            max_examples=max(1, steps // STEPS_PER_EXAMPLE),
            stateful_step_count=STEPS_PER_EXAMPLE,
            deadline=None,
            database=None,
            print_blob=True,
            phases=phases,
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
        ),
    )
