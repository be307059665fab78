"""The OpenAPI document: what flask-openapi3 knows of the routes, and what each says of its answers.

A route's `openapi_extensions=operation(...)` says what it takes, gives and refuses: of errors the
classes of tasks/contract/errors.py. At the start `complete` makes valid OpenAPI 3.1 of all that.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, get_args

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from api.access import WHO
from api.intake import LONGEST_KEY, TIMEOUT
from api.relay import ServerStoppingError
from api.replies import DOCUMENTED, Error, Job
from api.schemas import EVENT_ID, JobRequest, Rotation, engine_schemas
from tasks.contract.access import KeySpec, TenantSpec
from tasks.contract.error_kinds import all_kinds
from tasks.contract.errors import (
    AuthenticationError,
    BacklogBytesError,
    BodyTimeoutError,
    BodyTooLargeError,
    DatabaseUnavailableError,
    EndpointNotAllowedError,
    EndpointNotSupportedError,
    HostNotAllowedError,
    IdempotencyError,
    InvalidRequestError,
    JobNotFoundError,
    KeyInUseError,
    ModelNotAllowedError,
    ModelNotFoundError,
    OriginNotAllowedError,
    OverloadedError,
    PermissionDeniedError,
    QueueUnavailableError,
    RateLimitError,
    RecordsFullError,
    RequestTimeoutError,
    ShedError,
    SluiceError,
    TooManyConnectionsError,
    headers_of,
)
from tasks.contract.job_errors import (
    AnswerTooLargeError,
    FirstTokenTimeoutError,
    JobCancelledError,
    JobExpiredError,
    JobFailedError,
    JobLostError,
    JobTimeoutError,
    NextTokenTimeoutError,
    StreamBrokenError,
)

JSON, EVENTS = "application/json", "text/event-stream"
# Samples of streams.
CHUNKS = 'data: {"id": …, "choices": [{"index": 0, …}]}\n\ndata: [DONE]\n\n'
CHUNKS_WITH_IDS = f"id: 1-2\n{CHUNKS}"
DESCRIPTION = """OpenAI's API, and jobs: every request has an id, in the header `x-sluice-job`, with
which it can be polled, waited for, streamed, resumed and cancelled.

