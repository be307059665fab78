"""What a worker holds: never more than it has slots for, and a drain knows of all of it."""

import threading

import pytest

from bench.stack import await_that
from gpu_worker.claims import ANY_NUMBER, Claims
from tasks.contract.job import Cause, Claim, Job, Room


def _claim(name: str, sequences: int = 1, attempt: int = 1) -> Claim:
    job = Job(name, "m", "/v1/completions", b"{}", sequences=sequences)
    return Claim(job, attempt, 0, 0, 3)


class Underway:
    """A claim that Redis answers when the test wants."""

    def __init__(self, claims: Claims, answer: Claim, instead_of: Claim | None = None) -> None:
        self.answered, self.asked = threading.Event(), threading.Event()
        self.taken: list[Claim] | None = None
        self._instead_of = instead_of
        self._claims, self._answer = claims, answer
        self.thread = threading.Thread(target=self._take)
        self.thread.start()

    def _take(self) -> None:
        self.taken = self._claims.take(self._ask, self._instead_of)

    def _ask(self, _room: Room) -> list[Claim]:
        self.asked.set()
        self.answered.wait(10)
        return [self._answer]

    def answer(self) -> None:
        self.answered.set()
        self.thread.join(10)


def test_a_job_takes_a_slot_for_each_of_its_sequences() -> None:
    claims = Claims(8)
    rooms: list[Room] = []
    waiting = [[_claim("a", 5)], [_claim("b", 1), _claim("c", 1)], [_claim("d", 1)], []]

    def claim(room: Room) -> list[Claim]:
        rooms.append(room)
        return waiting.pop(0)

    (first,) = claims.take(claim) or []
    assert claims.take(claim)
    assert claims.take(claim)
    assert claims.take(claim) is None
    assert rooms == [Room(8, ANY_NUMBER), Room(3, 3), Room(1, 1)]
    assert claims.take(claim, instead_of=first) == []
    assert rooms[3:] == [Room(5, 5)]


def test_an_idle_worker_takes_a_job_that_wants_more_slots_than_it_has() -> None:
    """It stood before all others of its model for ever."""
    claims = Claims(4)
    (large,) = claims.take(lambda room: [_claim("a", 5)] if room.first >= 5 else []) or []
    assert claims.take(lambda _: [_claim("b")]) is None
    assert claims.take(lambda _: [_claim("b")], instead_of=large)


def test_two_attempts_of_a_job_are_held_apart() -> None:
    claims = Claims(4)
    old, new = _claim("a"), _claim("a", attempt=2)
    claims.take(lambda _: [old])
    claims.take(lambda _: [new])
    claims.release(old)
    assert claims.held() == [new]


def test_the_next_claim_knows_what_the_one_before_has_taken() -> None:
    claims = Claims(4)
    first = Underway(claims, _claim("a", 3))
    assert first.asked.wait(5)
    seen: list[Room] = []

    def claim(room: Room) -> list[Claim]:
        seen.append(room)
        return []

    second = threading.Thread(target=lambda: claims.take(claim))
    second.start()
    first.answer()
    second.join(5)
    assert seen == [Room(1, 1)]


def test_one_claim_fills_the_slots_of_all_jobs_that_ended_meanwhile() -> None:
    claims = Claims(3)
    old = claims.take(lambda _: [_claim(name) for name in "abc"]) or []
    first = Underway(claims, _claim("d"), instead_of=old[0])
    assert first.asked.wait(5)
    seen: list[Room] = []

    def claim(room: Room) -> list[Claim]:
        seen.append(room)
        return [_claim(f"new {n}") for n in range(room.slots)]

    others = [threading.Thread(target=lambda one=one: claims.take(claim, one)) for one in old[1:]]
    for thread in others:
        thread.start()
    await_that(lambda: len(claims.held()) == 0, 5)
    first.answer()
    for thread in others:
        thread.join(5)
    assert seen == [Room(2, 2)]
    assert len(claims.held()) == 3


@pytest.mark.parametrize("is_answered_in_time", [True, False])
def test_a_drain_knows_of_a_claim_that_was_under_way(is_answered_in_time: bool) -> None:
    claims = Claims(4)
    underway = Underway(claims, _claim("a"))
    assert underway.asked.wait(5)
    claims.close()
    assert not claims.is_idle()
    if is_answered_in_time:
        underway.answer()
        assert claims.give_up(Cause.HANDED_BACK) == underway.taken
    else:
        assert claims.give_up(Cause.HANDED_BACK) == []
        underway.answer()
        assert claims.given_up  # whoever has claimed it hands it back
    assert underway.taken
    assert claims.take(lambda _: [_claim("b")]) is None
    claims.release(underway.taken[0])
    assert claims.is_idle()


def test_a_thread_without_room_waits_until_there_is_some() -> None:
    claims = Claims(2)
    wide = _claim("a", 2)
    claims.take(lambda _: [wide])
    threads = [threading.Thread(target=claims.await_room) for _ in range(2)]
    for thread in threads:
        thread.start()
    assert all(thread.is_alive() for thread in threads)
    underway = Underway(claims, wide, instead_of=wide)
    assert underway.asked.wait(5)
    assert all(thread.is_alive() for thread in threads)  # the slots are about to be filled
    underway.answer()
    assert all(thread.is_alive() for thread in threads)
    claims.release(wide)
    await_that(lambda: not any(thread.is_alive() for thread in threads), 5)
    claims.take(lambda _: [wide])
    late = threading.Thread(target=claims.await_room)
    late.start()
    claims.close()
    await_that(lambda: not late.is_alive(), 5)
