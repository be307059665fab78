"""A day of arrivals against ways to size a fleet of GPUs: `python -m bench fleet`.

Nothing runs but the policies (deploy/autoscale.py): the fleet is counted in steps of a second.
"""

import math
import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from bench.spread import short
from deploy.autoscale import USED_SHARE, Autoscaler, Policy

DAY_S = 86_400
COLD_START_S = 90
# Of Prometheus's scrape, KEDA's poll and HPA's: what is decided on is so old.
INTERVAL_S = 15
# A leaving worker is paid for as long as it may drain (SLUICE_DRAIN_S).
DRAIN_S = 120
HOLD_S = 300
SLOTS = 64
JOB_S = 20.0
JOBS_PER_WORKER = int(SLOTS * USED_SHARE)
# Of the slots in use at the busiest hour; in a burst twice as much comes.
BUSIEST = 0.5
BURST, BURST_S, BURSTS = 2.0, 600, 8
# One that grows again so soon after it has shrunk flaps.
FLAP_S = 600
# Of the busiest hour's arrivals, so many come in the quietest.
NIGHT = 0.1
# Each GPU runs one worker. All have the same day, at their size.
FLEETS = 10, 1_000, 10_000
LEGEND = f"""\
A job holds one of a worker's {SLOTS} slots for {JOB_S:g} s in the mean; loading a worker takes
{COLD_START_S} s. wait: from acceptance to the claim. GPU-hours: loading and draining workers, too.
changes: of the size. flaps: growth {FLAP_S // 60} minutes or less after shrinking. GPU use is
taken as the share of slots in use; of a real GPU it is nearly 100 % with a few streams."""


@dataclass(frozen=True)
class Outcome:
    """What a day was like under one policy."""

    gpus: int
    policy: str
    wait_p50_s: int
    wait_p99_s: int
    gpu_hours: float
    changes: int
    flaps: int


class Fleet:
    """Workers, their jobs, and the queue, of which only numbers are known."""

    def __init__(self, gpus: int, ready: int) -> None:
        self.gpus, self.ready = gpus, ready
        self.running = self.queued = 0.0
        self.leaving = 0.0
        """Jobs that end on workers which take no more."""
        self.gpu_s = 0
        self.sizes: list[tuple[int, int]] = [(0, ready)]
        """Since when the fleet has been how large."""
        self.waits: dict[int, float] = {}
        """Jobs by their wait in seconds."""
        self._starting: deque[list[int]] = deque()
        self._draining: deque[tuple[int, int]] = deque()
        self._queue: deque[list[float]] = deque()

    @property
    def size(self) -> int:
        """Workers that serve or load."""
        return self.ready + sum(count for _, count in self._starting)

    @property
    def _leaving_workers(self) -> int:
        return sum(count for _, count in self._draining)

    def step(self, now_s: int, arriving: int) -> None:
        """One second: jobs end, come, and start in the order in which they came."""
        while self._starting and self._starting[0][0] <= now_s:
            self.ready += self._starting.popleft()[1]
        while self._draining and self._draining[0][0] <= now_s:
            self._draining.popleft()
        self.gpu_s += self.size + self._leaving_workers
        self.running -= self.running / JOB_S
        self.leaving -= self.leaving / JOB_S
        if arriving:
            self._queue.append([now_s, arriving])
            self.queued += arriving
        free = self.ready * SLOTS - self.running
        while self._queue and free > 0:
            free -= self._start(now_s, free)

    def _start(self, now_s: int, free: float) -> float:
        """Starts the oldest jobs; returns how many."""
        first = self._queue[0]
        count = min(first[1], free)
        self._count_wait(now_s - int(first[0]), count)
        self.running += count
        self.queued -= count
        first[1] -= count
        if not first[1]:
            self._queue.popleft()
        return count

    def scale(self, now_s: int, wanted: int) -> None:
        """Starts workers as far as GPUs are free, or stops some: those that still load first."""
        change = min(wanted, self.gpus - self._leaving_workers) - self.size
        if change:
            self.sizes.append((now_s, self.size + change))
        if change > 0:
            self._starting.append([now_s + COLD_START_S, change])
        while change < 0 and self._starting:
            stopped = min(-change, self._starting[-1][1])
            self._starting[-1][1] -= stopped
            change += stopped
            if not self._starting[-1][1]:
                self._starting.pop()
        if change < 0:
            moved = self.running * -change / self.ready
            self.running, self.leaving = self.running - moved, self.leaving + moved
            self.ready += change
            self._draining.append((now_s + DRAIN_S, -change))

    def end(self, now_s: int) -> None:
        """Counts what waits still, with its wait so far."""
        for came_s, count in self._queue:
            self._count_wait(now_s - int(came_s), count)

    def _count_wait(self, wait_s: int, jobs: float) -> None:
        self.waits[wait_s] = self.waits.get(wait_s, 0.0) + jobs

    def wait_s(self, share: float) -> int:
        """So long waits the job at that share of all, by wait."""
        left = share * sum(self.waits.values())
        for wait_s, jobs in sorted(self.waits.items()):
            left -= jobs
            if left <= 0:
                return wait_s
        return 0

    @property
    def flaps(self) -> int:
        changes = [(at_s, now - before) for (_, before), (at_s, now) in pairwise(self.sizes)]
        return sum(
            before < 0 < change and at_s - before_s <= FLAP_S
            for (before_s, before), (at_s, change) in pairwise(changes)
        )


