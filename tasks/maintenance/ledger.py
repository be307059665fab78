"""Carries the records of started and ended jobs from their stream in Redis (lua/state.lua) to SQL.

A record leaves the stream only after its commit, and is written once however often it is read:
a crash in between loses or doubles nothing. Only maintenance imports this module.
"""

import logging
import threading
from datetime import UTC, datetime, timedelta
from typing import Any

import orjson
from sqlalchemy.exc import DataError, SQLAlchemyError

from db import jobs, migrate
from db.jobs import Change
from db.models import JobEvent, JobRecord, JobResult
from tasks.contract import keys
from tasks.contract.errors import DecodeError
from tasks.contract.job import State
from tasks.contract.job_errors import JobLostError
from tasks.contract.response import Outcome, assemble
from tasks.queue.jobs import REASONS, Jobs

log = logging.getLogger(__name__)

RECORDS_AT_ONCE = 500
# Of answers and requests, in one transaction: each may have many megabytes.
BYTES_AT_ONCE = 64 * 1024 * 1024
# The end of a log may be written a moment after the job's end; then it is lost.
LONGEST_END_S = 30
_LOST: dict[str, Any] = JobLostError().body()["error"]
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def decode(record_id: str, fields: dict[bytes, bytes], outcome: Outcome | None) -> Change:
    """Reads one record of the stream; its times are us since the epoch, '' for none.

    Raises:
        DecodeError: it has another shape, or text that no database takes.
    """
    try:
        text = {name.decode(): value.decode() for name, value in fields.items()}
        if any("\0" in value for value in text.values()):
            raise ValueError("it holds a NUL character")
        return _change(record_id, text, State(text["state"]), outcome)
    except (KeyError, ValueError, OverflowError) as broken:
        raise DecodeError(f"record {record_id} cannot be read") from broken


def _change(record_id: str, text: dict[str, str], state: State, outcome: Outcome | None) -> Change:
    at, job_id, attempts = _moment(text["at_us"]), text["job_id"], int(text["attempts"])
    job = JobRecord(
        id=job_id,
        tenant=text["tenant"],
        model=text["model"],
        endpoint=text["endpoint"],
        lane=text["lane"],
        status=state,
        attempts=attempts,
        meta=orjson.loads(text["metadata"]),
        created_at=_moment(text["queued_us"]),
        started_at=_moment(text["started_us"]) if text["started_us"] else None,
        completed_at=at if state.is_final else None,
        died_at=at if text.get("is_dead") else None,
    )
    event = JobEvent(
        job_id=job_id,
        record_id=record_id,
        at=at,
        state=state,
        attempt=attempts,
        worker=text["worker"],
        reason=text.get("reason") or None,
    )
    if not state.is_final:
        return Change(job, event)
    outcome = outcome or Outcome(state, error=_reason(state))
    result = JobResult(
        job_id=job_id,
        status_code=outcome.status_code,
        body=outcome.body,
        error=outcome.error,
        usage=outcome.usage,
    )
    return Change(job, event, result, jobs.ledger_entry(job, at))


def _tokens(result: JobResult) -> int | None:
    """How many the job has used, of prompt and answer; None: not known."""
    usage = result.usage or {}
    counts = [usage.get(name, 0) for name in ("prompt_tokens", "completion_tokens")]
    are_numbers = all(isinstance(count, int) and count >= 0 for count in counts)
    return sum(counts) if usage and are_numbers else None


def _reason(state: State) -> dict[str, Any] | None:
    """The error of a job that ended without an answer."""
    return REASONS[state]().body()["error"] if state in REASONS else None


def _moment(us: str) -> datetime:
    return _EPOCH + timedelta(microseconds=int(us))


