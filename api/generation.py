"""One request: submitted as a job, its answer taken from the relay, and given back as it comes.

The body goes to the engine unchanged and its response comes back unchanged, so every parameter that
the engine knows works here.
"""

import socket
from contextlib import ExitStack
from typing import Any

import gevent
from flask import Response
from gevent.socket import wait_read

from api.answer import Answer
from api.calls import Call
from api.cancellation import cancel
from api.ends import is_kept
from api.job_stream import ClientGoneError, JobStream
from api.services import Services
from tasks.message import Job, Terms

CLIENT_CLOSED_REQUEST = 499


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
        model = call.model.name
        job = Job.create(
            model=model,
            endpoint=call.endpoint,
            body=call.body,
            listener=services.relay.process,
            sequences=call.sequences,
        )
        terms = Terms(idempotency_key=call.idempotency_key, fingerprint=call.fingerprint)
        stream: JobStream = self._resources.enter_context(services.relay.stream(job.id))
        with ExitStack() as undo:
            undo.callback(self._resources.close)
            self.job_id = services.jobs.backlog.submit(job, terms)
            self._is_own = self.job_id == job.id
            if not self._is_own:
                stream = self._attach()
            undo.pop_all()
        self._model = model
        self._continues = call.continues
        self.stream = stream
        self.answer = Answer(services, stream, model, self._is_own)
        if client_socket is not None:
            watcher = gevent.spawn(_watch, client_socket, stream)
            self._resources.callback(watcher.kill, block=False)

    def _attach(self) -> JobStream:
        """The stream of the job that holds the key, in place of an own one."""
        self._resources.close()
        is_queued = self._services.jobs.backlog.look([self.job_id]) != [None]
        if not is_queued and not is_kept(self._services, self.job_id):
            raise AnsweredError(self.job_id)
        return self._resources.enter_context(self._services.relay.follow(self.job_id))

    def close(self) -> None:
        """Lets go of the job, and cancels it unless somebody else may want it."""
        self._resources.close()
        if self.answer.end is None and self._is_own and not self._continues:
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
        except ClientGoneError:
            self.close()
            return Response(status=CLIENT_CLOSED_REQUEST)
        except BaseException:
            self.close()
            raise
        response.call_on_close(self.close)
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
    stream.hang_up()
