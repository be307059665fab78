"""A job in the shape that clients see, from the queue while it is there, then from SQL."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

import gevent
import orjson
from flask import Response

from api.answer import as_header
from api.errors import respond_again
from api.job_stream import ENTRIES_AT_ONCE
from api.services import Services
from db import jobs
from db.models import JobRecord, JobResult
from tasks.depth import Place, places
from tasks.errors import JobNotFoundError, KeyInUseError, SluiceError
from tasks.events import Kind
from tasks.message import Lane, Snapshot, State
from tasks.response import Outcome, assemble

# A job as SQL has it, and as the queue does, where SQL takes it for open.
Listed = tuple[JobRecord, Snapshot | None]


def describe(services: Services, tenant: str, job_id: str) -> dict[str, Any]:
    """The job object.

    Raises:
        JobNotFoundError: the tenant has no such job.
    """
    job = find_queued(services, tenant, job_id)
    if job is not None and not job.state.is_final:
        return _of_snapshot(job, *places_of(services, [job]))
    found = jobs.get(services.settings.database_url, tenant, job_id)
    if found is not None and found[0].completed_at is not None and (job is None or found[1]):
        return of_record(*found)
    if job is not None and (outcome := _outcome(services, job_id)):
        return _of_snapshot(job) | _of_outcome(outcome)
    if job is not None:
        # Its last words are on their way to its log.
        return _of_snapshot(job) | {"status": State.IN_PROGRESS, "completed_at": None}
    if found is None:
        raise JobNotFoundError
    return of_record(*found)


def find_queued(services: Services, tenant: str, job_id: str) -> Snapshot | None:
    """The tenant's job in Redis, if it is there.

    Raises:
        JobNotFoundError: it is another tenant's.
    """
    (job,) = services.jobs.backlog.look([job_id])
    if job is not None and job.tenant != tenant:
        raise JobNotFoundError
    return job


def places_of(services: Services, found: Sequence[Snapshot]) -> list[Place | None]:
    """Where the queued ones of these jobs stand."""
    queued = [job for job in found if job.state is State.QUEUED]
    at = dict(zip((job.id for job in queued), places(services.redis, queued), strict=True))
    return [at.get(job.id) for job in found]


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
    known = services.jobs.backlog.look([job.id for job in rows if job.completed_at is None])
    at = {job.id: job for job in known if job}
    found = [(job, at.get(job.id)) for job in rows]
    return [
        (job, live) for job, live in found if status in (None, live.state if live else job.status)
    ]


def describe_all(services: Services, found: Sequence[Listed]) -> list[dict[str, Any]]:
    """The job objects. No other answers are loaded: each may have many megabytes."""
    ended = [job.id for job, live in found if live is None and job.completed_at is not None]
    results = jobs.results(services.settings.database_url, ended)
    known = [live for _, live in found if live]
    views = {}
    for job, place in zip(known, places_of(services, known), strict=True):
        outcome = _outcome(services, job.id) if job.state.is_final else None
        views[job.id] = _of_snapshot(job, place) | (_of_outcome(outcome) if outcome else {})
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


def _of_snapshot(job: Snapshot, place: Place | None = None) -> dict[str, Any]:
    return {
        "id": job.id,
        "object": "job",
        "endpoint": job.endpoint,
        "model": job.model,
        "priority": _priority(job.lane, job.priority),
        "status": job.state,
        "created_at": job.queued_us // 1_000_000,
        "started_at": job.started_us and job.started_us // 1_000_000,
        "completed_at": job.ended_us and job.ended_us // 1_000_000,
        "queue": place and place._asdict(),
        "attempts": job.attempt,
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
