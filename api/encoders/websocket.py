"""WebSockets: requests and their chunks as text frames, several one after the other on one socket.

The first frame is the body of the POST; each frame back is a chunk's JSON, then `[DONE]`. On a
job's events a frame is `{"event", "id", "data"}`. `{"type": "cancel"}` cancels what is running.
"""

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import gevent
import orjson
from flask import Flask, request
from flask_sock import Sock
from gevent.queue import Queue
from redis.exceptions import RedisError
from simple_websocket import ConnectionClosed
from sqlalchemy.exc import SQLAlchemyError

from api import schemas
from api.access import KEY_PROTOCOL, get_principal
from api.generation import AnsweredError, Generation
from api.intake import Call
from api.job_events import KEEP_ALIVE, Follower
from api.job_view import stored_response
from api.relay import ClientDisconnectedError, ServerStoppingError
from api.services import Services, get_services
from tasks.contract.access import Role
from tasks.contract.errors import (
    InvalidRequestError,
    KeyRevokedError,
    QueueUnavailableError,
    SluiceError,
)

log = logging.getLogger(__name__)

# RFC 6455
VERSION = "13"
PING_INTERVAL_S = 25
# A reader that takes nothing for so long is gone.
LONGEST_STALL_S = 30.0
MOST_WAITING = 16
DONE = "[DONE]"
# The second is what clients of OpenAI's realtime API name beside their key.
PROTOCOLS = ("sluice", "realtime")
POLICY_VIOLATION, INTERNAL_ERROR, TRY_AGAIN_LATER = 1008, 1011, 1013


class WholeWrites:
    """A socket whose `send` sends all, one caller after the other, and gives up a stalled reader.

    flask-sock writes with `send`, from two greenlets, and takes no notice of what was not sent.
    """

    def __init__(self, client_socket: Any) -> None:
        self._socket = client_socket
        self._lock = threading.Lock()

    def send(self, data: bytes) -> None:
        """Sends all of it.

        Raises:
            OSError: the client is gone, or has not read for LONGEST_STALL_S.
        """
        with self._lock:
            self._socket.settimeout(LONGEST_STALL_S)
            try:
                self._socket.sendall(data)
            except OSError:
                self._socket.close()
                raise
            self._socket.settimeout(None)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._socket, name)


def register(app: Flask) -> None:
    """Adds the WebSocket routes to the app."""
    app.config["SOCK_SERVER_OPTIONS"] = {
        "ping_interval": PING_INTERVAL_S,
        "max_message_size": app.config["MAX_CONTENT_LENGTH"],
        "subprotocols": _Chosen(),
    }
    sock = Sock(app)
    app.before_request(_prepare_socket)
    for endpoint in ("/v1/chat/completions", "/v1/completions"):
        sock.route(endpoint, endpoint=f"socket {endpoint}")(_generations(endpoint))
    sock.route("/v1/jobs/<job_id>/events", endpoint="socket job events")(_job_events)
    for rule in app.url_map.iter_rules():
        if rule.websocket:
            # Otherwise those who do not upgrade would read that GET is allowed.
            rule.methods = None


class _Chosen:
    """Whatever `_choose_protocol` has left of the subprotocols that the client offers."""

    def __contains__(self, _name: object) -> bool:
        return True


def _choose_protocol(offered: str) -> str:
    """The one that the answer names: browsers give up if there is none of those that they offered.

    The key, which may be one of them, only if it is the only one.
    """
    names = [name.strip() for name in offered.split(",")]
    known = [name for name in names if name in PROTOCOLS]
    return next(iter(known + [name for name in names if name.startswith(KEY_PROTOCOL)]), "")


def _prepare_socket() -> None:
    if request.headers.get("upgrade", "").lower() == "websocket":
        version = request.headers.get("Sec-WebSocket-Version")
        if version != VERSION or "Sec-WebSocket-Key" not in request.headers:
            raise InvalidRequestError(
                f"A WebSocket begins with the headers Sec-WebSocket-Version: {VERSION} and "
                "Sec-WebSocket-Key; send them, or no Upgrade."
            )
        request.environ["gunicorn.socket"] = WholeWrites(request.environ["gunicorn.socket"])
        # No compression: a frame of some kilobytes can inflate to a gigabyte.
        request.environ.pop("HTTP_SEC_WEBSOCKET_EXTENSIONS", None)
        chosen = _choose_protocol(request.environ.pop("HTTP_SEC_WEBSOCKET_PROTOCOL", ""))
        if chosen:
            request.environ["HTTP_SEC_WEBSOCKET_PROTOCOL"] = chosen


