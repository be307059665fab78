"""The jobs API: every request by its id, whoever submitted it, wherever it is."""

import time
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import gevent
import orjson
from flask import Response, make_response, request
from flask_openapi3 import APIBlueprint, Tag
from werkzeug.datastructures import Headers

from api import replies, schemas, traces
from api.access import get_principal
from api.encoders.sse import event_stream
from api.ends import is_kept
from api.engine_request import fit_batch
from api.intake import (
    Call,
    Preference,
    fingerprint,
    read_body,
    read_key,
    read_object,
    readmit,
    shortest,
)
from api.job_events import Follower, encode
from api.job_view import Listed, describe, describe_all, find_queued, look_again, of_record
from api.openapi import (
    ACCEPTANCE_ERRORS,
    BODY_ERRORS,
    CHUNKS_WITH_IDS,
    ENDED,
    EVENTS,
    JOB_ERRORS,
    KEY,
    LATER,
    OF_JOB,
    PREFER,
    RESUME,
    Given,
    given,
    operation,
)
from api.principal import Principal
from api.relay import ServerStoppingError
from api.services import Services, get_services
from db import jobs as records
from db.models import JobRecord
from db.webhooks import attempts_of
from tasks.contract.errors import ConflictError, JobNotFoundError, KeyRevokedError
from tasks.contract.events import Kind
from tasks.contract.job import EnqueueOptions, State
from tasks.contract.job_errors import JobCancelledError, StreamBrokenError
from tasks.maintenance.accepted import renew, to_job, to_record
from tasks.maintenance.webhooks import check_webhook

blueprint = APIBlueprint("jobs", __name__)
JOBS = [Tag(name="Jobs", description="Any request, by the id in x-sluice-job")]
# Between looks at a job that is waited for, when nothing has come.
LOOK_S = 5.0
# From a job's last entry to its final state.
MOMENT_S = 0.005
# SQL is told within a second or so what the queue does. When it has not been for long, the rest of
# what it takes for open is shown as it is.
MOST_LOOKS = 5
ROWS_AT_A_LOOK = 500


@blueprint.post(
    "/v1/jobs",
    tags=JOBS,
    summary="Submit a job",
    openapi_extensions=operation(
        {200: ENDED, 202: LATER},
        (*BODY_ERRORS, *ACCEPTANCE_ERRORS),
        body=schemas.body("JobRequest"),
        takes=(PREFER, KEY),
    ),
)
def submit() -> Response:
    """Queues a request; its answer can be polled, waited for, streamed, or sent to a webhook."""
    services = get_services()
    body = read_body()
    wanted = schemas.check(schemas.JobRequest, read_object(body))
    request_body = orjson.dumps(wanted.body)
    call = Call.read(services, get_principal(), wanted.endpoint, request_body, Headers())
    lane, priority = wanted.place
    key = read_key(request.headers)
    # What the model's timeouts allow is in the job already.
    deadline_s = shortest(wanted.deadline_s, wanted.timeout_s, call.job.options.deadline_s)
    options = EnqueueOptions(priority, deadline_s, key, fingerprint("/v1/jobs", body))
    metadata = orjson.dumps(wanted.metadata).decode()
    job = replace(
        call.job, lane=lane, metadata=metadata, timeout_s=wanted.timeout_s, options=options
    )
    job = fit_batch(job, services.catalog.resolve(job.model))
    if wanted.webhook:
        check_webhook(wanted.webhook, services.settings, services.lookups.ask)
    return _accept(services, to_record(job, wanted.webhook))


def accept_call(services: Services, call: Call) -> Response:
    """Takes a request of OpenAI's API in the background: `Prefer: respond-async`."""
    response = _accept(services, to_record(call.job))
    response.headers["Preference-Applied"] = "respond-async"
    return response


def _accept(services: Services, job: JobRecord) -> Response:
    prefer = Preference.read(request.headers)
    trace = traces.begin()
    job.traceparent = trace.traceparent
    job_id = services.acceptance.accept(job, get_principal().limits)
    if job_id != job.id or prefer.wait_s:
        response = _answer(services, job_id, prefer.wait_s)
    else:
        response = _respond(of_record(job, None), 202)
    trace.end(job_id, job.model, response.status_code)
    return response


