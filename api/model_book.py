"""The models as they are now: models.yaml, and what was changed since, some seconds ago at most."""

import logging

import gevent
from redis import Redis
from redis.exceptions import RedisError
from sqlalchemy.exc import SQLAlchemyError

from db import model_entries
from tasks.contract.models import Catalog
from tasks.queue import entries

log = logging.getLogger(__name__)

REFRESH_S = 2.0


class ModelBook:
    """Keeps an API process's catalog up to date, and what workers find in Redis."""

    def __init__(self, url: str, redis: Redis, seed: Catalog) -> None:
        self.seed = seed
        """What models.yaml has."""
        self.catalog = seed
        self._url = url
        self._redis = redis
        self._known: entries.Entries = {}
        self._is_away = False

    def start(self) -> None:
        """Starts the greenlet that reads."""
        gevent.spawn(self._read_for_ever)

    def refresh(self) -> None:
        """Reads the changes.

        Raises:
            SQLAlchemyError: the database is away.
            RedisError: workers cannot be told.
        """
        found = model_entries.read(self._url)
        if found != self._known:
            self.catalog = self.seed.changed(entries.fitting(self.seed, found))
            self._known = found
        # Each time: Redis may have lost them.
        entries.publish(self._redis, found)

    def _read_for_ever(self) -> None:
        while True:
            try:
                self.refresh()
                self._is_away = False
            except (SQLAlchemyError, RedisError) as failure:
                if not self._is_away:
                    log.warning("models: changes are not known, the last ones count: %s", failure)
                self._is_away = True
            except Exception:  # without this greenlet no change is seen any more
                log.exception("models: a round failed, and the next one comes")
            gevent.sleep(REFRESH_S)
