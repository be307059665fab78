"""The claims that a worker holds: as many as its slots have room for."""

import threading
from collections.abc import Callable

from tasks.contract.events import Attempt
from tasks.contract.job import Cause, Claim, Room

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
        self._claimers = 0
        """Threads that claim, or wait for their turn to."""
        self._changed = threading.Condition()
        self._turn = threading.Lock()

    def take(
        self, claim: Callable[[Room], list[Claim]], instead_of: Claim | None = None
    ) -> list[Claim] | None:
        """Claims jobs, given the room for them; None: not tried, as there is none, or when closed.

        `instead_of`: a job that has ended, whose slots are free for them.
        """
        with self._changed:
            if instead_of:
                del self._held[Attempt.of(instead_of)]
            self._claimers += 1
        try:
            with self._turn:  # the next claim must know how many slots these jobs take
                return self._take(claim)
        finally:
            with self._changed:
                self._claimers -= 1
                self._changed.notify_all()

    def _take(self, claim: Callable[[Room], list[Claim]]) -> list[Claim] | None:
        with self._changed:
            free, is_idle = self._free(), not self._held
            if not self._is_open or free < 1:
                return None
        claimed = claim(Room(free, ANY_NUMBER if is_idle else free))
        with self._changed:
            self._held |= {Attempt.of(one): one for one in claimed}
        return claimed

    def release(self, claim: Claim) -> None:
        """Frees the slots of a job that has ended; tickets bring other jobs for them."""
        with self._changed:
            del self._held[Attempt.of(claim)]
            self._changed.notify_all()

    def held(self) -> list[Claim]:
        with self._changed:
            return list(self._held.values())

    def await_room(self) -> bool:
        """Returns when slots are free that nobody is about to fill; False: none is to be filled."""
        with self._changed:
            self._changed.wait_for(lambda: not self._is_open or self._has_room())
            return self._is_open

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
        return not self._held and not self._claimers

    def _has_room(self) -> bool:
        return self._free() > 0 and not self._claimers

    def _free(self) -> int:
        return self._slots - sum(claim.job.sequences for claim in self._held.values())
