"""Models that are added or changed at run time, where workers find them: they do not reach SQL."""

import logging
from collections.abc import Mapping
from typing import Any

import orjson
from redis import Redis

from tasks.contract import keys
from tasks.contract.errors import ConfigurationError
from tasks.contract.models import Catalog

log = logging.getLogger(__name__)

Entries = Mapping[str, dict[str, Any] | None]
"""By name; None: the model is removed."""


def publish(redis: Redis, entries: Entries) -> None:
    """Has workers that start from now on find these, and no others."""
    redis.set(keys.MODEL_ENTRIES, orjson.dumps(entries))


def apply(redis: Redis, catalog: Catalog) -> Catalog:
    """The catalog with what was published.

    Raises:
        RedisError: Redis does not answer.
    """
    found: Any = redis.get(keys.MODEL_ENTRIES)
    return catalog.changed(fitting(catalog, orjson.loads(found))) if found else catalog


def fitting(catalog: Catalog, entries: Entries) -> Entries:
    """The entries that go together with the catalog, which may have changed since they were made.

    One that does not is left out; what is removed stays so.
    """
    fit: dict[str, dict[str, Any] | None] = {}
    left = dict(entries)
    # One may need another that comes later.
    while found := next((name for name in left if _fits(catalog, fit, name, left[name])), None):
        fit[found] = left.pop(found)
    for name in left:
        log.warning(
            "the model %r is as in models.yaml: its entry does not go with the others", name
        )
    return fit


def _fits(catalog: Catalog, fit: Entries, name: str, entry: dict[str, Any] | None) -> bool:
    try:
        catalog.changed({**fit, name: entry})
    except ConfigurationError:
        return False
    return True