class Conversation:
    """One open socket: frames in, and what handles a cancellation or a lost client."""

    def __init__(self, ws: Any, most_bytes: int) -> None:
        """`most_bytes`: of all frames that wait."""
        self._ws = ws
        self._most_bytes = most_bytes
        self._waiting_bytes = 0
        self._requests: Queue[bytes | None] = Queue()
        self._on_cancel: Callable[[], object] | None = None
        self._on_disconnect: Callable[[], object] | None = None
        self._is_gone = False
        self._is_revoked = False
        gevent.spawn(self._read)

    def requests(self) -> Iterator[bytes]:
        """The frames that are not a cancellation, until either side closes.

        Raises:
            KeyRevokedError: `revoke` was called.
        """
        while (frame := self._requests.get()) is not None and not self._is_gone:
            if self._is_revoked:
                break
            self._waiting_bytes -= len(frame)
            yield frame
        if self._is_revoked and not self._is_gone:
            raise KeyRevokedError

    def revoke(self) -> None:
        """The key is refused: `requests` ends; what is being answered is cut off elsewhere."""
        self._is_revoked = True
        self._requests.put(b"")

    @contextlib.contextmanager
    def handling(
        self, on_cancel: Callable[[], object], on_disconnect: Callable[[], object]
    ) -> Iterator[None]:
        """Calls these meanwhile when the client cancels or disconnects; at once if it has."""
        self._on_cancel, self._on_disconnect = on_cancel, on_disconnect
        try:
            if self._is_gone:
                on_disconnect()
            yield
        finally:
            self._on_cancel = self._on_disconnect = None

    @contextlib.contextmanager
    def reporting(self) -> Iterator[None]:
        """Sends whatever goes wrong in frames: an HTTP response would be written among them."""
        try:
            yield
        except ClientDisconnectedError:
            self._disconnect()
        except SluiceError as error:
            self._refuse(error)
        except (RedisError, SQLAlchemyError) as away:
            log.error("a socket's request ends: %s", away)
            self._refuse(QueueUnavailableError())
        except Exception as failure:
            log.error("a socket's request failed", exc_info=failure)
            self._refuse(SluiceError())

    def send(self, frame: str) -> None:
        """Sends a text frame; waits while the client reads slowly.

        Raises:
            ClientDisconnectedError: the client is gone or has stalled.
        """
        try:
            self._ws.send(frame)
        except (ConnectionClosed, OSError):
            raise ClientDisconnectedError from None

    def close(self, code: int, reason: str) -> None:
        """Closes; nothing more is served."""
        self._disconnect()
        with contextlib.suppress(ConnectionClosed, OSError):
            self._ws.close(code, reason)

    def _refuse(self, error: SluiceError) -> None:
        """Sends an error, and closes when nothing else will be served here."""
        with contextlib.suppress(ClientDisconnectedError):
            self.send(orjson.dumps(error.body()).decode())
            self.send(DONE)
        if isinstance(error, KeyRevokedError):
            self.close(POLICY_VIOLATION, str(error)[:100])
        elif error.status >= 500:
            code = INTERNAL_ERROR if error.retry_after_s is None else TRY_AGAIN_LATER
            self.close(code, str(error)[:100])

    def _read(self) -> None:
        """Takes all frames, also while an answer is sent."""
        try:
            self._take_frames()
        except ConnectionClosed:
            pass
        finally:
            self._disconnect()
            self._requests.put(None)

    def _disconnect(self) -> None:
        self._is_gone = True
        if self._on_disconnect:
            self._on_disconnect()

    def _take_frames(self) -> None:
        while (received := self._ws.receive()) is not None:
            frame = received.encode() if isinstance(received, str) else received
            if _is_cancellation(frame):
                if self._on_cancel:
                    self._on_cancel()
            elif self._has_room(frame):
                self._waiting_bytes += len(frame)
                self._requests.put(frame)
            else:
                self.close(POLICY_VIOLATION, "too much waits on this socket")

    def _has_room(self, frame: bytes) -> bool:
        if self._requests.qsize() >= MOST_WAITING:
            return False
        return self._waiting_bytes + len(frame) <= self._most_bytes


def _is_cancellation(frame: bytes) -> bool:
    if len(frame) > 100:
        return False
    with contextlib.suppress(orjson.JSONDecodeError):
        return bool(orjson.loads(frame) == {"type": "cancel"})
    return False


def _generations(endpoint: str) -> Callable[[Any], None]:
    def serve(ws: Any) -> None:
        services = get_services()
        principal = get_principal()
        conversation = Conversation(ws, services.settings.max_body_bytes)
        with (
            conversation.reporting(),
            services.keyring.watching(principal, conversation.revoke),
        ):
            for body in conversation.requests():
                with conversation.reporting():
                    now = services.keyring.find_again(principal)
                    now.check_role(Role.USER)
                    call = Call.read(services, now, endpoint, body, request.headers)
                    _serve(services, conversation, call)

    return serve


def _serve(services: Services, conversation: Conversation, call: Call) -> None:
    """Answers one request."""
    try:
        generation = Generation(services, call)
    except AnsweredError as answered:
        stored = stored_response(services, call.principal.tenant, answered.job_id)
        conversation.send(stored.get_data(True))
        conversation.send(DONE)
        return
    gone = generation.stream.client_disconnected
    with contextlib.closing(generation), conversation.handling(generation.cancel, gone):
        for chunk in generation.answer.chunks():
            conversation.send(chunk.decode())
        conversation.send(DONE)


def _job_events(ws: Any, job_id: str) -> None:
    services = get_services()
    conversation = Conversation(ws, services.settings.max_body_bytes)
    with conversation.reporting():
        path = schemas.check(schemas.JobPath, {"job_id": job_id})
        wanted = request.args.get("starting_after")
        follower = Follower(services, get_principal(), path.job_id, wanted)
        with conversation.handling(follower.cancel, follower.client_disconnected):
            try:
                for event in follower.events():
                    if event is not KEEP_ALIVE:
                        conversation.send(event.encode_frame())
            except ServerStoppingError:
                conversation.close(TRY_AGAIN_LATER, "this server restarts; go on after the last id")
