"""All that the rules act on: the real queue, its API, workers and maintenance, and the model."""

import copy
import itertools
import time
from dataclasses import dataclass, field
from typing import NamedTuple

from tasks.contract import keys
from tasks.contract.events import End, Entry, Kind, Position
from tasks.contract.settings import get_settings
from tasks.maintenance.gone_workers import GoneWorkers
from tasks.maintenance.ledger import Recorder
from tasks.maintenance.reconciler import Reconciler
from tasks.maintenance.sweeper import Sweeper
from tasks.queue.backlog import Backlog
from tasks.queue.jobs import Jobs
from tests.model.checks import Checks
from tests.model.database import Database, Row, pieces_of
from tests.model.expected import Expected, piece_of
from tests.model.redis_server import Fault, Server
from tests.model.watch import Watch
from tests.model.worker import Worker

MODELS = ("a", "b")
JOBS_AT_ONCE = 3
TICK_US = 1000
FINAL = ("completed", "failed", "cancelled", "expired")


class Asked(NamedTuple):
    """A job that somebody has asked for."""

    id: str
    model: str
    pieces: int
    has_webhook: bool = False


@dataclass
class Reader:
    """A client that follows a job's log."""

    job_id: str
    position: Position | None = None
    text: str = ""
    is_broken: bool = False

    def take(self, entries: list[Entry]) -> None:
        for entry in entries:
            if entry.kind is Kind.TAKEOVER and self.position:
                known = Position.parse(entry.data) if entry.data else Position(0, 0)
                self.is_broken |= self.position > known
            if entry.kind is Kind.END:
                # It has got an error, not an answer: the log may have been lost meanwhile.
                self.is_broken |= bool(End.decode(entry.data).error)
            self.position = entry.position
            self.text += piece_of(entry.encode_value().decode("latin-1"))


