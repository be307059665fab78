"""OpenAI's endpoints: the request is checked for what routing needs, the rest is the engine's."""

from typing import Any

from flask import Response, request
from flask_openapi3 import APIBlueprint, Tag
from redis.exceptions import RedisError

from api import replies, schemas
from api.access import get_principal
from api.generation import AnsweredError, Generation
from api.intake import TIMEOUT, Call, Preference, read_body
from api.job_view import stored_response
from api.openapi import (
    ACCEPTANCE_ERRORS,
    BODY_ERRORS,
    CHUNKS,
    EVENTS,
    GENERATION_ERRORS,
    JSON,
    KEY,
    LATER,
    LEAVE,
    OF_ANSWER,
    PREFER,
    Given,
    given,
    operation,
)
from api.routes.jobs import accept_call
from api.services import get_services
from tasks.contract.errors import ModelNotAllowedError, ModelNotFoundError
from tasks.contract.models import Model
from tasks.queue import control

blueprint = APIBlueprint("openai", __name__)
GENERATION = [Tag(name="Generation", description="Answered by the model's engine")]
MODELS = [Tag(name="Models", description="What this deployment serves")]


def _generating(body: str, gives: dict[str, Any]) -> dict[str, Any]:
    """What the docs say of an endpoint that the engine answers, by content type."""
    return operation(
        {200: Given("The engine's answer", gives, OF_ANSWER), 202: LATER},
        (*BODY_ERRORS, *ACCEPTANCE_ERRORS, *GENERATION_ERRORS),
        body=schemas.body(body),
        takes=(PREFER, KEY, LEAVE, TIMEOUT),
        engine=(400, 404, 500, 501),
    )


@blueprint.post(
    "/v1/chat/completions",
    tags=GENERATION,
    summary="Chat with a model",
    openapi_extensions=_generating(
        "ChatCompletionRequest", {JSON: replies.ChatCompletion, EVENTS: CHUNKS}
    ),
)
def chat_completions() -> Response:
    """OpenAI's chat completions, with every parameter of the engine; SSE when `stream` is true.

    The short form `{"message": "Hello"}` asks the default model and streams.
    """
    return _generate("/v1/chat/completions")


@blueprint.post(
    "/v1/completions",
    tags=GENERATION,
    summary="Continue a text",
    openapi_extensions=_generating("CompletionRequest", {JSON: replies.Completion, EVENTS: CHUNKS}),
)
def completions() -> Response:
    """OpenAI's text completions, with every parameter of the engine; SSE when `stream` is true."""
    return _generate("/v1/completions")


@blueprint.post(
    "/v1/embeddings",
    tags=GENERATION,
    summary="Embed texts",
    openapi_extensions=_generating("EmbeddingRequest", {JSON: replies.Embeddings}),
)
def embeddings() -> Response:
    """OpenAI's embeddings, where the model supports them; the engine's error where not."""
    return _generate("/v1/embeddings")


@blueprint.get(
    "/v1/models",
    tags=MODELS,
    summary="List models",
    openapi_extensions=operation({200: given("All models", replies.ModelList)}),
)
def list_models() -> dict[str, Any]:
    """Every name that requests with this key may use, aliases included."""
    names, lengths = get_principal().names(get_services().catalog), _lengths()
    cards = [_card(name, model, lengths) for name, model in names.items()]
    return {"object": "list", "data": cards}


@blueprint.get(
    "/v1/models/<path:model_id>",
    tags=MODELS,
    summary="Get a model",
    openapi_extensions=operation(
        {200: given("The model", replies.Model)}, (ModelNotFoundError, ModelNotAllowedError)
    ),
)
def get_model(path: schemas.ModelPath) -> dict[str, Any]:
    """The model of that name or alias."""
    model = get_principal().resolve(get_services().catalog, path.model_id)
    return _card(path.model_id, model, _lengths())


def _generate(endpoint: str) -> Response:
    services, principal = get_services(), get_principal()
    call = Call.read(services, principal, endpoint, read_body(), request.headers)
    if Preference.read(request.headers).is_async:
        return accept_call(services, call)
    try:
        generation = Generation(services, call, request.environ.get("gunicorn.socket"))
    except AnsweredError as answered:
        return stored_response(services, principal.tenant, answered.job_id)
    return generation.respond(call.wants_stream)


def _lengths() -> dict[str, int]:
    """The context lengths of the models whose workers have told them."""
    try:
        found = control.workers(get_services().redis)
    except RedisError:
        return {}  # the list is known all the same
    return {worker.model: worker.max_model_len for worker in found if worker.max_model_len}


def _card(name: str, model: Model, lengths: dict[str, int]) -> dict[str, Any]:
    """As vLLM's own: `max_model_len` is null until a worker of the model has loaded it."""
    return {
        "id": name,
        "object": "model",
        "created": get_services().started_s,
        "owned_by": model.engine,
        "root": model.name,
        "parent": None,
        "max_model_len": lengths.get(model.name),
    }
