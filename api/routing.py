"""Which model serves a request: routes split their names between models, fallbacks step in.

Whether a model can serve is read from the queue once a second, in the background: its workers and
their context, the age of its oldest waiting job, and how many of its jobs the engine fails.
"""

import logging
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import gevent
from redis.exceptions import RedisError

from api import instruments
from api.breaker import Breaker, Rate
from api.model_book import ModelBook
from api.principal import Principal
from tasks.contract.errors import ShedError
from tasks.contract.job import Cause, Lane, State
from tasks.contract.models import Degradation, Model
from tasks.queue.backlog import Backlog
from tasks.queue.counts import Counted, Happening
from tasks.queue.statistics import ModelStats, QueueStats, read_stats

log = logging.getLogger(__name__)

INTERVAL_S = 1.0
# What is older says nothing about now.
FRESH_S = 5.0
LONGEST_WAIT_S = 60.0
BROKEN = (Cause.ENGINE_ERROR, Cause.ENGINE_DIED, Cause.WORKER_FAILED, Cause.LEASE_EXPIRED)


@dataclass(frozen=True)
class Choice:
    """What serves a request, and why not what it has asked for ('': that does)."""

    model: Model
    reason: str = ""


class Router:
    """Chooses models; one per API process."""

    def __init__(self, backlog: Backlog, models: ModelBook, most_jobs: int) -> None:
        """`most_jobs`: that may wait in a lane."""
        self._most_jobs = most_jobs
        self._backlog = backlog
        self._models = models
        self._stats: dict[str, ModelStats] = {}
        self._read_s = 0.0
        self._breakers: defaultdict[str, Breaker] = defaultdict(Breaker)
        self._rates: defaultdict[str, Rate] = defaultdict(Rate)

    def start(self) -> None:
        """Starts looking at the queue, while there is a choice at all."""
        gevent.spawn(self._read_for_ever)

    def choose(self, name: str | None, principal: Principal, user: object, tokens: int) -> Choice:
        """The model for a request of so many tokens, its answer included, as far as can be told.

        Raises:
            ModelNotFoundError: no model has that name.
            ModelNotAllowedError: it is for others.
        """
        catalog = self._models.catalog
        wanted = principal.resolve(catalog, name)
        if route := catalog.routes.get(name or ""):
            chosen = catalog.resolve(route.choose(user or principal.key_id))
            wanted = chosen if principal.may_use(chosen) else wanted
        reason = self._why_not(wanted, tokens)
        for fallback in wanted.fallbacks if reason else ():
            model = catalog.resolve(fallback)
            if principal.may_use(model) and not self._why_not(model, tokens):
                instruments.FALLBACKS.labels(wanted.name, model.name, reason).inc()
                log.info("model %s: %s, %s serves", wanted.name, reason, model.name)
                return Choice(model, reason)
        return Choice(wanted)

    def is_capped(self, model: Model, principal: Principal) -> bool:
        """Whether answers are to be shorter, as the model is busy.

        Raises:
            ShedError: it is so busy that the key has to wait.
        """
        stats = self._stats.get(model.name)
        if stats is None or time.monotonic() - self._read_s > FRESH_S:
            return False
        cap_at, shed_at = model.degradation.cap_at, model.degradation.shed_at
        jobs = stats.depth[Lane.INTERACTIVE].jobs
        full = jobs / self._most_jobs
        if shed_at is not None:
            from_there = shed_at if principal.weight < 1 else (1 + shed_at) / 2
            if principal.weight <= 1 and full >= from_there:
                instruments.DEGRADED.labels(model.name, "shed").inc()
                too_many = jobs - from_there * self._most_jobs
                raise ShedError(model.name, self._wait_s(model, too_many))
        return cap_at is not None and full >= cap_at

    def _wait_s(self, model: Model, jobs: float) -> float:
        """How long the model takes for so many jobs, as fast as it has been lately."""
        rate = self._rates[model.name].per_s
        return min(max((jobs + 1) / rate, 1), LONGEST_WAIT_S) if rate > 0 else LONGEST_WAIT_S

    def _why_not(self, model: Model, tokens: int) -> str:
        """Why the model cannot serve that now; '': it can, or nobody knows better."""
        now_s = time.monotonic()
        stats = self._stats.get(model.name)
        if stats is None or now_s - self._read_s > FRESH_S:
            return ""
        age_s = stats.depth[Lane.INTERACTIVE].oldest_age_s
        if not stats.has_workers:
            return "no_worker"
        if model.fallback_age_s is not None and age_s > model.fallback_age_s:
            return "queue_age"
        if stats.max_model_len and tokens > stats.max_model_len:
            return "context"
        return "breaker_open" if self._breakers[model.name].is_open(now_s) else ""

    def _read_for_ever(self) -> None:
        while True:
            models = self._models.catalog.models
            try:
                if any(model.fallbacks or model.degradation != Degradation() for model in models):
                    self._note(read_stats(self._backlog, [model.name for model in models]))
            except RedisError as away:
                log.warning("models are taken for able to serve, Redis is away: %s", away)
            except Exception:  # without this greenlet no fallback steps in
                log.exception("the models' state was not read")
            gevent.sleep(INTERVAL_S)

    def _note(self, stats: QueueStats) -> None:
        self._read_s = time.monotonic()
        self._stats = {model.name: model for model in stats.models}
        for name in self._stats:
            failed = sum(
                stats.counts[Happening(Counted.REQUEUES, cause, name, lane)]
                for cause in BROKEN
                for lane in Lane
            )
            completed = stats.total_jobs(name, State.COMPLETED)
            self._breakers[name].note(completed, failed, self._read_s)
            self._rates[name].note(completed, self._read_s)


def rename(document: dict[str, Any], model: Model) -> dict[str, Any]:
    """The request with a name that the model's engine knows; it refuses what is no name."""
    asked = document.get("model")
    if not isinstance(asked, str) or asked in ("", model.name, *model.aliases):
        return document
    return document | {"model": model.name}
