"""What clients get, for the docs: our own objects, and what all engines' answers have in common."""

from datetime import date
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from tasks.contract.access import Role
from tasks.contract.job import State
from tasks.queue.control import WorkerState


class ErrorObject(BaseModel):
    """What went wrong, and what to do."""

    message: str
    type: str
    param: str | None = Field(description="the field that is wrong")
    code: str | int | None


class Error(BaseModel):
    """Every error of this API."""

    error: ErrorObject


class EngineReply(BaseModel):
    """The engine's own fields come as well."""

    model_config = ConfigDict(extra="allow")


class Usage(EngineReply):
    prompt_tokens: int
    total_tokens: int
    completion_tokens: int | None


class Message(EngineReply):
    role: str
    content: str | None


class ChatChoice(EngineReply):
    index: int
    message: Message
    finish_reason: str | None


class ChatCompletion(EngineReply):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class TextChoice(EngineReply):
    index: int
    text: str
    finish_reason: str | None


class Completion(EngineReply):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage


class Embedding(EngineReply):
    index: int
    object: Literal["embedding"]
    embedding: list[float] | str = Field(description="numbers, or base64 if the request said so")


class Embeddings(EngineReply):
    object: Literal["list"]
    model: str
    data: list[Embedding]
    usage: Usage


class Model(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str = Field(description="its kind of engine")
    root: str = Field(description="its name, where `id` is an alias")
    parent: None
    max_model_len: int | None = Field(description="tokens; null until a worker has loaded it")


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[Model]


class Place(BaseModel):
    position: int
    eta_s: float | None
    is_paused: bool = Field(description="whether the operator has paused the model")
    workers: int = Field(description="that serve the model")


class JobResponse(BaseModel):
    status_code: int
    body: Any = Field(description="as if the request had not been streamed")


class Job(BaseModel):
    """A request, wherever it is; times in seconds since 1970."""

    id: str
    object: Literal["job"]
    endpoint: str
    model: str
    priority: str | int = Field(description="as it is given to `POST /v1/jobs`")
    status: State
    created_at: int
    started_at: int | None
    completed_at: int | None
    queue: Place | None = Field(description="where it stands; null once it has started")
    attempts: int
    response: JobResponse | None = Field(description="what the engine answered")
    error: ErrorObject | None
    usage: dict[str, Any] | None
    metadata: dict[str, str]


class JobList(BaseModel):
    object: Literal["list"]
    data: list[Job]
    first_id: str | None
    last_id: str | None
    has_more: bool


class WebhookAttempt(BaseModel):
    at: int
    status_code: int | None
    error: str | None
    duration_ms: int


class WebhookLog(BaseModel):
    object: Literal["webhook_delivery"]
    type: str
    state: str
    next_at: int | None
    attempts: list[WebhookAttempt]


class DeadLetter(BaseModel):
    """A job that was given up; times in seconds since 1970."""

    id: str
    object: Literal["dead_letter"]
    model: str
    endpoint: str
    tenant: str
    attempts: int
    created_at: int
    died_at: int | None
    request_bytes: int


class DeadLetterList(BaseModel):
    object: Literal["list"]
    data: list[DeadLetter]


class FailedAttempt(BaseModel):
    attempt: int
    at: int
    worker: str | None
    reason: str


class DeadLetterWithReasons(DeadLetter):
    reasons: list[FailedAttempt]


class NewJob(BaseModel):
    id: str


class Deleted(BaseModel):
    id: str
    deleted: Literal[True]


class Worker(BaseModel):
    """As its last heartbeat showed it."""

    id: str
    model: str
    slots: int
    state: WorkerState
    running: int
    waiting: int = Field(description="inside the engine")
    kv_cache_usage: float = Field(description="0 to 1")
    ttft_p50_ms: float | None
    ttft_p95_ms: float | None
    metrics_address: str
    max_model_len: int | None


class WorkerList(BaseModel):
    object: Literal["list"]
    data: list[Worker]


class Target(BaseModel):
    targets: list[str]
    labels: dict[str, str]


class Drained(BaseModel):
    id: str
    state: Literal[WorkerState.DRAINING]


class UsageDay(BaseModel):
    """What a tenant's jobs of a model have used that ended on one day."""

    day: date
    tenant: str
    model: str
    jobs: int
    failed_jobs: int
    prompt_tokens: int
    cached_tokens: int = Field(description="of the prompts' tokens, those in the prefix cache")
    completion_tokens: int


class UsageList(BaseModel):
    object: Literal["list"]
    data: list[UsageDay]


class Paused(BaseModel):
    id: str
    is_paused: bool


class ApiKey(BaseModel):
    """A key without its secret; times in seconds since 1970."""

    id: str
    object: Literal["api_key"]
    name: str
    prefix: str = Field(description="how its secret begins")
    tenant: str
    roles: list[Role]
    models: list[str] | None = Field(description="names or aliases; null: all")
    endpoints: list[str] | None = Field(description="null: all")
    weight: float
    limits: dict[str, int]
    is_enabled: bool
    created_at: int
    expires_at: int | None
    last_used_at: int | None = Field(description="to the minute or so")
    old_secret_until: int | None = Field(description="until when the secret before this one lives")


class NewApiKey(ApiKey):
    """With its secret, which is shown this once."""

    key: str


class ApiKeyList(BaseModel):
    object: Literal["list"]
    data: list[ApiKey]
    first_id: str | None
    last_id: str | None
    has_more: bool


class Tenant(BaseModel):
    id: str
    object: Literal["tenant"]
    weight: float
    limits: dict[str, int]
    is_enabled: bool
    created_at: int


class TenantList(BaseModel):
    object: Literal["list"]
    data: list[Tenant]


class ModelEntry(BaseModel):
    """As in models.yaml; of `env` its names alone."""

    model_config = ConfigDict(extra="allow")

    id: str
    object: Literal["model.entry"]
    engine: str
    source: str
    aliases: list[str]
    env: list[str]
    slots: int
    is_in_file: bool = Field(description="whether models.yaml has a model of that name")


class ModelEntryList(BaseModel):
    object: Literal["list"]
    data: list[ModelEntry]


class Live(BaseModel):
    status: Literal["ok"]
    streams: int


class Readiness(BaseModel):
    status: str
    workers: int


class Load(BaseModel):
    server_load: int


class Version(BaseModel):
    version: str


DOCUMENTED: tuple[type[BaseModel], ...] = (
    *(Error, ChatCompletion, Completion, Embeddings, Model, ModelList),
    *(Job, JobList, WebhookLog, DeadLetterList, DeadLetterWithReasons, NewJob, Deleted),
    *(ModelEntry, ModelEntryList),
    *(ApiKey, NewApiKey, ApiKeyList, Tenant, TenantList, UsageDay, UsageList),
    *(WorkerList, Target, Drained, Paused, Live, Readiness, Load, Version),
)
