"""The life of a job in Redis: submit, claim, renew, finish, cancel, reap. Each step is one script.

What waits, where and for how long is in depth.py.

The scripts in lua/ make every step atomic, and take the time from Redis, never from a host's clock.
"""

import functools
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from redis import Redis

from tasks import keys
from tasks.app import make_ticket
from tasks.errors import IdempotencyError, OverloadedError
from tasks.message import Cause, Claim, Job, Lane, Snapshot, State, Terms, about_job, new_id
from tasks.settings import Settings, get_settings

log = logging.getLogger(__name__)

LUA = Path(__file__).parent / "lua"
REAPED_AT_ONCE = 1000


def load_script(client: Any, *names: str) -> Callable[..., Any]:
    """The files lua/<name>.lua as one script, run by its hash, by a blocking or asyncio client."""
    script: Callable[..., Any] = client.register_script(_read_scripts(names))
    return script


@functools.cache
def _read_scripts(names: tuple[str, ...]) -> str:
    files = ((LUA / f"{name}.lua").read_text() for name in names)
    return "".join([f"local COUNTS = '{keys.COUNTS}'\n", *files])


class Reaped(NamedTuple):
    """A job taken from a worker that fell silent, or whose deadline or delay is over."""

    job_id: str
    model: str
    tenant: str
    attempt: int
    listener: str
    state: State


class Cancelled(NamedTuple):
    """A job that was cancelled, and the worker that must stop it, if any."""

    tenant: str
    attempt: int
    worker: str
    listener: str


