"""How many jobs are served before one, when tenants take turns (docs/queue.md, Fairness).

That is an estimate: as if nothing else arrived, and each job cost the model's mean.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from redis import Redis

from tasks.contract import keys
from tasks.contract.job import Job
from tasks.queue.backlog import MEAN_TOKENS, load_script

# Of a lane; the jobs of those that come after them are extrapolated.
MOST_TENANTS = 100

LaneName = tuple[str, str]
"""Model and lane."""


class Turn(NamedTuple):
    """A tenant that waits."""

    tenant: str
    service: float
    """What it has had: tokens by weight."""
    jobs: int
    weight: float


@dataclass(frozen=True)
class Turns:
    """The tenants of a lane whose turn comes first."""

    first: Sequence[Turn]
    other_jobs: int
    """Of all other tenants."""
    tokens: float
    """Mean of a job."""

    def jobs_before(self, job: Job, own_before: int, service: float) -> int:
        """How many jobs are served before one of a tenant that has had that service.

        `own_before`: how many of them are its tenant's own.
        """
        at = service + own_before * self.tokens / job.weight
        others = [turn for turn in self.first if turn.tenant != job.tenant]
        before = sum(self._served_until(at, turn, job.tenant) for turn in others)
        if self.first and at > self.first[-1].service:
            unseen = self.other_jobs
            if len(others) == len(self.first):
                unseen -= own_before + 1
            share = before / max(1, sum(turn.jobs for turn in others))
            before += round(share * max(0, unseen))
        return own_before + before

    def _served_until(self, at: float, turn: Turn, tenant: str) -> int:
        """Jobs of the turn's tenant that are served until the other one has had so much."""
        jobs = (at - turn.service) * turn.weight / self.tokens
        number = math.floor(jobs) + 1 if turn.tenant < tenant else math.ceil(jobs)
        return min(max(number, 0), turn.jobs)


def read_ranks(redis: Redis, queued: Sequence[Job]) -> list[int | None]:
    """How many jobs of their lanes are served before these; None for one that no longer waits.

    Suspects are the first of their lane.
    """
    lanes = list(dict.fromkeys((job.model, str(job.lane)) for job in queued))
    pipeline = redis.pipeline(transaction=False)
    for job in queued:
        pipeline.zrank(keys.suspects(job.model, job.lane), job.id)
        pipeline.zrank(keys.queue(job.model, job.lane, job.tenant), job.id)
        pipeline.zscore(keys.turns(job.model, job.lane), job.tenant)
    *asked, suspects, turns = (*pipeline.execute(), *_read_lanes(redis, lanes))

    def rank(job: Job, suspect: int | None, ready: int | None, service: float | None) -> int | None:
        if ready is None or service is None:
            return suspect
        lane = (job.model, str(job.lane))
        return suspects[lane] + turns[lane].jobs_before(job, ready, service)

    places = zip(queued, asked[::3], asked[1::3], asked[2::3], strict=True)
    return [rank(*found) for found in places]


def _read_lanes(
    redis: Redis, lanes: Sequence[LaneName]
) -> tuple[dict[LaneName, int], dict[LaneName, Turns]]:
    """The suspects of each lane, and whose turn it is."""
    pipeline: Any = redis.pipeline(transaction=False)
    for model, lane in lanes:
        pipeline.zcard(keys.suspects(model, lane))
        pipeline.zcard(keys.backlog(model, lane))
        pipeline.hmget(keys.tokens(model), "input", "output")
    names = [f"{model}:{lane}" for model, lane in lanes]
    load_script(pipeline, "turns")(args=[MOST_TENANTS, *names])
    *found, turns = pipeline.execute()
    suspects = dict(zip(lanes, found[::3], strict=True))
    each = zip(found[1::3], found[2::3], turns, strict=True)
    return suspects, {lane: _decode(*one) for lane, one in zip(lanes, each, strict=True)}


def _decode(jobs: int, means: list[bytes | None], turns: list[list[Any]]) -> Turns:
    first = [
        Turn(tenant.decode(), float(service), number, float(weight))
        for tenant, service, number, weight in turns
    ]
    tokens = sum(float(mean or 0) for mean in means) or float(MEAN_TOKENS)
    return Turns(first, max(0, jobs - sum(turn.jobs for turn in first)), tokens)
