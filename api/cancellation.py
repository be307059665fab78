"""Cancels jobs that nobody waits for any more, also when Redis cannot be told at once."""

import logging
import random

import gevent
from redis.exceptions import RedisError
from sqlalchemy.exc import SQLAlchemyError

from api.services import Services
from db import jobs as records
from tasks.errors import JobCancelledError
from tasks.message import State

log = logging.getLogger(__name__)

RETRY_S = 1.0


def cancel(services: Services, job_id: str, model: str, *, unless_attached: bool = False) -> None:
    """Cancels the job; in the background until Redis answers, for it holds slots of the engine.

    With `unless_attached` a job stays that another client has asked for by its key.
    """
    try:
        services.jobs.cancel(job_id, model, unless_attached=unless_attached)
    except RedisError as away:
        log.error("job %s: not cancelled yet: %s", job_id, away)
        # As many as have left: not all at once.
        wait_s = RETRY_S * random.uniform(1, 2)  # noqa: S311
        again = {"unless_attached": unless_attached}
        gevent.spawn_later(wait_s, cancel, services, job_id, model, **again)


def cancel_accepted(services: Services, job_id: str, model: str) -> None:
    """Cancels a job that the queue may not hold yet: then SQL alone knows it."""
    try:
        if services.jobs.backlog.look([job_id]) != [None]:
            services.jobs.cancel(job_id, model)
            return
        error = JobCancelledError().body()["error"]
        records.end_lost(services.settings.database_url, job_id, State.CANCELLED, error)
    except (RedisError, SQLAlchemyError) as away:
        log.error("job %s: not cancelled yet: %s", job_id, away)
        wait_s = RETRY_S * random.uniform(1, 2)  # noqa: S311
        gevent.spawn_later(wait_s, cancel_accepted, services, job_id, model)
