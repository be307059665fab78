"""What every request of an API process shares."""

import time
from dataclasses import dataclass

from flask import current_app
from redis import Redis

from api.acceptance import Acceptance
from api.keyring import Keyring
from api.lookups import Lookups
from api.model_book import ModelBook
from api.queue_positions import QueuePositions
from api.relay import Relay
from api.routing import Router
from tasks.contract.connections import connect
from tasks.contract.models import Catalog, get_catalog
from tasks.contract.settings import Settings, get_settings
from tasks.queue.jobs import Jobs


@dataclass(frozen=True)
class Services:
    """The parts behind the routes; held by the app as `app.extensions["sluice"]`."""

    settings: Settings
    keyring: Keyring
    models: ModelBook
    router: Router
    redis: Redis
    jobs: Jobs
    relay: Relay
    queue_positions: QueuePositions
    acceptance: Acceptance
    lookups: Lookups
    started_s: int

    @classmethod
    def start(cls, *, may_be_open: bool) -> "Services":
        """Connects, and starts what runs beside the requests.

        `may_be_open`: no key is needed while there is none.
        """
        settings = get_settings()
        url, grace_s = settings.database_url, settings.key_grace_s
        keyring = Keyring(url, settings.admin_key, grace_s, may_be_open=may_be_open)
        redis = connect(settings.redis_url)
        jobs = Jobs(redis, connect(settings.bus_url))
        relay = Relay(settings.bus_url, jobs.log)
        queue_positions = QueuePositions(redis, jobs.backlog)
        acceptance = Acceptance(jobs, settings.database_url)
        models = ModelBook(url, redis, get_catalog())
        router = Router(jobs.backlog, models, settings.max_backlog)
        for part in (keyring, models, router, relay, queue_positions, acceptance):
            part.start()
        return cls(
            settings,
            keyring,
            models,
            router,
            redis,
            jobs,
            relay,
            queue_positions,
            acceptance,
            Lookups(),
            started_s=int(time.time()),
        )

    @property
    def catalog(self) -> Catalog:
        """The models as they are now."""
        return self.models.catalog


def get_services() -> Services:
    """The services of the app that handles the current request."""
    services: Services = current_app.extensions["sluice"]
    return services
