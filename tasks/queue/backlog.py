"""The life of a job in Redis: submit, claim, renew, finish, cancel, reap. Each step is one script.

What waits, where and for how long is in statistics.py and depth.py.

The scripts in lua/ make every step atomic, and take the time from Redis, never from a host's clock.
"""

import functools
import logging
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from enum import IntEnum
from pathlib import Path
from typing import Any, Literal, NamedTuple

import orjson
from redis import Redis

from tasks.contract import keys
from tasks.contract.errors import (
    BacklogBytesError,
    DecodeError,
    IdempotencyError,
    OverloadedError,
    RecordsFullError,
)
from tasks.contract.job import Cause, Claim, Job, Lane, Room, Snapshot, State, Usage, new_id
from tasks.contract.settings import Settings, get_settings
from tasks.queue.celery_app import make_ticket
from tasks.queue.limits import Limited, NoteLeft, over_limit, read_allowance

log = logging.getLogger(__name__)

LUA = Path(__file__).parent / "lua"
# Bounds one script's run in Redis.
REAPED_AT_ONCE = 200
# Records of changes that wait for SQL; a million takes some 300 MB.
MOST_RECORDS = 1_000_000
# Bounds one look at a place.
MEMBERS_AT_ONCE = 1000
# What a job is charged before its tokens are known: of an answer, until the model has answered; and
# at most, so that no body full of pictures keeps its tenant waiting.
MEAN_TOKENS = 256
BYTES_PER_TOKEN = 4
MOST_TOKENS = 100_000
# A tenant's counter of its service, from its last job on.
SERVED_S = 86_400
# So long after an interactive job batch jobs leave slots free for those that are to be expected
# within the shorter time.
RESERVE_S, SOON_S = 60, 10
# From a job's check to its queueing, while SQL commits it.
RESERVATION_S = 60

_FULL: dict[str, type[OverloadedError]] = {
    "lane": OverloadedError,
    "bytes": BacklogBytesError,
    "records": RecordsFullError,
}


def load_script(client: Any, *names: str) -> Callable[..., Any]:
    """The files lua/<name>.lua as one script, run by its hash, by a blocking or asyncio client."""
    script: Callable[..., Any] = client.register_script(read_scripts(names))
    return script


@functools.cache
def read_scripts(names: tuple[str, ...]) -> str:
    """The files' text, behind the constants and functions that all scripts share."""
    constants = keys.SCRIPT_NAMES | {
        "MEAN_TOKENS": MEAN_TOKENS,
        "BYTES_PER_TOKEN": BYTES_PER_TOKEN,
        "MOST_TOKENS": MOST_TOKENS,
        "SERVED_S": SERVED_S,
        "RESERVE_S": RESERVE_S,
        "SOON_S": SOON_S,
    }
    # With a line like that a Redis that is full refuses the script before it changes anything.
    first = ["#!lua\n"] if names[-1] == "submit" else []
    lines = [f"local {name} = {value!r}\n" for name, value in constants.items()]
    files = [(LUA / f"{name}.lua").read_text() for name in ("clock", *names)]
    return "".join(first + lines + files)


# In front of the scripts that change a job.
STATE = ("fair", "limits", "state")


class Reaped(NamedTuple):
    """A job taken from a worker that fell silent, or whose deadline or delay is over."""

    job_id: str
    model: str
    tenant: str
    attempt: int
    listener: str
    state: State
    endpoint: str = ""
    started_us: int | None = None
    """When the attempt that has ended by this did; None: none has."""
    traceparent: str = ""
    waited_since_us: int | None = None
    """For that attempt, or until now if none has started; None: it waits on."""


class Finished(IntEnum):
    """Result of finishing a job; false if the worker no longer held it."""

    VOID = 0
    NONE_WAITS = 1
    OTHERS_WAIT = 2


class Cancelled(NamedTuple):
    """A job that was cancelled, and the worker that must stop it, if any."""

    tenant: str
    attempt: int
    worker: str
    listener: str


def _decoded(rows: Sequence[Sequence[bytes]]) -> Iterator[Claim]:
    """The claims; one that cannot be read is left to its lease, and the others are there."""
    for row in rows:
        try:
            yield Claim.decode(row)
        except DecodeError as broken:
            log.error("job %s: %s", row[0].decode(), broken)


