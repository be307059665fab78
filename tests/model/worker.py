"""A simulated worker: what the real one does with claims and logs, a step at a time.

Between two of its steps anything may happen: it can stall past its leases, and go on.
"""

import itertools
from dataclasses import dataclass, field

import orjson

from tasks.contract import keys
from tasks.contract.events import End, Entry, Kind, Position, Start
from tasks.contract.job import Cause, Claim, Room, State, Usage
from tasks.contract.settings import get_settings
from tasks.queue.backlog import load_script
from tasks.queue.control import BEATS
from tasks.queue.jobs import Jobs
from tasks.queue.token_log import Addressed, append_arguments

HEAD = Start(200, [("content-type", "text/event-stream")], 0, 1)
# What it can still send again.
KEPT_ENTRIES = 3


@dataclass
class Hold:
    """A claimed job on its engine."""

    claim: Claim
    entries: list[Entry] = field(default_factory=list)
    """The latest; those before are forgotten."""
    written: int = -1
    """The last of its entries that the log has for sure."""
    continued: bytes = b""
    """The last entry of those before, that it goes on from."""
    has_begun: bool = False
    has_head: bool = False
    next_piece: int = 0
    next_seq: int = 0
    is_new: bool = False
    """Whether it has produced what no earlier attempt did."""
    has_cleared: bool = False
    ended: End | None = None
    hand_back: tuple[Cause, float] | None = None
    """Why it is to be handed back, and for how long."""

    @property
    def pieces(self) -> int:
        return int(orjson.loads(self.claim.job.body)["pieces"])

    @property
    def usage(self) -> Usage | None:
        """Not every engine tells it."""
        size = len(self.claim.job.body)
        return Usage(size, 50 * self.pieces) if size % 3 else None

    def put(self, kind: Kind, data: bytes) -> None:
        position = Position(self.claim.attempt, self.next_seq)
        self.entries.append(Entry(self.claim.job.id, position, kind, data))
        self.next_seq += 1

    def end(self, end: End) -> None:
        self.ended = end
        self.put(Kind.END, end.encode())

    def unwritten(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.position.seq > self.written]


