"""What tenants have used: by day and model, as JSON or as CSV for a spreadsheet."""

import csv
import io
from datetime import UTC, date, datetime, timedelta
from typing import Any

from flask import Response, make_response
from flask_openapi3 import APIBlueprint, Tag

from api import replies, schemas
from api.access import get_principal
from api.openapi import STORE_ERRORS, Given, operation
from api.routes.admin import ADMIN
from api.services import get_services
from db import usage
from db.models import UsageDay
from tasks.contract.errors import InvalidRequestError

USAGE = [Tag(name="Usage", description="Requests and tokens by day (UTC) and model")]
USUAL_DAYS = 30
# There is none before it, and some calendars have no days before their first.
EARLIEST = date(2000, 1, 30)
CSV = "text/csv"
COLUMNS = tuple(replies.UsageDay.model_fields)
SUMS = {200: Given("The days, newest first", {"application/json": replies.UsageList, CSV: str})}

blueprint = APIBlueprint("usage", __name__)


@blueprint.get(
    "/v1/usage",
    tags=USAGE,
    summary="Get your usage",
    openapi_extensions=operation(SUMS, (InvalidRequestError, *STORE_ERRORS)),
)
def show(query: schemas.UsageQuery) -> Response:
    """Jobs and tokens of your jobs that have ended, by day and model; it is seconds behind."""
    return _answer(query, get_principal().tenant)


@blueprint.get(
    "/v1/admin/usage",
    tags=ADMIN,
    summary="Get the usage of all tenants",
    openapi_extensions=operation(SUMS, (InvalidRequestError, *STORE_ERRORS)),
)
def show_all(query: schemas.TenantsUsageQuery) -> Response:
    """The same of all tenants, or of one."""
    return _answer(query, query.tenant)


def _answer(query: schemas.UsageQuery, tenant: str | None) -> Response:
    until = max(query.until or datetime.now(UTC).date(), EARLIEST)
    since = query.since or until - timedelta(days=USUAL_DAYS - 1)
    url = get_services().settings.database_url
    days = usage.read(url, since, until, tenant, limit=usage.MOST_ROWS + 1)
    if len(days) > usage.MOST_ROWS:
        raise InvalidRequestError(
            f"That is more than {usage.MOST_ROWS:,} rows; ask for fewer days.", param="since"
        )
    rows = [_describe(day) for day in days]
    if query.format == "csv":
        return _export(rows)
    return make_response({"object": "list", "data": rows})


def _describe(day: UsageDay) -> dict[str, Any]:
    return {name: getattr(day, name) for name in COLUMNS} | {"day": day.day.isoformat()}


def _export(rows: list[dict[str, Any]]) -> Response:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS)
    writer.writeheader()
    writer.writerows({name: _inert(value) for name, value in row.items()} for row in rows)
    return make_response(text.getvalue(), {"Content-Type": f"{CSV}; charset=utf-8"})


def _inert(value: Any) -> Any:
    """Text that no spreadsheet takes for a formula (OWASP, CSV injection)."""
    is_formula = isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r"))
    return f"'{value}" if is_formula else value
