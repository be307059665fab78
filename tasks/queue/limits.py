"""What lua/limits.lua is told and what it answers: limits of keys and tenants, and what is left."""

from collections.abc import Callable
from typing import Any

import orjson

from tasks.contract.access import Allowance, Left
from tasks.contract.errors import RateLimitError

Limited = dict[str, Any]
"""Limits by name (contract/access.py), and whose they are: `subject`, as key:ID or tenant:NAME."""
NoteLeft = Callable[[Allowance], None]


def over_limit(refusal: str) -> RateLimitError:
    """The error of a job that a limit refuses."""
    limit = orjson.loads(refusal)
    wait_s = None if limit["wait_us"] < 0 else limit["wait_us"] / 1e6
    return RateLimitError(limit["subject"], limit["name"], int(limit["most"]), wait_s)


def read_allowance(text: str) -> Allowance:
    """What is left once the job has taken its part."""
    left = orjson.loads(text)
    return Allowance(_left(left.get("requests")), _left(left.get("tokens")))


def _left(values: tuple[float, float, float] | None) -> Left | None:
    if values is None:
        return None
    most, left, resets_us = values
    return Left(int(most), max(int(left), 0), resets_us / 1e6)
