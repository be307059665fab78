"""Deliveries of webhooks: which are due, and how each try went."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import NamedTuple

from sqlalchemy import ColumnElement, literal, select, tuple_, update
from sqlalchemy.orm import aliased

from db.models import JobRecord, WebhookAttempt, WebhookDelivery
from db.session import database_now, insert_new, reading, writing


class Due(NamedTuple):
    """The oldest delivery of a receiver."""

    receiver: str
    job_id: str | None
    """None: nothing of it is due yet."""


class Claimed(NamedTuple):
    """A delivery that its caller is to try."""

    delivery: WebhookDelivery
    traceparent: str
    """Its job's trace; empty: it has none."""


@dataclass(frozen=True, slots=True)
class Noted:
    """A try, and what follows from it: the delivery's new state, how long it waits for the next."""

    attempt: WebhookAttempt
    state: str
    wait_s: float | None
    """None: it is not tried again."""
    traceparent: str = ""


def due(url: str, after: str, limit: int) -> list[Due]:
    """The next receivers in their order that wait for anything, [] if nothing at all is due.

    It takes one step in an index for each, whatever else waits: receivers with very many calls do
    not hide others.
    """
    with reading(url) as session:
        now = database_now(session)
        if session.scalar(select(literal(1)).where(_is_due(now)).limit(1)) is None:
            return []
        # Each row is the receiver after the one of the row before.
        steps = select(_next_receiver(literal(after)).label("receiver"), literal(1).label("step"))
        walk = steps.cte("walk", recursive=True)
        further = select(_next_receiver(walk.c.receiver), walk.c.step + 1)
        walk = walk.union_all(further.where(walk.c.receiver.is_not(None), walk.c.step < limit))
        found = select(walk.c.receiver, _oldest(walk.c.receiver, now))
        found = found.where(walk.c.receiver.is_not(None)).order_by(walk.c.step)
        return [Due(receiver, job_id) for receiver, job_id in session.execute(found)]


def _is_due(now: datetime) -> ColumnElement[bool]:
    return WebhookDelivery.next_at <= now


def _next_receiver(receiver: ColumnElement[str]) -> ColumnElement[str]:
    other = aliased(WebhookDelivery)
    waits = select(other.receiver).where(other.next_at.is_not(None), other.receiver > receiver)
    return waits.order_by(other.receiver).limit(1).scalar_subquery()


def _oldest(receiver: ColumnElement[str], now: datetime) -> ColumnElement[str]:
    its_due = select(WebhookDelivery.job_id).where(
        WebhookDelivery.receiver == receiver, _is_due(now)
    )
    return its_due.order_by(WebhookDelivery.next_at).limit(1).scalar_subquery()


def claim(url: str, job_ids: Sequence[str], hold_s: float) -> list[Claimed]:
    """Those of the deliveries that are still due, each for one caller only.

    One whose attempt is not noted within `hold_s` is due again then.
    """
    if not job_ids:
        return []
    with writing(url) as session:
        now = database_now(session)
        # Another caller has moved it, or is about to (SQLite has one writer).
        left = select(WebhookDelivery.job_id).where(WebhookDelivery.job_id.in_(job_ids))
        left = left.where(_is_due(now)).with_for_update(skip_locked=True)
        held = update(WebhookDelivery).where(WebhookDelivery.job_id.in_(left))
        held = held.values(next_at=now + timedelta(seconds=hold_s))
        trace = select(JobRecord.traceparent).where(JobRecord.id == WebhookDelivery.job_id)
        found = session.execute(held.returning(WebhookDelivery, trace.scalar_subquery()))
        return [Claimed(delivery, traceparent) for delivery, traceparent in found]


def give_back(url: str, deliveries: Sequence[WebhookDelivery]) -> None:
    """Ends claims without an attempt: the deliveries are due at once."""
    if not deliveries:
        return
    claim_of = tuple_(WebhookDelivery.job_id, WebhookDelivery.next_at)
    claims = [(delivery.job_id, delivery.next_at) for delivery in deliveries]
    with writing(url) as session:
        ended = update(WebhookDelivery).where(claim_of.in_(claims))
        session.execute(ended.values(next_at=database_now(session)))


def note_attempts(url: str, notes: Sequence[Noted]) -> int:
    """Writes tries and what follows from them; returns how many were new.

    The others are noted already, or their deliveries are deleted.
    """
    if not notes:
        return 0
    tries = {note.attempt.job_id: note for note in notes}
    before = select(WebhookDelivery.job_id, WebhookDelivery.attempts)
    before = before.where(WebhookDelivery.job_id.in_(tries)).order_by(WebhookDelivery.job_id)
    with writing(url) as session:
        # Of the clock that `due` goes by, not of a host's.
        now = database_now(session)
        rows = session.execute(before.with_for_update()).all()
        new = [tries[job_id] for job_id, n in rows if tries[job_id].attempt.attempt == n + 1]
        changes = [
            {
                "job_id": note.attempt.job_id,
                "attempts": note.attempt.attempt,
                "state": note.state,
                "next_at": _after(now, note.wait_s),
            }
            for note in new
        ]
        if changes:
            session.execute(update(WebhookDelivery), changes)
        return insert_new(session, [note.attempt for note in new])


def _after(now: datetime, wait_s: float | None) -> datetime | None:
    return None if wait_s is None else now + timedelta(seconds=wait_s)


def attempts_of(url: str, job_id: str) -> tuple[WebhookDelivery | None, list[WebhookAttempt]]:
    """A job's delivery, None when it has none, and its tries in their order."""
    tries = select(WebhookAttempt).where(WebhookAttempt.job_id == job_id)
    with reading(url) as session:
        delivery = session.get(WebhookDelivery, job_id)
        return delivery, list(session.scalars(tries.order_by(WebhookAttempt.attempt)))