@blueprint.get(
    "/v1/jobs",
    tags=JOBS,
    summary="List jobs",
    openapi_extensions=operation({200: given("A page of jobs", replies.JobList)}, JOB_ERRORS),
)
def list_jobs(query: schemas.JobQuery) -> Response:
    """The newest first; `after` is the id of the last one of the page before.

    One that has just begun or ended may be missing for a second among those of its new status.
    """
    services, tenant = get_services(), get_principal().tenant
    url = services.settings.database_url
    if query.after and not records.exists(url, tenant, query.after):
        raise JobNotFoundError(f"There is no job {query.after!r} to go on after.", param="after")
    found = _page(services, tenant, query)
    page = describe_all(services, found[: query.limit])
    return _respond(
        {
            "object": "list",
            "data": page,
            "first_id": page[0]["id"] if page else None,
            "last_id": page[-1]["id"] if page else None,
            "has_more": len(found) > query.limit,
        }
    )


def _page(services: Services, tenant: str, query: schemas.JobQuery) -> list[Listed]:
    """One job more than asked for, if there are so many."""
    found: list[Listed] = []
    after, wanted = query.after, query.limit + 1
    named = services.catalog.names.get(query.model or "")
    model = named.name if named else query.model
    url, terms = services.settings.database_url, {"model": model, "status": query.status}
    for look in range(MOST_LOOKS):
        limit = max(wanted, ROWS_AT_A_LOOK if look else 0)
        rows = records.page(url, tenant, **terms, after=after, limit=limit)
        status = query.status if look < MOST_LOOKS - 1 else None
        found += look_again(services, rows, status)[: wanted - len(found)]
        if len(found) == wanted or len(rows) < limit:
            break
        after = rows[-1].id
    return found


@blueprint.get(
    "/v1/jobs/<string:job_id>",
    tags=JOBS,
    summary="Get a job",
    openapi_extensions=operation(
        {200: given("The job", replies.Job, *OF_JOB), 202: LATER}, JOB_ERRORS, takes=[PREFER]
    ),
)
def get_job(path: schemas.JobPath) -> Response:
    """The job; with `Prefer: wait=N` its end is waited for: 200 when it has ended, else 202."""
    return _answer(get_services(), path.job_id, Preference.read(request.headers).wait_s)


@blueprint.get(
    "/v1/jobs/<string:job_id>/events",
    tags=JOBS,
    summary="Stream a job's events",
    openapi_extensions=operation(
        {200: Given("Its events", {EVENTS: CHUNKS_WITH_IDS}, OF_JOB)}, JOB_ERRORS, takes=[RESUME]
    ),
)
def get_events(path: schemas.JobPath, query: schemas.EventQuery) -> Response:
    """Server-sent events from the start, or after `Last-Event-ID` or `starting_after`."""
    services = get_services()
    wanted = query.starting_after or request.headers.get("Last-Event-ID")
    follower = Follower(services, get_principal(), path.job_id, wanted)
    response = event_stream(encode(follower.events()))
    response.headers["x-sluice-job"] = path.job_id
    return response


@blueprint.get(
    "/v1/jobs/<string:job_id>/webhook",
    tags=JOBS,
    summary="Get a webhook's log",
    openapi_extensions=operation({200: given("Its calls", replies.WebhookLog)}, JOB_ERRORS),
)
def get_webhook(path: schemas.JobPath) -> Response:
    """How the calls of the job's webhook went."""
    services = get_services()
    describe(services, get_principal().tenant, path.job_id)
    delivery, attempts = attempts_of(services.settings.database_url, path.job_id)
    if delivery is None:
        raise JobNotFoundError("The job has no webhook, or has not ended yet.")
    return _respond(
        {
            "object": "webhook_delivery",
            "type": delivery.type,
            "state": delivery.state,
            "next_at": delivery.next_at and int(delivery.next_at.timestamp()),
            "attempts": [
                {
                    "at": int(attempt.at.timestamp()),
                    "status_code": attempt.status_code,
                    "error": attempt.error,
                    "duration_ms": attempt.duration_ms,
                }
                for attempt in attempts
            ],
        }
    )


