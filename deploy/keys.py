"""The commands `sluice keys` and `sluice tenants`. They need SQL only, not the API."""

import time
from typing import Any

import click
import orjson
from rich.table import Table

from api import schemas
from db import keys as records
from db import migrate
from deploy.job_text import make_console
from tasks.contract.access import DEFAULT_TENANT, KeySpec, TenantSpec
from tasks.contract.settings import get_settings
from tasks.maintenance import api_keys

DAY_S = 86_400
ONCE = "This is the only time that the secret is shown."
JSON = click.option("--json", "as_json", is_flag=True, help="As the API has it.")
WEIGHT = click.option("--weight", type=float, help="Its share beside others; default: 1.")
LIMITS = click.option("--limit", "limits", metavar="NAME=NUMBER", multiple=True)


def _url() -> str:
    """The database, with its tables: keys are made before the API starts."""
    url = get_settings().database_url
    migrate(url)
    return url


def _read_limits(given: tuple[str, ...]) -> dict[str, Any]:
    pairs = dict(each.partition("=")[::2] for each in given)
    return {name: int(value) if value.isdecimal() else value for name, value in pairs.items()}


def _without_none(**given: Any) -> dict[str, Any]:
    return {name: value for name, value in given.items() if value not in (None, (), {})}


def _print(document: dict[str, Any]) -> None:
    click.echo(orjson.dumps(document, option=orjson.OPT_INDENT_2))


def _print_secret(made: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        _print(made)
        return
    click.echo(made["key"])
    click.echo(f"{made['id']}, tenant {made['tenant']}. {ONCE}", err=True)


@click.group(name="keys")
def keys() -> None:
    """Look after API keys; the first one has every request need a key."""


@keys.command("create")
@click.argument("name")
@click.option("--tenant", default=DEFAULT_TENANT, show_default=True)
@click.option("--role", "roles", multiple=True, help="user, operator or admin; default: user.")
@click.option("--model", "models", multiple=True, help="Only these models.")
@click.option("--endpoint", "endpoints", multiple=True, help="Only these paths.")
@click.option("--expires-days", type=click.FloatRange(0, 36500, min_open=True))
@WEIGHT
@LIMITS
@JSON
def create(
    expires_days: float | None, limits: tuple[str, ...], as_json: bool, **given: Any
) -> None:
    """Make a key for NAME and show its secret, once."""
    lists = {name: list(given.pop(name)) for name in ("roles", "models", "endpoints")}
    expires_at = int(time.time() + expires_days * DAY_S) if expires_days else None
    terms = _without_none(**given, limits=_read_limits(limits), expires_at=expires_at)
    terms |= {name: values for name, values in lists.items() if values}
    spec = schemas.check(KeySpec, terms)
    _print_secret(api_keys.create(_url(), spec), as_json=as_json)


@keys.command("list")
@click.option("--tenant", help="Of this tenant only.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line.")
def list_keys(tenant: str | None, as_json: bool) -> None:
    """List keys in the order in which they were made."""
    found = [api_keys.describe(key) for key in records.page(_url(), tenant, None, 100_000)]
    if as_json:
        for key in found:
            click.echo(orjson.dumps(key))
        return
    table = Table("id", "begins", "tenant", "name", "roles", "on", "last used", box=None)
    table.columns[0].no_wrap = True
    for key in found:
        at = key["last_used_at"]
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(at)) if at else "never"
        is_on = "yes" if key["is_enabled"] else "no"
        roles = ", ".join(key["roles"])
        table.add_row(key["id"], key["prefix"], key["tenant"], key["name"], roles, is_on, used)
    make_console().print(table)


@keys.command("show")
@click.argument("key")
@click.option("--json", is_flag=True, expose_value=False, help="It is JSON anyway.")
def show(key: str) -> None:
    """Show KEY, an id, without its secret."""
    _print(api_keys.show(_url(), key))


@keys.command("revoke")
@click.argument("key", nargs=-1, required=True)
@JSON
def revoke(key: tuple[str, ...], as_json: bool) -> None:
    """Have each KEY, an id, refused within seconds; its open streams end."""
    url = _url()
    for key_id in key:
        revoked = api_keys.revoke(url, key_id)
        if as_json:
            _print(revoked)
        else:
            click.echo(f"{key_id} is revoked")


@keys.command("rotate")
@click.argument("key")
@click.option("--overlap-s", type=float, default=0, show_default=True, help="The old one lives on.")
@JSON
def rotate(key: str, overlap_s: float, as_json: bool) -> None:
    """Give KEY, an id, a new secret, and show that once."""
    wanted = schemas.check(schemas.Rotation, {"overlap_s": overlap_s})
    _print_secret(api_keys.rotate(_url(), key, wanted.overlap_s), as_json=as_json)


@click.group(name="tenants")
def tenants() -> None:
    """Look after tenants, whose keys and jobs are separate."""


@tenants.command("set")
@click.argument("tenant")
@WEIGHT
@LIMITS
@click.option("--on/--off", "is_enabled", default=None, help="Off: all its keys are refused.")
def set_tenant(
    tenant: str, weight: float | None, limits: tuple[str, ...], is_enabled: bool | None
) -> None:
    """Make TENANT, or give it these values in place of its own."""
    name = schemas.check(schemas.TenantPath, {"tenant_id": tenant}).tenant_id
    terms = _without_none(weight=weight, limits=_read_limits(limits), is_enabled=is_enabled)
    _print(api_keys.set_tenant(_url(), name, schemas.check(TenantSpec, terms)))


@tenants.command("list")
def list_tenants() -> None:
    """List tenants, one JSON object per line."""
    for tenant in records.tenants(_url()):
        click.echo(orjson.dumps(api_keys.describe_tenant(tenant)))


@tenants.command("show")
@click.argument("tenant")
def show_tenant(tenant: str) -> None:
    """Show TENANT."""
    _print(api_keys.show_tenant(_url(), tenant))
