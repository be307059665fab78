"""A request comes in: its body, what it asks of the engine, and how its client wants the answer.

It is read within bounds of bytes, time and depth. What routing needs is checked here, the rest is
the engine's to check, but for costs that come before it can: a schema of two megabytes is compiled
for minutes, and nobody else's schema meanwhile.
"""

import hashlib
import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlsplit

import gevent
import orjson
from flask import request
from gunicorn.http.errors import NoMoreData, ParseException
from werkzeug.datastructures import Headers

from api import ceilings, told
from api.engine_request import admit_sequences, fit_batch, read_max_tokens
from api.principal import Principal
from api.routing import rename
from api.services import Services
from tasks.contract.errors import (
    BodyTimeoutError,
    BodyTooLargeError,
    InvalidRequestError,
    ModelNotFoundError,
)
from tasks.contract.job import EnqueueOptions, Job, new_id
from tasks.contract.models import Model
from tasks.contract.settings import get_settings
from tasks.queue.backlog import BYTES_PER_TOKEN

PIECE_BYTES = 1 << 20
# Of a chunked body, whose chunks may have a byte each: between two of these others have their turn.
CHUNKED_PIECE_BYTES = 1 << 8
# Tools' schemas are the deepest that anybody sends; parsers downstream give up at some hundred.
MOST_LEVELS = 100

LONGEST_WAIT_S = 60
LONGEST_KEY = 255
_SECONDS = re.compile("[0-9]{1,9}")
_DECIMAL = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?")
TIMEOUT = "x-sluice-timeout"
LONGEST_TIMEOUT_S = 2_592_000
_ON_DISCONNECT = ("abort", "continue")
# They reach into how the engine runs. A model's entry may allow them (`allow`).
OPERATORS_FIELDS = frozenset(
    {
        *("kv_transfer_params", "ec_transfer_params", "vllm_xargs"),
        *("mm_processor_kwargs", "media_io_kwargs"),
    }
)
# What the answer's form is made of: schemas, grammars, regular expressions, choices, tools.
FORM_FIELDS = ("response_format", "structured_outputs", "tools")
MOST_TOKEN_IDS = 1_000_000
TOKEN_ID_FIELDS = (
    *("prompt", "input"),
    *("stop_token_ids", "allowed_token_ids", "logprob_token_ids"),
)
MEDIA_ARG = "allowed-media-domains"


def read_body() -> bytes:
    """The request's body.

    Raises:
        InvalidRequestError: it does not say that it is JSON, or is not sent as HTTP wants it.
        BodyTooLargeError: it is longer than the setting allows.
        BodyTimeoutError: it does not come.
    """
    if request.mimetype != "application/json":
        raise InvalidRequestError(
            f"Content-Type must be application/json, not {request.mimetype or 'missing'!r}."
        )
    most_bytes = request.max_content_length or 0
    if (request.content_length or 0) > most_bytes:
        raise BodyTooLargeError(most_bytes)
    try:
        with gevent.Timeout(get_settings().body_timeout_s, BodyTimeoutError):
            body = _read(most_bytes)
    except (NoMoreData, ParseException) as broken:
        raise InvalidRequestError(
            f"The body is not sent as HTTP wants it: {type(broken).__name__}."
        ) from None
    if len(body) < (request.content_length or 0):
        raise InvalidRequestError("The body is shorter than its Content-Length says.")
    return body


def _read(most_bytes: int) -> bytes:
    """Not by Flask, which takes a chunked body that is too long for one that ends at the bound."""
    pieces: list[bytes] = []
    left = most_bytes
    piece_bytes = CHUNKED_PIECE_BYTES if request.content_length is None else PIECE_BYTES
    while piece := request.environ["wsgi.input"].read(min(piece_bytes, left + 1)):
        left -= len(piece)
        if left < 0:
            raise BodyTooLargeError(most_bytes)
        pieces.append(piece)
        gevent.sleep(0)
    return b"".join(pieces)


def read_object(body: bytes) -> dict[str, Any]:
    """The body as a JSON object.

    Raises:
        InvalidRequestError: it is not JSON, no object, or nested too deep.
    """
    document = _parse(body)
    if not isinstance(document, dict):
        raise InvalidRequestError("The body is not a JSON object.")
    return document


def _read_fields(body: bytes) -> dict[str, Any]:
    """What a request gives the engine; {} for JSON that is no object, which the engine refuses."""
    document = _parse(body)
    return document if isinstance(document, dict) else {}


def _parse(body: bytes) -> Any:
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError as broken:
        raise InvalidRequestError(f"The body is not valid JSON: {broken}") from None
    if body.count(b"[") + body.count(b"{") > MOST_LEVELS and _is_too_deep(document):
        raise InvalidRequestError(f"The body is nested more than {MOST_LEVELS} levels deep.")
    return document


def _is_too_deep(document: Any) -> bool:
    level: list[Any] = [document]
    for _ in range(MOST_LEVELS + 1):
        if not level:
            return False
        below = itertools.chain.from_iterable(map(_members, level))
        level = [member for member in below if isinstance(member, (dict, list))]
    return True


