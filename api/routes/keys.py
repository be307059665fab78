"""What admins do over HTTP: keys and tenants."""

from typing import Any

from flask_openapi3 import APIBlueprint, Tag

from api import replies, schemas
from api.intake import read_body, read_object
from api.openapi import BODY_ERRORS, Given, given, operation
from api.services import get_services
from db import keys
from tasks.contract.access import KeySpec, TenantSpec
from tasks.contract.errors import ConflictError, InvalidRequestError, NotKnownError, SluiceError
from tasks.maintenance import api_keys

blueprint = APIBlueprint("keys", __name__)
KEYS = [Tag(name="Keys", description="For admins: who may use what")]
A_KEY = {200: given("The key", replies.ApiKey)}
SHOWN = "The key, with its secret: it is shown this once"
Document = dict[str, Any]


def _operation(
    gives: dict[int, Given], *refuses: type[SluiceError], body: str = ""
) -> dict[str, Any]:
    schema = {"schema": {"$ref": f"#/components/schemas/{body}"}} if body else None
    return operation(gives, (InvalidRequestError, *refuses), body=schema)


@blueprint.get(
    "/v1/admin/keys",
    tags=KEYS,
    summary="List keys",
    openapi_extensions=_operation({200: given("A page of keys", replies.ApiKeyList)}),
)
def list_keys(query: schemas.KeyQuery) -> Document:
    """In the order in which they were made, revoked ones included."""
    found = keys.page(_url(), query.tenant, query.after, query.limit + 1)
    page = [api_keys.describe(key) for key in found[: query.limit]]
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": len(found) > query.limit,
    }


@blueprint.post(
    "/v1/admin/keys",
    tags=KEYS,
    summary="Make a key",
    openapi_extensions=_operation(
        {201: given(SHOWN, replies.NewApiKey)}, *BODY_ERRORS, body="KeySpec"
    ),
)
def create_key() -> tuple[Document, int]:
    """The first one has every request need a key from then on."""
    return api_keys.create(_url(), _read(KeySpec)), 201


@blueprint.get(
    "/v1/admin/keys/<string:key_id>",
    tags=KEYS,
    summary="Get a key",
    openapi_extensions=_operation(A_KEY, NotKnownError),
)
def show_key(path: schemas.KeyPath) -> Document:
    """Without its secret."""
    return api_keys.show(_url(), path.key_id)


@blueprint.put(
    "/v1/admin/keys/<string:key_id>",
    tags=KEYS,
    summary="Change a key",
    openapi_extensions=_operation(A_KEY, NotKnownError, *BODY_ERRORS, body="KeySpec"),
)
def change_key(path: schemas.KeyPath) -> Document:
    """Everything but its secret: what is left out becomes as if the key were made like that."""
    return api_keys.change(_url(), path.key_id, _read(KeySpec))


@blueprint.post(
    "/v1/admin/keys/<string:key_id>/revoke",
    tags=KEYS,
    summary="Revoke a key",
    openapi_extensions=_operation(A_KEY, NotKnownError),
)
def revoke_key(path: schemas.KeyPath) -> Document:
    """It is refused within seconds by every API process, and its open streams end."""
    return api_keys.revoke(_url(), path.key_id)


@blueprint.post(
    "/v1/admin/keys/<string:key_id>/rotate",
    tags=KEYS,
    summary="Give a key a new secret",
    openapi_extensions=_operation(
        {200: given(SHOWN, replies.NewApiKey)},
        NotKnownError,
        ConflictError,
        *BODY_ERRORS,
        body="Rotation",
    ),
)
def rotate_key(path: schemas.KeyPath) -> Document:
    """The old one is refused at once, or after `overlap_s`."""
    return api_keys.rotate(_url(), path.key_id, _read(schemas.Rotation).overlap_s)


@blueprint.get(
    "/v1/admin/tenants",
    tags=KEYS,
    summary="List tenants",
    openapi_extensions=_operation({200: given("All tenants", replies.TenantList)}),
)
def list_tenants() -> Document:
    """By name."""
    found = [api_keys.describe_tenant(tenant) for tenant in keys.tenants(_url())]
    return {"object": "list", "data": found}


@blueprint.get(
    "/v1/admin/tenants/<string:tenant_id>",
    tags=KEYS,
    summary="Get a tenant",
    openapi_extensions=_operation({200: given("The tenant", replies.Tenant)}, NotKnownError),
)
def show_tenant(path: schemas.TenantPath) -> Document:
    """Whom keys and jobs belong to."""
    return api_keys.show_tenant(_url(), path.tenant_id)


@blueprint.put(
    "/v1/admin/tenants/<string:tenant_id>",
    tags=KEYS,
    summary="Make or change a tenant",
    openapi_extensions=_operation(
        {200: given("The tenant", replies.Tenant)}, *BODY_ERRORS, body="TenantSpec"
    ),
)
def set_tenant(path: schemas.TenantPath) -> Document:
    """What is left out becomes as with a new one."""
    return api_keys.set_tenant(_url(), path.tenant_id, _read(TenantSpec))


def _read(kind: type[schemas.AnyModel]) -> schemas.AnyModel:
    return schemas.check(kind, read_object(read_body()))


def _url() -> str:
    return get_services().settings.database_url
