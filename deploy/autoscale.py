"""`sluice autoscale`: how many workers a model needs, as KEDA decides with the overlay `keda`.

Running jobs count as much as queued ones: by the queue alone, workers that keep up look idle.
"""

import math
import shlex
import subprocess
import time
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

import click
from redis.exceptions import RedisError

from deploy.operate import queue
from tasks.contract.job import State
from tasks.contract.models import get_catalog
from tasks.contract.settings import get_settings
from tasks.contract.trouble import redis_trouble
from tasks.queue.backlog import Backlog
from tasks.queue.statistics import read_stats

# As HPA has it: a fleet that is within a tenth of what is needed stays as it is.
TOLERANCE = 0.1
# Of a worker's slots; the rest is for what comes while the next worker loads its model.
USED_SHARE = 0.75
WORKERS, MODEL = "{workers}", "{model}"


@dataclass(frozen=True)
class Policy:
    """How a fleet follows its load."""

    jobs_per_worker: int
    min_workers: int
    max_workers: int
    hold_s: float
    """For so long after they were needed workers are kept."""


def workers_for(demand: int, workers: int, policy: Policy) -> int:
    """How many workers so many running and queued jobs need, when there are so many."""
    needed, served = math.ceil(demand / policy.jobs_per_worker), workers * policy.jobs_per_worker
    if demand and abs(demand - served) <= TOLERANCE * served:
        needed = workers
    return min(max(needed, policy.min_workers), policy.max_workers)


class Autoscaler:
    """Grows at once, and shrinks to the most that was needed lately."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._needed: deque[tuple[float, int]] = deque()

    def decide(self, now_s: float, demand: int, workers: int) -> int:
        """How many there should be; `workers` counts those that still load, too."""
        if not self._needed:
            # Nothing is known of what was needed before.
            self._needed.append((now_s, min(workers, self._policy.max_workers)))
        needed = workers_for(demand, workers, self._policy)
        self._needed.append((now_s, needed))
        while self._needed[0][0] < now_s - self._policy.hold_s:
            self._needed.popleft()
        most = max(count for _, count in self._needed)
        return max(needed, min(workers, most))


@dataclass(frozen=True)
class Options:
    """Of the command line."""

    model: str | None
    min_workers: int
    max_workers: int
    jobs_per_worker: int | None
    hold_s: float
    interval_s: float
    settle_s: float
    timeout_s: float
    hook: str | None


class Reading(NamedTuple):
    """A model at one moment."""

    demand: int
    serving: int
    accepted: int
    """Jobs since Redis began."""


def run(options: Options) -> None:
    """Prints the wanted number; with a hook calls it for each change, until Ctrl-C.

    Raises:
        RedisError: Redis does not answer; with a hook only at the start.
        ConfigurationError: a setting or models.yaml is wrong.
    """
    if options.min_workers > options.max_workers:
        raise click.UsageError(f"--min {options.min_workers} is more than --max; give a lower one")
    if options.hook is not None and WORKERS not in options.hook:
        raise click.UsageError(f"--exec has no {WORKERS}; write it where the number belongs")
    model = get_catalog().resolve(options.model)
    policy = Policy(
        options.jobs_per_worker or max(1, int(model.slots * USED_SHARE)),
        options.min_workers,
        options.max_workers,
        options.hold_s,
    )
    backlog = queue().backlog
    seen = read(backlog, model.name)
    if options.hook is None:
        click.echo(workers_for(seen.demand, seen.serving, policy))
        return
    command = [part.replace(MODEL, model.name) for part in shlex.split(options.hook)]
    _follow(backlog, model.name, Autoscaler(policy), command, options)


def read(backlog: Backlog, model: str) -> Reading:
    """What the model's jobs and workers are at this moment.

    Raises:
        RedisError: Redis does not answer.
    """
    stats = read_stats(backlog, [model])
    found = next(each for each in stats.models if each.name == model)
    workers = math.ceil(round(found.engines, 6))  # of three thirds it is one
    return Reading(found.demand, workers, stats.total_jobs(model, State.QUEUED))


def _follow(
    backlog: Backlog, model: str, scaler: Autoscaler, command: list[str], options: Options
) -> None:
    """Calls the command for each change, and again for a fleet that does not come to be as asked.

    Without Redis all stays as it is.
    """
    last = read(backlog, model)
    workers, settled_s = last.serving, time.monotonic()
    while True:
        now_s = time.monotonic()
        try:
            seen = read(backlog, model)
        except RedisError as away:
            settled_s = now_s
            click.echo(f"sluice: {redis_trouble(away, get_settings()).error}", err=True)
        else:
            # Jobs that come and end between two readings are work, too.
            demand = max(seen.demand, int(seen.accepted > last.accepted))
            wanted, last = scaler.decide(now_s, demand, workers), seen
            if seen.serving == workers:
                settled_s = now_s
            is_astray = now_s - settled_s > options.settle_s
            if (wanted != workers or is_astray) and _call(command, wanted, options.timeout_s):
                workers, settled_s = wanted, time.monotonic()
        time.sleep(options.interval_s)


def _call(command: list[str], workers: int, timeout_s: float) -> bool:
    """Prints the number and calls the hook; whether it took it. If not, it is called again."""
    click.echo(workers)
    filled = [part.replace(WORKERS, str(workers)) for part in command]
    try:
        done = subprocess.run(filled, check=False, stdin=subprocess.DEVNULL, timeout=timeout_s)
    except OSError as missing:
        click.echo(f"sluice: --exec cannot be started: {missing}", err=True)
        return False
    except subprocess.TimeoutExpired:
        click.echo(
            f"sluice: --exec took longer than {timeout_s:g} s and was killed; it is called again",
            err=True,
        )
        return False
    if done.returncode:
        click.echo(f"sluice: --exec ended with {done.returncode}; it is called again", err=True)
    return not done.returncode
