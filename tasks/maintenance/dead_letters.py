"""What an operator does with dead letters; `sluice dead` and the admin's part of the API."""

from typing import Any

from db import dead
from db.models import JobEvent, JobRecord
from tasks.contract.errors import ConflictError, NotKnownError
from tasks.maintenance.accepted import dispatch, renew
from tasks.queue.jobs import Jobs


def describe(job: JobRecord, reasons: list[JobEvent] | None = None) -> dict[str, Any]:
    """A dead letter; with its reasons if they are given. Never its request."""
    view: dict[str, Any] = {
        "id": job.id,
        "object": "dead_letter",
        "model": job.model,
        "endpoint": job.endpoint,
        "tenant": job.tenant,
        "attempts": job.attempts,
        "created_at": int(job.created_at.timestamp()),
        "died_at": job.died_at and int(job.died_at.timestamp()),
        "request_bytes": len(job.request or b""),
    }
    if reasons is None:
        return view
    return view | {
        "reasons": [
            {
                "attempt": event.attempt,
                "at": int(event.at.timestamp()),
                "worker": event.worker,
                "reason": event.reason,
            }
            for event in reasons
        ]
    }


def show(url: str, job_id: str) -> dict[str, Any]:
    """One dead letter with its reasons.

    Raises:
        NotKnownError: there is none of that id.
    """
    return describe(*_find(url, job_id))


def retry(queue: Jobs, url: str, job_id: str) -> str:
    """Queues a new job with the same request and lane; returns its id.

    Raises:
        NotKnownError: there is no such dead letter.
        ConflictError: its request is no longer kept.
    """
    old, _ = _find(url, job_id)
    if old.request is None:
        raise ConflictError("The dead letter's request is no longer kept; it can only be purged.")
    job = renew(old)
    job.deadline_s = None  # it has started in time once
    if not dead.replace(url, job_id, job):
        raise _not_found(job_id)
    dispatch(queue.backlog, job)
    return job.id


def _find(url: str, job_id: str) -> tuple[JobRecord, list[JobEvent]]:
    found = dead.letter(url, job_id)
    if found is None:
        raise _not_found(job_id)
    return found


def _not_found(job_id: str) -> NotKnownError:
    return NotKnownError(f"there is no dead letter {job_id!r}; `sluice dead list` shows all")