Every error has OpenAI's shape. What an engine refuses keeps its status: that of a `remote` engine
may be another one than those listed here. Requests may bring an `x-request-id`, and get it back."""
_SECURITY: list[dict[str, list[Any]]] = [{"bearer": []}]
_SCHEMES = {
    "bearer": {
        "type": "http",
        "scheme": "bearer",
        "description": "A key, as `sluice keys create` makes them. While there is none, and the API"
        " is bound to loopback, only keys and tenants themselves need one.",
    }
}

Kind = type[SluiceError]
# Headers of requests.
PREFER, KEY, LEAVE, RESUME = "Prefer", "Idempotency-Key", "x-sluice-on-disconnect", "Last-Event-ID"
_PARAMETERS: dict[str, tuple[str, dict[str, Any]]] = {
    PREFER: (
        "`wait=N`: waits up to N seconds, and 60, for the job's end. `respond-async`: 202 at once",
        {},
    ),
    KEY: (
        "the same request with the same key gets the same job",
        {"maxLength": LONGEST_KEY, "pattern": "^[ -~¡-¬®-ÿ]*$"},
    ),
    LEAVE: ("what becomes of the job when its client leaves", {"enum": ["abort", "continue"]}),
    TIMEOUT: (
        "seconds within which the job ends, with an error if need be",
        {"pattern": r"^0*[1-9][0-9]{0,5}(\.[0-9]{1,9})?$"},
    ),
    RESUME: ("goes on after that event", {"pattern": EVENT_ID}),
}
# Headers of answers.
APPLIED = "Preference-Applied"
OF_JOB = ("x-sluice-job",)
OF_ANSWER = (
    *("x-sluice-job", "x-sluice-model", "x-sluice-queue-ms", "x-sluice-attempts"),
    "openai-processing-ms",
)
_HEADERS = {
    "Location": ("string", "where the job is"),
    APPLIED: ("string", "`respond-async`, if it was asked for"),
    "Retry-After": ("integer", "seconds"),
    "WWW-Authenticate": ("string", "`Bearer`"),
    "openai-processing-ms": ("integer", "from the request to its answer"),
    "retry-after-ms": ("integer", "the same in milliseconds"),
    "x-should-retry": ("boolean", "tells OpenAI's SDK whether to try again"),
    "x-sluice-attempts": ("integer", "workers that the job has had"),
    "x-sluice-job": ("string", "the job's id"),
    "x-sluice-model": ("string", "the model that served"),
    "x-sluice-queue-ms": ("integer", "how long the job waited"),
}
_RULE_PART = re.compile(r"<(?:\w+:)?(\w+)>")
_ALWAYS = {"Location", "x-sluice-job"}


class Given(NamedTuple):
    """An answer that is no error."""

    says: str
    content: Mapping[str, Any]
    """What it holds by content type: a model of replies.py, a list of one, `str`, or a sample."""
    headers: tuple[str, ...] = ()


def given(says: str, kind: Any, *headers: str) -> Given:
    """One in JSON."""
    return Given(says, {JSON: kind}, headers)


LATER = given("The job, which has not ended", Job, "Location", *OF_JOB, APPLIED)
ENDED = given("The job, which has ended", Job, *OF_JOB)

# What any request may get, and any with a body.
_EVERYWHERE: tuple[Kind, ...] = (
    *(SluiceError, HostNotAllowedError, OriginNotAllowedError, TooManyConnectionsError),
)
_WITH_KEY: tuple[Kind, ...] = (
    *(AuthenticationError, PermissionDeniedError, DatabaseUnavailableError),
)
BODY_ERRORS: tuple[Kind, ...] = (InvalidRequestError, BodyTooLargeError, BodyTimeoutError)
STORE_ERRORS: tuple[Kind, ...] = (QueueUnavailableError, DatabaseUnavailableError)
JOB_ERRORS: tuple[Kind, ...] = (InvalidRequestError, JobNotFoundError, *STORE_ERRORS)
ACCEPTANCE_ERRORS: tuple[Kind, ...] = (
    *(ModelNotAllowedError, EndpointNotAllowedError),
    *(ModelNotFoundError, KeyInUseError, IdempotencyError, *STORE_ERRORS),
    *(OverloadedError, BacklogBytesError, RecordsFullError, RateLimitError, ShedError),
)
# How a job may end instead of with an answer, and its client's wait for it.
GENERATION_ERRORS: tuple[Kind, ...] = (
    *(EndpointNotSupportedError, JobNotFoundError, JobCancelledError, JobFailedError),
    *(AnswerTooLargeError, StreamBrokenError, JobLostError, ServerStoppingError),
    *(RequestTimeoutError, JobExpiredError),
    *(FirstTokenTimeoutError, NextTokenTimeoutError, JobTimeoutError),
)


def operation(
    gives: Mapping[int, Given],
    refuses: Iterable[Kind] = (),
    *,
    body: Mapping[str, Any] | None = None,
    takes: Iterable[str] = (),
    engine: Iterable[int] = (),
) -> dict[str, Any]:
    """What a route says of itself; `engine` are the statuses of the engine's own refusals."""
    told: dict[str, Any] = {
        "parameters": [{"$ref": f"#/components/parameters/{name}"} for name in takes],
        "responses": {str(status): _answer(each) for status, each in gives.items()},
    }
    if body:
        told["requestBody"] = {"required": True, "content": {JSON: body}}
    # Names, as flask-openapi3 writes it all out before `complete` reads it.
    names = [kind.__name__ for kind in refuses]
    return {"x-sluice": told, "x-refuses": names, "x-engine": list(engine)}


