"""Deliveries of webhooks: which are due, and how each try went."""

from datetime import datetime, timedelta

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from db.models import WebhookAttempt, WebhookDelivery
from db.session import database_now, reading, writing


def claim_due(url: str, limit: int, hold_s: float) -> list[WebhookDelivery]:
    """The deliveries that are due, each for one caller only; the longest due come first.

    One whose attempt is not noted within `hold_s` is due again then.
    """
    # Mostly there is none: only a claim needs SQLite's write lock.
    with reading(url) as session:
        now = database_now(session)
        is_due = (WebhookDelivery.state == "pending", WebhookDelivery.next_at <= now)
        due = select(WebhookDelivery).where(*is_due).order_by(WebhookDelivery.next_at).limit(limit)
        found = session.scalars(due).all()
    if not found:
        return []
    with writing(url) as session:
        until = now + timedelta(seconds=hold_s)
        return [delivery for delivery in found if _claim(session, delivery, until)]


def _claim(session: Session, delivery: WebhookDelivery, until: datetime) -> bool:
    # Whoever read it too and came first has moved it.
    as_read = (
        WebhookDelivery.job_id == delivery.job_id,
        WebhookDelivery.next_at == delivery.next_at,
    )
    moved = update(WebhookDelivery).where(*as_read).values(next_at=until)
    return bool(session.connection().execute(moved).rowcount)


def note_attempt(url: str, attempt: WebhookAttempt, state: str, next_at: datetime | None) -> bool:
    """Writes the try and what follows from it: the delivery's new state, when it is tried next.

    False: nothing was written, as that try is noted already or the delivery is deleted.
    """
    same_try = (
        WebhookDelivery.job_id == attempt.job_id,
        WebhookDelivery.attempts == attempt.attempt - 1,
    )
    follows = {"attempts": attempt.attempt, "state": state, "next_at": next_at}
    with writing(url) as session:
        change = update(WebhookDelivery).where(*same_try).values(follows)
        is_first = bool(session.connection().execute(change).rowcount)
        if is_first:
            session.add(attempt)
        return is_first


def attempts_of(url: str, job_id: str) -> tuple[WebhookDelivery | None, list[WebhookAttempt]]:
    """A job's delivery, None when it has none, and its tries in their order."""
    tries = select(WebhookAttempt).where(WebhookAttempt.job_id == job_id)
    with reading(url) as session:
        delivery = session.get(WebhookDelivery, job_id)
        return delivery, list(session.scalars(tries.order_by(WebhookAttempt.attempt)))