def _members(container: Any) -> Iterable[Any]:
    return container.values() if isinstance(container, dict) else container


@dataclass(frozen=True, slots=True)
class Call:
    """A request for the engine as a job, and how its client wants to have the answer."""

    job: Job
    principal: Principal
    wants_stream: bool
    continues: bool
    """Whether the job runs on when its client goes away."""

    @classmethod
    def read(
        cls,
        services: Services,
        principal: Principal,
        endpoint: str,
        body: bytes,
        headers: Headers,
    ) -> "Call":
        """Reads a body as it came.

        Raises:
            InvalidRequestError: it is not JSON, an option of ours is wrong, or it asks for more at
                once than a worker of the model takes, or for what no user may.
            ModelNotFoundError: the model does not exist.
            PermissionDeniedError: the key is not for the model or the endpoint.
        """
        principal.check_endpoint(endpoint)
        whole = document = _read_fields(body)
        if "message" in document and "messages" not in document and "prompt" not in document:
            document = _expand_short_form(document)
        on_disconnect, document = _take_on_disconnect(document, headers)
        name = document.get("model")
        name = name if isinstance(name, str) else None
        tokens = _estimate_tokens(endpoint, document, len(body))
        choice = services.router.choose(name, principal, document.get("user"), tokens)
        model = choice.model
        if choice.reason:
            told.note_fallback(choice.reason)
        document = rename(document, model)
        _check_limits(document, model, services.settings.max_schema_bytes)
        is_busy = services.router.is_capped(model, principal)
        ceilings.check(endpoint, document, len(body), principal)
        max_tokens = ceilings.bound_tokens(endpoint, document, principal, model, is_busy=is_busy)
        document = ceilings.complete(endpoint, document, principal, model, max_tokens)
        key = read_key(headers)
        timeout_s = _read_timeout(headers)
        job = Job(
            new_id(),
            model.name,
            endpoint,
            body if document is whole else orjson.dumps(document),
            tenant=principal.tenant,
            key_id=principal.key_id,
            weight=principal.weight,
            sequences=admit_sequences(endpoint, document, model),
            max_tokens=max_tokens,
            timeout_s=timeout_s,
            options=EnqueueOptions(
                deadline_s=shortest(timeout_s, model.timeouts.queue_s, model.timeouts.total_s),
                idempotency_key=key,
                fingerprint=fingerprint(endpoint, body),
            ),
        )
        # A key says that the client will come back for the answer.
        continues = (on_disconnect or ("continue" if key else "abort")) == "continue"
        return cls(job, principal, document.get("stream") is True, continues)


def readmit(services: Services, principal: Principal, job: Job) -> Job:
    """A job that is to run again, as if the key had asked for it now.

    Raises:
        InvalidRequestError: it asks for what no user may, or the key may not by now.
        ModelNotFoundError: the model does not exist any more.
        PermissionDeniedError: the key is not for the model or the endpoint.
    """
    principal.check_endpoint(job.endpoint)
    model = principal.resolve(services.catalog, job.model)
    if model.name != job.model:
        # It has gone, and a wildcard leads elsewhere.
        raise ModelNotFoundError(job.model, principal.names(services.catalog))
    whole = document = _read_fields(job.body)
    if job.key_id:
        # What it was given by the server.
        document = {name: value for name, value in whole.items() if name not in ceilings.OURS}
    _check_limits(document, model, services.settings.max_schema_bytes)
    ceilings.check(job.endpoint, document, len(job.body), principal)
    max_tokens = ceilings.bound_tokens(job.endpoint, document, principal, model, is_busy=False)
    document = ceilings.complete(job.endpoint, document, principal, model, max_tokens)
    again = replace(
        job,
        body=job.body if document == whole else orjson.dumps(document),
        key_id=principal.key_id,
        weight=principal.weight,
        sequences=admit_sequences(job.endpoint, document, model),
        max_tokens=max_tokens,
    )
    return fit_batch(again, model)


def shortest(*limits_s: float | None) -> float | None:
    """The shortest of the times that are limits; None: there is no limit."""
    return min((limit_s for limit_s in limits_s if limit_s is not None), default=None)


def _read_timeout(headers: Headers) -> float | None:
    given = headers.get(TIMEOUT)
    if given is None:
        return None
    if not _DECIMAL.fullmatch(given) or not 0 < float(given) <= LONGEST_TIMEOUT_S:
        raise InvalidRequestError(
            f"{TIMEOUT} is a number of seconds, more than 0 and up to {LONGEST_TIMEOUT_S:,}."
        )
    return float(given)


def _estimate_tokens(endpoint: str, document: dict[str, Any], size_bytes: int) -> int:
    """What a request may need of a model's context; the bytes of pictures say nothing of that."""
    prompt = 0 if any(_media(document)) else size_bytes // BYTES_PER_TOKEN
    return prompt + (read_max_tokens(endpoint, document) or 0)


