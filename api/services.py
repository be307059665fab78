"""What every request of an API process shares."""

import time
from dataclasses import dataclass

from flask import current_app
from redis import Redis

from api.acceptance import Acceptance
from api.lookups import Lookups
from api.places import Places
from api.relay import Relay
from tasks.connections import connect
from tasks.jobs import Jobs
from tasks.models import Catalog, get_catalog
from tasks.settings import Settings, get_settings

# Until there are keys, everybody is this one.
TENANT = "default"


@dataclass(frozen=True)
class Services:
    """The parts behind the routes; held by the app as `app.extensions["sluice"]`."""

    settings: Settings
    catalog: Catalog
    redis: Redis
    jobs: Jobs
    relay: Relay
    places: Places
    acceptance: Acceptance
    lookups: Lookups
    started_s: int

    @classmethod
    def start(cls) -> "Services":
        """Connects, and starts what runs beside the requests."""
        settings = get_settings()
        redis = connect(settings.redis_url)
        jobs = Jobs(redis, connect(settings.bus_url))
        relay = Relay(settings.bus_url, jobs.log)
        places = Places(redis, jobs.backlog)
        acceptance = Acceptance(jobs, settings.database_url)
        for part in (relay, places, acceptance):
            part.start()
        now_s, catalog = int(time.time()), get_catalog()
        return cls(settings, catalog, redis, jobs, relay, places, acceptance, Lookups(), now_s)


def get_services() -> Services:
    """The services of the app that handles the current request."""
    services: Services = current_app.extensions["sluice"]
    return services
