"""What clients may send: our own objects, checked here; and the engine's, for the docs only."""

import re
from datetime import date
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from tasks.contract.access import MOST_OVERLAP_S, Endpoint, TenantId, whole
from tasks.contract.errors import InvalidRequestError
from tasks.contract.job import LOWEST_PRIORITY, Lane, State

# The form of an event's id; api/job_events.py refuses others.
EVENT_ID = "^[0-9]{1,15}-[0-9]{1,15}$"
# No database takes one.
_NO_NUL = r"^[^\x00]*$"


class ModelPath(BaseModel):
    model_id: str = Field(
        description="a model's name or alias", json_schema_extra={"example": "gpt-3.5-turbo"}
    )


class JobPath(BaseModel):
    job_id: str = Field(max_length=64, pattern=_NO_NUL)


class JobQuery(BaseModel):
    """Which jobs are listed."""

    model_config = ConfigDict(extra="forbid")

    status: State | None = None
    model: str | None = Field(None, pattern=_NO_NUL)
    limit: int = Field(20, ge=1, le=100)
    after: str | None = Field(None, pattern=_NO_NUL)


class DeadQuery(BaseModel):
    """How many dead letters are listed."""

    model_config = ConfigDict(extra="forbid")

    limit: int = Field(50, ge=1, le=1000)


def _as_written(given: str) -> str:
    """A day in no other form of ISO 8601, and no number of seconds."""
    if not re.fullmatch("[0-9]{4}-[0-9]{2}-[0-9]{2}", given):
        raise ValueError("a day is YYYY-MM-DD")
    return given


Day = Annotated[date, BeforeValidator(_as_written)]


class UsageQuery(BaseModel):
    """Which days of usage are shown."""

    model_config = ConfigDict(extra="forbid")

    since: Day | None = Field(None, description="the first day; default: 30 days up to `until`")
    until: Day | None = Field(None, description="the last day; default: today, in UTC")
    format: Literal["json", "csv"] = "json"


class TenantsUsageQuery(UsageQuery):
    tenant: str | None = Field(None, pattern=_NO_NUL, description="of this one only")


class WorkerPath(BaseModel):
    worker_id: str = Field(max_length=256)


class KeyPath(BaseModel):
    key_id: str = Field(max_length=64, pattern=_NO_NUL)


class TenantPath(BaseModel):
    tenant_id: TenantId


class KeyQuery(BaseModel):
    """Which keys are listed."""

    model_config = ConfigDict(extra="forbid")

    tenant: str | None = Field(None, pattern=_NO_NUL)
    limit: int = Field(100, ge=1, le=1000)
    after: str | None = Field(None, pattern=_NO_NUL, description="id of the last one before")


class Rotation(BaseModel):
    """How a key gets a new secret."""

    model_config = ConfigDict(extra="forbid")

    overlap_s: Annotated[float, Field(strict=True)] = Field(
        0, ge=0, le=MOST_OVERLAP_S, description="how long the old secret lives on"
    )


class EventQuery(BaseModel):
    starting_after: str | None = Field(
        None,
        description="id of the last event that was received",
        json_schema_extra={"pattern": EVENT_ID},
    )


Priority = Annotated[
    int,
    Field(strict=True, ge=-LOWEST_PRIORITY, le=LOWEST_PRIORITY),
    BeforeValidator(whole),
]


class JobRequest(BaseModel):
    """A request to be answered in the background."""

    model_config = ConfigDict(extra="forbid")

    endpoint: Endpoint
    body: dict[str, Any] = Field(description="what would be posted to the endpoint")
    priority: Lane | Priority = Field(
        Lane.BATCH, description="a lane, or an order within `batch`: lower ones go first"
    )
    deadline_s: float | None = Field(
        None, gt=0, le=2_592_000, description="from now; it expires when it has not started by then"
    )
    timeout_s: float | None = Field(
        None, gt=0, le=2_592_000, description="from now; it fails when it has not ended by then"
    )
    webhook: Annotated[str, Field(max_length=2000)] | None = Field(
        None, description="URL that is told when the job has ended"
    )
    metadata: dict[
        Annotated[str, Field(max_length=64, pattern=_NO_NUL)],
        Annotated[str, Field(max_length=512, pattern=_NO_NUL)],
    ] = Field(
        default_factory=dict, max_length=16, json_schema_extra={"additionalProperties": False}
    )

    @property
    def place(self) -> tuple[Lane, int]:
        """Lane and priority within it."""
        if isinstance(self.priority, Lane):
            return self.priority, 0
        return Lane.BATCH, self.priority


