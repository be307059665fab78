"""What admins do with models while Sluice runs."""

from typing import Any

from flask_openapi3 import APIBlueprint

from api import replies, schemas
from api.intake import read_body, read_object
from api.openapi import BODY_ERRORS, STORE_ERRORS, given, operation
from api.routes.admin import ADMIN
from api.services import get_services
from tasks.contract.errors import ConflictError, ModelNotFoundError
from tasks.maintenance import model_entries

blueprint = APIBlueprint("model_entries", __name__)
Document = dict[str, Any]
ENTRY = {"schema": {"type": "object", "description": "as in models.yaml, without its name"}}


@blueprint.get(
    "/v1/admin/models",
    tags=ADMIN,
    summary="List models and their entries",
    openapi_extensions=operation({200: given("All models", replies.ModelEntryList)}, STORE_ERRORS),
)
def list_entries() -> Document:
    """Those of models.yaml, and what was added or changed since."""
    services = get_services()
    found = model_entries.listed(services.settings.database_url, services.models.seed)
    return {"object": "list", "data": found}


@blueprint.put(
    "/v1/admin/models/<model:model_id>",
    tags=ADMIN,
    summary="Add or change a model",
    openapi_extensions=operation(
        {200: given("The model", replies.ModelEntry)},
        (*BODY_ERRORS, *STORE_ERRORS),
        body=ENTRY,
    ),
)
def put(path: schemas.ModelPath) -> Document:
    """All processes of the API know it within seconds; workers that serve it are started by you."""
    services = get_services()
    url, seed = services.settings.database_url, services.models.seed
    made = model_entries.put(url, seed, path.model_id, read_object(read_body()))
    services.models.refresh()
    return made


@blueprint.delete(
    "/v1/admin/models/<model:model_id>",
    tags=ADMIN,
    summary="Remove a model",
    openapi_extensions=operation(
        {200: given("It is removed", replies.Deleted)},
        (ModelNotFoundError, ConflictError, *STORE_ERRORS),
    ),
)
def remove(path: schemas.ModelPath) -> Document:
    """Requests for it are 404 from then on; jobs that are queued wait for a worker of it."""
    services = get_services()
    url, seed = services.settings.database_url, services.models.seed
    removed = model_entries.remove(url, seed, path.model_id)
    services.models.refresh()
    return removed
