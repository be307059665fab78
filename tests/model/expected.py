"""The model: what Redis has to hold after each script. docs/queue.md has the same in prose.

It receives every command that ran in Redis, whether its reply arrived or not. From that it derives
what the reply should have been, and what Redis holds now.
"""

import re
from collections import Counter
from dataclasses import dataclass, field

from tasks.contract import keys
from tasks.contract.events import Kind
from tests.model.fair import Fair

DELAYED, LEASES = keys.DELAYED, keys.LEASES
MOST_PASSED = 2
OPEN = ("queued", "in_progress")
_PIECE = re.compile(r'"content":"([^"]*)"')


@dataclass
class QueuedJob:
    """A job as its hash should have it."""

    id: str
    model: str
    lane: str
    order: float
    body_bytes: int
    max_failures: int
    sequences: int
    queued_us: int
    attempt: int
    tenant: str = "default"
    weight: float = 1
    max_tokens: int | None = None
    charged: float | None = None
    started_us: int = 0
    deadline_us: int | None = None
    state: str = "queued"
    place: str | None = None
    score: float = 0
    failures: int = 0
    cleared: bool = False
    attached: bool = False
    worker: str = ""
    has_body: bool = True
    is_dead: bool = False
    may_expire: bool = False
    """Whether its hash has a TTL: SQL has recorded how it ended."""

    @property
    def is_open(self) -> bool:
        return self.state in OPEN

    @property
    def backlog(self) -> str:
        return keys.backlog(self.model, self.lane)

    @property
    def ready_place(self) -> str:
        is_suspect = self.failures > 0 and self.failures + 1 >= self.max_failures
        return keys.suspects(self.model, self.lane) if is_suspect else self.backlog


def piece_of(value: str) -> str:
    """The text of an entry: some of BODY entries, none of others."""
    found = _PIECE.search(value) if value[0] == chr(Kind.BODY) else None
    return found.group(1) if found else ""


@dataclass
class Log:
    """A token log: who wrote which entry."""

    entries: list[tuple[tuple[int, int], str]] = field(default_factory=list)
    has_ttl: bool = True

    @property
    def last(self) -> tuple[int, int] | None:
        return self.entries[-1][0] if self.entries else None

    @property
    def has_end(self) -> bool:
        return bool(self.entries) and ord(self.entries[-1][1][0]) == Kind.END

    @property
    def text(self) -> str:
        """The answer in it."""
        return "".join(map(piece_of, (value for _, value in self.entries)))

    def why_refused(self, entry: tuple[int, int]) -> str | None:
        """'stale', or the last id that is there ('empty' for none) when the entry leaves a gap."""
        attempt, seq = entry
        if self.last is None:
            return None if seq == 0 else "empty"
        last_attempt, last_seq = self.last
        if last_attempt > attempt:
            return "stale"
        follows = seq <= last_seq + 1 if last_attempt == attempt else seq == 0
        return None if follows else f"{last_attempt}-{last_seq}"


@dataclass
class Record:
    """A change that waits for SQL."""

    job_id: str
    state: str
    attempt: int
    record_id: str = ""


class Expected:
    """What Redis holds. A copy of it is what Redis holds when it comes back as it was."""

    def __init__(self) -> None:
        self.jobs: dict[str, QueuedJob] = {}
        self.logs: dict[str, Log] = {}
        self.keys: dict[str, str] = {}
        """What has a TTL: idempotency keys, claims' tokens, workers' suspects and heartbeats."""
        self.ledger: list[Record] = []
        self.tickets: Counter[str] = Counter()
        self.counts: Counter[str] = Counter()
        self.body_bytes: Counter[str] = Counter()
        self.fair = Fair()
        self.models: set[str] = set()
        self.run: tuple[int, int] | None = None
        """The run of Redis, and when it was seen first; 0: there was none before."""
        self.paused: set[str] = set()

    def members(self, place: str) -> list[QueuedJob]:
        """The jobs of a place, in the order of its scores."""
        found = [job for job in self.jobs.values() if job.place == place]
        return sorted(found, key=lambda job: (job.score, job.id))

    # What all transitions are made of.

    def move(self, job: QueuedJob, state: str, place: str | None, score: float = 0) -> None:
        left, job.place = job.place, None
        if left == job.backlog and not self.queue(job.backlog, job.tenant):
            self.fair.leave(self.keys, job)
        job.state, job.place, job.score = state, place, score
        if place == job.backlog:
            self.fair.enter(self.keys, job)

    def queue(self, backlog: str, tenant: str) -> list[QueuedJob]:
        """The tenant's jobs in that backlog."""
        return [job for job in self.members(backlog) if job.tenant == tenant]

    def record(self, job: QueuedJob) -> None:
        self.ledger.append(Record(job.id, job.state, job.attempt))

    def count(self, what: str, job: QueuedJob) -> None:
        self.counts[f"{what} {job.lane} {job.model}"] += 1

    def end(
        self,
        job: QueuedJob,
        state: str,
        now_us: int,
        is_dead: bool = False,
        tokens: int | None = None,
    ) -> None:
        self.fair.correct(self.keys, job, tokens, now_us)
        job.deadline_us = None
        self.move(job, state, None)
        self.body_bytes[job.model] -= job.body_bytes
        if is_dead:
            job.is_dead = True
            self.count("dead letter", job)
        job.has_body = is_dead
        self.record(job)
        self.count(f"jobs {state}", job)

    def hand_on(self, job: QueuedJob, cause: str, delay_us: int, now_us: int) -> None:
        """Takes a running job from its worker."""
        self.count(f"requeues {cause}", job)
        if cause not in ("handed_back", "preempted"):
            job.failures += 1
            if job.failures >= job.max_failures:
                return self.end(job, "failed", now_us, is_dead=True)
        if delay_us > 0:
            self.move(job, "queued", DELAYED, now_us + delay_us)
        else:
            self.move(job, "queued", job.ready_place, job.order)
        return self.record(job)

    def held_by(self, key: str) -> list[QueuedJob]:
        """The jobs that the key notes as "id attempt", of which that attempt still runs."""
        words = self.keys.get(key, "").split()
        jobs = map(self.running, words[::2], words[1::2])
        return [job for job in jobs if job]

    def running(self, job_id: str, attempt: str) -> QueuedJob | None:
        job = self.jobs.get(job_id)
        runs = job and job.state == "in_progress" and str(job.attempt) == attempt
        return job if runs else None
