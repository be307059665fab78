"""API keys and their tenants. A secret is in no table: it is shown once, and its digest kept."""

import hashlib
import secrets
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, NamedTuple

from sqlalchemy import literal, or_, select, update
from uuid_utils import uuid7

from db.models import ApiKey, Tenant
from db.session import database_now, insert_new, reading, writing

SECRET_PREFIX = "sk-"  # noqa: S105 (its beginning)
SECRET_BYTES = 32
SHOWN_CHARACTERS = 9
USE_NOTED_S = 60


class Secret(NamedTuple):
    """A new secret, and what is kept of it."""

    text: str
    prefix: str
    digest: str


def new_secret() -> Secret:
    """A secret of 256 random bits."""
    text = SECRET_PREFIX + secrets.token_urlsafe(SECRET_BYTES)
    return Secret(text, text[:SHOWN_CHARACTERS], digest_of(text))


def digest_of(secret: str) -> str:
    """What is kept of a secret, and looked up.

    Slow hashes make the guessing of passwords expensive; nobody guesses 256 random bits. And who
    tries has no say in the digest, so the time that its look-up takes reveals nothing of a secret.
    """
    return hashlib.sha256(secret.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class FoundKey:
    """A key as it is to be judged; whether it may be used is not decided by where it was found."""

    id: str
    tenant: str
    roles: tuple[str, ...]
    models: tuple[str, ...] | None
    endpoints: tuple[str, ...] | None
    weight: float
    """Its own times that of its tenant."""
    limits: tuple[dict[str, Any], ...]
    """Its own and those of its tenant, as queue/limits.py has them."""
    is_enabled: bool
    """So are its tenant, and the secret that it was found by."""
    lives_s: float | None
    """From now, by the database's clock; None: for ever."""


@dataclass(frozen=True, slots=True)
class Found:
    """What was found of some digests."""

    keys: dict[str, FoundKey] = field(default_factory=dict)
    """By the digest."""
    has_any: bool = False
    """Whether there are keys at all, revoked ones included."""


def find(url: str, digests: Collection[str]) -> Found:
    """The keys with these digests, also those that may not be used."""
    with reading(url) as session:
        has_any = session.scalar(select(literal(1)).select_from(ApiKey).limit(1)) is not None
        if not digests or not has_any:
            return Found(has_any=has_any)
        now = database_now(session)
        query = select(ApiKey, Tenant).join(Tenant, Tenant.id == ApiKey.tenant)
        query = query.where(or_(ApiKey.digest.in_(digests), ApiKey.old_digest.in_(digests)))
        found: dict[str, FoundKey] = {}
        for key, tenant in session.execute(query):
            found[key.digest] = _judge(key, tenant, now, key.expires_at)
            if key.old_digest and key.old_until:
                ends = [end for end in (key.expires_at, key.old_until) if end]
                found[key.old_digest] = _judge(key, tenant, now, min(ends))
        return Found(found, has_any)


def _judge(key: ApiKey, tenant: Tenant, now: datetime, ends_at: datetime | None) -> FoundKey:
    owners = ((f"key:{key.id}", key.limits), (f"tenant:{tenant.id}", tenant.limits))
    limits = [
        {name: most for name, most in limits.items() if most is not None} | {"subject": subject}
        for subject, limits in owners
    ]
    return FoundKey(
        key.id,
        key.tenant,
        tuple(key.roles),
        None if key.models is None else tuple(key.models),
        None if key.endpoints is None else tuple(key.endpoints),
        key.weight * tenant.weight,
        tuple(each for each in limits if len(each) > 1),
        key.is_enabled and tenant.is_enabled,
        (ends_at - now).total_seconds() if ends_at else None,
    )


def any_key(url: str) -> bool:
    """Whether there are keys, revoked ones included."""
    return find(url, ()).has_any


def note_used(url: str, key_ids: Collection[str]) -> None:
    """Notes that these were used just now; of each only once a minute, whoever calls it."""
    with writing(url) as session:
        now = database_now(session)
        earlier = now - timedelta(seconds=USE_NOTED_S)
        query = update(ApiKey).where(
            ApiKey.id.in_(key_ids),
            or_(ApiKey.last_used_at.is_(None), ApiKey.last_used_at <= earlier),
        )
        session.connection().execute(query.values(last_used_at=now))


def create(url: str, secret: Secret, terms: dict[str, Any]) -> ApiKey:
    """Stores a new key with these values of its columns; tenants are never deleted."""
    own: dict[str, Any] = {"prefix": secret.prefix, "digest": secret.digest}
    with writing(url) as session:
        key = ApiKey(id=f"key_{uuid7().hex}", created_at=database_now(session), **own, **terms)
        session.add(key)
        return key


def change(url: str, key_id: str, terms: dict[str, Any]) -> ApiKey | None:
    """Gives the key's columns these values; None: there is none of that id."""
    with writing(url) as session:
        key = session.get(ApiKey, key_id)
        for name, value in terms.items() if key else ():
            setattr(key, name, value)
        session.flush()
        return key


def rotate(url: str, key_id: str, secret: Secret, overlap_s: float) -> ApiKey | None:
    """Gives the key another secret; the one before lives on for so long.

    None: there is none of that id, or it is revoked.
    """
    with writing(url) as session:
        key = session.get(ApiKey, key_id)
        if key is None or not key.is_enabled:
            return None
        old_until = database_now(session) + timedelta(seconds=overlap_s)
        key.old_digest, key.old_until = (key.digest, old_until) if overlap_s else (None, None)
        key.prefix, key.digest = secret.prefix, secret.digest
        session.flush()
        return key


def get(url: str, key_id: str) -> ApiKey | None:
    """The key."""
    with reading(url) as session:
        return session.get(ApiKey, key_id)


def page(url: str, tenant: str | None, after: str | None, limit: int) -> Sequence[ApiKey]:
    """Keys in the order in which they were made, of one tenant or of all."""
    query = select(ApiKey).order_by(ApiKey.id).limit(limit)
    if tenant is not None:
        query = query.where(ApiKey.tenant == tenant)
    if after is not None:
        query = query.where(ApiKey.id > after)
    with reading(url) as session:
        return session.scalars(query).all()


def set_tenant(url: str, tenant_id: str, terms: dict[str, Any]) -> Tenant:
    """Makes the tenant, or gives the one that is there these values."""
    with writing(url) as session:
        new = Tenant(id=tenant_id, created_at=database_now(session), **terms)
        insert_new(session, [new])
        tenant = session.get_one(Tenant, tenant_id)
        for name, value in terms.items():
            setattr(tenant, name, value)
        session.flush()
        return tenant


def get_tenant(url: str, tenant_id: str) -> Tenant | None:
    """The tenant."""
    with reading(url) as session:
        return session.get(Tenant, tenant_id)


def tenants(url: str) -> Sequence[Tenant]:
    """All tenants, by name."""
    with reading(url) as session:
        return session.scalars(select(Tenant).order_by(Tenant.id)).all()
