"""A job in the shape that clients see, from the queue while it is there, then from SQL."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

import gevent
import orjson
from flask import Response

from api.answer import as_header
from api.errors import respond_again
from api.relay import ENTRIES_AT_ONCE
from api.services import Services
from db import jobs
from db.models import JobRecord, JobResult
from tasks.contract.errors import JobNotFoundError, KeyInUseError, SluiceError
from tasks.contract.events import Kind
from tasks.contract.job import Lane, Snapshot, State
from tasks.contract.response import Outcome, assemble
from tasks.queue.depth import QueuePosition, places

# A job as SQL has it, and as the queue does, where SQL takes it for open.
Listed = tuple[JobRecord, Snapshot | None]


def describe(services: Services, tenant: str, job_id: str) -> dict[str, Any]:
    """The job object.

    Raises:
        JobNotFoundError: the tenant has no such job.
    """
    seen = find_queued(services, tenant, job_id)
    if seen is not None and not seen.state.is_final:
        return _of_snapshot(seen, *positions_of(services, [seen]))
    found = jobs.get(services.settings.database_url, tenant, job_id)
    if found is not None and found[0].completed_at is not None and (seen is None or found[1]):
        return of_record(*found)
    if seen is not None and (outcome := _outcome(services, job_id)):
        return _of_snapshot(seen) | _of_outcome(outcome)
    if seen is not None:
        # The end of its log is still to be written.
        return _of_snapshot(seen) | {"status": State.IN_PROGRESS, "completed_at": None}
    if found is None:
        raise JobNotFoundError
    return of_record(*found)


def find_queued(services: Services, tenant: str, job_id: str) -> Snapshot | None:
    """The tenant's job in Redis, if it is there.

    Raises:
        JobNotFoundError: it is another tenant's.
    """
    (seen,) = services.jobs.backlog.snapshots([job_id])
    if seen is not None and seen.job.tenant != tenant:
        raise JobNotFoundError
    return seen


def positions_of(services: Services, found: Sequence[Snapshot]) -> list[QueuePosition | None]:
    """Where the queued ones of these jobs stand."""
    queued = [seen.job for seen in found if seen.state is State.QUEUED]
    at = dict(zip((job.id for job in queued), places(services.redis, queued), strict=True))
    return [at.get(seen.job.id) for seen in found]


def stored_response(services: Services, tenant: str, job_id: str) -> Response:
    """What an ended job answered, or the error that it ended with, as HTTP.

    Raises:
        KeyInUseError: it is not known yet, for its key is asked for by two at once.
    """
    found = jobs.get(services.settings.database_url, tenant, job_id)
    if found is None or found[1] is None:
        raise KeyInUseError
    result = found[1]
    if result.body is None or result.status_code is None:
        response = respond_again({"error": result.error or SluiceError().body()["error"]})
    else:
        response = Response(result.body, result.status_code, content_type="application/json")
    response.headers["x-sluice-job"] = job_id
    response.headers["x-sluice-model"] = as_header(found[0].model)
    response.headers["x-sluice-attempts"] = str(found[0].attempts)
    return response


def of_record(job: JobRecord, result: JobResult | None) -> dict[str, Any]:
    """The job object of what SQL knows."""
    outcome = Outcome(State(job.status))
    if result is not None:
        outcome = Outcome(
            outcome.state, result.status_code, result.body, result.error, result.usage
        )
    return {
        "id": job.id,
        "object": "job",
        "endpoint": job.endpoint,
        "model": job.model,
        "priority": _priority(job.lane, job.priority),
        "status": job.status,
        "created_at": _seconds(job.created_at),
        "started_at": _seconds(job.started_at),
        "completed_at": _seconds(job.completed_at),
        "queue": None,
        "attempts": job.attempts,
        "metadata": job.meta,
    } | _of_outcome(outcome)


def look_again(services: Services, rows: Sequence[JobRecord], status: State | None) -> list[Listed]:
    """Those of SQL's rows that still have the status.

    What SQL takes for open, the queue knows better.
    """
    open_ids = [job.id for job in rows if job.completed_at is None]
    at = {seen.job.id: seen for seen in services.jobs.backlog.snapshots(open_ids) if seen}
    found = [(job, at.get(job.id)) for job in rows]
    return [
        (job, seen) for job, seen in found if status in (None, seen.state if seen else job.status)
    ]


def describe_all(services: Services, found: Sequence[Listed]) -> list[dict[str, Any]]:
    """The job objects. No other answers are loaded: each may have many megabytes."""
    ended = [job.id for job, seen in found if seen is None and job.completed_at is not None]
    results = jobs.results(services.settings.database_url, ended)
    live = [seen for _, seen in found if seen]
    views = {}
    for seen, place in zip(live, positions_of(services, live), strict=True):
        outcome = _outcome(services, seen.job.id) if seen.state.is_final else None
        views[seen.job.id] = _of_snapshot(seen, place) | (_of_outcome(outcome) if outcome else {})
    return [views.get(job.id) or of_record(job, results.get(job.id)) for job, _ in found]


def _outcome(services: Services, job_id: str) -> Outcome | None:
    """How the job ended, from its log; None: that does not tell.

    Requests that wait meanwhile are served: a log may hold 100,000 entries.
    """
    token_log = services.jobs.log
    last = token_log.last(job_id)
    if last is None or last.kind is not Kind.END:
        return None
    entries = token_log.read_after(job_id, None, ENTRIES_AT_ONCE)
    while entries and (more := token_log.read_after(job_id, entries[-1].position, ENTRIES_AT_ONCE)):
        entries += more
        gevent.sleep(0)
    outcome: Outcome | None = gevent.get_hub().threadpool.apply(assemble, (entries,))
    return outcome


def _of_snapshot(seen: Snapshot, place: QueuePosition | None = None) -> dict[str, Any]:
    job = seen.job
    return {
        "id": job.id,
        "object": "job",
        "endpoint": job.endpoint,
        "model": job.model,
        "priority": _priority(job.lane, job.options.priority),
        "status": seen.state,
        "created_at": seen.queued_us // 1_000_000,
        "started_at": seen.started_us and seen.started_us // 1_000_000,
        "completed_at": seen.ended_us and seen.ended_us // 1_000_000,
        "queue": place and place._asdict(),
        "attempts": seen.attempt,
        "response": None,
        "error": None,
        "usage": None,
        "metadata": orjson.Fragment(job.metadata),
    }


def _of_outcome(outcome: Outcome) -> dict[str, Any]:
    has_answer = outcome.status_code is not None and outcome.body is not None
    answer = {"status_code": outcome.status_code, "body": orjson.Fragment(outcome.body or b"null")}
    return {
        "response": answer if has_answer else None,
        "error": outcome.error,
        "usage": outcome.usage,
    }


def _priority(lane: str, priority: int) -> str | int:
    """As it is given to POST /v1/jobs."""
    return priority if lane == Lane.BATCH and priority else lane


def _seconds(moment: datetime | None) -> int | None:
    return None if moment is None else int(moment.timestamp())