AnyModel = TypeVar("AnyModel", bound=BaseModel)


def check(kind: type[AnyModel], document: dict[str, Any]) -> AnyModel:
    """The document as that model.

    Raises:
        InvalidRequestError: it is none.
    """
    try:
        return kind.model_validate(document)
    except ValidationError as refused:
        raise refusal(refused) from None


def refusal(refused: ValidationError) -> InvalidRequestError:
    """The first thing that is wrong, in OpenAI's shape."""
    first = refused.errors()[0]
    # Pydantic names the members of a union too, in brackets.
    param = ".".join(str(part) for part in first["loc"] if "[" not in str(part)) or None
    return InvalidRequestError(f"{param or 'The body'}: {first['msg']}.", param=param)


_QUESTION = [{"role": "user", "content": "What is Sluice?"}]
_MODEL = {"type": "string", "description": "name or alias; the default model when missing"}
_STREAM = {"type": "boolean", "default": False}
_MAX_TOKENS = {"type": "integer", "minimum": 1}
_TEMPERATURE = {"type": "number", "minimum": 0}
_CHAT_MESSAGE = {
    "type": "object",
    "required": ["role", "content"],
    "properties": {
        "role": {"type": "string"},
        "content": {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}]},
    },
}
_TEXTS = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}},
        {"type": "array", "items": {"type": "integer"}},
        {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}},
    ],
    "description": "a text, token ids, or several",
}

_SCHEMAS: dict[str, dict[str, Any]] = {
    "ChatCompletionRequest": {
        "anyOf": [{"required": ["messages"]}, {"required": ["message"]}],
        "properties": {
            "model": _MODEL,
            "messages": {"type": "array", "items": _CHAT_MESSAGE, "minItems": 1},
            "message": {"type": "string", "description": "short form, instead of messages"},
            "stream": _STREAM,
            "max_tokens": _MAX_TOKENS,
            "temperature": _TEMPERATURE,
        },
    },
    "CompletionRequest": {
        "required": ["prompt"],
        "properties": {
            "model": _MODEL,
            "prompt": _TEXTS,
            "stream": _STREAM,
            "max_tokens": _MAX_TOKENS,
            "temperature": _TEMPERATURE,
        },
    },
    "EmbeddingRequest": {
        "required": ["input"],
        "properties": {"model": _MODEL, "input": _TEXTS},
    },
}
# They run on the demo model, but for the embeddings, which no model for chats has.
_EXAMPLES: dict[str, dict[str, Any]] = {
    "ChatCompletionRequest": {
        "question": {"messages": _QUESTION, "max_tokens": 64},
        "streamed": {"messages": _QUESTION, "stream": True},
        "short form": {"message": "Hello"},
    },
    "CompletionRequest": {"text": {"prompt": "Sluice is", "max_tokens": 16}},
    "EmbeddingRequest": {"text": {"input": "What is Sluice?"}},
    "JobRequest": {
        "question": {
            "endpoint": "/v1/chat/completions",
            "body": {"messages": _QUESTION},
            "metadata": {"for": "docs"},
        }
    },
}


def body(name: str) -> dict[str, Any]:
    """The request body of an operation, with examples: a schema of the document's components."""
    examples = {each: {"value": value} for each, value in _EXAMPLES[name].items()}
    return {"schema": {"$ref": f"#/components/schemas/{name}"}, "examples": examples}


def engine_schemas() -> dict[str, dict[str, Any]]:
    """What engines take: the common fields; all others go to the engine as well."""
    return {name: {"type": "object"} | schema for name, schema in _SCHEMAS.items()}
