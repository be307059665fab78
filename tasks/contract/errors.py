"""Errors that reach a client or an operator; each class carries its HTTP status and code.

The class docstring is the default message. `api/errors.py` is the one place that maps them to HTTP.
"""

from collections.abc import Iterable
from http import HTTPStatus
from typing import Any


class DecodeError(Exception):
    """What Redis holds has a shape that this version does not know: for logs, not for clients."""


class SluiceError(Exception):
    """Something went wrong inside Sluice; the log of the API has the reason."""

    status = 500
    type = "server_error"
    code: str | int | None = "internal_error"
    retry_after_s: float | None = None
    # Value of x-should-retry, a header of OpenAI's SDK; None leaves it to the status.
    should_retry: bool | None = None

    def __init__(self, message: str = "", *, param: str | None = None) -> None:
        super().__init__(message or self.__doc__)
        self.param = param

    def body(self) -> dict[str, Any]:
        """The error in OpenAI's shape."""
        return {
            "error": {
                "message": str(self),
                "type": self.type,
                "param": self.param,
                "code": self.code,
            }
        }


def headers_of(kind: SluiceError | type[SluiceError]) -> dict[str, str]:
    """The HTTP headers of an error."""
    headers = {}
    if kind.retry_after_s is not None:
        headers["Retry-After"] = str(max(1, round(kind.retry_after_s)))
        headers["retry-after-ms"] = str(round(kind.retry_after_s * 1000))
    if kind.status == HTTPStatus.UNAUTHORIZED:
        headers["WWW-Authenticate"] = "Bearer"
    if kind.should_retry is not None:
        headers["x-should-retry"] = str(kind.should_retry).lower()
    return headers


class ConfigurationError(SluiceError):
    """A setting is wrong; the program does not start with it."""


class EngineLoadError(SluiceError):
    """The engine cannot load the model; the worker's log has the reason."""

    code = "engine_load_failed"


class InvalidRequestError(SluiceError):
    """The request cannot be understood."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_request"


class BodyTooLargeError(SluiceError):
    """The request's body is too large."""

    status = 413
    type = "invalid_request_error"
    code = "request_entity_too_large"

    def __init__(self, most_bytes: int) -> None:
        super().__init__(
            f"The request's body is too large; this server takes up to {most_bytes:,} bytes."
        )


class BodyTimeoutError(SluiceError):
    """The request's body did not arrive in time; send it again."""

    status = 408
    type = "invalid_request_error"
    code = "request_timeout"


class ModelNotFoundError(SluiceError):
    """The model does not exist."""

    # vLLM's own type and numeric code: clients of a bare vLLM server see no difference.
    status = 404
    type = "NotFoundError"
    code = 404

    def __init__(self, model: str, names: Iterable[str]) -> None:
        valid = ", ".join(names)
        super().__init__(
            f"The model `{model}` does not exist. Valid aliases: {valid}.", param="model"
        )


class EndpointNotSupportedError(SluiceError):
    """The model has no such endpoint; choose another model of /v1/models."""

    status = 404
    type = "not_found_error"
    code = "endpoint_not_supported"

    def __init__(self, model: str, endpoint: str) -> None:
        super().__init__(
            f"{model} has no {endpoint}; choose another model of /v1/models.", param="model"
        )


class IdempotencyError(InvalidRequestError):
    """The Idempotency-Key was used for another request; use a new key for a new request."""

    status = 422
    code = "idempotency_key_reused"


class AuthenticationError(SluiceError):
    """The key is missing or not valid; send one that is as `Authorization: Bearer KEY`."""

    status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class KeyRevokedError(AuthenticationError):
    """The key of this stream is not valid any more; go on with another one."""


class PermissionDeniedError(SluiceError):
    """The key lacks the role that this takes."""

    status = 403
    type = "permission_error"
    code = "role_missing"


class ModelNotAllowedError(PermissionDeniedError):
    """The key is not for this model; /v1/models lists those that it is for."""

    code = "model_not_allowed"

    def __init__(self, model: str) -> None:
        super().__init__(
            f"The key is not for the model {model}; /v1/models lists those that it is for.",
            param="model",
        )


class EndpointNotAllowedError(PermissionDeniedError):
    """The key is not for this endpoint."""

    code = "endpoint_not_allowed"

    def __init__(self, endpoint: str) -> None:
        super().__init__(f"The key is not for {endpoint}.")


class HostNotAllowedError(SluiceError):
    """The request's Host is not a name of this server; SLUICE_ALLOWED_HOSTS says which are."""

    status = 403
    type = "permission_error"
    code = "host_not_allowed"


class OriginNotAllowedError(SluiceError):
    """Pages of other sites may not use this server; SLUICE_ALLOWED_ORIGINS says which may."""

    status = 403
    type = "permission_error"
    code = "origin_not_allowed"


class NotKnownError(SluiceError):
    """There is nothing of that name."""

    status = 404
    type = "not_found_error"
    code = "not_found"


class JobNotFoundError(SluiceError):
    """There is no such job; it may be older than what is kept."""

    status = 404
    type = "not_found_error"
    code = "job_not_found"


