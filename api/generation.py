"""One request: submitted as a job, its answer taken from the relay, and given back as it comes.

The body goes to the engine unchanged and its response comes back unchanged, so every parameter that
the engine knows works here.
"""

import logging
import random
import socket
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import gevent
from flask import Response
from gevent.socket import wait_read
from redis.exceptions import RedisError
from sqlalchemy.exc import SQLAlchemyError

from api import told, traces
from api.answer import Answer
from api.ends import is_kept
from api.intake import Call
from api.relay import ClientDisconnectedError, JobStream
from api.services import Services
from db import jobs as records
from tasks.contract.errors import KeyRevokedError, SluiceError
from tasks.contract.job import State
from tasks.contract.job_errors import JobCancelledError

log = logging.getLogger(__name__)

SWITCHING_PROTOCOLS = 101
CLIENT_CLOSED_REQUEST = 499
# Between tries of a cancellation while Redis is away.
CANCEL_RETRY_S = 1.0


class AnsweredError(Exception):
    """Another job holds the idempotency key, and only SQL still has its answer."""

    def __init__(self, job_id: str) -> None:
        super().__init__(job_id)
        self.job_id = job_id


class Generation:
    """A job and the client that waits for it; when the client goes away, so does the job.

    Unless the client said otherwise, or another one has asked for the same with the same key.

    Raises:
        AnsweredError: another job holds the key, and only SQL still has its answer.
    """

    def __init__(self, services: Services, call: Call, client_socket: Any = None) -> None:
        self._services = services
        self._resources = ExitStack()
        self._principal = call.principal
        self._trace = traces.begin()
        traceparent = self._trace.traceparent
        job = replace(call.job, listener=services.relay.process, traceparent=traceparent)
        stream = self._open(services.relay.stream(job.id))
        with ExitStack() as undo:
            undo.callback(self._resources.close)
            limits = call.principal.limits
            self.job_id = services.jobs.backlog.submit(job, limits, told.note_left)
            self._is_own = self.job_id == job.id
            if not self._is_own:
                stream = self._attach()
            undo.pop_all()
        self._model = job.model
        self._continues = call.continues
        self.stream = stream
        self.answer = Answer(services, stream, job.model, self._is_own)
        if client_socket is not None:
            watcher = gevent.spawn(_watch, client_socket, stream)
            self._resources.callback(watcher.kill, block=False)

    def _attach(self) -> JobStream:
        """The stream of the job that holds the key, in place of an own one."""
        self._resources.close()
        is_queued = self._services.jobs.backlog.snapshots([self.job_id]) != [None]
        if not is_queued and not is_kept(self._services, self.job_id):
            raise AnsweredError(self.job_id)
        return self._open(self._services.relay.follow(self.job_id))

    def _open(self, opening: AbstractContextManager[JobStream]) -> JobStream:
        """The stream, which is cut off when the key is refused."""
        stream = self._resources.enter_context(opening)
        keyring, cut_off = self._services.keyring, partial(stream.cut_off, KeyRevokedError())
        self._resources.enter_context(keyring.watching(self._principal, cut_off))
        return stream

    def close(self, status: int = SWITCHING_PROTOCOLS) -> None:
        """Lets go of the job, and cancels it unless somebody else may want it.

        `status`: what the client has got; another one than that of a WebSocket.
        """
        self._resources.close()
        error, answered_ns = self.answer.error_code, self.answer.answered_ns
        self._trace.end(self.job_id, self._model, status, error, answered_ns)
        is_over = self.answer.is_whole or self.answer.end is not None
        if self._is_own and not (is_over or self._continues):
            self.cancel(unless_attached=True)

    def cancel(self, *, unless_attached: bool = False) -> None:
        """Cancels the job, whoever waits for it; or only if no other client has asked for it."""
        cancel(self._services, self.job_id, self._model, unless_attached=unless_attached)

    def respond(self, wants_stream: bool) -> Response:
        """Waits for the head of the answer and gives it back; its body may still be coming.

        Raises:
            RequestTimeoutError: no answer came within the time limit.
        """
        try:
            response = self.answer.respond(wants_stream)
        except ClientDisconnectedError:
            self.close(CLIENT_CLOSED_REQUEST)
            return Response(status=CLIENT_CLOSED_REQUEST)
        except BaseException as failure:
            self.close(getattr(failure, "status", SluiceError.status))
            raise
        response.call_on_close(partial(self.close, response.status_code))
        return response


def _watch(client_socket: Any, stream: JobStream) -> None:
    """Hangs the stream up when the client closes its connection.

    A closed connection becomes readable, without data. Data is the next request, sent early: then
    only a failing write can tell.
    """
    try:
        wait_read(client_socket.fileno())
        if client_socket.recv(1, socket.MSG_PEEK):
            return
    except OSError:
        pass
    stream.client_disconnected()


def cancel(services: Services, job_id: str, model: str, *, unless_attached: bool = False) -> None:
    """Cancels the job; in the background until Redis answers, for it holds slots of the engine.

    With `unless_attached` a job stays that another client has asked for by its key.
    """
    try:
        services.jobs.cancel(job_id, model, unless_attached=unless_attached)
    except RedisError as away:
        log.error("job %s: not cancelled yet: %s", job_id, away)
        # As many as have left: not all at once.
        wait_s = CANCEL_RETRY_S * random.uniform(1, 2)  # noqa: S311
        again = {"unless_attached": unless_attached}
        gevent.spawn_later(wait_s, cancel, services, job_id, model, **again)


def cancel_accepted(services: Services, job_id: str, model: str) -> None:
    """Cancels a job that the queue may not hold yet: then only SQL has it."""
    try:
        if services.jobs.backlog.snapshots([job_id]) != [None]:
            services.jobs.cancel(job_id, model)
            return
        error = JobCancelledError().body()["error"]
        records.end_lost(services.settings.database_url, job_id, State.CANCELLED, error)
    except (RedisError, SQLAlchemyError) as away:
        log.error("job %s: not cancelled yet: %s", job_id, away)
        wait_s = CANCEL_RETRY_S * random.uniform(1, 2)  # noqa: S311
        gevent.spawn_later(wait_s, cancel_accepted, services, job_id, model)
