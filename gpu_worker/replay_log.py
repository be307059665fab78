"""What an engine notes of a job while it answers, so that another worker's engine can go on.

An engine that can be continued notes what it is about to send; the note goes into the job's log
beside the next event, in one write with it. After a failover the engine gets all notes of the
events that are in the log: it makes the same events of them once more, which are dropped, and goes
on by itself. Without notes an answer that has begun cannot be continued.

An answer that is not streamed has no events: its notes go into the log when its worker stops it to
make room for others.
"""

from collections.abc import Callable, Iterable
from contextvars import ContextVar
from typing import Any, TypeGuard

import orjson

# Of one answer; no context is so long.
MOST_TOKENS = 2**31


class ReplayLog:
    """The notes of one job; each is a JSON value."""

    def __init__(self, records: Iterable[bytes] = ()) -> None:
        self.earlier: list[object] = [note for record in records for note in orjson.loads(record)]
        """Notes of earlier attempts, to begin with."""
        self.streams = 0
        """How many streams of tokens the engine makes for the job; only one can be continued."""
        self.can_continue = True
        """Whether another attempt can go on from the notes."""
        self.unnoted: dict[str, Callable[[], int]] = {}
        """By stream, what the engine has made of it without a note of each token."""
        self.catch_up: Callable[[], bool] = lambda: True
        """Notes that; False: the answer is complete."""
        self.output_tokens = 0
        """Of the whole answer, what earlier attempts made of it included."""
        self._input_tokens: dict[str, int] = {}
        self.usage: dict[str, Any] | None = None
        """The whole answer's, as the engine reports it on request."""
        self._new: list[object] = []
        self._noted = 0

    def count(self, input_tokens: int, new_tokens: int, stream: str = "") -> None:
        """Counts a stream's prompt, and the tokens that the next events are made of."""
        self._input_tokens[stream] = input_tokens
        self.output_tokens += new_tokens

    def made(self) -> int:
        """Grows with what the engine makes in this attempt, also of an answer not streamed."""
        return self._noted + self._pending()

    def _pending(self) -> int:
        return sum(made() for made in self.unnoted.values())

    def advance(self) -> None:
        """The engine has made something that is neither noted nor counted by `unnoted`."""
        self._noted += 1

    def total(self) -> tuple[int, int]:
        """All tokens of prompt and answer: as the engine reports them, or as counted."""
        usage = self.usage or {}
        totals = usage.get("prompt_tokens"), usage.get("completion_tokens")
        counted = sum(self._input_tokens.values()), self.output_tokens + self._pending()
        read, made = (t if _is_count(t) else c for t, c in zip(totals, counted, strict=True))
        return read, made

    def part_of_usage(self, total: str, name: str) -> int | None:
        """Some of the tokens of that total, as the engine reports them; None: it does not."""
        details = (self.usage or {}).get(f"{total}_details")
        tokens = details.get(name) if isinstance(details, dict) else None
        return tokens if _is_count(tokens) else None

    def note(self, note: object) -> None:
        """Notes what the next events are made of."""
        self._new.append(note)
        self._noted += 1

    def take(self) -> bytes:
        """The notes since the last call, as they go into the log; b"" for none."""
        if not self._new:
            return b""
        record, self._new = orjson.dumps(self._new), []
        return record


def _is_count(tokens: object) -> TypeGuard[int]:
    """What a server reports may be anything."""
    return isinstance(tokens, int) and 0 <= tokens <= MOST_TOKENS


current_replay_log: ContextVar[ReplayLog | None] = ContextVar("current_replay_log", default=None)


def get_replay_log() -> ReplayLog:
    """That of the job which the current task answers; outside of jobs, one that is discarded."""
    return current_replay_log.get() or ReplayLog()