class ConflictError(SluiceError):
    """The job is not in a state in which that can be done."""

    status = 409
    type = "conflict_error"
    code = "conflict"
    should_retry = False


class OverloadedError(SluiceError):
    """The backlog of this model is full; try again later."""

    status = 503
    type = "overloaded_error"
    code = "backlog_full"
    retry_after_s = 5.0


_LIMITS = {
    "requests_per_minute": ("requests", "{most:,} requests per minute"),
    "tokens_per_minute": ("tokens", "{most:,} tokens per minute"),
    "parallel_requests": ("requests", "{most:,} requests at once"),
    "queued_jobs": ("requests", "{most:,} jobs that wait"),
    "tokens_per_day": ("insufficient_quota", "{most:,} tokens per day (UTC)"),
    "tokens_per_month": ("insufficient_quota", "{most:,} tokens per month (UTC)"),
}
# Clients wait a minute by themselves, not a day.
LONGEST_RETRY_S = 60.0


class RateLimitError(SluiceError):
    """A limit of the key or its tenant is reached; try again later."""

    status = 429
    type = "requests"
    code = "rate_limit_exceeded"

    def __init__(self, subject: str, name: str, most: int, wait_s: float | None) -> None:
        """`subject`: key:ID or tenant:NAME; `wait_s`: None if it is too much for ever."""
        self.type, allowed = _LIMITS[name]
        is_long = wait_s is None or wait_s > LONGEST_RETRY_S
        if self.type == "insufficient_quota":
            # What is only reserved may be there again in a moment.
            self.type, self.code = (self.type, self.type) if is_long else ("tokens", self.code)
        whose = "key" if subject.startswith("key:") else "tenant"
        reached = f"Your {whose} is limited to {allowed.format(most=most)}"
        if wait_s is None:
            super().__init__(f"{reached}, and this request alone is more; ask for fewer tokens.")
        else:
            super().__init__(f"{reached}; try again in {max(wait_s, 0.1):,.1f} s.")
            self.retry_after_s = wait_s
        if is_long:
            self.should_retry = False


class ShedError(OverloadedError):
    """The model has more work than it can do, and keys of greater weight go first; try later."""

    code = "shed"

    def __init__(self, model: str, wait_s: float) -> None:
        self.retry_after_s = wait_s
        super().__init__(
            f"The model {model} has more work than it can do, and keys of greater weight go first; "
            f"try again in {wait_s:,.0f} s."
        )


class RecordsFullError(OverloadedError):
    """Too many ended jobs wait to be recorded: maintenance or the database is away; try later."""

    code = "records_full"


class BacklogBytesError(OverloadedError):
    """The requests that wait for this model hold too many bytes; try again later."""

    code = "backlog_bytes_full"


class KeyInUseError(SluiceError):
    """The request that has this Idempotency-Key has not ended yet; try again shortly."""

    status = 409
    type = "conflict_error"
    code = "idempotency_key_in_use"
    retry_after_s = 1.0
    should_retry = True


class NoWorkerError(SluiceError):
    """No worker lives yet; requests wait in the queue until one does."""

    status = 503
    type = "overloaded_error"
    code = "no_worker"
    retry_after_s = 2.0


class TooManyConnectionsError(SluiceError):
    """The server has as many connections as it can hold; try again shortly."""

    status = 503
    type = "overloaded_error"
    code = "too_many_connections"
    retry_after_s = 2.0


class QueueUnavailableError(SluiceError):
    """The queue cannot be reached at the moment; try again shortly."""

    status = 503
    type = "overloaded_error"
    code = "queue_unavailable"
    retry_after_s = 2.0


class DatabaseUnavailableError(SluiceError):
    """The database cannot be reached at the moment; try again shortly."""

    status = 503
    type = "overloaded_error"
    code = "database_unavailable"
    retry_after_s = 2.0


class DiskFullError(SluiceError):
    """A disk is full; delete what is not needed there."""


class RequestTimeoutError(SluiceError):
    """The answer was not ready within the time limit; the job ends unless it is to continue."""

    status = 504
    type = "timeout_error"
    code = "request_timeout"


_TYPES: dict[int, str] = {
    HTTPStatus.UNAUTHORIZED: AuthenticationError.type,
    HTTPStatus.FORBIDDEN: PermissionDeniedError.type,
    HTTPStatus.NOT_FOUND: NotKnownError.type,
    HTTPStatus.CONFLICT: ConflictError.type,
    HTTPStatus.TOO_MANY_REQUESTS: "rate_limit_error",
    HTTPStatus.SERVICE_UNAVAILABLE: OverloadedError.type,
    HTTPStatus.GATEWAY_TIMEOUT: RequestTimeoutError.type,
}


class HttpError(SluiceError):
    """An error of which only the HTTP status and a message are known."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        other = InvalidRequestError.type if status < 500 else SluiceError.type
        self.type = _TYPES.get(status, other)
        self.code = next((s.name.lower() for s in HTTPStatus if s == status), str(status))