class Backlog:
    """All queued and running jobs of all models, on the queue's Redis."""

    def __init__(self, redis: Redis, settings: Settings | None = None) -> None:
        self.redis = redis
        self._settings = settings or get_settings()
        self._submit = load_script(redis, "record", "submit")
        self._claim = load_script(redis, "record", "claim")
        self._renew = load_script(redis, "renew")
        self._requeue = load_script(redis, "record", "requeue")
        self._finish = load_script(redis, "record", "finish")
        self._cancel = load_script(redis, "record", "cancel")
        self._reap = load_script(redis, "record", "reap")

    def submit(self, job: Job, terms: Terms = Terms()) -> str:  # noqa: B008 (frozen)
        """Puts the job at the end of its priority in its lane, and sends a ticket for it.

        Returns:
            Its id, or that of the job that holds the idempotency key.

        Raises:
            OverloadedError: the lane is full.
            IdempotencyError: another request holds the key.
        """
        deadline_us = "" if terms.deadline_s is None else int(terms.deadline_s * 1e6)
        fingerprint = terms.fingerprint if terms.idempotency_key else ""
        reply = self._submit(
            keys=[
                *(keys.job(job.id), keys.backlog(job.model, job.lane), keys.MODELS),
                *(keys.DEADLINES, keys.tickets(job.model)),
                keys.idempotency(job.tenant, terms.idempotency_key),
            ],
            args=[
                *(job.id, job.model, self._settings.max_backlog, self._settings.job_ttl_s),
                *(terms.priority, deadline_us, fingerprint),
                *(terms.first_attempt, self._settings.max_attempts),
                make_ticket(job.model, job.id),
                *job.encode(),
            ],
        )
        if not reply:
            raise OverloadedError
        job_id, *known = (value.decode() for value in reply)
        if known and known != [fingerprint]:
            raise IdempotencyError
        if job_id == job.id:
            self._log_accepted(job)
        return str(job_id)

    def _log_accepted(self, job: Job) -> None:
        about = {"lane": job.lane, "endpoint": job.endpoint}
        if self._settings.log_content:
            about["request"] = job.body.decode(errors="replace")
        log.info("job accepted", extra=about_job(job) | about)

    def holder(self, tenant: str, idempotency_key: str, fingerprint: str) -> str | None:
        """The job that holds the key, if there is one.

        Raises:
            IdempotencyError: another request holds the key.
        """
        held: Any = self.redis.get(keys.idempotency(tenant, idempotency_key))
        if held is None:
            return None
        known, job_id = held.decode().split()
        if known != fingerprint:
            raise IdempotencyError
        return str(job_id)

    def look(self, job_ids: Sequence[str]) -> list[Snapshot | None]:
        """The jobs as they stand; None for one that Redis does not hold."""
        pipeline = self.redis.pipeline(transaction=False)
        for job_id in job_ids:
            pipeline.hmget(keys.job(job_id), Snapshot.FIELDS)
        return [Snapshot.decode(*found) for found in zip(job_ids, pipeline.execute(), strict=True)]

    def missing(self, job_ids: Sequence[str]) -> list[str]:
        """Those of the jobs that Redis does not hold."""
        pipeline = self.redis.pipeline(transaction=False)
        for job_id in job_ids:
            pipeline.exists(keys.job(job_id))
        return [j for j, is_there in zip(job_ids, pipeline.execute(), strict=True) if not is_there]

    def body(self, job_id: str) -> bytes | None:
        """The request of a job that has not been completed."""
        found: Any = self.redis.hget(keys.job(job_id), "body")
        return None if found is None else bytes(found)

    def claim(self, model: str, worker: str) -> Claim | None:
        """Leases the first job of the model to the worker; None when nothing waits."""
        lease_us = int(self._settings.lease_s * 1e6)
        reply = self._claim(
            keys=[
                *(keys.LEASES, keys.LEDGER, keys.DEADLINES, keys.PAUSED),
                *(keys.suspect(worker), *lanes(model)),
            ],
            args=[worker, lease_us, keys.JOB_PREFIX, model, *Claim.FIELDS],
        )
        return None if reply is None else Claim.decode(reply)

    def renew(self, held: Iterable[Claim]) -> list[str]:
        """Renews the leases of these claims; returns the jobs that are no longer held."""
        lease_us = int(self._settings.lease_s * 1e6)
        pairs = [value for claim in held for value in (claim.job.id, claim.attempt)]
        if not pairs:
            return []
        lost = self._renew(keys=[keys.LEASES], args=[lease_us, keys.JOB_PREFIX, *pairs])
        return [job_id.decode() for job_id in lost]

    def requeue(self, claim: Claim, cause: Cause, reason: str, delay_s: float = 0) -> State | None:
        """Hands a claimed job back, for another worker or a later try; or ends it as a dead letter.

        Returns:
            Its new state; None: it was taken from this worker before.
        """
        model = claim.job.model
        state = self._requeue(
            keys=[
                *(keys.job(claim.job.id), keys.LEASES, keys.LEDGER, keys.DELAYED),
                keys.tickets(model),
            ],
            args=[
                *(claim.job.id, claim.attempt, keys.BACKLOG_PREFIX),
                *(self._settings.log_retention_s, reason, cause, int(delay_s * 1e6)),
                make_ticket(model, new_id()),
            ],
        )
        return None if state is None else State(state.decode())

    def finish(self, claim: Claim, state: State, dead_because: str = "") -> bool:
        """Ends a claimed job, as a dead letter if there is a reason for that.

        False: it was taken from this worker before, and its result is void.
        """
        ended = self._finish(
            keys=[
                *(keys.job(claim.job.id), keys.LEASES, keys.LEDGER),
                keys.service(claim.job.model),
            ],
            args=[
                *(claim.job.id, claim.attempt, state),
                *(self._settings.log_retention_s, dead_because),
            ],
        )
        return bool(ended)

    def cancel(self, job_id: str, model: str) -> Cancelled | None:
        """Cancels a queued or running job; None when it has ended already."""
        reply = self._cancel(
            keys=[
                *(keys.job(job_id), keys.LEASES, keys.LEDGER, keys.DEADLINES, keys.DELAYED),
                *lanes(model),
            ],
            args=[job_id, self._settings.log_retention_s],
        )
        if reply is None:
            return None
        tenant, attempt, worker, listener = (value.decode() for value in reply)
        return Cancelled(tenant, int(attempt), worker, listener)

    def reap(self) -> list[Reaped]:
        """Takes the jobs whose lease has expired from their workers, and ends those too late.

        And has those wait again whose delay is over.
        """
        reply = self._reap(
            keys=[keys.LEASES, keys.LEDGER, keys.DEADLINES, keys.DELAYED],
            args=[
                *(keys.JOB_PREFIX, keys.BACKLOG_PREFIX),
                *(self._settings.log_retention_s, REAPED_AT_ONCE),
            ],
        )
        return [
            Reaped(job_id, model, tenant, int(attempt), listener, State(state))
            for row in reply
            for job_id, model, tenant, attempt, listener, state in [map(bytes.decode, row)]
        ]

    def send_tickets(self, model: str, number: int = 1) -> None:
        """Tells the model's workers once more that there is work."""
        tickets = [make_ticket(model, new_id()) for _ in range(number)]
        self.redis.lpush(keys.tickets(model), *tickets)

    def pause(self, model: str) -> None:
        """Has all workers of the model leave its backlog alone; what runs goes on."""
        self.redis.sadd(keys.PAUSED, model)

    def resume(self, model: str) -> None:
        """Ends a pause; maintenance sends the tickets that were used up meanwhile."""
        self.redis.srem(keys.PAUSED, model)

    def paused(self) -> set[str]:
        """The models that are paused."""
        names: Any = self.redis.smembers(keys.PAUSED)
        return {name.decode() for name in names}

    def models(self) -> list[str]:
        """The models that have had a job."""
        names: set[bytes] = self.redis.smembers(keys.MODELS)  # type: ignore[assignment]
        return sorted(name.decode() for name in names)


def lanes(model: str) -> list[str]:
    """The keys of a model's backlog, in the order of service."""
    return [keys.backlog(model, lane) for lane in Lane]
