"""The claims that a worker holds: as many as its slots have room for, taken one at a time."""

import threading
from collections.abc import Callable

from tasks.contract.events import Attempt
from tasks.contract.job import Cause, Claim

# What an idle worker offers: a job that wants more slots than any worker has would otherwise stand
# before all others for ever, as when an operator has taken slots away.
ANY_NUMBER = 1_000_000


class Claims:
    """Counts what is held and what is being claimed under one lock, so that a drain misses none."""

    def __init__(self, slots: int) -> None:
        self.given_up: Cause | None = None
        """Why nothing is held any more: what is claimed from now on its claimer hands back."""
        self._slots = slots
        self._held: dict[Attempt, Claim] = {}
        self._is_open = True
        self._is_claiming = False
        self._changed = threading.Condition()
        self._turn = threading.Lock()

    def take(self, claim: Callable[[int], Claim | None]) -> Claim | None:
        """Claims a job, given the number of free slots; not tried without any, or when closed."""
        with self._turn:  # the next claim must know how many slots this job takes
            with self._changed:
                free = self._free()
                if not self._is_open or free < 1:
                    return None
                self._is_claiming = True
            claimed = None
            try:
                claimed = claim(free if self._held else ANY_NUMBER)
                return claimed
            finally:
                with self._changed:
                    self._is_claiming = False
                    if claimed:
                        self._held[Attempt.of(claimed)] = claimed
                    self._changed.notify_all()

    def release(self, claim: Claim) -> None:
        """The job's slots are free again."""
        with self._changed:
            del self._held[Attempt.of(claim)]
            self._changed.notify_all()

    def held(self) -> list[Claim]:
        with self._changed:
            return list(self._held.values())

    def has_room(self) -> bool:
        """Whether a job may be claimed."""
        with self._changed:
            return self._is_open and self._free() > 0

    def await_room(self) -> None:
        """Returns when a slot is free, or none is to be filled any more."""
        with self._changed:
            self._changed.wait_for(lambda: not self._is_open or self._free() > 0)

    def close(self) -> None:
        """Starts no more claims; one that is under way will still be held."""
        with self._changed:
            self._is_open = False
            self._changed.notify_all()

    def is_idle(self) -> bool:
        """Whether nothing is held or being claimed."""
        with self._changed:
            return self._is_idle()

    def await_idle(self, timeout_s: float) -> None:
        with self._changed:
            self._changed.wait_for(self._is_idle, timeout_s)

    def give_up(self, cause: Cause) -> list[Claim]:
        """What is held, for the caller to hand back."""
        with self._changed:
            self._is_open = False
            self.given_up = cause
            self._changed.notify_all()
            return list(self._held.values())

    def _is_idle(self) -> bool:
        return not self._held and not self._is_claiming

    def _free(self) -> int:
        return self._slots - sum(claim.job.sequences for claim in self._held.values())
