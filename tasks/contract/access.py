"""Who may do what: roles, and what is asked for when a key or a tenant is made."""

import time
from enum import StrEnum
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

DEFAULT_TENANT = "default"
MOST_NAMES = 100
LEAST_WEIGHT, MOST_WEIGHT = 0.001, 1000
MOST_OVERLAP_S = 30 * 86_400


class Role(StrEnum):
    """What a key may do. `admin` includes the others; these do not include each other."""

    USER = "user"
    """Use models, and look after its tenant's jobs."""
    OPERATOR = "operator"
    """Look after the deployment: metrics, dead letters, workers, pauses; of all tenants."""
    ADMIN = "admin"
    """Make keys and tenants."""


def whole(given: Any) -> Any:
    """For JSON, 5.0 is an integer."""
    return int(given) if isinstance(given, float) and given.is_integer() else given


def _in_future(moment: int) -> int:
    if moment <= time.time():
        raise ValueError("is in the past")
    return moment


def _without_repetition(values: list[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


# In keys of Redis a colon ends it.
TenantId = Annotated[str, Field(max_length=64, pattern="^[a-z0-9][a-z0-9._-]*$")]
Name = Annotated[str, Field(min_length=1, max_length=100, pattern=r"^[^\x00-\x1f\x7f]+$")]
Weight = Annotated[float, Field(strict=True, ge=LEAST_WEIGHT, le=MOST_WEIGHT)]
Limit = Annotated[int, Field(strict=True, ge=1, lt=2**53), BeforeValidator(whole)]
Endpoint = Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings"]
Moment = Annotated[
    int,
    Field(strict=True, ge=1, lt=2**34),
    BeforeValidator(whole),
    AfterValidator(_in_future),
]


class Limits(BaseModel):
    """What a key or a tenant may use; what is null is not limited."""

    model_config = ConfigDict(extra="forbid")

    requests_per_minute: Limit | None = None
    tokens_per_minute: Limit | None = None
    parallel_requests: Limit | None = None
    queued_jobs: Limit | None = None
    tokens_per_day: Limit | None = None
    tokens_per_month: Limit | None = None
    # Of each request.
    tokens_per_answer: Limit | None = None
    tokens_when_busy: Limit | None = None
    sequences_per_request: Limit | None = None
    logprobs_per_token: Limit | None = None
    bytes_per_request: Limit | None = None


class Left(NamedTuple):
    """What is left of a limit per minute, after the request itself."""

    most: int
    left: int
    resets_s: float
    """Until all of it is there again, if nothing else is sent."""


class Allowance(NamedTuple):
    """What the strictest limits per minute leave a key; None: there is none."""

    requests: Left | None
    tokens: Left | None


class TenantSpec(BaseModel):
    """What a tenant is to be."""

    model_config = ConfigDict(extra="forbid")

    weight: Weight = Field(1.0, description="its share of the queue, beside other tenants")
    limits: Limits = Field(default_factory=Limits)
    is_enabled: Annotated[bool, Field(strict=True)] | None = Field(
        None, description="false: all its keys are refused; null: as it is"
    )


class KeySpec(BaseModel):
    """What a key is to be."""

    model_config = ConfigDict(extra="forbid")

    name: Name = Field(description="whose it is, or what for")
    tenant: TenantId = DEFAULT_TENANT
    roles: Annotated[list[Role], AfterValidator(_without_repetition)] = Field(
        [Role.USER], min_length=1, max_length=len(Role)
    )
    models: Annotated[list[Name], AfterValidator(_without_repetition)] | None = Field(
        None,
        min_length=1,
        max_length=MOST_NAMES,
        description="names or aliases of the models that it may use; null: all",
    )
    endpoints: Annotated[list[Endpoint], AfterValidator(_without_repetition)] | None = Field(
        None, min_length=1, max_length=3, description="that it may use; null: all"
    )
    weight: Weight = Field(1.0, description="its jobs' share, times that of its tenant")
    limits: Limits = Field(default_factory=Limits)
    expires_at: Moment | None = Field(None, description="seconds since 1970; null: never")
    is_enabled: Annotated[bool, Field(strict=True)] | None = Field(
        None, description="false: revoked; null: as it is"
    )