Decide = Callable[[int, Fleet], int]


def arrivals(gpus: int, seed: int = 1) -> list[int]:
    """Jobs of each second of a day: a bell over the day, bursts at random times, and chance.

    Shape and bursts are the seed's, whatever the number of GPUs.
    """
    chance = random.Random(seed)
    peak_per_s = gpus * SLOTS * BUSIEST / JOB_S
    bursts = [chance.randrange(DAY_S) for _ in range(BURSTS)]
    day = []
    for second in range(DAY_S):
        # Least at 3 in the morning, most at 3 in the afternoon.
        bell = (1 - math.cos(2 * math.pi * (second / DAY_S - 0.125))) / 2
        in_burst = any(0 <= second - begun < BURST_S for begun in bursts)
        share = (NIGHT + (1 - NIGHT) * bell) * (BURST if in_burst else 1)
        day.append(_poisson(peak_per_s * share, chance))
    return day


def _poisson(mean: float, chance: random.Random) -> int:
    if mean > 30:
        return max(0, round(chance.gauss(mean, math.sqrt(mean))))
    count, left, least = 0, chance.random(), math.exp(-mean)
    while left > least:
        count, left = count + 1, left * chance.random()
    return count


def replay(day: Sequence[int], gpus: int, start: int, decide: Decide) -> Fleet:
    """The day with a fleet that begins so large, and is decided on at every interval."""
    fleet = Fleet(gpus, start)
    for second, arriving in enumerate(day):
        fleet.step(second, arriving)
        if second % INTERVAL_S == 0:
            fleet.scale(second, decide(second, fleet))
    fleet.end(len(day))
    return fleet


def policies(gpus: int, mean_per_s: float) -> Iterator[tuple[str, int, Decide]]:
    """Name, workers at midnight and decision of each."""
    average = math.ceil(mean_per_s * JOB_S / JOBS_PER_WORKER)
    yield "running + queued", average, _following(gpus, 0, _demand)
    yield "HPA on the queue alone", average, _following(gpus, 1, lambda fleet: fleet.queued)
    yield "HPA on GPU use", average, _following(gpus, 1, lambda fleet: fleet.running)
    yield "fixed, all GPUs", gpus, lambda _now_s, _fleet: gpus
    yield "fixed, the mean", average, lambda _now_s, _fleet: average


def _demand(fleet: Fleet) -> float:
    return fleet.running + fleet.leaving + fleet.queued


def _following(gpus: int, least: int, measure: Callable[[Fleet], float]) -> Decide:
    """Decides on what was measured an interval ago."""
    scaler, measured = Autoscaler(Policy(JOBS_PER_WORKER, least, gpus, HOLD_S)), 0

    def decide(now_s: int, fleet: Fleet) -> int:
        nonlocal measured
        seen, measured = measured, round(measure(fleet))
        return scaler.decide(now_s, seen, fleet.size)

    return decide


def simulate(gpus: int) -> Iterator[Outcome]:
    """The same day under each policy."""
    day = arrivals(gpus)
    for name, start, decide in policies(gpus, sum(day) / len(day)):
        fleet = replay(day, gpus, start, decide)
        yield Outcome(
            gpus,
            name,
            fleet.wait_s(0.5),
            fleet.wait_s(0.99),
            fleet.gpu_s / 3600,
            len(fleet.sizes) - 1,
            fleet.flaps,
        )


def run(console: Console) -> list[Outcome]:
    """Simulates and prints all fleets."""
    outcomes: list[Outcome] = []
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    columns = "GPUs", "policy", "wait p50", "wait p99", "GPU-hours", "of all", "changes", "flaps"
    for column in columns:
        table.add_column(column, justify="left" if column == "policy" else "right", no_wrap=True)
    for gpus in FLEETS:
        for one in simulate(gpus):
            outcomes.append(one)
            table.add_row(*_cells(one))
        table.add_section()
    console.print(table, LEGEND)
    return outcomes


def _cells(one: Outcome) -> tuple[str, ...]:
    return (
        f"{one.gpus:,}",
        one.policy,
        f"{one.wait_p50_s} s",
        f"{one.wait_p99_s} s",
        short(one.gpu_hours),
        f"{one.gpu_hours / one.gpus / 24:.0%}",
        str(one.changes),
        str(one.flaps),
    )