class Recorder:
    """Moves records to SQL; one per process."""

    def __init__(self, queue: Jobs, database_url: str, bytes_at_once: int = BYTES_AT_ONCE) -> None:
        self._queue = queue
        self._bytes_at_once = bytes_at_once
        self._redis = queue.backlog.redis
        self._url = database_url
        self._busy = threading.Lock()
        self._is_migrated = False
        self._is_away = False

    def record(self) -> int:
        """Moves all records; returns how many jobs ended by them.

        While the database is away one warning is logged; the records stay for a later round. A run
        that finds another under way (it may wait for the database) does nothing.
        """
        if not self._busy.acquire(blocking=False):
            return 0
        try:
            return self._record()
        except (SQLAlchemyError, OSError) as away:
            if not self._is_away:
                log.warning("ledger: the database is away, records wait in Redis: %s", away)
            self._is_away = True
            return 0
        finally:
            self._busy.release()

    def _record(self) -> int:
        # Not when maintenance starts: it has jobs of dead workers to hand on, database or not.
        if not self._is_migrated:
            migrate(self._url)
            self._is_migrated = True
        ended, start, is_full = 0, "-", True
        while is_full:
            batch: Any = self._redis.xrange(keys.LEDGER, start, count=RECORDS_AT_ONCE)
            changes, done, read = self._read(batch)
            ended += self._apply(changes)
            if done:
                self._note_presence()
                self._settle({c.job.id: _tokens(c.result) for c in changes if c.result})
                self._redis.xdel(keys.LEDGER, *done)
            is_full = len(batch) == RECORDS_AT_ONCE or read < len(batch)
            if batch:
                start = "(" + batch[read - 1][0].decode()
        return ended

    def _apply(self, changes: list[Change]) -> int:
        """Writes the changes; what the database cannot hold is left out, and nothing else."""
        try:
            return jobs.apply(self._url, changes)
        except (DataError, OverflowError) as refused:
            if len(changes) > 1:
                return sum(self._apply([change]) for change in changes)
            log.error("ledger: job %s dropped: %s", changes[0].job.id, refused)
            return 0

    def _settle(self, tokens: dict[str, int | None]) -> None:
        """Only now that SQL has them may jobs and their logs expire."""
        self._queue.log.expire(self._queue.backlog.settle(tokens))

    def _read(self, batch: list[tuple[bytes, dict[bytes, bytes]]]) -> tuple[list[Change], Any, int]:
        """Reads a batch as far as memory allows, one record at least.

        Returns:
            The changes; the processed records, unreadable ones too; how many were read.
        """
        now_s, _ = self._redis.time()
        changes, done, read, size = [], [], 0, 0
        for record_id, fields in batch:
            if size >= self._bytes_at_once:
                break
            read += 1
            try:
                outcome = self._outcome(fields)
                age_s = now_s - int(fields.get(b"at_us", b"0")) / 1e6
                if _is_final(fields) and outcome is None and age_s < LONGEST_END_S:
                    continue
                change = decode(record_id.decode(), fields, outcome)
                if change.job.died_at:
                    self._keep_request(change.job)
                if change.result is None or outcome or not self._is_void(change):
                    changes.append(change)
                    size += _size(change)
            except (DecodeError, ValueError) as broken:
                log.error("ledger: dropped: %s", broken)
            done.append(record_id)
        return changes, done, read

    def _is_void(self, change: Change) -> bool:
        """Whether a job that ended, but whose log has no end, is to run again instead.

        What cannot be recorded is not completed: an accepted job is queued again by the reconciler,
        any other has failed.
        """
        job = change.job
        if change.result is None or job.status != State.COMPLETED:
            return False
        log.error("job %s: its answer is lost", job.id)
        if jobs.accepted(self._url, [job.id]):
            self._queue.backlog.forget(job.id, job.attempts)
            return True
        job.status = change.event.state = State.FAILED
        change.result.error = _LOST
        if change.ledger:
            change.ledger.state = State.FAILED
        return False

    def _keep_request(self, job: JobRecord) -> None:
        """Adds its request to a dead letter, so that it can be retried."""
        fields = ("body", "sequences", "weight", "max_tokens", "timeout_s", "key_id", "traceparent")
        found: Any = self._redis.hmget(keys.job(job.id), fields)
        body, sequences, weight, max_tokens, timeout_s, key_id, traceparent = found
        job.request = None if body is None else bytes(body)
        job.sequences = int(sequences or 1)
        job.weight = float(weight or 1)
        job.max_tokens = int(max_tokens) if max_tokens else None
        job.timeout_s = float(timeout_s) if timeout_s else None
        job.key_id = (key_id or b"").decode()
        job.traceparent = (traceparent or b"").decode()

    def _outcome(self, fields: dict[bytes, bytes]) -> Outcome | None:
        """The outcome in the log of a job that has ended; None when it has none, or not yet."""
        if not _is_final(fields):
            return None
        outcome = assemble(self._queue.log.read_after(fields.get(b"job_id", b"").decode()))
        # Cancelled just when its worker had written another end: the one that counts will follow.
        return outcome if outcome and outcome.state == fields[b"state"].decode() else None

    def _note_presence(self) -> None:
        if self._is_away:
            log.info("ledger: the database is back")
        self._is_away = False


def _size(change: Change) -> int:
    """Its answer, and its request where that is kept."""
    answer = change.result.body if change.result else None
    return len(answer or b"") + len(change.job.request or b"")


def _is_final(fields: dict[bytes, bytes]) -> bool:
    return fields.get(b"state", b"").decode() not in (State.QUEUED, State.IN_PROGRESS)