@dataclass
class World:
    server: Server
    database: Database
    watch: Watch = field(default_factory=Watch)

    def __post_init__(self) -> None:
        self.watch.learn_scripts()
        self.redis = self.server.client(self.watch)
        self.queue = Jobs(self.redis, self.redis)
        self.checks = Checks(self.server.raw)

    def close(self) -> None:
        self.redis.close()

    def start_over(self, most_failures: int) -> None:
        """Everything is as on the first day. With few failures allowed many jobs are suspects."""
        self.redis.fault = None
        settings = get_settings().model_copy(update={"max_attempts": most_failures})
        self.queue.backlog = Backlog(self.redis, settings)
        self.server.start_over(int(time.time()) * 1_000_000)
        self.database.start_over()
        self.watch.scripts.expected = self.saved = Expected()
        self._follow_clock()
        self.watch.orders.clear()
        self._numbers = itertools.count(1)
        self.workers = [self.new_worker(model, slots) for model in MODELS for slots in (2, 3)]
        self.asked: dict[str, Asked] = {}
        self.accepted: dict[str, Asked] = {}
        """What SQL has promised; they are never forgotten."""
        self.rows: dict[str, Row] = {}
        self.readers: list[Reader] = []
        self.was_rewound = False
        """A start that SQL knows may then be one that Redis does not."""
        self.set_back_s = 0.0
        """How far its clock is behind the latest that Redis has seen."""
        self.restart_maintenance()
        self.save()

    @property
    def expected(self) -> Expected:
        return self.watch.expected

    def new_id(self) -> str:
        """Ids of long ago: the reconciler leaves none alone for its youth."""
        return f"job_{0:012x}{next(self._numbers):020x}"

    def new_worker(self, model: str, slots: int) -> Worker:
        return Worker(self.queue, next(self._numbers), model, slots)

    def restart_maintenance(self) -> None:
        self.recorder = Recorder(self.queue, self.database.url)
        self.reconciler = Reconciler(self.queue, self.database.url, JOBS_AT_ONCE)
        self.sweeper = Sweeper(self.queue)
        self.gone_workers = GoneWorkers(self.queue)

    def _follow_clock(self) -> None:
        self.watch.scripts.now_us, self.watch.scripts.run = self.server.now_us, self.server.run

    def pass_time(self, seconds: float) -> None:
        self.set_back_s = max(0, self.set_back_s - seconds)
        self._drop(self.server.pass_time(int(seconds * 1e6)))
        self._follow_clock()

    def save(self) -> None:
        """What Redis holds now, it holds again when it comes back without its last moments."""
        self.server.save()
        self.saved = copy.deepcopy(self.expected)

    def lose_all(self) -> None:
        self.server.lose_all()
        self.watch.scripts.expected = Expected()
        self._follow_clock()

    def lose_logs(self) -> None:
        """The logs may live on a Redis of their own, and that one comes back empty."""
        for job_id in self.expected.logs:
            self.server.raw.delete(keys.log(job_id))
        self.expected.logs.clear()

    def lose_latest(self) -> None:
        self.was_rewound = True
        gone = self.server.lose_latest()
        self.watch.scripts.expected = copy.deepcopy(self.saved)
        self._drop(gone)
        self._follow_clock()
        self.saved = copy.deepcopy(self.expected)

    def _drop(self, gone: list[str]) -> None:
        """Forgets keys that have expired; only those may that nobody needs."""
        known = self.expected
        for key in gone:
            if key.startswith(keys.JOB_PREFIX):
                job = known.jobs.pop(key.removeprefix(keys.JOB_PREFIX))
                assert job.may_expire, f"{job} has expired"
            elif key.startswith(keys.LOG_PREFIX):
                del known.logs[key.removeprefix(keys.LOG_PREFIX)]
            else:
                known.keys.pop(key, None)

    def strike(self, fault: Fault) -> None:
        self.redis.fault = fault

    def check(self) -> None:
        """All invariants; and the clock ticks."""
        self.redis.fault = self.database.fault = None
        self.checks.check(self.expected, TICK_US)
        self.server.now_us += TICK_US
        self._follow_clock()
        self._check_workers()
        if self.database.has_changed():
            self._check_database()

    def _check_workers(self) -> None:
        held = [attempt for worker in self.workers for attempt in worker.holds]
        assert len(held) == len(set(held)), f"two workers have equal rights: {held}"

    def _check_database(self) -> None:
        rows = {row.id: row for row in self.database.rows()}
        assert self.accepted.keys() <= rows.keys(), "SQL has forgotten what it accepted"
        for row in rows.values():
            before = self.rows.get(row.id)
            if before and before.status in FINAL:
                assert row == before, f"what has ended has changed: {before}, {row}"
                continue
            if before:
                grown = row.attempts >= before.attempts or row.completed_at is not None
                assert grown, f"{before} became {row}"
                assert row.dispatches >= before.dispatches, f"{before} became {row}"
            if row.completed_at is not None:
                self._check_ended(row)
        self.rows = rows

    def _check_ended(self, row: Row) -> None:
        result = (row.status in FINAL, row.results, row.entries, row.deliveries)
        assert result == (True, 1, 1, int(row.webhook is not None)), f"ended, but not whole: {row}"
        if row.status == "expired" and not self.was_rewound:
            assert not row.has_started, f"{row} had started in time"
        if row.status in {"cancelled", "expired"}:
            assert row.body is None, f"{row} has an answer"
        if row.status != "completed":
            return
        assert row.body, f"{row} has no answer"
        pieces = pieces_of(row.body)
        numbers = [int(piece.partition("@")[0]) for piece in pieces]
        assert numbers == list(range(self.asked[row.id].pieces)), f"{row.id} answered {pieces}"
        if log := self.expected.logs.get(row.id):
            assert log.text.split() == pieces, f"the log has {log.text}, SQL {pieces}"

    def read(self, reader: Reader) -> None:
        """A client reads what is new; what it has read is the answer, or it gets an error."""
        reader.take(self.queue.log.read_after(reader.job_id, reader.position))
        log = self.expected.logs.get(reader.job_id)
        if log and log.last and not reader.is_broken and reader.position == log.last:
            assert reader.text == log.text, f"a client has {reader.text}, the log {log.text}"
