"""Keys and tenants as operators see them, over HTTP and at the command line."""

from datetime import UTC, datetime
from typing import Any

from db import keys
from db.models import ApiKey, Tenant
from tasks.contract.access import KeySpec, Role, TenantSpec
from tasks.contract.errors import ConflictError, InvalidRequestError, NotKnownError

Document = dict[str, Any]


def create(url: str, spec: KeySpec) -> Document:
    """Makes a key; `key`, its secret, is in this answer and nowhere else.

    Raises:
        InvalidRequestError: there is no such tenant.
    """
    _check_tenant(url, spec.tenant)
    secret = keys.new_secret()
    made = keys.create(url, secret, _columns(spec))
    return describe(made) | {"key": secret.text}


def change(url: str, key_id: str, spec: KeySpec) -> Document:
    """Gives the key all that it is to be; its secret stays.

    Raises:
        NotKnownError: there is no such key.
        InvalidRequestError: there is no such tenant.
    """
    _check_tenant(url, spec.tenant)
    return describe(_known(keys.change(url, key_id, _columns(spec)), key_id))


def revoke(url: str, key_id: str) -> Document:
    """Has the key refused from now on, and its open streams end.

    Raises:
        NotKnownError: there is no such key.
    """
    gone = {"is_enabled": False, "old_digest": None, "old_until": None}
    return describe(_known(keys.change(url, key_id, gone), key_id))


def rotate(url: str, key_id: str, overlap_s: float) -> Document:
    """Gives the key a new secret, shown as by `create`; the old one lives on for so long.

    Raises:
        NotKnownError: there is no such key.
        ConflictError: it is revoked.
    """
    if not _known(keys.get(url, key_id), key_id).is_enabled:
        raise ConflictError("The key is revoked; make a new one.")
    secret = keys.new_secret()
    made = _known(keys.rotate(url, key_id, secret, overlap_s), key_id)
    return describe(made) | {"key": secret.text}


def show(url: str, key_id: str) -> Document:
    """The key without its secret.

    Raises:
        NotKnownError: there is no such key.
    """
    return describe(_known(keys.get(url, key_id), key_id))


def show_tenant(url: str, tenant_id: str) -> Document:
    """The tenant.

    Raises:
        NotKnownError: there is no such tenant.
    """
    tenant = keys.get_tenant(url, tenant_id)
    if tenant is None:
        raise NotKnownError(f"There is no tenant {tenant_id!r}.")
    return describe_tenant(tenant)


def set_tenant(url: str, tenant_id: str, spec: TenantSpec) -> Document:
    """Makes the tenant, or gives the one that is there all that it is to be."""
    return describe_tenant(keys.set_tenant(url, tenant_id, spec.model_dump(exclude_none=True)))


def describe(key: ApiKey) -> Document:
    """The object that clients see."""
    return {
        "id": key.id,
        "object": "api_key",
        "name": key.name,
        "prefix": key.prefix,
        "tenant": key.tenant,
        "roles": key.roles,
        "models": key.models,
        "endpoints": key.endpoints,
        "weight": key.weight,
        "limits": key.limits,
        "is_enabled": key.is_enabled,
        "created_at": _seconds(key.created_at),
        "expires_at": _seconds(key.expires_at),
        "last_used_at": _seconds(key.last_used_at),
        "old_secret_until": _seconds(key.old_until),
    }


def describe_tenant(tenant: Tenant) -> Document:
    """The object that clients see."""
    return {
        "id": tenant.id,
        "object": "tenant",
        "weight": tenant.weight,
        "limits": tenant.limits,
        "is_enabled": tenant.is_enabled,
        "created_at": _seconds(tenant.created_at),
    }


def _columns(spec: KeySpec) -> dict[str, Any]:
    terms = spec.model_dump() | {"limits": spec.limits.model_dump(exclude_none=True)}
    # In one order, whichever they were given in.
    terms["roles"] = [role.value for role in Role if role in spec.roles]
    if spec.is_enabled is None:
        del terms["is_enabled"]
    at = spec.expires_at
    return terms | {"expires_at": at and datetime.fromtimestamp(at, UTC)}


def _check_tenant(url: str, tenant_id: str) -> None:
    if keys.get_tenant(url, tenant_id) is None:
        raise InvalidRequestError(
            f"There is no tenant {tenant_id!r}; make it with `sluice tenants set {tenant_id}` or "
            f"PUT /v1/admin/tenants/{tenant_id}.",
            param="tenant",
        )


def _known(key: ApiKey | None, key_id: str) -> ApiKey:
    if key is None:
        raise NotKnownError(f"There is no key {key_id!r}.")
    return key


def _seconds(moment: datetime | None) -> int | None:
    return None if moment is None else int(moment.timestamp())