def fingerprint(endpoint: str, body: bytes) -> str:
    """Tells requests with the same Idempotency-Key apart."""
    return hashlib.sha256(endpoint.encode() + b"\n" + body).hexdigest()


def read_key(headers: Headers) -> str:
    """The Idempotency-Key, '' for none.

    Raises:
        InvalidRequestError: it is too long or not printable.
    """
    key = headers.get("Idempotency-Key", "")
    if len(key) > LONGEST_KEY or not key.isprintable():
        raise InvalidRequestError(
            f"Idempotency-Key must be printable and at most {LONGEST_KEY} characters long."
        )
    return key


@dataclass(frozen=True, slots=True)
class Preference:
    """What the header Prefer says (RFC 7240)."""

    is_async: bool = False
    wait_s: int = 0

    @classmethod
    def read(cls, headers: Headers) -> "Preference":
        """Reads `respond-async` and `wait=N`; others are not ours, and ignored as the RFC says.

        Raises:
            InvalidRequestError: N is not a number of seconds.
        """
        wishes = [wish.strip().lower() for wish in headers.get("Prefer", "").split(",")]
        wait_s = 0
        for wish in wishes:
            name, _, value = wish.partition("=")
            if name.strip() == "wait":
                if not _SECONDS.fullmatch(value.strip()):
                    raise InvalidRequestError(
                        f"Prefer: wait takes whole seconds, as in wait=10, not {value[:20]!r}."
                    )
                wait_s = min(int(value), LONGEST_WAIT_S)
        return cls("respond-async" in wishes, wait_s)


def _expand_short_form(document: dict[str, Any]) -> dict[str, Any]:
    """`{"message": "Hello"}` as the full request: a user message, streamed."""
    rest = {name: value for name, value in document.items() if name != "message"}
    return {"messages": [{"role": "user", "content": document["message"]}], "stream": True} | rest


def _take_on_disconnect(
    document: dict[str, Any], headers: Headers
) -> tuple[str | None, dict[str, Any]]:
    """Our own field, and the rest, which is the engine's."""
    wish = document.get("on_disconnect", headers.get("x-sluice-on-disconnect"))
    if wish is not None and wish not in _ON_DISCONNECT:
        raise InvalidRequestError(
            f"on_disconnect is `abort` or `continue`, not {wish!r}.", param="on_disconnect"
        )
    if "on_disconnect" in document:
        document = {k: v for k, v in document.items() if k != "on_disconnect"}
    return wish, document


def _check_limits(document: dict[str, Any], model: Model, most_form_bytes: int) -> None:
    """Refuses what no user of that model may ask for.

    Raises:
        InvalidRequestError: it is one of the operator's fields, a form or list of token ids that is
            too large, or media that the engine would have to fetch.
    """
    for name in OPERATORS_FIELDS & document.keys() - set(model.allow):
        if document[name] is not None:
            raise InvalidRequestError(
                f"`{name}` is not open to users of {model.name}; leave it out.", param=name
            )
    for name in FORM_FIELDS:
        size_bytes = len(orjson.dumps(document[name])) if document.get(name) else 0
        if size_bytes > most_form_bytes:
            raise InvalidRequestError(
                f"`{name}` holds {size_bytes:,} bytes, and up to {most_form_bytes:,} are taken.",
                param=name,
            )
    for name in TOKEN_ID_FIELDS:
        if _token_ids(document.get(name)) > MOST_TOKEN_IDS:
            raise InvalidRequestError(
                f"`{name}` holds more than {MOST_TOKEN_IDS:,} token ids.", param=name
            )
    _check_media(document, model)


def _check_media(document: dict[str, Any], model: Model) -> None:
    """Refuses media from elsewhere but from the model's domains.

    The engine looks at them too, but has those that it was started with.
    """
    allowed = model.args.get(MEDIA_ARG) or []
    allowed = allowed if isinstance(allowed, list) else [allowed]
    for url in filter(_is_elsewhere, _media(document)):
        if _host(url) not in allowed:
            raise InvalidRequestError(
                f"{model.name} fetches no media from there; send them in the request, as `data:` "
                "URLs.",
                param="messages",
            )


def _host(url: str) -> str | None:
    try:
        return urlsplit(url.strip()).hostname
    except ValueError:
        return None


def _token_ids(given: Any) -> int:
    if not isinstance(given, list):
        return 0
    return sum(len(one) if isinstance(one, list) else 1 for one in given)


def _media(document: dict[str, Any]) -> Iterator[str]:
    """The URLs of pictures and sounds in the messages."""
    messages = document.get("messages")
    for message in messages if isinstance(messages, list) else ():
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else ():
            for name, value in part.items() if isinstance(part, dict) else ():
                url = value.get("url") if isinstance(value, dict) else value
                if name.endswith("_url") and isinstance(url, str):
                    yield url


def _is_elsewhere(url: str) -> bool:
    return not url.strip().lower().startswith("data:")