class Worker:
    """One worker process of a model."""

    def __init__(self, queue: Jobs, number: int, model: str, slots: int) -> None:
        self.id = f"w{number}"
        self.model, self.slots = model, slots
        self.holds: dict[tuple[str, int], Hold] = {}
        self._queue = queue
        self._append = load_script(queue.bus, "append")
        self._token = ""
        self._tokens = itertools.count()

    @property
    def free_slots(self) -> int:
        return self.slots - sum(hold.claim.job.sequences for hold in self.holds.values())

    def claim(self, most: int = 2) -> bool:
        """Takes jobs; a claim whose reply was lost is made again, with its token."""
        self._token = self._token or f"{self.id}-{next(self._tokens)}"
        room = Room(self.free_slots, self.free_slots)
        claimed = self._queue.backlog.claim_several(self.model, self.id, self._token, room, 0, most)
        self._token = ""
        for claim in claimed:
            assert (claim.job.id, claim.attempt) not in self.holds, f"{claim} was claimed twice"
            self.holds[claim.job.id, claim.attempt] = Hold(claim)
        return bool(claimed)

    def beat(self) -> bytes:
        """Sends a heartbeat; returns its number."""
        key = keys.worker(self.id)
        pipeline = self._queue.backlog.redis.pipeline(transaction=False)
        pipeline.hincrby(key, BEATS, 1)
        pipeline.expire(key, int(get_settings().lease_s) + 1)
        return b"%d" % pipeline.execute()[0]

    def renew(self) -> None:
        held = [hold.claim for hold in self.holds.values()]
        for claim in self._queue.backlog.renew(held):
            self.stop(claim.job.id, claim.attempt)

    def stop(self, job_id: str, attempt: int) -> None:
        self.holds.pop((job_id, attempt), None)

    def go_on(self, hold: Hold) -> None:
        """Does the next thing for the job: begins, writes a piece or the end, finishes."""
        if hold.hand_back:
            self._hand_back(hold, *hold.hand_back)
        elif not hold.has_begun:
            self._begin(hold)
        elif not hold.ended:
            self._generate(hold)
            self.write([hold])
        elif hold.unwritten():
            self.write([hold])
        else:
            self._queue.backlog.finish(hold.claim, hold.ended.state, usage=hold.usage)
            self._drop(hold)

    def hand_back(self, hold: Hold, cause: Cause, delay_s: float) -> None:
        """It is asked for until Redis answers."""
        hold.hand_back = hold.hand_back or (cause, delay_s)
        self._hand_back(hold, *hold.hand_back)

    def _hand_back(self, hold: Hold, cause: Cause, delay_s: float) -> None:
        state = self._queue.backlog.requeue(hold.claim, cause, "reason", delay_s)
        self._drop(hold)
        if state is State.FAILED:
            self._queue.log.end_given_up(hold.claim)

    def _drop(self, hold: Hold) -> None:
        self.stop(hold.claim.job.id, hold.claim.attempt)

    def _begin(self, hold: Hold) -> None:
        """Reads what earlier attempts have left, if there are any."""
        job, attempt = hold.claim.job, hold.claim.attempt
        if attempt > 1:
            history = self._queue.log.take_over(job.id, attempt, job.listener)
            kinds = [entry.kind for entry in history]
            hold.has_head = Kind.START in kinds
            hold.next_piece = kinds.count(Kind.BODY)
            if not history or history[-1].position != (attempt, 0):
                self._drop(hold)
                return
            hold.entries, hold.continued = history[-1:], history[-1].data
            hold.next_seq, hold.written = 1, 0
            if Kind.END in kinds:
                hold.end(End.decode(history[kinds.index(Kind.END)].data))
        hold.has_begun = True

    def _generate(self, hold: Hold) -> None:
        if not hold.has_head:
            hold.has_head = True
            hold.put(Kind.START, HEAD.encode())
        elif hold.next_piece < hold.pieces:
            hold.put(Kind.BODY, _chunk(f"{hold.next_piece}@{self.id}.{hold.claim.attempt} "))
            hold.next_piece += 1
            hold.is_new = True
        else:
            hold.end(End(State.COMPLETED))

    def tick(self) -> None:
        """A piece of each job."""
        begun = [hold for hold in self.holds.values() if hold.has_begun and not hold.hand_back]
        for hold in begun:
            if not hold.ended:
                self._generate(hold)
        self.write(begun)

    def write(self, holds: list[Hold]) -> None:
        """Appends what the logs do not have yet, of several jobs in one script."""
        batch = [entry for hold in holds for entry in hold.unwritten()]
        if not batch:
            return
        addressed = [Addressed(entry, "") for entry in batch]
        refused = self._append(**append_arguments(addressed, get_settings()))
        reasons: dict[str, str] = {}
        for place, reason in zip(refused[::2], refused[1::2], strict=True):
            reasons.setdefault(batch[place - 1].job_id, reason.decode())
        for hold in holds:
            if hold.claim.job.id in reasons:
                self._refused(hold, reasons[hold.claim.job.id])
            elif hold.entries:
                self._accepted(hold)

    def _accepted(self, hold: Hold) -> None:
        hold.written = hold.entries[-1].position.seq
        hold.entries = hold.entries[-KEPT_ENTRIES:]
        if hold.is_new and hold.claim.is_suspect and not hold.has_cleared:
            self._queue.backlog.clear(hold.claim)
            hold.has_cleared = True

    def _refused(self, hold: Hold, reason: str) -> None:
        """Fills the gap; or hands the job back, when what is missing is forgotten."""
        if reason == "stale":
            self._drop(hold)
            return
        there = self._still_there(hold, reason.encode())
        if there is None or hold.entries[0].position.seq > there + 1:
            self.hand_back(hold, Cause.HANDED_BACK, 0)
        else:
            hold.written = there
            self.write([hold])

    def _still_there(self, hold: Hold, last: bytes) -> int | None:
        """Up to which of its entries the log has them; None: it lacks what others wrote."""
        if last == hold.continued:
            return -1
        attempt, seq = Position.parse(last) if last else (0, 0)
        return seq if attempt == hold.claim.attempt else None


def _chunk(text: str) -> bytes:
    delta = {"index": 0, "delta": {"content": text}}
    return b"data: " + orjson.dumps({"choices": [delta]}) + b"\n\n"