class Backlog:
    """All queued and running jobs of all models, on the queue's Redis."""

    def __init__(self, redis: Redis, settings: Settings | None = None) -> None:
        self.redis = redis
        self._settings = settings or get_settings()
        self._submit = load_script(redis, *STATE, "arrivals", "submit")
        self._release = load_script(redis, *STATE, "release")
        self._claim = load_script(redis, *STATE, "arrivals", "claim")
        self._clear = load_script(redis, *STATE, "clear")
        self._renew = load_script(redis, "renew")
        self._requeue = load_script(redis, *STATE, "requeue")
        self._finish = load_script(redis, *STATE, "finish")
        self._cancel = load_script(redis, *STATE, "cancel")
        self._reap = load_script(redis, *STATE, "reap")
        self._settle = load_script(redis, *STATE, "settle")
        self._report = load_script(redis, *STATE, "report")
        self._forget = load_script(redis, *STATE, "forget")
        self._sweep = load_script(redis, *STATE, "sweep")
        self._wake = load_script(redis, *STATE, "wake")
        # Celery loads half of itself for its first message: not while a client waits.
        make_ticket("", "")

    def submit(
        self, job: Job, limits: Sequence[Limited] = (), note_left: NoteLeft | None = None
    ) -> str:
        """Puts the job at the end of its priority in its lane, and sees to it that a ticket waits.

        `note_left` is called with what is left of `limits`, once the job has taken its part.

        Returns:
            Its id, or that of the job that holds the idempotency key.

        Raises:
            OverloadedError: the lane is full, or what it holds in Redis.
            RateLimitError: it is more than a limit allows.
            IdempotencyError: another request holds the key.
        """
        if job.options.deadline_s is None:
            options = replace(job.options, deadline_s=self._settings.job_ttl_s)
            job = replace(job, options=options)
        job_id = self._put("submit", job, limits, note_left)
        if job_id == job.id:
            self._log_accepted(job)
        return job_id

    def reserve(
        self, job: Job, limits: Sequence[Limited] = (), note_left: NoteLeft | None = None
    ) -> str:
        """Checks whether the job could be submitted, and holds its places and key for a minute.

        Returns and raises what `submit` would.
        """
        return self._put("reserve", job, limits, note_left)

    def queue(self, job: Job, first_attempt: int = 0) -> None:
        """Submits a job that SQL has: it is never refused. Doing it again changes nothing.

        `first_attempt`: attempts before; what they left in Redis is older than what now comes.
        """
        self._put("queue", job, first_attempt=first_attempt)
        self._log_accepted(job)

    def _put(
        self,
        step: str,
        job: Job,
        limits: Sequence[Limited] = (),
        note_left: NoteLeft | None = None,
        first_attempt: int = 0,
    ) -> str:
        settings, options = self._settings, job.options
        deadline_us = "" if options.deadline_s is None else int(options.deadline_s * 1e6)
        fingerprint = options.fingerprint if options.idempotency_key else ""
        reply = self._submit(
            keys=[keys.idempotency(job.tenant, options.idempotency_key)],
            args=[
                *(step, job.id, job.model, job.lane, len(job.body)),
                *(settings.max_backlog, settings.max_backlog_bytes, MOST_RECORDS),
                *(fingerprint, RESERVATION_S if step == "reserve" else settings.job_ttl_s),
                *(options.priority, deadline_us, first_attempt, settings.max_attempts),
                *(make_ticket(job.model, job.id), orjson.dumps(limits)),
                *job.encode(),
            ],
        )
        job_id, *details = (value.decode() for value in reply)
        match details:
            case []:
                pass
            case ["limit", refusal] if not job_id:
                raise over_limit(refusal)
            case [what] if not job_id:
                raise _FULL[what]
            case ["", left]:
                if note_left:
                    note_left(read_allowance(left))
            case _ if details != [fingerprint]:
                raise IdempotencyError
        return str(job_id)

    def _log_accepted(self, job: Job) -> None:
        about = {"lane": job.lane, "endpoint": job.endpoint}
        if self._settings.log_content:
            about["request"] = job.body.decode(errors="replace")
        log.info("job accepted", extra=job.log_fields | about)

    def release(self, job: Job) -> None:
        """Gives up what `reserve` holds for a job that is not accepted after all."""
        key = keys.idempotency(job.tenant, job.options.idempotency_key)
        self._release(keys=[key], args=[job.id, job.options.fingerprint])

    def snapshots(self, job_ids: Sequence[str]) -> list[Snapshot | None]:
        """The jobs' current state; None for one that Redis does not hold."""
        pipeline = self.redis.pipeline(transaction=False)
        for job_id in job_ids:
            pipeline.hmget(keys.job(job_id), Snapshot.FIELDS)
        return [Snapshot.decode(*found) for found in zip(job_ids, pipeline.execute(), strict=True)]

    def claim(
        self, model: str, worker: str, token: str = "", free_slots: int = 1, reserve: int = 0
    ) -> Claim | None:
        """Leases the first job of the model to the worker; None when none waits that fits."""
        room = Room(free_slots, free_slots)
        claims = self.claim_several(model, worker, token, room, reserve, 1)
        return claims[0] if claims else None

    def claim_several(
        self, model: str, worker: str, token: str, room: Room, reserve: int, most: int
    ) -> list[Claim]:
        """Leases the first jobs of the model that fit to the worker, as one claim each would.

        It gets its share of what waits. Batch jobs leave free slots to interactive ones that are to
        be expected, up to `reserve`.

        The same token again, for a claim whose reply was lost, returns the same jobs.
        """
        lease_us = int(self._settings.lease_s * 1e6)
        reply = self._claim(
            keys=[keys.claim(token or uuid.uuid4().hex), keys.suspect(worker)],
            args=[
                *(worker, lease_us, model, *room, most, make_ticket(model, new_id())),
                *(" ".join(Lane), reserve),
                *Claim.FIELDS,
            ],
        )
        return list(_decoded(reply))

    def clear(self, claim: Claim) -> None:
        """Notes that a suspect has produced what no attempt before it did."""
        ticket = make_ticket(claim.job.model, new_id())
        self._clear(keys=[keys.suspect(claim.worker)], args=[claim.job.id, claim.attempt, ticket])

    def renew(self, held: Sequence[Claim]) -> list[Claim]:
        """Renews the leases of these claims; returns those that are no longer held."""
        if not held:
            return []
        lease_us = int(self._settings.lease_s * 1e6)
        pairs = [value for claim in held for value in (claim.job.id, claim.attempt)]
        return [held[position - 1] for position in self._renew(args=[lease_us, *pairs])]

    def requeue(self, claim: Claim, cause: Cause, reason: str, delay_s: float = 0) -> State | None:
        """Hands a claimed job back, for another worker or a later try; or ends it as a dead letter.

        Returns:
            Its new state; None: it was taken from this worker before.
        """
        ticket = make_ticket(claim.job.model, new_id())
        state = self._requeue(
            args=[claim.job.id, claim.attempt, reason, cause, int(delay_s * 1e6), ticket]
        )
        return None if state is None else State(state.decode())

    def finish(
        self, claim: Claim, state: State, dead_because: str = "", usage: Usage | None = None
    ) -> Finished:
        """Ends a claimed job, as a dead letter if there is a reason for that.

        Its tenant is charged its usage; if that is not known, by its time on the engine.

        Returns:
            Whether other jobs of its model wait; or that it was taken from this worker before, and
            its result is void.
        """
        ended = self._finish(
            args=[
                *(claim.job.id, claim.attempt, state, dead_because, " ".join(Lane)),
                *(usage or ("", "")),
            ],
        )
        return Finished(ended)

    def cancel(self, job_id: str, *, unless_attached: bool = False) -> Cancelled | None:
        """Cancels a queued or running job; None when it has ended otherwise.

        With `unless_attached` a job that another client has attached to by its key is kept.
        """
        reply = self._cancel(args=[job_id, int(unless_attached)])
        if reply is None:
            return None
        tenant, attempt, worker, listener = (value.decode() for value in reply)
        return Cancelled(tenant, int(attempt), worker, listener)

    def reap(self) -> list[Reaped]:
        """Takes the jobs whose lease has expired from their workers, and ends those too late.

        And has those wait again whose delay is over. A bounded number at once.
        """
        return [
            Reaped(
                *(job, model, tenant, int(attempt), listener, State(state), endpoint),
                *(int(started) if started else None, trace, int(since) if since else None),
            )
            for row in self._reap(args=[REAPED_AT_ONCE])
            for job, model, tenant, attempt, listener, state, endpoint, started, trace, since in [
                map(bytes.decode, row)
            ]
        ]

    def settle(self, tokens: Mapping[str, int | None]) -> list[str]:
        """Lets ended jobs expire, now that SQL has them; returns those that have ended here too.

        `tokens`: what each has used; None: not known, and its limits are charged the estimate.
        """
        if not tokens:
            return []
        pairs = [
            value
            for job_id, used in tokens.items()
            for value in (job_id, "" if used is None else used)
        ]
        settled = self._settle(args=[self._settings.log_retention_s, *pairs])
        return [job_id for job_id, has_ended in zip(tokens, settled, strict=True) if has_ended]

    def report(self, job_id: str, usage: Usage) -> None:
        """Notes what a job has used that was stopped by others; its limits are charged that."""
        self._report(args=[job_id, sum(usage)])

    def forget(self, job_id: str, attempt: int) -> None:
        """Forgets an accepted job that ended without an answer: the reconciler queues it again."""
        self._forget(args=[job_id, attempt])

    def sweep(
        self,
        job_ids: Sequence[str],
        *,
        place: str = "",
        in_sql: Literal["", "open", "still open"] = "",
    ) -> list[str]:
        """Repairs inconsistencies (lua/sweep.lua); returns what was found, for each job.

        They are the members of the zset `place` if it is given. `in_sql`: in SQL they have not
        ended; or they still have not, after they were found "doubtful".
        """
        if not job_ids:
            return []
        found = self._sweep(args=[place, in_sql, *job_ids])
        return [kind.decode() for kind in found]

    def members(self) -> Iterator[tuple[str, list[str]]]:
        """All places and their members, a slice at a time; one may come twice."""
        lanes = [(model, lane) for model in self.models() for lane in Lane]
        places = [keys.backlog(*lane) for lane in lanes] + [keys.suspects(*lane) for lane in lanes]
        for place in [*places, keys.DELAYED, keys.LEASES, keys.DEADLINES]:
            cursor = 0
            while True:
                reply: Any = self.redis.zscan(place, cursor, count=MEMBERS_AT_ONCE)
                cursor, members = reply
                yield place, [member.decode() for member, _ in members]
                if cursor == 0:
                    break

    def send_ticket(self, model: str) -> None:
        """Notifies the model's workers once more that there is work."""
        self._wake(args=[model, make_ticket(model, new_id())])

    def pause(self, model: str) -> None:
        """Stops all workers from claiming jobs of the model; running ones go on."""
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