def complete(document: dict[str, Any]) -> None:
    """Makes the document whole: every operation as its route has told, and what they refer to."""
    roles = {_RULE_PART.sub(r"{\1}", row): role for row, role in WHO.items()}
    kinds = {kind.__name__: kind for kind in all_kinds()}
    for path, operations in document["paths"].items():
        for method, known in operations.items():
            told = known.pop("x-sluice")
            refuses = [kinds[name] for name in known.pop("x-refuses")]
            if roles[f"{method.upper()} {path}"]:
                refuses.extend(_WITH_KEY)
                told["security"] = _SECURITY
            told["responses"] |= _refusals(refuses, known.pop("x-engine"))
            parameters = [_without_null(each) for each in known.get("parameters", ())]
            known.update(told, parameters=parameters + told["parameters"])
    document["components"] = {
        "schemas": _schemas(),
        "parameters": {name: _parameter(name) for name in _PARAMETERS},
        "securitySchemes": _SCHEMES,
    }


def _schemas() -> dict[str, Any]:
    taken: tuple[type[BaseModel], ...] = (JobRequest, KeySpec, TenantSpec, Rotation)
    wanted = [(kind, "validation") for kind in taken]
    wanted += [(kind, "serialization") for kind in DOCUMENTED]
    _, made = models_json_schema(wanted, ref_template="#/components/schemas/{model}")  # type: ignore[arg-type]
    ours: dict[str, Any] = made["$defs"]
    for schema in ours.values():
        _drop_null_defaults(schema.get("properties", {}).values())
    return engine_schemas() | ours


def _answer(told: Given) -> dict[str, Any]:
    content = {
        mime: {"example": kind} if isinstance(kind, str) else {"schema": _schema(kind)}
        for mime, kind in told.content.items()
    }
    answer: dict[str, Any] = {"description": told.says, "content": content}
    if told.headers:
        answer["headers"] = {name: _header(name, name in _ALWAYS) for name in told.headers}
    return answer


def _schema(kind: Any) -> dict[str, Any]:
    if kind is str:
        return {"type": "string"}
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return {"$ref": f"#/components/schemas/{kind.__name__}"}
    (each,) = get_args(kind)
    return {"type": "array", "items": _schema(each)}


def _refusals(kinds: Iterable[Kind], engine: list[int]) -> dict[str, Any]:
    by_status: dict[int, list[Kind]] = defaultdict(list)
    for kind in dict.fromkeys([*_EVERYWHERE, *kinds]):
        by_status[kind.status].append(kind)
    statuses = sorted(by_status.keys() | set(engine))
    return {str(status): _refusal(by_status[status], status in engine) for status in statuses}


def _refusal(kinds: Iterable[Kind], has_engines: bool) -> dict[str, Any]:
    says = [f"- `{kind.code}`: {kind.__doc__}" for kind in kinds]
    if has_engines:
        says.append("- or what the engine refuses, in its own words")
    refusal = _answer(given("\n".join(says), Error))
    headers = [set(headers_of(kind)) for kind in kinds] or [set()]
    for name in sorted(set.union(*headers)):
        is_in_all = name in set.intersection(*headers) and not has_engines
        refusal.setdefault("headers", {})[name] = _header(name, is_in_all)
    return refusal


def _header(name: str, is_required: bool) -> dict[str, Any]:
    form, says = _HEADERS[name]
    return {"description": says, "required": is_required, "schema": {"type": form}}


def _parameter(name: str) -> dict[str, Any]:
    says, bounds = _PARAMETERS[name]
    schema = {"type": "string"} | bounds
    return {"name": name, "in": "header", "description": says, "schema": schema}


def _without_null(parameter: dict[str, Any]) -> dict[str, Any]:
    """What a URL may leave out cannot be null in it."""
    schema = dict(parameter["schema"])
    for kind in schema.pop("anyOf", ()):
        if kind != {"type": "null"}:
            schema |= kind
    _drop_null_defaults([schema])
    return parameter | {"schema": schema}


def _drop_null_defaults(schemas: Iterable[dict[str, Any]]) -> None:
    """They say no more than that a field may be left out."""
    for schema in schemas:
        if schema.get("default", ...) is None:
            del schema["default"]
