"""Models that are added or changed at run time, where workers find them: they do not reach SQL."""

from collections.abc import Mapping
from typing import Any

import orjson
from redis import Redis

from tasks.contract import keys
from tasks.contract.models import Catalog

Entries = Mapping[str, dict[str, Any] | None]
"""By name; None: the model is removed."""


def publish(redis: Redis, entries: Entries) -> None:
    """Has workers that start from now on find these, and no others."""
    redis.set(keys.MODEL_ENTRIES, orjson.dumps(entries))


def apply(redis: Redis, catalog: Catalog) -> Catalog:
    """The catalog with what was published.

    Raises:
        ConfigurationError: it does not go together with what models.yaml has by now.
        RedisError: Redis does not answer.
    """
    found: Any = redis.get(keys.MODEL_ENTRIES)
    return catalog.changed(orjson.loads(found)) if found else catalog
