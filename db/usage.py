"""Daily sums of what tenants use, kept beside the ledger, which no report has to scan."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass
from datetime import UTC, date
from typing import Any

from sqlalchemy import select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from db.models import LedgerEntry, UsageDay
from db.session import reading

# Larger numbers are no counts of tokens; the database could not hold their sum.
MOST_TOKENS = 2**40
MOST_ROWS = 10_000


@dataclass
class _Sum:
    jobs: int = 0
    failed_jobs: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0

    def add(self, state: str, usage: Mapping[str, Any]) -> None:
        details = usage.get("prompt_tokens_details")
        self.jobs += 1
        self.failed_jobs += state == "failed"
        self.prompt_tokens += _tokens(usage, "prompt_tokens")
        self.cached_tokens += _tokens(details, "cached_tokens")
        self.completion_tokens += _tokens(usage, "completion_tokens")


def _tokens(counts: Any, name: str) -> int:
    """A number that an engine reported; what is none counts as 0."""
    number = counts.get(name) if isinstance(counts, Mapping) else None
    return number if isinstance(number, int) and 0 <= number <= MOST_TOKENS else 0


def add(
    session: Session, entries: Iterable[LedgerEntry], usages: Mapping[str, dict[str, Any] | None]
) -> None:
    """Adds new entries of the ledger to their days; `usages`: as the engine reported it, by job."""
    sums: dict[tuple[str, date, str], _Sum] = {}
    for entry in entries:
        day = entry.ended_at.astimezone(UTC).date()
        total = sums.setdefault((entry.tenant, day, entry.model), _Sum())
        total.add(entry.state, usages.get(entry.job_id) or {})
    if not sums:
        return
    columns = [column.key for column in UsageDay.__table__.columns]
    # In order: two processes that add to the same rows would otherwise wait for each other.
    values = [dict(zip(columns, (*key, *astuple(sums[key])), strict=True)) for key in sorted(sums)]
    is_postgresql = session.get_bind().dialect.name == "postgresql"
    insert = (postgresql.insert if is_postgresql else sqlite.insert)(UsageDay)
    grown = {name: getattr(UsageDay, name) + insert.excluded[name] for name in columns[3:]}
    key_columns = [UsageDay.tenant, UsageDay.day, UsageDay.model]
    session.connection().execute(
        insert.on_conflict_do_update(index_elements=key_columns, set_=grown), values
    )


def read(
    url: str, since: date, until: date, tenant: str | None = None, limit: int = MOST_ROWS
) -> Sequence[UsageDay]:
    """The days from `since` to `until`, both included, newest first; of one tenant, or of all."""
    query = select(UsageDay).where(UsageDay.day.between(since, until))
    if tenant is not None:
        query = query.where(UsageDay.tenant == tenant)
    order = UsageDay.day.desc(), UsageDay.tenant, UsageDay.model
    with reading(url) as session:
        return list(session.scalars(query.order_by(*order).limit(limit)))
