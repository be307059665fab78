"""Dead letters: jobs that were given up, with their requests and why each attempt failed."""

from collections.abc import Sequence

from sqlalchemy import delete, func, select, update
from sqlalchemy.orm import Session

from db.models import JobEvent, JobRecord
from db.session import database_now, insert_new, reading, writing


def letters(url: str, limit: int) -> list[JobRecord]:
    """The latest ones first."""
    query = select(JobRecord).where(JobRecord.died_at.is_not(None))
    query = query.order_by(JobRecord.died_at.desc(), JobRecord.id.desc()).limit(limit)
    with reading(url) as session:
        return list(session.scalars(query))


def count(session: Session) -> int:
    """How many there are."""
    return session.scalars(select(func.count(JobRecord.died_at))).one()


def letter(url: str, job_id: str) -> tuple[JobRecord, list[JobEvent]] | None:
    """A dead letter, and the events that have a reason."""
    query = select(JobEvent).where(JobEvent.job_id == job_id, JobEvent.reason.is_not(None))
    with reading(url) as session:
        job = session.get(JobRecord, job_id)
        if job is None or job.died_at is None:
            return None
        return job, list(session.scalars(query.order_by(JobEvent.at)))


def replace(url: str, job_id: str, job: JobRecord) -> bool:
    """Takes the job off the dead letters and accepts another for it, both or neither.

    False: it was none, or another process did so first.
    """
    dead = update(JobRecord).where(JobRecord.id == job_id, JobRecord.died_at.is_not(None))
    with writing(url) as session:
        if session.connection().execute(dead.values(died_at=None)).rowcount == 0:
            return False
        job.created_at = database_now(session)
        return insert_new(session, [job]) == 1


def purge(url: str, job_ids: Sequence[str] | None) -> int:
    """Deletes these dead letters with all that is known of them, or every one; returns how many."""
    query = delete(JobRecord).where(JobRecord.died_at.is_not(None))
    if job_ids is not None:
        query = query.where(JobRecord.id.in_(job_ids))
    with writing(url) as session:
        return session.connection().execute(query).rowcount