@blueprint.post(
    "/v1/jobs/<string:job_id>/cancel",
    tags=JOBS,
    summary="Cancel a job",
    openapi_extensions=operation({200: ENDED}, (*JOB_ERRORS, ConflictError)),
)
def cancel(path: schemas.JobPath) -> Response:
    """Takes it out of the queue or off the engine; one that has ended gets 409."""
    services, tenant = get_services(), get_principal().tenant
    seen = find_queued(services, tenant, path.job_id)
    has_cancelled = seen is not None and services.jobs.cancel(seen.job.id, seen.job.model)
    if seen is None:
        describe(services, tenant, path.job_id)  # none of another tenant is touched
        error = JobCancelledError().body()["error"]
        url = services.settings.database_url
        has_cancelled = records.end_lost(url, path.job_id, State.CANCELLED, error)
    view = describe(services, tenant, path.job_id)
    if not has_cancelled and view["status"] != State.CANCELLED:
        raise ConflictError(f"The job is {view['status']} already.")
    return _respond(view)


@blueprint.post(
    "/v1/jobs/<string:job_id>/retry",
    tags=JOBS,
    summary="Submit a job again",
    openapi_extensions=operation(
        {200: ENDED, 202: LATER},
        (*JOB_ERRORS, ConflictError, *ACCEPTANCE_ERRORS),
        takes=[PREFER],
    ),
)
def retry(path: schemas.JobPath) -> Response:
    """A new job with the same request, for one that failed, expired or was cancelled."""
    services, principal = get_services(), get_principal()
    known = find_queued(services, principal.tenant, path.job_id)
    url = services.settings.database_url
    stored = records.get(url, principal.tenant, path.job_id)
    if known is None and stored is None:
        raise JobNotFoundError
    status = known.state if known else State(stored[0].status if stored else "")
    if not status.is_final or status is State.COMPLETED:
        raise ConflictError(f"The job is {status}; only what did not succeed can be retried.")
    old = records.load(url, path.job_id)
    if old is None or old.request is None:
        raise ConflictError("The job's request is no longer kept; send it again.")
    return _accept(services, renew(old, readmit(services, principal, to_job(old))))


def _answer(services: Services, job_id: str, wait_s: int) -> Response:
    """The job, after at most that wait for its end."""
    principal = get_principal()
    view = describe(services, principal.tenant, job_id)
    if wait_s and not State(view["status"]).is_final:
        _await_end(services, principal, job_id, wait_s)
        view = describe(services, principal.tenant, job_id)
    has_ended = State(view["status"]).is_final
    return _respond(view, 200 if has_ended or (request.method == "GET" and not wait_s) else 202)


def _await_end(services: Services, principal: Principal, job_id: str, wait_s: int) -> None:
    """Waits until the log and the queue both say that the job has ended, in whatever order."""
    deadline_s = time.monotonic() + wait_s
    has_log_ended = False
    with (
        suppress(ServerStoppingError, StreamBrokenError),
        services.relay.follow(job_id) as stream,
        services.keyring.watching(principal, partial(stream.cut_off, KeyRevokedError())),
    ):
        while (left_s := deadline_s - time.monotonic()) > 0:
            seen = find_queued(services, principal.tenant, job_id)
            if seen is None and not is_kept(services, job_id):
                return
            if seen is None:
                # Queued again, it runs anew: what its log has told does not count.
                has_log_ended = False
            elif has_log_ended and seen.state.is_final:
                return
            if has_log_ended:
                gevent.sleep(MOMENT_S)
                continue
            entries = stream.take(min(left_s, LOOK_S))
            has_log_ended = bool(entries) and entries[-1].kind is Kind.END


def _respond(document: dict[str, Any], status: int = 200) -> Response:
    response = make_response(document, status)
    if document["object"] == "job":
        response.headers["x-sluice-job"] = document["id"]
    if status == 202:
        response.headers["Location"] = f"/v1/jobs/{document['id']}"
    return response
