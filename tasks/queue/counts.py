"""Event counts in Redis: exact across crashes, and the same from every process.

The scripts that change a job's state count in the same step (lua/state.lua). Only what is rare is
counted from outside. A field of the hash is `<what> <value> <lane> <model>`.
"""

from collections import Counter
from enum import StrEnum
from typing import NamedTuple

from redis import Redis

from tasks.contract import keys


class Counted(StrEnum):
    """What is counted; in brackets its values."""

    JOBS = "jobs"
    """[State] `queued` once per job, `in_progress` once per claim."""
    REQUEUES = "requeues"
    """[Cause]"""
    DEAD = "dead"
    """[`letter`]"""
    TICKETS = "tickets"
    """[`reissued`]"""
    REPAIRS = "repairs"
    """[what maintenance repaired: `misplaced`, `stray`, `unrecorded` (lua/sweep.lua), `lost`]"""
    WEBHOOKS = "webhooks"
    """[result of a call (webhooks.py): `delivered`, `pending`, `failed`, `disabled`]"""


class Happening(NamedTuple):
    """What is counted: a field of the hash."""

    what: Counted
    value: str
    model: str = ""
    """'' where there is none."""
    lane: str = ""
    """'' where there is none."""


def add(redis: Redis, what: Counted, value: str, model: str = "", times: int = 1) -> None:
    """Counts something that no script does."""
    redis.hincrby(keys.COUNTS, f"{what} {value}  {model}", times)


def read(fields: dict[bytes, bytes]) -> Counter[Happening]:
    """How often each thing has happened since Redis began, from the hash; 0 of all else."""
    found: Counter[Happening] = Counter()
    for name, times in fields.items():
        what, value, lane, model = name.decode().split(" ", 3)
        found[Happening(Counted(what), value, model, lane)] = int(times)
    return found
