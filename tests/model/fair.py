"""The model of whose turn it is: lua/fair.lua in Python, with the same sums of doubles."""

from collections import defaultdict
from typing import TYPE_CHECKING

from tasks.contract import keys
from tasks.queue import backlog as queue

if TYPE_CHECKING:
    from tests.model.expected import QueuedJob

Strings = dict[str, str]
NEW_VALUE = 0.05


class Fair:
    """The counters of tenants by backlog; those of idle ones are among the strings with a TTL."""

    def __init__(self) -> None:
        self.turns: defaultdict[str, dict[str, float]] = defaultdict(dict)
        self.levels: dict[str, float] = {}
        self.service_us: dict[str, float] = {}
        """Mean time of a model's jobs; and their tokens of input and output."""
        self.tokens: dict[str, tuple[float, float]] = {}

    def next_tenant(self, backlog: str) -> str:
        """The one with the least service; '': nobody waits."""
        turns = self.turns[backlog]
        return min(turns, key=lambda tenant: (turns[tenant], tenant), default="")

    def enter(self, strings: Strings, job: "QueuedJob") -> None:
        """A tenant that was idle begins no lower than the others."""
        turns = self.turns[job.backlog]
        if job.tenant in turns:
            return
        own = float(strings.pop(_served(job), 0))
        least = min(turns.values(), default=self.levels.get(job.backlog, 0))
        turns[job.tenant] = max(own, least)

    def leave(self, strings: Strings, job: "QueuedJob") -> None:
        """Its tenant has no other job there."""
        turns = self.turns[job.backlog]
        counter = turns.pop(job.tenant)
        strings[_served(job)] = repr(counter)
        if not turns:
            self.levels[job.backlog] = counter

    def charge(self, strings: Strings, job: "QueuedJob") -> None:
        """Once, however often it is claimed."""
        if job.charged is not None:
            return
        _, each = self.tokens.get(job.model, (0, queue.MEAN_TOKENS))
        if job.max_tokens is not None:
            each = min(each, job.max_tokens)
        tokens = job.body_bytes / queue.BYTES_PER_TOKEN + each * job.sequences
        job.charged = min(tokens, queue.MOST_TOKENS) / job.weight
        self._add(strings, job, job.charged)

    def correct(self, strings: Strings, job: "QueuedJob", tokens: int | None, now_us: int) -> None:
        """When it ends: what it has cost, if that can be told."""
        mean_us = self.service_us.get(job.model, 0)
        is_timed = job.state == "in_progress" and mean_us > 0
        if job.charged is None or (tokens is None and not is_timed):
            return
        if tokens is None:
            ran_us = max(now_us - job.started_us, 0)
            cost = min(job.charged * ran_us / mean_us, queue.MOST_TOKENS / job.weight)
        else:
            cost = tokens / job.weight
        self._add(strings, job, cost - job.charged)
        job.charged = cost

    def _add(self, strings: Strings, job: "QueuedJob", service: float) -> None:
        turns = self.turns[job.backlog]
        if job.tenant in turns:
            turns[job.tenant] += service
        elif _served(job) in strings:
            strings[_served(job)] = repr(float(strings[_served(job)]) + service)

    def learn(self, job: "QueuedJob", tokens: list[int], took_us: int) -> None:
        """The means of the model, from a completed job."""
        mean_us = _mean(self.service_us.get(job.model, took_us), took_us)
        self.service_us[job.model] = float(f"{mean_us:.0f}")
        if tokens:
            values = (tokens[0], tokens[1] / job.sequences)
            old = self.tokens.get(job.model, values)
            self.tokens[job.model] = (_mean(old[0], values[0]), _mean(old[1], values[1]))


def _served(job: "QueuedJob") -> str:
    return keys.served(job.model, job.lane, job.tenant)


def _mean(old: float, value: float) -> float:
    return old + (value - old) * NEW_VALUE
