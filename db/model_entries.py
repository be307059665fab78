"""Models that were added, changed or removed while Sluice runs; models.yaml has the others."""

from typing import Any

from sqlalchemy import select

from db.models import ModelEntry
from db.session import database_now, reading, writing


def read(url: str) -> dict[str, dict[str, Any] | None]:
    """The entries by name; None: the model of that name is removed."""
    with reading(url) as session:
        rows = session.scalars(select(ModelEntry).order_by(ModelEntry.changed_at, ModelEntry.name))
        return {row.name: row.entry for row in rows}


def write(url: str, name: str, entry: dict[str, Any] | None) -> None:
    """Stores the entry in place of the one before."""
    with writing(url) as session:
        changed_at = database_now(session)
        session.merge(ModelEntry(name=name, entry=entry, changed_at=changed_at))
