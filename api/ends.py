"""Whether a job is over that Redis no longer tells of: one that SQL keeps is queued again."""

from sqlalchemy.exc import SQLAlchemyError

from api.services import Services
from db import jobs
from tasks.contract.events import End
from tasks.contract.job_errors import JobLostError


def is_kept(services: Services, job_id: str) -> bool:
    """Whether SQL has the job open, and its request: it will run, though Redis may lack it."""
    return job_id in jobs.accepted(services.settings.database_url, [job_id])


def end_without_log(services: Services, job_id: str, *, is_accepted: bool = True) -> End | None:
    """The end of a job whose log does not tell it; None: it goes on, or nobody can say just now.

    `is_accepted`: SQL may keep it. While SQL is away, one that nobody has accepted is lost.
    """
    end = services.jobs.end_without_log(job_id)
    if end is None or end.error != JobLostError().body():
        return end
    try:
        return None if is_kept(services, job_id) else end
    except SQLAlchemyError:
        return None if is_accepted else end
