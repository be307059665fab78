"""The model's transitions: each takes a script's arguments and returns its reply."""

from typing import Any

from tasks.contract import keys
from tests.model.expected import DELAYED, LEASES, MOST_PASSED, Expected, Log, QueuedJob

Arguments = list[str]


class Scripts:
    """The scripts by name; `now_us` is the time of Redis."""

    def __init__(self) -> None:
        self.expected = Expected()
        self.now_us = 0
        self.run = 0
        """How often Redis has started."""

    def submit(self, names: Arguments, args: Arguments) -> Any:
        step, job_id, fingerprint, known = args[0], args[1], args[8], self.expected
        if job_id in known.jobs:
            return [job_id]
        held = known.keys.get(names[0]) if fingerprint else None
        other = held and held.split()[1] != job_id and held.split()[::-1]
        if step != "queue":
            if other:
                if other[0] in known.jobs and other[1] == fingerprint:
                    known.jobs[other[0]].attached = True
                return other
            if full := self._what_is_full(args):
                return ["", full]
        if step != "reserve":
            self._queue(args)
        if fingerprint and not other:
            known.keys[names[0]] = f"{fingerprint} {job_id}"
        return [job_id]

    def _what_is_full(self, args: Arguments) -> str:
        model, lane, size, most_jobs, most_bytes, most_records = args[2:8]
        known = self.expected
        places = (keys.backlog(model, lane), keys.suspects(model, lane))
        if sum(len(known.members(place)) for place in places) >= int(most_jobs):
            return "lane"
        if known.body_bytes[model] + int(size) > int(most_bytes):
            return "bytes"
        return "records" if len(known.ledger) >= int(most_records) else ""

    def _queue(self, args: Arguments) -> None:
        job_id, model, lane, size = args[1:5]
        priority, deadline_us, attempt, most_failures, _, _, *fields = args[10:]
        values = dict(zip(fields[::2], fields[1::2], strict=True))
        known = self.expected
        order = int(priority) * 1e13 + self.now_us // 1000
        job = QueuedJob(
            *(job_id, model, lane, order, int(size), int(most_failures)),
            *(int(values["sequences"]), self.now_us, int(attempt)),
            *(values["tenant"], float(values["weight"])),
            int(values["max_tokens"]) if values["max_tokens"] else None,
        )
        job.deadline_us = self.now_us + int(deadline_us) if deadline_us else None
        known.jobs[job_id] = job
        known.move(job, "queued", job.ready_place, order)
        known.body_bytes[model] += int(size)
        known.models.add(model)
        if known.run is None:
            self._started_us()
        known.count("jobs queued", job)
        self._wake(model)

    def claim(self, names: Arguments, args: Arguments) -> Any:
        worker, lease_us, model, free_slots, first_slots, most, _, lanes, _ = args[:9]
        token, suspect = names
        known = self.expected
        if again := known.held_by(token):
            return [[job.id, str(job.attempt)] for job in again]
        if model in known.paused:
            return []
        may_have_suspect = not known.held_by(suspect)
        claimed: list[QueuedJob] = []
        free, room = int(free_slots), int(first_slots)
        while len(claimed) < int(most) and (not claimed or free > 0):
            job = self._next(model, lanes.split(), room, may_have_suspect)
            if job is None:
                break
            claimed.append(job)
            free -= job.sequences
            room = free
            if job.place == keys.suspects(model, job.lane):
                may_have_suspect = False
            self._claim(job, worker, int(lease_us), suspect)
        if claimed:
            known.keys[token] = " ".join(f"{job.id} {job.attempt}" for job in claimed)
            if self._waits(model, lanes):
                self._wake(model)
        return [[job.id, str(job.attempt)] for job in claimed]

    def _claim(self, job: QueuedJob, worker: str, lease_us: int, suspect: str) -> None:
        known = self.expected
        is_suspect = job.place == keys.suspects(job.model, job.lane)
        job.started_us = self.now_us
        if job.queued_us > self._started_us():
            job.attempt += 1
        else:
            job.attempt = max(job.attempt + 100, (self.now_us - job.queued_us) // 1000)
        job.worker, job.deadline_us = worker, None
        known.move(job, "in_progress", LEASES, self.now_us + lease_us)
        known.fair.charge(known.keys, job)
        known.record(job)
        known.count("jobs in_progress", job)
        if is_suspect:
            known.keys[suspect] = f"{job.id} {job.attempt}"

    def _next(
        self, model: str, lanes: list[str], free_slots: int, may_have_suspect: bool
    ) -> QueuedJob | None:
        """The first job of the first lane that has one; nobody passes one that does not fit."""
        known = self.expected
        for lane in lanes:
            for _ in range(MOST_PASSED):
                suspects = known.members(keys.suspects(model, lane)) if may_have_suspect else []
                ready = keys.backlog(model, lane)
                jobs = suspects or known.queue(ready, known.fair.next_tenant(ready))
                if not jobs:
                    break
                job = jobs[0]
                if job.deadline_us is not None and job.deadline_us <= self.now_us:
                    known.move(job, "queued", DELAYED, self.now_us)
                else:
                    return job if job.sequences <= free_slots else None
            else:
                return None
        return None

    def _started_us(self) -> int:
        known = self.expected.run
        if known is None or known[0] != self.run:
            self.expected.run = known = (self.run, self.now_us if known else 0)
        return known[1]

    def clear(self, names: Arguments, args: Arguments) -> Any:
        job_id, attempt, _ = args
        known = self.expected
        job = known.running(job_id, attempt)
        if job is None or job.cleared:
            return None
        job.cleared, job.failures = True, job.failures - 1
        if known.keys.get(names[0]) == f"{job_id} {attempt}":
            del known.keys[names[0]]
        self._wake(job.model)
        return None

    def renew(self, _: Arguments, args: Arguments) -> Any:
        lease_us, *pairs = args
        lost = []
        for i, (job_id, attempt) in enumerate(zip(pairs[::2], pairs[1::2], strict=True)):
            if job := self.expected.running(job_id, attempt):
                job.score = self.now_us + int(lease_us)
            else:
                lost.append(i + 1)
        return lost

    def lapse(self, names: Arguments, args: Arguments) -> Any:
        worker, beats, *job_ids = args
        known = self.expected
        if known.keys.get(names[0]) != beats:
            return None
        running = [job for job in known.members(LEASES) if job.id in job_ids]
        ended = [job for job in running if job.worker == worker and job.score > 0]
        for job in ended:
            job.score = 0
        return len(ended)

    def requeue(self, _: Arguments, args: Arguments) -> Any:
        job_id, attempt, _reason, cause, delay_us, _ = args
        job = self.expected.jobs.get(job_id)
        if job is None or str(job.attempt) != attempt:
            return None
        if job.state == "queued" or job.is_dead:
            return job.state
        if job.state != "in_progress":
            return None
        self.expected.hand_on(job, cause, int(delay_us), self.now_us)
        if job.state == "queued" and int(delay_us) == 0:
            self._wake(job.model)
        return job.state

    def finish(self, _: Arguments, args: Arguments) -> Any:
        job_id, attempt, state, dead_because, lanes, *usage = args
        job = self.expected.jobs.get(job_id)
        if job is None or str(job.attempt) != attempt:
            return 0
        if job.state != "in_progress":
            return int(job.state == state) and self._ended(job, lanes)
        tokens = [int(number) for number in usage if number]
        self.expected.end(
            job, state, self.now_us, dead_because != "", sum(tokens) if tokens else None
        )
        if state == "completed":
            self.expected.fair.learn(job, tokens, self.now_us - job.started_us)
        return self._ended(job, lanes)

    def _ended(self, job: QueuedJob, lanes: str) -> int:
        return 2 if self._waits(job.model, lanes) else 1

    def _waits(self, model: str, lanes: str) -> bool:
        of_lane = (keys.backlog, keys.suspects)
        places = [place(model, lane) for lane in lanes.split() for place in of_lane]
        return any(self.expected.members(place) for place in places)

    def cancel(self, _: Arguments, args: Arguments) -> Any:
        job_id, unless_attached = args
        job = self.expected.jobs.get(job_id)
        if job is None or not (job.is_open or job.state == "cancelled"):
            return None
        if job.is_open:
            if unless_attached == "1" and job.attached:
                return None
            self.expected.end(job, "cancelled", self.now_us)
        return [str(job.attempt), job.worker]

    def reap(self, _: Arguments, args: Arguments) -> Any:
        known, reaped = self.expected, []

        def due(jobs: list[tuple[float, QueuedJob]]) -> list[QueuedJob]:
            late = [job for at_us, job in jobs if at_us <= self.now_us]
            return late[: int(args[0])]

        for job in due([(job.score, job) for job in known.members(LEASES)]):
            known.hand_on(job, "lease_expired", 0, self.now_us)
            reaped.append(job)
        with_deadline = [job for job in known.jobs.values() if job.deadline_us is not None]
        with_deadline.sort(key=lambda job: (job.deadline_us or 0, job.id))
        for job in due([(job.deadline_us or 0, job) for job in with_deadline]):
            known.end(job, "expired", self.now_us)
            reaped.append(job)
        for job in due([(job.score, job) for job in known.members(DELAYED)]):
            known.move(job, "queued", job.ready_place, job.order)
            reaped.append(job)
        return [[job.id, str(job.attempt), job.state] for job in reaped]

    def settle(self, _: Arguments, args: Arguments) -> Any:
        settled = []
        for job_id in args[1::2]:
            job = self.expected.jobs.get(job_id)
            settled.append(int(job is None or not job.is_open))
            if job and not job.is_open:
                job.has_body, job.may_expire = False, True
        return settled

    def release(self, names: Arguments, args: Arguments) -> Any:
        job_id, fingerprint = args
        held = self.expected.keys.get(names[0])
        if job_id not in self.expected.jobs and held == f"{fingerprint} {job_id}":
            del self.expected.keys[names[0]]

    def forget(self, _: Arguments, args: Arguments) -> Any:
        job_id, attempt = args
        job = self.expected.jobs.get(job_id)
        if job and not job.is_open and str(job.attempt) == attempt:
            del self.expected.jobs[job_id]

    def sweep(self, _: Arguments, args: Arguments) -> Any:
        """Never finds anything to repair."""
        found = []
        for job_id in args[2:]:
            job = self.expected.jobs.get(job_id)
            found.append("missing" if job is None else "open" if job.is_open else "ended")
        return found

    def wake(self, _: Arguments, args: Arguments) -> Any:
        self._wake(args[0])

    def _wake(self, model: str) -> None:
        self.expected.tickets[model] = 1

    def depths(self, _: Arguments, args: Arguments) -> Any:
        waiting = []
        for lane in args[2:]:
            places = (keys.BACKLOG_PREFIX + lane, keys.SUSPECTS_PREFIX + lane)
            waiting.append(sum(len(self.expected.members(place)) for place in places))
        return waiting

    def append(self, logs: Arguments, args: Arguments) -> Any:
        """Entries follow without a gap; what an older attempt writes is refused."""
        refused: list[int | str] = []
        for i, name in enumerate(logs):
            entry_id, value, _record, is_end, *_ = args[6 * i + 1 : 6 * i + 7]
            job_id = name.removeprefix(keys.LOG_PREFIX)
            log = self.expected.logs.get(job_id, Log())
            if reason := log.why_refused(parse(entry_id)):
                refused += [i + 1, "" if reason == "empty" else reason]
            elif log.last is None or parse(entry_id) > log.last:
                had_end = parse(entry_id)[1] == 0 and log.has_end
                log.entries.append((parse(entry_id), value))
                if is_end == "1":
                    log.has_ttl = log.has_ttl and had_end
                elif parse(entry_id)[1] == 0:
                    log.has_ttl = True
                self.expected.logs[job_id] = log
        return refused


def parse(entry_id: str) -> tuple[int, int]:
    attempt, _, seq = entry_id.partition("-")
    return int(attempt), int(seq)
